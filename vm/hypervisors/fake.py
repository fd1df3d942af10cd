"""A hypervisor for tests of those who look after machines: `fake_machine`, a program of its own, behaves as `VmSpec.extra` says.

It has whatever is asked of it, and of that only the console, vsock and the orders are real. `vsock=hyperkit` among the words makes
vsock that of HyperKit instead of Firecracker's; `binary=NAME` starts NAME, which may be missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, get_args

from netstack.errors import ConfigError, HostError
from vm.api import Caps, Event, EventKind, Hypervisor, Machine, NicKind, Plan, ShareKind, StateDir, VmSpec, VsockKind
from vm.hypervisors.caps import check
from vm.hypervisors.fake_machine import LINE, Behaviour
from vm.hypervisors.machine import LIMIT_S, ProcessMachine
from vm.hypervisors.prepare import prepare
from vm.hypervisors.process import Process, spawn, until
from vm.hypervisors.rest import listens
from vm.pty_shim import PtyShim

NAME: Final = "fake"
_KINDS: Final[dict[str, VsockKind]] = {"hybrid": "hybrid", "hyperkit": "hyperkit"}


class Fake:
    """The driver."""

    name = NAME
    caps = Caps(
        nics=frozenset(get_args(NicKind)),
        shares=frozenset(get_args(ShareKind)),
        vsock=frozenset(_KINDS.values()),
        pause=True,
        acpi=True,
        shared_memory=True,
        pty=True,
        rejoins_network=True,
    )

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        words, binary, vsock = _divided(spec.extra)
        argv = [*((binary,) if binary else (sys.executable, "-m", "vm.hypervisors.fake_machine"))]
        argv += ["--state", str(state.path), "--name", spec.name]
        sockets = [state.monitor]
        if spec.vsock is not None:
            argv += ["--vsock", str(spec.vsock.directory), "--cid", str(spec.vsock.cid)]
            sockets += [spec.vsock.directory / "connect", spec.vsock.directory / "vsock"]
        return Plan(
            driver=NAME,
            argv=(*argv, *words),
            disks=spec.disks,
            sockets=tuple(sockets),
            console="printed",
            vsock=None if spec.vsock is None else vsock,
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        await prepare(plan)
        async with contextlib.AsyncExitStack() as undo:
            process = await spawn(
                plan.argv, plan.env, log=state.log(NAME), install="it is as missing as `binary=` wants it"
            )
            undo.push_async_callback(process.close)
            await until(lambda: listens(state.monitor), process, LIMIT_S, f"monitor at {state.monitor}")
            monitor = Monitor(*await asyncio.open_unix_connection(state.monitor, limit=LINE))
            undo.push_async_callback(monitor.close)
            console = PtyShim.over_pty(state.console, state.console_log, Path(await monitor.order("console")))
            undo.push_async_callback(console.close)
            machine = FakeHandle(process, console, monitor)
            undo.pop_all()
            undo.push_async_callback(machine.close)
            await monitor.order("cont")
            undo.pop_all()
            return machine


def _divided(extra: tuple[str, ...]) -> tuple[tuple[str, ...], str, VsockKind]:
    """The words for the program, and what else it is that starts and how vsock is had. Raises `ConfigError`."""
    ours = dict(word.split("=", 1) for word in extra if word.startswith(("binary=", "vsock=")))
    words = tuple(word for word in extra if not word.startswith(("binary=", "vsock=")))
    Behaviour.parse(words)
    kind = ours.get("vsock", "hybrid")
    if kind not in _KINDS:
        raise ConfigError(f"fake: vsock={kind}: there are {' and '.join(_KINDS)}")
    return words, ours.get("binary", ""), _KINDS[kind]


class Monitor:
    """The program's orders, one at a time, and what it tells."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.hear: Callable[[dict[str, Any]], None] = lambda _event: None
        """Is told each event."""
        self._writer = writer
        self._turn = asyncio.Lock()
        self._answers: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._listening = asyncio.create_task(self._listen(reader))

    async def order(self, order: str, **more: Any) -> Any:
        """Raises `HostError`: it refuses, or is gone."""
        async with self._turn:
            if self._listening.done():
                raise HostError(f"fake: {order}: the machine is gone")
            self._writer.write(json.dumps({"order": order, **more}).encode() + b"\n")
            answer = await asyncio.wait_for(self._answers.get(), LIMIT_S)
        if answer is None or "error" in answer:
            raise HostError(f"fake: {order}: {answer['error'] if answer else 'the machine is gone'}")
        return answer["return"]

    async def close(self) -> None:
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def ended(self) -> None:
        """Until nothing more can be heard."""
        await asyncio.wait([self._listening], timeout=LIMIT_S)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if "event" in message:
                    self.hear(message)
                else:
                    self._answers.put_nowait(message)
        except OSError:
            pass
        finally:
            self._answers.put_nowait(None)


class FakeHandle(ProcessMachine):
    """What the driver has of the program."""

    def __init__(self, process: Process, console: PtyShim, monitor: Monitor) -> None:
        super().__init__(NAME, process, console)
        self.monitor = monitor
        monitor.hear = self._hear

    async def close(self) -> None:
        await super().close()
        await self.monitor.close()

    async def _pause(self) -> None:
        await self.monitor.order("pause")

    async def _resume(self) -> None:
        await self.monitor.order("resume")

    async def _powerdown(self) -> None:
        await self.monitor.order("powerdown")

    async def _heard(self) -> None:
        await self.monitor.ended()

    def _hear(self, event: dict[str, Any]) -> None:
        """RESET and PANIC; the other events have their cause on this side."""
        match event:
            case {"event": "reset", "by_guest": bool(by_guest)}:
                self.tell(Event(kind=EventKind.RESET, by_guest=by_guest))
            case {"event": "panic"}:
                self.tell(Event(kind=EventKind.PANIC))


DRIVER: Final[Hypervisor] = Fake()
