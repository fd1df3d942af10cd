"""ARP for IPv4 over Ethernet (RFC 826). Payload of an Ethernet frame; padding behind the 28 octets is ignored."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from netstack.errors import Malformed

REQUEST: Final = 1
REPLY: Final = 2

_PACKET = struct.Struct("!HHBBH6s4s6s4s")  # htype, ptype, hlen, plen, op, sha, spa, tha, tpa
LENGTH: Final = _PACKET.size
_HTYPE_ETHERNET: Final = 1
_PTYPE_IPV4: Final = 0x0800


@dataclass(slots=True)
class Packet:
    """Field names of RFC 826: hardware and protocol address of sender and target."""

    op: int
    sha: bytes
    spa: bytes
    tha: bytes
    tpa: bytes


def parse(payload: bytes | memoryview) -> Packet:
    """A request or reply; raises `Malformed` for anything but Ethernet and IPv4 addresses, or another operation."""
    if len(payload) < LENGTH:
        raise Malformed("arp: truncated packet")
    htype, ptype, hlen, plen, op, sha, spa, tha, tpa = _PACKET.unpack_from(payload)
    if (htype, ptype, hlen, plen) != (_HTYPE_ETHERNET, _PTYPE_IPV4, 6, 4):
        raise Malformed("arp: not IPv4 over Ethernet")
    if op not in (REQUEST, REPLY):
        raise Malformed("arp: unknown operation")
    return Packet(op, sha, spa, tha, tpa)


def emit(packet: Packet) -> bytes:
    """The 28 octets of `packet`."""
    return _PACKET.pack(_HTYPE_ETHERNET, _PTYPE_IPV4, 6, 4, packet.op, packet.sha, packet.spa, packet.tha, packet.tpa)
