"""IPv4 header fields (RFC 791 3.1). HOT PATH: once per packet.

`netstack.iface.interface` unpacks the common header (no options) together with Ethernet and TCP; this module has the
numbers and the checked general parse.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from netstack.errors import Malformed
from netstack.wire import checksum
from netstack.wire.checksum import BadChecksum

HEADER: Final = struct.Struct("!BBHHHBBH4s4s")
"""Version and IHL, TOS, total length; identification, flags and offset; TTL, protocol, checksum; source, destination."""
HEADER_LENGTH: Final = 20
MAX_TOTAL_LENGTH: Final = 65535

PROTOCOL_ICMP: Final = 1
PROTOCOL_UDP: Final = 17

DONT_FRAGMENT: Final = 0x4000
MORE_FRAGMENTS: Final = 0x2000
OFFSET_MASK: Final = 0x1FFF  # in units of 8 octets

_END_OF_OPTIONS = 0
_NO_OPERATION = 1
_LOOSE_SOURCE_ROUTE = 131
_STRICT_SOURCE_ROUTE = 137


class SourceRouted(Malformed):
    """A packet with a source route, which hosts and routers drop today (RFC 7126 4.3, 4.4)."""


@dataclass(slots=True)
class Header:
    """A parsed header; `offset`, `header_length` and `total_length` in octets."""

    source: bytes
    destination: bytes
    protocol: int
    ttl: int
    tos: int
    identification: int
    dont_fragment: bool
    more_fragments: bool
    offset: int
    header_length: int
    total_length: int

    @property
    def fragment(self) -> bool:
        """Whether the packet is one part of a datagram."""
        return self.more_fragments or self.offset > 0


def parse(packet: memoryview) -> Header:
    """The header of `packet`, which may have padding behind its total length.

    Raises `Malformed` for another version, a lying header or total length, or broken options; its subclasses
    `BadChecksum` and `SourceRouted` for what they say.
    """
    if len(packet) < HEADER_LENGTH:
        raise Malformed("ipv4: truncated header")
    (version_ihl, tos, total_length, identification, flags_offset, ttl, protocol, _checksum, source, destination) = (
        HEADER.unpack_from(packet)
    )
    if version_ihl >> 4 != 4:
        raise Malformed("ipv4: version is not 4")
    header_length = (version_ihl & 15) << 2
    if header_length < HEADER_LENGTH:
        raise Malformed("ipv4: header length below 20")
    if not header_length <= total_length <= len(packet):
        raise Malformed("ipv4: total length outside the packet")
    if not checksum.verify(packet[:header_length]):
        raise BadChecksum("ipv4: header checksum")
    if header_length > HEADER_LENGTH:
        check_options(packet[HEADER_LENGTH:header_length])
    return Header(
        source,
        destination,
        protocol,
        ttl,
        tos,
        identification,
        bool(flags_offset & DONT_FRAGMENT),
        bool(flags_offset & MORE_FRAGMENTS),
        (flags_offset & OFFSET_MASK) << 3,
        header_length,
        total_length,
    )


def check_options(options: bytes | memoryview) -> None:
    """Walk the options (RFC 791 3.1), all of which are ignored but source routes.

    Raises `SourceRouted` for LSRR and SSRR, `Malformed` when an option's length lies.
    """
    at, end = 0, len(options)
    while at < end:
        kind = options[at]
        if kind == _END_OF_OPTIONS:
            return
        if kind == _NO_OPERATION:
            at += 1
            continue
        if kind in (_LOOSE_SOURCE_ROUTE, _STRICT_SOURCE_ROUTE):
            raise SourceRouted("ipv4: source route")
        if at + 1 >= end or not 2 <= options[at + 1] <= end - at:
            raise Malformed("ipv4: option length outside the header")
        at += options[at + 1]


def header(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload_length: int,
    *,
    ttl: int = 64,
    identification: int = 0,
    dont_fragment: bool = True,
    more_fragments: bool = False,
    offset: int = 0,
    tos: int = 0,
) -> bytes:
    """A header of 20 octets, checksum filled in; `payload_length` and `offset` (a multiple of 8) in octets.

    The defaults make an atomic datagram, whose identification may be 0 (RFC 6864 4.1).
    """
    flags_offset = offset >> 3
    if dont_fragment:
        flags_offset |= DONT_FRAGMENT
    if more_fragments:
        flags_offset |= MORE_FRAGMENTS
    total_length = HEADER_LENGTH + payload_length
    total = (
        (0x4500 | tos)
        + total_length
        + identification
        + flags_offset
        + (ttl << 8 | protocol)
        + int.from_bytes(source + destination, "big")
    )
    return HEADER.pack(
        0x45,
        tos,
        total_length,
        identification,
        flags_offset,
        ttl,
        protocol,
        0xFFFF ^ checksum.fold(total),
        source,
        destination,
    )
