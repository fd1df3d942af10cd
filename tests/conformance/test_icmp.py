"""ICMP (conformance.md section 2, rows C)."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.support import packets
from tests.support.drill import GATEWAY, GUEST, HOST_ALIAS, Drill, pattern
from tests.support.fake_host import Datagram
from tests.support.packets import ICMP, ip

REMOTE = ip("8.8.8.8")


@pytest.mark.parametrize("target", [GATEWAY, HOST_ALIAS], ids=["gateway", "host alias"])
@pytest.mark.parametrize("size", [0, 1, 56, 57, 1472, 1473, 5000, 65507])
def test_c01_echo_to_us_is_answered_whatever_its_size(d: Drill, target: bytes, size: int) -> None:
    data = pattern(size)
    message = packets.echo(0x1234, 7, data)
    if len(message) + 20 <= d.mtu:
        d.ip(ICMP, message, dst=target)
    else:
        for part in packets.fragments(packets.ipv4(GUEST, target, ICMP, b"") + message, 1480, ident=5):
            d.queue(packets.ether(bytes.fromhex("f61636bcf9c6"), bytes.fromhex("02000000aa03"), packets.IPV4, part))
        d.settle()
    reply = d.take_whole(ICMP)
    assert reply.source == target
    assert reply.payload == packets.echo(0x1234, 7, data, kind=0)


def test_c02_echo_to_others_goes_through_a_ping_socket(d: Drill) -> None:
    d.ip(ICMP, packets.echo(0x1111, 1, b"ping"), dst=REMOTE)
    sent = d.io.datagrams[-1]
    assert sent.address[0] == "8.8.8.8"
    assert sent.data[0] == 8 and sent.data[8:] == b"ping"
    sent.answer(b"\0\0" + bytes(2) + sent.data[4:])
    d.settle()
    reply = d.take_icmp(0, 0)
    assert reply.source == REMOTE
    assert reply.payload[4:] == struct.pack("!HH", 0x1111, 1) + b"ping"


def test_c02_two_processes_and_two_destinations_are_not_confused(d: Drill) -> None:
    sent: list[tuple[int, int, str, Datagram]] = []
    for ident in (1, 2, 3):
        for target in ("8.8.8.8", "9.9.9.9"):
            for sequence in (1, 2):
                d.ip(ICMP, packets.echo(ident, sequence, b"%d" % ident), dst=ip(target))
                sent.append((ident, sequence, target, d.io.datagrams[-1]))
    for ident, sequence, target, datagram in reversed(sent):
        datagram.answer(b"\0\0" + bytes(2) + datagram.data[4:])
        d.settle()
        reply = d.take_icmp(0, 0)
        assert reply.source == ip(target)
        assert reply.payload[4:] == struct.pack("!HH", ident, sequence) + b"%d" % ident


def test_c02_without_ping_sockets_echo_to_others_is_silent_and_the_rest_works(d: Drill) -> None:
    d.io.pings_allowed = False
    for sequence in range(5):
        d.ip(ICMP, packets.echo(1, sequence), dst=REMOTE)
    d.expect_none(2.0)
    d.ip(ICMP, packets.echo(1, 9))
    d.take_icmp(0, 0)


def test_c02_ping_sockets_are_let_go(d: Drill) -> None:
    for ident in range(600):
        d.ip(ICMP, packets.echo(ident, 1), dst=REMOTE)
    assert len(d.io.sockets) <= 256
    d.advance(300.0)
    d.assert_clean()


def test_c02_a_traceroute_by_echo_sees_the_routers(d: Drill) -> None:
    d.ip(ICMP, packets.echo(5, 1, b"probe"), dst=REMOTE, ttl=3)
    sent = d.io.datagrams[-1]
    assert sent.ttl == 2
    sent.sock.unreachable(sent, 11, 0, errno.EHOSTUNREACH, "10.0.0.1")
    d.settle()
    error = d.take_icmp(11, 0)
    assert error.source == ip("10.0.0.1")
    quoted = error.payload[8:]
    assert quoted[12:20] == GUEST + REMOTE and quoted[9] == 1
    assert struct.unpack_from("!BBHHH", quoted, 20)[3:] == (5, 1)


def test_c03_a_bad_checksum_is_dropped(d: Drill) -> None:
    message = packets.echo(1, 1, b"data")
    d.ip(ICMP, message[:2] + b"\xba\xad" + message[4:])
    d.ip(ICMP, message[:2] + b"\xba\xad" + message[4:], dst=REMOTE)
    d.expect_none(0.5)
    assert not d.io.datagrams
    assert d.stack.counters.drops["icmp_checksum"] == 2


def refused(d: Drill, dst: bytes = GATEWAY, **fields: object) -> None:
    """A datagram that would be answered port unreachable."""
    d.ip(packets.UDP, packets.udp(GUEST, dst, 4000, 4001, b"anybody?"), dst=dst, **fields)  # type: ignore[arg-type]


def test_c04_no_error_about_an_icmp_error(d: Drill) -> None:
    """An ICMP error to a port, an address and with a TTL that would each deserve one."""
    quoted = packets.ipv4(GATEWAY, GUEST, packets.UDP, packets.udp(GATEWAY, GUEST, 1, 2, b""))[:28]
    for kind in (3, 4, 5, 11, 12):
        d.ip(ICMP, packets.icmp(kind, 0, body=quoted), dst=REMOTE, ttl=1)
        d.ip(ICMP, packets.icmp(kind, 0, body=quoted), dst=ip("192.168.65.77"))
    d.expect_none(1.0)


def test_c04_no_error_about_broadcast_multicast_or_a_later_fragment(d: Drill) -> None:
    for target in ("255.255.255.255", "192.168.65.255", "224.0.0.5"):
        refused(d, ip(target))
        refused(d, ip(target), ttl=1)
        d.ip(132, bytes(8), dst=ip(target))
    d.ip(132, bytes(16), dst=REMOTE, offset=160, ident=9)
    d.expect_none(1.0)


def test_c04_no_error_about_a_unicast_packet_in_a_broadcast_frame(d: Drill) -> None:
    """RFC 1122 3.2.2: not about a datagram sent as a link-layer broadcast."""
    packet = packets.ipv4(GUEST, GATEWAY, packets.UDP, packets.udp(GUEST, GATEWAY, 4000, 4001, b"x"))
    d.inject(packets.ether(b"\xff" * 6, bytes.fromhex("02000000aa03"), packets.IPV4, packet))
    d.expect_none(0.5)


@pytest.mark.parametrize("size", [0, 1, 100, 1472])
def test_c05_c06_u07_a_refused_datagram_is_told_with_the_guests_own_packet_quoted(d: Drill, size: int) -> None:
    payload = pattern(size)
    d.udp(("8.8.8.8", 9), payload, sport=4321)
    sent = d.io.datagrams[-1]
    sent.sock.unreachable(sent, 3, 3, errno.ECONNREFUSED, "8.8.8.8")
    d.settle()
    error = d.take_icmp(3, 3)
    assert error.source == REMOTE
    assert len(error.payload) + 20 <= 576
    quoted = error.payload[8:]
    assert len(quoted) >= 28
    assert quoted[9] == 17 and quoted[12:20] == GUEST + REMOTE
    assert struct.unpack_from("!HHH", quoted, 20) == (4321, 9, 8 + size)
    assert payload.startswith(quoted[28:])


def test_c05_a_port_of_the_gateway_without_service_is_port_unreachable(d: Drill) -> None:
    refused(d)
    error = d.take_icmp(3, 3)
    assert error.source == GATEWAY
    assert struct.unpack_from("!HH", error.payload, 28) == (4000, 4001)


def test_c05_other_unreachables_of_the_outside_are_passed_on(d: Drill) -> None:
    for kind, code, number, offender in (
        (3, 0, errno.ENETUNREACH, "10.1.1.1"),
        (3, 1, errno.EHOSTUNREACH, "10.1.1.2"),
        (3, 13, errno.EACCES, "10.1.1.3"),
        (11, 0, errno.EHOSTUNREACH, "10.1.1.4"),
    ):
        d.udp(("8.8.8.8", 9), b"x", sport=4321, ttl=9)
        sent = d.io.datagrams[-1]
        sent.sock.unreachable(sent, kind, code, number, offender)
        d.settle()
        assert d.take_icmp(kind, code).source == ip(offender)


def test_c07_fragmentation_needed_names_an_mtu(d: Drill) -> None:
    """A datagram with DF over the path MTU of the host: the guest hears what would fit, never 0."""
    for told, least, most in ((1400, 1400, 1400), (0, 68, 1499)):
        d.udp(("8.8.8.8", 9), pattern(1472), sport=4321, df=True)
        sent = d.io.datagrams[-1]
        sent.sock.unreachable(sent, 3, 4, errno.EMSGSIZE, "10.1.1.1", info=told)
        d.settle()
        error = d.take_icmp(3, 4)
        assert least <= int.from_bytes(error.payload[6:8], "big") <= most


def test_c08_errors_are_limited_in_rate_and_recover(d: Drill) -> None:
    for _ in range(5000):
        refused(d)
    assert 10 <= len(d.others) <= 1100
    d.others.clear()
    d.advance(1.5)
    refused(d)
    d.take_icmp(3, 3)


def test_c08_echo_is_not_limited(d: Drill) -> None:
    for sequence in range(3000):
        d.ip(ICMP, packets.echo(1, sequence))
    assert len(d.others) == 3000


@pytest.mark.parametrize("length", range(8))
def test_c09_truncated_messages_are_dropped(d: Drill, length: int) -> None:
    d.ip(ICMP, packets.echo(1, 1)[:length])
    d.expect_none(0.1)
    assert d.stack.counters.drops["icmp_malformed"] == 1


@pytest.mark.parametrize("length", range(0, 28, 3))
def test_c09_g29_errors_with_a_truncated_quote_are_dropped(d: Drill, length: int) -> None:
    quoted = packets.ipv4(GATEWAY, GUEST, 6, packets.tcp(GATEWAY, GUEST, 1, 2, 3, 4, packets.ACK))[:length]
    for kind, code in ((3, 3), (3, 4), (11, 0), (12, 0)):
        d.ip(ICMP, packets.icmp(kind, code, struct.pack("!HH", 0, 576), quoted))
    d.expect_none(0.1)
    d.assert_sane()


@pytest.mark.parametrize("kind", [0, 1, 5, 9, 10, 13, 15, 17, 30, 255])
def test_other_message_types_are_dropped_in_silence(d: Drill, kind: int) -> None:
    """G16: redirects and router advertisements of a guest change nothing."""
    d.ip(ICMP, packets.icmp(kind, 0, GATEWAY, bytes(40)))
    d.ip(ICMP, packets.icmp(kind, 0, GATEWAY, bytes(40)), dst=REMOTE)
    d.expect_none(0.1)
    assert not d.io.datagrams
