"""A guest that breaks every rule (threats G1 to G5): the device stops, alone, and starts again with the guest's next driver."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest

from netstack.link.vhost_user import messages
from tests.support.flipping import flipping
from tests.support.guest_memory import GuestMemory
from tests.support.virtio_net import Feature
from tests.support.virtio_vsock import FEATURES, HEADER, REQUEST, RX, SIZE, STREAM, TX, Packet
from tests.support.virtqueue import INDIRECT, NEXT, WRITE, DeviceFault, Piece, QueueFull
from tests.support.vsock_world import SERVICE, World, end_of
from vm.vsock import engine
from vm.vsock.engine import REPLIES, Count

RINGS = {"tx": TX, "rx": RX}


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def chain(world: World, index: int, *descriptors: tuple[int, int, int, int]) -> None:
    """Offer a chain of descriptors `(address, length, flags, next)`, the first of them at the head; `next` counts from there."""
    queue = world.guest.queues[index]
    numbers = queue.take(len(descriptors))
    for number, (address, length, flags, following) in zip(numbers, descriptors, strict=True):
        queue.describe(number, address, length, flags, numbers[following] if following < len(numbers) else following)
    queue.expect(numbers[0], [], numbers)
    queue.publish()
    world.guest.kick(index)


def space(world: World, octets: int = 4096) -> int:
    return world.memory.allocate(octets)


OUTSIDE = 1 << 60
BAD: dict[str, Callable[[World, int], list[tuple[int, int, int, int]]]] = {
    "an address in no memory": lambda world, flag: [(OUTSIDE, 100, flag, 0)],
    "an address that wraps": lambda world, flag: [((1 << 64) - 50, 100, flag, 0)],
    "octets beyond a region": lambda world, flag: [(0x9FFF0, 4096, flag, 0)],
    "4 GiB of octets": lambda world, flag: [(space(world), 0xFFFFFFFF, flag, 0)],
    "a next one that is none": lambda world, flag: [(space(world), 100, flag | NEXT, 9999)],
    "a loop": lambda world, flag: [(space(world), 100, flag | NEXT, 1), (space(world), 100, flag | NEXT, 0)],
    "an indirect table that is no multiple": lambda world, flag: [(space(world), 17, INDIRECT, 0)],
    "an indirect table of nothing": lambda world, flag: [(space(world), 0, INDIRECT, 0)],
    "an indirect table without end": lambda world, flag: [(space(world), 1 << 20, INDIRECT, 0)],
    "an indirect table outside": lambda world, flag: [(OUTSIDE, 32, INDIRECT, 0)],
    "an indirect table and more": lambda world, flag: [
        (space(world), 32, INDIRECT | NEXT, 1),
        (space(world), 9, flag, 0),
    ],
    "the wrong direction": lambda world, flag: [(space(world), 100, flag ^ WRITE, 0)],
}


def ends(world: World, spoil: Callable[[], None]) -> None:
    """After `spoil` the device stands still, its host sockets are closed, and a new driver has it work again."""
    sock, far = world.from_guest()
    world.guest.posting = False
    spoil()
    begin = time.process_time()
    for _ in range(3):
        world.device_turn()
        far.setblocking(False)
        try:  # for rings to receive by: there must be something to receive
            far.send(b"x" * 100)
        except BrokenPipeError:
            pass
    assert time.process_time() - begin < 1.0
    assert world.device.broken and len(world.complaints) == 1, world.complaints
    assert not world.device.streams and not world.device.running
    world.guest.posting = True
    world.guest.reboot()
    world.settle()
    assert not world.device.broken
    sock, far = world.from_guest()
    far.send(b"alive")
    world.settle()
    assert sock.received == b"alive"


@pytest.mark.parametrize("ring", ["tx", "rx"])
@pytest.mark.parametrize("what", BAD)
def test_chains_that_cannot_be_stop_the_device(world: World, ring: str, what: str) -> None:
    flag = WRITE if ring == "rx" else 0

    def spoil() -> None:
        if ring == "rx":
            _use_up_buffers(world)
        chain(world, RINGS[ring], *BAD[what](world, flag))

    ends(world, spoil)


def _use_up_buffers(world: World) -> None:
    """So that the next chain is the one that is looked at."""
    guest = world.guest
    while guest.queues[RX].outstanding:
        guest.send_packet(Packet(3, 2, 9, 9, 0, STREAM, REQUEST + 1, 0, 0, 0))
        world.device_turn()
        guest.packets()
    guest.send_packet(Packet(3, 2, 9, 9, 0, STREAM, REQUEST + 1, 0, 0, 0))


@pytest.mark.parametrize("ring", ["tx", "rx"])
@pytest.mark.parametrize("moved", [129, 1000, 40000, -5])
def test_an_index_that_jumps_stops_the_device(world: World, ring: str, moved: int) -> None:
    """In the ring to receive by it is seen when there is something to receive."""

    def spoil() -> None:
        queue = world.guest.queues[RINGS[ring]]
        queue._available[1] = (queue._available[1] + moved) & 0xFFFF
        world.guest.kick(RINGS[ring])
        world.taken[-1].send(b"something")

    ends(world, spoil)


def test_a_head_that_is_none_stops_the_device(world: World) -> None:
    def spoil() -> None:
        world.guest.queues[TX].offer(128)
        world.guest.queues[TX].publish()
        world.guest.kick(TX)

    ends(world, spoil)


def test_the_same_head_twice_is_two_packets(world: World) -> None:
    """Nothing forbids us to read it twice, and nobody but the guest is harmed."""
    guest = world.guest
    packet = Packet(3, 2, 77, SERVICE, 0, STREAM, REQUEST, 0, 1000, 0)
    address = space(world)
    world.memory.write(address, packet.octets())
    head = guest.queues[TX].add([Piece(address, SIZE, False)], [])
    guest.queues[TX].offer(head)
    guest.queues[TX].publish()
    guest.kick(TX)
    world.device_turn()
    assert world.device.running and world.device.engine.counters[Count.RESET_PROTOCOL] == 1
    assert end_of(world.taken[0]) == b""
    guest.queues[TX].reset(guest.queues[TX].used_index)


@pytest.mark.parametrize("octets", [0, 1, 43])
def test_packets_without_a_whole_header_are_counted_and_dropped(world: World, octets: int) -> None:
    chain(world, TX, (space(world), octets, 0, 0))
    world.settle()
    assert world.device.running and world.device.engine.counters[Count.MALFORMED] == 1
    world.from_guest()


def test_a_guest_that_asks_and_takes_no_answers_is_not_listened_to(world: World) -> None:
    guest = world.guest
    guest.posting = False
    _use_up_buffers(world)
    sent = 0
    for _ in range(50):
        try:
            for _ in range(32):
                guest.send_packet(Packet(3, 2, sent, 9, 0, STREAM, 7, 0, 0, 0))
                sent += 1
        except QueueFull:
            pass
        world.device_turn()
    assert sent < REPLIES + 400
    assert len(world.device.engine._resets) <= REPLIES + 64
    guest.posting = True
    guest.post()
    world.run(lambda: len(guest.resets) >= sent)
    world.from_guest()


def test_packets_that_waited_for_room_are_taken_when_there_is_some(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells of them a second time."""
    monkeypatch.setattr(engine, "REPLIES", 16)
    guest = world.guest
    guest.posting = False
    _use_up_buffers(world)
    world.turn()
    for number in range(100):
        guest.send_packet(Packet(3, 2, number, 9, 0, STREAM, 7, 0, 0, 0), publish=False)
    guest.publish()
    world.device_turn()
    guest.posting = True
    guest.post()
    for _ in range(10):
        world.device_turn()
    assert len([packet for packet in guest.packets() if packet.dst_port < 100 and packet.src_port == 9]) >= 100


def test_kicks_without_end_are_a_turn_each_at_most(world: World) -> None:
    before = world.device.kicked
    for _ in range(1000):
        world.guest.kick(TX)
    world.device_turn()
    assert world.device.kicked - before <= 2


def test_memory_that_is_cut_off_is_noticed_before_it_is_used(world: World) -> None:
    """The mark that `vanish` makes; that SIGBUS is survived is shown in test_cut_off.py."""
    from netstack.link.vhost_user import vanish

    _, far = world.from_guest()
    watched = world.device.memory.regions[0].watch
    vanish.happened.append(watched)
    watched.vanished = True
    try:
        world.guest.kick(TX)
        world.device_turn()
        assert "cut off" in world.device.broken and end_of(far) == b""
    finally:
        vanish.happened.remove(watched)


# Everything at once.


def busy(world: World, rng: random.Random) -> None:
    """Packets both ways, right and wrong ones; nobody looks at what comes of them."""
    guest = world.guest
    for _ in range(20):
        fields = [
            3,
            2,
            rng.randrange(1024, 1030),
            rng.choice([SERVICE, 9]),
            0,
            STREAM,
            rng.randrange(1, 8),
            0,
            1 << 18,
            0,
        ]
        payload = rng.randbytes(rng.choice([0, 10, 3000]))
        fields[4] = len(payload)
        if rng.random() < 0.3:
            fields[rng.randrange(10)] = rng.choice([0, 1, 3, 0xFFFF, rng.getrandbits(16)])
        octets = HEADER.pack(*fields) + payload
        try:
            guest.send_packet(octets, cuts=rng.choice([(), (1,), (44, 100), (30, 50)]), publish=False)
        except (QueueFull, DeviceFault):
            break
    try:
        guest.publish()
        guest.kick(TX)
        guest.pump()
    except DeviceFault:  # what the driver reads is not what the device wrote
        pass
    for far in world.taken[-8:]:
        try:
            far.send(bytes(rng.choice([1, 5000])))
            far.recv(rng.choice([1, 10_000]))
        except OSError:
            pass


def start_anew(world: World) -> None:
    for _ in range(100):
        world.guest.reboot()
        world.device_turn()
        if world.device.running:
            return
    raise AssertionError("the device does not start any more")


@pytest.mark.parametrize("seed", range(6))
def test_random_corruption_of_everything(seed: int) -> None:
    """Any octet of rings, tables, headers and buffers: no exception, no spin, and a new driver finds a device that works."""
    rng = random.Random(seed)
    features = [FEATURES, Feature.VERSION_1.mask, FEATURES & ~Feature.EVENT_IDX.mask][seed % 3]
    world = World(features=features, limit=16, size=32, buffers=24)
    guest = world.guest
    guest.answering = False
    stopped = 0
    try:
        for _ in range(400):
            busy(world, rng)
            queue = rng.choice(guest.queues)
            where, length = rng.choice([(queue.table, 16 * 32), (queue.available, 6 + 64), (queue.available, 4)])
            at = where + rng.randrange(length)
            world.memory.write(at, bytes([rng.choice([0, 1, 2, 4, 0x7F, 0xFF, rng.randrange(256)])]))
            world.device_turn()
            assert len(world.device.streams) <= 16 and len(world.device.engine.connections) <= 16
            stopped += not world.device.running
            if not world.device.running or rng.random() < 0.02:
                start_anew(world)
        assert stopped > 3
        start_anew(world)
        guest.answering = True
        sock, far = world.from_guest()
        far.send(b"alive")
        world.settle()
        assert sock.received == b"alive"
    finally:
        world.close()


@pytest.mark.parametrize("what", ["tables", "heads", "headers"])
def test_g4_memory_that_changes_while_it_is_read(what: str) -> None:
    rng = random.Random(1)
    memory = GuestMemory(((0x10000, 8 << 20),), spread=False)
    world = World(memory=memory, limit=16, size=32, buffers=24)
    guest = world.guest
    guest.answering = False
    kept = memory.regions()[0]
    places = {
        "tables": [(queue.table, 16 * 32) for queue in guest.queues],
        "heads": [(queue.available, 6 + 64) for queue in guest.queues],
        "headers": [(kept.guest_address + (1 << 18), 1 << 19)],
    }[what]
    try:
        with flipping(memory, places, 1) as flips:
            for _ in range(100_000):
                if not world.device.running:
                    start_anew(world)
                busy(world, rng)
                world.device_turn()
                if flips[0] > 500_000:
                    break
            assert flips[0] > 500_000
        start_anew(world)
        guest.answering = True
        world.from_guest()
    finally:
        world.close()


# The control channel.


def test_g8_messages_that_make_no_sense_end_the_connection_and_a_new_one_works(world: World) -> None:
    _, far = world.from_guest()
    world.guest.front.send(messages.Request.SET_VRING_NUM, b"short")
    assert world.guest.front.hung_up() and end_of(far) == b"" and not world.channel.open
    world.guest.front.close()
    world.guest.reconnect(world.connection())
    world.settle()
    world.from_guest()


@pytest.mark.parametrize("number", [0, 3, 65535])
def test_g8_ring_sizes_that_cannot_be(number: int) -> None:
    world = World(start=False)
    try:
        world.guest.front.send(messages.Request.SET_VRING_NUM, messages.STATE.pack(0, number))
        assert world.guest.front.hung_up()
    finally:
        world.close()


def test_a_fourth_ring_is_refused() -> None:
    world = World(start=False)
    try:
        world.guest.front.send(messages.Request.SET_VRING_NUM, messages.STATE.pack(3, 128))
        assert world.guest.front.hung_up()
    finally:
        world.close()
