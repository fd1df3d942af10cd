"""UDP header fields (RFC 768). HOT PATH: once per datagram."""

from __future__ import annotations

import struct
from typing import Final

from netstack.errors import Malformed
from netstack.wire import checksum
from netstack.wire.checksum import Buffer

HEADER: Final = struct.Struct("!HHHH")  # source port, destination port, length, checksum
HEADER_LENGTH: Final = 8
MAX_PAYLOAD: Final = 65507  # 65,535 less IPv4 and UDP header

_PROTOCOL: Final = 17
_unpack = HEADER.unpack_from


def parse(datagram: memoryview) -> tuple[int, int, memoryview]:
    """Return `(src_port, dst_port, payload)`; the payload is a view, not a copy. The checksum is `verify`'s.

    Raises `Malformed` when the header is cut short or its length field lies.
    """
    if len(datagram) < HEADER_LENGTH:
        raise Malformed("udp: truncated header")
    src_port, dst_port, length, _checksum = _unpack(datagram)
    if not HEADER_LENGTH <= length <= len(datagram):
        raise Malformed("udp: length field outside the datagram")
    return src_port, dst_port, datagram[HEADER_LENGTH:length]


def verify(datagram: memoryview, source: bytes, destination: bytes) -> bool:
    """Whether the checksum of a datagram that `parse` accepted is right.

    Over IPv4 zero means that the sender made none (RFC 768) and is right; over IPv6 it is wrong (RFC 8200 8.1).
    """
    if len(datagram) < HEADER_LENGTH:
        return False
    _src_port, _dst_port, length, stored = _unpack(datagram)
    if not stored:
        return len(source) == 4
    return checksum.verify(datagram[:length], checksum.pseudo(source, destination, _PROTOCOL, length))


def header(src_port: int, dst_port: int, payload: Buffer, source: bytes, destination: bytes) -> bytes:
    """The 8 octets before `payload`, checksum included; a sum of zero is sent as 0xFFFF (RFC 768)."""
    length = HEADER_LENGTH + len(payload)
    total = checksum.pseudo(source, destination, _PROTOCOL, length) + src_port + dst_port + length
    stored = 0xFFFF ^ checksum.fold(total + checksum.partial(payload))
    return HEADER.pack(src_port, dst_port, length, stored or 0xFFFF)


def emit(src_port: int, dst_port: int, payload: Buffer, source: bytes, destination: bytes) -> bytes:
    """The whole datagram; at most `MAX_PAYLOAD` octets of payload fit into IPv4."""
    return header(src_port, dst_port, payload, source, destination) + payload
