"""How a machine is brought to its end: its guest is asked, waited for, and then killed."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from netstack.errors import NetstackError
from vm.api import Machine
from vm.supervisor.journal import Journal

log = logging.getLogger("vm.supervisor")

AGAIN_S: Final = 5.0
"""A guest that still boots does not hear its power button: it is pressed again."""


async def end(
    machine: Machine,
    journal: Journal,
    *,
    gone: asyncio.Event,
    hurry: asyncio.Event,
    grace_s: float | None,
    paused: bool,
) -> None:
    """Until it is `gone`. `grace_s` is how long the guest may take, `None` when it is not asked; `hurry` ends that."""
    if grace_s is not None and not hurry.is_set() and await _asked(machine, journal, paused):
        await _wait(machine, journal, gone, hurry, grace_s)
    if gone.is_set():
        return
    journal.add("progress", "killing the machine")
    try:
        await machine.kill()
    except Exception as error:
        journal.add("progress", _why(error), level=logging.WARNING)


def _why(error: Exception) -> str:
    """Drivers may be others' code, with faults of its own, for which no machine is to lose its time to power down."""
    if isinstance(error, NetstackError):
        return str(error)
    log.error("the driver failed", exc_info=error)
    return f"the driver failed: {type(error).__name__}: {error}"


async def _asked(machine: Machine, journal: Journal, paused: bool) -> bool:
    try:
        if paused:
            await machine.resume()
        await machine.powerdown()
    except Exception as error:
        journal.add("progress", f"the guest cannot be asked: {_why(error)}", level=logging.WARNING)
        return False
    journal.add("progress", "the guest is asked to power down")
    return True


async def _wait(machine: Machine, journal: Journal, gone: asyncio.Event, hurry: asyncio.Event, grace_s: float) -> None:
    loop = asyncio.get_running_loop()
    until = loop.time() + grace_s
    waiting = [asyncio.create_task(one.wait()) for one in (gone, hurry)]
    try:
        while (left := until - loop.time()) > 0 and not any(one.done() for one in waiting):
            await asyncio.wait(waiting, timeout=min(left, AGAIN_S), return_when=asyncio.FIRST_COMPLETED)
            if not gone.is_set() and not hurry.is_set() and loop.time() < until:
                with contextlib.suppress(Exception):
                    await machine.powerdown()
    finally:
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    if not gone.is_set() and not hurry.is_set():
        journal.add("progress", f"the guest did not power down within {grace_s:g} s", level=logging.WARNING)
