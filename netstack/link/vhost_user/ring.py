"""A split virtqueue (virtio 1.2, 2.7), seen from the device. HOT PATH: everything but `SplitQueue.__init__` and `walk`.

Theory of operation. The driver puts heads of descriptor chains into the *available* ring and moves its index; the device takes
them in order, and puts each head and how much was written into the *used* ring. Here chains are used up in the order in which they
were made available, and what a batch used is shown by one store of the index (`publish`). So between two batches "used" is exactly
how far "available" was read, and whoever continues after a crash continues at the used index: nothing is lost, nothing is
completed twice.

Everything in shared memory may change at any time, so every word is read once, into a local, and only the local is looked at
afterwards. What cannot be raises `Broken`, and the device stops. Rings are read by whole slices where that saves calls: a batch of
heads is one `tolist`, an indirect table is copied and unpacked in one go, used entries are one slice assignment.

Who wants to be told of what (2.7.7, 2.7.10): the driver is told (`call`) when a batch passed the mark it set, or, without
`VIRTIO_F_EVENT_IDX`, unless it said that it does not want to be. We are told (the kick descriptor becomes readable) only after
`listen`; until then new entries are found by looking. On the order of memory accesses see `barrier`.
"""

from __future__ import annotations

import os
from array import array
from struct import Struct
from typing import Final

from netstack.link.vhost_user import barrier
from netstack.link.vhost_user.memory import Broken, GuestMemory
from netstack.link.vhost_user.messages import RingAddresses

DESCRIPTOR: Final = Struct("<QIHH")
"""Guest address, octets, flags, number of the next one."""
NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4
MAX_SIZE: Final = 32768
"""Entries of a ring (virtio 1.2, 2.7)."""
MAX_TABLE: Final = 1024
"""Entries of an indirect table that we look at; Linux makes 19 at most."""
NO_CALL: Final = 1
"""In the flags of the available ring: do not tell the driver of used buffers."""
NO_KICK: Final = 1
"""In the flags of the used ring: do not tell the device of available ones."""
_unpack: Final = DESCRIPTOR.unpack_from
_ONE: Final = (1).to_bytes(8, "little")


class SplitQueue:
    """One ring that runs, from the used index on. `next` is the number of the next available entry to take, modulo 2**16.

    Raises `Broken` when the addresses are in no memory or the ring is inconsistent from the start.
    """

    __slots__ = (
        "_addresses",
        "_available",
        "_event",
        "_first_free",
        "_indirect",
        "_lens",
        "_mask",
        "_memory",
        "_used",
        "_used_head",
        "_with_event",
        "call",
        "calls",
        "descriptors",
        "done",
        "high",
        "low",
        "next",
        "number",
        "region",
        "seen",
        "size",
        "taken_heads",
        "taken_lens",
        "total",
        "views",
    )

    def __init__(
        self,
        number: int,
        size: int,
        addresses: RingAddresses,
        memory: GuestMemory,
        *,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self.number = number
        self.size = size
        self._mask = size - 1
        self._with_event = event_idx
        self._indirect = indirect
        self.call = -1
        """Descriptor that tells the driver; -1 for none."""
        self.calls = 0
        """How often it was told."""
        self._addresses = addresses
        self.done: list[int] = []
        """Heads that are used up and not shown to the driver yet; not empty: `publish` has something to do."""
        self._lens: list[int] = []
        self.views: list[memoryview] = []
        self.taken_heads: list[int] = []
        self.taken_lens: list[int] = []
        """What `gather` found and `commit` has not used yet."""
        self.next = 0
        self._map(memory)
        self.next = self.seen = self._first_free = self._used_head[1]
        self.total = 0
        """How many chains were taken so far; `next` counts the same, but begins elsewhere and again."""
        if not barrier.SAFE:
            self._used_head[0] = 0

    def _map(self, memory: GuestMemory) -> None:
        at, size = self._addresses, self.size
        self.descriptors = memory.at_user_address(at.descriptors, 16 * size)
        self._available = memory.at_user_address(at.available, 6 + 2 * size).cast("H")
        used = memory.at_user_address(at.used, 6 + 8 * size)
        self._used_head = used[:4].cast("H")
        self._used = used[4 : 4 + 8 * size].cast("I")
        self._event = used[4 + 8 * size :].cast("H")
        """Where we say from which available entry on we want to be told."""
        self._memory = memory
        first = memory.regions[0]
        self.low, self.high, self.region = first.start, first.end, first.view

    def remap(self, memory: GuestMemory) -> None:
        """The memory table changed under the running ring. Raises `Broken` when the ring is in none of it."""
        self._map(memory)

    # What is available.

    def heads(self, most: int) -> list[int]:
        """Take the heads of at most `most` chains. Each is to be used up by `complete`."""
        count = min(self.waiting(), most)
        if not count:
            return []
        heads = self.heads_after(0, count)
        self.next = (self.next + count) & 0xFFFF
        self.total += count
        return heads

    def heads_after(self, skipped: int, count: int) -> list[int]:
        """The heads of `count` chains, which stay available, behind `skipped` others. There must be so many (`waiting`)."""
        size = self.size
        start = ((self.next + skipped) & self._mask) + 2
        stop = start + count
        available = self._available
        if stop <= size + 2:
            heads: list[int] = available[start:stop].tolist()
        else:
            heads = available[start : size + 2].tolist() + available[2 : stop - size].tolist()
        if max(heads) >= size:
            raise Broken(f"ring {self.number}: descriptor {max(heads)} of {size} was made available")
        return heads

    def waiting(self) -> int:
        """How many entries may be taken; looks at the driver's index again."""
        index = self._available[1]
        seen = self.seen
        if index != seen:
            # It moves forward only, and never further than there are entries that are not used up.
            if (index - seen) & 0xFFFF > self.size - ((seen - self._first_free) & 0xFFFF):
                self._jumped(index)
            self.seen = index
            barrier.ordered()
        return (index - self.next) & 0xFFFF

    def _jumped(self, index: int) -> None:
        raise Broken(
            f"ring {self.number}: the available index went from {self.seen} to {index}, where {self._first_free} is the used one "
            f"and {self.size} the size"
        )

    def listen(self, index: int) -> bool:
        """Be told when entries beyond `index` are available (`next`, or `seen` where those that are do not help). True when
        there are some already, which nobody will tell of."""
        if self._with_event:
            self._event[0] = index
        else:
            self._used_head[0] = 0
        barrier.full()
        return self._available[1] != index

    def hush(self) -> None:
        """Be told no more (with `VIRTIO_F_EVENT_IDX` nothing has to be done for it: the mark is passed once)."""
        if not self._with_event and barrier.SAFE:
            self._used_head[0] = NO_KICK

    # Chains.

    def walk(self, head: int, *, writable: bool) -> list[memoryview]:
        """The octets of a chain that is all for reading, or all for writing, in order."""
        readable, written = self.chain(head)
        if readable if writable else written:
            raise Broken(
                f"ring {self.number}: a descriptor that the device may {'only read' if writable else 'write'}, in a chain "
                f"that it is to {'write' if writable else 'read'}"
            )
        return written if writable else readable

    def chain(self, head: int) -> tuple[list[memoryview], list[memoryview]]:
        """What of a chain is for the device to read, and what for it to write. All of it is looked at, used or not: a driver that
        makes bad chains is stopped at the first one."""
        table: memoryview | bytes = self.descriptors
        low, high, region = self.low, self.high, self.region
        unpack = _unpack
        entries = self.size
        left = entries
        """How many descriptors there may be yet."""
        readable: list[memoryview] = []
        written: list[memoryview] = []
        index = head
        while True:
            address, octets, flags, following = unpack(table, index << 4)
            if flags & INDIRECT:
                table = self._indirect_table(address, octets, flags, table)
                left = entries = octets >> 4
                index = 0
                continue
            if octets:
                if flags & WRITE:
                    found = written
                elif written:
                    raise Broken(f"ring {self.number}: a descriptor to read behind one to write")
                else:
                    found = readable
                if low <= address and address + octets <= high:
                    found.append(region[address - low : address - low + octets])
                else:
                    found += self._memory.pieces(address, octets)
            if not flags & NEXT:
                return readable, written
            left -= 1
            if not left:
                raise Broken(f"ring {self.number}: a chain of more descriptors than there are")
            index = following
            if index >= entries:
                raise Broken(f"ring {self.number}: descriptor {index} of {entries} in a chain")

    def _indirect_table(self, address: int, octets: int, flags: int, table: memoryview | bytes) -> bytes:
        """A copy of the table that an indirect descriptor names."""
        if table is not self.descriptors or not self._indirect or flags & NEXT:
            raise Broken(f"ring {self.number}: an indirect descriptor where none may be")
        if octets & 15 or not 0 < octets <= MAX_TABLE * 16:
            raise Broken(f"ring {self.number}: an indirect table of {octets} octets")
        pieces = self._memory.pieces(address, octets)
        return bytes(pieces[0]) if len(pieces) == 1 else b"".join(pieces)

    def first(self) -> int:
        """The head of the next chain, which stays available. There must be one (`seen`, `waiting`)."""
        head: int = self._available[(self.next & self._mask) + 2]
        if head >= self.size:
            raise Broken(f"ring {self.number}: descriptor {head} of {self.size} was made available")
        return head

    # Room to write into, for frames over several buffers.

    def gather(self, octets: int, most: int = 1 << 30) -> int:
        """Look for `octets` octets of room in at most `most` of the next chains. How many there are, perhaps fewer, perhaps more;
        they are in `views`. Nothing is taken until `commit`."""
        available, descriptors, mask, size = self._available, self.descriptors, self._mask, self.size
        low, high, region = self.low, self.high, self.region
        unpack = _unpack
        heads: list[int] = []
        lens: list[int] = []
        views: list[memoryview] = []
        at = self.next
        left = (self.seen - at) & 0xFFFF or self.waiting()
        found = 0
        while left and most:
            head = available[(at & mask) + 2]
            if head >= size:
                raise Broken(f"ring {self.number}: descriptor {head} of {size} was made available")
            address, length, flags, _ = unpack(descriptors, head << 4)
            if flags == WRITE and low <= address and address + length <= high and length:
                views.append(region[address - low : address - low + length])
            else:
                chain = self.walk(head, writable=True)
                length = sum(map(len, chain))
                views += chain
            heads.append(head)
            lens.append(length)
            found += length
            if found >= octets:
                break
            at += 1
            most -= 1
            left -= 1
            if not left:
                left = self.waiting() - len(heads)
        self.views = views
        self.taken_heads = heads
        self.taken_lens = lens
        return found

    def commit(self, octets: int) -> int:
        """Use up as many of the gathered chains as `octets` octets fill; returns how many."""
        heads, lens = self.taken_heads, self.taken_lens
        count = len(heads)
        before = sum(lens) - lens[-1]
        while octets <= before and count > 1:
            count -= 1
            before -= lens[count - 1]
        self.use(heads[:count], lens[: count - 1], octets - before)
        return count

    def use(self, heads: list[int], lens: list[int], last: int) -> None:
        """Use up these next chains: `lens` octets in all but the last, `last` in that."""
        self.done += heads
        self._lens += lens
        self._lens.append(last)
        self.next = (self.next + len(heads)) & 0xFFFF
        self.total += len(heads)

    # What is used.

    def complete(self, heads: list[int]) -> None:
        """These were read to the end."""
        self.done += heads
        self._lens += [0] * len(heads)

    def used(self, head: int, octets: int) -> None:
        """One was, and `octets` octets written. For a chain that `heads` took."""
        self.done.append(head)
        self._lens.append(octets)

    def used_next(self, head: int, octets: int) -> int:
        """The same for the next one, which was only looked at (`first`). How many are used up and not shown yet."""
        self.next = (self.next + 1) & 0xFFFF
        self.total += 1
        self.done.append(head)
        self._lens.append(octets)
        return len(self.done)

    def publish(self) -> None:
        """Show the driver everything used since the last time, and tell it if it wants to know."""
        heads = self.done
        count = len(heads)
        if not count:
            return
        old = self._first_free
        start = old & self._mask
        used = self._used
        if count == 1:
            used[2 * start] = heads[0]
            used[2 * start + 1] = self._lens[0]
        else:
            entries = [0] * (2 * count)
            entries[::2] = heads
            entries[1::2] = self._lens
            first = min(count, self.size - start)
            used[2 * start : 2 * (start + first)] = array("I", entries[: 2 * first])
            if first < count:
                used[: 2 * (count - first)] = array("I", entries[2 * first :])
        self.done = []
        self._lens = []
        barrier.ordered()
        new = self._first_free = (old + count) & 0xFFFF
        self._used_head[1] = new
        barrier.full()
        if self._with_event and barrier.SAFE:
            mark = self._available[2 + self.size]
            if (new - mark - 1) & 0xFFFF >= count:
                return
        elif self._available[0] & NO_CALL and not self._with_event:
            return
        self.tell()

    def tell(self) -> None:
        """The driver's interrupt."""
        if self.call >= 0:
            self.calls += 1
            try:
                os.write(self.call, _ONE)
            except OSError:
                pass  # full of untold news already, or gone, which the control socket will say

    def drop_all(self) -> None:
        """Use up what is available without a look at it: a ring that is started but not enabled."""
        self.complete(self.heads(self.size))
        self.publish()
