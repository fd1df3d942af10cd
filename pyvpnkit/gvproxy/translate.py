"""From what gvproxy is asked for to the settings of `pyvpnkit run`, and to what has no setting (`Beside`)."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from ipaddress import IPv4Address, IPv4Network
from typing import Any, Final
from urllib.parse import quote

from dns.zones import Zone
from netstack.errors import ConfigError
from netstack.settings import parse_mac
from pyvpnkit import loader, values
from pyvpnkit.config import BY_KEY, Settings
from pyvpnkit.gvproxy.wanted import GATEWAY_MAC, MTU, SUBNET, Tunnel, Wanted

LONGEST_PREFIX: Final = 29
METADATA: Final = "169.254.0.0/16"
_BASE: Final[Mapping[str, list[str]]] = {
    "state_dir": ["off"],
    "control.socket": ["off"],
    "timeouts.grace_s": ["0"],
    "control.guest_api": ["on"],
    "control.guest_bind": ["any"],
    "network.lease_s": ["3600"],
    "network.domain": ["off"],
    "network.gateway_names": [""],
    "network.host_names": [""],
    "capture.size": ["0"],
}
_TOGETHER: Final = (("vpnkit", "qemu"), ("vpnkit", "bess"), ("qemu", "bess"))
"""Links that gvproxy does not have at once."""
_FORMS: Final = {
    "qemu": "unix:///PATH or tcp://IP:PORT",
    "bess": "unixpacket:///PATH",
    "vfkit": "unixgram:///PATH",
    "vpnkit": "unix:///PATH, tcp://IP:PORT or vsock://null:PORT/DIR",
    "listen": "unix:///PATH, tcp://IP:PORT or vsock://null:PORT/DIR",
    "notification": "unix:///PATH",
}
_VSOCK: Final = re.compile(r"vsock://null:(\d{1,10})(/.*)", re.ASCII)


@dataclass(slots=True, kw_only=True)
class Extra:
    """What no setting says."""

    zones: list[Zone] = field(default_factory=list)
    macs: dict[uuid.UUID, bytes] = field(default_factory=dict)
    """Machines on a vpnkit link whose MAC is given."""
    tunnels: list[tuple[str, str]] = field(default_factory=list)
    """Path here -> `ssh-tunnel://...`."""
    notification: str = ""
    """Path of a Unix socket, or empty."""


class Translation:
    """Of one `Wanted`: `given` (option key -> texts) and `extra`; `complaints` is what is wrong, `notes` what is to be said."""

    def __init__(self, wanted: Wanted) -> None:
        self.complaints: list[str] = []
        self.notes = list(wanted.notes)
        self.given: dict[str, list[str]] = {key: list(texts) for key, texts in _BASE.items()}
        self.extra = Extra()
        self._wanted = wanted
        self._stack = wanted.stack
        self._addresses = self._network()
        self._tried("mtu", lambda: self._give("network.mtu", str(self._stack.get("mtu") or MTU)))
        self._tried(
            "gatewayMacAddress",
            lambda: self._give("network.gateway_mac", self._stack.get("gatewayMacAddress", GATEWAY_MAC)),
        )
        self._tried("log-level", lambda: self._give("log_level", wanted.log_level))
        if path := self._stack.get("capture-file"):
            self._give("capture.file", values.path(path))
        if wanted.ec2:
            self._give("network.allow", METADATA)
        self._links()
        self._each("stack.forwards", self._stack.get("forwards", {}).items(), self._forward)
        self._each("stack.dhcpStaticLeases", self._stack.get("dhcpStaticLeases", {}).items(), self._lease)
        self._each("stack.vpnKitUUIDMacAddresses", self._stack.get("vpnKitUUIDMacAddresses", {}).items(), self._mac)
        self._each("stack.dns", self._stack.get("dns", ()), self._zone)
        self._each(
            "stack.dnsSearchDomains",
            self._stack.get("dnsSearchDomains", ()),
            lambda name: self._give("network.search", str(name)),
        )
        self._each("forward", wanted.tunnels, self._tunnel)
        if wanted.notification:
            self._tried("notification", self._notification)

    def _give(self, key: str, text: str) -> None:
        """Raises `ConfigError`."""
        BY_KEY[key].collect([text])
        self.given.setdefault(key, []).append(text)

    def _tried(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
        except ConfigError as error:
            self.complaints.append(f"{name}: {error}")

    def _each(self, name: str, items: Any, step: Callable[[Any], None]) -> None:
        for item in items:
            self._tried(name, partial(step, item))

    # Addresses.

    def _network(self) -> dict[str, str]:
        """`{gateway}`, `{device}` and `{host}`, by their names; gvproxy's choice where nobody says."""
        text = self._stack.get("subnet", SUBNET)
        try:
            subnet = IPv4Network(text)
            if subnet.prefixlen > LONGEST_PREFIX:
                raise ValueError(f"it must be /{LONGEST_PREFIX} or larger")
        except ValueError as error:
            self.complaints.append(f"subnet: {text!r}: {error}; write a network such as {SUBNET}")
            return {}
        chosen = {
            "gateway": ("gatewayIP", subnet.network_address + 1),
            "device": ("deviceIP", subnet.network_address + 2),
            "host": ("hostIP", subnet.broadcast_address - 1),
        }
        found: dict[str, str] = {}
        for name, (key, default) in chosen.items():
            word = str(self._stack.get(key) or default)
            try:
                address = IPv4Address(word)
            except ValueError:
                self.complaints.append(f"{key}: {word!r} is not an IPv4 address")
                continue
            if address not in subnet or address in (subnet.network_address, subnet.broadcast_address):
                self.complaints.append(f"{key}: {address} is not a usable address of {subnet}")
            if word in found.values():
                self.complaints.append(f"{key}: {address} is used twice; gatewayIP, deviceIP and hostIP must differ")
            found[name] = word
        if self.complaints:
            return found
        self.given["network.subnet"] = [str(subnet)]
        self.given["network.gateway"] = [found["gateway"]]
        self._host(found["host"])
        return found

    def _host(self, host: str) -> None:
        """The addresses that stand for this host: one, and for its loopback."""
        nat = self._stack.get("nat", {host: "127.0.0.1"})
        others = [f"{guest}: {real}" for guest, real in nat.items() if real != "127.0.0.1"]
        if others or len(nat) > 1:
            said = ", ".join(others or map(str, nat))
            self.complaints.append(f"stack.nat: {said}: one address can stand for 127.0.0.1, and none for another")
            return
        self.given["network.host_alias"] = [str(next(iter(nat), "off"))]
        further = [str(one) for one in self._stack.get("gatewayVirtualIPs", ()) if str(one) not in nat]
        if further:
            self._tried("stack.gatewayVirtualIPs", lambda: self._give("network.gateway_aliases", ",".join(further)))

    def _filled(self, text: object) -> str:
        """A text with the names of addresses replaced."""
        found = str(text)
        for name, address in self._addresses.items():
            found = found.replace(f"{{{name}}}", address)
        return found

    # Links and the API.

    def _links(self) -> None:
        wanted = self._wanted
        for first, second in _TOGETHER:
            if first in wanted.links and second in wanted.links:
                self.complaints.append(f"listen-{second}: cannot be had beside -listen-{first}; leave one of them out")
        for kind, url in wanted.links.items():
            self._tried(f"listen-{kind}", partial(self._link, kind, url))
        self._each("listen", wanted.listen, self._listen)
        if not wanted.links and not wanted.listen:
            self.complaints.append(
                "nothing to listen on; give -listen-qemu, -listen-vfkit, -listen-vpnkit, -listen-bess or -listen"
            )

    def _link(self, kind: str, url: str) -> None:
        if kind == "stdio":
            return self._give("links", "stdio:")
        scheme, where = _place(kind, url)
        where = where.replace(",", ",,")
        match kind, scheme:
            case "qemu", "unix" | "tcp":
                self._give("links", f"qemu:{'tcp:' * (scheme == 'tcp')}{where},once=on")
            case "vpnkit", "unix" | "tcp":
                self._give("links", f"vmnet:{'tcp:' * (scheme == 'tcp')}{where}")
            case "bess", "unixpacket":
                self._give("links", f"bess:{where},once=on")
            case "vfkit", "unixgram":
                self._give("links", f"unixgram:{where},once=on")
            case _:
                raise ConfigError(f"{url!r}: write {_FORMS[kind]}")

    def _listen(self, url: str) -> None:
        scheme, where = _place("listen", url)
        if scheme not in ("unix", "tcp"):
            raise ConfigError(f"{url!r}: write {_FORMS['listen']}")
        if "," in where:
            raise ConfigError(f"{url!r}: a path with a comma cannot be had here; choose another one")
        self._give("control.listen", f"{scheme}:{where}")

    def _notification(self) -> None:
        scheme, where = _place("notification", self._wanted.notification)
        if scheme != "unix":
            raise ConfigError(f"{self._wanted.notification!r}: write {_FORMS['notification']}")
        self.extra.notification = where

    # What leads where.

    def _forward(self, pair: tuple[object, object]) -> None:
        """`127.0.0.1:2222` or `udp:...` -> `ADDRESS:PORT` of the network; without an address that of the machine."""
        local, remote = map(str, pair)
        protocol, colon, place = local.rpartition("udp:")
        if protocol:
            raise ConfigError(f"{local!r}: write IP:PORT or udp:IP:PORT")
        bind, _, port = place.rpartition(":")
        guest, _, guest_port = remote.rpartition(":")
        self._give(
            "publish", f"{colon}{bind or '0.0.0.0'}:{port}:{guest or self._addresses.get('device', '')}:{guest_port}"
        )

    def _lease(self, pair: tuple[object, object]) -> None:
        address, mac = map(self._filled, pair)
        self._give("network.static_leases", f"{mac}={address}")

    def _mac(self, pair: tuple[object, object]) -> None:
        try:
            known = uuid.UUID(str(pair[0]))
        except ValueError:
            raise ConfigError(f"{str(pair[0])[:60]!r} is no UUID") from None
        self.extra.macs[known] = parse_mac(str(pair[1]))

    def _zone(self, node: object) -> None:
        if not isinstance(node, dict):
            raise ConfigError(f"a zone is a mapping with name and records, not {str(node)[:60]!r}")
        records = node.get("records")
        document = {
            **node,
            "records": [self._record(one) for one in records] if isinstance(records, list) else records or [],
        }
        self.extra.zones.append(Zone.parse(document))

    def _record(self, node: object) -> object:
        return {key: self._filled(value) for key, value in node.items()} if isinstance(node, dict) else node

    def _tunnel(self, tunnel: Tunnel) -> None:
        if not os.path.isfile(tunnel.identity):
            raise ConfigError(f"identity {tunnel.identity}: there is no such file; name a private key")
        key = quote(os.path.abspath(tunnel.identity), safe="/")
        device = self._addresses.get("device", "")
        remote = f"ssh-tunnel://{quote(tunnel.user, safe='')}@{device}:22{quote(tunnel.dest, safe='/')}?key={key}"
        self.extra.tunnels.append((tunnel.socket, remote))


def _place(kind: str, url: str) -> tuple[str, str]:
    """Scheme and path, or `IP:PORT`. Raises `ConfigError`."""
    if (found := _VSOCK.fullmatch(url)) is not None and int(found[1]) < 1 << 32 and kind in ("listen", "vpnkit"):
        return "unix", values.hyperkit_path(found[2], int(found[1]))
    scheme, separator, where = url.partition("://")
    if not separator or not where:
        raise ConfigError(f"{url!r}: write {_FORMS[kind]}")
    if scheme == "vsock":
        raise ConfigError(f"{url!r}: AF_VSOCK is not opened here; write {_FORMS[kind]}")
    if scheme == "tcp":
        host, _, port = where.rpartition(":")
        return scheme, f"{host or '0.0.0.0'}:{port}"
    if not where.startswith("/"):
        raise ConfigError(f"{url!r}: the path must be absolute; write {_FORMS[kind]}")
    return scheme, where


def settings(wanted: Wanted) -> tuple[Settings, Translation]:
    """Raises `ConfigErrors`."""
    said = Translation(wanted)
    if said.complaints:
        raise loader.ConfigErrors([f"gvproxy: {complaint}" for complaint in said.complaints])
    return loader.load(None, said.given), said
