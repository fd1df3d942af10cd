"""A guest's own packet put together again, for the quote of an ICMP error about it (RFC 792, RFC 1812 4.3.2.3).

The host kernel reports an error with the octets behind the transport header and its own addresses; the guest must find its
own source, destination and identifier there, or it will not believe the error (RFC 5927 4.1).
"""

from __future__ import annotations

from typing import Final

from netstack.wire import checksum, icmp, ipv4, udp

QUOTED: Final = 548
"""RFC 1812 4.3.2.3: an error is at most 576 octets; less its own IPv4 and ICMP header."""


def udp_datagram(
    source: bytes, source_port: int, destination: bytes, destination_port: int, payload: bytes | memoryview, octets: int
) -> bytes:
    """IPv4 header, UDP header and the leading octets of `payload`; `octets` is how many the guest sent.

    The checksum of UDP is 0 (none): what it was is not known, as the payload may be cut short.
    """
    octets = max(octets, len(payload))
    length = udp.HEADER_LENGTH + octets
    head = ipv4.header(source, destination, ipv4.PROTOCOL_UDP, length, ttl=1)
    return (head + udp.HEADER.pack(source_port, destination_port, length, 0) + payload)[:QUOTED]


def echo_request(source: bytes, destination: bytes, message: bytes, identifier: int, octets: int) -> bytes | None:
    """The same for an echo request, from the host's `message` (ICMP header on) with the guest's identifier put back.

    `octets` is the length of the guest's whole ICMP message. None when `message` has no whole header.
    """
    if len(message) < icmp.HEADER_LENGTH:
        return None
    kind, code, stored, rest = icmp.HEADER.unpack_from(message)
    own = identifier.to_bytes(2, "big")
    stored = checksum.adjust(stored, rest[:2], own)
    head = ipv4.header(source, destination, ipv4.PROTOCOL_ICMP, max(octets, len(message)), ttl=1)
    return (head + icmp.HEADER.pack(kind, code, stored, own + rest[2:]) + message[icmp.HEADER_LENGTH :])[:QUOTED]
