"""Frames between a driver that keeps to the specification and the back-end, with every set of features."""

from __future__ import annotations

import random
from functools import partial

import pytest

from tests.support.guest_memory import GuestMemory
from tests.support.vhost_bench import Bench
from tests.support.virtio_net import (
    CHECKSUMS,
    FULL,
    GSO_TCPV4,
    NEEDS_CSUM,
    PLAIN,
    Feature,
    Header,
)
from tests.support.virtqueue import NEXT, Piece, QueueFull

from .conftest import MRG, SUBSETS, MakeBench

ROUNDS = 150
SPREAD = pytest.mark.parametrize("spread", [True, False], ids=["all-regions", "one-region"])
ALL = pytest.mark.parametrize("features", SUBSETS.values(), ids=SUBSETS)


def sizes(rng: random.Random, longest: int) -> int:
    """Octets of a frame, the edges more often than the rest."""
    return min(
        longest,
        rng.choice([14, 15, 60, 61, 500, 1513, 1514, 2035, 2036, 2037, longest, rng.randrange(14, longest + 1)]),
    )


def cuts(rng: random.Random, octets: int) -> list[int] | None:
    """How to cut a frame with its header into pieces; `None` is the header alone, then the rest."""
    kind = rng.randrange(5)
    if kind == 0:
        return None
    if kind == 1:
        return []
    if kind == 2:
        return [1] * rng.randrange(1, 20)
    return [rng.randrange(1, octets) for _ in range(rng.randrange(1, 9))]


def outbound(bench: Bench, rng: random.Random, batches: int) -> int:
    """Send batches of frames as the guest does; what arrives is compared. Returns the chains used."""
    nic = bench.nic
    before = nic.pairs[0].tx.completed
    longest = 1514
    for _ in range(batches):
        sent = []
        for _ in range(rng.choice([1, 1, 2, 7])):
            frame = rng.randbytes(sizes(rng, longest))
            try:
                nic.send(frame, pieces=cuts(rng, len(frame)), kick=False)
            except QueueFull:
                break
            sent.append(frame)
        nic.flush()
        assert bench.take() == sent
    nic.pairs[0].reclaim()
    assert not nic.pairs[0].tx.outstanding
    return nic.pairs[0].tx.completed - before


def inbound(bench: Bench, rng: random.Random, batches: int) -> int:
    """Frames to the guest in all ways a link takes them; they are compared. Returns the chains used."""
    nic = bench.nic
    before = nic.pairs[0].rx.completed
    for _ in range(batches):
        sent: list[bytes] = []
        for _ in range(rng.choice([1, 1, 2, 7])):
            frame = rng.randbytes(sizes(rng, 1514))
            way = rng.randrange(3)
            if way == 2:
                taken: int = bench.give_by_room(frame, spare=rng.choice([0, 0, 100, 60_000]), native=rng.random() < 0.5)
            else:
                taken = bench.give(frame, one=bool(way))
            if not taken:
                assert sent, "no room for a single frame"
                break
            sent.append(frame)
        received = nic.receive(called=True)
        assert [each.frame for each in received] == sent
    return nic.pairs[0].rx.completed - before


@SPREAD
@ALL
def test_frames_of_the_guest_arrive_octet_by_octet(bench: MakeBench, features: int, spread: bool) -> None:
    b = bench(features, spread=spread)
    assert outbound(b, random.Random(1), ROUNDS) > ROUNDS
    assert b.drops == 0 and not b.reasons


@SPREAD
@ALL
def test_frames_to_the_guest_arrive_octet_by_octet(bench: MakeBench, features: int, spread: bool) -> None:
    b = bench(features, spread=spread)
    assert inbound(b, random.Random(2), ROUNDS) > ROUNDS
    assert b.drops == 0 and not b.reasons


@SPREAD
@pytest.mark.parametrize("buffer", [64, 1526, 4096])
def test_frames_fill_as_many_buffers_as_they_need_and_the_header_says_how_many(
    bench: MakeBench, buffer: int, spread: bool
) -> None:
    b = bench(FULL, buffer=buffer, buffers=256, spread=spread)
    rng = random.Random(3)
    for octets in (14, 52, 53, 60, 1513, 1514, 1515, 4084, 4085, 9000):
        b.nic.mtu = 9000
        frame = rng.randbytes(octets)
        for give in (
            b.give,
            b.give_by_room,
            partial(b.give_by_room, spare=5000),
            partial(b.give_by_room, native=True),
            partial(b.give_by_room, spare=5000, native=True),
        ):
            assert give(frame) == 1
            (received,) = b.nic.receive(called=True)
            assert received.frame == frame
            assert received.buffers == -(-(octets + 12) // buffer)


@SPREAD
@pytest.mark.parametrize("mergeable", [True, False])
def test_super_frames_go_both_ways_with_their_header(bench: MakeBench, mergeable: bool, spread: bool) -> None:
    b = bench(FULL if mergeable else FULL & ~MRG, spread=spread)
    rng = random.Random(4)
    for octets in (1515, 4096, 16_000, 65_000, 54 + 45 * 1448):
        frame = rng.randbytes(octets)
        header = Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
        b.nic.send(frame, header, pieces=[12, *[4096] * (octets // 4096)])
        ((taken, arrived),) = b.take_with_headers()
        assert arrived == frame and taken[:6] == header[:6]
        assert b.give(frame, header=header) == 1
        assert b.give_by_room(frame, header)
        assert b.give_by_room(frame, header, native=True)
        for received in b.nic.receive(called=True):
            assert received.frame == frame and received.header[:6] == header[:6]


def test_a_frame_longer_than_the_room_waits_for_more_buffers(bench: MakeBench) -> None:
    b = bench(FULL, buffers=2)
    frame = random.Random(5).randbytes(20_000)
    header = Header(NEEDS_CSUM, GSO_TCPV4, 54, 1448, 34, 16)
    assert b.give(frame, header=header) == 0
    assert not b.nic.receive()
    pair = b.nic.pairs[0]
    for _ in range(4):
        pair.buffers.append([Piece(b.memory.allocate(4096), 4096, True)])
    pair.post()
    assert pair.kicked[0] > 1, "it waits, so it wants to be told"
    assert b.give(frame, header=header) == 1
    assert b.nic.receive()[0].frame == frame
    assert b.drops == 0


@pytest.mark.parametrize("features", [PLAIN, FULL], ids=["nothing", "everything"])
def test_without_buffers_nothing_is_taken_and_nothing_lost(bench: MakeBench, features: int) -> None:
    b = bench(features, buffers=4, size=4)
    frames = [bytes((number,)) * 60 for number in range(40)]
    at = 0
    received: list[bytes] = []
    while at < len(frames):
        taken = b.give(*frames[at:])
        assert taken <= 4
        if not taken:
            assert not b.give_by_room(frames[at])
        at += taken
        received += [each.frame for each in b.nic.receive()]
    assert received == frames


def test_drivers_own_layout_of_chains_does_not_matter(bench: MakeBench) -> None:
    """Descriptors first, then a table of more (2.7.5.3.2)."""
    b = bench(FULL)
    queue = b.nic.pairs[0].tx
    frame = random.Random(6).randbytes(700)
    octets = bytes(12) + frame
    addresses = []
    for at in range(0, len(octets), 100):
        addresses.append(b.memory.allocate(100))
        b.memory.write(addresses[-1], octets[at : at + 100])
    table = b.memory.allocate(16 * 6)
    for number, address in enumerate(addresses[2:]):
        last = number == len(addresses) - 3
        length = len(octets) - 100 * (len(addresses) - 1) if last else 100
        b.memory.pack("<QIHH", table + 16 * number, address, length, 0 if last else NEXT, number + 1)
    indexes = queue.take(3)
    queue.describe(indexes[0], addresses[0], 100, NEXT, indexes[1])
    queue.describe(indexes[1], addresses[1], 100, NEXT, indexes[2])
    queue.describe(indexes[2], table, 16 * (len(addresses) - 2), 4, 0)
    queue.expect(indexes[0], [], indexes)
    b.nic.flush()
    assert b.take() == [frame]
    b.nic.pairs[0].reclaim()


def test_a_buffer_may_lie_in_two_regions_that_meet(bench: MakeBench) -> None:
    memory = GuestMemory([(0x100000, 1 << 20), (0x200000, 1 << 20), (0x300000, 1 << 20)])
    for _ in memory.regions():
        memory.allocate(4096)  # where each begins
    b = bench(PLAIN, memory=memory, buffers=0)
    pair = b.nic.pairs[0]
    frame = random.Random(7).randbytes(1400)
    octets = bytes(12) + frame
    seam = 0x200000
    b.memory.write(seam - 100, octets[:100])
    b.memory.write(seam, octets[100:])
    index = pair.tx.add([Piece(seam - 100, len(octets), False)], [])
    b.nic.flush()
    assert index in pair.tx.outstanding
    assert b.take() == [frame]
    seam = 0x300000
    pair.rx.add([Piece(seam - 700, 1526, True)], [])
    pair.post()
    assert b.give(frame) == 1
    assert pair.rx.harvest() == [([], len(octets))]
    assert (memory.read(seam - 700, 700) + memory.read(seam, len(octets) - 700))[12:] == frame


@pytest.mark.parametrize("size", [1, 2, 64, 32768])
def test_indexes_of_rings_of_any_size_wrap(bench: MakeBench, size: int) -> None:
    b = bench(PLAIN | MRG | Feature.EVENT_IDX.mask, size=size, buffers=min(size, 8), first=65_000)
    for number in range(2000):
        frame = number.to_bytes(4, "big") * 5
        b.nic.send(frame, pieces=())
        assert b.take() == [frame]
        assert b.give(frame) == 1
        (received,) = b.nic.receive(called=True)
        assert received.frame == frame
    assert b.nic.pairs[0].tx.used_index == 67_000 & 0xFFFF
    assert not b.reasons and b.drops == 0


def test_looked_up_buffers_are_not_taken_for_those_a_round_of_the_index_later(bench: MakeBench) -> None:
    b = bench(FULL, buffers=64, size=64, spread=False)
    frame = random.Random(1).randbytes(1000)
    assert b.give_by_room(frame, native=True)
    b.nic.receive()
    given = 1
    while given < 65536 + 5:
        batch = [given.to_bytes(4, "big") * 15] * min(7, 65536 + 5 - given)
        assert b.give(*batch) == len(batch)
        assert [each.frame for each in b.nic.receive()] == batch
        given += len(batch)
    assert b.give_by_room(frame, native=True)
    assert b.nic.receive()[0].frame == frame
    assert b.give(*[bytes(60)] * 64) == 64
    assert len(b.nic.receive()) == 64


def test_every_pair_carries_frames_and_answers_leave_by_the_pair_the_question_came_by(bench: MakeBench) -> None:
    b = bench(FULL | Feature.MQ.mask, pairs=4, size=32, buffers=16)
    for number in range(4):
        guest_port = 50_000 + number
        question = bytes(12) + b"\x08\0" + bytes(20) + guest_port.to_bytes(2, "big") + b"\0\x50" + bytes(40)
        answer = bytes(12) + b"\x08\0" + bytes(20) + b"\0\x50" + guest_port.to_bytes(2, "big") + bytes(40)
        b.nic.send(question, pair=number)
        assert b.take() == [question]
        assert b.give(answer) == 1
        assert [len(b.nic.receive(pair)) for pair in range(4)] == [int(pair == number) for pair in range(4)]


@pytest.mark.parametrize("event_idx", [True, False])
def test_the_guest_is_called_when_it_wants_to_be_and_only_then(bench: MakeBench, event_idx: bool) -> None:
    b = bench(PLAIN | (Feature.EVENT_IDX.mask if event_idx else 0))
    pair = b.nic.pairs[0]
    pair.called(0), pair.called(1)
    pair.rx.want_calls(False)
    for _ in range(20):
        assert b.give(bytes(60)) == 1
        b.nic.send(bytes(60))
        b.take()
    assert len(b.nic.receive()) == 20
    assert pair.called(0) == pair.called(1) == 0
    pair.reclaim()
    pair.rx.want_calls(True)
    pair.tx.want_calls(True)
    for _ in range(20):
        b.nic.send(bytes(60))
        b.take()
        assert pair.called(1)
        pair.reclaim()
        assert b.give(bytes(60)) == 1
        assert len(b.nic.receive(called=True)) == 1


@pytest.mark.parametrize("event_idx", [True, False])
def test_a_guest_that_sends_is_told_not_to_kick_until_nothing_more_comes(bench: MakeBench, event_idx: bool) -> None:
    b = bench(PLAIN | (Feature.EVENT_IDX.mask if event_idx else 0))
    b.take()
    link = b.link
    assert link is not None
    b.nic.send(bytes(60), kick=False)
    assert b.nic.flush(), "it waits, so it wants to be told"
    assert len(link.receive()) == 1
    for _ in range(10):
        b.nic.send(bytes(60), kick=False)
        assert not b.nic.flush(), "it looks itself"
        assert link.busy
        link.publish()
        assert len(link.receive()) == 1
    link.publish()
    assert len(link.receive()) == 0
    b.nic.send(bytes(60), kick=False)
    assert b.nic.flush()
    assert b.take() == [bytes(60)]


def test_frames_with_offload_headers_arrive_with_them(bench: MakeBench) -> None:
    b = bench(PLAIN | CHECKSUMS)
    header = Header(NEEDS_CSUM, 0, 0, 0, 34, 16)
    b.nic.send(bytes(100), header)
    ((taken, _frame),) = b.take_with_headers()
    assert taken[:6] == header[:6]
    assert b.give(bytes(100), header=header) == 1
    assert b.nic.receive()[0].header[:6] == header[:6]


HONEST = 100_000


def test_a_hundred_thousand_honest_chains_of_every_kind(bench: MakeBench) -> None:
    rng = random.Random(8)
    chains = 0
    benches = [
        bench(features, buffers=24, size=64, buffer=2048, spread=spread)
        for features in SUBSETS.values()
        for spread in (True, False)
    ]
    while chains < HONEST:
        b = rng.choice(benches)
        chains += outbound(b, rng, 20) + inbound(b, rng, 20)
    assert chains >= HONEST
    assert all(b.drops == 0 and not b.reasons for b in benches)
