"""What peers can make the in-VM tools hold, bounded in one place."""

from __future__ import annotations

import time
from collections import Counter
from typing import Final

MAX_SOCKETS: Final = 8192
"""Sockets towards targets at once, whatever `ulimit -n` would allow."""
RESERVED: Final = 64
"""Descriptors kept for listeners, data connections, the log and the loop."""


class Budget:
    """Counts what is held against a bound."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self.refused = 0

    def take(self) -> bool:
        """One more, if there is room."""
        if self.held >= self.most:
            self.refused += 1
            return False
        self.held += 1
        return True

    def give(self) -> None:
        self.held -= 1


class Seldom:
    """Says yes once in a while: for words that a peer could make us repeat without end."""

    def __init__(self, every_s: float) -> None:
        self._every_s = every_s
        self._last = float("-inf")

    def now(self) -> bool:
        """Whether it is time again."""
        now = time.monotonic()
        if now - self._last < self._every_s:
            return False
        self._last = now
        return True


class Counts(Counter[str]):
    """How often what happened, by name."""


def descriptors() -> int:
    """Raise the soft limit of descriptors as far as it goes and return how many sockets towards targets it leaves room for.

    A flow may cost two (generation 1: the data connection, and the target's).
    """
    try:
        import resource
    except ImportError:
        return 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_SOCKETS + RESERVED
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass  # what there is has to do
    return max(16, min(MAX_SOCKETS, (soft - RESERVED) // 2))
