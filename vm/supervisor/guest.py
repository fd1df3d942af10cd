"""What is known of a machine that runs, from its driver's events, and how its end is judged."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from vm.api import EventKind, Machine
from vm.supervisor.journal import Journal
from vm.supervisor.lifecycle import Cause, Verdict

RESET_TOLD_S: Final = 1.0
log = logging.getLogger("vm.supervisor")


class Guest:
    """Of one supervisor, for each of its machines in turn."""

    def __init__(self, journal: Journal, degrade: Callable[[str, str], None], degraded: dict[str, str]) -> None:
        self.paused = False
        self.resets = 0
        """Since its start."""
        self._journal = journal
        self._degrade = degrade
        self._degraded = degraded
        self._told = 0.0

    async def follow(self, machine: Machine, name: str, panicked: Callable[[Verdict], None]) -> Verdict:
        """The machine's events to its end, and what that end is; `name` is the hypervisor's. A panic is told as it comes."""
        self.paused, self.resets = False, 0
        by_guest = told = False
        status, text = 0, ""
        try:
            async for event in machine.events():
                match event.kind:
                    case EventKind.SHUTDOWN:
                        told, by_guest = True, event.by_guest
                    case EventKind.RESET:
                        self._reset(by_guest=event.by_guest)
                    case EventKind.PANIC:
                        panicked(Verdict(Cause.CRASHED, event.text or "the guest's kernel panicked"))
                    case EventKind.PAUSED | EventKind.RESUMED:
                        self._paused(event.kind is EventKind.PAUSED, event.text)
                    case EventKind.EXITED:
                        status, text = event.status, event.text
                    case EventKind.STARTED | EventKind.POWERDOWN:
                        pass
        except Exception as error:  # a driver's own fault must not leave a machine without a watch
            log.exception("the driver's events failed")
            status, text = 1, str(error)
        if status == 0:
            return Verdict(
                Cause.POWEROFF, "the guest powered off" if by_guest or not told else f"{name} was told to end"
            )
        how = f"status {status}" if status > 0 else f"signal {-status}"
        said = text.strip().splitlines()
        return Verdict(Cause.CRASHED, f"{name} ended with {how}" + (f": {said[-1]}" if said else ""))

    def _paused(self, paused: bool, why: str) -> None:
        self.paused = paused
        if why:  # not by us: a disk is full, say
            self._degrade("machine", f"paused: {why}")
        elif not paused:
            self._degraded.pop("machine", None)

    def _reset(self, *, by_guest: bool) -> None:
        """A guest may do so without end, and is not to fill our log by it."""
        self.resets += 1
        now = time.monotonic()
        if now - self._told >= RESET_TOLD_S:
            self._told = now
            what = "the guest reboots" if by_guest else "the machine was reset"
            self._journal.add("reset", f"{what} ({self.resets} since its start)")
