"""The last packets of the link in rings, as classic pcap (spec vpnkit 8.1): what there was before somebody asked.

Each rule has a ring bounded in octets, of which the oldest packets go first. A ring is read as a file, or followed by any number of
readers; one that is too slow finds its packets gone from the ring and is told how many. The rings keep copies, cut to `snaplen`,
and never a view of a frame.

Little-endian, microseconds, link type Ethernet. The format cannot say in which direction a frame went.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

KIB: Final = 1024
DEFAULT_SNAPLEN: Final = 128  # spec vpnkit 1.1, --pcap-snaplen
MOST_SNAPLEN: Final = 1500
READ_OCTETS: Final = 64 * KIB

_FILE = struct.Struct("<IHHiIII")  # magic, major, minor, zone, sigfigs, snaplen, link type
_RECORD = struct.Struct("<IIII")  # seconds, microseconds, captured, original
_ETHERTYPE = struct.Struct("!H")
_PORTS = struct.Struct("!HH")
_VLAN, _IPV4, _ARP = 0x8100, 0x0800, 0x0806
_ICMP, _TCP, _UDP = 1, 6, 17
_TRANSPORT: Final = {_TCP: 20, _UDP: 8, _ICMP: 8}
"""Octets of the shortest header."""


def file_header(snaplen: int) -> bytes:
    """What a capture begins with."""
    return _FILE.pack(0xA1B2C3D4, 2, 4, 0, 4, snaplen, 1)


class Reader:
    """Follows a ring from its oldest packet on."""

    def __init__(self, ring: Ring, wake: Callable[[], None]) -> None:
        self._ring = ring
        self._wake = wake
        self._next = ring.first
        self._waiting = False
        self.lost = 0
        """Packets that were gone before they were read."""

    def take(self, most: int = READ_OCTETS) -> bytes:
        """Whole records of about `most` octets; where there are none now, `wake` is called once, when there are."""
        ring = self._ring
        if self._next < ring.first:
            self.lost += ring.first - self._next
            self._next = ring.first
        records: list[bytes] = []
        octets = 0
        while self._next < ring.end and octets < most:
            record = ring.record(self._next)
            octets += len(record)
            records.append(record)
            self._next += 1
        self._waiting = not records
        return b"".join(records)

    def news(self) -> None:
        """A packet has come (for `Ring`)."""
        if self._waiting:
            self._waiting = False
            self._wake()


class Ring:
    """The last packets of one rule: at most `limit` octets of records."""

    def __init__(self, limit: int, snaplen: int) -> None:
        self.limit = limit
        self.snaplen = snaplen
        self.first = 0
        """Number of the oldest packet that is kept; packets are counted from 0."""
        self.octets = 0
        self._records: deque[bytes] = deque()
        self._readers: list[Reader] = []

    @property
    def readers(self) -> int:
        """How many follow."""
        return len(self._readers)

    @property
    def end(self) -> int:
        """Number of the next packet."""
        return self.first + len(self._records)

    def record(self, number: int) -> bytes:
        """Packet `number`, with its header; `first <= number < end`."""
        return self._records[number - self.first]

    def add(self, frame: Buffer, time_ns: int, octets: int) -> None:
        """Keep a copy of `frame`, of which `octets` were on the link."""
        kept = frame[: self.snaplen]
        seconds, rest = divmod(time_ns, 1_000_000_000)
        record = _RECORD.pack(seconds & 0xFFFFFFFF, rest // 1000, len(kept), octets) + kept  # a copy
        records = self._records
        records.append(record)
        self.octets += len(record)
        while self.octets > self.limit:
            self.octets -= len(records.popleft())
            self.first += 1
        for reader in self._readers:
            reader.news()

    def file(self) -> bytes:
        """As a capture file."""
        return file_header(self.snaplen) + b"".join(self._records)

    def follow(self, wake: Callable[[], None]) -> Reader:
        """A reader, until `leave`; `wake()` is called from within `add` and must not block."""
        reader = Reader(self, wake)
        self._readers.append(reader)
        return reader

    def leave(self, reader: Reader) -> None:
        self._readers.remove(reader)


@dataclass(frozen=True, slots=True)
class Rule:
    """Which packets a ring is for."""

    limit: int
    snaplen: int | None = MOST_SNAPLEN
    """`None` is `--pcap-snaplen`."""


RULES: Final[dict[str, Rule]] = {
    "all": Rule(256 * KIB, None),
    "dns": Rule(256 * KIB),
    "ntp": Rule(64 * KIB),
    "icmp": Rule(8 * KIB),
    "http_proxy": Rule(1024 * KIB),
    "bad": Rule(1024 * KIB),
}
"""Spec vpnkit 8.1. The key is the name of the file, less `.pcap`."""


class Rings:
    """All rings of one network."""

    def __init__(self, *, snaplen: int = DEFAULT_SNAPLEN) -> None:
        self.rings = {name: Ring(rule.limit, rule.snaplen or snaplen) for name, rule in RULES.items()}
        self.all = self.rings["all"]

    def feed(self, frame: Buffer, direction: int, time_ns: int) -> None:
        """One Ethernet frame of either direction, at `time_ns` since 1970. The buffer may be used again afterwards."""
        octets = len(frame)
        self.all.add(frame, time_ns, octets)
        name = classify(frame)
        if name is not None:
            self.rings[name].add(frame, time_ns, octets)


def classify(frame: Buffer) -> str | None:
    """Which rule besides `all` is for this frame; `bad` is what cannot be parsed as what it says it is."""
    at = 14
    if len(frame) < at:
        return "bad"
    (kind,) = _ETHERTYPE.unpack_from(frame, 12)
    if kind == _VLAN:
        at = 18
        if len(frame) < at:
            return "bad"
        (kind,) = _ETHERTYPE.unpack_from(frame, 16)
    if kind == _ARP:
        return "bad" if len(frame) < at + 28 else None
    if kind != _IPV4:
        return None
    if len(frame) < at + 20:
        return "bad"
    header = (frame[at] & 0x0F) * 4
    (total,) = _ETHERTYPE.unpack_from(frame, at + 2)
    # Total length 0: a super-frame of more than 65,535 octets, or a driver that leaves it to the card.
    if frame[at] >> 4 != 4 or header < 20 or (total and total < header) or len(frame) < at + max(total, header):
        return "bad"
    protocol = frame[at + 9]
    (fragment,) = _ETHERTYPE.unpack_from(frame, at + 6)
    if protocol not in _TRANSPORT:
        return None
    if fragment & 0x1FFF:  # not the first: it has no ports
        return "icmp" if protocol == _ICMP else None
    at += header
    if len(frame) < at + _TRANSPORT[protocol]:
        return "bad"
    if protocol == _ICMP:
        return "icmp"
    ports = _PORTS.unpack_from(frame, at)
    if 53 in ports:
        return "dns"
    if protocol == _UDP:
        return "ntp" if 123 in ports else None
    return "http_proxy" if 3128 in ports or 3129 in ports else None
