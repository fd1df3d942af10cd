"""The driver's half of a split virtqueue (virtio 1.2, 2.7), written from the specification, without the project's code.

    queue = DriverQueue(memory, 256, indirect=True, event_idx=True)
    queue.add([Piece(address, 12, False), Piece(other, 1500, False)], token="first")
    if queue.publish():
        kick()
    for token, written in queue.harvest(): ...

`harvest` believes nothing: what the device says it used must be what it was given, once, and no longer than it was.
Stores are in the order the device may see them: descriptors, ring entry, then the index; each 16-bit field in one store.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from tests.support.guest_memory import GuestMemory

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT: Final = 1
NO_NOTIFY: Final = 1
DESCRIPTOR: Final = struct.Struct("<QIHH")  # address, length, flags, next
T = TypeVar("T")


class DeviceFault(AssertionError):
    """The device broke the specification."""


class QueueFull(Exception):
    """No descriptors are left."""


class Piece(NamedTuple):
    """One buffer of a chain; `writable` by the device."""

    address: int
    length: int
    writable: bool


@dataclass(slots=True)
class _Outstanding(Generic[T]):
    token: T
    writable: int
    """Octets the device may write."""
    descriptors: list[int]
    table: int
    """Address of the indirect table, 0 without."""


class DriverQueue(Generic[T]):
    """See the module. Addresses are guest-physical."""

    def __init__(self, memory: GuestMemory, size: int, *, indirect: bool = False, event_idx: bool = False) -> None:
        self.memory = memory
        self.size = size
        self.indirect = indirect
        self.event_idx = event_idx
        self.table = memory.allocate(16 * size)
        self.available = memory.allocate(6 + 2 * size)
        self.used = memory.allocate(6 + 8 * size)
        self._table = memory.view(self.table, 16 * size)
        self._available = memory.view(self.available, 6 + 2 * size).cast("H")
        octets = memory.view(self.used, 6 + 8 * size)
        self._used = octets.cast("H")
        self._used_ring = octets[4 : 4 + 8 * size].cast("I")
        self._barrier = threading.Lock()
        self.calls_wanted = True
        self.reset()

    def reset(self, first: int = 0) -> None:
        """As after a reset of the device: nothing outstanding, all indexes 0 (or `first`). Indirect tables go back."""
        for outstanding in getattr(self, "outstanding", {}).values():
            if outstanding.table:
                self.memory.free(outstanding.table)
        self.outstanding: dict[int, _Outstanding[T]] = {}
        self._free = list(range(self.size - 1, -1, -1))
        self._table[:] = bytes(len(self._table))
        for ring in (self._available, self._used):
            ring[:] = memoryview(bytes(2 * len(ring))).cast("H")
        self._available[1] = self._used[1] = first
        self.next_available = first
        """Of the next chain, modulo 65536 (as is `next_used`)."""
        self.published = first
        self.next_used = first
        self.completed = 0
        """Chains the device gave back, ever."""
        self.want_calls(self.calls_wanted)

    # giving

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return len(self._free)

    def add(self, pieces: Sequence[Piece], token: T, *, indirect: bool | None = None) -> int:
        """Describe a chain and put it in the ring, unseen until `publish`; returns its head."""
        use_table = self.indirect and len(pieces) > 1 if indirect is None else indirect
        needed = 1 if use_table else len(pieces)
        if needed > len(self._free):
            raise QueueFull
        table = self.memory.allocate(16 * len(pieces)) if use_table else 0
        indexes = [self._free.pop() for _ in range(needed)]
        if use_table:
            self._describe(self.memory.view(table, 16 * len(pieces)), range(len(pieces)), pieces)
            DESCRIPTOR.pack_into(self._table, 16 * indexes[0], table, 16 * len(pieces), INDIRECT, 0)
        else:
            self._describe(self._table, indexes, pieces)
        writable = sum(piece.length for piece in pieces if piece.writable)
        self.outstanding[indexes[0]] = _Outstanding(token, writable, indexes, table)
        self.offer(indexes[0])
        return indexes[0]

    # by hand, for who has chains of another make

    @property
    def descriptors(self) -> memoryview:
        """The descriptor table."""
        return self._table

    def take(self, count: int) -> list[int]:
        """Numbers of free descriptors, which are nobody else's from now on."""
        if count > len(self._free):
            raise QueueFull
        return [self._free.pop() for _ in range(count)]

    def describe(self, index: int, address: int, length: int, flags: int, following: int) -> None:
        """One descriptor of the ring, as told."""
        DESCRIPTOR.pack_into(self._table, 16 * index, address, length, flags, following)

    def expect(self, head: int, token: T, indexes: list[int], *, writable: int = 0, table: int = 0) -> None:
        """Offer the chain at `head`; when it comes back its descriptors `indexes` and its indirect `table` are free."""
        self.outstanding[head] = _Outstanding(token, writable, indexes, table)
        self.offer(head)

    @staticmethod
    def _describe(table: memoryview, indexes: Sequence[int], pieces: Sequence[Piece]) -> None:
        last = len(pieces) - 1
        for number, (index, (address, length, writable)) in enumerate(zip(indexes, pieces, strict=True)):
            flags = (WRITE if writable else 0) | (NEXT if number < last else 0)
            DESCRIPTOR.pack_into(table, 16 * index, address, length, flags, indexes[number + 1] if number < last else 0)

    def offer(self, head: int) -> None:
        """A ring entry, whatever `head` is."""
        self._available[2 + self.next_available % self.size] = head
        self.next_available = (self.next_available + 1) & 0xFFFF

    def publish(self) -> bool:
        """Let the device see what was added; whether it wants to be told."""
        before, self.published = self.published, self.next_available
        self._available[1] = self.next_available
        with self._barrier:  # a full barrier between our store and the loads behind it (2.7.13.4.1)
            pass
        moved = (self.next_available - before) & 0xFFFF
        if self.event_idx:
            event = self._used[2 + 4 * self.size]
            return (self.next_available - event - 1) & 0xFFFF < moved
        return bool(moved) and not self._used[0] & NO_NOTIFY

    # taking back

    def want_calls(self, wanted: bool) -> None:
        """Ask for an interrupt at the next used chain, or for none."""
        self.calls_wanted = wanted
        self._available[0] = 0 if wanted or self.event_idx else NO_INTERRUPT
        self._available[2 + self.size] = (self.next_used if wanted else self.next_used - 1) & 0xFFFF
        with self._barrier:
            pass

    @property
    def used_index(self) -> int:
        """As the device has it."""
        return self._used[1]

    def waiting(self) -> int:
        """Chains the device gave back that were not harvested; raises `DeviceFault` when that cannot be."""
        count = (self._used[1] - self.next_used) & 0xFFFF
        if count > len(self.outstanding):
            raise DeviceFault(
                f"used.idx moved by {count} from {self.next_used}, {len(self.outstanding)} were outstanding"
            )
        return count

    def harvest(self) -> list[tuple[T, int]]:
        """Tokens and octets written of all chains that came back; asks for the next interrupt if they are wanted."""
        found: list[tuple[T, int]] = []
        while count := self.waiting():
            for _ in range(count):
                at = self.next_used % self.size * 2
                head, written = self._used_ring[at], self._used_ring[at + 1]
                outstanding = self.outstanding.pop(head, None)
                if outstanding is None:
                    raise DeviceFault(f"chain {head} came back, which the device does not have")
                if written > outstanding.writable:
                    raise DeviceFault(f"{written} octets written to chain {head} of {outstanding.writable}")
                self._free += outstanding.descriptors
                if outstanding.table:
                    self.memory.free(outstanding.table)
                found.append((outstanding.token, written))
                self.next_used = (self.next_used + 1) & 0xFFFF
            self.completed += count
            if self.calls_wanted:
                self.want_calls(True)
        if self._used[0] & ~NO_NOTIFY:
            raise DeviceFault(f"used.flags are {self._used[0]:#x}")
        return found
