"""The network behind a machine: a `pyvpnkit run` of its own, and what is asked of it by its control API (docs/control.md).

It is started without ports: those are published when the machine is ready, and taken back before it goes. What a guest may ask for
itself (`control` of vsock's ports) is served at a socket where its forwards are its own, `port.sock`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import aiohttp

from netstack.errors import ConfigError, HostError
from vm.api import Lost, Nic, NicKind, Sidecar, StateDir, VsockKind
from vm.hypervisors import tap
from vm.settings import VmSettings

LIMIT_S: Final = 10.0
ACCEPTS_S: Final = 2
"""For a guest to answer a SYN, in whole seconds."""
NAME: Final = "network"
PORTS: Final = "port.sock"
"""Where a guest may ask for ports, by VPNKit's HTTP API and 9P tree."""

LINKS: Final[Mapping[NicKind, str]] = {
    "vhost-user": "vhost-user",
    "qemu-stream": "qemu",
    "qemu-dgram": "unixgram",
    "unixgram": "unixgram",
    "vmnet": "vmnet",
    "tap": "packet",  # its descriptor is the hypervisor's
}
"""The scheme of `--link` for each kind of card."""

REJOINING: Final[frozenset[NicKind]] = frozenset({"vhost-user", "qemu-dgram", "unixgram", "tap"})
"""Links whose other end goes on when the daemon comes again, where the hypervisor lets it (DESIGN 9: "daemon lost")."""


def sidecar(settings: VmSettings, nic: Nic, state: StateDir, vsock: VsockKind | None) -> Sidecar:
    """How the network of a machine is started."""
    scheme = LINKS[nic.kind]
    where = nic.tap if nic.kind == "tap" else str(nic.socket).replace(",", ",,")
    if nic.kind == "vhost-user" and nic.mac:
        where += f",mac={nic.mac}"  # for those that cannot tell the guest themselves
    argv = [sys.executable, "-m", "pyvpnkit", "run"]
    if settings.network.config is not None:
        argv += ["--config", str(settings.network.config)]
    argv += ["--link", f"{scheme}:{where}"]
    # Its end follows that of the guest, whose flows nobody can finish.
    argv += ["--mtu", str(nic.mtu), "--grace", "0"]
    argv += ["--state-dir", str(state.path / "network"), "--control-socket", str(state.network_control)]
    if nic.preferred_ip is not None and nic.mac:
        argv += ["--static-lease", f"{nic.mac}={nic.preferred_ip}"]
    ports = settings.vsock_ports
    if "control" in ports:
        argv += ["--port", str(state.socket(PORTS))]
    if "forwarder" in ports and (how := forwarder(settings, state, vsock)):
        argv += ["--forwarder", how]
    argv += [*settings.network.options, "--ready-fd", "{ready_fd}"]
    if nic.kind == "tap":
        argv = list(tap.behind(nic, argv))
    return Sidecar(name=NAME, argv=tuple(argv), lost=Lost.RESTART)


def forwarder(settings: VmSettings, state: StateDir, vsock: VsockKind | None) -> str:
    """How the network reaches VPNKit's forwarder in the guest; empty where it cannot."""
    port = settings.vsock_ports["forwarder"]
    generation = settings.vsock.forwarder_generation if settings.vsock is not None else 3
    cid = settings.vsock.cid if settings.vsock is not None else 3
    match vsock:
        case "hyperkit":
            return f"hyperkit:{state.vsock}/connect,cid={cid},port={port},generation={generation}"
        case "hybrid" | "vhost-user":  # of our device's two ways the one that tells of a port nobody serves
            return f"connect:{state.vsock}/vsock,port={port},generation={generation}"
        case "per-port":
            return f"unix:{state.vsock}/{cid:08x}.{port:08x},generation={generation}"
    return ""  # AF_VSOCK is none of the daemon's ways


class Network:
    """Asks the daemon behind the control socket at `state.network_control`."""

    def __init__(self, state: StateDir) -> None:
        self._path = str(state.network_control)

    async def leases(self) -> list[dict[str, Any]]:
        """Who has which address. Raises `HostError`, as the others do."""
        found = await self._ask("GET", "/v1/leases")
        leases = found.get("leases", [])
        return [one for one in leases if isinstance(one, dict)] if isinstance(leases, list) else []

    async def address(self, mac: str) -> str | None:
        """The guest's address, if it ever took a lease that still holds."""
        for one in await self.leases():
            if one.get("mac") == mac and one.get("expires_in_s") is not None:
                return str(one["address"])
        return None

    async def lease_end(self, mac: str) -> tuple[float, float]:
        """Between which moments its lease ends, on the loop's clock; zeros without one. One that is taken anew ends later."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        leases = await self.leases()
        answered = loop.time()
        for one in leases:
            if one.get("mac") == mac and isinstance(left := one.get("expires_in_s"), int | float):
                return asked + left, answered + left
        return 0.0, 0.0

    async def publish(self, spec: str) -> str:
        """The forward's text, with its real port."""
        return str((await self._ask("POST", "/v1/forwards", {"spec": spec}))["spec"])

    async def unpublish(self, spec: str) -> None:
        """Nothing where it is not published."""
        await self._ask("DELETE", f"/v1/forwards?spec={quote(spec, safe='')}", missing_ok=True)

    async def accepts(self, address: str, port: int) -> bool:
        """Whether a port of a guest takes connections."""
        target = f"/extension/wait_port?ip={address}&port={port}&timeout={ACCEPTS_S}"
        return (await self._request("GET", target))[0] == 200

    async def dial(self, address: str, port: int, *, limit_s: float = LIMIT_S) -> socket.socket:
        """A connected, non-blocking socket that leads to a port of a guest (gvproxy's /tunnel, docs/ports.md)."""
        loop = asyncio.get_running_loop()
        what = f"port {port} of the guest at {address}"
        request = f"POST /tunnel?ip={address}&port={port} HTTP/1.1\r\nHost: network\r\nContent-Length: 0\r\n\r\n"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(limit_s):
                await loop.sock_connect(sock, self._path)
                await loop.sock_sendall(sock, request.encode())
                answer = b""
                while len(answer) < 2 and (octets := await loop.sock_recv(sock, 2 - len(answer))):
                    answer += octets
            if answer != b"OK":
                raise HostError(f"{what}: not connected")
        except OSError as error:  # and so is TimeoutError
            sock.close()
            raise HostError(f"{what}: {error.strerror or 'no answer'}") from None
        except BaseException:
            sock.close()
            raise
        return sock

    async def _ask(
        self, method: str, target: str, body: dict[str, Any] | None = None, *, missing_ok: bool = False
    ) -> dict[str, Any]:
        status, octets = await self._request(method, target, body)
        try:
            found = json.loads(octets)
        except ValueError:
            found = None
        if status == 404 and missing_ok:
            return {}
        if status >= 400 or not isinstance(found, dict):
            message = found.get("message") if isinstance(found, dict) else None
            words = str(message or f"the network answered {status}")
            raise ConfigError(words) if status == 400 else HostError(words)
        return found

    async def _request(self, method: str, target: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        """Status and body. Raises `HostError`."""
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(self._path), timeout=aiohttp.ClientTimeout(total=LIMIT_S)
                ) as session,
                session.request(method, f"http://network{target}", json=body) as answer,
            ):
                return answer.status, await answer.read()
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise HostError(f"the network does not answer: {error or 'not in time'}") from None
