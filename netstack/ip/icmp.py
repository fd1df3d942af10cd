"""ICMP errors to the guest: which may be sent, how often, and what they quote (RFC 1122 3.2.2).

`error` makes the message, the payload of an IP packet whose source is whoever reports. It quotes the guest's own packet, since
the guest's kernel finds no socket for any other. Where the outside reports to the host about what a host socket sent for the
guest, `netstack.host.error_queue` hears of it, and `icmp_proxy.quoted_request` or `netstack.udp.quote` makes again what the guest
sent.
"""

from __future__ import annotations

from typing import Final

from netstack.wire import icmp, ipv4
from netstack.wire.checksum import Buffer

MAX_ERROR: Final = 576  # RFC 1812 4.3.2.3: as much of the packet as fits without the error exceeding 576 octets
_MAX_QUOTED: Final = MAX_ERROR - ipv4.HEADER_LENGTH - icmp.HEADER_LENGTH

_PLATEAUS: Final = (32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, 68)  # RFC 1191 section 7.1

_PROTOCOL = 9


def error(kind: int, code: int, original: Buffer, *, mtu: int = 0, subnet_broadcast: bytes = b"") -> bytes | None:
    """The ICMP error `kind`/`code` about the IPv4 packet `original` (its header checked); `None` where none may be sent.

    None may be sent about an ICMP error, a packet to a broadcast or multicast address, a fragment but the first, or a
    packet whose source is no single host (RFC 1122 3.2.2). That it came in a link-layer broadcast only the caller knows.
    `mtu` is the next hop's, for "fragmentation needed"; where it is not known, the next lower plateau of RFC 1191 is told,
    never 0, which leaves a guest to guess.
    """
    view = memoryview(original)
    if not _may_report(view, subnet_broadcast):
        return None
    total_length = int.from_bytes(view[2:4], "big")
    rest = icmp.NO_REST
    if kind == icmp.UNREACHABLE and code == icmp.FRAGMENTATION_NEEDED:
        rest = icmp.mtu_rest(mtu if mtu > 0 else plateau(total_length))
    return icmp.emit(kind, code, rest, view[: min(total_length, _MAX_QUOTED)])


def plateau(total_length: int) -> int:
    """The largest usual MTU below `total_length` octets (RFC 1191 section 7.1)."""
    for mtu in _PLATEAUS:
        if mtu < total_length:
            return mtu
    return _PLATEAUS[-1]


class RateLimit:
    """A token bucket over the errors of one sender (RFC 1812 4.3.2.8).

    `rate` per second, after `burst` at once; Linux allows 1,000 and 50 for all hosts together.
    """

    def __init__(self, rate: float = 100.0, burst: int = 50) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._filled_at = float("-inf")

    def allow(self, now: float) -> bool:
        """Whether one more may be sent at `now` (seconds); if so it is counted."""
        if now > self._filled_at:
            self._tokens = min(self._burst, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True


def _may_report(packet: memoryview, subnet_broadcast: bytes) -> bool:
    """RFC 1122 3.2.2, "An ICMP error message MUST NOT be sent as the result of receiving"."""
    if len(packet) < ipv4.HEADER_LENGTH:
        return False
    source, destination = bytes(packet[12:16]), bytes(packet[16:20])
    if not _single_host(source) or source == subnet_broadcast:
        return False
    if destination[0] >= 224 or destination[0] == 0 or destination == subnet_broadcast:
        return False  # multicast, class E, 255.255.255.255, and the old broadcast of zeros (RFC 1122 3.3.6)
    if int.from_bytes(packet[6:8], "big") & ipv4.OFFSET_MASK:
        return False
    if packet[_PROTOCOL] == ipv4.PROTOCOL_ICMP:
        header_length = (packet[0] & 15) << 2
        return len(packet) > header_length and packet[header_length] not in icmp.ERRORS
    return True


def _single_host(source: bytes) -> bool:
    """RFC 1122 3.2.2: not zero, loopback, broadcast, multicast or class E."""
    return source[0] not in (0, 127) and source[0] < 224
