"""A back-end with a played machine on it for each test, and nothing of it left afterwards."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.vhost_bench import Bench, open_descriptors
from tests.support.virtio_net import CHECKSUMS, FULL, PLAIN, RINGS, SUPER_FRAMES, Feature

MRG = Feature.MRG_RXBUF.mask
SUBSETS = {
    "nothing": PLAIN,
    "legacy": 0,
    "legacy-mergeable": MRG,
    "legacy-rings": RINGS,
    "legacy-everything": FULL & ~PLAIN,
    "mergeable": PLAIN | MRG,
    "event-idx": PLAIN | Feature.EVENT_IDX.mask,
    "indirect": PLAIN | Feature.INDIRECT_DESC.mask,
    "checksums": PLAIN | CHECKSUMS,
    "big-buffers": PLAIN | CHECKSUMS | SUPER_FRAMES,
    "big-indirect-buffers": PLAIN | RINGS | CHECKSUMS | SUPER_FRAMES,
    "no-event-idx": FULL & ~Feature.EVENT_IDX.mask,
    "no-indirect": FULL & ~Feature.INDIRECT_DESC.mask,
    "no-mergeable": FULL & ~MRG,
    "no-offloads": FULL & ~CHECKSUMS & ~SUPER_FRAMES,
    "everything": FULL,
}
LONGEST_S = 60
MakeBench = Callable[..., Bench]


@pytest.fixture(autouse=True)
def endless_loops_end() -> Iterator[None]:
    """A device that is led in circles fails the test instead of stopping all of them."""

    def over(_number: int, _frame: object) -> None:
        raise AssertionError(f"not done after {LONGEST_S} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(LONGEST_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def bench() -> Iterator[MakeBench]:
    """Makes benches. After the test each is closed; then no descriptor is open that was not open before."""
    gc.collect()
    before = open_descriptors()
    made: list[Bench] = []

    def make(features: int = FULL, **options: Any) -> Bench:
        made.append(Bench(features, **options))
        return made[-1]

    yield make
    while made:
        made[-1].close()
        made.pop().memory.close()
    gc.collect()
    after = open_descriptors()
    assert after.keys() <= before.keys(), {fd: after[fd] for fd in after.keys() - before.keys()}
