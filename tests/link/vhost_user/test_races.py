"""Guest memory that changes while the device reads it (threats G4): another process flips octets of rings and frames."""

from __future__ import annotations

import random

import pytest

from tests.support.flipping import flipping
from tests.support.guest_memory import GuestMemory
from tests.support.vhost_bench import Bench
from tests.support.virtio_net import FULL, PLAIN
from tests.support.virtqueue import DeviceFault, QueueFull

from .conftest import MRG, MakeBench

FLIPS = 2_000_000
CHAINS = 12_000


def one_round(b: Bench, rng: random.Random, chains: int) -> None:
    """Frames both ways, as many as the ring takes; nobody looks at what came of them."""
    nic = b.nic
    for _ in range(chains):
        try:
            nic.send(rng.randbytes(rng.choice([60, 600])), pieces=rng.choice([None, [], [1, 20], [300]]), kick=False)
        except (QueueFull, DeviceFault):  # what the driver reads is not what the device wrote
            break
    nic.flush()
    b.take()
    for _ in range(chains):
        if b.link is None:
            return
        way = rng.randrange(4)
        frame = bytes(rng.choice([60, 1514]))
        if way < 2:
            b.give(frame, one=bool(way))
        else:
            b.give_by_room(frame, spare=rng.choice([0, 20_000]), native=way == 3)


def start_anew(b: Bench) -> None:
    """What the ring holds now may be anything, also nonsense of the last reset; then the hypervisor is told so and tries again."""
    for _ in range(100):
        b.nic.stop()
        b.nic.reset_rings()
        b.nic.start()
        if b.link is not None:
            return
    raise AssertionError("the device does not start any more")


@pytest.mark.parametrize("features", [PLAIN, PLAIN | MRG, FULL], ids=["nothing", "mergeable", "everything"])
@pytest.mark.parametrize("what", ["descriptors", "tables-and-frames", "heads", "indexes"])
def test_g4_memory_that_changes_while_it_is_read_breaks_nothing(bench: MakeBench, what: str, features: int) -> None:
    memory = GuestMemory([(0x100000, 16 << 20)])
    b = bench(features, memory=memory, size=64, buffers=32, buffer=2048)
    queues = b.nic.pairs[0].queues
    rings = {
        "descriptors": [(queue.table, 16 * queue.size) for queue in queues],
        "heads": [(queue.available + 4, 2 * queue.size) for queue in queues],
        "indexes": [(queue.available, 4) for queue in queues],
        # Everything allocated after the rings: indirect tables, headers and octets of frames.
        "tables-and-frames": [(queues[1].used + 4096, 1 << 18)],
    }
    rng = random.Random(12)
    done = broken = 0
    with flipping(memory, rings[what], 12) as flips:
        while done < CHAINS or flips[0] < FLIPS:
            for _ in range(10):
                one_round(b, rng, 8)
                done += 16
                if b.link is None:
                    broken += 1
                    break
            start_anew(b)
    assert done >= CHAINS and flips[0] >= FLIPS
    assert b.closed == []
    start_anew(b)
    b.nic.send(bytes(60), pieces=())
    assert b.take() == [bytes(60)]
