"""One heap of deadlines for all flows of a stack. HOT PATH: `arm`, once per flow and flight.

An entry whose flow has ended, or was armed for an earlier time, stays in the heap until its time but no longer holds the
flow, so that an ended flow's memory is used again at once, while it is still in the processor's cache (short connections
cost a tenth less Python so). Once most entries are dead they are cleared away.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Any, Final, Protocol

_DEAD: Final = 1024
Entry = list[Any]
"""`[when, number, flow or None]`; the number decides between equal times, so flows are never compared."""


class Timed(Protocol):
    timer_at: float
    """When `timer` is to be called, seconds; 0 for never."""
    timer_entry: Entry | None

    def timer(self, now: float) -> None:
        """The time has come."""
        ...


class Timers:
    """See the module."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []
        self._number = 0
        self._dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._dead

    def arm(self, when: float, flow: Timed) -> None:
        """Call `flow.timer` at `when`, and at no other time."""
        old = flow.timer_entry
        if old is not None:
            old[2] = None
            self._dead += 1
        self._number += 1
        entry: Entry = [when, self._number, flow]
        flow.timer_entry = entry
        flow.timer_at = when
        heappush(self._heap, entry)

    def forget(self, flow: Timed) -> None:
        """`flow` has ended."""
        entry = flow.timer_entry
        if entry is None:
            return
        entry[2] = flow.timer_entry = None
        flow.timer_at = 0.0
        self._dead += 1
        if self._dead > _DEAD and self._dead * 2 > len(self._heap):
            self._dead = 0
            self._heap = [entry for entry in self._heap if entry[2] is not None]
            heapify(self._heap)

    def deadline(self) -> float | None:
        """When the next is due."""
        heap = self._heap
        while heap:
            when: float = heap[0][0]
            if heap[0][2] is not None:
                return when
            heappop(heap)
            self._dead -= 1
        return None

    def due(self, now: float) -> list[Timed]:
        """Those whose time has come, taken out."""
        heap = self._heap
        found: list[Timed] = []
        while heap and heap[0][0] <= now:
            flow = heappop(heap)[2]
            if flow is None:
                self._dead -= 1
                continue
            flow.timer_entry = None
            flow.timer_at = 0.0
            found.append(flow)
        return found
