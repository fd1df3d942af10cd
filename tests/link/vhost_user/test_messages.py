"""Front-ends that break the protocol (threats G7-G9): refused or hung up on, nothing kept, and the next one is served."""

from __future__ import annotations

import gc
import random
from collections import Counter
from contextlib import closing

import pytest

from tests.support.hostile_front import MESSAGES, Attack, Rogue, memory_added_again_and_again, noise
from tests.support.vhost_bench import Bench, count_descriptors
from tests.support.vhost_front import U64, Disconnected, FrontEnd, NoReply

from .conftest import MakeBench

TOTAL = 10_000


def outcome(front: FrontEnd) -> str:
    """What the back-end made of what was sent to it: "closed", "refused", "accepted" or "silent"."""
    last = b""
    while True:
        if front.hung_up():
            return "closed"
        if front.silent():
            break
        reply = front.receive()
        reply.close()
        last = reply.payload or b"\1"
    if not last:
        return "silent"
    return "refused" if len(last) == 8 and U64.unpack(last)[0] == 1 else "accepted"


def works(b: Bench) -> None:
    frame = random.randbytes(60)
    b.nic.send(frame)
    assert b.take() == [frame]
    assert b.give(frame) == 1
    assert b.nic.receive()[-1].frame == frame


def strike(b: Bench, rng: random.Random, rogue: Rogue, attack: Attack) -> str:
    """One attack on a device that runs; afterwards it still runs, or runs again for the next front-end."""
    rogue.front = b.nic.front
    must = True
    try:
        must = attack(rng, rogue)
        result = outcome(rogue.front)
    except Disconnected:
        result = "closed"
    except NoReply:
        result = "silent"
    if must:
        assert result in ("closed", "refused"), f"{attack.__name__} is {result}"
    if result == "refused" and must and attack is not memory_added_again_and_again:
        assert b.link is not None, f"{attack.__name__} was refused, and ended the link"
    else:
        b.reconnect()
    works(b)
    return result


@pytest.mark.parametrize("acknowledged", [True, False], ids=["with-replies", "without-replies"])
@pytest.mark.parametrize("attack", MESSAGES, ids=lambda attack: attack.__name__)
def test_g7_g8_g9_is_refused_and_leaves_nothing(bench: MakeBench, attack: Attack, acknowledged: bool) -> None:
    b = bench(buffers=4, size=16)
    with closing(Rogue(b.nic.front, b.memory)) as rogue:
        works(b)
        gc.collect()
        before = count_descriptors()
        for seed in range(30):
            b.nic.front.need_reply = acknowledged
            strike(b, random.Random(seed), rogue, attack)
        gc.collect()
        assert count_descriptors() == before


@pytest.mark.parametrize("attack", MESSAGES, ids=lambda attack: attack.__name__)
def test_g7_g8_g9_is_refused_before_anything_was_agreed_on(bench: MakeBench, attack: Attack) -> None:
    b = bench(start=False)
    with closing(Rogue(b.nic.front, b.memory)) as rogue:
        for seed in range(10):
            try:
                must = attack(random.Random(seed), rogue)
                rogue.front.settle()
            except Disconnected:
                must = True
            if must:
                assert rogue.front.hung_up()
            rogue.front.close()
            b.peer.readable()
            assert not b.peer.open
            b.nic.front = rogue.front = b.connect()


def test_g7_g8_g9_ten_thousand_hostile_messages(bench: MakeBench) -> None:
    b = bench(buffers=4, size=16)
    rng = random.Random(10)
    outcomes: Counter[str] = Counter()
    with closing(Rogue(b.nic.front, b.memory)) as rogue:
        works(b)
        gc.collect()
        before = count_descriptors()
        while outcomes.total() < TOTAL:
            attack = rng.choice(MESSAGES) if rng.random() < 0.6 else noise
            if attack is memory_added_again_and_again and rng.random() < 0.9:
                continue
            b.nic.front.need_reply = rng.random() < 0.7
            outcomes[strike(b, rng, rogue, attack)] += 1
        gc.collect()
        assert count_descriptors() == before
    assert min(outcomes[each] for each in ("closed", "refused", "accepted")) > TOTAL // 100
