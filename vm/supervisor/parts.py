"""Programs beside the machine: started until they are ready, watched, started again, stopped.

    part = Part(sidecar, home, journal)
    await part.start()            HostError with its own words when it ends instead, or takes too long
    status = await part.wait()    until it ends by itself
    await part.stop()             SIGTERM, and SIGKILL after STOP_S

Each is bound to our life and logs to its own file (`vm.hypervisors.process`), and is recorded for who comes after us.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
from typing import Final

from netstack.errors import HostError
from vm.api import Sidecar
from vm.hypervisors.process import Process, ended, spawn, until
from vm.supervisor.home import Home

READY_S: Final = 30.0
"""A Python program on a busy host takes seconds."""
STOP_S: Final = 5.0
_SETTLE_S: Final = 0.5
"""A descriptor that was closed without a word may be that of a program which is ending."""


class Part:
    """One sidecar. `restarts` counts how often it was started again."""

    def __init__(self, sidecar: Sidecar, home: Home, *, ready_s: float = READY_S, stop_s: float = STOP_S) -> None:
        self.sidecar = sidecar
        self.name = sidecar.name
        self.restarts = 0
        self._home = home
        self._ready_s = ready_s
        self._stop_s = stop_s
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """0 while it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else 0

    async def start(self) -> None:
        """Until it is ready. Raises `HostError`; nothing of it is left then."""
        sidecar = self.sidecar
        if sidecar.ready is not None:
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(sidecar.ready).st_mode):
                    os.unlink(sidecar.ready)  # of a run before, whose end would look like readiness
        reading, writing = os.pipe() if any("{ready_fd}" in word for word in sidecar.argv) else (-1, -1)
        try:
            argv = [word.replace("{ready_fd}", str(writing)) for word in sidecar.argv]
            fds = (writing,) if writing >= 0 else ()
            process = await spawn(argv, sidecar.env, log=self._home.state.log(self.name), pass_fds=fds)
            if writing >= 0:
                os.close(writing)
                writing = -1
            self._process = process
            self._home.record(self.name, process.pid)
            if sidecar.ready is not None:
                await until(sidecar.ready.is_socket, process, self._ready_s, f"socket {sidecar.ready}")
            elif reading >= 0:
                await self._told(process, reading)
        except HostError as error:
            await self.stop()
            raise HostError(f"{self.name}: {error}") from None
        except BaseException:
            await self.stop()
            raise
        finally:
            for descriptor in (reading, writing):
                if descriptor >= 0:
                    os.close(descriptor)

    async def _told(self, process: Process, reading: int) -> None:
        loop = asyncio.get_running_loop()
        heard = asyncio.Event()
        loop.add_reader(reading, heard.set)
        try:
            async with asyncio.timeout(self._ready_s):
                await heard.wait()
        except TimeoutError:
            raise HostError(f"not ready within {self._ready_s:g} s; see {process.log}") from None
        finally:
            loop.remove_reader(reading)
        if not os.read(reading, 1):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _SETTLE_S)
        if process.returncode is not None:
            raise await ended(process)

    async def wait(self) -> str:
        """Until it has ended; how, in a line with the last that it said. Without end where it does not run."""
        if self._process is None:
            await asyncio.Event().wait()
        assert self._process is not None
        how, *said = str(await ended(self._process)).splitlines()
        how = how.removeprefix(f"{self._process.name} ").rstrip(":")
        # Who was killed from outside said nothing about it.
        return f"{how}: {said[-1]}" if said and not how.endswith(("SIGKILL", "SIGTERM")) else how

    async def stop(self) -> None:
        """Harmless when repeated."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.terminate()
            await asyncio.wait_for(process.wait(), self._stop_s)
        except TimeoutError:
            pass
        finally:
            await process.close()
            self._home.forget(self.name)
