"""A machine that is a process: what all drivers have in common (`vm.api.Machine`).

A driver says how its hypervisor is told to pause, to go on, and to press the power button; the rest is the process: it is there, it
is killed, it is gone. The events are ours, but for what a driver hears besides.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from netstack.errors import HostError
from vm.api import Console, Event, EventKind, Machine, Plan, RestCall, StateDir
from vm.hypervisors.caps import cannot
from vm.hypervisors.prepare import prepare
from vm.hypervisors.process import Process, ended, spawn
from vm.hypervisors.rest import Rest
from vm.hypervisors.words import named_both_ways
from vm.pty_shim import PtyShim

LIMIT_S: Final = 10.0
"""Within which a hypervisor that was started has its monitor and its console."""
MAX_EVENTS: Final = 256
"""That nobody has read: the oldest goes first."""


class ProcessMachine:
    """`vm.api.Machine` over `process`, which it owns, as it does `console`. A subclass overrides the orders that it has."""

    def __init__(self, driver: str, process: Process, console: Console | None = None) -> None:
        self.driver = driver
        self.process = process
        self.console = console
        self._asked = False
        self._ordering = asyncio.Lock()
        self._events: asyncio.Queue[Event] = asyncio.Queue(MAX_EVENTS)
        self._ending = asyncio.create_task(self._end())
        self.tell(Event(kind=EventKind.STARTED))

    @property
    def pid(self) -> int:
        return self.process.pid

    def tell(self, event: Event) -> None:
        if self._events.full():
            self._events.get_nowait()
        self._events.put_nowait(event)

    async def events(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if event.kind is EventKind.EXITED:
                return

    async def pause(self) -> None:
        async with self._ordering:
            await self._pause()
            self.tell(Event(kind=EventKind.PAUSED))

    async def resume(self) -> None:
        async with self._ordering:
            await self._resume()
            self.tell(Event(kind=EventKind.RESUMED))

    async def powerdown(self) -> None:
        async with self._ordering:
            await self._powerdown()
            self._asked = True
            self.tell(Event(kind=EventKind.POWERDOWN))

    async def kill(self) -> None:
        self._asked = True
        self.process.kill()
        await self.wait()

    async def wait(self) -> int:
        return await asyncio.shield(self._ending)

    async def close(self) -> None:
        await self.process.close()
        with contextlib.suppress(asyncio.CancelledError):
            await self._ending
        if self.console is not None:
            await self.console.close()

    async def _pause(self) -> None:
        raise cannot(self.driver, "it cannot pause a machine", lambda caps: caps.pause)

    async def _resume(self) -> None:
        raise cannot(self.driver, "it cannot pause a machine, and so not resume one", lambda caps: caps.pause)

    async def _powerdown(self) -> None:
        raise cannot(self.driver, "it cannot ask a guest to power down", lambda caps: caps.acpi)

    async def _heard(self) -> None:
        """Until all is told that the hypervisor said before it went."""

    async def _end(self) -> int:
        status = await self.process.wait()
        await self._heard()
        async with self._ordering:  # it may be gone before the order is answered for which it went
            pass
        if not status:
            self.tell(Event(kind=EventKind.SHUTDOWN, by_guest=not self._asked))
        self.tell(Event(kind=EventKind.EXITED, status=status, text=self.process.said()))
        return status


Orders = Mapping[Literal["pause", "resume", "powerdown"], RestCall]


class RestMachine(ProcessMachine):
    """Whose orders are calls of a REST API."""

    def __init__(self, driver: str, process: Process, console: Console, rest: Rest, orders: Orders) -> None:
        super().__init__(driver, process, console)
        self._rest = rest
        self._orders = orders

    async def _pause(self) -> None:
        await self._rest.call(self._orders["pause"])

    async def _resume(self) -> None:
        await self._rest.call(self._orders["resume"])

    async def _powerdown(self) -> None:
        await self._rest.call(self._orders["powerdown"])


async def place(plan: Plan, state: StateDir) -> None:
    """What has to be there before the hypervisor is. Raises `ConfigError`, `HostError`."""
    await prepare(plan)
    if plan.vsock == "hybrid":
        named_both_ways(state.vsock)


async def start_by_rest(
    plan: Plan, state: StateDir, *, install: str, inspect: str, pty: Callable[[Any], str], orders: Orders
) -> Machine:
    """Start what tells the console's pty by its REST API: `pty` finds it in the answer to `inspect`. Raises `HostError`."""
    await place(plan, state)
    async with contextlib.AsyncExitStack() as undo:
        process = await spawn(plan.argv, plan.env, log=state.log(plan.driver), install=install)
        undo.push_async_callback(process.close)
        rest = Rest(state.monitor, plan.driver)
        await rest.there(process)
        for call in plan.rest:
            await rest.call(call)
        path = await _told_pty(process, rest, inspect, pty)
        console = PtyShim.over_pty(state.console, state.console_log, path)
        undo.pop_all()
        return RestMachine(plan.driver, process, console, rest, orders)


async def _told_pty(process: Process, rest: Rest, inspect: str, pty: Callable[[Any], str]) -> Path:
    """The API is there before the machine, so a refusal may mean: not yet. Raises `HostError`."""
    loop = asyncio.get_running_loop()
    end = loop.time() + LIMIT_S
    while True:
        try:
            if path := pty(await rest.call(RestCall(method="GET", path=inspect))):
                return Path(path)
            why = f"{rest.name}: {inspect} names no pty of the console"
        except HostError as error:
            why = str(error)
        if process.returncode is not None:
            raise await ended(process)
        if loop.time() >= end:
            raise HostError(f"{why}; for {LIMIT_S:g} s")
        await asyncio.sleep(0.05)


async def spawn_on_pty(
    plan: Plan, state: StateDir, *, install: str, undo: contextlib.AsyncExitStack
) -> tuple[PtyShim, Process]:
    """Start what has the console on its standard input and output; `undo` gets what ends both again. Raises `HostError`."""
    console, ends = PtyShim.over_pipes(state.console, state.console_log)
    undo.push_async_callback(console.close)
    with ends:
        process = await spawn(
            plan.argv, plan.env, log=state.log(plan.driver), stdin=ends.stdin, stdout=ends.stdout, install=install
        )
    undo.push_async_callback(process.close)
    return console, process
