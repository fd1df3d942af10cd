"""Rings of packets as classic pcap (spec vpnkit 8.1): which packets are in which, what goes first, and readers that follow."""

from __future__ import annotations

import io
import random
import struct

import dpkt
import pytest
from scapy.layers.dns import DNS, DNSQR
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from netstack.observe.classic import RULES, Ring, Rings, classify, file_header
from netstack.observe.pcap import INBOUND, OUTBOUND

SECOND = 1_000_000_000
NOW = 1_700_000_000 * SECOND


def packets(octets: bytes) -> list[tuple[float, bytes]]:
    """As another implementation reads them."""
    return list(dpkt.pcap.Reader(io.BytesIO(octets)))


def frame(*layers: object) -> bytes:
    packet = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
    for layer in layers:
        packet = packet / layer
    return bytes(packet)


IN_IP = IP(src="192.168.65.3", dst="192.0.2.1")
GOOD = [
    pytest.param(frame(IN_IP, UDP(sport=4000, dport=53), DNS(qd=DNSQR(qname="a.b"))), "dns", id="a question"),
    pytest.param(frame(IN_IP, UDP(sport=53, dport=4000), DNS()), "dns", id="an answer"),
    pytest.param(frame(IN_IP, TCP(sport=4000, dport=53)), "dns", id="DNS over TCP"),
    pytest.param(frame(Dot1Q(vlan=7), IN_IP, UDP(sport=53, dport=4000), Raw(b"x")), "dns", id="in a VLAN"),
    pytest.param(frame(IN_IP, UDP(sport=123, dport=123), Raw(bytes(48))), "ntp", id="time"),
    pytest.param(frame(IN_IP, TCP(sport=123, dport=80)), None, id="TCP 123 is no time"),
    pytest.param(frame(IN_IP, ICMP(), Raw(bytes(56))), "icmp", id="a ping"),
    pytest.param(frame(IN_IP, TCP(sport=50000, dport=3128)), "http_proxy", id="to the proxy"),
    pytest.param(frame(IN_IP, TCP(sport=3129, dport=50000)), "http_proxy", id="from the proxy"),
    pytest.param(frame(IN_IP, UDP(sport=50000, dport=3128), Raw(b"x")), None, id="UDP 3128 is no proxy"),
    pytest.param(frame(IN_IP, TCP(sport=50000, dport=80)), None, id="anything else"),
    pytest.param(frame(IP(proto=47), Raw(bytes(40))), None, id="another protocol"),
    pytest.param(frame(IP(frag=100, proto=17), Raw(b"\0\x35" * 4)), None, id="a later fragment has no ports"),
    pytest.param(frame(IP(frag=100, proto=1), Raw(bytes(8))), "icmp", id="a later fragment of a ping"),
    pytest.param(frame(ARP()), None, id="ARP"),
    pytest.param(frame(IPv6(), UDP(dport=53)), None, id="IPv6"),
    pytest.param(frame(IP(options=b"\1\1\1\1"), UDP(sport=53, dport=9), Raw(b"x")), "dns", id="IP options"),
    pytest.param(frame(IN_IP, UDP(sport=123, dport=9), Raw(b"x")) + bytes(20), "ntp", id="padding behind it"),
]
BAD = [
    pytest.param(b"", id="nothing"),
    pytest.param(bytes(13), id="no Ethernet header"),
    pytest.param(bytes(12) + b"\x81\0\0", id="half a VLAN tag"),
    pytest.param(frame(ARP())[:30], id="half an ARP"),
    pytest.param(frame(IN_IP)[:30], id="half an IP header"),
    pytest.param(frame(IP(version=5), UDP(dport=53)), id="IP of version 5"),
    pytest.param(frame(IP(ihl=4), UDP(dport=53)), id="a header of 16 octets"),
    pytest.param(frame(IP(ihl=15)), id="a header beyond the frame"),
    pytest.param(frame(IP(len=2000), UDP(dport=53)), id="longer than the frame"),
    pytest.param(frame(IP(len=19), UDP(dport=53)), id="shorter than its header"),
    pytest.param(frame(IP(proto=6), Raw(bytes(19))), id="half a TCP header"),
    pytest.param(frame(IP(proto=17), Raw(bytes(7))), id="half a UDP header"),
    pytest.param(frame(IP(proto=1), Raw(bytes(7))), id="half an ICMP header"),
]


@pytest.mark.parametrize(("octets", "name"), GOOD)
def test_which_ring_a_packet_is_in(octets: bytes, name: str | None) -> None:
    rings = Rings()
    rings.feed(octets, INBOUND, NOW)
    found = {each for each, ring in rings.rings.items() if packets(ring.file())}
    assert found == ({"all", name} if name else {"all"})


@pytest.mark.parametrize("octets", BAD)
def test_what_cannot_be_parsed_is_bad(octets: bytes) -> None:
    rings = Rings()
    rings.feed(octets, OUTBOUND, NOW)
    ((_, kept),) = packets(rings.rings["bad"].file())
    assert kept == octets
    assert {each for each, ring in rings.rings.items() if ring.end} == {"all", "bad"}


def test_any_octets_are_sorted_somehow() -> None:
    rng = random.Random(1)
    for param in GOOD:
        octets = bytearray(param.values[0])  # type: ignore[arg-type]
        for _ in range(300):
            at = rng.randrange(len(octets))
            changed = octets[: rng.randrange(len(octets) + 1)] if rng.random() < 0.3 else octets[:]
            if at < len(changed):
                changed[at] = rng.randrange(256)
            assert classify(memoryview(changed)) in (None, *RULES)


def test_sizes_and_snaplens_are_those_of_vpnkit() -> None:
    kib = 1024
    found = {name: (ring.limit // kib, ring.snaplen) for name, ring in Rings(snaplen=200).rings.items()}
    assert found == {
        "all": (256, 200),
        "dns": (256, 1500),
        "ntp": (64, 1500),
        "icmp": (8, 1500),
        "http_proxy": (1024, 1500),
        "bad": (1024, 1500),
    }
    assert Rings().all.snaplen == 128


def test_a_file_octet_by_octet() -> None:
    ring = Ring(1000, 4)
    ring.add(b"abcdef", 5 * SECOND + 1_999, 6)
    assert ring.file().hex(" ", 4) == (
        "d4c3b2a1 02000400 00000000 04000000 04000000 01000000 05000000 01000000 04000000 06000000 61626364"
    )


def test_a_ring_keeps_the_last_packets_and_no_views() -> None:
    ring = Ring(10 * (16 + 100), 1500)
    reused = bytearray(100)
    for number in range(25):
        reused[:] = bytes([number]) * 100
        ring.add(memoryview(reused), NOW + number * SECOND, 100)
        assert ring.octets <= ring.limit
    found = packets(ring.file())
    assert [octets for _, octets in found] == [bytes([number]) * 100 for number in range(15, 25)]
    assert [int(time) for time, _ in found] == [NOW // SECOND + number for number in range(15, 25)]
    assert (ring.first, ring.end) == (15, 25)


def test_a_long_frame_is_cut_and_says_how_long_it_was() -> None:
    rings = Rings()
    rings.feed(memoryview(bytes(65550)), INBOUND, NOW)
    (captured, original) = struct.unpack_from("<II", rings.all.file(), 24 + 8)
    assert (captured, original) == (128, 65550)


def test_a_reader_begins_with_the_ring_and_is_woken_once_for_news() -> None:
    ring = Ring(10_000, 100)
    ring.add(b"old", NOW, 3)
    woken: list[int] = []
    reader = ring.follow(lambda: woken.append(ring.end))
    assert [octets for _, octets in packets(file_header(100) + reader.take())] == [b"old"]
    ring.add(b"one", NOW, 3)
    assert woken == [], "it did not say that it has everything"
    assert reader.take() and not reader.take()
    ring.add(b"two", NOW, 3)
    ring.add(b"three", NOW, 5)
    assert woken == [3], "once, for the first"
    assert [octets for _, octets in packets(file_header(100) + reader.take())] == [b"two", b"three"]
    ring.leave(reader)
    ring.add(b"four", NOW, 4)
    assert woken == [3]


def test_a_slow_reader_loses_packets_and_is_told_how_many_and_a_quick_one_does_not() -> None:
    ring = Ring(10 * 116, 100)
    slow, quick = ring.follow(lambda: None), ring.follow(lambda: None)
    seen: list[bytes] = []
    for number in range(100):
        ring.add(bytes([number]) * 100, NOW, 100)
        seen += [octets for _, octets in packets(file_header(100) + quick.take())]
    assert len(seen) == 100 and quick.lost == 0
    rest = [octets[0] for _, octets in packets(file_header(100) + slow.take())]
    assert rest == list(range(90, 100)) and slow.lost == 90


def test_a_reader_takes_whole_records_of_about_what_it_asked_for() -> None:
    ring = Ring(100_000, 100)
    reader = ring.follow(lambda: None)
    for _ in range(100):
        ring.add(bytes(100), NOW, 100)
    pieces = []
    while piece := reader.take(500):
        assert 500 <= len(piece) < 500 + 116 or not pieces or len(piece) % 116 == 0
        pieces.append(piece)
    assert len(packets(file_header(100) + b"".join(pieces))) == 100
