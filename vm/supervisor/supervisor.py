"""One machine from NEW to STOPPED or FAILED: all is started in order, watched, taken down, and begun again where that is due.

Theory of operation. `run` makes attempts. In one, `_bring_up` starts things in the order of `lifecycle`, each held by the attempt's
stack, while anything may end it by `_end`: a person (`down`), the machine's own end, a part it cannot go on without. The first word
counts, the *verdict*. Then `_take_down` undoes all of it in reverse, however far it had come, and the verdict says whether another
attempt follows. The network lives from the first attempt to the last, since it can serve the next machine as well.

    SIDECARS   network, servers of shares and the vsock device, listeners for what the guest dials
    CREATED    the hypervisor; its driver holds it until the console is attached
    RUNNING    the probe of `ready` is tried until it succeeds
    READY      ports and docker.sock are there
    STOPPING   ports are taken back, the guest is asked to power down, after `stop.grace` it is killed; then the rest, backwards

A crash is followed by another attempt after 1, 2, 4, ... seconds, `restart.max` times in a row; the guest's own power-off is none,
and of its reboot the hypervisor makes nothing but an event.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError, HostError, NetstackError
from vm.api import Hypervisor, Machine, Sidecar, Vsock
from vm.docker_socket import DockerSocket
from vm.settings import VmSettings
from vm.supervisor import probes, services
from vm.supervisor.design import Design, built, design, missing
from vm.supervisor.ending import end
from vm.supervisor.guest import Guest
from vm.supervisor.home import Home
from vm.supervisor.journal import Journal
from vm.supervisor.lifecycle import ENDS, TRANSITIONS, UP, Cause, Input, State, Verdict, backoff
from vm.supervisor.network import Network
from vm.supervisor.outside import Published
from vm.supervisor.parts import Part
from vm.supervisor.watch import Watch

log = logging.getLogger("vm.supervisor")

GONE_S: Final = 0.5
"""How long a machine may take to end after a part beside it that ends with it."""

Build = Callable[[VmSettings, Home, Path, Callable[[str], None]], Awaitable[None]]
"""Makes the kernel and the initrd of `boot.linuxkit` in a directory, and says how it goes. Raises `HostError`, `ConfigError`."""


class Supervisor:
    """Of one machine. `run` is called once, with the lock of `home` held."""

    def __init__(self, settings: VmSettings, home: Home, driver: Hypervisor, *, build: Build | None = None) -> None:
        """Raises `ConfigError` and `Unsupported` where there can be no such machine."""
        self.settings = settings
        self.home = home
        self.journal = Journal()
        self.state = State.NEW
        self.since = time.time()
        self.reason = ""
        self.failures = 0
        """In a row."""
        self.restarts = 0
        self.degraded: dict[str, str] = {}
        """Parts that are away, and why."""
        self.design: Design = design(settings, home, driver)
        self.docker: DockerSocket | None = None
        """From the first time it is ready to the end of all; its clients wait while the machine comes again."""
        self.lease_before = 0.0
        """When the lease that the guest had before it was started ends at the latest, on the loop's clock."""
        self._driver = driver
        self._build = build
        self.network = Network(home.state)
        self.guest = Guest(self.journal, self.degrade, self.degraded)
        self.published = Published(home, self.network, self.journal, self.degraded)
        self.parts: dict[str, Part] = {}
        self._network_watch: Watch | None = None
        self._machine: Machine | None = None
        self._gone = asyncio.Event()
        """There is no machine."""
        self._gone.set()
        self._verdict: asyncio.Future[Verdict] | None = None
        self._watches: list[Watch] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.outside = contextlib.AsyncExitStack()
        """What only a machine that is ready has."""
        self._down = asyncio.Event()
        self._kill = asyncio.Event()

    # What a person may want.

    @property
    def pid(self) -> int:
        """The hypervisor's; 0 where there is none."""
        return self._machine.pid if self._machine is not None and not self._gone.is_set() else 0

    def down(self, *, kill: bool = False) -> None:
        """Take it down for good; `kill` does not ask the guest. May be said again, to kill after all."""
        self._down.set()
        if kill:
            self._kill.set()
        self._end(Cause.ASKED, "asked to go down" + (" at once" if kill else ""))

    def restart(self) -> None:
        """Down, and up again. Raises `HostError` where it is not up."""
        self._up()
        self._end(Cause.RESTART, "asked to restart")

    async def pause(self) -> None:
        """Raises `HostError`, `Unsupported`."""
        await self._up().pause()
        self.guest.paused = True
        self.journal.add("paused", "paused")

    async def resume(self) -> None:
        """Raises `HostError`, `Unsupported`."""
        await self._up().resume()
        self.guest.paused = False
        self.journal.add("resumed", "resumed")

    def _up(self) -> Machine:
        if self._machine is None or self.state not in UP:
            raise HostError(f"{self.settings.name} is {self.state.value}, not up")
        return self._machine

    def degrade(self, name: str, why: str) -> None:
        """Something of the machine is not to be had; it goes on without."""
        self.degraded[name] = why
        self.journal.add("degraded", f"{name}: {why}", level=logging.WARNING)

    # The attempts.

    async def run(self) -> State:
        """Until the machine is down for good. Everything that was started is ended, whatever happens."""
        try:
            while True:
                verdict = await self._attempt()
                if (last := self._last(verdict)) is not None:
                    await self._finish()
                    self._move(*last)
                    return self.state
                if wait_s := self._again(verdict):
                    self.journal.add(
                        "waiting", f"starting again in {wait_s:g} s ({self.failures} of {self.settings.restart.max})"
                    )
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._down.wait(), wait_s)
        finally:
            await self._finish()
            if self.state not in ENDS:
                self.state, self.reason = State.FAILED, "the supervisor failed; its log says how"
            try:
                self.home.write("result", {"state": self.state.value, "reason": self.reason, "since": time.time()})
            except HostError as error:
                log.warning("what became of it is not kept: %s", error)
            self.journal.end()

    async def _finish(self) -> None:
        """What lives from the first attempt to the last. Harmless when repeated."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._docker_down(again=False)
        await self._network_down()
        self.home.sweep(served=self.home.state.control)

    def _last(self, verdict: Verdict) -> tuple[Input, str] | None:
        """How all ends after an attempt; `None` when another follows."""
        settings = self.settings.restart
        if self._down.is_set() or verdict.cause in (Cause.ASKED, Cause.POWEROFF):
            return Input.GONE, verdict.text
        if verdict.cause is Cause.RESTART:
            return None
        if not verdict.counts or settings.policy == "never" or self.failures > settings.max:
            more = f" ({self.failures} times in a row)" if self.failures > 1 else ""
            return Input.BROKEN, f"{verdict.text}{more}"
        return None

    def _again(self, verdict: Verdict) -> float:
        """Another attempt follows; in how many seconds."""
        settings = self.settings.restart
        self._move(Input.AGAIN, verdict.text)
        if verdict.cause is Cause.RESTART:
            self.failures = 0
            return 0.0
        self.restarts += 1
        return backoff(self.failures, settings.backoff_s, settings.backoff_most_s)

    async def _attempt(self) -> Verdict:
        loop = asyncio.get_running_loop()
        if self._down.is_set():
            verdict = Verdict(Cause.ASKED, "asked to go down")
            self._move(Input.OVER, verdict.text)
            return verdict
        self._verdict = loop.create_future()
        began = loop.time()
        async with contextlib.AsyncExitStack() as stack:
            starting = asyncio.create_task(self._bring_up(stack), name="bring up")
            try:
                either: list[asyncio.Future[Any]] = [starting, self._verdict]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if starting.done() and (error := starting.exception()) is not None:
                    self._broken(error)
                verdict = await self._verdict
            finally:
                starting.cancel()
                await asyncio.gather(starting, return_exceptions=True)
            stable = self.state is State.READY and loop.time() - began >= self.settings.restart.stable_s
            for name in [name for name in self.degraded if name not in self.parts]:
                del self.degraded[name]
            if verdict.counts:
                self.failures = 1 if stable else self.failures + 1
            self._move(Input.OVER, verdict.text)
            await self._take_down(verdict)
        return verdict

    def _broken(self, error: BaseException) -> None:
        """Starting failed. What failed in a first attempt will in a second; later it may have to do with the crash before."""
        if not isinstance(error, NetstackError):
            log.error("starting failed by a fault of ours", exc_info=error)
        text = str(error) if isinstance(error, NetstackError) else f"{type(error).__name__}: {error}"
        again = self.failures > 0 and isinstance(error, HostError)
        self._end(Cause.CRASHED if again else Cause.UNREADY, text)

    def _end(self, cause: Cause, text: str) -> None:
        """The machine has to go down; the first word counts."""
        if self._verdict is not None and not self._verdict.done():
            self._verdict.set_result(Verdict(cause, text))

    def _move(self, given: Input, why: str = "") -> None:
        self.state = TRANSITIONS[self.state, given]
        self.since = time.time()
        self.reason = why
        text = self.state.value + (f": {why}" if why else "")
        self.journal.add("state", text, state=self.state.value, reason=why)

    # Up.

    async def _bring_up(self, stack: contextlib.AsyncExitStack) -> None:
        self._move(Input.BEGIN)
        if complaints := missing(self.settings):
            raise ConfigError("\n".join(complaints))
        if self.settings.boot.linuxkit is not None and self._build is not None:
            self.journal.add("progress", f"building {self.settings.boot.linuxkit}")
            await self._build(
                self.settings, self.home, built(self.home.state), lambda text: self.journal.add("build", text)
            )
            self._build = None  # the machine that comes again is the same
        await self._network_up()
        for sidecar in self.design.sidecars:
            if not sidecar.after_machine:
                await self._part(sidecar, stack)
        streams = services.vsock(self.design)
        if streams is not None:
            await services.serve_control(self, streams, stack)
        console = services.console_log(self)
        if console is not None:
            console.begin()
        if self.design.network is not None and (mac := self.design.spec.nics[0].mac):
            _, self.lease_before = await self.network.lease_end(mac)
        self._move(Input.PLACED)
        await self._create(stack)
        services.link_console(self, stack)
        for sidecar in self.design.sidecars:
            if sidecar.after_machine:
                await self._part(sidecar, stack)
        self._move(Input.STARTED)
        self.journal.add("progress", f"waiting until it is ready ({self.settings.probe})")
        await self._probe(streams, console)
        if self.design.network is not None:
            await self.published.publish(self.settings.publish)
        await services.serve_host(self, streams)
        self._move(Input.ANSWERED)

    async def _part(self, sidecar: Sidecar, stack: contextlib.AsyncExitStack) -> None:
        part = Part(sidecar, self.home)
        self.journal.add("progress", f"starting {sidecar.name}")
        await part.start()
        stack.push_async_callback(part.stop)
        self.parts[part.name] = part
        watch = Watch(part, self.settings.restart, self.journal, self.degraded, lost=self._part_lost)
        self._watches.append(watch)
        stack.callback(self.parts.pop, part.name, None)
        stack.callback(self.degraded.pop, part.name, None)
        stack.push_async_callback(watch.close)

    def _part_lost(self, text: str) -> None:
        """A part that ends may have been told by the machine's own end, which then is what counts."""
        self._later(self._unless_gone(text, self._verdict))

    async def _unless_gone(self, text: str, of: asyncio.Future[Verdict] | None) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._gone.wait(), GONE_S)
            await asyncio.sleep(0)
        if self._verdict is of:  # else it was of a machine that has ended meanwhile
            self._end(Cause.LOST, text)

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _create(self, stack: contextlib.AsyncExitStack) -> None:
        self.journal.add("progress", f"starting {self._driver.name}")
        machine = await self._driver.start(self.design.plan, self.home.state)
        self._machine = machine
        self._gone.clear()
        watching = asyncio.create_task(self._follow(machine), name="machine")

        async def close() -> None:
            try:
                await machine.close()
            except Exception:  # of a driver of others; what else there is to be taken down still is
                log.exception("closing the machine failed")
            await asyncio.gather(watching, return_exceptions=True)
            self._machine = None
            self.home.forget("hypervisor")

        stack.push_async_callback(close)
        if machine.pid:
            self.home.record("hypervisor", machine.pid)

    async def _follow(self, machine: Machine) -> None:
        verdict = await self.guest.follow(machine, self._driver.name, lambda found: self._end(found.cause, found.text))
        self._gone.set()
        self._end(verdict.cause, verdict.text)

    async def _probe(self, streams: Vsock | None, console: probes.ConsoleLog | None) -> None:
        probe = services.probe(self, streams, console)
        if probe is None:
            return
        limit_s = self.settings.ready.limit_s
        try:
            async with asyncio.timeout(limit_s):
                await probes.until(probe, every_s=self.settings.ready.every_s)
        except TimeoutError:
            raise HostError(
                f"not ready within {limit_s:g} s (ready: {self.settings.probe}); the console's log may say why: "
                f"{self.home.state.console_log}"
            ) from None

    # Down.

    async def _take_down(self, verdict: Verdict) -> None:
        """The machine; what was started for it follows by the attempt's stack."""
        await self.published.withdraw()
        await self.outside.aclose()
        await self._docker_down(again=verdict.counts or verdict.cause is Cause.RESTART)
        for watch in self._watches:
            await watch.close()  # programs beside it may end with it
        self._watches.clear()
        machine = self._machine
        if machine is None or self._gone.is_set():
            return
        asked = self.design.caps.acpi and verdict.cause is not Cause.CRASHED
        await end(
            machine,
            self.journal,
            gone=self._gone,
            hurry=self._kill,
            grace_s=self.settings.stop.grace_s if asked else None,
            paused=self.guest.paused,
        )

    async def _docker_down(self, *, again: bool) -> None:
        if self.docker is None:
            return
        self.docker.ready(False)
        if not again:
            await self.docker.close()
            self.docker = None

    # The network, which outlives attempts.

    async def _network_up(self) -> None:
        sidecar = self.design.network
        if sidecar is None or self._network_watch is not None:
            return
        self.journal.add("progress", "starting the network")
        part = Part(sidecar, self.home)
        await part.start()
        self.parts[part.name] = part
        # Of a supervisor that was killed.
        await self.published.withdraw()
        self._network_watch = Watch(
            part,
            self.settings.restart,
            self.journal,
            self.degraded,
            lost=self._network_lost,
            back=self._network_back,
            means=""
            if self.design.rejoins
            else "it is started again, and then the machine, which cannot join it again",
        )

    def _network_lost(self, text: str) -> None:
        self._end(Cause.LOST, text)
        self._later(self._network_down())

    async def _network_back(self) -> None:
        """It was away. Whose guest cannot come back to it goes down, and comes up again with it."""
        if not self.design.rejoins and self._machine is not None:
            self._end(Cause.LOST, f"the network was lost, and {self._driver.name} cannot join it again")
        elif self.state is State.READY:
            await self.published.publish(self.settings.publish)

    async def _network_down(self) -> None:
        watch, self._network_watch = self._network_watch, None
        if watch is not None:
            await watch.close()
        if self.design.network is not None and (part := self.parts.pop(self.design.network.name, None)) is not None:
            await part.stop()
