"""Addresses of the in-VM tools, and the sockets they stand for (spec vpnkit 1.2, 7.4).

    PORT, CID/PORT     vsock: a program inside a VM reaches its host by it. CID is 2 (the host) when dialling without one;
                       a listener takes any CID, whatever is written
    tcp:IP:PORT        TCP; an IPv6 address stands in brackets
    fd:N               a socket this process inherited: a connected one to dial (once), a listening one to accept from
    unix:PATH          a unix socket, also where the path looks like one of the others
    anything else      the path of a unix socket

A vsock is opened for nothing but an address that says so: on a host the same call may reach a machine of somebody else.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import re
import socket
import stat
import sys
from dataclasses import dataclass
from typing import Final

from netstack.errors import ConfigError, HostError

FORMS: Final = "PORT or CID/PORT (vsock), unix:PATH or a path, tcp:IP:PORT, fd:N"

VMADDR_CID_HOST: Final = 2  # vsock(7)
VMADDR_CID_ANY: Final = 0xFFFFFFFF  # vsock(7)

UNIX_PATH_MAX: Final = 107 if sys.platform == "linux" else 103
"""Octets of a unix socket's path without the final NUL: unix(7); BSD has 104 with it."""

BACKLOG: Final = 1024
FULL_QUEUE_RETRY_S: Final = 0.05
"""A unix listener whose queue is full refuses a non-blocking connect with EAGAIN; it is asked again so often."""

_VSOCK: Final = re.compile(r"(?:(\d{1,10})/)?(\d{1,10})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Address:
    """One place to dial or to listen on."""

    kind: str
    """`vsock`, `tcp`, `fd` or `unix`."""
    path: str = ""
    host: str = ""
    port: int = 0
    cid: int | None = None
    fd: int = -1

    @classmethod
    def parse(cls, text: str) -> Address:
        """The inverse of `str`; raises `ConfigError`."""
        if not text:
            raise ConfigError(f"an address is empty; write {FORMS}")
        if match := _VSOCK.fullmatch(text):
            cid, port = match[1], int(match[2])
            if port > 0xFFFFFFFF or (cid is not None and int(cid) > 0xFFFFFFFF):
                raise ConfigError(f"address {text!r}: a vsock's CID and port are below 4294967296")
            return cls("vsock", port=port, cid=None if cid is None else int(cid))
        scheme, colon, rest = text.partition(":")
        if colon and scheme == "unix":
            if not rest:
                raise ConfigError(f"address {text!r}: the path is missing; write unix:PATH")
            short_path(rest)
            return cls("unix", path=rest)
        if colon and scheme == "fd":
            if not rest.isascii() or not rest.isdigit():
                raise ConfigError(f"address {text!r}: {rest!r} is no descriptor; write fd:N")
            return cls("fd", fd=int(rest))
        if colon and scheme == "tcp":
            return cls._tcp(text, rest)
        short_path(text)
        return cls("unix", path=text)

    @classmethod
    def _tcp(cls, text: str, rest: str) -> Address:
        host, _, port = rest.rpartition(":")
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            address = ipaddress.ip_address(bare)
        except ValueError:
            raise ConfigError(f"address {text!r}: {host!r} is no IP address; write tcp:IP:PORT") from None
        if (address.version == 6) != (bare != host):
            raise ConfigError(f"address {text!r}: an IPv6 address, and no other, stands in brackets: tcp:[::1]:80")
        if not port.isascii() or not port.isdigit() or int(port) > 65535:
            raise ConfigError(f"address {text!r}: {port!r} is no port; write tcp:IP:PORT")
        return cls("tcp", host=bare, port=int(port))

    def __str__(self) -> str:
        match self.kind:
            case "vsock":
                return str(self.port) if self.cid is None else f"{self.cid}/{self.port}"
            case "tcp":
                return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"
            case "fd":
                return f"fd:{self.fd}"
        return f"unix:{self.path}"

    @property
    def public(self) -> bool:
        """Whether a listener here can be reached from other machines."""
        return self.kind == "tcp" and not ipaddress.ip_address(self.host).is_loopback

    def listener(self, *, mode: int | None = None) -> Listening:
        """Bind and listen; raises `HostError`. `mode` is that of a unix socket's path, else the umask decides."""
        try:
            if self.kind == "unix":
                return self._unix_listener(mode)
            sock = self._inherited() if self.kind == "fd" else self._socket()
            try:
                if self.kind == "vsock":
                    sock.bind((VMADDR_CID_ANY, self.port))
                elif self.kind == "tcp":
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    sock.bind((self.host, self.port))
                elif not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    raise HostError(f"{self}: the descriptor is no listening socket")
                if self.kind != "fd":
                    sock.listen(BACKLOG)
            except BaseException:
                sock.close()
                raise
            return Listening(sock)
        except OSError as error:
            raise HostError(f"cannot listen on {self}: {error.strerror or error}") from None

    def _unix_listener(self, mode: int | None) -> Listening:
        path = short_path(self.path)
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            pass
        else:
            if not stat.S_ISSOCK(there.st_mode):
                raise HostError(
                    f"cannot listen on {self}: a file is there, and only a socket is replaced; remove it yourself"
                )
            os.unlink(path)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.setblocking(False)
            sock.bind(path)
            made = os.lstat(path)
            if mode is not None:
                os.chmod(path, mode)  # nobody can connect before it listens
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return Listening(sock, os.path.abspath(path), (made.st_dev, made.st_ino))

    async def connect(self) -> socket.socket:
        """A connected, non-blocking socket; raises `OSError`, `HostError` for an inherited descriptor that is none."""
        if self.kind == "fd":
            return self._inherited()
        match self.kind:
            case "vsock":
                where: object = (VMADDR_CID_HOST if self.cid is None else self.cid, self.port)
            case "tcp":
                where = (self.host, self.port)
            case _:
                where = short_path(self.path)
        return await connected(self._socket(), where)

    def _socket(self) -> socket.socket:
        match self.kind:
            case "vsock":
                if not hasattr(socket, "AF_VSOCK"):
                    raise HostError(f"{self}: this system has no vsock; use unix:PATH or tcp:IP:PORT")
                family: int = socket.AF_VSOCK
            case "tcp":
                family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            case _:
                family = socket.AF_UNIX
        sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        if self.kind == "tcp":
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _inherited(self) -> socket.socket:
        try:
            sock = socket.socket(fileno=self.fd)
        except OSError as error:
            raise HostError(f"{self}: {error.strerror}; give the number of a socket this process inherits") from None
        if sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise HostError(f"{self}: the descriptor is no stream socket")
        sock.setblocking(False)
        os.set_inheritable(sock.fileno(), False)
        return sock


@dataclass(slots=True)
class Listening:
    """A bound, listening, non-blocking socket; `close` removes a path it made and which is still its own."""

    sock: socket.socket
    path: str = ""
    made: tuple[int, int] = (0, 0)

    def close(self) -> None:
        self.sock.close()
        if not self.path:
            return
        try:
            there = os.lstat(self.path)
            if (there.st_dev, there.st_ino) == self.made:
                os.unlink(self.path)
        except OSError:
            pass  # somebody else removed it
        self.path = ""


def short_path(path: str, *, most: int = UNIX_PATH_MAX) -> str:
    """`path` in a form that fits a unix socket's address: relative to the current directory where it is too long absolute.

    Raises `ConfigError` when that is too long as well. `most` is in octets.
    """
    if "\0" in path:
        raise ConfigError(f"unix path {path!r} has a zero octet in it")
    if len(os.fsencode(path)) <= most:
        return path
    relative = os.path.relpath(path) if os.path.isabs(path) else path
    if len(os.fsencode(relative)) > most:
        raise ConfigError(
            f"unix path {path!r} is longer than {most} octets, also relative to {os.getcwd()!r}; use a shorter one"
        )
    return relative


async def connected(sock: socket.socket, where: object) -> socket.socket:
    """Connect a non-blocking socket of any family; on failure it is closed and `OSError` raised. Takes over `sock`.

    The loops' own `sock_connect` differ in which families they know and look names up; this asks the kernel alone.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            number = sock.connect_ex(where)  # type: ignore[arg-type]
            if number == errno.EAGAIN:
                await asyncio.sleep(FULL_QUEUE_RETRY_S)
            else:
                break
        if number in (errno.EINPROGRESS, errno.EINTR):
            await writable(loop, sock)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return sock


async def writable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    """Return once the socket can be written to (or has failed)."""
    ready = asyncio.Event()
    descriptor = sock.fileno()
    loop.add_writer(descriptor, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_writer(descriptor)
