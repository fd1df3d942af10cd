"""A guest's own datagram put together again, for the quote of an ICMP error about it (RFC 792, RFC 1812 4.3.2.3).

The host kernel reports an error with the octets behind the UDP header and its own addresses; the guest must find its own
source and destination there, or it will not believe the error (RFC 5927 4.1).
"""

from __future__ import annotations

from typing import Final

from netstack.wire import ipv4, udp

QUOTED: Final = 548
"""RFC 1812 4.3.2.3: an error is at most 576 octets; less its own IPv4 and ICMP header."""


def udp_datagram(
    source: bytes, source_port: int, destination: bytes, destination_port: int, payload: bytes | memoryview, octets: int
) -> bytes:
    """IPv4 header, UDP header and the leading octets of `payload`; `octets` is how many the guest sent.

    The UDP checksum is right where `payload` is whole (some traceroutes tell their probes apart by it), else 0 (none).
    """
    if len(payload) >= octets:
        header = udp.header(source_port, destination_port, payload, source, destination)
    else:
        header = udp.HEADER.pack(source_port, destination_port, udp.HEADER_LENGTH + octets, 0)
    octets = max(octets, len(payload))
    outer = ipv4.header(source, destination, ipv4.PROTOCOL_UDP, udp.HEADER_LENGTH + octets, ttl=1)
    return (outer + header + payload)[:QUOTED]
