"""A guest of a few lines on QEMU's stream framing, and a daemon in a process of its own to attach it to."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import dnslib

from tests.support import packets

BROADCAST = b"\xff" * 6
GATEWAY = packets.ip("192.168.65.1")
HOST = packets.ip("192.168.65.2")
GATEWAY_MAC = bytes.fromhex("f61636bcf9c6")
LIMIT_S = 10.0


class StreamGuest:
    """Speaks Ethernet over a connected stream; answers ARP for its address while it waits for something."""

    LENGTH = struct.Struct("!I")
    """What goes before each frame."""
    GATEWAY = GATEWAY
    GATEWAY_MAC = GATEWAY_MAC

    def __init__(self, path: str, mac: bytes = b"\x02\0\0\0\0\x07") -> None:
        self.mac = mac
        self.address = bytes(4)
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(LIMIT_S)
        wait_until(lambda: self._connected(path), LIMIT_S)
        self._received = b""
        self._port = 40000

    def _connected(self, path: str) -> bool:
        """Between bind and listen the daemon's socket is there and refuses; hypervisors try again too."""
        try:
            self._sock.connect(path)
        except ConnectionRefusedError:
            return False
        return True

    def close(self) -> None:
        self._sock.close()

    def send(self, frame: bytes) -> None:
        self._sock.sendall(self.LENGTH.pack(len(frame)) + frame)

    def send_ip(self, destination: bytes, protocol: int, payload: bytes) -> None:
        packet = packets.ipv4(self.address, destination, protocol, payload)
        self.send(packets.ether(self.GATEWAY_MAC, self.mac, packets.IPV4, packet))

    def frames(self, limit_s: float = LIMIT_S) -> Iterator[bytes]:
        """Frames as they come; `TimeoutError` when none does for `limit_s`, the end when the link is closed."""
        self._sock.settimeout(limit_s)
        while True:
            while len(self._received) >= self.LENGTH.size:
                end = self.LENGTH.size + self.LENGTH.unpack_from(self._received)[0]
                if len(self._received) < end:
                    break
                frame, self._received = self._received[self.LENGTH.size : end], self._received[end:]
                self._answer_arp(frame)
                yield frame
            try:
                octets = self._sock.recv(65536)
            except ConnectionResetError:
                return
            if not octets:
                return
            self._received += octets

    def _answer_arp(self, frame: bytes) -> None:
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\1" and frame[38:42] == self.address:
            reply = packets.arp(2, self.mac, self.address, frame[22:28], frame[28:32])
            self.send(packets.ether(frame[6:12], self.mac, packets.ARP, reply))

    def packets(self, protocol: int, limit_s: float = LIMIT_S) -> Iterator[packets.Packet]:
        for frame in self.frames(limit_s):
            packet = packets.read_ipv4(frame)
            if packet is not None and packet.protocol == protocol:
                yield packet

    # DHCP (RFC 2131), as little as goes.

    def _dhcp(self, kind: int, options: bytes = b"") -> packets.Packet:
        head = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x12345678, 0, 0x8000) + bytes(16) + self.mac.ljust(16, b"\0")
        message = head.ljust(236, b"\0") + bytes((0x63, 0x82, 0x53, 0x63, 53, 1, kind)) + options + b"\xff"
        datagram = packets.udp(bytes(4), b"\xff" * 4, 68, 67, message)
        packet = packets.ipv4(bytes(4), b"\xff" * 4, packets.UDP, datagram)
        self.send(packets.ether(BROADCAST, self.mac, packets.IPV4, packet))
        return next(packet for packet in self.packets(packets.UDP) if packet.payload[:4] == b"\0\x43\0\x44")

    def discover(self) -> bytes:
        """The address offered."""
        return self._dhcp(1).payload[8 + 16 : 8 + 20]

    def lease(self) -> bytes:
        """DISCOVER, OFFER, REQUEST, ACK; the address leased."""
        offered = self.discover()
        acknowledged = self._dhcp(3, b"\x32\x04" + offered + b"\x36\x04" + self.GATEWAY)
        self.address = acknowledged.payload[8 + 16 : 8 + 20]
        assert self.address == offered
        self.send(
            packets.ether(
                BROADCAST, self.mac, packets.ARP, packets.arp(1, self.mac, self.address, bytes(6), self.GATEWAY)
            )
        )
        return self.address

    # DNS.

    def asks(self, name: str) -> tuple[int, list[str]]:
        """What the gateway says of a name: the code, and addresses."""
        question = dnslib.DNSRecord.question(name).pack()
        self.send_ip(self.GATEWAY, packets.UDP, packets.udp(self.address, self.GATEWAY, 5353, 53, question))
        answers = (one.payload for one in self.packets(packets.UDP))
        found = dnslib.DNSRecord.parse(next(one for one in answers if one[:4] == struct.pack("!HH", 53, 5353))[8:])
        return found.header.rcode, [str(record.rdata) for record in found.rr]

    # TCP, as little as goes.

    def connect(self, destination: bytes, port: int) -> Connection | None:
        """A connection, or `None` when it was refused."""
        self._port += 1
        connection = Connection(self, destination, port, self._port)
        connection.send(packets.SYN)
        for segment in connection.segments():
            if segment.flags & packets.RST:
                return None
            if segment.flags & packets.SYN:
                connection.ack = segment.end
                connection.send(packets.ACK)
                return connection
        raise AssertionError("the link ended")

    def listen(self, port: int, limit_s: float = LIMIT_S) -> Connection:
        """Take the next connection that comes in to `port`."""
        for packet in self.packets(packets.TCP, limit_s):
            segment = packets.read_tcp(packet)
            if segment.dport == port and segment.flags & packets.SYN:
                connection = Connection(self, segment.source, segment.sport, port)
                connection.ack = segment.end
                connection.send(packets.SYN | packets.ACK)
                # As a kernel, whose program has nothing to write to before the connection is established.
                while next(connection.segments()).flags & packets.SYN:
                    pass
                return connection
        raise AssertionError("the link ended")


class Connection:
    """One end of a TCP connection; sends in order and counts, nothing more."""

    def __init__(self, guest: StreamGuest, remote: bytes, port: int, own_port: int) -> None:
        self.guest, self.remote, self.port, self.own_port = guest, remote, port, own_port
        self.seq, self.ack = 1000, 0

    def send(self, flags: int, payload: bytes = b"") -> None:
        segment = packets.tcp(
            self.guest.address, self.remote, self.own_port, self.port, self.seq, self.ack, flags, 65535, payload
        )
        self.guest.send_ip(self.remote, packets.TCP, segment)
        self.seq += len(payload) + bool(flags & packets.SYN) + bool(flags & packets.FIN)

    def segments(self, limit_s: float = LIMIT_S) -> Iterator[packets.Segment]:
        for packet in self.guest.packets(packets.TCP, limit_s):
            segment = packets.read_tcp(packet)
            if (segment.source, segment.sport, segment.dport) == (self.remote, self.port, self.own_port):
                yield segment

    def ended_by(self, limit_s: float = LIMIT_S) -> str:
        """`RST` or `FIN`, whichever comes; data on the way is acknowledged."""
        for segment in self.segments(limit_s):
            if segment.flags & packets.RST:
                return "RST"
            self.ack = segment.end
            if segment.flags & packets.FIN:
                return "FIN"
            if segment.payload:
                self.send(packets.ACK)
        return "link closed"


class Daemon:
    """`pyvpnkit run` in a process of its own, in a directory of its own."""

    def __init__(self, directory: Path, *options: str, environment: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.link = str(directory / "net.sock")
        self.log = directory / "log"
        ready, ready_in_child = os.pipe()
        os.set_inheritable(ready_in_child, True)
        argv = [
            sys.executable,
            "-m",
            "pyvpnkit",
            "run",
            "--link",
            f"qemu:{self.link}",
            "--ready-fd",
            str(ready_in_child),
        ]
        if "--state-dir" not in options:
            argv += ["--state-dir", "off"]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*argv, *options],
                stderr=log,
                close_fds=False,
                env={**os.environ, **(environment or {})},
                cwd=Path(__file__).parents[2],
            )
        os.close(ready_in_child)
        self._ready = ready

    def wait_ready(self, limit_s: float = LIMIT_S) -> None:
        """Until the daemon says so on its descriptor."""
        readable, _, _ = select.select([self._ready], [], [], limit_s)
        said = os.read(self._ready, 10) if readable else b"nothing"
        assert said == b"1", f"ready: {said!r}\n{self.said()}"

    def said(self) -> str:
        return self.log.read_text()

    def wait_said(self, words: str, limit_s: float = LIMIT_S) -> str:
        """Until `words` are in the log; the whole log."""
        wait_until(lambda: words in self.said(), limit_s, lambda: f"never said {words!r}:\n{self.said()}")
        return self.said()

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, limit_s: float = LIMIT_S) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def close(self) -> None:
        os.close(self._ready)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_until(true: Callable[[], bool], limit_s: float = LIMIT_S, why: Callable[[], str] = lambda: "") -> None:
    """Look every few milliseconds, for what another process does."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, why()
        time.sleep(0.005)


@contextlib.contextmanager
def daemon(directory: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Daemon]:
    """A daemon that is ready; killed at the end if it is still there."""
    made = Daemon(directory, *options, environment=environment)
    try:
        made.wait_ready()
        yield made
    finally:
        made.close()
