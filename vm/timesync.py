"""The guest's clock after the host has slept (spec companions 3.3, 5: host-timesync-daemon).

The guest's clock stood still while the host slept, but its hardware clock follows the host's. A program in the guest sets the one
by the other whenever somebody connects to its port; it says nothing, and the end of the file means that it is done. (By HyperKit's
convention a refused port looks the same.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Final

from netstack.errors import HostError
from netstack.observe.wake import Kind, Missed, Times, WakeWatch, now

log = logging.getLogger("pyvpnkit")

PORT: Final = 62372
"""LinuxKit's default, 0xf3a4 (spec companions 1.2)."""
SLEPT_S: Final = 5.0
"""A shorter sleep is left to NTP."""
LIMIT_S: Final = 2.0
"""For one try; the real one takes 15 ms (spec companions 3.3)."""
TRIES: Final = 3
"""A machine that has just woken may be slow."""
_CHUNK: Final = 4096

Dial = Callable[[], Awaitable[socket.socket]]


async def sync(dial: Dial, *, limit_s: float = LIMIT_S) -> float:
    """Have the guest set its clock; returns the seconds it took. Raises `HostError`."""
    loop = asyncio.get_running_loop()
    began = time.monotonic()
    try:
        async with asyncio.timeout(limit_s):
            with contextlib.closing(await dial()) as sock:
                while await loop.sock_recv(sock, _CHUNK):
                    pass
    except TimeoutError:
        raise HostError(f"the guest's clock: not set within {limit_s:g} s") from None
    except OSError as error:
        raise HostError(f"the guest's clock: {error.strerror or error}") from None
    return time.monotonic() - began


class TimeSync:
    """Sets the guest's clock after each sleep of the host, until `close`. Wants a running loop."""

    def __init__(
        self, dial: Dial, *, limit_s: float = LIMIT_S, clocks: Callable[[], Times] = now, every_s: float = 5.0
    ) -> None:
        self.done = 0
        self.failed = 0
        self._dial = dial
        self._limit_s = limit_s
        self._task: asyncio.Task[None] | None = None
        self._watch = WakeWatch(self._tick, every_s=every_s, clocks=clocks)
        self._watch.start(asyncio.get_running_loop())

    def woke(self, slept_s: float) -> None:
        """The host has slept; also for who learns of it otherwise."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._set(slept_s))

    async def close(self) -> None:
        """Harmless when repeated."""
        self._watch.close()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def _tick(self, missed: Missed | None) -> None:
        if missed is not None and missed.kind is Kind.SLEPT and missed.seconds > SLEPT_S:
            self.woke(missed.seconds)

    async def _set(self, slept_s: float) -> None:
        for left in reversed(range(TRIES)):
            try:
                took_s = await sync(self._dial, limit_s=self._limit_s)
            except HostError as error:
                if left:
                    await asyncio.sleep(self._limit_s / 2)
                    continue
                self.failed += 1
                log.warning("the host slept for %.0f s; %s", slept_s, error)
            else:
                self.done += 1
                log.info("the host slept for %.0f s; the guest's clock is set (%.0f ms)", slept_s, took_s * 1000)
            return
