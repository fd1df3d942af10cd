"""A guest without a stack: links that keep what they are sent, a port and an output as the proxies use them, and datagrams.

Frames are taken apart here with `struct` alone, independent of `netstack.wire`, and every one is checked: lengths agree,
checksums right (or left to the link in the virtio way), padding zero.
"""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from netstack.host.icmp_proxy import IcmpProxy
from netstack.host.io import EpollIO
from netstack.host.udp_proxy import UdpProxy
from netstack.observe.events import Event, EventBus
from netstack.observe.metrics import Counters
from netstack.policy.egress import Egress
from netstack.settings import Network

GUEST = bytes((192, 168, 65, 3))
OTHER = bytes((192, 168, 65, 4))
GATEWAY = bytes((192, 168, 65, 1))
ALIAS = bytes((192, 168, 65, 2))
GUEST_MAC = bytes.fromhex("020000000003")
GATEWAY_MAC = bytes.fromhex("f61636bcf9c6")


def ones_sum(data: bytes) -> int:
    """RFC 1071, the slow way."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass
class Datagram:
    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    payload: bytes
    identification: int = 0


@dataclass
class Echo:
    source: bytes
    destination: bytes
    identifier: int
    sequence: int
    data: bytes


@dataclass
class IcmpError:
    source: bytes
    destination: bytes
    type: int
    code: int
    mtu: int
    quoted: bytes


class FakeLink:
    """`headroom` 0: plain; 4: a big-endian length; 12: a virtio-net header with checksums left to the peer."""

    name = "test:link"
    max_frame = 65550
    tso = 0

    def __init__(self, headroom: int = 0, mtu: int = 1500) -> None:
        self.headroom = headroom
        self.partial_checksums = headroom == 12
        self.mtu = mtu
        self.sent: list[bytes] = []
        self.batches: list[int] = []

    def prefix(self, octets: int) -> bytes:
        if self.headroom == 4:
            return octets.to_bytes(4, "big")
        return bytes(self.headroom)


class FakePort:
    def __init__(self, link: FakeLink) -> None:
        self.link = link
        self.mtu = link.mtu
        self.partial = link.partial_checksums
        self.headroom = link.headroom

    def send(self, frames: Sequence[Sequence[bytes]]) -> None:
        self.link.batches.append(len(frames))
        self.link.sent += [b"".join(frame) for frame in frames]


class FakeNeighbour:
    def __init__(self, ip: bytes, mac: bytes, port: FakePort | None) -> None:
        self.ip, self.mac, self.port, self.version = ip, mac, port, 0


@dataclass
class FakePacket:
    port: Any
    source: bytes
    destination: bytes
    data: memoryview
    payload: memoryview
    neighbour: Any
    ttl: int = 64
    protocol: int = 17
    dont_fragment: bool = True
    source_mac: bytes = GUEST_MAC
    checksum_ok: bool = False


class FakeOutput:
    """Keeps what leaves on the general way."""

    gateway_mac = GATEWAY_MAC

    def __init__(self) -> None:
        self.neighbours: dict[bytes, FakeNeighbour] = {}
        self.sent: list[tuple[bytes, bytes, int, bytes]] = []
        """(source, destination, protocol, payload)"""
        self.errors: list[IcmpError] = []

    def neighbour(self, ip: bytes) -> FakeNeighbour | None:
        return self.neighbours.get(ip)

    def send_ip(
        self, destination: bytes, protocol: int, payload: Any, *, source: bytes, now: float, ttl: int = 64,
        dont_fragment: bool = False,
    ) -> None:  # fmt: skip
        self.sent.append((source, destination, protocol, bytes(payload)))

    def icmp_error(
        self, kind: int, code: int, packet: Any, *, now: float, source: bytes | None = None, mtu: int = 0
    ) -> None:
        self.icmp_quoting(kind, code, packet.data, packet.neighbour, now=now, source=source, mtu=mtu)

    def icmp_quoting(
        self,
        kind: int,
        code: int,
        quoted: Any,
        neighbour: Any,
        *,
        now: float,
        source: bytes | None = None,
        mtu: int = 0,
    ) -> None:
        data = bytes(quoted)
        assert data[0] == 0x45 and len(data) >= 28, "an error quotes at least 28 octets"
        assert ones_sum(data[:20]) == 0xFFFF, "quoted header checksum"
        self.errors.append(IcmpError(source or GATEWAY, data[12:16], kind, code, mtu, data))


def udp_packet(
    port: Any, source: bytes, sport: int, destination: bytes, dport: int, payload: bytes, **fields: Any
) -> FakePacket:
    """A guest's datagram as the interface hands it on, checksums right."""
    length = 8 + len(payload)
    header = struct.pack("!HHHH", sport, dport, length, 0)
    pseudo = source + destination + struct.pack("!BBH", 0, 17, length)
    stored = (0xFFFF ^ ones_sum(pseudo + header + payload)) or 0xFFFF
    return raw_packet(port, source, destination, 17, header[:6] + struct.pack("!H", stored) + payload, **fields)


def echo(kind: int, identifier: int, sequence: int, data: bytes) -> bytes:
    """An ICMP echo message, checksum right."""
    message = struct.pack("!BBHHH", kind, 0, 0, identifier, sequence) + data
    return message[:2] + struct.pack("!H", 0xFFFF ^ ones_sum(message)) + message[4:]


def raw_packet(
    port: Any, source: bytes, destination: bytes, protocol: int, payload: bytes, **fields: Any
) -> FakePacket:
    ttl = fields.get("ttl", 64)
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0x4000, ttl, protocol, 0) + source + destination
    header = header[:10] + struct.pack("!H", 0xFFFF ^ ones_sum(header)) + header[12:]
    data = memoryview(header + payload)
    return FakePacket(port, source, destination, data, data[20:], None, protocol=protocol, **fields)


def parse_frame(frame: bytes, link: FakeLink) -> Datagram:
    """A UDP frame taken apart and checked."""
    prefix, frame = frame[: link.headroom], frame[link.headroom :]
    if link.headroom == 4:
        assert int.from_bytes(prefix, "big") == len(frame)
    assert len(frame) >= 60
    assert frame[0:6] == GUEST_MAC and frame[6:12] == GATEWAY_MAC and frame[12:14] == b"\x08\x00"
    packet = frame[14:]
    total = int.from_bytes(packet[2:4], "big")
    assert packet[0] == 0x45 and packet[9] == 17 and packet[8] > 0
    assert total <= link.mtu
    assert ones_sum(packet[:20]) == 0xFFFF, "header checksum"
    assert packet[total:] == bytes(len(packet) - total), "padding"
    assert len(packet) == total or len(frame) == 60
    source, destination = packet[12:16], packet[16:20]
    datagram = packet[20:total]
    source_port, port, length, stored = struct.unpack_from("!HHHH", datagram)
    assert length == len(datagram)
    pseudo = ones_sum(source + destination + struct.pack("!BBH", 0, 17, length))
    if link.headroom == 12:
        assert struct.unpack("<BBHHHHH", prefix) == (1, 0, 0, 0, 34, 6, 0)
        assert stored == pseudo, "the sum of the pseudo-header"
    else:
        assert stored and ones_sum(struct.pack("!H", pseudo) + datagram) == 0xFFFF, "UDP checksum"
    return Datagram(source, destination, source_port, port, datagram[8:], int.from_bytes(packet[4:6], "big"))


def parse_datagram(sent: tuple[bytes, bytes, int, bytes]) -> Datagram:
    """A datagram of the general way, checksum checked."""
    source, destination, protocol, datagram = sent
    source_port, port, length, _stored = struct.unpack_from("!HHHH", datagram)
    assert protocol == 17 and length == len(datagram)
    assert ones_sum(source + destination + struct.pack("!BBH", 0, 17, length) + datagram) == 0xFFFF
    return Datagram(source, destination, source_port, port, datagram[8:])


class FailingIO(EpollIO):
    """Refuses sockets with `error` while it is set, or once `room` are open."""

    error: int | None = None
    room: int = 1 << 30

    def __init__(self) -> None:
        super().__init__()
        self.open: set[int] = set()

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
        if self.error is not None or len(self.open) >= self.room:
            raise OSError(self.error or 24, "played")
        return super().socket(family, kind, protocol)

    def watch(self, fd: int, ready: Any, *, edge: bool = True, write: bool = False) -> None:
        super().watch(fd, ready, edge=edge, write=write)
        self.open.add(fd)

    def unwatch(self, fd: int) -> None:
        super().unwatch(fd)
        self.open.discard(fd)


@dataclass
class World:
    """One guest, one proxy, real host sockets on loopback."""

    network: Network = field(default_factory=Network)
    headroom: int = 0
    mtu: int = 1500
    io: FailingIO = field(default_factory=FailingIO)

    def __post_init__(self) -> None:
        self.now = 1000.0
        self.counters = Counters()
        self.events: list[Event] = []
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.output = FakeOutput()
        self.link = FakeLink(self.headroom, self.mtu)
        self.port = FakePort(self.link)
        self.neighbour = FakeNeighbour(GUEST, GUEST_MAC, self.port)
        self.output.neighbours[GUEST] = self.neighbour
        output: Any = self.output
        self.egress = Egress(self.network)
        self.proxy = UdpProxy(self.network, self.io, output, self.egress, self.counters, bus, self.clock)
        self.icmp = IcmpProxy(self.network, self.io, output, self.egress, self.counters, bus, self.clock)
        self.sockets: list[socket.socket] = []

    def clock(self) -> float:
        return self.now

    def host_socket(self, address: str = "127.0.0.1", port: int = 0) -> socket.socket:
        """A bound UDP socket of some program on the host."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.settimeout(5)
        sock.bind((address, port))
        self.sockets.append(sock)
        return sock

    def send(self, sport: int, destination: bytes, dport: int, payload: bytes, **fields: Any) -> None:
        """The guest sends one datagram, a batch of its own."""
        self.queue(sport, destination, dport, payload, **fields)
        self.proxy.flush(self.now)

    def queue(self, sport: int, destination: bytes, dport: int, payload: bytes, **fields: Any) -> None:
        """As `send`, in one batch with what follows: the fast way where an association exists, as the interface does it."""
        source = fields.pop("source", GUEST)
        key = source + destination + struct.pack("!HH", sport, dport)
        association = self.proxy.associations.get(key)
        if association is not None and association.port is self.port:
            association.forward(memoryview(payload), fields.get("ttl", 64), self.now)
            return
        packet: Any = udp_packet(self.port, source, sport, destination, dport, payload, **fields)
        self.proxy.input(packet, self.now)

    def turn(self, *, wait: bool = True) -> int:
        """Serve host sockets until none is ready; `wait`: for at most 2 s until one is. Returns events served."""
        if wait:
            select.select([self.io.fileno()], [], [], 2)
        served = 0
        while True:
            ready = self.io.poll()
            for function, mask in ready:
                function(mask)
            if not ready:
                return served
            served += len(ready)

    def received(self) -> list[Datagram]:
        """What reached the guest since the last call, both ways out."""
        frames, self.link.sent = self.link.sent, []
        general, self.output.sent = self.output.sent, []
        return [parse_frame(frame, self.link) for frame in frames] + [parse_datagram(sent) for sent in general]

    def ping(self, destination: bytes, identifier: int, sequence: int, data: bytes = b"", **fields: Any) -> None:
        """The guest sends an echo request."""
        source = fields.pop("source", GUEST)
        packet: Any = raw_packet(self.port, source, destination, 1, echo(8, identifier, sequence, data), **fields)
        self.icmp.input(packet, self.now)

    def echoes(self) -> list[Echo]:
        """Echo replies that reached the guest since the last call, checked."""
        general, self.output.sent = self.output.sent, []
        replies = []
        for source, destination, protocol, message in general:
            assert protocol == 1 and ones_sum(message) == 0xFFFF and message[:2] == b"\0\0"
            replies.append(Echo(source, destination, *struct.unpack("!HH", message[4:8]), message[8:]))
        return replies

    def close(self) -> None:
        self.proxy.close()
        self.icmp.close()
        for sock in self.sockets:
            sock.close()
        assert not self.io.open, "descriptors left behind"
        self.io.close()
