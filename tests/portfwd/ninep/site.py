"""A table of ports on a real registry, and clients of it: beside each other without a socket, or over one."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any, cast

from netstack.api import Endpoint
from netstack.errors import Malformed
from portfwd.ninep.client import Client
from portfwd.ninep.files import Filesystem
from portfwd.ninep.ports import PortTable
from portfwd.ninep.server import Session
from portfwd.registry import Registry

GUEST = socket.inet_aton("192.168.65.3")


@dataclass
class Lent:
    """A UDP port as the stack holds it."""

    guest: Endpoint
    sock: socket.socket

    def close(self) -> None:
        self.sock.close()


@dataclass
class Guests:
    """Stands where the stack will: keeps what it is handed."""

    dialled: list[tuple[Endpoint, socket.socket]] = field(default_factory=list)
    lent: list[Lent] = field(default_factory=list)

    def dial(self, guest: Endpoint, sock: socket.socket, **_more: Any) -> None:
        self.dialled.append((guest, sock))

    def datagrams(self, guest: Endpoint, sock: socket.socket, **_more: Any) -> Lent:
        self.lent.append(Lent(guest, sock))
        return self.lent[-1]

    def hang_up(self) -> None:
        for _, sock in self.dialled:
            sock.close()
        for lent in self.lent:
            lent.close()


class Direct:
    """A session in a socket's clothes: what is sent is answered at once."""

    def __init__(self, files: Filesystem, **bounds: int) -> None:
        self.session = Session(files, **bounds)

    def settimeout(self, _timeout: float) -> None: ...

    def sendall(self, octets: bytes) -> None:
        self.session.feed(octets)

    def recv(self, _octets: int) -> bytes:
        try:
            return self.session.next() or b""
        except Malformed:
            return b""

    def close(self) -> None:
        self.session.close()


class Site:
    """The registry, the table, and its clients."""

    def __init__(self, **table: Any) -> None:
        self.guests = Guests()
        self.registry = Registry(lambda: GUEST)
        self.table = PortTable(self.registry, **table)
        self._clients = 0

    def wire(self, **bounds: int) -> Direct:
        """The server's end of a new connection."""
        self._clients += 1
        return Direct(self.table.connect(f"test#{self._clients}"), **bounds)

    def client(self, version: str = "9P2000", **bounds: int) -> Client:
        return client_of(self.wire(**bounds), version)

    def close(self) -> None:
        self.registry.close()
        self.guests.hang_up()


def client_of(wire: Direct, version: str = "9P2000") -> Client:
    return Client(cast(socket.socket, wire), version=version)
