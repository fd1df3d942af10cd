"""Keeps the host's ports in line with the cluster's Services.

    API server --list, watch--> follow --> Engine <-- reconcile --list, expose, unexpose--> host's control API
                                             |            |
                                             +--status, events--> API server

`follow` is an informer: it lists, watches from there, goes on where a watch ended, and lists anew after 410 Gone or any failure.
The ports stay as they are while the API server is away. `reconcile` runs after each change and every `resync_s`, first after the
first list. What fails outside is logged and tried again after 1, 2, 4 .. 30 s. At the end our own ports are closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from netstack.errors import HostError, NetstackError
from portfwd.invm.control import HttpControl
from portfwd.invm.ports import Port
from portfwd.invm.transport import Address
from pyvpnkit.kube.cluster import Bookmark, Changed, Cluster, ClusterError, Deleted, Gone
from pyvpnkit.kube.engine import RESYNC_S, Engine, Trouble, Want

log = logging.getLogger("pyvpnkit.kube")

FIRST_WAIT_S: Final = 1.0
LAST_WAIT_S: Final = 30.0
GATHER_S: Final = 0.05
"""Changes that come so close are one."""
FAREWELL_S: Final = 10.0
"""For closing our ports at the end."""
HOST_TIMEOUT_S: Final = 30.0


class Host(Protocol):
    """The host's ports; every method raises `HostError`."""

    async def list(self) -> list[Port]: ...

    async def expose(self, port: Port) -> None: ...

    async def remove(self, port: Port) -> None: ...


class ControlHost:
    """By VPNKit's control API (spec vpnkit 7.2)."""

    def __init__(self, address: Address, *, timeout_s: float = HOST_TIMEOUT_S) -> None:
        self._control = HttpControl(address, timeout_s=timeout_s)

    async def list(self) -> list[Port]:
        return await self._control.list()

    async def expose(self, port: Port) -> None:
        await self._control.expose(port)

    async def remove(self, port: Port) -> None:
        await self._control.remove(port)


class Backoff:
    """1, 2, 4 .. 30 s, each shortened by up to a half by chance, so that many do not come back at once."""

    def __init__(self, rng: random.Random, *, first_s: float = FIRST_WAIT_S, last_s: float = LAST_WAIT_S) -> None:
        self._rng = rng
        self._first_s = first_s
        self._last_s = last_s
        self._next_s = first_s

    def reset(self) -> None:
        self._next_s = self._first_s

    def delay(self) -> float:
        """How long to wait now, in seconds."""
        wait_s, self._next_s = self._next_s, min(self._next_s * 2, self._last_s)
        return wait_s * self._rng.uniform(0.5, 1.0)


class Forwarder:
    """Runs until it is cancelled."""

    def __init__(
        self,
        cluster: Cluster,
        host: Host,
        engine: Engine,
        *,
        resync_s: float = RESYNC_S,
        backoff: Callable[[], Backoff] | None = None,
    ) -> None:
        self._cluster = cluster
        self._host = host
        self._engine = engine
        self._resync_s = resync_s
        self._backoff = backoff or (lambda: Backoff(random.Random()))
        self._untold: dict[str, str] = {}
        """Why a Service's status was not set, so that it is said once."""
        self._changed = asyncio.Event()
        self._synced = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled; then our ports are closed."""
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._follow())
                tasks.create_task(self._keep())
        finally:
            self._cluster.close()
            await self._withdraw()

    async def _follow(self) -> None:
        backoff = self._backoff()
        while True:
            try:
                services, version = await self._cluster.list()
                self._engine.replace(services)
                log.info("%s: %d Services", self._cluster.host, len(self._engine))
                if self._engine.overflow:
                    log.warning("%d Services are too many and not looked at", self._engine.overflow)
                self._synced.set()
                self._changed.set()
                await self._watch(version, backoff)
            except Gone as error:
                log.info("%s; listing anew", error)
                await asyncio.sleep(backoff.delay())
            except ClusterError as error:
                wait_s = backoff.delay()
                log.warning("%s; trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)

    async def _watch(self, version: str, backoff: Backoff) -> None:
        """Raises `Gone`, `ClusterError`; a watch that the server ends goes on from where it was."""
        while True:
            anything = False
            async with contextlib.aclosing(self._cluster.watch(version)) as events:
                async for later, what in events:
                    anything = True
                    version = later or version
                    self._happened(what)
                    backoff.reset()
            if not anything:
                await asyncio.sleep(backoff.delay())

    def _happened(self, what: Changed | Deleted | Bookmark) -> None:
        match what:
            case Changed(service):
                self._engine.apply(service)
            case Deleted(key):
                self._engine.delete(key)
            case Bookmark():
                return
        self._changed.set()

    async def _keep(self) -> None:
        await self._synced.wait()
        backoff = self._backoff()
        while True:
            self._changed.clear()
            try:
                await self._reconcile()
            except HostError as error:
                wait_s = backoff.delay()
                log.warning("%s; trying again in %.0f s", error, wait_s)
                await asyncio.sleep(wait_s)
                continue
            backoff.reset()
            try:
                async with asyncio.timeout(self._resync_s):
                    await self._changed.wait()
                await asyncio.sleep(GATHER_S)
            except TimeoutError:
                self._engine.resync()

    async def _reconcile(self) -> None:
        """Raises `HostError` where the host as a whole cannot be had."""
        exposed = await self._host.list()
        plan = self._engine.plan(exposed)
        for port in plan.close:
            await self._host.remove(port)
            log.info("closed: %s", port)
        refusals = [refusal for want in plan.open if (refusal := await self._open(want)) is not None]
        for trouble in self._engine.news((*plan.troubles, *refusals)):
            log.warning("Service %s: %s", trouble.service.key, trouble.message)
            await self._cluster.event(trouble)
        await self._tell(await self._host.list() if plan.open or plan.close else exposed)

    async def _open(self, want: Want) -> Trouble | None:
        try:
            await self._host.expose(want.port)
        except NetstackError as error:
            return self._engine.refused(want, str(error))
        log.info("Service %s: %s", want.service.key, want.port)
        return None

    async def _tell(self, exposed: Sequence[Port]) -> None:
        failed = {}
        for service in self._engine.ingress(exposed):
            try:
                await self._cluster.set_ingress(service)
            except ClusterError as error:
                failed[service.key] = str(error)
                if self._untold.get(service.key) != str(error):
                    log.warning("Service %s: its status was not set: %s", service.key, error)
        self._untold = failed

    async def _withdraw(self) -> None:
        try:
            async with asyncio.timeout(FAREWELL_S):
                for port in self._engine.withdraw(await self._host.list()):
                    await self._host.remove(port)
                    log.info("closed: %s", port)
        except (HostError, TimeoutError) as error:
            log.warning("not all ports were closed: %s", error or f"no answer within {FAREWELL_S:.0f} s")
