"""Published UDP ports: host programs and the guest's service behind them (conformance X02, threats N7)."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from netstack.api import Datagrams, Endpoint
from netstack.settings import Limits, Network
from tests.udp.support import GATEWAY, GUEST, World


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def published(world: World, port: int = 53) -> tuple[Datagrams, tuple[str, int]]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", 0))
    address = sock.getsockname()
    return world.proxy.publish(Endpoint(GUEST, port), sock), address


def test_each_host_peer_gets_its_own_answer(world: World) -> None:  # X02
    _published, address = published(world)
    peers = [world.host_socket() for _ in range(5)]
    for number, peer in enumerate(peers):
        peer.sendto(b"question %d" % number, address)
    world.turn()
    questions = world.received()
    assert len(questions) == 5
    assert {item.source for item in questions} == {GATEWAY}, "nobody appears as the guest's own loopback"
    assert {item.destination_port for item in questions} == {53}
    assert len({item.source_port for item in questions}) == 5
    for item in reversed(questions):
        world.send(53, item.source, item.source_port, item.payload.replace(b"question", b"answer"))
    for number, peer in enumerate(peers):
        assert peer.recvfrom(100) == (b"answer %d" % number, address)


def test_a_peer_keeps_its_port_while_it_speaks_and_shows_its_own_where_that_is_free(world: World) -> None:
    _published, address = published(world)
    peer = world.host_socket()
    for _ in range(3):
        peer.sendto(b"", address)
        world.turn()
    assert {item.source_port for item in world.received()} == {peer.getsockname()[1]}


def test_peers_with_the_same_port_number_or_a_service_port_are_told_apart(world: World) -> None:
    _published, address = published(world)
    first = world.host_socket()
    port = first.getsockname()[1]
    second = world.host_socket("127.0.0.2", port)
    world.proxy.services[(GATEWAY, 1024)] = lambda payload, source, reply: None
    for peer in (first, second):
        peer.sendto(b"", address)
    world.turn()
    seen = [item.source_port for item in world.received()]
    assert seen[0] == port
    assert seen[1] == 1025
    world.send(53, GATEWAY, 1025, b"to the second")
    assert second.recvfrom(100)[0] == b"to the second"


@pytest.mark.parametrize("octets", [0, 1472, 1473, 65507])
def test_datagrams_of_every_size_cross_a_published_port(world: World, octets: int) -> None:  # U01
    _published, address = published(world)
    peer = world.host_socket()
    peer.sendto(bytes(octets), address)
    world.turn()
    (item,) = world.received()
    assert item.payload == bytes(octets)
    world.send(53, item.source, item.source_port, bytes(octets))
    assert peer.recvfrom(70000)[0] == bytes(octets)


def test_a_guest_not_seen_yet_is_asked_for(world: World) -> None:
    del world.output.neighbours[GUEST]
    _published, address = published(world)
    peer = world.host_socket()
    peer.sendto(b"early", address)
    world.turn()
    (item,) = world.received()
    assert item.payload == b"early"
    world.output.neighbours[GUEST] = world.neighbour
    peer.sendto(b"late", address)
    world.turn()
    assert len(world.link.sent) == 1
    world.send(53, item.source, item.source_port, b"answer")
    assert peer.recvfrom(100)[0] == b"answer"


def test_a_peer_that_is_gone_is_told_to_the_guest_as_port_unreachable(world: World) -> None:  # U07
    _published, address = published(world)
    peer = world.host_socket()
    peer.sendto(b"question", address)
    world.turn()
    (item,) = world.received()
    peer.close()
    world.send(53, item.source, item.source_port, b"answer")
    world.turn()
    (error,) = world.output.errors
    assert (error.type, error.code, error.source, error.destination) == (3, 3, GATEWAY, GUEST)


def test_idle_peers_are_forgotten_and_the_port_stays(world: World) -> None:  # X02
    _published, address = published(world)
    peer = world.host_socket()
    peer.sendto(b"", address)
    world.turn()
    (item,) = world.received()
    assert [flow.direction for flow in world.proxy.flows()] == ["inbound"]
    world.now += 91
    world.proxy.expire(world.now)
    assert world.proxy.associations == {} and world.proxy.flows() == []
    world.send(53, item.source, item.source_port, b"too late")
    assert [(error.type, error.code) for error in world.output.errors] == [(3, 3)]
    peer.sendto(b"again", address)
    world.turn()
    assert [item.payload for item in world.received()] == [b"again"]


def test_many_peers_stay_bounded_and_the_busy_one_is_kept() -> None:  # R3
    world = World(Network(limits=Limits(max_udp_flows=8)))
    _published, address = published(world)
    busy = world.host_socket()
    for number in range(40):
        world.now += 1
        busy.sendto(b"busy", address)
        world.host_socket().sendto(b"%d" % number, address)
        world.turn()
    assert len(world.proxy.associations) == 8
    assert {item.source_port for item in world.received() if item.payload == b"busy"} == {busy.getsockname()[1]}
    assert world.counters.udp_evicted == 33
    world.close()


def test_closing_frees_the_port_and_forgets_its_peers(world: World) -> None:  # X01
    publication, address = published(world)
    peer = world.host_socket()
    peer.sendto(b"", address)
    world.turn()
    publication.close()
    publication.close()
    assert world.proxy.associations == {} and not world.io.open and world.proxy.deadline() is None
    again = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    again.bind(address)
    again.close()


def test_a_port_goes_on_with_another_guest_on_a_duplicate_of_its_socket(world: World) -> None:
    sock = world.host_socket()
    first = world.proxy.publish(Endpoint(GUEST, 53), sock.dup())
    first.close()
    world.proxy.publish(Endpoint(GUEST, 54), sock.dup())
    peer = world.host_socket()
    peer.sendto(b"question", sock.getsockname())
    world.turn()
    assert [item.destination_port for item in world.received()] == [54]
