"""NTP packet header (RFC 5905 7.3): 48 octets, in versions 1 to 4 alike.

Timestamps are 64-bit ints in NTP's own unit: seconds since 1900 modulo 2**32 in the upper half, the fraction in the lower. The
seconds wrap on 2036-02-07; both ends only ever subtract, so nothing needs to know the era (RFC 5905 6).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from netstack.api import Buffer
from netstack.errors import Malformed

SIZE: Final = 48

SYMMETRIC_ACTIVE: Final = 1
SYMMETRIC_PASSIVE: Final = 2
CLIENT: Final = 3
SERVER: Final = 4

ALARM: Final = 3  # leap indicator: not synchronised (RFC 5905 figure 9)
KISS_RATE: Final = b"RATE"  # reference id of a kiss-o'-death (RFC 5905 7.4, figure 13)

UNIX_EPOCH_S: Final = 2_208_988_800  # RFC 5905 figure 4: 1970-01-01 in seconds since 1900

_header = struct.Struct("!BBbbII4sQQQQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packet:
    """The fields under their RFC names; `root_delay` and `root_dispersion` in units of 2**-16 s."""

    leap: int = 0
    version: int = 4
    mode: int = CLIENT
    stratum: int = 0
    poll: int = 0
    """log2 seconds."""
    precision: int = 0
    """log2 seconds."""
    root_delay: int = 0
    root_dispersion: int = 0
    refid: bytes = b"\0\0\0\0"
    reference: int = 0
    origin: int = 0
    receive: int = 0
    transmit: int = 0


def parse(data: Buffer) -> Packet:
    """Read the header; extension fields and a MAC behind it are not looked at. Raises `Malformed` if it is cut short."""
    if len(data) < SIZE:
        raise Malformed("ntp: truncated header")
    first, stratum, poll, precision, delay, dispersion, refid, reference, origin, receive, transmit = (
        _header.unpack_from(data)
    )
    return Packet(
        leap=first >> 6,
        version=first >> 3 & 7,
        mode=first & 7,
        stratum=stratum,
        poll=poll,
        precision=precision,
        root_delay=delay,
        root_dispersion=dispersion,
        refid=refid,
        reference=reference,
        origin=origin,
        receive=receive,
        transmit=transmit,
    )


def emit(packet: Packet) -> bytes:
    """The 48 octets of `packet`."""
    return _header.pack(
        packet.leap << 6 | packet.version << 3 | packet.mode,
        packet.stratum,
        packet.poll,
        packet.precision,
        packet.root_delay,
        packet.root_dispersion,
        packet.refid,
        packet.reference,
        packet.origin,
        packet.receive,
        packet.transmit,
    )


def timestamp(unix_s: float) -> int:
    """NTP timestamp of a Unix time in seconds, of any era; never 0, which would mean "unknown" (RFC 5905 6)."""
    seconds, fraction = divmod(unix_s, 1.0)
    return ((int(seconds) + UNIX_EPOCH_S) % 2**32 << 32 | int(fraction * 2**32)) or 1
