"""Machines that a driver starts in a test, and what they tell."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from vm.api import Event, EventKind, Hypervisor, Machine, StateDir, VmSpec

LIMIT_S: Final = 30.0


@contextlib.asynccontextmanager
async def started(driver: Hypervisor, spec: VmSpec, state: StateDir) -> AsyncIterator[Machine]:
    machine = await driver.start(driver.plan(spec, state), state)
    try:
        yield machine
    finally:
        await machine.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # it happens in another process
            await asyncio.sleep(0.02)


async def history(machine: Machine) -> list[Event]:
    """All that it tells, until it is gone."""
    async with asyncio.timeout(LIMIT_S):
        return [event async for event in machine.events()]


async def kinds(machine: Machine) -> list[EventKind]:
    return [event.kind for event in await history(machine)]
