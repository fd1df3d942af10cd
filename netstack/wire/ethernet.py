"""Ethernet II frames without FCS (RFC 894). HOT PATH: the header, once per frame."""

from __future__ import annotations

import struct
from typing import Final

from netstack.errors import Malformed

HEADER: Final = struct.Struct("!6s6sH")  # destination, source, ethertype
HEADER_LENGTH: Final = 14
MIN_FRAME: Final = 60  # IEEE 802.3: 64 octets with the FCS
BROADCAST: Final = b"\xff" * 6

ETHERTYPE_IPV4: Final = 0x0800
ETHERTYPE_ARP: Final = 0x0806

_PADDING: Final = bytes(MIN_FRAME)


def parse(frame: memoryview) -> tuple[bytes, bytes, int, memoryview]:
    """Return `(destination, source, ethertype, payload)`; the payload is a view and may end in padding.

    Raises `Malformed` when the header is cut short.
    """
    if len(frame) < HEADER_LENGTH:
        raise Malformed("ethernet: truncated header")
    destination, source, ethertype = HEADER.unpack_from(frame)
    return destination, source, ethertype, frame[HEADER_LENGTH:]


def header(destination: bytes, source: bytes, ethertype: int) -> bytes:
    """The 14 octets before a payload."""
    return HEADER.pack(destination, source, ethertype)


def pad(frame: bytes) -> bytes:
    """`frame` with zero octets up to the 60 a frame has at least; longer ones as they are."""
    missing = MIN_FRAME - len(frame)
    return frame + _PADDING[:missing] if missing > 0 else frame
