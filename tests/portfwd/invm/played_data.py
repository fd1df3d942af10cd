"""The host's end of data connections, played octet by octet from the specification (vpnkit 7.3), without our multiplexer.

`Wire` is one socket; `Mux` speaks generation 2 or 3 on it; a `Flow` of theirs and a `Raw` of generation 1 look alike.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from tests.portfwd.invm.played import LIMIT_S

MAGIC: Final = b"https://github.com/moby/vpnkit multiplexer protocol\n\0\0"
WINDOW: Final = 65536


def destination(proto: str, where: str, port: int = 0, *, mapped: bool = False) -> bytes:
    """7.3.1; `mapped`: an IPv4 address in the 16 octets that Go writes."""
    if proto == "unix":
        return b"\3" + struct.pack("<H", len(where)) + where.encode()
    address = ipaddress.ip_address(where).packed
    if mapped:
        address = bytes(10) + b"\xff\xff" + address
    return struct.pack("<BH", {"tcp": 1, "udp": 2}[proto], len(address)) + address + struct.pack("<H", port)


def record(payload: bytes, address: str = "", port: int = 0) -> bytes:
    """7.3.4"""
    ip = ipaddress.ip_address(address).packed if address else b""
    rest = struct.pack("<H", len(ip)) + ip + struct.pack("<HHH", port, 0, len(payload)) + payload
    return struct.pack("<H", len(rest) + 2) + rest


def connected(path: Path) -> socket.socket:
    """To the forwarder's data socket, once it is there."""
    end = time.monotonic() + LIMIT_S
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT_S)
        try:
            sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            assert time.monotonic() < end, "the forwarder does not listen"
            time.sleep(0.01)


class HostFlow(Protocol):
    def send(self, octets: bytes) -> None: ...
    def shutdown(self) -> None: ...
    def read(self, octets: int) -> bytes:
        """Exactly so many."""
        ...

    def read_all(self) -> bytes:
        """Up to the end of the stream."""
        ...

    def refused(self) -> bool:
        """Whether the VM's side ends it without an octet."""
        ...

    def close(self) -> None: ...


class Raw:
    """A flow of generation 1: a connection of its own."""

    def __init__(self, sock: socket.socket, target: bytes) -> None:
        self.sock = sock
        sock.sendall(target)

    def send(self, octets: bytes) -> None:
        self.sock.sendall(octets)

    def shutdown(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def read(self, octets: int) -> bytes:
        found = b""
        while len(found) < octets:
            more = self.sock.recv(octets - len(found))
            assert more, f"ends after {len(found)} of {octets} octets"
            found += more
        return found

    def read_all(self) -> bytes:
        found = b""
        while more := self.sock.recv(65536):
            found += more
        return found

    def refused(self) -> bool:
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def close(self) -> None:
        self.sock.close()


class Flow:
    """A channel of generation 2 or 3."""

    def __init__(self, mux: Mux, number: int) -> None:
        self.mux = mux
        self.id = number
        self.received = bytearray()
        self.passed = 0
        self.sent = 0
        self.allowed = 0
        self.ended = self.closed = self.closing = False

    def send(self, octets: bytes) -> None:
        while octets:
            self.mux.pump(lambda: self.allowed > self.sent or self.closed)
            assert not self.closed, "closed while sending"
            now = octets[: self.allowed - self.sent]
            self.sent += len(now)
            octets = octets[len(now) :]
            self.mux.write(struct.pack("<HBII", 11, 4, self.id, len(now)) + now)

    def shutdown(self) -> None:
        self.mux.write(struct.pack("<HBI", 7, 3, self.id))

    def _take(self, octets: int) -> bytes:
        found = bytes(self.received[:octets])
        del self.received[:octets]
        self.passed += len(found)
        if not self.closing:
            self.mux.write(struct.pack("<HBIQ", 15, 5, self.id, self.passed + WINDOW))
        return found

    def read(self, octets: int) -> bytes:
        found = b""
        while len(found) < octets:
            self.mux.pump(lambda: self.received or self.ended or self.closed)
            assert self.received, f"ends after {len(found)} of {octets} octets"
            found += self._take(octets - len(found))
        return found

    def read_all(self) -> bytes:
        found = b""
        while True:
            self.mux.pump(lambda: self.received or self.ended or self.closed)
            if not self.received:
                return found
            found += self._take(len(self.received))

    def refused(self) -> bool:
        self.mux.pump(lambda: self.received or self.ended or self.closed)
        return self.closed and not self.received

    def close(self) -> None:
        """Our Close, and the wait for theirs: the id is free afterwards."""
        if not self.closing:
            self.closing = True
            self.mux.write(struct.pack("<HBI", 7, 2, self.id))
        self.mux.pump(lambda: self.closed)


class Mux:
    """The host of generation 2 (ids as OCaml's) or 3 (as Go's side that connects)."""

    def __init__(self, sock: socket.socket, generation: int) -> None:
        self.sock = sock
        self.flows: dict[int, Flow] = {}
        self.opened: list[tuple[bytes, Flow]] = []
        """By the VM: destination and flow."""
        self.generation = generation
        self._next = 0x7FFFFFFF if generation == 2 else 0xFFFFFFFF
        self._kept = b""
        if generation == 3:
            sock.sendall(MAGIC)
            while len(self._kept) < len(MAGIC):
                more = sock.recv(4096)
                assert more, "no handshake"
                self._kept += more
            assert self._kept.startswith(MAGIC)
            self._kept = self._kept[len(MAGIC) :]

    def write(self, octets: bytes) -> None:
        self.sock.sendall(octets)

    def open(self, target: bytes) -> Flow:
        number = self._next
        self._next += 1 if self.generation == 2 else -1
        flow = self.flows[number] = Flow(self, number)
        self.write(struct.pack("<HBIB", 8 + len(target), 1, number, 2) + target)
        self.write(struct.pack("<HBIQ", 15, 5, number, WINDOW))
        return flow

    def pump(self, true: Callable[[], object]) -> None:
        """Take frames in until `true()` is."""
        while not true():
            while not self._one():
                more = self.sock.recv(1 << 18)
                assert more, "the data connection ended"
                self._kept += more

    def _one(self) -> bool:
        kept = self._kept
        if len(kept) < 7:
            return False
        length, command, number = struct.unpack_from("<HBI", kept)
        whole = length + (struct.unpack_from("<I", kept, 7)[0] if command == 4 and len(kept) >= 11 else 0)
        if len(kept) < max(whole, length, 11 if command == 4 else 0):
            return False
        self._kept = kept[whole:]
        if command == 1:
            assert number not in self.flows and kept[7] == 2
            flow = self.flows[number] = Flow(self, number)
            self.opened.append((kept[8:length], flow))
            self.write(struct.pack("<HBIQ", 15, 5, number, WINDOW))
            return True
        flow = self.flows[number]
        assert length == {2: 7, 3: 7, 4: 11, 5: 15}[command]
        match command:
            case 2:
                assert not flow.closed, "a second Close"
                flow.closed = True
            case 3:
                assert not flow.ended and not flow.closed, "a Shutdown too many"
                flow.ended = True
            case 4:
                assert not flow.ended and not flow.closed, "Data after the end"
                flow.received += kept[length:whole]
                assert len(flow.received) + flow.passed <= flow.passed + WINDOW, "more than was allowed"
            case 5:
                (flow.allowed,) = struct.unpack_from("<Q", kept, 7)
        if flow.closed and flow.closing:
            del self.flows[number]
        return True


class Host:
    """A host of one generation: `open` makes a flow."""

    def __init__(self, path: Path, generation: int) -> None:
        self.path = path
        self.generation = generation
        self._mux: Mux | None = None
        self._raws: list[Raw] = []

    def open(self, target: bytes) -> HostFlow:
        if self.generation == 1:
            self._raws.append(Raw(connected(self.path), target))
            return self._raws[-1]
        if self._mux is None:
            self._mux = Mux(connected(self.path), self.generation)
        return self._mux.open(target)

    def close(self) -> None:
        for raw in self._raws:
            raw.close()
        if self._mux is not None:
            self._mux.sock.close()
