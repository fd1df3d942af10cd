"""UDP of a guest over real loopback sockets: what it and the programs it talks to observe (conformance U.., C05, DESIGN 9)."""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from netstack.api import Endpoint, Reply
from netstack.host.udp_proxy import ASSOCIATIONS_PER_MAPPING
from netstack.observe.events import FlowClosed, FlowOpened, FlowRefused
from netstack.observe.metrics import Drop
from netstack.settings import Limits, Network
from tests.udp.support import ALIAS, GATEWAY, GUEST, OTHER, World, raw_packet, udp_packet

LOOPBACK_NET = Network(allow=("127.0.0.0/8",))
"""Lets several host programs have addresses of their own: 127.0.0.2, 127.0.0.3, ..."""


def local(last: int) -> bytes:
    return bytes((127, 0, 0, last))


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def wide() -> Iterator[World]:
    made = World(LOOPBACK_NET)
    yield made
    made.close()


def test_a_datagram_reaches_the_hosts_loopback_through_the_alias_and_the_answer_comes_from_there(world: World) -> None:
    server = world.host_socket()
    port = server.getsockname()[1]
    world.send(4000, ALIAS, port, b"question")
    question, peer = server.recvfrom(100)
    assert question == b"question" and peer[0] == "127.0.0.1"
    server.sendto(b"answer", peer)
    world.turn()
    (answer,) = world.received()
    assert (answer.source, answer.source_port) == (ALIAS, port)
    assert (answer.destination, answer.destination_port) == (GUEST, 4000)
    assert answer.payload == b"answer"


@pytest.mark.parametrize("headroom", [0, 4, 12])
@pytest.mark.parametrize("octets", [0, 1, 17, 18, 1471, 1472, 1473, 9000, 65507])
def test_datagrams_of_every_size_cross_whole_both_ways(octets: int, headroom: int) -> None:  # U01, I08
    world = World(headroom=headroom)
    server = world.host_socket()
    payload = hashlib.shake_128(b"seed").digest(octets)
    for _ in range(2):  # the general way, then the fast one
        world.send(4000, ALIAS, server.getsockname()[1], payload, dont_fragment=octets <= 1472)
        got, peer = server.recvfrom(70000)
        assert got == payload
        server.sendto(payload, peer)
        world.turn()
        (answer,) = world.received()
        assert answer.payload == payload
    world.close()


def test_what_exceeds_the_mtu_leaves_on_the_way_that_fragments() -> None:  # I08
    world = World(Network(mtu=576), mtu=576)
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    for octets in (548, 549):
        server.sendto(bytes(octets), peer)
    world.turn()
    assert (len(world.link.sent), len(world.output.sent)) == (1, 1)
    assert sorted(len(item.payload) for item in world.received()) == [548, 549]
    world.close()


def test_bursts_arrive_complete_and_in_order_and_leave_in_batches(world: World) -> None:
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    for number in range(200):
        server.sendto(struct.pack("!I", number) * (number % 300), peer)
    world.turn()
    got = world.received()
    assert [item.payload for item in got] == [struct.pack("!I", number) * (number % 300) for number in range(200)]
    assert len({item.identification for item in got}) == 200
    assert max(world.link.batches) > 8


def test_a_socket_with_endless_input_does_not_keep_the_others_waiting(world: World) -> None:  # N4, R6
    server = world.host_socket()
    for sport in (4000, 4001):
        world.send(sport, ALIAS, server.getsockname()[1], b"")
    busy, calm = server.recvfrom(10)[1], server.recvfrom(10)[1]
    for _ in range(150):
        server.sendto(b"flood", busy)
    server.sendto(b"calm", calm)
    passes = 0
    while not any(item.payload == b"calm" for item in world.received()):
        passes += 1
        for function, mask in world.io.poll():
            before = len(world.link.sent)
            function(mask)
            assert len(world.link.sent) - before <= 32
        assert passes < 3
    world.turn(wait=False)
    assert len(world.received()) > 100


def test_one_guest_port_looks_the_same_to_every_remote(wide: World) -> None:  # U04
    servers = [wide.host_socket(f"127.0.0.{last}") for last in (2, 3, 4)]
    for last, server in zip((2, 3, 4), servers, strict=True):
        wide.send(4000, local(last), server.getsockname()[1], b"hello")
    ports = {server.recvfrom(10)[1][1] for server in servers}
    assert len(ports) == 1
    wide.send(4001, local(2), servers[0].getsockname()[1], b"hello")
    assert servers[0].recvfrom(10)[1][1] not in ports


def test_answers_carry_the_real_address_and_port_of_each_remote(wide: World) -> None:  # U04
    servers = [wide.host_socket(f"127.0.0.{last}") for last in (2, 3)]
    for last, server in zip((2, 3), servers, strict=True):
        wide.send(4000, local(last), server.getsockname()[1], b"")
        server.sendto(b"%d" % last, server.recvfrom(10)[1])
    wide.turn()
    got = {(item.source, item.source_port): item.payload for item in wide.received()}
    ends = [(local(last), server.getsockname()[1]) for last, server in zip((2, 3), servers, strict=True)]
    assert got == dict(zip(ends, (b"2", b"3"), strict=True))


def test_a_third_party_gets_through_a_punched_hole(world: World) -> None:  # U04, vpnkit 3.8
    rendezvous, stranger = world.host_socket(), world.host_socket()
    world.send(4000, ALIAS, rendezvous.getsockname()[1], b"")
    peer = rendezvous.recvfrom(10)[1]
    stranger.sendto(b"hello from afar", peer)
    world.turn()
    (got,) = world.received()
    assert got.payload == b"hello from afar"
    assert (got.source, got.source_port) == (ALIAS, stranger.getsockname()[1])
    world.send(4000, got.source, got.source_port, b"welcome")
    assert stranger.recvfrom(100) == (b"welcome", peer)


def test_with_endpoint_filtering_only_those_spoken_to_get_through() -> None:  # N3
    world = World(Network(udp_filtering="endpoint"))
    known, stranger = world.host_socket(), world.host_socket()
    world.send(4000, ALIAS, known.getsockname()[1], b"")
    peer = known.recvfrom(10)[1]
    stranger.sendto(b"forged", peer)
    known.sendto(b"true", peer)
    world.turn()
    assert [item.payload for item in world.received()] == [b"true"]
    assert world.counters.drops[Drop.UDP_FILTERED] == 1
    world.send(4000, ALIAS, stranger.getsockname()[1], b"")
    assert stranger.recvfrom(10)[1] == peer
    stranger.sendto(b"invited", peer)
    world.turn()
    assert [item.payload for item in world.received()] == [b"invited"]
    world.close()


def test_with_the_alias_off_no_program_on_the_host_can_speak_into_a_mapping() -> None:  # N7
    world = World(Network(host_alias=None, allow=("127.0.0.9/32",)))
    server, stranger = world.host_socket("127.0.0.9"), world.host_socket()
    world.send(4000, local(9), server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    stranger.sendto(b"forged", ("127.0.0.1", peer[1]))
    server.sendto(b"true", peer)
    world.turn()
    assert [(item.source, item.payload) for item in world.received()] == [(local(9), b"true")]
    world.close()


def test_a_refused_port_is_told_as_port_unreachable_from_the_address_the_guest_used(world: World) -> None:  # C05, U07
    gone = world.host_socket()
    port = gone.getsockname()[1]
    gone.close()
    world.send(4000, ALIAS, port, b"anybody there?")
    world.turn()
    (error,) = world.output.errors
    assert (error.type, error.code) == (3, 3)
    assert (error.source, error.destination) == (ALIAS, GUEST)
    assert error.quoted[12:20] == GUEST + ALIAS
    assert struct.unpack("!HHH", error.quoted[20:26]) == (4000, port, 8 + 14)
    assert error.quoted[28:] == b"anybody there?"


def test_a_refused_port_does_not_lose_datagrams_to_other_remotes(
    world: World,
) -> None:  # vpnkit 10: errors keep the flow
    gone, server = world.host_socket(), world.host_socket()
    refused = gone.getsockname()[1]
    gone.close()
    for number in range(20):
        world.send(4000, ALIAS, refused, b"%d" % number)
        world.send(4000, ALIAS, server.getsockname()[1], b"%d" % number)
    assert [server.recvfrom(10)[0] for _ in range(20)] == [b"%d" % number for number in range(20)]
    world.turn(wait=False)
    assert len(world.output.errors) == 20
    assert {error.source for error in world.output.errors} == {ALIAS}


def test_an_error_that_waits_does_not_hide_an_answer_behind_it(world: World) -> None:
    gone, server = world.host_socket(), world.host_socket()
    refused = gone.getsockname()[1]
    gone.close()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    world.send(4000, ALIAS, refused, b"")
    server.sendto(b"answer", peer)
    world.turn()
    assert [item.payload for item in world.received()] == [b"answer"]
    assert [error.code for error in world.output.errors] == [3]


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENETUNREACH, 0), (errno.EHOSTUNREACH, 1), (errno.EPERM, 13), (errno.EACCES, 13), (errno.ENETDOWN, 0)],
)
def test_what_the_host_cannot_send_is_told_to_the_guest(world: World, number: int, code: int) -> None:  # F14
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"one")
    (association,) = world.proxy.associations.values()
    real = association.sendto

    def refuse(_payload: memoryview, _address: Any) -> int:
        raise OSError(number, "played")

    association.sendto = refuse
    world.send(4000, ALIAS, server.getsockname()[1], b"two")
    (error,) = world.output.errors
    assert (error.type, error.code, error.source) == (3, code, GATEWAY)
    assert error.quoted[28:] == b"two"
    association.sendto = real
    world.send(4000, ALIAS, server.getsockname()[1], b"three")
    assert [server.recvfrom(10)[0] for _ in range(2)] == [b"one", b"three"]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL])
def test_a_full_host_queue_loses_that_datagram_alone_and_counts_it(world: World, number: int) -> None:  # F19
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"one")
    (association,) = world.proxy.associations.values()
    real, failures = association.sendto, [number, number]

    def refuse(payload: memoryview, address: Any) -> int:
        if failures:
            raise OSError(failures.pop(), "played")
        return real(payload, address)

    association.sendto = refuse
    world.send(4000, ALIAS, server.getsockname()[1], b"two")
    failures.clear()
    world.send(4000, ALIAS, server.getsockname()[1], b"three")
    assert [server.recvfrom(10)[0] for _ in range(2)] == [b"one", b"three"]
    assert world.counters.drops[Drop.UDP_SEND] == 1
    assert world.output.errors == []


def test_a_dont_fragment_datagram_that_does_not_fit_is_told_the_mtu(world: World) -> None:  # C07, vpnkit 10
    server = world.host_socket()
    # The loopback's MTU is 65,536: a full datagram of 65,535 octets fits, so the refusal is played, the option is real.
    world.send(4000, ALIAS, server.getsockname()[1], bytes(3000), dont_fragment=True)
    mapping: Any = next(iter(world.proxy.associations.values())).socket
    assert mapping.sock.getsockopt(socket.IPPROTO_IP, 10) == 2
    (association,) = world.proxy.associations.values()

    def refuse(_payload: memoryview, _address: Any) -> int:
        raise OSError(errno.EMSGSIZE, "played")

    association.sendto = refuse
    world.send(4000, ALIAS, server.getsockname()[1], bytes(3000))
    (error,) = world.output.errors
    assert (error.type, error.code) == (3, 4)


def test_ttl_and_dont_fragment_are_carried_to_the_host_socket(world: World) -> None:  # I12, DESIGN 9
    server = world.host_socket()
    server.setsockopt(socket.IPPROTO_IP, 12, 1)  # IP_RECVTTL
    for ttl in (64, 64, 2, 255):
        world.send(4000, ALIAS, server.getsockname()[1], b"", ttl=ttl)
        _data, ancillary, _flags, _peer = server.recvmsg(10, 100)
        assert struct.unpack("i", ancillary[0][2])[0] == ttl - 1


def test_a_bad_checksum_or_length_is_dropped_and_none_is_accepted(world: World) -> None:  # U02, U03
    server = world.host_socket()
    port = server.getsockname()[1]
    good = bytes(udp_packet(world.port, GUEST, 4000, ALIAS, port, b"payload").payload)

    def world_input(packet: Any, now: float) -> None:
        world.proxy.input(packet, now)
        world.proxy.flush(now)

    for datagram, drop in [
        (good[:6] + bytes((good[6] ^ 1, good[7])) + good[8:], Drop.UDP_CHECKSUM),
        (good[:-1] + b"!", Drop.UDP_CHECKSUM),
        (good[:4] + b"\0\7" + good[6:], Drop.UDP_MALFORMED),
        (good[:4] + struct.pack("!H", len(good) + 1) + good[6:], Drop.UDP_MALFORMED),
        (good[:7], Drop.UDP_MALFORMED),
        (b"", Drop.UDP_MALFORMED),
    ]:
        before = world.counters.drops[drop]
        world_input(raw_packet(world.port, GUEST, ALIAS, 17, datagram), world.now)
        assert world.counters.drops[drop] == before + 1
    world_input(raw_packet(world.port, GUEST, ALIAS, 17, good[:6] + b"\0\0" + good[8:]), world.now)
    assert server.recvfrom(100)[0] == b"payload"
    world_input(raw_packet(world.port, GUEST, ALIAS, 17, good[:6] + b"\1\2" + good[8:], checksum_ok=True), world.now)
    assert server.recvfrom(100)[0] == b"payload"
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recvfrom(100)


@pytest.mark.parametrize("destination", ["127.0.0.1", "0.0.0.0", "169.254.169.254", "240.0.0.1", "192.168.65.77"])
def test_forbidden_destinations_get_no_socket_and_the_guest_hears_so(
    world: World, destination: str
) -> None:  # G25, G26
    server = world.host_socket()
    for _ in range(3):
        world.send(4000, socket.inet_aton(destination), server.getsockname()[1], b"")
    assert len(world.output.errors) == 3 and all(error.type == 3 for error in world.output.errors)
    assert not world.io.open and world.counters.drops[Drop.POLICY] == 3
    assert sum(isinstance(event, FlowRefused) for event in world.events) == 1
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.recvfrom(10)


@pytest.mark.parametrize("destination", ["224.0.0.251", "255.255.255.255", "192.168.65.255", "239.255.255.250"])
def test_broadcast_and_multicast_stay_inside(world: World, destination: str) -> None:  # U08, I10, C04
    world.send(5353, socket.inet_aton(destination), 5353, b"")
    assert world.output.errors == [] and not world.io.open
    assert world.counters.drops[Drop.POLICY] == 1


def test_a_gateway_port_without_service_is_port_unreachable(world: World) -> None:  # vpnkit 3.5
    world.send(4000, GATEWAY, 9, b"")
    (error,) = world.output.errors
    assert (error.type, error.code, error.source) == (3, 3, GATEWAY)
    assert world.counters.drops[Drop.UDP_NO_SERVICE] == 1


def test_a_service_on_the_gateway_answers_from_its_own_address_at_once_or_later(world: World) -> None:
    asked: list[tuple[bytes, Endpoint, Reply]] = []
    world.proxy.services[(GATEWAY, 53)] = lambda payload, source, reply: asked.append((payload, source, reply))
    world.send(4000, GATEWAY, 53, b"q1")
    world.send(4001, GATEWAY, 53, b"q2")
    assert [(payload, source) for payload, source, _ in asked] == [
        (b"q1", Endpoint(GUEST, 4000)),
        (b"q2", Endpoint(GUEST, 4001)),
    ]
    asked[1][2](b"a2")
    asked[0][2](b"a1")
    asked[0][2](b"a1 again, and longer than what UDP takes" + bytes(65507))
    got = world.received()
    assert [(item.source, item.source_port, item.destination_port, item.payload) for item in got] == [
        (GATEWAY, 53, 4001, b"a2"),
        (GATEWAY, 53, 4000, b"a1"),
    ]
    assert not world.io.open


def test_idle_mappings_end_and_answers_keep_them(world: World) -> None:  # U05
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    world.now += 80
    server.sendto(b"still here", peer)
    world.turn()
    world.now += 80
    world.proxy.expire(world.now)
    assert len(world.io.open) == 1
    deadline = world.proxy.deadline()
    assert deadline is not None and deadline <= world.now + 10
    world.now += 10
    world.proxy.expire(world.now)
    assert not world.io.open and world.proxy.associations == {} and world.proxy.deadline() is None
    opened = [event for event in world.events if isinstance(event, FlowOpened)]
    closed = [event for event in world.events if isinstance(event, FlowClosed)]
    assert len(opened) == len(closed) == 1
    assert (closed[0].reason, closed[0].octets_inbound, closed[0].duration_s) == ("idle", 10, 170.0)
    world.send(4000, ALIAS, server.getsockname()[1], b"back")
    assert server.recvfrom(10)[0] == b"back"


def test_a_dns_exchange_lets_go_of_its_socket_within_seconds() -> None:  # U06
    network = Network(allow=("127.0.0.0/8",))
    world = World(network)
    server = world.host_socket("127.0.0.77")
    world.proxy._mappings.brief_ports = frozenset((server.getsockname()[1],))
    world.send(4000, local(77), server.getsockname()[1], b"?")
    server.sendto(b"!", server.recvfrom(10)[1])
    world.now += 0.1
    world.turn()
    world.now += 5
    world.proxy.expire(world.now)
    assert not world.io.open
    world.close()


def test_at_the_limit_the_one_idle_longest_makes_room() -> None:  # U05, G21
    world = World(Network(limits=Limits(max_udp_flows=8)))
    server = world.host_socket()
    port = server.getsockname()[1]
    for sport in range(4000, 4008):
        world.now += 1
        world.send(sport, ALIAS, port, b"")
    world.send(4000, ALIAS, port, b"")  # in use again
    world.now += 1
    world.send(5000, ALIAS, port, b"")
    assert len(world.io.open) == 8
    assert {flow.guest.port for flow in world.proxy.flows()} == {4000, 5000, *range(4002, 4008)}
    assert world.counters.udp_evicted == 1
    world.close()


def test_a_scan_of_many_ports_and_destinations_stays_bounded() -> None:  # G21, R3
    world = World(Network(limits=Limits(max_udp_flows=16)))
    for number in range(400):
        world.send(1000 + number, ALIAS, 2000 + number, b"")
        world.send(999, ALIAS, 2000 + number, b"")
    assert len(world.io.open) <= 16
    assert len(world.proxy.associations) <= 16 + ASSOCIATIONS_PER_MAPPING
    assert sum(len(flow.remotes) for flow in world.proxy.flows()) == len(world.proxy.associations)
    world.close()


def test_without_descriptors_the_guest_gets_an_honest_refusal_and_later_service(world: World) -> None:  # R1, F19
    server = world.host_socket()
    port = server.getsockname()[1]
    for number in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAFNOSUPPORT):
        world.io.error = number
        world.send(4000, ALIAS, port, b"lost")
    assert [(error.type, error.code) for error in world.output.errors] == [(3, 1)] * 5
    assert world.counters.drops[Drop.DESCRIPTORS] == 5
    world.io.error = None
    world.send(4000, ALIAS, port, b"kept")
    assert server.recvfrom(10)[0] == b"kept"


def test_a_process_short_of_descriptors_takes_them_from_idle_mappings(world: World) -> None:  # R1
    world.io.room = 40
    server = world.host_socket()
    for sport in range(4000, 4100):
        world.now += 1
        world.send(sport, ALIAS, server.getsockname()[1], b"%d" % sport)
        assert server.recvfrom(10)[0] == b"%d" % sport
    assert world.output.errors == []


def test_a_guest_that_returns_on_another_port_and_mac_gets_its_answers_there(world: World) -> None:
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]
    server.sendto(b"1", peer)
    world.turn()
    assert len(world.received()) == 1
    world.neighbour.port = None
    world.neighbour.version += 1
    server.sendto(b"2", peer)
    world.turn()
    assert (world.link.sent, len(world.output.sent)) == ([], 1)  # the general way keeps it until the guest is found
    world.output.sent.clear()
    other = World(headroom=4)
    world.neighbour.port, world.link = other.port, other.link
    world.neighbour.version += 1
    server.sendto(b"3", peer)
    world.turn()
    assert [item.payload for item in world.received()] == [b"3"]
    world.port = other.port
    world.send(4000, ALIAS, server.getsockname()[1], b"4")
    assert next(iter(world.proxy.associations.values())).port is other.port
    assert server.recvfrom(10) == (b"4", peer)
    other.close()


def test_a_guest_that_leaves_for_good_leaves_no_socket(world: World) -> None:  # F5
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    world.send(4000, ALIAS, server.getsockname()[1], b"", source=OTHER)
    world.proxy.close_guest(GUEST)
    assert len(world.io.open) == 1
    assert [flow.guest.address for flow in world.proxy.flows()] == [OTHER]


def test_the_guests_port_unreachable_closes_the_port_towards_the_world(world: World) -> None:  # U07
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"")
    peer = server.recvfrom(10)[1]

    def refuse(claimant: bytes, guest: bytes) -> None:
        quoted = udp_packet(world.port, ALIAS, server.getsockname()[1], guest, 4000, b"answer").data
        packet: Any = raw_packet(world.port, claimant, ALIAS, 1, b"\3\3")
        world.proxy.guest_error(packet, 3, 4, 1400, quoted, world.now)  # says nothing about who listens
        world.proxy.guest_error(packet, 3, 3, 0, quoted, world.now)

    refuse(OTHER, GUEST)  # somebody else's word about it (G29)
    refuse(OTHER, OTHER)
    assert len(world.io.open) == 1
    refuse(GUEST, GUEST)
    assert not world.io.open
    server.connect(peer)
    server.send(b"answer")
    with pytest.raises(ConnectionRefusedError):
        server.send(b"answer")
        server.recv(10)


def test_while_draining_old_mappings_work_and_new_ones_are_refused(world: World) -> None:
    server = world.host_socket()
    world.send(4000, ALIAS, server.getsockname()[1], b"old")
    world.proxy.draining = True
    world.send(4000, ALIAS, server.getsockname()[1], b"old")
    world.send(4001, ALIAS, server.getsockname()[1], b"new")
    assert [server.recvfrom(10)[0] for _ in range(2)] == [b"old", b"old"]
    assert len(world.io.open) == 1


def test_a_batch_to_one_destination_arrives_as_the_datagrams_it_was(world: World) -> None:  # U01
    """Equal lengths leave together; whatever differs does not, and the order stays."""
    server, other = world.host_socket(), world.host_socket()
    port, other_port = server.getsockname()[1], other.getsockname()[1]
    lengths = [100] * 70 + [0, 0, 7, 7, 100, 1472, 1472, 1473, 1473, 8000, 8000, 1]
    sent = [bytes((number & 0xFF,)) * length for number, length in enumerate(lengths)]
    for number, payload in enumerate(sent):
        world.queue(4000, ALIAS, port, payload)
        if number % 40 == 39:
            world.queue(4000, ALIAS, other_port, b"between")
    world.proxy.flush(world.now)
    assert [server.recv(9000) for _ in sent] == sent
    assert [other.recv(100) for _ in range(2)] == [b"between"] * 2
    assert world.proxy.flows()[0].octets_outbound == sum(lengths) + 14


def test_a_way_out_without_segmentation_gets_datagrams_one_by_one(world: World) -> None:
    """A small MTU on the way refuses what is sent together; nothing is lost, and it is not tried again."""
    server = world.host_socket()
    world.queue(4000, ALIAS, server.getsockname()[1], b"first")
    world.proxy.flush(world.now)
    association = next(iter(world.proxy.associations.values()))
    tried = []

    class NoSegments:
        def __getattr__(self, name: str) -> Any:
            return getattr(sock, name)

        def sendmsg(self, *arguments: Any) -> int:
            tried.append(arguments)
            raise OSError(errno.EIO, "no segmentation here")

    sock, association.socket.sock = association.socket.sock, NoSegments()
    for _ in range(2):
        for number in range(20):
            world.queue(4000, ALIAS, server.getsockname()[1], bytes((number,)) * 50)
        world.proxy.flush(world.now)
    assert len(tried) == 1
    assert server.recv(100) == b"first"
    assert [server.recv(100)[0] for _ in range(40)] == [*range(20)] * 2


@pytest.mark.parametrize(("source", "destination"), [(0, 53), (4000, 0), (0, 0)])
def test_port_0_is_nobodys(world: World, source: int, destination: int) -> None:
    world.send(source, ALIAS, destination, b"x")
    assert not world.io.open and world.counters.drops[Drop.UDP_MALFORMED] == 1
