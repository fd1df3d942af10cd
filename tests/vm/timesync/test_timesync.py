"""The guest's clock is set after the host has slept, and at no other time."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import pytest

from netstack.errors import HostError
from netstack.observe.wake import Times
from vm.timesync import TimeSync, sync

LIMIT_S = 30.0


class Guest:
    """Answers as host-timesync-daemon: with the end of the file."""

    def __init__(self, *, fails: int = 0, silent: bool = False) -> None:
        self.calls = 0
        self._fails = fails
        self._silent = silent
        self._kept: list[socket.socket] = []

    async def dial(self) -> socket.socket:
        self.calls += 1
        if self.calls <= self._fails:
            raise HostError("vsock port 62372: the guest refused")
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        if self._silent:
            self._kept.append(theirs)
        else:
            theirs.close()
        return ours

    def close(self) -> None:
        for sock in self._kept:
            sock.close()


class Clocks:
    def __init__(self, slept_s: float) -> None:
        self._slept_s = slept_s
        self.looked = 0

    def __call__(self) -> Times:
        """The host sleeps between the second and the third look."""
        self.looked += 1
        monotonic = 100.0 + 0.001 * self.looked
        boot = monotonic + (self._slept_s if self.looked > 2 else 0.0)
        return Times(monotonic, boot, 1e9 + boot)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # of timers that set no event
            await asyncio.sleep(0.002)


async def test_after_a_sleep_the_guests_clock_is_set_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "pyvpnkit")
    guest, clocks = Guest(), Clocks(3600.0)
    keeper = TimeSync(guest.dial, clocks=clocks, every_s=0.001)
    await until(lambda: keeper.done > 0 and clocks.looked > 20)
    assert (guest.calls, keeper.done, keeper.failed) == (1, 1, 0)
    assert "the host slept for 3600 s; the guest's clock is set" in caplog.text
    await keeper.close()
    await keeper.close()


@pytest.mark.parametrize("slept_s", [0.0, 4.9])
async def test_without_a_long_sleep_the_guest_is_left_alone(slept_s: float) -> None:
    guest, clocks = Guest(), Clocks(slept_s)
    keeper = TimeSync(guest.dial, clocks=clocks, every_s=0.001)
    await until(lambda: clocks.looked > 20)
    assert guest.calls == 0
    await keeper.close()


async def test_a_guest_that_is_slow_to_wake_is_asked_again() -> None:
    guest = Guest(fails=2)
    keeper = TimeSync(guest.dial, limit_s=0.01)
    keeper.woke(60.0)
    await until(lambda: keeper.done == 1)
    assert guest.calls == 3
    await keeper.close()


async def test_a_guest_that_refuses_is_given_up_and_said_so(caplog: pytest.LogCaptureFixture) -> None:
    guest = Guest(fails=99)
    keeper = TimeSync(guest.dial, limit_s=0.01)
    keeper.woke(60.0)
    await until(lambda: keeper.failed == 1)
    assert (guest.calls, keeper.done) == (3, 0)
    assert "the guest refused" in caplog.text
    await keeper.close()


async def test_a_guest_that_holds_the_connection_is_left_after_the_limit() -> None:
    guest = Guest(silent=True)
    with pytest.raises(HostError, match=r"not set within 0\.05 s"):
        await sync(guest.dial, limit_s=0.05)
    guest.close()


async def test_a_second_waking_meanwhile_waits_for_the_first() -> None:
    guest = Guest(silent=True)
    keeper = TimeSync(guest.dial, limit_s=LIMIT_S)
    keeper.woke(60.0)
    keeper.woke(60.0)
    await until(lambda: guest.calls > 0)
    await keeper.close()
    assert guest.calls == 1
    guest.close()
