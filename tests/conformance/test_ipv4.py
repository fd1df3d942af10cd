"""IPv4 (conformance.md section 1, rows I; threats G13, G14, G28)."""

from __future__ import annotations

import itertools
import random
import struct
from collections.abc import Callable

import pytest

from netstack.settings import Limits
from tests.support import packets
from tests.support.drill import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, HOST_ALIAS, Drill, pattern
from tests.support.packets import ICMP, IPV4, UDP, ip

REMOTE = ip("8.8.8.8")


def frame(packet: bytes) -> bytes:
    return packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet)


def datagram(payload: bytes, *, sport: int = 5000, dport: int = 7, **fields: object) -> bytes:
    """A UDP packet to the outside; what arrives there is in `d.io.datagrams`."""
    body = packets.udp(GUEST, REMOTE, sport, dport, payload)
    return packets.ipv4(GUEST, REMOTE, UDP, body, **fields)  # type: ignore[arg-type]


def good(d: Drill) -> bool:
    """An ordinary datagram still gets through."""
    before = len(d.io.datagrams)
    d.inject(frame(datagram(b"good")))
    return len(d.io.datagrams) == before + 1 and d.io.datagrams[-1].data == b"good"


def resummed(packet: bytes) -> bytes:
    head = (packet[0] & 15) * 4
    bare = packet[:10] + b"\0\0" + packet[12:]
    return bare[:10] + struct.pack("!H", packets.checksum(bare[: max(head, 20)])) + bare[12:]


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(datagram(b"x")[:10] + b"\xde\xad" + datagram(b"x")[12:], id="header checksum"),
        pytest.param(resummed(b"\x65" + datagram(b"x")[1:]), id="version 6"),
        pytest.param(resummed(b"\x05" + datagram(b"x")[1:]), id="version 0"),
        pytest.param(resummed(b"\x44" + datagram(b"x")[1:]), id="IHL 4"),
        pytest.param(resummed(b"\x40" + datagram(b"x")[1:]), id="IHL 0"),
        pytest.param(resummed(b"\x4f" + datagram(b"x")[1:]), id="IHL beyond the packet"),
        pytest.param(resummed(datagram(b"x")[:2] + b"\0\x13" + datagram(b"x")[4:]), id="total length below the header"),
        pytest.param(
            resummed(datagram(b"x")[:2] + b"\x05\xdc" + datagram(b"x")[4:]), id="total length beyond the frame"
        ),
        pytest.param(resummed(datagram(b"x")[:2] + b"\0\0" + datagram(b"x")[4:]), id="total length 0"),
    ],
)
def test_i01_g13_broken_headers_are_dropped_and_counted(d: Drill, packet: bytes) -> None:
    d.inject(frame(packet))
    d.expect_none(0.5)
    assert not d.io.datagrams
    assert d.stack.counters.drops["ipv4_header"] + d.stack.counters.drops["ipv4_checksum"] == 1
    assert good(d)


@pytest.mark.parametrize("protocol", ["tcp", "udp"])
def test_i01_a_bad_header_checksum_on_a_known_flow_is_dropped_too(d: Drill, protocol: str) -> None:
    """The fast path must not be laxer than the general one."""
    f = d.open()
    assert good(d)
    whole = d.segment(f, "P.", data=b"bad") if protocol == "tcp" else frame(datagram(b"bad"))
    spoilt = whole[:24] + bytes((whole[24] ^ 0x55,)) + whole[25:]
    d.inject(spoilt)
    assert d.host(f).received == b"" and len(d.io.datagrams) == 1
    assert d.stack.counters.drops["ipv4_checksum"] == 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(b"\1\1\1\1", id="NOP"),
        pytest.param(b"\0\0\0\0", id="end of options"),
        pytest.param(b"\x94\4\0\0", id="router alert"),
        pytest.param(b"\7\x27\4" + bytes(36) + b"\0", id="record route"),
        pytest.param(b"\x44\x24\5\0" + bytes(32), id="timestamp"),
    ],
)
def test_i02_options_are_ignored_and_the_payload_found(d: Drill, options: bytes) -> None:
    d.inject(frame(datagram(b"behind options", options=options)))
    assert d.io.datagrams[-1].data == b"behind options"
    f = d.open()
    body = packets.tcp(f.guest, f.remote, f.sport, f.dport, f.snd, f.rcv, packets.ACK, 500, b"tcp")
    d.inject(frame(packets.ipv4(f.guest, f.remote, 6, body, options=options)))
    assert d.host(f).received == b"tcp"
    f.snd += 3
    d.collect(f)


@pytest.mark.parametrize("kind", [131, 137], ids=["LSRR", "SSRR"])
def test_i02_g28_source_routes_are_dropped(d: Drill, kind: int) -> None:
    d.inject(frame(datagram(b"x", options=bytes((kind, 7, 4)) + GATEWAY + b"\0")))
    d.inject(frame(datagram(b"x", options=b"\1" + bytes((kind, 7, 4)) + GATEWAY)))
    d.expect_none(0.1)
    assert not d.io.datagrams
    assert d.stack.counters.drops["ipv4_source_route"] == 2


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(map(str, order)))
def test_i03_fragments_in_any_order_make_the_datagram(d: Drill, order: tuple[int, ...]) -> None:
    payload = pattern(3500)
    parts = packets.fragments(datagram(payload), 1480, ident=77)
    for index in order:
        d.inject(frame(parts[index]))
    assert [sent.data for sent in d.io.datagrams] == [payload]


def test_i03_duplicated_fragments_are_harmless(d: Drill) -> None:
    payload = pattern(3500)
    parts = packets.fragments(datagram(payload), 1480, ident=77)
    for index in (0, 0, 1, 0, 1, 2):
        d.inject(frame(parts[index]))
    assert [sent.data for sent in d.io.datagrams] == [payload]


def test_i03_fragments_of_several_datagrams_do_not_mix(d: Drill) -> None:
    payloads = [pattern(4000, index) for index in range(10)]
    parts = [packets.fragments(datagram(payload), 800, ident=index) for index, payload in enumerate(payloads)]
    shuffled = [part for group in parts for part in group]
    random.Random(1).shuffle(shuffled)
    for part in shuffled:
        d.inject(frame(part))
    assert sorted(sent.data for sent in d.io.datagrams) == sorted(payloads)


def cut(payload: bytes, pieces: list[tuple[int, int]], ident: int = 9) -> list[bytes]:
    """Fragments that carry the given ranges of the packet's payload."""
    return [
        packets.ipv4(GUEST, REMOTE, UDP, payload[begin:end], ident=ident, offset=begin, mf=end < len(payload))
        for begin, end in pieces
    ]


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param([(0, 800), (792, 1600), (1600, 2008)], id="overlap by 8"),
        pytest.param([(0, 1600), (800, 1200), (1600, 2008)], id="one inside another (teardrop)"),
        pytest.param([(800, 1600), (0, 1600), (1600, 2008)], id="one covers another"),
        pytest.param([(1600, 2008), (0, 800), (800, 1608)], id="overlap with the last"),
        pytest.param([(0, 800), (0, 808), (808, 2008)], id="same begin, another length"),
    ],
)
def test_i04_g14_an_overlap_discards_the_whole_datagram(d: Drill, pieces: list[tuple[int, int]]) -> None:
    payload = packets.udp(GUEST, REMOTE, 5000, 7, pattern(2000))
    for part in cut(payload, pieces):
        d.inject(frame(part))
    assert not d.io.datagrams
    assert d.stack.counters.drops["fragment_overlap"] >= 1
    for part in cut(payload, [(0, 800), (800, 1600), (1600, 2008)]):
        d.inject(frame(part))
    assert not d.io.datagrams, "the same identification stays condemned"
    d.advance(40.0)
    for part in cut(payload, [(0, 800), (800, 1600), (1600, 2008)]):
        d.inject(frame(part))
    assert len(d.io.datagrams) == 1


def test_i05_incomplete_datagrams_time_out_after_30_s_with_an_error_if_the_first_was_there(d: Drill) -> None:
    parts = packets.fragments(datagram(pattern(3000)), 1480, ident=5)
    d.inject(frame(parts[0]))
    d.expect_none(29.0)
    error = d.take_icmp(11, 1, within=2.0)
    assert error.payload[8:36] == parts[0][:28]
    assert d.stack.counters.drops["fragment_timeout"] >= 1
    d.inject(frame(parts[1]))
    d.inject(frame(parts[2]))
    assert not d.io.datagrams


def test_i05_no_error_when_the_first_fragment_is_missing(d: Drill) -> None:
    parts = packets.fragments(datagram(pattern(3000)), 1480, ident=5)
    d.inject(frame(parts[1]))
    d.expect_none(60.0)


def test_i06_g14_many_incomplete_datagrams_are_bounded_and_the_newest_still_works(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_fragments=16, max_fragment_octets=1 << 18))
    for ident in range(3000):
        part = packets.ipv4(GUEST, REMOTE, UDP, bytes(1400), ident=ident, mf=True)
        d.queue(frame(part))
        if ident % 16 == 0:
            d.settle()
        assert len(d.stack.reassembler) <= 16
        assert d.stack.reassembler.octets <= (1 << 18) * 1.1
    d.settle()
    payload = pattern(3000)
    for part in packets.fragments(datagram(payload), 1480, ident=40_000):
        d.inject(frame(part))
    assert d.io.datagrams[-1].data == payload
    d.advance(100.0)
    d.others.clear()
    assert len(d.stack.reassembler) == 0


def test_i06_tiny_fragments_cost_what_they_take(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_fragment_octets=100_000))
    for index in range(8000):
        d.queue(
            frame(
                packets.ipv4(
                    GUEST, REMOTE, UDP, bytes(8), ident=index // 4000, offset=8 * (2 * (index % 4000)), mf=True
                )
            )
        )
    d.settle()
    assert d.stack.reassembler.octets <= 110_000
    assert good(d)


@pytest.mark.parametrize(
    "packet",
    [
        pytest.param(
            packets.ipv4(GUEST, REMOTE, UDP, bytes(1001), mf=True), id="MF with a length that is no multiple of 8"
        ),
        pytest.param(packets.ipv4(GUEST, REMOTE, UDP, bytes(100), offset=65528), id="ping of death"),
        pytest.param(packets.ipv4(GUEST, REMOTE, UDP, bytes(1480), offset=65528 - 800, mf=True), id="beyond 65535"),
        pytest.param(packets.ipv4(GUEST, REMOTE, UDP, b"", offset=80), id="empty last"),
        pytest.param(packets.ipv4(GUEST, REMOTE, UDP, b"", mf=True), id="empty first"),
    ],
)
def test_i07_g14_invalid_fragments_are_dropped_and_counted(d: Drill, packet: bytes) -> None:
    d.inject(frame(packet))
    d.expect_none(0.1)
    assert d.stack.counters.drops["fragment_invalid"] == 1
    assert good(d)


@pytest.mark.parametrize("size", [1473, 2000, 9000, 65507])
def test_i08_long_datagrams_to_the_guest_are_fragmented(d: Drill, size: int) -> None:
    """The oracle checks each fragment and the checksum of the whole."""
    d.udp(("8.8.8.8", 7), b"hello", sport=1234)
    d.io.datagrams[-1].answer(pattern(size))
    d.settle()
    source, port, payload = d.take_udp()
    assert (source, port) == (("8.8.8.8", 7), 1234)
    assert payload == pattern(size)
    assert not d.others


def test_i09_identifications_of_fragmented_datagrams_do_not_repeat(d: Drill) -> None:
    d.udp(("8.8.8.8", 7), b"hello", sport=1234)
    for index in range(200):
        d.io.datagrams[-1].answer(pattern(2000, index))
        d.settle()
    idents = [packet.ident for packet in d.others if packet.offset == 0]
    assert len(idents) == 200 and len(set(idents)) == 200


NOBODY = "255.255.255.255 192.168.65.255 192.168.65.0 224.0.0.1 239.1.2.3 0.0.0.0 0.1.2.3 240.0.0.1 250.1.1.1".split()


@pytest.mark.parametrize("destination", NOBODY)
@pytest.mark.parametrize("protocol", [1, 6, 17])
def test_i10_u08_nothing_is_proxied_to_broadcast_multicast_zero_or_class_e(
    d: Drill, destination: str, protocol: int
) -> None:
    dst = ip(destination)
    body = {
        1: packets.echo(1, 1),
        6: packets.tcp(GUEST, dst, 1000, 80, 1, 0, packets.SYN),
        17: packets.udp(GUEST, dst, 1000, 2000, b"x"),
    }[protocol]
    d.ip(protocol, body, dst=dst)
    d.advance(1.0)
    assert not d.io.connects and not d.io.datagrams
    if (ip(destination)[0] >= 224 and ip(destination)[0] < 240) or destination.endswith(("255", "65.0")):
        assert not d.others, "an error about a broadcast or multicast"
    d.others.clear()
    for flow in d.flows.values():
        flow.inbox.clear()


def test_i11_spoofed_sources_are_dropped_after_a_flow_is_known_too(d: Drill) -> None:
    """Sources in full: test_g15_guest_sources_that_cannot_be_are_dropped."""
    for source in ("10.9.8.7", "127.0.0.1", "192.168.65.255"):
        d.ip(17, packets.udp(ip(source), REMOTE, 5000, 7, b"x"), src=ip(source), dst=REMOTE)
    assert not d.io.datagrams
    assert d.stack.counters.drops["ipv4_source"] == 3


@pytest.mark.parametrize("ttl", [0, 1])
@pytest.mark.parametrize("protocol", [1, 6, 17])
def test_i12_g28_a_ttl_that_ends_here_is_told_by_the_gateway(d: Drill, ttl: int, protocol: int) -> None:
    body = {
        1: packets.echo(1, 1),
        6: packets.tcp(GUEST, REMOTE, 1000, 80, 1, 0, packets.SYN),
        17: packets.udp(GUEST, REMOTE, 1000, 33434, b"traceroute"),
    }[protocol]
    d.ip(protocol, body, dst=REMOTE, ttl=ttl)
    error = d.take_icmp(11, 0)
    assert error.source == GATEWAY
    assert error.payload[8 + 16 : 8 + 20] == REMOTE
    assert not d.io.datagrams and not d.io.connects


def test_i12_a_ttl_of_1_on_a_known_udp_association_ends_here_too(d: Drill) -> None:
    d.udp(("8.8.8.8", 33434), b"first", sport=1000)
    d.udp(("8.8.8.8", 33434), b"second", sport=1000, ttl=1)
    d.take_icmp(11, 0)
    assert [sent.data for sent in d.io.datagrams] == [b"first"]


@pytest.mark.parametrize("ttl", [2, 3, 30, 64, 255])
def test_i12_the_ttl_is_carried_on_less_one(d: Drill, ttl: int) -> None:
    d.udp(("8.8.8.8", 33434), b"probe", sport=1000, ttl=ttl)
    assert d.io.datagrams[-1].ttl == ttl - 1
    d.udp(("8.8.8.8", 33434), b"probe", sport=1000, ttl=ttl + 1 if ttl < 255 else 9)
    assert d.io.datagrams[-1].ttl == (ttl if ttl < 255 else 8)


@pytest.mark.parametrize("target", [GATEWAY, HOST_ALIAS], ids=["gateway", "host alias"])
def test_i12_ttl_1_to_our_own_addresses_is_answered(d: Drill, target: bytes) -> None:
    d.ip(ICMP, packets.echo(1, 1, b"near"), dst=target, ttl=1)
    d.take_icmp(0, 0)


@pytest.mark.parametrize("destination", [REMOTE, GATEWAY], ids=["outside", "gateway"])
def test_i13_unknown_protocols_are_told_at_a_limited_rate(d: Drill, destination: bytes) -> None:
    d.ip(132, bytes(20), dst=destination)
    error = d.take_icmp(3, 2)
    assert error.payload[8 + 9] == 132
    for _ in range(3000):
        d.queue(frame(packets.ipv4(GUEST, destination, 132, bytes(20))))
    d.settle()
    assert len(d.others) <= 1000
    assert d.stack.counters.drops["icmp_rate"] > 0
    d.others.clear()
    d.advance(2.0)
    d.ip(132, bytes(20), dst=destination)
    d.take_icmp(3, 2)


def test_g28_a_sweep_over_all_protocols_crashes_nothing(d: Drill) -> None:
    for protocol in range(256):
        d.ip(protocol, bytes(64), dst=REMOTE)
        d.ip(protocol, b"", dst=GATEWAY)
    d.others.clear()
    assert good(d)


def corpus() -> list[bytes]:
    """Good frames of every kind the stack takes."""
    tcp_syn = packets.tcp(
        GUEST, REMOTE, 40000, 80, 100, 0, packets.SYN, 65535, options=packets.mss_option(1460) + packets.SACK_PERMITTED
    )
    made = [
        packets.ether(
            b"\xff" * 6, GUEST_MAC, packets.ARP, packets.arp(1, GUEST_MAC, GUEST, bytes(6), GATEWAY), pad=False
        ),
        packets.ether(
            GATEWAY_MAC, GUEST_MAC, packets.ARP, packets.arp(2, GUEST_MAC, GUEST, GATEWAY_MAC, GATEWAY), pad=False
        ),
    ]
    made += [
        packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet, pad=False)
        for packet in (
            datagram(b"payload"),
            datagram(b"", dport=53),
            datagram(b"with options", options=b"\1\1\1\0"),
            packets.ipv4(GUEST, REMOTE, 6, tcp_syn),
            packets.ipv4(GUEST, REMOTE, 6, packets.tcp(GUEST, REMOTE, 40001, 80, 5, 6, packets.ACK, 100, b"data")),
            packets.ipv4(GUEST, REMOTE, 6, packets.tcp(GUEST, REMOTE, 40001, 80, 5, 6, packets.RST, 0)),
            packets.ipv4(GUEST, GATEWAY, 1, packets.echo(1, 2, b"ping data")),
            packets.ipv4(GUEST, GATEWAY, 1, packets.icmp(3, 3, body=datagram(b"quoted")[:28])),
            packets.ipv4(GUEST, GATEWAY, 1, packets.icmp(3, 4, struct.pack("!HH", 0, 1000), datagram(b"quoted")[:28])),
            packets.ipv4(GUEST, GATEWAY, 1, packets.icmp(11, 0, body=datagram(b"quoted")[:28])),
            packets.ipv4(GUEST, GATEWAY, 17, packets.udp(GUEST, GATEWAY, 68, 67, bytes(300))),
            packets.fragments(datagram(pattern(2000)), 1480, ident=3)[0],
            packets.fragments(datagram(pattern(2000)), 1480, ident=3)[1],
        )
    ]
    return made


def test_g13_every_cut_and_every_length_off_by_one_is_survived(d: Drill) -> None:
    for whole in corpus():
        for length in range(len(whole)):
            d.queue(whole[:length])
        for at in (16, 17, 38, 39, 46, 47):
            for delta in (-1, 1, 127):
                if at < len(whole):
                    changed = bytearray(whole)
                    changed[at] = (changed[at] + delta) & 0xFF
                    if whole[12:14] == b"\x08\0":
                        changed[24:26] = b"\0\0"
                        changed[24:26] = struct.pack("!H", packets.checksum(changed[14:34]))
                    d.queue(bytes(changed))
        d.settle()
        d.assert_sane()
    d.others.clear()
    assert good(d)
