"""A driver that breaks the rules on purpose (threats G1-G6): its hands, and what it expects.

    hostile = Hostile(nic)
    expected = rng.choice(OUTBOUND)(rng, hostile)    # it is in the transmit ring now
    nic.flush()                                      # the device looks at it

Attacks are functions of a seeded source, in `hostile_outbound` and `hostile_inbound`. Each returns what a device may make of it:
the frame arrives as `frame`, its chain comes back without the frame, or the device stops until its driver starts it anew. What it
may never do is raise, hang, read outside of the guest's memory, or write where it was not told to. After BROKEN, or where
`disorder` says that the driver's own books are wrong now, the machine has to be rebooted.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from tests.support.guest_memory import GuestMemory
from tests.support.virtio_net import NO_OFFLOAD, Feature, Header
from tests.support.virtio_nic import Nic, Pair
from tests.support.virtqueue import DESCRIPTOR, INDIRECT, NEXT, WRITE, DriverQueue, Piece

MAX32: Final = (1 << 32) - 1
TOP: Final = 1 << 64


class Verdict(Enum):
    TAKEN = "the frame goes on its way"
    DROPPED = "the frame is dropped, its chain comes back"
    BROKEN = "the device stops until its driver starts it anew"


TAKEN, DROPPED, BROKEN = Verdict.TAKEN, Verdict.DROPPED, Verdict.BROKEN
ANY: Final = (TAKEN, DROPPED, BROKEN)


@dataclass(frozen=True, slots=True)
class Expected:
    may: tuple[Verdict, ...]
    frame: bytes = b""
    """What arrives, if it does."""
    disorder: bool = False


@dataclass(slots=True)
class Chain:
    """A chain in the making: `indexes` of its descriptors in `table`, which is the ring's, or an indirect one at `at`."""

    indexes: list[int]
    table: memoryview
    pieces: list[Piece]
    frame: bytes
    heads: list[int]
    at: int = 0

    def bend(
        self,
        position: int,
        *,
        address: int | None = None,
        length: int | None = None,
        flags: int | None = None,
        following: int | None = None,
    ) -> None:
        """Change a descriptor that was right."""
        offset = 16 * self.indexes[position]
        values = list(DESCRIPTOR.unpack_from(self.table, offset))
        for number, value in enumerate((address, length, flags, following)):
            if value is not None:
                values[number] = value
        DESCRIPTOR.pack_into(self.table, offset, *values)

    def flags(self, position: int) -> int:
        return int(DESCRIPTOR.unpack_from(self.table, 16 * self.indexes[position])[2])


class Hostile:
    """Its hands: chains that are right at first. `which` pair it spoils."""

    def __init__(self, nic: Nic, which: int = 0) -> None:
        self.nic = nic
        self.memory: GuestMemory = nic.memory
        self.which = which

    @property
    def pair(self) -> Pair:
        return self.nic.pairs[self.which]

    @property
    def tx(self) -> DriverQueue[list[Piece]]:
        return self.pair.tx

    @property
    def rx(self) -> DriverQueue[list[Piece]]:
        return self.pair.rx

    def frame(self, rng: random.Random) -> bytes:
        return rng.randbytes(rng.choice([14, 60, 499, 500, 501, 600, 1514]))

    def outbound(
        self,
        rng: random.Random,
        *,
        octets: bytes | None = None,
        header: Header = NO_OFFLOAD,
        parts: int = 0,
        indirect: bool | None = None,
    ) -> Chain:
        """A chain with a frame (`octets` instead of header and frame), in `parts` pieces, not offered yet."""
        frame = b"" if octets is not None else self.frame(rng)
        octets = header.pack(self.nic.header_size) + frame if octets is None else octets
        parts = parts or rng.choice([1, 2, 2, 3, 5])
        # The first piece is at least the header of a length that leaves every piece an octet, where there are so many.
        cuts = sorted(rng.sample(range(1, len(octets)), min(parts, len(octets)) - 1)) if len(octets) > 1 else []
        pieces = []
        for begin, end in zip([0, *cuts], [*cuts, len(octets)], strict=True):
            address = self.memory.allocate(max(end - begin, 1))
            self.memory.write(address, octets[begin:end])
            pieces.append(Piece(address, end - begin, False))
        return self.describe(rng, self.tx, pieces, frame, indirect)

    def inbound(self, rng: random.Random, lengths: list[int], *, indirect: bool | None = None) -> Chain:
        """A receive buffer, filled with a pattern of its own."""
        pieces = []
        for length in lengths:
            address = self.memory.allocate(max(length, 1))
            self.memory.write(address, b"\xa5" * length)
            pieces.append(Piece(address, length, True))
        return self.describe(rng, self.rx, pieces, b"", indirect)

    def describe(
        self,
        rng: random.Random,
        queue: DriverQueue[list[Piece]],
        pieces: list[Piece],
        frame: bytes,
        indirect: bool | None,
    ) -> Chain:
        """Descriptors of these pieces, in the ring or (if that was agreed on) in a table."""
        if indirect is None:
            indirect = self.nic.has(Feature.INDIRECT_DESC) and rng.random() < 0.4
        if indirect:
            at = self.memory.allocate(16 * len(pieces))
            table = self.memory.view(at, 16 * len(pieces))
            indexes, heads = list(range(len(pieces))), queue.take(1)
            queue.describe(heads[0], at, 16 * len(pieces), INDIRECT, 0)
        else:
            at, table = 0, queue.descriptors
            indexes = heads = queue.take(len(pieces))
        for number, (index, piece) in enumerate(zip(indexes, pieces, strict=True)):
            last = number == len(pieces) - 1
            flags = (0 if last else NEXT) | (WRITE if piece.writable else 0)
            DESCRIPTOR.pack_into(
                table, 16 * index, piece.address, piece.length, flags, 0 if last else indexes[number + 1]
            )
        return Chain(indexes, table, pieces, frame, heads, at)

    def offer(self, chain: Chain, *may: Verdict, disorder: bool = False, frame: bytes | None = None) -> Expected:
        """Put it in the transmit ring; the books say that it comes back with nothing written."""
        self.tx.expect(chain.heads[0], chain.pieces, chain.heads, table=chain.at)
        return Expected(may, chain.frame if frame is None else frame, disorder)

    def post(self, chain: Chain, *may: Verdict, disorder: bool = False) -> Expected:
        """Put it in the receive ring."""
        writable = sum(piece.length for piece in chain.pieces)
        self.rx.expect(chain.heads[0], chain.pieces, chain.heads, writable=writable, table=chain.at)
        return Expected(may, b"", disorder)

    def nowhere(self, rng: random.Random, length: int) -> int:
        """An address from which not all of `length` octets are the guest's."""
        regions = self.memory.regions()
        ends = [region.guest_address + region.size for region in regions]
        starts = {region.guest_address for region in regions}
        end = rng.choice([end for end in ends if end not in starts])
        return rng.choice(
            [
                end,  # behind a region
                end - rng.randrange(length) if length > 1 else end,  # across its end
                max(ends) + rng.getrandbits(40),
                TOP - length - rng.randrange(1000),
                TOP - rng.randrange(1, length + 1),  # it wraps
                regions[0].user_address,  # a user address is none of the guest's
                rng.getrandbits(64) | 1 << 60,
            ]
        )


Attack = Callable[[random.Random, Hostile], Expected]
