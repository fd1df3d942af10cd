"""Room in the guest's own buffers, for frames that are made there. HOT PATH.

`Pieces` is the general way: views, chain by chain. `Places` is the short one, for what is usual:

A frame of 64 KiB fills sixteen buffers of 4 KiB, and to look each of them up, check it and make a view of it costs more than
all else about the frame. So everything that the guest has made available is looked up at once (`_resolve`: some twenty calls of
numpy for up to a ring of buffers), and a frame is a piece of the resulting array: two numbers of a `msghdr`. `recvmsg` is called
by its address because Python's own wants a view of each buffer.

Usual are buffers of one descriptor each, in the largest memory region. `find` returns 0 for anything else, and the general way
follows, which also says what is wrong with it.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_left
from struct import Struct
from typing import Any, Final

from netstack.link.vhost_user.memory import GuestMemory
from netstack.link.vhost_user.ring import WRITE, SplitQueue

FEWEST: Final = 8
"""Buffers for which all this pays."""
_IOV_MAX: Final = 1024
_LONGEST: Final = 1 << 20
"""Octets of one buffer; nobody has longer ones, and sums stay small."""
_buffers_into: Final = Struct("<H").pack_into


class Pieces:
    """Room in the chains of one ring, whatever they look like; see `netstack.api.Room`."""

    __slots__ = ("_views", "buffer", "octets", "queue")

    at = 0

    def __init__(self, queue: SplitQueue) -> None:
        self.queue = queue
        self.octets = 0
        self.buffer: memoryview | None = None
        self._views: list[memoryview] = []

    def find(self, octets: int, lead: int, most: int) -> bool:
        """Room for a frame of up to `octets` octets in at most `most` chains; False when there is not even any for `lead`. Raises
        `Broken`."""
        queue = self.queue
        while True:
            views = self._views = queue.gather(octets, most)
            self.octets = min(octets, sum(map(len, views)))
            if self.octets > lead:
                break
            if most > 1 or not queue.taken_heads:
                return False
            queue.use(queue.taken_heads, [], 0)  # a chain that is too short for any frame
        self.buffer = views[0] if len(views[0]) >= lead else None
        return True

    def read(self, source: Any, offset: int, lead: int) -> int | None:
        count: int | None = source.read_scattered(offset, part(self._views, lead, self.octets - lead))
        return count

    def write(self, octets: memoryview) -> None:
        scatter(octets, self._views)

    def sent(self, octets: int) -> None:
        count = self.queue.commit(octets)
        if count > 1:
            note_buffers(self._views, count)

    def unused(self) -> None:
        """Nothing was taken."""


def part(views: list[memoryview], at: int, octets: int) -> list[memoryview]:
    """`octets` octets from `at` on."""
    found: list[memoryview] = []
    for view in views:
        length = len(view)
        if at >= length:
            at -= length
            continue
        piece = view[at : at + octets] if at or octets < length else view
        found.append(piece)
        at = 0
        octets -= len(piece)
        if not octets:
            break
    return found


def scatter(octets: memoryview, views: list[memoryview]) -> None:
    """Write `octets` over the beginning of `views`."""
    at = 0
    for view in views:
        piece = octets[at : at + len(view)]
        view[: len(piece)] = piece
        at += len(piece)
        if at == len(octets):
            return


def note_buffers(views: list[memoryview], count: int) -> None:
    """`num_buffers`, the last two octets of the virtio-net header, wherever they lie."""
    for at, octet in enumerate(count.to_bytes(2, "little"), 10):
        for view in views:
            if at < len(view):
                view[at] = octet
                break
            at -= len(view)


class Places:
    """Room in the buffers of one ring, where they are usual; see `netstack.api.Room`."""

    __slots__ = (
        "_available",
        "_base",
        "_begin",
        "_count",
        "_descriptors",
        "_ends",
        "_first",
        "_heads",
        "_held",
        "_iov",
        "_iov_address",
        "_last",
        "_lens",
        "_message",
        "_np",
        "_offsets",
        "_queue",
        "_stop",
        "_table",
        "_words",
        "at",
        "buffer",
        "octets",
    )

    def __init__(self, queue: SplitQueue, memory: GuestMemory) -> None:
        import numpy as np

        self._np = np
        self._queue = queue
        size = queue.size
        first = memory.regions[0]
        self._first = first.start, first.end
        self.buffer = first.view
        self.octets = 0
        self._descriptors = np.frombuffer(queue.descriptors, "<u8").reshape(size, 2)
        self._available = np.frombuffer(queue.available, "<u2")[2 : 2 + size]
        self._table = np.zeros((size, 2), "<u8")
        self._iov: memoryview = memoryview(self._table).cast("B").cast("Q")  # type: ignore[arg-type, unused-ignore]
        self._iov_address = self._table.ctypes.data
        self._held = first.watch.start + (len(first.view.obj) - len(first.view))  # type: ignore[arg-type]
        """Where the region begins in this process."""
        self._words = memoryview(bytearray(56)).cast("Q")
        """A `struct msghdr` of 64-bit Linux: the third and fourth word are the array and its length."""
        self._message = ctypes.addressof(ctypes.c_char.from_buffer(self._words.obj))
        self._base = self._count = 0
        self._heads: list[int] = []
        self._lens: list[int] = []
        self._ends: list[int] = []
        self._offsets: list[int] = []
        self._begin = self._stop = 0
        self._last = 0
        self.at = 0
        """Where in `region` the frame of the last `find` begins."""

    def _resolve(self) -> bool:
        """Look up all that is available; False when there is little, or something unusual."""
        queue, np = self._queue, self._np
        count = queue.waiting()
        self._count = 0
        if count < FEWEST:
            return False
        size = queue.size
        start = queue.next & (size - 1)
        if start + count <= size:
            heads = self._available[start : start + count].copy()
        else:
            heads = np.concatenate((self._available[start:], self._available[: start + count - size]))
        if int(heads.max()) >= size:
            return False
        rows = self._descriptors[heads]  # a copy: what is checked is what is used
        offsets, words = rows[:, 0], rows[:, 1]
        lens = words & 0xFFFFFFFF
        low, high = self._first
        offsets -= low
        if (
            ((words >> 32) & 0xFFFF != WRITE).any()
            or int(offsets.max()) > high - low
            or int(lens.max()) > _LONGEST
            or not int(lens.min())
            or int((offsets + lens).max()) > high - low
        ):
            return False
        table = self._table
        table[:count, 0] = offsets + self._held
        table[:count, 1] = lens
        self._heads = heads.tolist()
        self._lens = lens.tolist()
        self._ends = np.cumsum(lens).tolist()
        self._offsets = offsets.tolist()
        self._base = queue.next
        self._count = count
        return True

    def find(self, octets: int, lead: int) -> bool:
        """Room for a frame of up to `octets` octets, the first `lead` of them not to be read into; False where it must be looked
        for in the general way."""
        begin = (self._queue.next - self._base) & 0xFFFF
        count = self._count
        if begin < count:
            before = self._ends[begin] - self._lens[begin]
            stop = bisect_left(self._ends, before + octets, begin, count)
        else:
            stop = count
        if stop == count:
            if not self._resolve():
                return False
            begin = before = 0
            count = self._count
            stop = min(bisect_left(self._ends, octets, 0, count), count - 1)
        if self._lens[begin] <= lead:
            return False
        if stop - begin >= _IOV_MAX:
            stop = begin + _IOV_MAX - 1
        iov = self._iov
        room = self._ends[stop] - before
        if room > octets:
            iov[2 * stop + 1] -= room - octets
            room = octets
        iov[2 * begin] += lead
        iov[2 * begin + 1] -= lead
        words = self._words
        words[2] = self._iov_address + 16 * begin
        words[3] = stop - begin + 1
        self._begin, self._stop = begin, stop
        self.at = self._offsets[begin]
        self.octets = room
        return True

    def read(self, source: Any, offset: int, _lead: int) -> int | None:
        count: int | None = source.read_message(offset, self._message)
        return count

    def write(self, octets: memoryview) -> None:
        self.buffer[self.at : self.at + len(octets)] = octets

    def unused(self) -> None:
        """There was nothing to write into it."""
        begin, stop, iov = self._begin, self._stop, self._iov
        iov[2 * begin] = self._offsets[begin] + self._held
        iov[2 * begin + 1] = self._lens[begin]
        iov[2 * stop + 1] = self._lens[stop]

    def sent(self, octets: int) -> None:
        """The frame has `octets` octets; the buffers it does not need are there for the next one."""
        begin, stop = self._begin, self._stop
        lens, ends, queue = self._lens, self._ends, self._queue
        before = ends[begin] - lens[begin]
        self._iov[2 * stop + 1] = lens[stop]
        last = bisect_left(ends, before + octets, begin, stop)
        count = last - begin + 1
        queue.use(
            self._heads[begin : last + 1], lens[begin:last], octets - (ends[last - 1] - before if last > begin else 0)
        )
        if count > 1:
            _buffers_into(self.buffer, self.at + 10, count)
