"""The frame in front of a datagram for a guest, filled in by one `pack_into`. HOT PATH: once per datagram.

The payload is received from the host socket at an offset that leaves `LEAD` octets free; `Template.frame` writes link
prefix, Ethernet, IPv4 (RFC 791) and UDP (RFC 768) header right before it, so nothing is copied. What does not change from
one datagram to the next is summed and packed when the template is made.

Where the link leaves checksums to its peer, the virtio-net header says where (virtio 1.2, 5.1.6.2: NEEDS_CSUM) and the UDP
checksum field holds the sum of the pseudo-header only. The IPv4 header has no such offload.

DF is clear and the identification counts: a guest may forward the datagram into a network of its own with a smaller MTU, and
a "fragmentation needed" from there could not be brought back to the sender.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final

from netstack.wire import checksum, ethernet, ipv4, udp

LEAD: Final = 64
"""Octets kept free before a payload: link prefix (at most 16), Ethernet, IPv4 and UDP header."""
TRAIL: Final = 18
"""Octets that may be written behind a payload: a frame of 60 octets has 18 of payload."""

_HEADERS: Final = ethernet.HEADER_LENGTH + ipv4.HEADER_LENGTH + udp.HEADER_LENGTH
_PADDING: Final = bytes(TRAIL)
_VNET = struct.Struct("<BBHHHH")  # flags, GSO type, header length, GSO size, checksum start, checksum offset
_NEEDS_CSUM: Final = 1
_TTL: Final = 64
_FLAGS_TTL_PROTOCOL: Final = struct.pack("!HBB", 0, _TTL, ipv4.PROTOCOL_UDP)


def offload_prefix(prefix: bytes) -> bytes:
    """A link's virtio-net header (12 octets) changed to ask the peer for the UDP checksum."""
    udp_start = ethernet.HEADER_LENGTH + ipv4.HEADER_LENGTH
    return _VNET.pack(_NEEDS_CSUM, 0, 0, 0, udp_start, 6) + prefix[_VNET.size :]


class Template:
    """Headers of the datagrams from one remote endpoint to one guest endpoint on one link."""

    __slots__ = ("_ends", "_head", "_ip_sum", "_lead", "_offload", "_pack", "_prefix", "_udp_sum", "limit", "version")

    def __init__(
        self,
        *,
        ethernet_header: bytes,
        source: bytes,
        source_port: int,
        destination: bytes,
        destination_port: int,
        prefix: Callable[[int], bytes],
        offload: bool,
        mtu: int,
        version: int = 0,
    ) -> None:
        """`prefix(octets)` is the link's (`netstack.api.Link.prefix`); `offload`: it is a virtio-net header and the peer
        makes checksums. `version` is the caller's, to notice that the way to the guest changed.
        """
        self.version = version
        self.limit = mtu - ipv4.HEADER_LENGTH - udp.HEADER_LENGTH
        """Largest payload that leaves in one frame, octets."""
        self._prefix = prefix
        self._offload = offload
        sample = prefix(ethernet.MIN_FRAME)
        self._head = (offload_prefix(sample) if offload else b"") + ethernet_header + b"\x45\x00"
        self._lead = len(sample) + _HEADERS
        self._ends = source + destination + struct.pack("!HH", source_port, destination_port)
        self._pack = struct.Struct(f"!{len(sample) + ethernet.HEADER_LENGTH + 2}sHH4sH12sHH").pack_into
        addresses = checksum.partial(source + destination)
        self._ip_sum = 0x4500 + checksum.partial(_FLAGS_TTL_PROTOCOL) + addresses
        self._udp_sum = addresses + ipv4.PROTOCOL_UDP + (0 if offload else source_port + destination_port)

    def frame(self, buffer: bytearray, view: memoryview, at: int, octets: int, identification: int) -> memoryview:
        """The frame around the payload `buffer[at : at + octets]`, `octets <= limit`; `view` is `buffer`'s.

        Writes at most `LEAD` octets before and `TRAIL` behind the payload. The result begins with the link prefix.
        """
        length = octets + 8
        end = at + octets
        if octets < TRAIL:
            buffer[end : at + TRAIL] = _PADDING[octets:]
            frame_end = at + TRAIL
        else:
            frame_end = end
        total = self._ip_sum + length + 20 + identification
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        if self._offload:
            head = self._head
            stored = self._udp_sum + length
            stored = (stored & 0xFFFF) + (stored >> 16)
            stored = (stored & 0xFFFF) + (stored >> 16)
        else:
            head = self._prefix(frame_end - at + _HEADERS) + self._head
            stored = checksum.fold(self._udp_sum + length + length + checksum.partial(view[at:end]))
            stored = 0xFFFF ^ stored or 0xFFFF
        start = at - self._lead
        self._pack(
            buffer,
            start,
            head,
            length + 20,
            identification,
            _FLAGS_TTL_PROTOCOL,
            0xFFFF ^ total,
            self._ends,
            length,
            stored,
        )
        return view[start:frame_end]
