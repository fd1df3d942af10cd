"""A supervised machine in a directory of its own, over the fake hypervisor, whose processes are real."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pyvpnkit.keeper import descendants
from vm import settings_file
from vm.api import Hypervisor, Plan, Sidecar, StateDir, VmSpec
from vm.hypervisors import fake
from vm.supervisor.home import Home
from vm.supervisor.lifecycle import State
from vm.supervisor.supervisor import Build, Supervisor

LIMIT_S = 60.0
FAST = "restart: {backoff: 0.05, backoff_most: 0.2}\n"
"""Waits of a person's time are not for tests."""


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """Where sockets fit: pytest's own directories are too deep."""
    made = Path(tempfile.mkdtemp(prefix="vm"))
    try:
        yield made
    finally:
        shutil.rmtree(made)


class Beside(fake.Fake):
    """The fake hypervisor, which wants more programs beside it."""

    def __init__(self, sidecars: Sequence[Sidecar] = (), **caps: Any) -> None:
        self._sidecars = tuple(sidecars)
        self.caps = dataclasses.replace(fake.Fake.caps, **caps)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        return dataclasses.replace(super().plan(spec, state), sidecars=self._sidecars)


class House:
    """One supervisor and its task."""

    def __init__(self, supervisor: Supervisor) -> None:
        self.supervisor = supervisor
        self.home = supervisor.home
        self.task = asyncio.create_task(supervisor.run())
        self.entries: list[dict[str, Any]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for entry in self.supervisor.journal.read():
            self.entries.append(entry)

    @property
    def states(self) -> list[str]:
        """Those it has been in, in order."""
        return [entry["state"] for entry in self.entries if entry["kind"] == "state"]

    @property
    def said(self) -> str:
        return "\n".join(entry["text"] for entry in self.entries)

    async def until(self, true: Callable[[], bool]) -> None:
        """Wait for what happens elsewhere; fails with all that happened."""
        try:
            async with asyncio.timeout(LIMIT_S):
                while not true():  # noqa: ASYNC110  # it happens in another process
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"it did not come about:\n{self.said}") from None

    async def ready(self) -> None:
        await self.until(lambda: self.supervisor.state in (State.READY, State.STOPPED, State.FAILED))
        assert self.supervisor.state is State.READY, self.said

    async def over(self) -> State:
        """Until it is down for good."""
        async with asyncio.timeout(LIMIT_S):
            found = await asyncio.shield(self.task)
            await self._reading
        return found

    async def order(self, **order: Any) -> Any:
        """To the fake machine, as its guest or as fate."""
        reader, writer = await asyncio.open_unix_connection(self.home.state.monitor)
        try:
            writer.write(json.dumps(order).encode() + b"\n")
            async with asyncio.timeout(LIMIT_S):
                while line := await reader.readline():
                    if "event" not in (answer := json.loads(line)):
                        return answer
            return None
        finally:
            writer.close()

    def pid(self, part: str) -> int:
        return self.supervisor.parts[part].pid


def write(directory: Path, text: str, *words: str) -> Path:
    """A machine's file; `words` are the fake machine's behaviour."""
    (directory / "kernel").touch()
    file = directory / "machine.yml"
    (directory / "linuxkit.yml").write_text("kernel: {image: 'dir:.'}\n")
    extra = json.dumps(list(words))
    boot = "" if "boot:" in text else "boot: {kernel: kernel}\n"
    file.write_text(f"name: house\nhypervisor: {{driver: fake, extra: {extra}}}\n{boot}{text}")
    return file


@contextlib.asynccontextmanager
async def house(
    text: str, *words: str, driver: Hypervisor | None = None, build: Build | None = None
) -> AsyncIterator[House]:
    """A machine as `text` says, from its start; at the end it is down, and nothing of it may be left."""
    before = set(descendants(os.getpid()))
    with short_directory() as directory:
        home = Home(directory / "s")
        home.prepare()
        wanted = settings_file.load(write(directory, text, *words))
        made = House(Supervisor(wanted, home, driver or fake.DRIVER, build=build))
        try:
            yield made
        finally:
            if not made.task.done():
                made.supervisor.down(kill=True)
            await made.over()
        assert nothing_left(home) == []
        assert set(descendants(os.getpid())) - before == set()


def nothing_left(home: Home) -> list[str]:
    """Sockets, links and records of processes that a machine which is down has left."""
    paths = [*home.path.iterdir(), *(home.path / "vsock").iterdir(), *(home.path / "run").iterdir()]
    return [str(path) for path in paths if path.is_socket() or path.is_symlink() or path.suffix == ".pid"]
