"""Flows through real sockets of this host's kernel (loopback only): what a scripted socket cannot show.

The guest is still driven by hand; time is real, and every wait is for an event of the kernel.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import time
from collections.abc import Iterator, Sequence

import pytest

from netstack.host.io import EpollIO
from netstack.settings import Network
from netstack.stack import Stack
from tests.support import packets
from tests.support.drill import GATEWAY_MAC, GUEST, GUEST_MAC, HOST_ALIAS, pattern
from tests.support.link import MemoryLink
from tests.support.oracle import Oracle
from tests.support.packets import ACK, FIN, IPV4, MASK, RST, SYN, Segment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expected: epoll and eventfd are Linux's")

LIMIT_S = 10.0


class EventLink(MemoryLink):
    """A link in memory whose descriptor the kernel can watch."""

    def __init__(self, **options: int) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.event = os.eventfd(0, os.EFD_NONBLOCK)

    def fileno(self) -> int:
        return self.event

    def feed(self, frame: bytes, header: bytes | None = None) -> None:
        super().feed(frame, header)
        os.eventfd_write(self.event, 1)

    def receive(self) -> Sequence[memoryview]:
        frames = super().receive()
        if not self._waiting:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.event)
        return frames

    def close(self) -> None:
        super().close()
        os.close(self.event)


class Guest:
    """One connection of a guest to a port of the host's loopback."""

    def __init__(self, port: int) -> None:
        self.stack = Stack(Network(), io=EpollIO())
        self.link = EventLink()
        self.stack.attach(self.link)
        self.oracle = Oracle()
        self.port = port
        self.snd, self.rcv, self.iss = 1000, 0, 0
        self.received = bytearray()
        self.fin = False
        self.reset = False
        self.segments: list[Segment] = []
        self.send("S", options=packets.mss_option(1460) + packets.scale_option(7))
        self.until(lambda: self.rcv != 0 or self.reset)
        if not self.reset:
            self.send(".")

    def send(self, flags: str, data: bytes = b"", *, options: bytes = b"") -> None:
        bits = packets.flags_of(flags)
        body = packets.tcp(
            GUEST, HOST_ALIAS, 40000, self.port, self.snd, self.rcv if bits & ACK else 0, bits, 60000, data, options
        )
        self.snd = (self.snd + len(data) + bool(bits & (SYN | FIN))) & MASK
        frame = packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packets.ipv4(GUEST, HOST_ALIAS, 6, body, df=True))
        self.oracle.guest_sent(frame)
        self.link.feed(frame)

    def turn(self, wait_s: float) -> None:
        """Wait for the kernel, let the stack work, take what it sent."""
        select.select([self.stack.fileno()], [], [], wait_s)
        while self.stack.turn():
            pass
        answer = False
        while self.link.sent:
            frame = self.link.sent.popleft()
            self.oracle.stack_sent(frame)
            packet = packets.read_ipv4(frame)
            if packet is None or packet.protocol != packets.TCP:
                continue
            seg = packets.read_tcp(packet)
            self.segments.append(seg)
            if seg.flags & RST:
                self.reset = True
            elif seg.flags & SYN:
                self.iss, self.rcv = seg.seq, (seg.seq + 1) & MASK
            elif seg.seq == self.rcv and (seg.payload or seg.flags & FIN):
                self.received += seg.payload
                self.rcv = seg.end
                self.fin = self.fin or bool(seg.flags & FIN)
                answer = True
        if answer:
            self.send(".")

    def until(self, there: object) -> None:
        end = time.monotonic() + LIMIT_S
        while not there():  # type: ignore[operator]
            assert time.monotonic() < end, f"not within {LIMIT_S} s; {len(self.received)} octets, fin {self.fin}"
            deadline = self.stack.deadline()
            wait_s = 0.05 if deadline is None else min(max(deadline - time.monotonic(), 0.0), 0.05)
            self.turn(wait_s)

    def close(self) -> None:
        self.stack.close()


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LIMIT_S)
        yield server


@pytest.fixture
def pair(listener: socket.socket) -> Iterator[tuple[Guest, socket.socket]]:
    guest = Guest(listener.getsockname()[1])
    far, _address = listener.accept()
    far.settimeout(LIMIT_S)
    with far:
        yield guest, far
    guest.close()


def test_t01_t60_t61_a_whole_exchange_with_half_closes(pair: tuple[Guest, socket.socket]) -> None:
    guest, far = pair
    guest.send("P.", b"request")
    guest.send("F.")
    guest.turn(0.1)
    assert far.recv(100) == b"request"
    guest.turn(0.1)
    assert far.recv(100) == b""
    far.sendall(pattern(300_000))
    far.shutdown(socket.SHUT_WR)
    guest.until(lambda: guest.fin)
    assert guest.received == pattern(300_000)
    guest.until(lambda: not guest.stack.flows())


def test_t03_a_closed_port_is_refused_with_rst(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    guest = Guest(port)
    assert guest.reset and guest.segments[-1].ack == 1001
    guest.close()


def test_t64_a_rst_of_the_far_end_is_a_rst(pair: tuple[Guest, socket.socket]) -> None:
    guest, far = pair
    far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    far.close()
    guest.until(lambda: guest.reset)
    assert not guest.fin


def test_t65_a_rst_of_the_guest_is_a_rst(pair: tuple[Guest, socket.socket]) -> None:
    guest, far = pair
    guest.send("R")
    guest.turn(0.1)
    with pytest.raises(ConnectionResetError):
        far.recv(1)


def test_t58_data_for_a_closed_far_end_is_answered_rst(pair: tuple[Guest, socket.socket]) -> None:
    guest, far = pair
    far.close()
    guest.until(lambda: guest.fin)
    guest.send("P.", b"nobody reads this")
    guest.until(lambda: guest.reset)


def test_t38_back_pressure_of_a_reader_that_sleeps(pair: tuple[Guest, socket.socket]) -> None:
    guest, far = pair
    sent = bytearray()
    window = 1 << 20
    for index in range(20_000):
        part = pattern(1460, index % 50)
        if window < len(part):
            break
        guest.send(".", part)
        sent += part
        guest.turn(0.01)
        window = guest.segments[-1].window << 7
    assert window < 1460, "the window closed"
    got = bytearray()
    while len(got) < len(sent):
        got += far.recv(1 << 16)
        guest.turn(0.0)
    assert got == sent


@pytest.mark.parametrize("pieces", [(b"abc", b"d", b"efg"), (b"", b"x", b""), (bytes(5000), b"!", bytes(5000))])
def test_t52_urgent_octets_of_the_far_end_arrive_inline_and_stall_nothing(
    pair: tuple[Guest, socket.socket], pieces: tuple[bytes, bytes, bytes]
) -> None:
    """Reading stops short at the urgent mark, and without SO_OOBINLINE peeking would skip and repeat octets."""
    guest, far = pair
    before, urgent, after = pieces
    far.sendall(before)
    far.send(urgent, socket.MSG_OOB)
    far.sendall(after)
    guest.until(lambda: len(guest.received) >= len(before + urgent + after))
    assert guest.received == before + urgent + after
    far.sendall(b"tail")
    far.shutdown(socket.SHUT_WR)
    guest.until(lambda: guest.fin)
    assert guest.received == before + urgent + after + b"tail"
