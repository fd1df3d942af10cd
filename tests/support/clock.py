"""Virtual time: a clock that moves when the test says so, and things that happen at an instant of it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class VirtualClock:
    """Callable as `netstack.api.Clock`; starts at 1000 s so that a zero in the code under test is seen to be wrong."""

    def __init__(self, start: float = 1000.0) -> None:
        self.now = start
        self._later: list[tuple[float, int, Callable[[], None]]] = []
        self._ties = itertools.count()

    def __call__(self) -> float:
        return self.now

    def at(self, when: float, action: Callable[[], None]) -> None:
        """Do `action` when the clock reaches `when` seconds."""
        heapq.heappush(self._later, (when, next(self._ties), action))

    def deadline(self) -> float | None:
        """When the next action is due."""
        return self._later[0][0] if self._later else None

    def fire(self) -> bool:
        """Do what is due; True if there was something."""
        done = False
        while self._later and self._later[0][0] <= self.now:
            heapq.heappop(self._later)[2]()
            done = True
        return done
