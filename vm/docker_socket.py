"""`docker.sock` of the host: each connection goes to the guest's (spec companions 5), by vsock or by TCP.

    client --STATE/docker.sock--> DockerSocket --dial()--> vsudd in the guest --> /var/run/docker.sock

Half-close crosses both ways (docker attach and exec want it). Nothing is looked at, but for a client that comes while the guest is
not ready: it waits for `wait_s`, and is then told so as Docker's API would. When the guest refuses, the client is closed at once.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import h11

from netstack.errors import ConfigError, HostError
from netstack.link.listening import UnixSocket, answers
from vm.accepting import Accepted, Acceptor
from vm.splice import splice

log = logging.getLogger("pyvpnkit")

LIMIT: Final = 512
"""Connections at once; a client keeps one for each stream (logs -f, attach, events)."""
WAIT_S: Final = 30.0
DIAL_S: Final = 10.0
_REQUEST_S: Final = 1.0
"""A client that is to be refused may take so long to say what it wants."""
PING: Final = "/_ping"
DOCKER: Final = "Docker"
"""What Docker's `Server` header begins with; trim-after-delete fails without (spec companions 3.2)."""
EVERYBODYS: Final = Path("/var/run/docker.sock")

Dial = Callable[[], Awaitable[socket.socket]]
"""A connected, non-blocking socket to the guest; raises `HostError`."""


@dataclass(slots=True)
class Carried:
    """Counters besides those of the acceptor."""

    to_guest: int = 0
    """Octets of connections that are over; so is the next."""
    to_client: int = 0
    refused: int = 0
    """Clients that the guest refused."""
    not_ready: int = 0
    """Clients that were told so."""


class DockerSocket:
    """Listens at `path` (mode 0600) until `close`. Wants a running loop. Raises `ConfigError` when the place is taken."""

    def __init__(
        self, path: Path, dial: Dial, *, ready: bool = True, limit: int = LIMIT, wait_s: float = WAIT_S
    ) -> None:
        self.path = path
        self.carried = Carried()
        self._dial = dial
        self._wait_s = wait_s
        self._ready = asyncio.Event()
        self.ready(ready)
        self._bound = UnixSocket(str(path), socket.SOCK_STREAM, setting="docker_socket")
        self._acceptor = Acceptor(self._bound.sock, self._serve, name="docker.sock", limit=limit)

    @property
    def counts(self) -> Accepted:
        return self._acceptor.counts

    def __len__(self) -> int:
        """Connections there are now."""
        return len(self._acceptor)

    def ready(self, yes: bool = True) -> None:
        """Whether the guest serves; while not, clients wait."""
        if yes:
            self._ready.set()
        else:
            self._ready.clear()

    async def close(self) -> None:
        """End every connection, and remove the path. Harmless when repeated."""
        await self._acceptor.close()
        self._bound.close()

    async def _serve(self, client: socket.socket) -> None:
        try:
            async with asyncio.timeout(self._wait_s):
                await self._ready.wait()
        except TimeoutError:
            self.carried.not_ready += 1
            await _tell_not_ready(client)
            return
        try:
            guest = await self._dial()
        except HostError as error:
            self.carried.refused += 1
            log.debug("docker.sock: %s", error)
            return
        there, back = await splice(client, guest)
        self.carried.to_guest += there
        self.carried.to_client += back


async def _tell_not_ready(client: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    body = json.dumps(
        {"message": "the virtual machine is not ready yet; try again in a moment, or see `pyvpnkit vm status`"}
    ).encode()
    server = h11.Connection(h11.SERVER)
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
    response = h11.Response(status_code=503, reason="Service Unavailable", headers=headers)
    octets = b"".join(server.send(event) or b"" for event in (response, h11.Data(data=body), h11.EndOfMessage()))
    async with asyncio.timeout(_REQUEST_S):
        await loop.sock_recv(client, 65536)  # an answer before the question is thrown away by some clients
        await loop.sock_sendall(client, octets)


async def dial_tcp(host: str, port: int, *, limit_s: float = DIAL_S) -> socket.socket:
    """To a port of the guest that is published at, or routed to, an IP address `host`. Raises `HostError`."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        async with asyncio.timeout(limit_s):
            await asyncio.get_running_loop().sock_connect(sock, (host, port))
    except BaseException as error:
        sock.close()
        if not isinstance(error, OSError):
            raise
        why = f"no answer within {limit_s:g} s" if isinstance(error, TimeoutError) else error.strerror or error
        raise HostError(f"{host} port {port}: {why}") from None
    return sock


def link_docker_sock(source: Path, at: Path = EVERYBODYS, *, hint: str = "") -> bool:
    """Make `at` a symbolic link to `source`, which all programs find without being told; `False` when it was that already.

    What nobody answers at is replaced: a dead socket, a link to one. Raises `ConfigError` when a live socket or any other file is
    there, and `HostError` when the directory is not this user's to write to; `hint` is what root would type.
    """
    try:
        if at.is_symlink() and Path(os.readlink(at)) == source:
            return False
        if os.path.lexists(at):
            if at.exists() and not at.is_socket():
                raise ConfigError(f"{at} exists and is no socket; remove it, or name another place")
            if answers(str(at)):
                where = f" ({os.readlink(at)})" if at.is_symlink() else ""
                raise ConfigError(f"{at}: another program serves there{where}; stop it, or name another place")
        beside = at.with_name(f".{at.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        beside.symlink_to(source)
        beside.replace(at)
    except OSError as error:
        root = f"; it takes root to change it{hint and f': {hint}'}" if isinstance(error, PermissionError) else ""
        raise HostError(f"{at}: {error.strerror}{root}") from None
    return True


def unlink_docker_sock(source: Path, at: Path = EVERYBODYS) -> bool:
    """Remove what `link_docker_sock` made, and nothing else; whether it was there. Raises `HostError`."""
    try:
        if not at.is_symlink() or Path(os.readlink(at)) != source:
            return False
        at.unlink()
    except OSError as error:
        raise HostError(f"{at}: {error.strerror}; it takes root to change it") from None
    return True
