"""Attacks on what the guest sends: descriptors (G1, G2), the available ring (G3), frames and their headers (G5, G6, G11)."""

from __future__ import annotations

import random
import struct
from typing import Final

from tests.support.hostile_nic import ANY, BROKEN, DROPPED, MAX32, TAKEN, Attack, Chain, Expected, Hostile
from tests.support.virtio_net import (
    GSO_ECN,
    GSO_TCPV4,
    GSO_TCPV6,
    GSO_UDP,
    GSO_UDP_L4,
    NEEDS_CSUM,
    NO_OFFLOAD,
    Feature,
    Header,
)
from tests.support.virtqueue import INDIRECT, NEXT, WRITE, Piece

# G1, G2: descriptors


def address_outside(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, address=h.nowhere(rng, chain.pieces[at].length))
    return h.offer(chain, BROKEN)


def length_beyond_the_region(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, length=rng.choice([MAX32, 1 << 31, MAX32 - rng.randrange(4096), 1 << 28]))
    return h.offer(chain, BROKEN)


def length_zero(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, parts=1)
    chain.bend(0, length=0)
    return h.offer(chain, DROPPED, BROKEN)


def empty_descriptors_in_between(rng: random.Random, h: Hostile) -> Expected:
    octets = NO_OFFLOAD.pack(h.nic.header_size) + (frame := h.frame(rng))
    pieces = []
    for part in (b"", octets[:20], b"", octets[20:], b""):
        address = h.memory.allocate(max(len(part), 1))
        h.memory.write(address, part)
        pieces.append(Piece(address, len(part), False))
    return h.offer(h.describe(rng, h.tx, pieces, frame, None), TAKEN, BROKEN)


def next_outside(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    entries = len(chain.pieces) if chain.at else h.tx.size
    last = len(chain.pieces) - 1
    following = rng.choice([entries, entries + 1, 65535, rng.randrange(entries, 65536)])
    chain.bend(last, flags=NEXT, following=following)
    return h.offer(chain, BROKEN)


def loop(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    back = rng.randrange(len(chain.indexes))
    chain.bend(len(chain.pieces) - 1, flags=NEXT, following=chain.indexes[back])
    return h.offer(chain, BROKEN)


def whole_ring_in_a_circle(rng: random.Random, h: Hostile) -> Expected:
    """As long as the ring, then from the start: the most that a device may have to read before it knows."""
    queue = h.tx
    indexes = queue.take(max(queue.room, 1))
    rng.shuffle(indexes)
    address = h.memory.allocate(4096)
    for number, index in enumerate(indexes):
        queue.describe(index, address, rng.choice([0, 1, 4096]), NEXT, indexes[(number + 1) % len(indexes)])
    queue.expect(indexes[0], [Piece(address, 4096, False)], indexes)
    return Expected((BROKEN,))


def more_pieces_than_the_ring(rng: random.Random, h: Hostile) -> Expected:
    """In a table, without a loop (virtio 1.2, 2.7.5.3.1 forbids it to the driver)."""
    count = max(h.tx.size, 26) + rng.randrange(1, 64)
    address = h.memory.allocate(16)
    pieces = [Piece(address, 1, False)] * count
    h.memory.write(address, b"\0")
    chain = h.describe(rng, h.tx, pieces, bytes(count - h.nic.header_size), True)
    chain.pieces = pieces[:1]
    return h.offer(chain, *ANY)


def many_long_pieces(rng: random.Random, h: Hostile) -> Expected:
    """The same memory again and again, up to megabytes of a frame."""
    address = h.memory.allocate(1 << 16)
    pieces = [Piece(address, 1 << 16, False)] * rng.choice([2, 3, 17, 60])
    chain = h.describe(rng, h.tx, pieces, b"", None)
    chain.pieces = pieces[:1]
    return h.offer(chain, DROPPED, BROKEN)


def writable_to_send(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, flags=chain.flags(at) | WRITE)
    return h.offer(chain, BROKEN, DROPPED)


def unknown_descriptor_flags(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, flags=chain.flags(at) | rng.choice([8, 0x80, 0x8000, 0xFFF8]))
    return h.offer(chain, TAKEN, BROKEN)


def table_not_agreed_on(rng: random.Random, h: Hostile) -> Expected:
    return h.offer(h.outbound(rng, indirect=True), TAKEN if h.nic.has(Feature.INDIRECT_DESC) else BROKEN)


def _head(h: Hostile, chain: Chain, address: int, length: int, flags: int, following: int = 0) -> None:
    h.tx.describe(chain.heads[0], address, length, flags, following)


def table_of_an_odd_size(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, indirect=True)
    size = 16 * len(chain.pieces)
    _head(h, chain, chain.at, rng.choice([0, 1, 15, size + 1, size - 1, size + 8]), INDIRECT)
    return h.offer(chain, BROKEN)


def table_too_large(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, indirect=True)
    _head(h, chain, chain.at, rng.choice([1 << 24, 1 << 31, MAX32 & ~15]), INDIRECT)
    return h.offer(chain, BROKEN)


def table_outside(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, indirect=True)
    _head(h, chain, h.nowhere(rng, 16 * len(chain.pieces)), 16 * len(chain.pieces), INDIRECT)
    return h.offer(chain, BROKEN)


def table_not_aligned(rng: random.Random, h: Hostile) -> Expected:
    """No rule says where a table must begin; the octets are the same."""
    chain = h.outbound(rng, indirect=True)
    size = 16 * len(chain.pieces)
    at = h.memory.allocate(size + 16)
    shift = rng.randrange(1, 16)
    h.memory.write(at + shift, bytes(chain.table))
    chain.pieces.append(Piece(at, 0, False))
    _head(h, chain, at + shift, size, INDIRECT)
    return h.offer(chain, TAKEN if h.nic.has(Feature.INDIRECT_DESC) else BROKEN, BROKEN)


def table_in_a_table(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, indirect=True)
    at = rng.randrange(len(chain.pieces))
    chain.bend(at, address=chain.at, length=16 * len(chain.pieces), flags=INDIRECT)
    return h.offer(chain, BROKEN)


def table_and_more(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, indirect=True)
    _head(h, chain, chain.at, 16 * len(chain.pieces), INDIRECT | NEXT, chain.heads[0])
    return h.offer(chain, BROKEN)


# G3: the available ring


def index_jumps(rng: random.Random, h: Hostile) -> Expected:
    step = rng.choice([h.tx.size + 1, 0x8000, 0xFFFF, rng.randrange(h.tx.size + 1, 0x10000)])
    h.tx.next_available = (h.tx.used_index + step) & 0xFFFF
    return Expected((BROKEN,), disorder=True)


def index_goes_back(rng: random.Random, h: Hostile) -> Expected:
    h.tx.next_available = (h.tx.used_index - rng.randrange(1, h.tx.size + 1)) & 0xFFFF
    return Expected((BROKEN,), disorder=True)


def head_outside(rng: random.Random, h: Hostile) -> Expected:
    h.tx.offer(rng.choice([h.tx.size, h.tx.size + 1, 0x8000, 0xFFFF, rng.randrange(h.tx.size, 0x10000)]))
    return Expected((BROKEN,), disorder=True)


def same_head_twice(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng)
    expected = h.offer(chain, TAKEN, BROKEN, disorder=True)
    h.tx.offer(chain.heads[0])
    return expected


def stale_entries(rng: random.Random, h: Hostile) -> Expected:
    """The index moves by less than the ring, over whatever entries are there from before."""
    for _ in range(rng.randrange(1, min(h.tx.size, 8) + 1)):
        h.tx.next_available = (h.tx.next_available + 1) & 0xFFFF
    return Expected(ANY, disorder=True)


# G5, G6, G11: frames


def short_chain(rng: random.Random, h: Hostile) -> Expected:
    """Not even a header, or no Ethernet header behind it."""
    octets = bytes(rng.randrange(1, h.nic.header_size + 14))
    return h.offer(h.outbound(rng, octets=octets), DROPPED)


def pieces_of_one_octet(rng: random.Random, h: Hostile) -> Expected:
    frame = rng.randbytes(rng.randrange(14, 40))
    octets = bytes(h.nic.header_size) + frame
    if len(octets) > h.tx.room:
        return short_chain(rng, h)
    return h.offer(h.outbound(rng, octets=octets, parts=len(octets)), TAKEN, frame=frame)


def frame_too_long(rng: random.Random, h: Hostile) -> Expected:
    """Longer than any that was agreed on: an IP packet has 65,535 octets at most, and without offloads the MTU's."""
    offloads = h.nic.has(Feature.HOST_TSO4) or h.nic.has(Feature.HOST_TSO6) or h.nic.has(Feature.HOST_USO)
    least = 65535 + 40 if offloads and h.nic.has(Feature.CSUM) else h.nic.mtu + 18
    octets = rng.randrange(least + 1, least + 10_000)
    address = h.memory.allocate(1 << 16)
    h.memory.write(address, bytes(16))
    whole, rest = divmod(octets + h.nic.header_size, 1 << 16)
    pieces = [Piece(address, 1 << 16, False)] * whole + [Piece(address, rest, False)] * bool(rest)
    chain = h.describe(rng, h.tx, pieces, b"", None)
    chain.pieces = pieces[:1]
    return h.offer(chain, DROPPED)


def wild_header(rng: random.Random, h: Hostile) -> Expected:
    """Noise: whatever it says, no offload field reaches beyond the frame."""
    header = Header._make(struct.unpack("<BBHHHHH", rng.randbytes(12)))
    return h.offer(h.outbound(rng, header=header), TAKEN, DROPPED)


def checksum_outside(rng: random.Random, h: Hostile) -> Expected:
    octets = 14
    start, offset = rng.choice([(65535, 65535), (octets, 65535), (65535, 0), (2000, 16), (0, 65535), (34, 1514)])
    return h.offer(h.outbound(rng, header=Header(NEEDS_CSUM, csum_start=start, csum_offset=offset)), DROPPED)


def checksum_not_agreed_on(rng: random.Random, h: Hostile) -> Expected:
    chain = h.outbound(rng, octets=Header(NEEDS_CSUM, csum_start=34, csum_offset=6).pack(h.nic.header_size) + bytes(60))
    may = TAKEN if h.nic.has(Feature.CSUM) else DROPPED
    return h.offer(chain, may, frame=bytes(60))


def segmentation_of_no_known_kind(rng: random.Random, h: Hostile) -> Expected:
    known = {0, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4}
    kind = rng.choice([kind for kind in range(256) if kind & ~GSO_ECN not in known])
    return h.offer(h.outbound(rng, header=Header(NEEDS_CSUM, kind, 54, 1448, 34, 16)), DROPPED)


def segmentation_not_agreed_on(rng: random.Random, h: Hostile) -> Expected:
    needs = {GSO_TCPV4: Feature.HOST_TSO4, GSO_TCPV6: Feature.HOST_TSO6, GSO_UDP_L4: Feature.HOST_USO}
    kind = rng.choice([GSO_UDP, *needs])
    agreed = kind in needs and h.nic.has(needs[kind]) and h.nic.has(Feature.CSUM)
    octets = Header(NEEDS_CSUM, kind, 54, 1448, 34, 16).pack(h.nic.header_size) + bytes(200)
    return h.offer(h.outbound(rng, octets=octets), TAKEN if agreed else DROPPED, frame=bytes(200))


def segments_of_a_strange_size(rng: random.Random, h: Hostile) -> Expected:
    size = rng.choice([0, 1, 65535])
    octets = Header(NEEDS_CSUM, GSO_TCPV4, 54, size, 34, 16).pack(h.nic.header_size) + bytes(200)
    agreed = h.nic.has(Feature.HOST_TSO4) and h.nic.has(Feature.CSUM) and size
    return h.offer(h.outbound(rng, octets=octets), *((TAKEN, DROPPED) if agreed else (DROPPED,)), frame=bytes(200))


def segmentation_without_checksum(rng: random.Random, h: Hostile) -> Expected:
    return h.offer(h.outbound(rng, header=Header(0, GSO_TCPV4, 54, 1448, 34, 16)), DROPPED)


def unknown_header_flags(rng: random.Random, h: Hostile) -> Expected:
    """5.1.6.2.2 has the device ignore them; to drop the frame is what a careful one does."""
    header = Header(rng.choice([2, 4, 8, 0x80, 0xFE]))
    return h.offer(h.outbound(rng, header=header), TAKEN, DROPPED)


DESCRIPTORS: Final[tuple[Attack, ...]] = (
    address_outside,
    length_beyond_the_region,
    length_zero,
    empty_descriptors_in_between,
    next_outside,
    loop,
    whole_ring_in_a_circle,
    more_pieces_than_the_ring,
    many_long_pieces,
    writable_to_send,
    unknown_descriptor_flags,
    table_not_agreed_on,
    table_of_an_odd_size,
    table_too_large,
    table_outside,
    table_not_aligned,
    table_in_a_table,
    table_and_more,
)
AVAILABLE: Final[tuple[Attack, ...]] = (index_jumps, index_goes_back, head_outside, same_head_twice, stale_entries)
FRAMES: Final[tuple[Attack, ...]] = (
    short_chain,
    pieces_of_one_octet,
    frame_too_long,
    wild_header,
    checksum_outside,
    checksum_not_agreed_on,
    segmentation_of_no_known_kind,
    segmentation_not_agreed_on,
    segments_of_a_strange_size,
    segmentation_without_checksum,
    unknown_header_flags,
)
OUTBOUND: Final = DESCRIPTORS + AVAILABLE + FRAMES
"""Attacks on what the guest sends."""
