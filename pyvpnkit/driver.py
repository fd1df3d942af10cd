"""Turns a stack inside an asyncio loop: one descriptor, one timer, nothing periodic.

    the stack's descriptor becomes readable ──┐
    the timer for `deadline()` fires ─────────┼─> pump: `turn()`; more work waits? again on the loop's next pass
    `wake()`: somebody outside gave it work ──┘         nothing waits? arm the timer for `deadline()`, if any

One `turn` is bounded, so other callbacks of the loop (control, DNS) get their share between two turns. A timer that is due
too early is left to fire: it finds nothing to do and is armed anew, which is cheaper than cancelling one per turn.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final, Protocol

from netstack.api import Clock

LATE_S: Final = 0.001
"""Loop timers have millisecond grain (uvloop); a shorter wait would be rounded to none at all, and spin."""

SOON_S: Final = 0.005
"""A timer that fires within this is not looked at anew after every turn, which costs a microsecond of each request."""


class Turnable(Protocol):
    """What is driven (`netstack.stack.Stack`)."""

    def fileno(self) -> int:
        """Readable while `turn` has input."""
        ...

    def turn(self) -> bool:
        """One bounded pass; `True` when more work waits right now."""
        ...

    def deadline(self) -> float | None:
        """When `turn` is next wanted although nothing is readable, on the stack's clock."""
        ...


class Driver:
    """Owns the reader and the timer of one stack; `close` removes both."""

    def __init__(self, stack: Turnable, loop: asyncio.AbstractEventLoop, *, clock: Clock = time.monotonic) -> None:
        self._stack = stack
        self._loop = loop
        self._clock = clock
        self._fd = -1
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._soon: asyncio.Handle | None = None

    def start(self) -> None:
        """Begin; the first turn comes on the loop's next pass."""
        self._fd = self._stack.fileno()
        self._loop.add_reader(self._fd, self._pump)
        self.wake()

    def wake(self) -> None:
        """A turn soon: something outside `turn` (a connection accepted, an answer ready) made work or a deadline."""
        if self._soon is None and self._fd >= 0:
            self._soon = self._loop.call_soon(self._pump_soon)

    def _pump_soon(self) -> None:
        self._soon = None
        self._pump()

    def _pump(self) -> None:
        if self._stack.turn():
            self.wake()
        else:
            self._arm()

    def _fired(self) -> None:
        self._timer = None
        self._pump()

    def _arm(self) -> None:
        if self._timer is not None and self._timer_at - self._clock() < SOON_S:
            return  # it fires before it would matter, and asks then
        deadline = self._stack.deadline()
        if deadline is None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            return
        if self._timer is not None:
            if self._timer_at <= deadline:
                return
            self._timer.cancel()
        wait = max(deadline - self._clock(), LATE_S)
        self._timer_at = deadline
        self._timer = self._loop.call_later(wait, self._fired)

    def close(self) -> None:
        """No more turns. Harmless when called again."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._fd = -1
        for handle in (self._timer, self._soon):
            if handle is not None:
                handle.cancel()
        self._timer = self._soon = None
