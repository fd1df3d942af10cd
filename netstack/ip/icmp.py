"""ICMP on our behalf and on the world's: which errors may be sent, how often, and what they quote (RFC 1122 3.2.2).

Everything here makes ICMP messages (the payload of an IP packet whose source is whoever reports). Two ways lead to an error
for the guest. Where we are the one who cannot deliver, `error` quotes the guest's own packet. Where the outside reports to
the host about a packet that a host socket sent for the guest, the guest must see *its* packet quoted, or its kernel
finds no socket for it: `rewrite_quoted` puts the guest's addresses and ports back into the quotation, and where the
operating system tells the error without quotation (a socket's error queue), `datagram_sent` and `echo_sent` make again what
the guest sent, to be quoted by `error`.
"""

from __future__ import annotations

from typing import Final

from netstack.errors import Malformed
from netstack.wire import checksum, icmp, ipv4, udp
from netstack.wire.checksum import Buffer

MAX_ERROR: Final = 576  # RFC 1812 4.3.2.3: as much of the packet as fits without the error exceeding 576 octets
_MAX_QUOTED: Final = MAX_ERROR - ipv4.HEADER_LENGTH - icmp.HEADER_LENGTH
_TRANSPORT_QUOTED: Final = 8  # RFC 792: at least these octets follow the quoted IP header

_PLATEAUS: Final = (32000, 17914, 8166, 4352, 2002, 1492, 1006, 508, 296, 68)  # RFC 1191 section 7.1

_TTL = 8
_PROTOCOL = 9


def error(
    kind: int, code: int, original: Buffer, *, rest: bytes = icmp.NO_REST, mtu: int = 0, subnet_broadcast: bytes = b""
) -> bytes | None:
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
    if kind == icmp.UNREACHABLE and code == icmp.FRAGMENTATION_NEEDED:
        rest = icmp.mtu_rest(mtu if mtu > 0 else plateau(total_length))
    return icmp.emit(kind, code, rest, view[: min(total_length, _MAX_QUOTED)])


def plateau(total_length: int) -> int:
    """The largest usual MTU below `total_length` octets (RFC 1191 section 7.1)."""
    for mtu in _PLATEAUS:
        if mtu < total_length:
            return mtu
    return _PLATEAUS[-1]


def echo_reply(request: icmp.Message) -> bytes:
    """The answer to an echo request: same identifier, sequence number and data (RFC 1122 3.2.2.6)."""
    return icmp.emit(icmp.ECHO_REPLY, 0, request.rest, request.body)


def datagram_sent(
    source: bytes, source_port: int, destination: bytes, destination_port: int, payload: Buffer, *, ttl: int = 64
) -> bytes:
    """The IPv4 packet of a UDP datagram as the guest sent it, for `error` to quote."""
    datagram = udp.emit(source_port, destination_port, payload, source, destination)
    return ipv4.header(source, destination, ipv4.PROTOCOL_UDP, len(datagram), ttl=ttl) + datagram


def echo_sent(
    source: bytes, destination: bytes, identifier: int, sequence: int, data: Buffer, *, ttl: int = 64
) -> bytes:
    """The IPv4 packet of an echo request as the guest sent it, for `error` to quote."""
    message = icmp.emit(icmp.ECHO_REQUEST, 0, icmp.echo_rest(identifier, sequence), memoryview(data))
    return ipv4.header(source, destination, ipv4.PROTOCOL_ICMP, len(message), ttl=ttl) + message


def quoted_flow(message: icmp.Message) -> tuple[int, bytes, int, bytes, int]:
    """Which packet of ours an error is about: `(protocol, source, port, destination, destination port)`.

    The host's side, to find the flow with. For an echo request `port` is the identifier and the last is 0. Raises
    `Malformed` when the quotation is cut short or is neither UDP nor an echo request.
    """
    header_length = _quoted_header(message.body)
    quoted = message.body
    source, destination = bytes(quoted[12:16]), bytes(quoted[16:20])
    first = int.from_bytes(quoted[header_length : header_length + 2], "big")
    second = int.from_bytes(quoted[header_length + 2 : header_length + 4], "big")
    if quoted[_PROTOCOL] == ipv4.PROTOCOL_UDP:
        return ipv4.PROTOCOL_UDP, source, first, destination, second
    identifier = int.from_bytes(quoted[header_length + 4 : header_length + 6], "big")
    return ipv4.PROTOCOL_ICMP, source, identifier, destination, 0


def rewrite_quoted(
    message: icmp.Message, *, source: bytes, port: int, destination: bytes, destination_port: int | None = None
) -> bytes | None:
    """The error `message`, which arrived at the host about a packet sent for the guest, as the guest must see it.

    `source` and `port` (echo: identifier) are the guest's, `destination` and `destination_port` (default: as quoted) what
    the guest had sent to. The quoted checksums are made right for them; a quoted UDP checksum of 0 stays. Extensions
    (RFC 4884) are left out. `None` for what is not passed on: redirects and source quench (RFC 6633) concern the host.
    Raises `Malformed` as `quoted_flow`.
    """
    if message.type not in (icmp.UNREACHABLE, icmp.TIME_EXCEEDED, icmp.PARAMETER_PROBLEM):
        return None
    header_length = _quoted_header(message.body)
    total_length = int.from_bytes(message.body[2:4], "big")
    without_extensions = message.rest[1] * 4 or len(message.body)
    quoted = bytearray(message.body[: min(total_length, without_extensions, _MAX_QUOTED)])
    if len(quoted) < header_length + _TRANSPORT_QUOTED:
        raise Malformed("icmp: quoted packet cut short")

    old_addresses = bytes(quoted[12:20])
    quoted[12:20] = source + destination
    quoted[10:12] = bytes(2)
    quoted[10:12] = checksum.internet(quoted[:header_length]).to_bytes(2, "big")

    port_octets = port.to_bytes(2, "big")
    if quoted[_PROTOCOL] == ipv4.PROTOCOL_UDP:
        ports = slice(header_length, header_length + 4)
        new = port_octets + (
            bytes(quoted[header_length + 2 : header_length + 4])
            if destination_port is None
            else destination_port.to_bytes(2, "big")
        )
        old = bytes(quoted[ports])
        quoted[ports] = new
        stored = int.from_bytes(quoted[header_length + 6 : header_length + 8], "big")
        if stored:
            stored = checksum.adjust(stored, old_addresses + old, source + destination + new) or 0xFFFF
            quoted[header_length + 6 : header_length + 8] = stored.to_bytes(2, "big")
    else:
        identifier = slice(header_length + 4, header_length + 6)
        old = bytes(quoted[identifier])
        quoted[identifier] = port_octets
        stored = int.from_bytes(quoted[header_length + 2 : header_length + 4], "big")
        quoted[header_length + 2 : header_length + 4] = checksum.adjust(stored, old, port_octets).to_bytes(2, "big")

    rest = icmp.NO_REST
    if message.type == icmp.PARAMETER_PROBLEM:
        rest = message.rest[:1] + bytes(3)  # the pointer
    return error(message.type, message.code, quoted, rest=rest, mtu=message.mtu)


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


def _quoted_header(quoted: memoryview) -> int:
    """Length of the IP header in a quotation that goes on with the first 8 octets of UDP or an echo request.

    Its checksum is not looked at: routers on the way were free to change the header.
    """
    if len(quoted) < ipv4.HEADER_LENGTH or quoted[0] >> 4 != 4:
        raise Malformed("icmp: quoted header cut short")
    header_length = (quoted[0] & 15) << 2
    if header_length < ipv4.HEADER_LENGTH or len(quoted) < header_length + _TRANSPORT_QUOTED:
        raise Malformed("icmp: quoted packet cut short")
    if int.from_bytes(quoted[6:8], "big") & ipv4.OFFSET_MASK:
        raise Malformed("icmp: quoted fragment without ports")
    protocol = quoted[_PROTOCOL]
    if protocol == ipv4.PROTOCOL_ICMP and quoted[header_length] == icmp.ECHO_REQUEST:
        return header_length
    if protocol != ipv4.PROTOCOL_UDP:
        raise Malformed("icmp: quoted packet is neither UDP nor an echo request")
    return header_length
