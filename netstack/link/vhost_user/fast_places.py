"""Room in the guest's own buffers, the short way: `struct iovec`s ready for the kernel. HOT PATH.

`Place` (`places`) makes a view of each buffer, and Python's `recvmsg_into` takes each view apart again; for the sixteen buffers
of a frame that is most of what Python does for it. Here what a descriptor comes to is remembered: the same buffers come back
again and again, so the first 14 octets of a descriptor (address, length, flags) lead by one look-up to the `struct iovec` that
was made, and checked, the first time. New entries of the available ring are looked up when they are seen, by a few loops in C,
into one array; a frame is a piece of it, and `recvmsg` is called by its address.

For what is usual only: buffers of one descriptor each, and a socket of the kernel's to read from. `find` says when it is not, and
`Place` does it, and says what is wrong.
"""

from __future__ import annotations

import ctypes
from array import array
from bisect import bisect_left
from itertools import accumulate
from struct import Struct
from typing import Any, Final

from netstack.link.vhost_user.memory import GuestMemory
from netstack.link.vhost_user.places import BUFFERS_AT, SHOWN
from netstack.link.vhost_user.ring import WRITE, SplitQueue

REMEMBERED: Final = 4096
"""Buffers of a guest that are remembered; then all are forgotten, and the next ones are looked up anew."""
_IOV_MAX: Final = 1024
_ENTRY: Final = 16
_KEY: Final = 14
_descriptor: Final = Struct("<QIH").unpack
_iovec: Final = Struct("<QQ").pack
_iovec_into: Final = Struct("<QQ").pack_into
_u64_from: Final = Struct("<Q").unpack_from
_u64_into: Final = Struct("<Q").pack_into
_u16_into: Final = Struct("<H").pack_into


class FastPlace:
    """Room in the buffers of one ring; see `netstack.api.Room`. There is one for each ring, used again and again."""

    __slots__ = (
        "_address",
        "_array",
        "_base",
        "_begin",
        "_ends",
        "_heads",
        "_held",
        "_known",
        "_lead",
        "_lens",
        "_message",
        "_message_address",
        "_queue",
        "_region",
        "_spare",
        "_stop",
        "at",
        "buffer",
        "octets",
    )

    def __init__(self, queue: SplitQueue, memory: GuestMemory) -> None:
        first = memory.regions[0]
        self.buffer: memoryview = first.view
        self._region = first.start, first.end
        self._held = first.address
        """Where the region is in this process."""
        self._queue = queue
        self._known: dict[bytes, bytes] = {}
        self._base = queue.total
        """The queue's `total` at the first entry of the lists."""
        self._heads: list[int] = []
        self._lens: list[int] = []
        self._ends: list[int] = []
        """Sums of `_lens`."""
        self._array = bytearray(_ENTRY * 2 * queue.size)
        """A `struct iovec` for each entry of the lists."""
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._array))
        self._message = bytearray(56)
        """A `struct msghdr` of 64-bit Linux: its third and fourth word are the array and its length."""
        self._message_address = ctypes.addressof(ctypes.c_char.from_buffer(self._message))
        self._begin = self._stop = self._lead = self._spare = 0
        self.octets = 0
        self.at = 0

    def _look(self) -> bool:
        """Look up what became available; False when nothing did, or something unusual. Raises `Broken`."""
        queue = self._queue
        done, count = queue.total - self._base, len(self._heads)
        if done >= count or count > queue.size:
            # What is used up is of no interest any more.
            del self._heads[:done], self._lens[:done]
            self._ends = list(accumulate(self._lens))
            self._array[: _ENTRY * max(count - done, 0)] = self._array[_ENTRY * done : _ENTRY * count]
            self._base = queue.total
            done, count = 0, max(count - done, 0)
        fresh = queue.waiting() - (count - done)
        if fresh <= 0:
            return False
        heads = queue.heads_after(count - done, fresh)
        table = bytes(queue.descriptors)
        keys = [table[at : at + _KEY] for at in [head << 4 for head in heads]]
        known = self._known
        try:
            iovecs = b"".join(map(known.get, keys))  # type: ignore[arg-type]
        except TypeError:  # not all are known
            found = [known.get(key) or self._learn(key) for key in keys]
            if None in found:
                return False
            iovecs = b"".join(found)  # type: ignore[arg-type]
        self._array[_ENTRY * count : _ENTRY * (count + fresh)] = iovecs
        lens = array("Q", iovecs)[1::2].tolist()
        self._heads += heads
        self._lens += lens
        self._ends += accumulate(lens[1:], initial=(self._ends[-1] if count else 0) + lens[0])
        return True

    def _learn(self, key: bytes) -> bytes | None:
        """The `struct iovec` of what a descriptor comes to; None for one that is not usual."""
        address, octets, flags = _descriptor(key)
        start, end = self._region
        if flags != WRITE or not octets or address < start or address + octets > end:
            return None
        if len(self._known) >= REMEMBERED:
            self._known.clear()
        found = self._known[key] = _iovec(self._held + address - start, octets)
        return found

    def find(self, octets: int, lead: int) -> bool:
        """Room for a frame of up to `octets` octets, the first `lead` of them headers; False where it must be looked for in the
        general way. Raises `Broken`."""
        begin = self._queue.total - self._base
        ends, lens = self._ends, self._lens
        if begin >= len(ends) or ends[-1] - ends[begin] + lens[begin] < octets:
            self._look()
            begin = self._queue.total - self._base
            ends, lens = self._ends, self._lens
            if begin >= len(ends):
                return False
        first = lens[begin]
        if first <= lead:
            return False
        before = ends[begin] - first
        stop = min(bisect_left(ends, before + octets, begin), len(ends) - 1, begin + _IOV_MAX - 1)
        room = ends[stop] - before
        self._begin, self._stop, self._lead, self._spare = begin, stop, lead, max(room - octets, 0)
        self.at = _u64_from(self._array, _ENTRY * begin)[0] - self._held
        self.octets = min(room, octets)
        return True

    def read(self, source: Any, offset: int) -> int | None:
        begin, stop, lead, iovecs, lens = self._begin, self._stop, self._lead, self._array, self._lens
        address = self._held + self.at
        # The last is cut off where the frame ends, and the first begins behind the headers; afterwards they are whole again.
        _u64_into(iovecs, _ENTRY * stop + 8, lens[stop] - self._spare)
        first = lens[begin] if begin != stop else lens[begin] - self._spare
        _iovec_into(iovecs, _ENTRY * begin, address + lead, first - lead)
        _iovec_into(self._message, 16, self._address + _ENTRY * begin, stop - begin + 1)
        try:
            count: int | None = source.read_message(offset, self._message_address)
        finally:
            _u64_into(iovecs, _ENTRY * stop + 8, lens[stop])
            _iovec_into(iovecs, _ENTRY * begin, address, lens[begin])
        return count

    def write(self, octets: memoryview) -> None:
        self.buffer[self.at : self.at + len(octets)] = octets

    def sent(self, octets: int) -> None:
        begin, stop = self._begin, self._stop
        lens, ends, queue = self._lens, self._ends, self._queue
        if octets < self.octets:
            stop = bisect_left(ends, ends[begin] - lens[begin] + octets, begin, stop)
        last = octets - (ends[stop] - lens[stop] - (ends[begin] - lens[begin]))
        queue.use(self._heads[begin : stop + 1], lens[begin:stop], last)
        if stop > begin:
            _u16_into(self.buffer, self.at + BUFFERS_AT, stop - begin + 1)
            if len(queue.done) >= queue.size // SHOWN:
                queue.publish()
