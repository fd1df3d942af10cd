"""The bad wire does what it is told, and the same again for the same seed (F23)."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Link
from netstack.link.faults import Faults, FaultyLink
from tests.support.link import MemoryLink

from .conftest import frame

PERFECT = Faults()


class Wire:
    def __init__(self, faults: Faults, seed: int = 1) -> None:
        self.now = 0.0
        self.inner = MemoryLink()
        self.link = FaultyLink(
            self.inner, outbound=faults, inbound=faults, rng=random.Random(seed), clock=lambda: self.now
        )

    def outbound(self, count: int, size: int = 100) -> list[bytes]:
        for number in range(count):
            self.inner.feed(frame(number, size))
        got: list[bytes] = []
        for _ in range(count):
            got += [bytes(view) for view in self.link.receive()]
        while (deadline := self.link.deadline()) is not None:
            self.now = deadline
            got += [bytes(view) for view in self.link.receive()]
        return got

    def inbound(self, count: int, size: int = 100) -> list[bytes]:
        assert self.link.send([(frame(number, size),) for number in range(count)]) == count
        while (deadline := self.link.deadline()) is not None:
            self.now = deadline
            self.link.flush()
        return list(self.inner.sent)


def test_a_perfect_wire_changes_nothing() -> None:
    wire = Wire(PERFECT)
    assert isinstance(wire.link, Link)
    assert wire.outbound(50) == [frame(number, 100) for number in range(50)]
    assert wire.inbound(50) == [frame(number, 100) for number in range(50)]


def test_loss_duplicates_and_damage_come_about_as_often_as_asked() -> None:
    count = 2000
    good = [frame(number, 100) for number in range(count)]
    assert abs(len(Wire(Faults(loss=0.1)).outbound(count)) - 0.9 * count) < 0.03 * count
    assert abs(len(Wire(Faults(duplicate=0.1)).inbound(count)) - 1.1 * count) < 0.03 * count
    damaged = Wire(Faults(corrupt=0.1)).inbound(count)
    changed = [(was, now) for was, now in zip(good, damaged, strict=True) if was != now]
    assert abs(len(changed) - 0.1 * count) < 0.03 * count
    for was, now in changed:
        assert (int.from_bytes(was) ^ int.from_bytes(now)).bit_count() == 1


def test_delay_and_jitter_keep_the_order() -> None:
    wire = Wire(Faults(delay_s=0.05, jitter_s=0.02))
    assert wire.inbound(100) == [frame(number, 100) for number in range(100)]
    assert 0.05 <= wire.now <= 0.07


def test_reordering_loses_nothing() -> None:
    got = Wire(Faults(reorder=0.2, delay_s=0.001)).outbound(200)
    assert got != [frame(number, 100) for number in range(200)]
    assert sorted(got) == sorted(frame(number, 100) for number in range(200))


@given(
    seed=st.integers(0, 2**32),
    faults=st.builds(
        Faults,
        loss=st.floats(0, 0.5),
        duplicate=st.floats(0, 0.5),
        reorder=st.floats(0, 0.5),
        corrupt=st.floats(0, 0.5),
        jitter_s=st.floats(0, 0.1),
    ),
)
def test_the_same_seed_gives_the_same_wire(seed: int, faults: Faults) -> None:  # P7
    assert Wire(faults, seed).outbound(30) == Wire(faults, seed).outbound(30)


def test_a_peer_that_does_not_read_gets_its_frames_later_in_order() -> None:
    wire = Wire(PERFECT)
    wire.inner.room = 10
    assert wire.link.send([(frame(number),) for number in range(30)]) == 30
    assert not wire.link.flush()
    wire.inner.room = None
    assert wire.link.flush()
    assert list(wire.inner.sent) == [frame(number) for number in range(30)]
