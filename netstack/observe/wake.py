"""Whether this process has missed some time: the machine slept, the process was stopped, or somebody set the clock.

Three clocks tell these apart. The monotonic clock stands still while a machine sleeps, the boot-time clock does not; a
process that was stopped finds its timer late; the wall clock alone jumps when it is set. They are compared by a timer each
`every_s` seconds, which is all it costs. After a sleep the rest of that time has to pass first, after a SIGCONT nothing. (A
timerfd with TFD_TIMER_CANCEL_ON_SET would tell of sleep and clock at once, but Python 3.11 has none, and of SIGSTOP it says
nothing; and who wakes from sleep hears of its interfaces by netlink as well.)
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

EVERY_S: Final = 5.0
SLACK_S: Final = 2.0
"""A timer may be so much late in a busy process."""
JUMP_S: Final = 1.0
"""Clocks that drift, or are slewed by NTP, differ by less in `EVERY_S`."""


class Kind(StrEnum):
    """What happened."""

    SLEPT = "slept"
    STOPPED = "stopped"
    CLOCK_SET = "clock set"


@dataclass(frozen=True, slots=True)
class Missed:
    """`seconds` were missed; for a clock that was set they are the step, which may be negative."""

    kind: Kind
    seconds: float


class Times(NamedTuple):
    """Seconds of each clock at one moment."""

    monotonic: float
    boot: float
    wall: float


def now() -> Times:
    """Read the clocks."""
    # Names by getattr: each system has its own. Of macOS's two, CLOCK_MONOTONIC is the one that goes on during sleep.
    which = "CLOCK_MONOTONIC" if sys.platform == "darwin" else "CLOCK_BOOTTIME"
    number = getattr(time, which, None)
    monotonic = time.monotonic()
    return Times(monotonic, monotonic if number is None else time.clock_gettime(number), time.time())


def missed(before: Times, after: Times, wanted_s: float) -> Missed | None:
    """What happened between two moments that a timer meant to be `wanted_s` apart; the gravest only."""
    passed = after.monotonic - before.monotonic
    passed_really = after.boot - before.boot
    if passed_really - passed > JUMP_S:
        return Missed(Kind.SLEPT, passed_really - passed)
    if passed - wanted_s > SLACK_S:
        return Missed(Kind.STOPPED, passed - wanted_s)
    step = after.wall - before.wall - passed_really
    return Missed(Kind.CLOCK_SET, step) if abs(step) > JUMP_S else None


class WakeWatch:
    """Calls `tick` each `every_s` seconds, and tells it what was missed since the last time."""

    def __init__(
        self,
        tick: Callable[[Missed | None], None],
        *,
        every_s: float = EVERY_S,
        clocks: Callable[[], Times] = now,
    ) -> None:
        self._tick = tick
        self._every_s = every_s
        self._clocks = clocks
        self._before = clocks()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From now on."""
        self._loop = loop
        self._before = self._clocks()
        self._timer = loop.call_later(self._every_s, self._fire)

    def close(self) -> None:
        """Harmless when repeated."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        if self._loop is None:
            return
        after = self._clocks()
        found = missed(self._before, after, self._every_s)
        self._before = after
        self._timer = self._loop.call_later(self._every_s, self._fire)
        self._tick(found)
