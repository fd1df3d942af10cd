"""UDP (conformance.md section 7, rows U; X02; threats G21)."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from netstack.api import Endpoint, Reply
from netstack.settings import Limits, Timeouts
from tests.support import packets
from tests.support.drill import GATEWAY, GUEST, HOST_ALIAS, Drill, pattern
from tests.support.packets import UDP, ip

REMOTE = ("8.8.8.8", 7)


@pytest.mark.parametrize("offload", [False, True], ids=["plain", "vnet"])
@pytest.mark.parametrize("size", [0, 1, 2, 511, 1471, 1472, 1473, 9000, 65507])
def test_u01_sizes_from_nothing_to_65507_both_ways(drill: Callable[..., Drill], size: int, offload: bool) -> None:
    d = drill(offload=offload)
    d.udp(REMOTE, pattern(size), sport=1234)
    assert d.io.datagrams[-1].data == pattern(size)
    assert d.io.datagrams[-1].address == REMOTE
    d.io.datagrams[-1].answer(pattern(size, 1))
    d.settle()
    assert d.take_udp() == (REMOTE, 1234, pattern(size, 1))
    assert not d.others


def test_u01_boundaries_are_kept_in_a_burst(d: Drill) -> None:
    for index in range(50):
        d.udp(REMOTE, b"%d" % index * index, sport=1234)
    assert [sent.data for sent in d.io.datagrams] == [b"%d" % index * index for index in range(50)]
    for index in range(50):
        d.io.datagrams[-1].answer(b"%d" % index * index)
    d.settle()
    assert [d.take_udp()[2] for _ in range(50)] == [b"%d" % index * index for index in range(50)]


@pytest.mark.parametrize("known", [False, True], ids=["first", "known association"])
@pytest.mark.parametrize("size", [4, 5])
def test_u02_a_bad_checksum_is_dropped_and_none_is_fine(d: Drill, known: bool, size: int) -> None:
    payload = b"abcde"[:size]
    sent = 0
    if known:
        d.udp(REMOTE, b"first", sport=1234)
        sent = 1
    d.udp(REMOTE, payload, sport=1234, check=0x1234)
    assert len(d.io.datagrams) == sent
    assert d.stack.counters.drops["udp_checksum"] == 1
    d.udp(REMOTE, payload, sport=1234, check=0)
    assert d.io.datagrams[-1].data == payload


def test_u02_a_sum_that_is_zero_is_sent_as_ffff(d: Drill) -> None:
    """RFC 768. The payload is chosen so that the checksum comes out as zero."""
    d.udp(REMOTE, b"x", sport=1234)
    head = packets.pseudo(ip("8.8.8.8"), GUEST, UDP, 10) + bytes((0, 7, 0x04, 0xD2, 0, 10, 0, 0))
    payload = (0xFFFF ^ packets.word_sum(head)).to_bytes(2, "big")
    assert packets.checksum(head + payload) == 0
    d.io.datagrams[-1].answer(payload)
    d.settle()
    packet = d.take(UDP)
    assert packet.payload[6:8] == b"\xff\xff"


@pytest.mark.parametrize("length", [0, 1, 7, 13, 100, 65535])
@pytest.mark.parametrize("known", [False, True], ids=["first", "known association"])
def test_u03_g13_a_length_field_that_lies_is_dropped(d: Drill, length: int, known: bool) -> None:
    sent = 0
    if known:
        d.udp(REMOTE, b"abcd", sport=1234)
        sent = 1
    body = packets.udp(GUEST, ip("8.8.8.8"), 1234, 7, b"abcd", check=0)
    d.ip(UDP, body[:4] + length.to_bytes(2, "big") + body[6:], dst=ip("8.8.8.8"))
    d.expect_none(0.1)
    assert len(d.io.datagrams) == sent
    assert d.stack.counters.drops["udp_malformed"] == 1


@pytest.mark.parametrize("length", range(8))
def test_u03_a_truncated_header_is_dropped(d: Drill, length: int) -> None:
    d.ip(UDP, packets.udp(GUEST, ip("8.8.8.8"), 1234, 7, b"")[:length], dst=ip("8.8.8.8"))
    assert not d.io.datagrams
    assert d.stack.counters.drops["udp_malformed"] == 1


def test_u03_a_payload_shorter_than_the_packet_is_taken_by_its_length(d: Drill) -> None:
    body = packets.udp(GUEST, ip("8.8.8.8"), 1234, 7, b"abcd")
    d.ip(UDP, body + b"trailer", dst=ip("8.8.8.8"))
    assert [sent.data for sent in d.io.datagrams] in ([b"abcd"], [])


def test_u04_one_guest_port_is_one_host_socket_whatever_the_destination(d: Drill) -> None:
    for host in range(1, 20):
        d.udp((f"8.8.8.{host}", 1000 + host), b"x", sport=1234)
    assert len({id(sent.sock) for sent in d.io.datagrams}) == 1
    d.udp(REMOTE, b"x", sport=1235)
    assert len(d.io.sockets) == 2


def test_u04_anybody_may_answer_at_the_mapping_hole_punching(d: Drill) -> None:
    """Endpoint-independent filtering: a peer the guest never spoke to gets through, under its own address."""
    d.udp(REMOTE, b"x", sport=1234)
    sock = d.io.datagrams[-1].sock
    sock.deliver(b"from a stranger", ("203.0.113.9", 4444))
    d.settle()
    assert d.take_udp() == (("203.0.113.9", 4444), 1234, b"from a stranger")
    d.udp(("203.0.113.9", 4444), b"back", sport=1234)
    assert d.io.datagrams[-1].sock is sock


def test_u04_n3_strict_filtering_lets_only_contacted_endpoints_answer(drill: Callable[..., Drill]) -> None:
    d = drill(udp_filtering="endpoint")
    d.udp(REMOTE, b"x", sport=1234)
    sock = d.io.datagrams[-1].sock
    sock.deliver(b"stranger", ("203.0.113.9", 4444))
    sock.deliver(b"other port", ("8.8.8.8", 8))
    d.expect_none(0.1)
    sock.deliver(b"right", REMOTE)
    d.settle()
    assert d.take_udp()[2] == b"right"


def test_u04_the_host_alias_is_the_hosts_loopback_both_ways(d: Drill) -> None:
    d.udp((HOST_ALIAS, 5353), b"x", sport=1234)
    assert d.io.datagrams[-1].address == ("127.0.0.1", 5353)
    d.io.datagrams[-1].answer(b"y")
    d.settle()
    assert d.take_udp() == (("192.168.65.2", 5353), 1234, b"y")


def test_u04_two_guests_with_one_port_number_have_two_mappings(d: Drill) -> None:
    d.udp(REMOTE, b"a", sport=1234)
    d.udp(REMOTE, b"b", sport=1234, src=ip("192.168.65.4"))
    first, second = (sent.sock for sent in d.io.datagrams)
    assert first is not second


def test_u05_an_idle_mapping_ends_and_both_directions_keep_it(d: Drill) -> None:
    d.udp(REMOTE, b"x", sport=1234)
    first = d.io.datagrams[-1]
    for index in range(6):
        d.advance(50.0)
        if index % 2:
            d.udp(REMOTE, b"x", sport=1234)
        else:
            first.answer(b"y")
            d.settle()
            d.take_udp()
    assert not first.sock.closed
    d.advance(59.0)
    assert not first.sock.closed
    d.advance(125.0)
    assert first.sock.closed
    d.assert_clean()


def test_u05_g21_many_mappings_are_bounded_and_the_one_idle_longest_goes(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_udp_flows=100))
    d.udp(REMOTE, b"busy", sport=999)
    busy = d.io.datagrams[-1].sock
    for port in range(2000, 4000):
        d.udp(REMOTE, b"x", sport=port)
        if port % 20 == 0:
            d.advance(0.01)
            d.udp(REMOTE, b"busy", sport=999)
        assert len(d.io.sockets) <= 100
    assert not busy.closed, "a mapping in use survives"
    assert d.stack.counters.udp_evicted >= 1900
    d.advance(200.0)
    d.assert_clean()


@pytest.mark.parametrize("port", [53, 123], ids=["DNS", "NTP"])
def test_u06_dns_and_ntp_exchanges_are_over_5_s_after_the_answer(d: Drill, port: int) -> None:
    for source in range(3000, 3050):
        d.udp(("8.8.8.8", port), b"question", sport=source)
        d.io.datagrams[-1].answer(b"answer")
        d.settle()
        d.take_udp()
    assert len(d.io.sockets) == 50
    d.advance(5.5)
    d.assert_clean()


def test_u06_an_unanswered_question_waits_longer(d: Drill) -> None:
    d.udp(("8.8.8.8", 53), b"question", sport=3000)
    d.advance(20.0)
    d.io.datagrams[-1].answer(b"late answer")
    d.settle()
    assert d.take_udp()[2] == b"late answer"


def test_u07_port_unreachable_of_the_guest_closes_the_mapping(d: Drill) -> None:
    """Guest to host: nobody listens there any more, so the remote hears so from the host's kernel."""
    d.udp(REMOTE, b"x", sport=1234)
    sock = d.io.datagrams[-1].sock
    d.io.datagrams[-1].answer(b"late")
    d.settle()
    packet = d.take(UDP)
    d.ip(packets.ICMP, packets.icmp(3, 3, body=packet.header + packet.payload[:8]), dst=ip("8.8.8.8"))
    assert sock.closed
    d.assert_clean()


def test_u07_an_errno_of_the_send_itself_is_told(d: Drill) -> None:
    """What comes later, through the error queue, is in test_icmp (C05). The first errno may be of an earlier datagram."""
    d.udp(REMOTE, b"x", sport=1234)
    d.io.fail("sendto", 1, errno.EHOSTUNREACH)
    d.io.fail("sendto", 2, errno.EHOSTUNREACH)
    d.udp(REMOTE, b"y", sport=1234)
    d.take_icmp(3, 1)


def test_u08_broadcast_does_not_leave(d: Drill) -> None:
    for target in ("255.255.255.255", "192.168.65.255", "239.255.255.250", "224.0.0.251"):
        d.udp((target, 1900), b"discover")
    d.expect_none(0.2)
    assert not d.io.datagrams


def test_port_0_is_dropped(d: Drill) -> None:
    d.udp(("8.8.8.8", 0), b"x")
    d.udp(("8.8.8.8", 9), b"x", sport=0)
    assert len(d.io.datagrams) <= 1
    d.assert_sane()


# Services and published ports.


def test_a_service_on_the_gateway_answers_every_guest(d: Drill) -> None:
    seen: list[tuple[bytes, Endpoint]] = []

    def handler(payload: bytes, source: Endpoint, reply: Reply) -> None:
        seen.append((payload, source))
        reply(b"re: " + payload)

    d.stack.serve_datagrams(GATEWAY, 53, handler)
    d.udp((GATEWAY, 53), b"question", sport=1234)
    assert d.take_udp() == (("192.168.65.1", 53), 1234, b"re: question")
    assert seen == [(b"question", Endpoint(GUEST, 1234))]
    assert not d.io.sockets


def test_a_service_may_answer_later_and_at_length(d: Drill) -> None:
    kept: list[Reply] = []
    d.stack.serve_datagrams(GATEWAY, 53, lambda payload, source, reply: kept.append(reply))
    d.udp((GATEWAY, 53), pattern(3000), sport=1234)
    d.expect_none(2.0)
    kept[0](pattern(4000))
    d.settle()
    assert d.take_udp()[2] == pattern(4000)


def test_x02_each_peer_of_a_published_port_gets_its_own_answers(d: Drill) -> None:
    published = d.io.bound()
    d.stack.datagrams(Endpoint(GUEST, 9000), published)
    peers = [("127.0.0.1", 40000), ("127.0.0.1", 40001), ("10.0.0.9", 40000)]
    seen = {}
    for peer in peers:
        published.deliver(repr(peer).encode(), peer)
        d.settle()
        source, port, payload = d.take_udp()
        assert port == 9000 and payload == repr(peer).encode()
        assert not source[0].startswith("127.")
        seen[peer] = source
    assert len(set(seen.values())) == 3, "peers can be told apart"
    for peer, source in seen.items():
        d.udp(source, b"to " + repr(peer).encode(), sport=9000)
        assert d.io.datagrams[-1].sock is published
        assert d.io.datagrams[-1].address == peer
        assert d.io.datagrams[-1].data == b"to " + repr(peer).encode()


def test_x02_a_published_port_can_be_withdrawn(d: Drill) -> None:
    published = d.io.bound()
    handle = d.stack.datagrams(Endpoint(GUEST, 9000), published)
    published.deliver(b"x", ("127.0.0.1", 40000))
    d.settle()
    d.take_udp()
    handle.close()
    assert published.closed
    d.assert_clean()


def test_x02_peers_of_a_published_port_expire(drill: Callable[..., Drill]) -> None:
    d = drill(timeouts=Timeouts(udp_idle_s=60.0))
    published = d.io.bound()
    d.stack.datagrams(Endpoint(GUEST, 9000), published)
    for port in range(40000, 40100):
        published.deliver(b"x", ("127.0.0.1", port))
    d.settle()
    assert len(list(d.stack.flows())) == 100
    d.advance(130.0)
    assert not list(d.stack.flows())
    assert not published.closed
