"""What is done when a program beside the machine ends by itself: what its `Lost` says.

A restart comes at once the first time, then after 1, 2, 4, ... seconds; who ran for `stable_s` begins anew. After `max` restarts in
a row it is given up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from netstack.errors import HostError
from vm.api import Lost
from vm.settings import RestartSettings
from vm.supervisor.journal import Journal
from vm.supervisor.lifecycle import backoff
from vm.supervisor.parts import Part

log = logging.getLogger("vm.supervisor")


class Watch:
    """Watches one part from now on; `close` ends that. The part itself is left alone."""

    def __init__(
        self,
        part: Part,
        settings: RestartSettings,
        journal: Journal,
        degraded: dict[str, str],
        *,
        lost: Callable[[str], None],
        back: Callable[[], Awaitable[None]] | None = None,
        means: str = "",
    ) -> None:
        """`lost` is called when the machine cannot go on without it, `back` after each restart. `degraded` has those that are away,
        by name, and why. `means` is said of its loss instead of what its `Lost` says."""
        self._part = part
        self._settings = settings
        self._journal = journal
        self._degraded = degraded
        self._lost = lost
        self._back = back
        self._means = means or part.sidecar.lost.value
        self._task = asyncio.create_task(self._run(), name=f"watch {part.name}")

    async def close(self) -> None:
        """Harmless when repeated."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._look()
        except Exception as error:  # a part without a watch would be worse than a machine that is down
            log.exception("watching %s failed by a fault of ours", self._part.name)
            self._lost(f"{self._part.name} is not watched: {error}")

    async def _look(self) -> None:
        part, kind = self._part, self._part.sidecar.lost
        loop = asyncio.get_running_loop()
        failures = 0
        while True:
            began = loop.time()
            how = await part.wait()
            await part.stop()  # what is left of it
            failures = 1 if loop.time() - began >= self._settings.stable_s else failures + 1
            self._degraded[part.name] = how
            self._journal.add("lost", f"{part.name}: {how}: {self._means}", level=logging.WARNING, part=part.name)
            if kind is Lost.STOPS_MACHINE:
                self._lost(f"{part.name} was lost: {how}")
                return
            if kind is Lost.DEGRADED:
                return
            failures = await self._again(failures)
            if failures > self._settings.max:
                self._lost(f"{part.name} cannot be had again: {self._degraded[part.name]}")
                return

    async def _again(self, failures: int) -> int:
        """How many failures in a row it was until then; more than may be when it was given up."""
        part, settings = self._part, self._settings
        while failures <= settings.max:
            if failures > 1:
                await asyncio.sleep(backoff(failures - 1, settings.backoff_s, settings.backoff_most_s))
            part.restarts += 1
            try:
                await part.start()
            except HostError as error:
                self._degraded[part.name] = str(error).removeprefix(f"{part.name}: ")
                self._journal.add("lost", str(error), level=logging.WARNING, part=part.name)
                failures += 1
                continue
            self._degraded.pop(part.name, None)
            self._journal.add("back", f"{part.name} is back", part=part.name)
            if self._back is not None:
                await self._back()
            return failures
        return failures
