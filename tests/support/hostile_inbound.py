"""Attacks on where the guest receives (G1-G3, G5): each puts receive buffers in the ring, into which the device is then to write.

TAKEN: the frame arrives. DROPPED: it does not, and what was posted may come back. What the device must not write to holds 0xA5.
"""

from __future__ import annotations

import random
from typing import Final

from tests.support.hostile_nic import ANY, BROKEN, DROPPED, MAX32, TAKEN, Attack, Expected, Hostile
from tests.support.virtio_net import Feature
from tests.support.virtqueue import INDIRECT, NEXT, WRITE, Piece


def _fitting(rng: random.Random) -> list[int]:
    """Lengths of a buffer in which any ordinary frame has room."""
    return rng.choice([[1526], [12, 1514], [10, 2, 1514], [4096], [500, 500, 526]])


def outside(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, [1526])
    chain.bend(0, address=h.nowhere(rng, 1526))
    return h.post(chain, BROKEN)


def too_long_for_its_region(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, _fitting(rng))
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, length=rng.choice([MAX32, 1 << 31, 1 << 28]))
    return h.post(chain, BROKEN, disorder=True)


def read_only(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, _fitting(rng))
    for at in range(len(chain.pieces)):
        chain.bend(at, flags=chain.flags(at) & ~WRITE)
    return h.post(chain, BROKEN, DROPPED, disorder=True)


def partly_read_only(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, [500, 500, 526])
    at = rng.randrange(3)
    chain.bend(at, flags=chain.flags(at) & ~WRITE)
    return h.post(chain, BROKEN, DROPPED, disorder=True)


def empty(rng: random.Random, h: Hostile) -> Expected:
    """Nothing to write into, in one descriptor or several."""
    for _ in range(rng.randrange(1, 4)):
        expected = h.post(h.inbound(rng, [0] * rng.randrange(1, 3)), DROPPED, BROKEN)
    return expected


def smaller_than_a_header(rng: random.Random, h: Hostile) -> Expected:
    """Where buffers merge, several of them are one."""
    count = rng.randrange(1, 5)
    for _ in range(count):
        h.post(h.inbound(rng, [rng.randrange(1, h.nic.header_size)], indirect=False))
    return Expected((DROPPED, BROKEN))


def smaller_than_the_frame(rng: random.Random, h: Hostile) -> Expected:
    return h.post(h.inbound(rng, [h.nic.header_size + rng.randrange(60)]), DROPPED, BROKEN)


def of_one_octet_each(rng: random.Random, h: Hostile) -> Expected:
    """60 octets of a frame and its header, an octet per buffer, or per descriptor."""
    if h.nic.has(Feature.MRG_RXBUF):  # each must have room for the header (5.1.6.3.1), so what comes of it is open
        for _ in range(min(h.rx.room, 72)):
            h.post(h.inbound(rng, [1], indirect=False))
        return Expected(ANY, disorder=True)
    if h.rx.room < 72:
        return smaller_than_a_header(rng, h)
    return h.post(h.inbound(rng, [1] * 72), TAKEN)


def in_a_circle(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, rng.choice([[0, 0, 0], [1, 1, 1], [2000]]))
    back = rng.randrange(len(chain.indexes))
    last = len(chain.indexes) - 1
    chain.bend(last, flags=NEXT | WRITE, following=chain.indexes[back])
    return h.post(chain, BROKEN)


def next_outside(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, _fitting(rng))
    entries = len(chain.pieces) if chain.at else h.rx.size
    following = rng.choice([entries, 65535, rng.randrange(entries, 65536)])
    chain.bend(len(chain.pieces) - 1, flags=NEXT | WRITE, following=following)
    return h.post(chain, BROKEN)


def table_of_an_odd_size(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, _fitting(rng), indirect=True)
    size = 16 * len(chain.pieces)
    h.rx.describe(chain.heads[0], chain.at, rng.choice([0, 1, size + 1, size - 1]), INDIRECT, 0)
    return h.post(chain, BROKEN)


def head_outside(rng: random.Random, h: Hostile) -> Expected:
    h.rx.offer(rng.choice([h.rx.size, 0x8000, 0xFFFF]))
    return Expected((BROKEN,), disorder=True)


def index_jumps(rng: random.Random, h: Hostile) -> Expected:
    h.rx.next_available = (h.rx.used_index + rng.choice([h.rx.size + 1, 0x8000, 0xFFFF])) & 0xFFFF
    return Expected((BROKEN,), disorder=True)


def same_buffer_twice(rng: random.Random, h: Hostile) -> Expected:
    chain = h.inbound(rng, [1526])
    expected = h.post(chain, TAKEN, BROKEN, disorder=True)
    h.rx.offer(chain.heads[0])
    return expected


def over_the_rings(rng: random.Random, h: Hostile) -> Expected:
    """The buffer is the ring itself: the device writes where it was told to, and finds there what it wrote."""
    chain = h.inbound(rng, [1526], indirect=False)
    queue = rng.choice([h.rx, h.tx])
    at = rng.choice([queue.table, queue.available, queue.used])
    chain.bend(0, address=at, length=min(1526, 16 * queue.size if at == queue.table else 6 + 2 * queue.size))
    for _ in range(3):
        h.post(h.inbound(rng, [1526]))
    return h.post(chain, *ANY, disorder=True)


def all_over_the_same_memory(rng: random.Random, h: Hostile) -> Expected:
    address = h.memory.allocate(4096)
    pieces = [Piece(address, 4096, True)] * max(min(h.rx.room, 17), 1)
    chain = h.describe(rng, h.rx, pieces, b"", None)
    chain.pieces = pieces[:1]
    return h.post(chain, *ANY, disorder=True)


INBOUND: Final[tuple[Attack, ...]] = (
    outside,
    too_long_for_its_region,
    read_only,
    partly_read_only,
    empty,
    smaller_than_a_header,
    smaller_than_the_frame,
    of_one_octet_each,
    in_a_circle,
    next_outside,
    table_of_an_odd_size,
    head_outside,
    index_jumps,
    same_buffer_twice,
    over_the_rings,
    all_over_the_same_memory,
)
"""Attacks on where the guest receives."""
