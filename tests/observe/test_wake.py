"""Time that went by unseen, from three clocks; and a real process that was stopped."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from netstack.observe import wake
from netstack.observe.wake import Kind, Missed, Times, WakeWatch, missed

ROOT = Path(__file__).parents[3]
BEFORE = Times(monotonic=1000.0, boot=5000.0, wall=1_700_000_000.0)


def after(monotonic: float, boot: float | None = None, wall: float | None = None) -> Times:
    """Later by so many seconds; clocks that are not named go as the one before."""
    boot = monotonic if boot is None else boot
    wall = boot if wall is None else wall
    return Times(BEFORE.monotonic + monotonic, BEFORE.boot + boot, BEFORE.wall + wall)


@pytest.mark.parametrize(
    ("later", "found"),
    [
        pytest.param(after(5.0), None, id="on time"),
        pytest.param(after(6.9), None, id="a busy process"),
        pytest.param(after(5.0, 5.0, 5.4), None, id="a clock that is slewed"),
        pytest.param(after(5.0, 28805.0), Missed(Kind.SLEPT, 28800.0), id="a night's sleep"),
        pytest.param(after(65.0), Missed(Kind.STOPPED, 60.0), id="stopped for a minute"),
        pytest.param(after(65.0, 3665.0), Missed(Kind.SLEPT, 3600.0), id="both: the sleep counts"),
        pytest.param(after(5.0, 5.0, 3605.0), Missed(Kind.CLOCK_SET, 3600.0), id="clock set forward"),
        pytest.param(after(5.0, 5.0, -3595.0), Missed(Kind.CLOCK_SET, -3600.0), id="and back"),
        pytest.param(after(5.0, 28805.0, 5.0), Missed(Kind.SLEPT, 28800.0), id="a wall clock that slept as well"),
    ],
)
def test_what_was_missed(later: Times, found: Missed | None) -> None:
    assert missed(BEFORE, later, 5.0) == found


async def test_it_ticks_tells_once_and_ends() -> None:
    clocks = [after(0.0), after(0.0), after(0.01), after(0.02, 100.0), after(0.03, 100.01), after(0.04, 100.02)]
    told: list[Missed | None] = []
    three = asyncio.Event()

    def tick(found: Missed | None) -> None:
        told.append(found)
        if len(told) == 3:
            three.set()

    watch = WakeWatch(tick, every_s=0.01, clocks=lambda: clocks.pop(0) if len(clocks) > 1 else clocks[0])
    watch.start(asyncio.get_running_loop())
    async with asyncio.timeout(10):
        await three.wait()
    watch.close()
    watch.close()
    count = len(told)
    await asyncio.sleep(0.05)
    assert len(told) == count
    assert [one and one.kind for one in told] == [None, Kind.SLEPT, None]


def test_the_clocks_of_this_host() -> None:
    first, second = wake.now(), wake.now()
    assert second.monotonic >= first.monotonic and second.boot >= first.boot
    assert first.boot >= first.monotonic - 1, "boot time counts sleep too"


def test_a_process_that_was_stopped_knows_for_how_long() -> None:
    """With the shortest stop that may not be taken for a busy process."""
    script = (
        "import asyncio; from netstack.observe.wake import WakeWatch\n"
        "async def main():\n"
        "    done = asyncio.Event()\n"
        "    def tick(found):\n"
        "        print(found.kind if found else 'tick', found.seconds if found else '', flush=True)\n"
        "        if found: done.set()\n"
        "    WakeWatch(tick, every_s=0.2).start(asyncio.get_running_loop())\n"
        "    await done.wait()\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("tick")
        os.kill(process.pid, signal.SIGSTOP)
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(3.0)
        finally:
            os.kill(process.pid, signal.SIGCONT)
        rest = process.stdout.read().split()
        assert rest[-2] == "stopped" and 2.0 < float(rest[-1]) < 60, rest
