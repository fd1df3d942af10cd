"""The states of a machine, and what leads from one to another (spec companions 5, "Lifecycle").

    NEW -> SIDECARS -> CREATED -> RUNNING -> READY -> STOPPING -> STOPPED
     ^        |           |          |                 |  |
     |        +-----------+----------+--- over --------+  +-> FAILED
     +--------------------- again ---------------------+

Whatever ends a machine (a person, its guest, a crash of a part) leads to STOPPING, where everything is taken down; only then it
shows whether it is begun again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final


class State(Enum):
    """Of a machine."""

    NEW = "new"
    SIDECARS = "sidecars"
    """The network, servers of shares, and listeners for vsock are started."""
    CREATED = "created"
    """The hypervisor is started."""
    RUNNING = "running"
    """The guest runs; it is not known to be ready."""
    READY = "ready"
    """Its ports are published."""
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


class Input(Enum):
    """What happens to it."""

    BEGIN = "begin"
    PLACED = "placed"
    """All that must be there before it is there."""
    STARTED = "started"
    ANSWERED = "answered"
    """The probe found it ready."""
    OVER = "over"
    GONE = "gone"
    """Nothing is left of it, as was wanted."""
    BROKEN = "broken"
    """Nothing is left of it, as nobody wanted."""
    AGAIN = "again"


TRANSITIONS: Final[Mapping[tuple[State, Input], State]] = {
    (State.NEW, Input.BEGIN): State.SIDECARS,
    (State.NEW, Input.OVER): State.STOPPING,
    (State.SIDECARS, Input.PLACED): State.CREATED,
    (State.SIDECARS, Input.OVER): State.STOPPING,
    (State.CREATED, Input.STARTED): State.RUNNING,
    (State.CREATED, Input.OVER): State.STOPPING,
    (State.RUNNING, Input.ANSWERED): State.READY,
    (State.RUNNING, Input.OVER): State.STOPPING,
    (State.READY, Input.OVER): State.STOPPING,
    (State.STOPPING, Input.GONE): State.STOPPED,
    (State.STOPPING, Input.BROKEN): State.FAILED,
    (State.STOPPING, Input.AGAIN): State.NEW,
}

ENDS: Final = frozenset({State.STOPPED, State.FAILED})
UP: Final = frozenset({State.RUNNING, State.READY})


class Cause(Enum):
    """Why a machine is taken down."""

    ASKED = "asked"
    """Somebody wants it down."""
    RESTART = "restart"
    """Somebody wants it down and up again."""
    POWEROFF = "poweroff"
    """Its guest powered off: that is no crash."""
    CRASHED = "crashed"
    LOST = "lost"
    """A part it cannot go on without is gone."""
    UNREADY = "unready"
    """It could not be started, or was not ready in time."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why, and in words."""

    cause: Cause
    text: str = ""

    @property
    def counts(self) -> bool:
        """Whether it is one of the failures after which the machine is started anew."""
        return self.cause in (Cause.CRASHED, Cause.LOST)


def backoff(failures: int, first_s: float, most_s: float) -> float:
    """How long to wait after so many failures in a row, in seconds: 1, 2, 4, ..."""
    return min(first_s * float(1 << min(failures - 1, 32)), most_s)
