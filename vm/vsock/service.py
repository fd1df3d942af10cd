"""The vsock device of one machine, whole: the control socket for its hypervisor, the device, and the host's Unix sockets.

    async with VsockService(vhost_user=Path("S"), directory=Path("DIR"), cid=3) as service: ...

One front-end at a time; when it goes, so do all connections, and another (or the same) may come. A fault of ours stops the device
until the guest's driver starts it again, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from netstack.link.vhost_user.channel import Channel
from vm.accepting import Acceptor
from vm.vsock.device import VsockDevice
from vm.vsock.engine import FIRST_PORT, LAST_PORT, LIMIT
from vm.vsock.packet import FIRST_GUEST, LARGEST_CID
from vm.vsock.poller import Poller
from vm.vsock.unix import UnixSide, listening

log = logging.getLogger("pyvpnkit")

TICK_S: Final = 1.0


class VsockService:
    """See the module. `forwards` are ports of the guest that have a socket of their own. Raises `ConfigError` at its begin."""

    def __init__(
        self, *, vhost_user: Path, directory: Path, cid: int = 3, forwards: Sequence[int] = (), limit: int = LIMIT
    ) -> None:
        if not FIRST_GUEST <= cid <= LARGEST_CID:
            raise ConfigError(f"vsock cid {cid}: a guest's are from {FIRST_GUEST} to {LARGEST_CID}")
        if limit < 1:
            raise ConfigError(f"vsock limit {limit}: at least one connection must be possible")
        self.contained = 0
        """Faults of ours; anything but 0 deserves a report."""
        self.device: VsockDevice | None = None
        """While a front-end is connected."""
        self._idle = asyncio.Event()
        self._idle.set()
        self.unix = UnixSide(directory, cid, self._connect, forwards)
        self._path = vhost_user.absolute()
        self._cid = cid
        self._limit = limit
        self._front_ends: Acceptor | None = None
        self._poller: Poller | None = None
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> VsockService:
        async with contextlib.AsyncExitStack() as stack:
            self._poller = Poller(self._turn, contain=self._contained)
            stack.callback(self._poller.close)
            self._poller.start()
            await stack.enter_async_context(self.unix)
            bound = stack.enter_context(listening(self._path, "vhost-user socket"))
            self._front_ends = Acceptor(bound.sock, self._serve, name="vsock device", limit=1)
            stack.push_async_callback(self._front_ends.close)
            ticking = asyncio.create_task(self._tick())
            stack.push_async_callback(_ended, ticking)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def describe(self) -> dict[str, object]:
        """For status pages."""
        found: dict[str, object] = {} if self.device is None else self.device.describe()
        found["sockets"] = {name: counts.as_dict() for name, counts in self.unix.counts().items()}
        found["contained"] = self.contained
        return found

    async def idle(self) -> None:
        """Until no front-end is connected."""
        await self._idle.wait()

    async def _serve(self, sock: socket.socket) -> None:
        """One front-end, until it goes."""
        assert self._poller is not None
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        port = FIRST_PORT + secrets.randbelow(LAST_PORT - FIRST_PORT + 1)
        device = VsockDevice(
            f"vsock:{self._cid}",
            self._cid,
            self._poller,
            self.unix.dial,
            now=loop.time,
            first_port=port,
            limit=self._limit,
        )

        def closed(reason: str) -> None:
            log.info("%s: %s", device.name, reason)
            ended.set()

        channel = Channel(socket.socket(fileno=sock.detach()), device, closed=closed, contain=self._contained)
        self.device = device
        self._idle.clear()
        log.info("%s: a front-end has connected", device.name)
        try:
            channel.start()
            await ended.wait()
        finally:
            channel.close()
            self.device = None
            self._idle.set()

    def _connect(self, port: int, sock: socket.socket, greeting: Callable[[int], bytes]) -> bool:
        return self.device is not None and self.device.connect(port, sock, greeting)

    def _turn(self) -> None:
        if self.device is not None:
            self.device.turn()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            if self.device is not None:
                with self._contained("vsock"):
                    self.device.tick()

    @contextlib.contextmanager
    def _contained(self, where: str = "vsock") -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self.contained:
                log.exception("%s: a fault of ours; further ones are only counted", where)
            self.contained += 1
            if self.device is not None:
                self.device.stop_by_itself("a fault of ours")


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
