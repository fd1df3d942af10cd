"""Drivers that break the rules (threats G1-G6, G11): nothing raises, hangs or leaks, and what is right still works."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.support.hostile_inbound import INBOUND
from tests.support.hostile_nic import ANY, BROKEN, DROPPED, TAKEN, Attack, Hostile, Verdict
from tests.support.hostile_outbound import AVAILABLE, DESCRIPTORS, FRAMES, OUTBOUND
from tests.support.vhost_bench import Bench
from tests.support.virtio_net import CHECKSUMS, FULL, PLAIN
from tests.support.virtqueue import Piece

from .conftest import SUBSETS, MakeBench

CHAINS = 100_000
KINDS = {
    "nothing": PLAIN,
    "legacy": 0,
    "checksums": PLAIN | CHECKSUMS,
    "no-offloads": SUBSETS["no-offloads"],
    "all": FULL,
}
each_kind = pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)


def name(attack: Attack) -> str:
    return attack.__name__


def send(b: Bench, rng: random.Random, attack: Attack, *, honest: bool = True) -> Verdict:
    """Between two honest frames comes an attack; what the back-end made of it, which must be one of what it may."""
    nic, hostile = b.nic, Hostile(b.nic)
    first, last = rng.randbytes(60), rng.randbytes(600)
    if honest:
        nic.send(first, pieces=(), kick=False)
    expected = attack(rng, hostile)
    if honest and not expected.disorder and hostile.tx.room > 1:
        nic.send(last, kick=False)
    else:
        last = b""
    drops, reasons = b.drops, len(b.reasons)
    nic.flush()
    frames = b.take()
    if b.link is None:
        verdict = BROKEN
        assert len(b.reasons) == reasons + 1 and len(b.reasons[-1]) > 20, b.reasons[-3:]
    elif expected.disorder:
        verdict = next(each for each in expected.may if each is not BROKEN)
        wanted = [first] * honest + [expected.frame] * 2
        assert frames == wanted or DROPPED in expected.may, f"{len(frames)} frames"
    else:
        around = [first] * honest, [last] * bool(last)
        verdict = DROPPED if frames == around[0] + around[1] else TAKEN
        if verdict is TAKEN:
            assert frames == [*around[0], expected.frame, *around[1]]
        assert b.drops - drops == (verdict is DROPPED)
        nic.pairs[0].reclaim()
        assert not hostile.tx.outstanding, "a chain did not come back"
    assert verdict in expected.may, f"{name(attack)}: {verdict}, {b.reasons[reasons:]}"
    if verdict is BROKEN or expected.disorder:
        reboot(b)
    return verdict


def reboot(b: Bench) -> None:
    """Whatever happened: a driver that starts anew has a device."""
    b.nic.reboot()
    assert b.link is not None
    b.nic.send(b"\2" * 60, pieces=())
    assert b.take() == [b"\2" * 60]


@each_kind
@pytest.mark.parametrize("attack", DESCRIPTORS + AVAILABLE, ids=name)
def test_g1_g2_g3_rings_that_cannot_be_stop_the_device_until_its_driver_starts_anew(
    bench: MakeBench, attack: Attack, features: int
) -> None:
    b = bench(features, size=64, buffers=4)
    for seed in range(60):
        send(b, random.Random(seed), attack, honest=attack.__name__ != "whole_ring_in_a_circle")
    assert b.closed == []


@each_kind
@pytest.mark.parametrize("attack", FRAMES, ids=name)
def test_g6_g11_a_bad_frame_costs_only_itself(bench: MakeBench, attack: Attack, features: int) -> None:
    b = bench(features, size=64, buffers=4)
    for seed in range(60):
        send(b, random.Random(seed), attack)
    assert b.reasons == [] and b.appeared == 1


def receive(b: Bench, rng: random.Random, attack: Attack) -> Verdict:
    """The guest's only receive buffers are an attack; a frame is for it."""
    nic, hostile = b.nic, Hostile(b.nic)
    frame = rng.randbytes(60)
    pair = nic.pairs[0]
    assert not pair.rx.outstanding
    expected = attack(rng, hostile)
    pieces = [piece for each in pair.rx.outstanding.values() for piece in each.token]
    if pair.rx.publish():
        pair.kick(0)
    reasons = len(b.reasons)
    way = rng.randrange(4)
    taken: int = b.give(frame, one=bool(way)) if way < 2 else b.give_by_room(frame, native=way == 3)
    if b.link is None:
        verdict = BROKEN
        assert len(b.reasons) == reasons + 1
    elif expected.disorder or TAKEN not in expected.may:
        verdict = TAKEN if TAKEN in expected.may and taken else DROPPED
    else:
        received = nic.receive()
        verdict = TAKEN if [each.frame for each in received] == [frame] else DROPPED
    assert verdict in expected.may, f"{name(attack)}: {verdict}, taken {taken}, {b.reasons[reasons:]}"
    if "read_only" in name(attack) and verdict is not TAKEN:
        assert all(set(b.memory.read(piece.address, piece.length)) == {0xA5} for piece in pieces)
    for piece in pieces:
        b.memory.free(piece.address)
    for each in pair.rx.outstanding.values():
        each.token = []
    pair.buffers = []
    b.nic.reboot()
    pair.buffers = []
    assert b.link is not None
    return verdict


@each_kind
@pytest.mark.parametrize("attack", INBOUND, ids=name)
def test_g5_receive_buffers_that_cannot_be_hurt_nobody_else(bench: MakeBench, attack: Attack, features: int) -> None:
    b = bench(features, size=128, buffers=0)
    for seed in range(40):
        receive(b, random.Random(seed), attack)
    assert b.closed == []


def test_g5_a_buffer_too_small_does_not_stand_in_the_way_of_the_next(bench: MakeBench) -> None:
    b = bench(PLAIN, buffers=0)
    pair = b.nic.pairs[0]
    small, large = Piece(b.memory.allocate(20), 20, True), Piece(b.memory.allocate(1526), 1526, True)
    pair.rx.add([small], [small])
    pair.rx.add([large], [large])
    pair.post()
    for _ in range(4):
        b.give(bytes(60))
    assert [(token, written) for token, written in pair.rx.harvest()] == [([small], 0), ([large], 72)]


def test_g1_to_g6_a_hundred_thousand_hostile_chains(bench: MakeBench) -> None:
    """Three in four are bad frames, which cost less time than a device that has to be started anew."""
    rng = random.Random(9)
    benches = [bench(features, size=64, buffers=4) for features in SUBSETS.values()]
    outcomes: Counter[Verdict] = Counter()
    attacks = [attack for attack in OUTBOUND if name(attack) != "whole_ring_in_a_circle"]
    for b in benches[::2]:
        b.nic.front.need_reply = False
    while outcomes.total() < CHAINS:
        b = rng.choice(benches)
        for _ in range(100):
            attack = rng.choice(attacks if rng.random() < 0.2 else FRAMES)
            outcomes[send(b, rng, attack, honest=rng.random() < 0.1)] += 1
    assert outcomes.total() >= CHAINS
    assert min(outcomes[each] for each in ANY) > CHAINS // 20
    assert all(b.closed == [] for b in benches)
