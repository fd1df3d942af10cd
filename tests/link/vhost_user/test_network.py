"""Guests on shared rings in a whole network: transfers through the stack, and what one guest can do to another."""

from __future__ import annotations

import gc
import random
import socket
from collections.abc import Callable, Iterator
from hashlib import sha256

import pytest

from tests.support import packets
from tests.support.drill import pattern
from tests.support.hostile_inbound import INBOUND
from tests.support.hostile_nic import Hostile
from tests.support.hostile_outbound import AVAILABLE, DESCRIPTORS, FRAMES, OUTBOUND
from tests.support.vhost_bench import count_descriptors
from tests.support.vhost_world import Guest, MixedIO, World
from tests.support.virtio_net import FULL, PLAIN, Feature
from tests.support.virtqueue import QueueFull

from .conftest import SUBSETS

MakeWorld = Callable[..., World]
ALL = pytest.mark.parametrize("features", SUBSETS.values(), ids=SUBSETS)
SPREAD = pytest.mark.parametrize("spread", [True, False], ids=["all-regions", "one-region"])


@pytest.fixture
def world() -> Iterator[MakeWorld]:
    """Makes worlds. After the test each is closed, and no descriptor is left."""
    gc.collect()
    before = count_descriptors()
    made: list[World] = []

    def make(**options: object) -> World:
        made.append(World(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    while made:
        made.pop().close()
    gc.collect()
    assert count_descriptors() <= before


def both_ways(w: World, guest: Guest, octets: int) -> None:
    """One flow carries `octets` in each direction at once."""
    up, down = pattern(octets, 1), pattern(octets, 2)
    sock, far = w.connect(guest)
    sock.send(up, w.now)
    far.send(down)
    assert w.run(lambda: len(far.received) >= octets and len(sock.received) >= octets, 120.0)
    assert bytes(far.received) == up
    assert bytes(sock.received) == down
    sock.shutdown(w.now)
    far.shutdown()
    assert w.run(lambda: far.eof and sock.eof, 60.0)
    w.assert_sane()


@SPREAD
@ALL
def test_a_transfer_both_ways_is_octet_exact(world: MakeWorld, features: int, spread: bool) -> None:
    w = world()
    guest = w.plug(features, spread=spread, buffers=64)
    both_ways(w, guest, 300_000)
    offloads = guest.nic.has(Feature.GUEST_TSO4)
    assert bool(guest.super_frames) == offloads
    assert guest.model.bad_sums == 0


def test_flows_by_several_queue_pairs_are_octet_exact(world: MakeWorld) -> None:
    w = world()
    guest = w.plug(FULL | Feature.MQ.mask, pairs=4, size=64, buffers=64)
    up, down = pattern(200_000, 10), pattern(200_000, 11)
    flows = []
    for number in range(8):
        guest.pair = number % 4
        flows.append(w.connect(guest))
    for number, (sock, far) in enumerate(flows):
        guest.pair = number % 4
        sock.send(up, w.now)
        far.send(down)
    assert w.run(lambda: all(len(f.received) == len(up) and len(s.received) == len(down) for s, f in flows), 120.0)
    assert all(bytes(far.received) == up and bytes(sock.received) == down for sock, far in flows)
    assert all(pair.rx.completed for pair in guest.nic.pairs), "answers leave by the pair the questions came by"
    w.assert_sane()


def test_a_small_ring_only_makes_it_slower(world: MakeWorld) -> None:
    w = world()
    for features in (PLAIN, FULL, FULL & ~Feature.MRG_RXBUF.mask):
        both_ways(w, w.plug(features, size=8 if features != FULL else 4, buffers=8), 100_000)


def test_a_guest_that_stops_reading_its_ring_holds_up_only_itself(world: MakeWorld) -> None:
    w = world()
    slow, quick = w.plug(FULL, buffers=16), w.plug(FULL)
    sock, far = w.connect(slow)
    slow.paused = True
    data = pattern(2_000_000, 3)
    far.send(data)
    w.settle()
    both_ways(w, quick, 500_000)
    slow.paused = False
    assert w.run(lambda: len(sock.received) == len(data), 120.0)
    assert bytes(sock.received) == data


def test_flows_go_on_when_the_machine_was_paused_and_when_the_back_end_was_started_anew(world: MakeWorld) -> None:
    w = world()
    guest = w.plug(FULL)
    sock, far = w.connect(guest)
    up, down = pattern(1_000_000, 4), pattern(1_000_000, 5)
    sock.send(up, w.now)
    far.send(down)

    def pause() -> None:
        guest.nic.stop()
        guest.nic.start()

    mark = [0]
    for interrupt in (pause, lambda: guest.reconnect("qemu"), lambda: guest.reconnect("cloud-hypervisor")) * 3:
        w.run(lambda: len(sock.received) > mark[0] or len(sock.received) == len(down), 60.0)
        mark[0] = len(sock.received)
        interrupt()
        guest.model.announce()
    assert w.run(lambda: len(far.received) == len(up) and len(sock.received) == len(down), 120.0)
    assert bytes(far.received) == up
    assert bytes(sock.received) == down
    w.assert_sane()


def test_a_guest_that_reboots_with_another_driver_has_the_network_again(world: MakeWorld) -> None:
    w = world()
    guest = w.plug(FULL)
    for features in SUBSETS.values():
        both_ways(w, guest, 20_000)
        w.connect(guest)  # left behind
        guest.reboot(features)
    both_ways(w, guest, 20_000)


@pytest.mark.parametrize("features", [FULL, PLAIN, 0], ids=["everything", "nothing", "legacy"])
def test_two_guests_on_rings_reach_each_other_whatever_they_agreed_on(world: MakeWorld, features: int) -> None:
    w = world()
    guests = w.plug(FULL, buffers=64), w.plug(features, buffers=64)
    for one, other in (guests, guests[::-1]):
        heard = other.heard = []
        there, here = other.model, one.model
        datagram = packets.udp(here.address, there.address, 5, 6, pattern(1000, 6))
        packet = packets.ipv4(here.address, there.address, packets.UDP, datagram)
        frame = packets.ether(there.mac, here.mac, packets.IPV4, packet)
        one.nic.send(frame)
        w.settle()
        assert heard == [frame]


def test_g3_kicks_without_frames_cost_one_look_per_turn(world: MakeWorld) -> None:
    w = world()
    guest = w.plug(FULL)
    assert isinstance(w.host, MixedIO)
    wakes = w.host.wakes
    for turns in range(1, 11):
        for _ in range(10_000):
            guest.nic.pairs[0].kick(0)
            guest.nic.pairs[0].kick(1)
        w.turn()
        assert w.host.wakes - wakes <= 2 * turns
    w.assert_sane()


@pytest.mark.parametrize("kind", ["descriptors", "available", "frames", "inbound", "everything"])
def test_g1_to_g6_f24_a_hostile_guest_harms_no_other(world: MakeWorld, kind: str) -> None:
    """While it does what it likes, a guest on rings and one on another link transfer both ways (A1)."""
    w = world()
    rng = random.Random(11)
    quiet, loud, other = w.plug(FULL), w.plug(FULL, size=64, buffers=0), w.plug_bystander()
    hostile = Hostile(loud.nic)
    flows = [w.connect(quiet), w.connect(other)]
    up, down = pattern(1_000_000, 8), pattern(1_000_000, 9)
    attacks = {"descriptors": DESCRIPTORS, "available": AVAILABLE, "frames": FRAMES, "inbound": INBOUND}
    chosen = attacks.get(kind, (*OUTBOUND, *INBOUND))
    count = 0

    def strike() -> None:
        nonlocal count
        for _ in range(rng.randrange(1, 4)):
            try:
                expected = rng.choice(chosen)(rng, hostile)
            except QueueFull:
                break
            count += 1
            if expected.disorder:
                break
        for which, queue in enumerate(loud.nic.pairs[0].queues):
            queue.publish()
            loud.nic.pairs[0].kick(which)
        w.stack.turn()
        loud.nic.stop()
        loud.nic.reset_rings()
        for pieces in loud.nic.pairs[0].buffers:
            for piece in pieces:
                loud.nic.memory.free(piece.address)
        loud.nic.pairs[0].buffers.clear()
        loud.nic.start()

    loud.paused = True  # its driver looks at nothing that comes back
    for at in range(0, len(up), 20_000):
        for sock, far in flows:
            sock.send(up[at : at + 20_000], w.now)
            far.send(down[at : at + 20_000])
        for _ in range(10):
            strike()
            w.turn()
        assert w.run(lambda at=at: all(len(far.received) > at for _sock, far in flows), 60.0)  # type: ignore[misc]
    assert w.run(lambda: all(len(sock.received) == len(down) for sock, _far in flows), 60.0)
    for sock, far in flows:
        assert bytes(far.received) == up and bytes(sock.received) == down
    assert count >= 400
    w.assert_sane()


@SPREAD
def test_a_real_host_socket_carries_megabytes_both_ways(world: MakeWorld, spread: bool) -> None:
    w = world(real=True)
    guest = w.plug(FULL, spread=spread)
    rng = random.Random(7)
    up, down = rng.randbytes(4_000_000), rng.randbytes(4_000_000)
    with socket.create_server(("127.0.0.1", 0)) as door:
        door.setblocking(False)
        sock = guest.model.connect(packets.ip("192.168.65.2"), door.getsockname()[1], w.now)
        assert w.run(lambda: sock.state == "ESTABLISHED", 5.0)
        host, _address = door.accept()
    with host:
        host.setblocking(False)
        got = bytearray()
        left = memoryview(down)
        sock.send(up, w.now)

        def done() -> bool:
            nonlocal left
            try:
                left = left[host.send(left[: 1 << 18]) :]
            except BlockingIOError:
                pass
            try:
                while octets := host.recv(1 << 20):
                    got.extend(octets)
            except BlockingIOError:
                pass
            return len(got) == len(up) and len(sock.received) == len(down)

        assert w.run(done, 25.0), f"{len(got)} up, {len(sock.received)} down"
        assert sha256(got).digest() == sha256(up).digest()
        assert sha256(sock.received).digest() == sha256(down).digest()
        assert guest.super_frames > 10
