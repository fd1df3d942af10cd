"""Room in the guest's own buffers, for frames that are made there. HOT PATH.

A frame of 64 KiB fills sixteen buffers of 4 KiB, and finding these is most of what Python does for it. Looking a whole ring of
buffers up at once by numpy, and calling `recvmsg` with an array of addresses made of that, was tried: in a loop by itself it takes
a quarter of the time, but among everything else that runs between two such batches its twenty calls are always cold, and it came
out dearer (0.9 instead of 0.75 CPU-s/GiB).
"""

from __future__ import annotations

from struct import Struct
from typing import Any, Final

from netstack.link.vhost_user.ring import SplitQueue

_buffers_into: Final = Struct("<H").pack_into
SHOWN: Final = 2
"""The part of a ring that is used up before the guest is shown it in the middle of a turn, so that it works while we do."""
BUFFERS_AT: Final = 10
"""Where `num_buffers` is in a virtio-net header of 12 octets."""


class Place:
    """Room in the chains of one ring; see `netstack.api.Room`. There is one for each ring, used again and again."""

    __slots__ = ("_lead", "_room", "buffer", "octets", "queue")

    at = 0

    def __init__(self, queue: SplitQueue) -> None:
        self.queue = queue
        self.octets = 0
        self.buffer: memoryview | None = None
        self._room = 0
        self._lead = 0

    def find(self, octets: int, lead: int, most: int) -> bool:
        """Room for a frame of up to `octets` octets in at most `most` chains; False when there is not even any for `lead`. Raises
        `Broken`."""
        queue = self.queue
        while True:
            room = self._room = queue.gather(octets, most)
            if room > lead:
                break
            if most > 1 or not queue.taken_heads:
                return False
            queue.use(queue.taken_heads, [], 0)  # a chain that is too short for any frame
        self.octets = octets if octets < room else room
        self._lead = lead
        first = queue.views[0]
        self.buffer = first if len(first) >= lead else None
        return True

    def read(self, source: Any, offset: int) -> int | None:
        lead, views = self._lead, self.queue.views
        first = views[0]
        if len(first) > lead:
            into = [first[lead:], *views[1:]]
        else:
            into = without(views, lead)
        spare = self._room - self.octets
        while spare:
            last = into.pop()
            if len(last) > spare:
                into.append(last[:-spare])
                break
            spare -= len(last)
        count: int | None = source.read_scattered(offset, into)
        return count

    def write(self, octets: memoryview) -> None:
        scatter(octets, self.queue.views)

    def sent(self, octets: int) -> None:
        queue = self.queue
        count = queue.commit(octets)
        if count > 1:
            note_buffers(queue.views, count)
            if len(queue.done) >= queue.size // SHOWN:
                queue.publish()


def without(views: list[memoryview], octets: int) -> list[memoryview]:
    """What is behind the first `octets` octets."""
    for number, view in enumerate(views):
        if octets < len(view):
            return [view[octets:], *views[number + 1 :]]
        octets -= len(view)
    return []


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
    """`num_buffers`, wherever it lies."""
    if len(views[0]) >= BUFFERS_AT + 2:
        _buffers_into(views[0], BUFFERS_AT, count)
        return
    number = count.to_bytes(2, "little")
    for octet, view in zip(number, (without(views, BUFFERS_AT), without(views, BUFFERS_AT + 1)), strict=True):
        view[0][0] = octet
