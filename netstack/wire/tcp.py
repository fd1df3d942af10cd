"""TCP header fields and options (RFC 9293 3.1, 3.2; RFC 7323; RFC 2018). HOT PATH: the header, once per segment.

The header proper is unpacked in one go together with Ethernet and IPv4 by `netstack.iface.interface`; this module has the
numbers, the options (only looked at in SYNs and when something is out of order) and the checked general parse.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from netstack.errors import Malformed

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10

HEADER: Final = struct.Struct(
    "!HHIIHHHH"
)  # source, destination, sequence, acknowledgement, offset+flags, window, checksum, urgent
HEADER_LENGTH: Final = 20

_MSS = 2
_WINDOW_SCALE = 3
_SACK_PERMITTED = 4
_SACK = 5
MAX_WINDOW_SHIFT: Final = 14  # RFC 7323 2.3: a larger value counts as 14
DEFAULT_MSS: Final = 536  # RFC 9293 3.7.1, when the peer sends no MSS option (IPv4)
MIN_MSS: Final = 88  # a peer that asks for less makes us send tiny segments without end (SACK panic class); clamped


_LINUX_SYN: Final = struct.Struct("!II8xI")
"""MSS; SACK permitted and timestamps; scale: what most SYNs have, in one look."""
_LINUX_SHAPE: Final = 0x0402080A


@dataclass(slots=True)
class Options:
    """What a SYN (or a later segment) carries; absent is `None`."""

    mss: int | None = None
    window_shift: int | None = None
    sack_permitted: bool = False
    sack: tuple[tuple[int, int], ...] = ()


def parse_options(octets: bytes | memoryview) -> Options:
    """Read the options; one whose length lies ends the reading (RFC 9293 3.1), unknown kinds are skipped. Never raises."""
    found = Options()
    at, end = 0, len(octets)
    if end == _LINUX_SYN.size:
        mss, shape, shift = _LINUX_SYN.unpack(octets)
        if mss >> 16 == 0x0204 and shape == _LINUX_SHAPE and mss & 0xFFFF >= MIN_MSS and shift >> 8 == 0x010303:
            found.mss = mss & 0xFFFF
            found.window_shift = min(shift & 0xFF, MAX_WINDOW_SHIFT)
            found.sack_permitted = True
            return found
    while at < end:
        kind = octets[at]
        if kind == 0:
            break
        if kind == 1:
            at += 1
            continue
        if at + 1 >= end:
            break
        length = octets[at + 1]
        if length < 2 or at + length > end:
            break
        if kind == _MSS and length == 4:
            value = octets[at + 2] << 8 | octets[at + 3]
            if value:
                found.mss = max(value, MIN_MSS)
        elif kind == _WINDOW_SCALE and length == 3:
            found.window_shift = min(octets[at + 2], MAX_WINDOW_SHIFT)
        elif kind == _SACK_PERMITTED and length == 2:
            found.sack_permitted = True
        elif kind == _SACK and length >= 10 and (length - 2) % 8 == 0:
            found.sack = tuple(struct.iter_unpack("!II", bytes(octets[at + 2 : at + length])))
        at += length
    return found


@lru_cache(maxsize=256)
def syn_options(mss: int, window_shift: int | None, sack_permitted: bool) -> bytes:
    """Options of our SYN or SYN-ACK, padded to a multiple of four octets."""
    octets = struct.pack("!BBH", _MSS, 4, mss)
    if window_shift is not None:
        octets += bytes((1, _WINDOW_SCALE, 3, window_shift))
    if sack_permitted:
        octets += bytes((1, 1, _SACK_PERMITTED, 2))
    return octets


def sack_option(blocks: list[tuple[int, int]]) -> bytes:
    """A SACK option of at most three blocks (RFC 2018 section 3), padded with two NOPs in front."""
    blocks = blocks[:3]
    return bytes((1, 1, _SACK, 2 + 8 * len(blocks))) + b"".join(struct.pack("!II", *block) for block in blocks)


@dataclass(slots=True)
class Segment:
    """A parsed TCP header; `payload_at` is the offset of the payload in the segment."""

    source_port: int
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    payload_at: int


def parse(segment: memoryview) -> Segment:
    """The header of a whole TCP segment; raises `Malformed` when it is cut short or its data offset lies."""
    if len(segment) < HEADER_LENGTH:
        raise Malformed("tcp: truncated header")
    source, destination, seq, ack, offset_flags, window, _checksum, _urgent = HEADER.unpack_from(segment)
    payload_at = offset_flags >> 12 << 2
    if not HEADER_LENGTH <= payload_at <= len(segment):
        raise Malformed("tcp: data offset outside the segment")
    return Segment(source, destination, seq, ack, offset_flags & 0x1FF, window, payload_at)
