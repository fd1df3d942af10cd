"""Real routers behind the host: what ping, traceroute and path MTU discovery in a guest get to see.

Conformance C02, C05, C07, I12, U07; vpnkit 3.6. Needs root for network namespaces.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from netstack.observe.metrics import Drop
from netstack.settings import Limits, Network
from tests.udp.netns import FAR, NARROW, NEAR, ROUTER, NetnsIO, inside, ip, three_hops
from tests.udp.support import GATEWAY, GUEST, OTHER, World, ones_sum

pytestmark = pytest.mark.netns

far_address, router_address = socket.inet_aton(FAR), socket.inet_aton(ROUTER)


@pytest.fixture(scope="module")
def hops() -> Iterator[tuple[str, str]]:
    with three_hops() as names:
        yield names


@pytest.fixture
def world(hops: tuple[str, str]) -> Iterator[World]:
    made = World(io=NetnsIO(hops[0]))
    yield made
    made.close()


def turn_until(world: World, done: Any) -> None:
    for _ in range(4):
        if done():
            return
        world.turn()
    raise AssertionError("nothing came within the time")


def test_pings_of_two_guests_and_processes_with_one_identifier_are_not_confused(world: World) -> None:  # C02
    for sequence in (1, 2):
        world.ping(far_address, 77, sequence, b"guest")
        world.ping(far_address, 78, sequence, b"another process")
        world.ping(far_address, 77, sequence, b"another guest", source=OTHER)
    replies: list[Any] = []
    turn_until(world, lambda: replies.extend(world.echoes()) or len(replies) == 6)
    assert {reply.source for reply in replies} == {far_address}
    got = sorted((reply.destination, reply.identifier, reply.sequence, reply.data) for reply in replies)
    assert got == sorted(
        (guest, identifier, sequence, data)
        for guest, identifier, data in (
            (GUEST, 77, b"guest"),
            (GUEST, 78, b"another process"),
            (OTHER, 77, b"another guest"),
        )
        for sequence in (1, 2)
    )
    assert world.counters.pings == 3


@pytest.mark.parametrize("octets", [0, 56, 1252, 9000, 65507])
def test_pings_of_every_size_come_back_whole(world: World, octets: int) -> None:  # C02
    world.ping(far_address, 5, 9, bytes(octets), dont_fragment=False)
    turn_until(world, lambda: world.output.sent)
    (reply,) = world.echoes()
    assert reply.data == bytes(octets)


def test_traceroute_by_ping_shows_the_router(world: World) -> None:  # I12, C02
    world.ping(far_address, 0x4242, 3, b"probe" * 10, ttl=2)
    turn_until(world, lambda: world.output.errors)
    (error,) = world.output.errors
    assert (error.type, error.code, error.source, error.destination) == (11, 0, router_address, GUEST)
    quoted = error.quoted
    assert quoted[12:20] == GUEST + far_address and quoted[9] == 1
    assert struct.unpack("!BB2xHH", quoted[20:28]) == (8, 0, 0x4242, 3)
    assert ones_sum(quoted[20:]) == 0xFFFF
    world.ping(far_address, 0x4242, 4, b"", ttl=3)
    turn_until(world, lambda: world.output.sent)
    assert world.echoes()[0].source == far_address


def test_traceroute_by_udp_shows_the_router_and_then_the_closed_port(world: World) -> None:  # I12, C05
    world.send(40000, far_address, 33434, b"probe", ttl=2)
    turn_until(world, lambda: world.output.errors)
    world.send(40000, far_address, 33435, b"probe 2", ttl=3)
    turn_until(world, lambda: len(world.output.errors) == 2)
    hop, end = world.output.errors
    assert (hop.type, hop.code, hop.source) == (11, 0, router_address)
    assert (end.type, end.code, end.source) == (3, 3, far_address)
    assert hop.quoted[20:24] == struct.pack("!HH", 40000, 33434)
    assert end.quoted[20:24] == struct.pack("!HH", 40000, 33435)
    assert end.quoted[12:20] == GUEST + far_address


@pytest.mark.parametrize("how", ["udp", "ping"])
def test_path_mtu_discovery_learns_the_mtu_behind_the_router(
    world: World, hops: tuple[str, str], how: str
) -> None:  # C07
    ip("-n", hops[0], "route", "flush", "cache")

    def send() -> None:
        if how == "udp":
            world.send(40001, far_address, 9, bytes(1372), dont_fragment=True)
        else:
            world.ping(far_address, 6, 1, bytes(1372), dont_fragment=True)

    send()
    turn_until(world, lambda: world.output.errors)
    error = world.output.errors.pop()
    assert (error.type, error.code, error.mtu, error.source) == (3, 4, NARROW, router_address)
    assert int.from_bytes(error.quoted[2:4], "big") == 1400
    send()  # now the host knows, and says so itself
    assert [(error.type, error.code, error.mtu) for error in world.output.errors] == [(3, 4, NARROW)]
    assert world.output.errors[0].source == GATEWAY
    drop = Drop.UDP_SEND if how == "udp" else Drop.PING_SEND
    assert world.counters.drops[drop] == 1


def test_without_dont_fragment_large_datagrams_pass_the_narrow_link(world: World, hops: tuple[str, str]) -> None:
    with inside(hops[1]):
        server = world.host_socket(FAR)
    world.send(40002, far_address, server.getsockname()[1], bytes(9000), dont_fragment=False)
    data, peer = server.recvfrom(10000)
    assert len(data) == 9000 and peer[0] == NEAR
    server.sendto(bytes(9000), peer)
    turn_until(world, lambda: world.output.sent)
    (answer,) = world.received()
    assert (answer.source, len(answer.payload)) == (far_address, 9000)


@pytest.mark.parametrize("how", ["udp", "ping"])
@pytest.mark.parametrize(
    ("destination", "code", "source"),
    [
        ("10.91.3.1", 13, router_address),  # the router prohibits it
        ("10.91.4.1", 0, router_address),  # the router has no way there
        ("172.30.0.1", 0, GATEWAY),  # the host has no way there
    ],
)
def test_unreachable_destinations_are_told_by_whoever_knows(
    world: World, how: str, destination: str, code: int, source: bytes
) -> None:  # U07, F14
    address = socket.inet_aton(destination)
    while not world.output.errors:  # Linux routers say so once a second (route/error_cost): ask again, as resolvers do
        if how == "udp":
            world.send(40003, address, 9, b"x")
        else:
            world.ping(address, 6, 1, b"x")
        if not world.output.errors:
            world.turn()
    error = world.output.errors[0]
    assert (error.type, error.code, error.source) == (3, code, source)
    assert error.quoted[12:20] == GUEST + address


def test_many_identifiers_stay_bounded_and_idle_ones_end(hops: tuple[str, str]) -> None:  # R3, C02
    world = World(Network(limits=Limits(max_pings=8)), io=NetnsIO(hops[0]))
    for identifier in range(50):
        world.now += 1
        world.ping(far_address, identifier, 1)
    assert len(world.io.open) == 8
    assert len(world.icmp.flows()) == 8
    world.now += 61
    world.icmp.expire(world.now)
    assert not world.io.open and world.icmp.deadline() is None
    world.ping(far_address, 1, 1)
    world.ping(far_address, 1, 1, source=OTHER)
    world.icmp.close_guest(OTHER)
    assert len(world.io.open) == 1
    world.close()


def test_a_refused_ping_socket_is_asked_for_again_later(world: World) -> None:  # C02
    world.io.error = 13
    world.ping(far_address, 1, 1)
    world.io.error = None
    world.ping(far_address, 1, 2)
    world.now += 61
    world.ping(far_address, 1, 3)
    turn_until(world, lambda: world.output.sent)
    assert [reply.sequence for reply in world.echoes()] == [3]
