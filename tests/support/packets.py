"""Packets for tests, built and read without the project's own code: what a guest puts on the wire and what it sees there.

Addresses are `bytes` (4 octets IPv4, 6 octets MAC); sequence numbers are plain ints modulo 2**32.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass, field

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
MASK = 0xFFFFFFFF

ARP, IPV4 = 0x0806, 0x0800
ICMP, TCP, UDP = 1, 6, 17

_LETTERS = {"F": FIN, "S": SYN, "R": RST, "P": PSH, ".": ACK, "A": ACK, "U": URG, "E": ECE, "W": CWR}


def ip(text: str) -> bytes:
    """`ip("192.168.65.1")` as four octets."""
    return socket.inet_aton(text)


def flags_of(letters: str) -> int:
    """Flags of tcpdump letters, `S.` or `SA` for SYN-ACK; `-` for none."""
    return sum({_LETTERS[letter] for letter in letters if letter != "-"})


def letters_of(flags: int) -> str:
    """The inverse of `flags_of`, for messages."""
    return "".join(letter for letter in "FSRP.UEW" if flags & _LETTERS[letter]) or "-"


def diff(a: int, b: int) -> int:
    """`a - b` as a signed distance modulo 2**32."""
    return ((a - b + 0x80000000) & MASK) - 0x80000000


def word_sum(data: bytes | bytearray | memoryview) -> int:
    """Ones'-complement sum of 16-bit words, folded, not inverted (RFC 1071, word by word)."""
    octets = bytes(data)
    if len(octets) & 1:
        octets += b"\0"
    total = sum(struct.unpack(f"!{len(octets) // 2}H", octets))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def checksum(data: bytes | bytearray | memoryview) -> int:
    return 0xFFFF ^ word_sum(data)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> bytes:
    return source + destination + struct.pack("!BBH", 0, protocol, length)


def ether(destination: bytes, source: bytes, kind: int, payload: bytes, *, pad: bool = True) -> bytes:
    frame = destination + source + struct.pack("!H", kind) + payload
    return frame.ljust(60, b"\0") if pad else frame


def arp(op: int, sha: bytes, spa: bytes, tha: bytes, tpa: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, IPV4, 6, 4, op) + sha + spa + tha + tpa


def ipv4(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload: bytes,
    *,
    ttl: int = 64,
    ident: int = 0,
    df: bool = False,
    mf: bool = False,
    offset: int = 0,
    options: bytes = b"",
    tos: int = 0,
) -> bytes:
    """A packet; `offset` in octets, `options` a multiple of four octets."""
    length = 20 + len(options)
    fragment = offset >> 3 | (0x4000 if df else 0) | (0x2000 if mf else 0)
    head = struct.pack(
        "!BBHHHBBH4s4s",
        0x40 | length >> 2,
        tos,
        (length + len(payload)) & 0xFFFF,
        ident,
        fragment,
        ttl,
        protocol,
        0,
        source,
        destination,
    )
    head += options
    return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + payload


def fragments(packet: bytes, size: int, ident: int = 1) -> list[bytes]:
    """Cut a packet without options into fragments with `size` octets (a multiple of 8) of payload each."""
    source, destination, protocol, payload = packet[12:16], packet[16:20], packet[9], packet[20:]
    return [
        ipv4(
            source,
            destination,
            protocol,
            payload[at : at + size],
            ident=ident,
            offset=at,
            mf=at + size < len(payload),
        )
        for at in range(0, len(payload), size)
    ]


def udp(
    source: bytes, destination: bytes, sport: int, dport: int, payload: bytes, *, check: int | None = None
) -> bytes:
    """A datagram; `check` overrides the checksum (0 for none)."""
    length = 8 + len(payload)
    head = struct.pack("!HHHH", sport, dport, length, 0)
    if check is None:
        check = checksum(pseudo(source, destination, UDP, length) + head + payload) or 0xFFFF
    return head[:6] + struct.pack("!H", check) + payload


def icmp(kind: int, code: int, rest: bytes = bytes(4), body: bytes = b"") -> bytes:
    head = struct.pack("!BBH4s", kind, code, 0, rest)
    return head[:2] + struct.pack("!H", checksum(head + body)) + rest + body


def echo(ident: int, sequence: int, data: bytes = b"", *, kind: int = 8) -> bytes:
    return icmp(kind, 0, struct.pack("!HH", ident, sequence), data)


def tcp(
    source: bytes,
    destination: bytes,
    sport: int,
    dport: int,
    seq: int,
    ack: int,
    flags: int,
    window: int = 65535,
    payload: bytes = b"",
    options: bytes = b"",
    *,
    partial: bool = False,
    spoil: bool = False,
    data_offset: int | None = None,
    urgent: int = 0,
) -> bytes:
    """A segment; `partial` leaves the folded pseudo-header in the checksum field, `spoil` makes it wrong."""
    options = options + b"\1" * (-len(options) % 4)
    offset = (20 + len(options)) >> 2 if data_offset is None else data_offset
    head = struct.pack("!HHIIHHHH", sport, dport, seq & MASK, ack & MASK, offset << 12 | flags, window, 0, urgent)
    segment = head + options + payload
    lead = pseudo(source, destination, TCP, len(segment))
    check = word_sum(lead) if partial else checksum(lead + segment)
    if spoil:
        check ^= 0x5555
    return segment[:16] + struct.pack("!H", check) + segment[18:]


def mss_option(mss: int) -> bytes:
    return struct.pack("!BBH", 2, 4, mss)


def scale_option(shift: int) -> bytes:
    return bytes((1, 3, 3, shift))


SACK_PERMITTED = bytes((1, 1, 4, 2))


def sack_option(blocks: list[tuple[int, int]]) -> bytes:
    return bytes((1, 1, 5, 2 + 8 * len(blocks))) + b"".join(struct.pack("!II", a & MASK, b & MASK) for a, b in blocks)


def timestamp_option(value: int, echo_reply: int) -> bytes:
    return struct.pack("!BBBBII", 1, 1, 8, 10, value & MASK, echo_reply & MASK)


@dataclass
class Segment:
    """A TCP segment as seen on the wire."""

    source: bytes
    destination: bytes
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    options: dict[int, bytes]
    payload: bytes
    time: float = 0.0
    gso_size: int = 0
    sack: list[tuple[int, int]] = field(default_factory=list)

    @property
    def mss(self) -> int | None:
        return int.from_bytes(self.options[2], "big") if 2 in self.options else None

    @property
    def shift(self) -> int | None:
        return self.options[3][0] if 3 in self.options else None

    @property
    def end(self) -> int:
        """The number behind its last octet, SYN and FIN counted."""
        return (self.seq + len(self.payload) + bool(self.flags & SYN) + bool(self.flags & FIN)) & MASK

    def __str__(self) -> str:
        return (
            f"{socket.inet_ntoa(self.source)}:{self.sport} > {socket.inet_ntoa(self.destination)}:{self.dport} "
            f"{letters_of(self.flags)} {self.seq}:{(self.seq + len(self.payload)) & MASK}({len(self.payload)}) "
            f"ack {self.ack} win {self.window} {self.options or ''}"
        )


def tcp_options(octets: bytes) -> dict[int, bytes]:
    """Kind to value; raises `ValueError` for a broken list."""
    found: dict[int, bytes] = {}
    at = 0
    while at < len(octets):
        kind = octets[at]
        if kind == 0:
            if any(octets[at:]):
                raise ValueError("octets behind the end-of-options option are not zero")
            break
        if kind == 1:
            at += 1
            continue
        if at + 2 > len(octets) or octets[at + 1] < 2 or at + octets[at + 1] > len(octets):
            raise ValueError("option length")
        if kind in found:
            raise ValueError(f"option {kind} twice")
        found[kind] = octets[at + 2 : at + octets[at + 1]]
        at += octets[at + 1]
    return found


@dataclass
class Packet:
    """An IPv4 packet as seen on the wire."""

    source: bytes
    destination: bytes
    protocol: int
    ttl: int
    ident: int
    df: bool
    mf: bool
    offset: int
    payload: bytes
    header: bytes
    time: float = 0.0


def read_ipv4(frame: bytes) -> Packet | None:
    """The IPv4 packet in an Ethernet frame, `None` when it holds something else. No checks."""
    if len(frame) < 34 or frame[12:14] != b"\x08\x00":
        return None
    head = (frame[14] & 15) * 4
    total, ident, fragment = struct.unpack_from("!HHH", frame, 16)
    return Packet(
        frame[26:30],
        frame[30:34],
        frame[23],
        frame[22],
        ident,
        bool(fragment & 0x4000),
        bool(fragment & 0x2000),
        (fragment & 0x1FFF) << 3,
        frame[14 + head : 14 + total],
        frame[14 : 14 + head],
    )


def read_tcp(packet: Packet) -> Segment:
    """The segment in a whole packet. No checks of sums; options that are broken read as none."""
    sport, dport, seq, ack, offset_flags, window = struct.unpack_from("!HHIIHH", packet.payload)
    head = offset_flags >> 12 << 2
    try:
        options = tcp_options(packet.payload[20:head])
    except ValueError:
        options = {}
    segment = Segment(
        packet.source,
        packet.destination,
        sport,
        dport,
        seq,
        ack,
        offset_flags & 0xFF,
        window,
        options,
        packet.payload[head:],
        packet.time,
    )
    if 5 in options:
        segment.sack = [struct.unpack_from("!II", options[5], at) for at in range(0, len(options[5]), 8)]
    return segment


VNET = struct.Struct("<BBHHHHH")  # flags, gso type, header length, gso size, checksum start and offset, buffers


def finish(frame: bytes, vnet: bytes) -> list[bytes]:
    """What a guest's kernel makes of a frame with a virtio-net header: whole frames with complete checksums."""
    flags, gso_type, _head, gso_size, start, offset, _buffers = VNET.unpack(vnet)
    if not gso_type & 0x7F:
        if flags & 1:
            at = start + offset
            frame = frame[:at] + struct.pack("!H", checksum(frame[start:])) + frame[at + 2 :]
        return [frame]
    packet = read_ipv4(frame)
    assert packet is not None
    seg = read_tcp(packet)
    head = packet.payload[20 : (packet.payload[12] >> 4) * 4]
    made = []
    for index, at in enumerate(range(0, len(seg.payload), gso_size)):
        part = seg.payload[at : at + gso_size]
        last = at + gso_size >= len(seg.payload)
        seg_flags = seg.flags if last else seg.flags & ~(FIN | PSH)
        body = tcp(
            seg.source,
            seg.destination,
            seg.sport,
            seg.dport,
            seg.seq + at,
            seg.ack,
            seg_flags,
            seg.window,
            part,
            head,
        )
        inner = ipv4(
            seg.source, seg.destination, TCP, body, ttl=packet.ttl, ident=(packet.ident + index) & 0xFFFF, df=packet.df
        )
        made.append(ether(frame[:6], frame[6:12], IPV4, inner))
    return made
