"""What the kernel says of its clock, judged by the manual page of adjtimex(2) and by another program that asks."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from ntp import hostclock
from ntp.hostclock import ClockState

STA_PLL, STA_INS, STA_DEL, STA_UNSYNC, STA_NANO = 0x1, 0x10, 0x20, 0x40, 0x2000
TIME_OK, TIME_INS, TIME_DEL, TIME_OOP, TIME_WAIT, TIME_ERROR = range(6)


@pytest.mark.parametrize(
    ("returned", "status", "max_error_us", "state"),
    [
        pytest.param(
            TIME_OK,
            STA_PLL | STA_NANO,
            12_500,
            ClockState(synchronised=True, max_error_s=0.0125),
            id="timesyncd, chrony",
        ),
        pytest.param(
            TIME_ERROR, STA_UNSYNC, 16_000_000, ClockState(synchronised=False, max_error_s=16.0), id="nobody keeps it"
        ),
        pytest.param(
            TIME_ERROR, STA_UNSYNC, 900, ClockState(synchronised=True, max_error_s=0.0009), id="chrony without rtcsync"
        ),
        pytest.param(
            TIME_INS, STA_INS, 1000, ClockState(synchronised=True, max_error_s=0.001, leap=1), id="61 seconds today"
        ),
        pytest.param(
            TIME_DEL, STA_DEL, 1000, ClockState(synchronised=True, max_error_s=0.001, leap=2), id="59 seconds today"
        ),
        pytest.param(TIME_OOP, STA_INS, 0, ClockState(synchronised=True, max_error_s=0.0), id="the second itself"),
        pytest.param(TIME_WAIT, STA_INS, 0, ClockState(synchronised=True, max_error_s=0.0), id="the second is over"),
        pytest.param(TIME_OK, 0, -1, ClockState(synchronised=True, max_error_s=0.0), id="nonsense"),
        pytest.param(-1, 0, 0, None, id="refused"),
    ],
)
def test_what_the_call_says_is_understood(
    returned: int, status: int, max_error_us: int, state: ClockState | None
) -> None:
    assert hostclock.understood(returned, status, max_error_us, linux=True) == state


@pytest.mark.parametrize(("status", "synchronised"), [(STA_PLL, True), (STA_PLL | STA_UNSYNC, False)])
def test_elsewhere_the_status_decides(status: int, synchronised: bool) -> None:
    state = hostclock.understood(TIME_OK if synchronised else TIME_ERROR, status, 500_000, linux=False)
    assert state == ClockState(synchronised=synchronised, max_error_s=0.5)


@pytest.mark.skipif(sys.platform != "linux", reason="expected: only Linux surely has the call")
def test_this_kernel_is_asked() -> None:
    state = hostclock.read()
    assert state is not None
    assert 0 <= state.max_error_s <= 16
    assert state.leap in (0, 1, 2)


@pytest.mark.skipif(shutil.which("timedatectl") is None, reason="expected: without systemd nobody else here asks")
def test_systemd_hears_the_same() -> None:
    done = subprocess.run(["timedatectl", "show"], capture_output=True, text=True, check=False)
    said = re.search(r"^NTPSynchronized=(yes|no)$", done.stdout, re.M)
    if said is None:
        pytest.skip(f"expected: systemd does not run here: {done.stderr.strip()}")
    state = hostclock.read()
    assert state is not None
    assert (said[1] == "yes") == state.synchronised
