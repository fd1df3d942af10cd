"""A hostile guest (threats-and-faults.md section 1.1), as far as one process without a kernel can show it.

Most rows are in the drills of their protocol, named there: G11, G15, G16 in test_link_and_arp, G13, G14, G28 in test_ipv4,
G17, G18 in tests/tcp/test_handshake, G19, G20, G29 in tests/tcp/test_established, G21 in test_udp.
"""

from __future__ import annotations

import random
import struct
import time
from collections.abc import Callable

import pytest

from netstack.api import Endpoint
from netstack.settings import Limits
from tests.support import packets
from tests.support.drill import GATEWAY_MAC, GUEST, GUEST_MAC, HOST_ALIAS, Drill, pattern, text
from tests.support.fake_host import Accept, Never
from tests.support.link import MemoryLink
from tests.support.packets import IPV4, RST, ip

FORBIDDEN = [
    "127.0.0.1",
    "127.0.0.2",
    "127.1.2.3",
    "127.255.255.254",
    "0.0.0.0",
    "0.0.0.1",
    "0.127.0.1",
    "169.254.0.1",
    "169.254.169.254",
    "169.254.169.253",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_g25_g26_p9_no_socket_is_opened_towards_a_forbidden_address(d: Drill, address: str) -> None:
    """TCP, UDP and ping alike, whatever the port; the guest is told, and an open flow still works."""
    for port in (22, 53, 80, 443, 2375):
        f = d.flow((address, port))
        d.syn(f)
        assert not [segment for segment in f.inbox if not segment.flags & RST]
        d.udp((address, port), b"x")
    d.ip(packets.ICMP, packets.echo(1, 1), dst=ip(address))
    d.advance(2.0)
    assert not d.io.connects
    assert not d.io.datagrams
    d.others.clear()
    for flow in d.flows.values():
        flow.inbox.clear()
    d.assert_clean()


@pytest.mark.parametrize("address", ["169.254.169.254", "127.0.0.1"])
def test_g26_a_forbidden_address_is_reachable_when_settings_allow_it(drill: Callable[..., Drill], address: str) -> None:
    d = drill(allow=(f"{address}/32",))
    d.open((address, 80))
    assert d.io.connects[-1].remote == (address, 80)


def test_g25_the_host_alias_leads_to_loopback_and_only_there(d: Drill) -> None:
    d.open((text(HOST_ALIAS), 8080))
    assert d.io.connects[-1].remote == ("127.0.0.1", 8080)


def test_g25_the_host_alias_can_be_turned_off(drill: Callable[..., Drill]) -> None:
    d = drill(host_alias=None)
    f = d.flow((text(HOST_ALIAS), 8080))
    d.syn(f)
    d.udp((HOST_ALIAS, 8080), b"x")
    d.advance(1.0)
    assert not d.io.connects and not d.io.datagrams


@pytest.mark.parametrize("address", ["192.168.65.1", "192.168.65.4", "192.168.65.77"])
def test_g27_addresses_of_the_virtual_network_never_lead_to_the_host(d: Drill, address: str) -> None:
    for port in (22, 80, 2375):
        f = d.flow((address, port))
        d.syn(f)
        d.udp((address, port), b"x")
    d.advance(2.0)
    assert not d.io.connects and not d.io.datagrams


def test_g27_a_refusal_of_the_gateway_is_a_rst(d: Drill) -> None:
    f = d.flow(("192.168.65.1", 81))
    d.syn(f)
    d.expect(f, "R.", seq=0, ack=f.isn + 1)


def test_g17_a_syn_flood_leaves_an_open_flow_undisturbed(drill: Callable[..., Drill]) -> None:
    """(a) blackhole, (b) refused, (c) open; a parallel flow transfers its data (A1) and nothing is left (A2)."""
    d = drill(limits=Limits(max_flows=600))
    d.io.on_connect(("203.0.113.1", 80), Never())
    good = d.open(("198.51.100.7", 80))
    f = d.flow()
    d.check = False
    sent = bytearray()
    for index in range(6000):
        remote = ip(f"203.0.113.{1 + index % 3}")
        syn = packets.tcp(GUEST, remote, 1024 + index, 80, index * 7919, 0, packets.SYN, 64000)
        d.link.feed(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packets.ipv4(GUEST, remote, 6, syn)))
        if index % 200 == 0:
            d.settle()
            part = pattern(1000, index)
            d.guest(good, ".", data=part)
            sent += part
        assert len(d.io.sockets) <= 601
    d.settle()
    d.advance(0.05)
    assert d.host(good).received == sent
    d.advance(1000.0)
    d.others.clear()
    assert len(list(d.stack.flows())) == 1
    assert len(d.io.sockets) == 1
    del f


def test_g20_tiny_mss_does_not_make_an_army_of_segments(d: Drill) -> None:
    """P5: a guest that announces MSS 1 does not turn 64 KiB into 65,536 frames."""
    f = d.open(mss=1)
    d.host(f).send(pattern(60_000))
    before = d.emitted
    d.settle()
    assert d.emitted - before <= 60_000 // 88 + 2


def test_g20_sack_lies_are_ignored(d: Drill) -> None:
    f = d.open(mss=1000)
    data = pattern(20_000)
    d.host(f).send(data)
    d.settle()
    d.collect(f)
    f.received.clear()
    f.rcv = (f.iss + 1) & packets.MASK
    rng = random.Random(3)
    for _ in range(300):
        blocks = [
            (f.iss + rng.randrange(-(1 << 31), 1 << 31), f.iss + rng.randrange(-(1 << 31), 1 << 31)) for _ in range(3)
        ]
        blocks[0] = (f.iss + rng.randrange(0, 40_000), f.iss + rng.randrange(0, 40_000))
        d.guest(f, ".", ack=f.iss + 1, options=packets.sack_option(blocks))
    f.inbox.clear()
    # The guest threw everything away: it must come again, whatever was said to be there.
    assert d.transfer(f, 20_000, limit_s=400.0) == data


def test_g20_ack_division_gains_nothing(d: Drill) -> None:
    """Many ACKs of one octet each: frames sent stay in proportion to octets."""
    f = d.open(mss=1000, window=20_000)
    d.host(f).send(pattern(100_000))
    d.settle()
    d.collect(f)
    before = d.emitted
    for octet in range(1, 5000):
        d.guest(f, ".", ack=f.iss + 1 + octet, window=20_000)
    assert d.emitted - before <= 10


def test_g19_slow_readers_do_not_make_us_hold_their_octets(drill: Callable[..., Drill]) -> None:
    """50 flows whose guest never acknowledges: the octets stay in the host sockets."""
    d = drill()
    flows = [d.open(window=100) for _ in range(50)]
    for f in flows:
        d.host(f).send(bytes(1 << 20))
    d.settle()
    for f in flows:
        assert f.sock is not None
        assert f.sock.buffered == 1 << 20, "nothing was taken out of the host socket"


def test_g19_without_peeking_what_is_held_is_bounded(drill: Callable[..., Drill]) -> None:
    d = drill(peek_off=False, limits=Limits(flow_buffer=1 << 16))
    f = d.open(window=100)
    d.host(f).send(bytes(1 << 20))
    d.settle()
    d.advance(20.0)
    assert f.sock is not None
    assert f.sock.buffered >= (1 << 20) - (1 << 16)


def test_g22_g13_random_frames_are_survived_and_cost_little(d: Drill) -> None:
    """5,000 frames of noise, then an ordinary flow."""
    rng = random.Random(22)
    begin = time.process_time()
    for _ in range(5000):
        d.queue(
            packets.ether(GATEWAY_MAC, GUEST_MAC, rng.choice((IPV4, packets.ARP)), rng.randbytes(rng.randrange(100)))
        )
    d.settle()
    assert time.process_time() - begin < 5.0
    d.others.clear()
    f = d.open()
    d.guest(f, ".", data=b"fine")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"fine"


def test_g21_more_flows_than_the_limit_are_refused_with_rst(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_flows=20))
    flows = [d.open() for _ in range(20)]
    late = d.flow()
    d.syn(late)
    d.expect(late, "R.", seq=0, ack=late.isn + 1)
    assert len(d.io.sockets) == 20
    d.reset(flows[0])
    again = d.open()
    d.guest(again, ".", data=b"x")
    d.collect(again, within=0.05)
    assert d.host(again).received == b"x"


def test_g21_a_forward_over_the_limit_resets_its_client(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_flows=1))
    d.open()
    ends: list[str] = []
    sock, far = d.io.connected()
    d.stack.dial(Endpoint(GUEST, 80), sock, on_close=ends.append)
    d.settle()
    assert far.aborted and len(ends) == 1


VNET_LIES = [
    pytest.param((1, 0, 0, 0, 0, 0), id="checksum at 0"),
    pytest.param((1, 0, 0, 0, 65535, 65535), id="checksum far out"),
    pytest.param((1, 0, 0, 0, 34, 65535), id="offset far out"),
    pytest.param((0, 1, 54, 0, 0, 0), id="gso size 0"),
    pytest.param((1, 1, 54, 1, 34, 16), id="gso size 1"),
    pytest.param((1, 1, 65535, 65535, 34, 16), id="everything 65535"),
    pytest.param((1, 4, 54, 1460, 34, 16), id="TSO6 on IPv4"),
    pytest.param((1, 3, 54, 1460, 34, 6), id="UFO"),
    pytest.param((1, 77, 54, 1460, 34, 16), id="unknown gso type"),
    pytest.param((255, 255, 65535, 65535, 65535, 65535), id="all ones"),
]


@pytest.mark.parametrize("fields", VNET_LIES)
def test_g6_lies_in_the_virtio_net_header_harm_nobody(drill: Callable[..., Drill], fields: tuple[int, ...]) -> None:
    d = drill(offload=True)
    d.check = False
    f = d.open()
    other = d.open()
    header = struct.pack("<BBHHHHH", *fields, 0)
    d.inject(d.segment(f, "P.", data=pattern(5000), partial=True), header)
    d.inject(
        packets.ether(
            GATEWAY_MAC,
            GUEST_MAC,
            IPV4,
            packets.ipv4(GUEST, ip("8.8.8.8"), 17, packets.udp(GUEST, ip("8.8.8.8"), 1, 2, b"x")),
        ),
        header,
    )
    d.inject(
        packets.ether(
            b"\xff" * 6, GUEST_MAC, packets.ARP, packets.arp(1, GUEST_MAC, GUEST, bytes(6), ip("192.168.65.1"))
        ),
        header,
    )
    d.inject(b"short", header)
    d.inject(b"", header)
    d.inject(b"", header[:5])
    d.guest(other, ".", data=b"fine")
    d.collect(other, within=0.05)
    assert d.host(other).received == b"fine"
    assert pattern(5000).startswith(bytes(d.host(f).received))
    d.assert_sane()


def test_p4_every_limit_holds_under_a_mixed_load(drill: Callable[..., Drill]) -> None:
    """R3: the bounds of `Limits`, checked after every step of a random guest."""
    limits = Limits(
        max_flows=30, max_udp_flows=30, max_pings=20, max_neighbours=40, max_fragments=10, max_fragment_octets=50_000
    )
    d = drill(limits=limits)
    d.check = False
    d.io.default = Accept(after=0.01)
    rng = random.Random(4)
    for _ in range(3000):
        remote = ip(f"198.51.100.{rng.randrange(1, 250)}")
        kind = rng.randrange(5)
        if kind == 0:
            body, protocol = (
                packets.tcp(GUEST, remote, rng.randrange(1, 65536), 80, rng.getrandbits(32), 0, packets.SYN),
                6,
            )
        elif kind == 1:
            body, protocol = packets.udp(GUEST, remote, rng.randrange(1, 65536), rng.randrange(1, 65536), b"x"), 17
        elif kind == 2:
            body, protocol = packets.echo(rng.getrandbits(16), 1), 1
        else:
            body, protocol = rng.randbytes(800), 17
        source = bytes((192, 168, 65, rng.randrange(3, 250))) if kind == 3 else GUEST
        packet = packets.ipv4(source, remote, protocol, body, mf=kind == 4, ident=rng.getrandbits(16))
        d.inject(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet))
        assert len(d.stack.tcp.flows) <= 30
        assert len(d.stack.udp.flows()) <= 30 * 250
        assert len(d.stack.neighbours.all()) <= 40
        assert len(d.stack.reassembler) <= 10 and d.stack.reassembler.octets <= 55_000
        assert len(d.io.sockets) <= 30 + 20 + 30 * 3
        d.others.clear()
    d.advance(2000.0)
    d.others.clear()
    d.assert_clean()


class Neighbour:
    """A further guest on a link of its own: speaks, and asks the gateway for an echo."""

    def __init__(self, d: Drill, number: int, address: str) -> None:
        self.d = d
        self.mac = b"\x02\0\0\0\xcc" + bytes((number,))
        self.ip = ip(address)
        self.attach()
        d.oracle.macs.add(self.mac)

    def attach(self) -> None:
        self.link = MemoryLink(f"memory:{self.mac[-1]}", mtu=self.d.mtu)
        self.d.io.adopt(self.link)
        self.port = self.d.stack.attach(self.link)

    def claim(self, address: bytes) -> None:
        arp = packets.arp(1, self.mac, address, bytes(6), address)
        self.link.feed(packets.ether(b"\xff" * 6, self.mac, packets.ARP, arp))

    def lease(self) -> None:
        leases = self.d.stack.leases
        assert leases.commit(self.mac, self.ip, port=self.port, lease_s=3600, now=self.d.stack.clock()) is not None

    def is_served(self) -> bool:
        self.link.sent.clear()
        echo = packets.ipv4(self.ip, ip("192.168.65.1"), packets.ICMP, packets.echo(1, 1))
        self.link.feed(packets.ether(GATEWAY_MAC, self.mac, IPV4, echo))
        self.d.settle()
        return any(frame[12:14] == b"\x08\0" and frame[23] == packets.ICMP for frame in self.link.sent)


SUBNET = [bytes((192, 168, 65, last)) for last in range(3, 255)]


def claims(guest: Neighbour) -> int:
    return sum(neighbour.port is guest.port for neighbour in guest.d.stack.neighbours.all())


def test_g16_a_guest_that_claims_every_address_keeps_64_of_them(d: Drill) -> None:
    greedy = Neighbour(d, 1, "192.168.65.200")
    for address in SUBNET:
        greedy.claim(address)
    d.settle()
    assert claims(greedy) == 64
    assert Neighbour(d, 2, "192.168.65.10").is_served()
    assert greedy.is_served()
    f = d.open()
    d.guest(f, ".", data=b"still served")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"still served"


def test_g16_the_holder_of_a_lease_gets_its_address_from_who_claimed_it_before(d: Drill) -> None:
    greedy, guest = Neighbour(d, 1, "192.168.65.200"), Neighbour(d, 2, "192.168.65.4")
    greedy.claim(guest.ip)
    d.settle()
    assert not guest.is_served(), "nobody leased it, and the other was first"
    guest.lease()
    assert guest.is_served()
    before = d.stack.counters.drops["frame_source"]
    greedy.claim(guest.ip)
    d.settle()
    assert d.stack.counters.drops["frame_source"] == before + 1
    assert guest.is_served()


def test_g16_a_leased_address_is_not_to_be_claimed_before_its_holder_speaks(d: Drill) -> None:
    greedy, guest = Neighbour(d, 1, "192.168.65.200"), Neighbour(d, 2, "192.168.65.4")
    guest.lease()
    greedy.claim(guest.ip)
    d.settle()
    assert d.stack.neighbours.get(guest.ip) is None
    assert d.stack.counters.drops["frame_source"] == 1
    assert guest.is_served()


def test_g16_after_a_restart_a_lease_is_known_by_its_mac(d: Drill) -> None:
    greedy, guest = Neighbour(d, 1, "192.168.65.200"), Neighbour(d, 2, "192.168.65.4")
    guest.lease()
    lease = d.stack.leases.at(guest.ip, d.stack.clock())
    assert lease is not None
    lease.port = None
    greedy.claim(guest.ip)
    d.settle()
    assert guest.is_served()
    greedy.claim(guest.ip)
    d.settle()
    assert guest.is_served()


def test_g16_addresses_with_flows_are_not_what_goes(d: Drill) -> None:
    """The guest's own flood: its open flow keeps its neighbour, and with all 64 in use a newcomer gets nothing."""
    f = d.open()
    known = d.stack.neighbours.get(GUEST)
    for address in SUBNET[1:]:
        d.inject(
            packets.ether(b"\xff" * 6, GUEST_MAC, packets.ARP, packets.arp(1, GUEST_MAC, address, bytes(6), address))
        )
    assert d.stack.neighbours.get(GUEST) is known
    assert len(d.stack.neighbours.all()) == 64
    d.guest(f, ".", data=b"x")
    d.expect(f, ".", ack=f.snd, within=0.05)
    used = d.stack.neighbours.all()  # held as a flow holds its own
    late = next(address for address in SUBNET if d.stack.neighbours.get(address) is None)
    before = d.stack.counters.drops["neighbour_limit"]
    d.inject(packets.ether(b"\xff" * 6, GUEST_MAC, packets.ARP, packets.arp(1, GUEST_MAC, late, bytes(6), late)))
    assert d.stack.neighbours.get(late) is None
    assert d.stack.counters.drops["neighbour_limit"] == before + 1
    assert {id(one) for one in d.stack.neighbours.all()} == {id(one) for one in used}


def test_g16_a_guest_that_comes_back_claims_no_more_than_before(d: Drill) -> None:
    greedy = Neighbour(d, 1, "192.168.65.200")
    for part in (SUBNET[:60], SUBNET[60:120], SUBNET[:120]):
        for address in part:
            greedy.claim(address)
        d.settle()
        assert claims(greedy) <= 64
        d.stack.detach(greedy.port, "gone")
        greedy.attach()


def test_g16_guests_that_fill_the_tables_together_lock_nobody_off(drill: Callable[..., Drill]) -> None:
    d = drill(routed=("172.17.0.0/16",))
    for number in range(1, 6):
        greedy = Neighbour(d, number, "192.168.65.200")
        for index in range(64):
            mac = b"\x02\xee" + bytes((number, 0, 0, index))
            d.oracle.macs.add(mac)
            address = SUBNET[(number - 1) * 64 + index] if number < 4 else bytes((172, 17, number, index))
            greedy.link.feed(
                packets.ether(b"\xff" * 6, mac, packets.ARP, packets.arp(1, mac, address, bytes(6), address))
            )
        d.settle()
    assert len(d.stack.switch.table()) <= 256
    guest = Neighbour(d, 9, "192.168.65.250")
    assert guest.is_served()


@pytest.mark.parametrize("holes", [False, True], ids=["host does not read", "beyond holes"])
def test_p4_what_all_flows_hold_together_is_bounded(drill: Callable[..., Drill], holes: bool) -> None:
    budget = 200_000
    d = drill(limits=Limits(max_memory=budget))
    flows = [d.open() for _ in range(20)]
    for f in flows:
        d.host(f).stop_reading()
        assert f.sock is not None
        f.sock.sent_buffer = 1000
    for _ in range(12):
        for f in flows:
            if f.sock is not None and not f.sock.closed:
                seq = f.snd + (1 if holes else 0)
                d.guest(f, ".", seq=seq, data=bytes(1400), queue=True)
                f.snd += 1400
        d.settle()
        assert d.stack.tcp.budget.held <= budget
    d.advance(0.1)
    assert d.stack.counters.drops["memory"] >= 1
    alive = [f for f in flows if f.sock is not None and not f.sock.closed]
    assert alive, "those that fitted live on"
    for f in flows:
        d.collect(f)
    d.stack.tcp.reset_guest(GUEST, "enough")
    assert d.stack.tcp.budget.held == 0


def test_p4_windows_stop_opening_when_half_of_the_memory_is_used(drill: Callable[..., Drill]) -> None:
    d = drill(limits=Limits(max_memory=100_000))
    f, other = d.open(), d.open()
    d.host(f).stop_reading()
    assert f.sock is not None
    f.sock.sent_buffer = 0
    for _ in range(40):
        d.guest(f, ".", data=bytes(1400))
    d.collect(f)
    assert 50_000 < d.stack.tcp.budget.held <= 100_000
    for _ in range(50):
        d.guest(other, ".", data=bytes(1460))
        last = d.collect(other, within=0.05)[-1]
    assert d.window_of(other, last) <= 16384
    d.reset(f)
    for _ in range(3):
        d.guest(other, ".", data=bytes(1460))
        last = d.collect(other, within=0.05)[-1]
    assert d.window_of(other, last) > 500_000


def test_g19_without_peeking_a_full_buffer_goes_on_when_the_guest_acknowledges(drill: Callable[..., Drill]) -> None:
    d = drill(peek_off=False, limits=Limits(flow_buffer=4096))
    f = d.open()
    d.host(f).send(bytes(range(256)) * 400)
    assert d.transfer(f, 102_400) == bytes(range(256)) * 400
