"""What the host's kernel knows of its own clock: adjtimex(2) on Linux, ntp_adjtime(2) on macOS and the BSDs.

Whoever keeps the clock (chronyd, ntpd, timesyncd) tells the kernel how far it may be off and whether a leap second comes; the
kernel adds 500 ppm for each second since. From whom the time came, and with what stratum, the kernel is not told. What sets
the clock of many virtual machines, and OpenNTPD, tells it nothing: such a clock may be good, but here it is not synchronised.
Asking changes nothing and needs no privilege.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

# adjtimex(2): what the call returns, and a bit of `status`. The same numbers on macOS and the BSDs.
TIME_INS: Final = 1
TIME_DEL: Final = 2
STA_UNSYNC: Final = 0x40
MAX_ERROR_US: Final = (
    16_000_000  # NTP_PHASE_LIMIT of Linux: where the error stops growing, and where it is after a clock is set
)

_STRUCT_OCTETS: Final = 512
"""More than any kernel writes (Linux: 208). What is read here, its first fields, is laid out alike everywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockState:
    """As the kernel has it."""

    synchronised: bool
    max_error_s: float
    """The clock is right within so many seconds; 16 where nobody has said (NTP_PHASE_LIMIT)."""
    leap: int = 0
    """Leap indicator of RFC 5905 figure 9 for the end of today: 0 none, 1 a second more, 2 a second less."""


def read() -> ClockState | None:
    """The state now, in microseconds of work; `None` where the system cannot be asked, or refuses."""
    call = _adjust()
    return None if call is None else call()


@functools.cache
def _adjust() -> Callable[[], ClockState | None] | None:
    import ctypes  # where it is used: most guests never ask for the time

    class Head(ctypes.Structure):
        _fields_ = (
            ("modes", ctypes.c_uint),  # what to change: nothing
            ("offset", ctypes.c_long),
            ("freq", ctypes.c_long),
            ("maxerror", ctypes.c_long),  # microseconds
            ("esterror", ctypes.c_long),
            ("status", ctypes.c_int),
            ("rest", ctypes.c_char * _STRUCT_OCTETS),
        )

    try:
        library = ctypes.CDLL(None)
    except (OSError, TypeError):  # no libc to look into: Windows
        return None
    function: Any = getattr(library, "ntp_adjtime", None) or getattr(
        library, "adjtimex", None
    )  # musl has the latter only
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p,)
    function.restype = ctypes.c_int

    def call() -> ClockState | None:
        head = Head()
        return understood(function(ctypes.byref(head)), head.status, head.maxerror, linux=sys.platform == "linux")

    return call


def understood(returned: int, status: int, max_error_us: int, *, linux: bool) -> ClockState | None:
    """What adjtimex(2) said: its result, and two fields."""
    if returned < 0:  # seccomp of a container may refuse
        return None
    # On Linux not STA_UNSYNC: chronyd without `rtcsync` leaves it set, so that the kernel keeps its hands off the hardware clock.
    # The bound of the error tells, and that is how systemd decides what `timedatectl` says. Elsewhere the bound starts small.
    synchronised = max_error_us < MAX_ERROR_US if linux else not status & STA_UNSYNC
    # Not STA_INS and STA_DEL of `status`: they stay for a while after the leap second is over, the state does not.
    leap = returned if returned in (TIME_INS, TIME_DEL) else 0
    return ClockState(synchronised=synchronised, max_error_s=max(max_error_us, 0) / 1e6, leap=leap)
