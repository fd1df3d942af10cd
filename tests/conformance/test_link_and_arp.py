"""Links and ARP (conformance.md section 1, rows L; threats G11, G15, G16)."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from netstack.api import Endpoint
from tests.support import packets
from tests.support.drill import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, HOST_ALIAS, Drill, pattern
from tests.support.link import MemoryLink
from tests.support.packets import ARP, IPV4, ip

BROADCAST = b"\xff" * 6
OTHER_MAC = bytes.fromhex("02000000bb04")


def who_has(d: Drill, target: bytes, *, spa: bytes = GUEST, to: bytes = BROADCAST, mac: bytes = GUEST_MAC) -> None:
    d.inject(packets.ether(to, mac, ARP, packets.arp(1, mac, spa, bytes(6), target)))


@pytest.mark.parametrize("target", [GATEWAY, HOST_ALIAS], ids=["gateway", "host alias"])
@pytest.mark.parametrize("to", [BROADCAST, GATEWAY_MAC], ids=["broadcast", "unicast"])
def test_l01_arp_for_our_addresses_is_answered_to_the_asker(d: Drill, target: bytes, to: bytes) -> None:
    who_has(d, target, to=to)
    reply = d.take(-1).payload
    op, sha, spa, tha, tpa = struct.unpack_from("!H6s4s6s4s", reply, 6)
    assert (op, sha, spa, tha, tpa) == (2, GATEWAY_MAC, target, GUEST_MAC, GUEST)
    assert d.frames[-1][1][:6] == GUEST_MAC


def test_l01_the_host_alias_is_silent_when_it_is_off(drill: Callable[..., Drill]) -> None:
    d = drill(host_alias=None)
    who_has(d, HOST_ALIAS)
    d.expect_none(1.0)


@pytest.mark.parametrize("target", ["192.168.65.3", "192.168.65.77", "192.168.65.255", "8.8.8.8"])
def test_l02_arp_for_what_is_not_ours_is_met_with_silence(d: Drill, target: str) -> None:
    who_has(d, ip(target))
    d.expect_none(1.0)


@pytest.mark.parametrize("target", ["192.168.65.3", "192.168.65.200"])
def test_l02_an_address_conflict_probe_finds_no_conflict(d: Drill, target: str) -> None:
    who_has(d, ip(target), spa=bytes(4))
    d.expect_none(1.0)


def test_l02_a_probe_for_our_own_address_is_answered(d: Drill) -> None:
    """A guest configured with the gateway's address must notice (RFC 5227)."""
    who_has(d, GATEWAY, spa=bytes(4))
    assert d.take(-1).payload[6:8] == b"\0\2"


GOOD = packets.arp(1, GUEST_MAC, GUEST, bytes(6), GATEWAY)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(GOOD[:2] + b"\x86\xdd" + GOOD[4:], id="ptype"),
        pytest.param(b"\0\6" + GOOD[2:], id="htype"),
        pytest.param(GOOD[:4] + b"\x08" + GOOD[5:], id="hlen"),
        pytest.param(GOOD[:5] + b"\x10" + GOOD[6:], id="plen"),
        pytest.param(GOOD[:6] + b"\0\7" + GOOD[8:], id="op"),
        *[pytest.param(GOOD[:length], id=f"cut at {length}") for length in (0, 1, 7, 8, 14, 24, 27)],
    ],
)
def test_l03_malformed_arp_is_dropped_and_counted(d: Drill, body: bytes) -> None:
    d.inject(packets.ether(BROADCAST, GUEST_MAC, ARP, body, pad=False))
    d.expect_none(0.5)
    assert d.stack.counters.drops["arp_malformed"] == 1


def test_l04_short_frames_are_padded_with_zeros(d: Drill) -> None:
    """The oracle checks every frame; here are the shortest of each kind."""
    who_has(d, GATEWAY)
    d.ip(packets.ICMP, packets.echo(1, 1))
    f = d.open()
    for size in range(1, 7):
        d.host(f).send(bytes([size]) * size)
        d.expect(f, data=bytes([size]) * size)
        d.guest(f, ".")
    d.udp(("8.8.8.8", 99), b"q")
    d.io.datagrams[-1].answer(b"")
    d.settle()
    sizes = [len(frame) for _time, frame in d.frames if frame[6:12] == GATEWAY_MAC]
    assert min(sizes) == 60 and len(sizes) >= 9


def test_l04_trailing_padding_of_the_guest_is_ignored(d: Drill) -> None:
    f = d.open()
    frame = d.segment(f, "P.", data=b"abc")
    assert len(frame) == 60
    d.inject(frame + b"\xee" * 30)
    assert d.host(f).received == b"abc"
    d.inject(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packets.ipv4(
        GUEST, ip("8.8.8.8"), packets.UDP, packets.udp(GUEST, ip("8.8.8.8"), 1, 2, b"xy"))) + b"\xee" * 9)  # fmt: skip
    assert d.io.datagrams[-1].data == b"xy"


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(packets.ether(BROADCAST, GUEST_MAC, 0x8100, b"\0\5" + b"\x08\6" + GOOD), id="802.1Q"),
        pytest.param(packets.ether(bytes.fromhex("0180c200000e"), GUEST_MAC, 0x88CC, bytes(46)), id="LLDP"),
        pytest.param(packets.ether(bytes.fromhex("0180c2000000"), GUEST_MAC, 38, b"\x42\x42\3" + bytes(43)), id="STP"),
        pytest.param(packets.ether(BROADCAST, GUEST_MAC, 0x1234, bytes(46)), id="unknown"),
        pytest.param(packets.ether(GATEWAY_MAC, GUEST_MAC, 0x86DD, b"\x60" + bytes(45)), id="IPv6"),
    ],
)
def test_l05_other_ethertypes_are_dropped_in_silence(d: Drill, frame: bytes) -> None:
    d.inject(frame)
    d.expect_none(1.0)
    assert sum(d.stack.counters.drops.values()) == 1


def test_l06_an_unknown_guest_is_asked_for_three_times_then_the_client_is_reset(drill: Callable[..., Drill]) -> None:
    d = drill(resolve=False)
    ends: list[str] = []
    sock, far = d.io.connected()
    d.stack.dial(Endpoint(ip("192.168.65.9"), 80), sock, on_close=ends.append)
    d.settle()
    begin = d.clock.now
    times = []
    for _ in range(3):
        asked = d.take(-1, within=1.1)
        assert asked.destination == ip("192.168.65.9")
        times.append(asked.time - begin)
    assert times == pytest.approx([0.0, 1.0, 2.0], abs=0.05)
    d.expect_none(2.0)
    assert far.aborted and len(ends) == 1
    d.assert_clean()


def test_l06_datagrams_wait_for_the_answer_and_then_arrive(drill: Callable[..., Drill]) -> None:
    d = drill(resolve=False)
    published = d.io.bound()
    d.stack.datagrams(Endpoint(GUEST, 9000), published)
    d.oracle.macs.add(GUEST_MAC)
    for index in range(100):
        published.deliver(b"%d" % index, ("127.0.0.1", 3333))
    d.settle()
    assert d.take(-1).destination == GUEST
    d.expect_none(0.1)
    reply = packets.arp(2, GUEST_MAC, GUEST, GATEWAY_MAC, GATEWAY)
    d.inject(packets.ether(GATEWAY_MAC, GUEST_MAC, ARP, reply))
    arrived = []
    while d.others:
        arrived.append(d.take_udp()[2])
    assert 1 <= len(arrived) <= 64, "the queue is bounded"
    assert arrived == [b"%d" % index for index in range(len(arrived))]


# Hostile frames.


@pytest.mark.parametrize("size", range(14))
def test_g11_frames_shorter_than_a_header_are_dropped(d: Drill, size: int) -> None:
    d.inject(packets.ether(BROADCAST, GUEST_MAC, ARP, b"")[:size])
    d.expect_none(0.1)
    assert d.stack.counters.drops["frame_short"] == 1


def test_g11_a_frame_longer_than_the_mtu_is_dropped_or_harmless(d: Drill) -> None:
    packet = packets.ipv4(GUEST, ip("8.8.8.8"), packets.UDP, packets.udp(GUEST, ip("8.8.8.8"), 1, 2, bytes(3000)))
    d.inject(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet))
    assert len(d.io.datagrams) <= 1
    f = d.open()
    d.reset(f)


def test_g11_a_multicast_source_mac_is_dropped(d: Drill) -> None:
    d.inject(
        packets.ether(
            GATEWAY_MAC, bytes.fromhex("010000000001"), IPV4, packets.ipv4(GUEST, GATEWAY, 1, packets.echo(1, 1))
        )
    )
    d.expect_none(0.5)
    assert d.stack.counters.drops["frame_source"] == 1


def test_g11_nothing_is_echoed_to_the_sender(d: Drill) -> None:
    """A frame for an unknown MAC, or for the sender itself, does not come back."""
    for to in (bytes.fromhex("02000000dead"), GUEST_MAC, BROADCAST):
        d.inject(
            packets.ether(
                to,
                GUEST_MAC,
                IPV4,
                packets.ipv4(GUEST, ip("192.168.65.9"), 17, packets.udp(GUEST, ip("192.168.65.9"), 1, 2, b"x")),
            )
        )
        assert not [
            frame
            for _time, frame in d.frames
            if frame[6:12] != GUEST_MAC and frame[12:14] == b"\x08\0" and frame[23] != 1
        ]


def test_g16_arp_cannot_move_the_gateway(d: Drill) -> None:
    """Poisoning: a guest claims the gateway's and the host's address."""
    for address in (GATEWAY, HOST_ALIAS):
        d.inject(packets.ether(BROADCAST, GUEST_MAC, ARP, packets.arp(2, GUEST_MAC, address, BROADCAST, address)))
        d.inject(packets.ether(BROADCAST, GUEST_MAC, ARP, packets.arp(1, GUEST_MAC, address, bytes(6), address)))
    d.expect_none(0.1)
    who_has(d, GATEWAY)
    assert d.take(-1).payload[8:14] == GATEWAY_MAC
    f = d.open()
    d.guest(f, ".", data=b"x")
    d.expect(f, ".", ack=f.snd, within=0.05)


def test_g16_a_frame_that_claims_our_mac_is_dropped(d: Drill) -> None:
    d.check = False
    d.inject(packets.ether(GATEWAY_MAC, GATEWAY_MAC, IPV4, packets.ipv4(GUEST, GATEWAY, 1, packets.echo(1, 1))))
    d.expect_none(0.1)
    assert d.stack.counters.drops["frame_source"] == 1


def test_g16_gratuitous_arp_floods_fill_nothing(d: Drill) -> None:
    for index in range(2000):
        mac = b"\x02\1" + index.to_bytes(4, "big")
        address = bytes((192, 168, 65, 4 + index % 250))
        d.inject(packets.ether(BROADCAST, mac, ARP, packets.arp(1, mac, address, bytes(6), address)))
    assert len(d.stack.neighbours.all()) <= 256
    assert len(d.stack.switch.table()) <= 256
    f = d.open()
    d.guest(f, ".", data=b"still served")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"still served"


def second_guest(d: Drill) -> MemoryLink:
    link = MemoryLink("memory:1", mtu=d.mtu)
    d.io.adopt(link)
    d.stack.attach(link)
    return link


def test_g15_g16_another_guest_cannot_take_a_guests_address(d: Drill) -> None:
    f = d.open()
    link = second_guest(d)
    d.oracle.macs.add(OTHER_MAC)
    spoofed = packets.arp(1, OTHER_MAC, GUEST, bytes(6), GUEST)
    link.feed(packets.ether(BROADCAST, OTHER_MAC, ARP, spoofed))
    d.settle()
    data = d.segment(f, "P.", data=b"not mine")
    link.feed(data[:6] + OTHER_MAC + data[12:])
    link.feed(data)
    d.settle()
    assert d.host(f).received == b""
    d.host(f).send(b"for the first guest")
    d.expect(f, data=b"for the first guest")
    assert not [frame for frame in link.sent if frame[12:14] == b"\x08\0"]


def test_f24_two_guests_talk_through_the_switch(d: Drill) -> None:
    link = second_guest(d)
    link.feed(packets.ether(BROADCAST, OTHER_MAC, ARP, packets.arp(1, OTHER_MAC, ip("192.168.65.4"), bytes(6), GUEST)))
    d.oracle.macs.add(OTHER_MAC)
    d.settle()
    assert d.take(-1).destination == GUEST
    reply = packets.ether(OTHER_MAC, GUEST_MAC, ARP, packets.arp(2, GUEST_MAC, GUEST, OTHER_MAC, ip("192.168.65.4")))
    d.inject(reply)
    assert link.sent.pop() == reply
    big = packets.ether(OTHER_MAC, GUEST_MAC, IPV4, packets.ipv4(GUEST, ip("192.168.65.4"), 17, bytes(1480)))
    d.inject(big)
    assert link.sent.pop() == big


def test_f24_a_link_that_goes_away_leaves_the_others_alone(d: Drill) -> None:
    link = second_guest(d)
    f = d.open()
    link.down = "the peer closed"
    d.settle()
    assert link.closed
    d.guest(f, ".", data=b"x")
    d.expect(f, ".", ack=f.snd, within=0.05)
    assert len(d.stack.switch.ports) == 1


def test_a_peer_that_stops_reading_stalls_its_flows_and_loses_nothing(d: Drill) -> None:
    """Back-pressure of the link: octets stay in the host socket."""
    f = d.open(window=1 << 20)
    d.link.room = 5
    data = pattern(300_000)
    d.host(f).send(data)
    d.settle()
    for _ in range(2000):
        d.link.room = 3
        d.io.wake(d.link.fileno())
        d.settle()
        d.collect(f)
        d.link.room = 2
        d.guest(f, ".")
        d.collect(f)
        if len(f.received) == len(data):
            break
        d.advance(0.003)
    assert f.received == data


def test_g15_guest_sources_that_cannot_be_are_dropped(d: Drill) -> None:
    """Also row I11; per source one drop, nothing proxied, no reply."""
    for source in ("192.168.65.1", "192.168.65.2", "127.0.0.1", "224.0.0.1", "255.255.255.255", "192.168.65.255",
                   "192.168.65.0", "10.0.0.1", "0.0.0.0", "8.8.8.8"):  # fmt: skip
        before = sum(d.stack.counters.drops.values())
        d.ip(17, packets.udp(ip(source), ip("8.8.4.4"), 1000, 2000, b"spoof"), src=ip(source), dst=ip("8.8.4.4"))
        d.ip(1, packets.echo(1, 1), src=ip(source))
        d.ip(6, packets.tcp(ip(source), ip("8.8.4.4"), 1, 2, 1, 0, 2), src=ip(source), dst=ip("8.8.4.4"))
        assert sum(d.stack.counters.drops.values()) >= before + 3, source
    d.expect_none(0.5)
    assert not d.io.datagrams and not d.io.connects


def test_g15_a_packet_from_its_own_destination_is_dropped(d: Drill) -> None:
    """LAND: whoever answers it talks to himself."""
    for flags in (packets.SYN, packets.ACK):
        d.ip(6, packets.tcp(GUEST, GUEST, 80, 80, 1, 1, flags), dst=GUEST)
    d.ip(17, packets.udp(GUEST, GUEST, 7, 7, b"x"), dst=GUEST)
    d.expect_none(0.5)
