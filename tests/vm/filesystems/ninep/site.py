"""A server of a folder in a thread of its own, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.support.ninep_client import Client
from vm.filesystems.ninep.limits import Limits
from vm.filesystems.ninep.listen import FileServer
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep.share import Share


class Site:
    """`export` served as `owner` says; clients are connected by socket pairs."""

    def __init__(
        self,
        export: Path,
        owner: str,
        *,
        read_only: bool = False,
        limits: Limits | None = None,
        listeners: Sequence[socket.socket] = (),
        new_loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    ) -> None:
        self.export = export
        share = Share(export, parse_owner(owner), read_only=read_only, limits=limits)
        self.server = FileServer(share, listeners)
        self.loop = new_loop()
        self._ready, self._over = threading.Event(), asyncio.Event()
        self._clients: list[Client] = []
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._run()))
        self._thread.start()
        assert self._ready.wait(10)

    async def _run(self) -> None:
        async with self.server, asyncio.TaskGroup() as self._group:
            self._ready.set()
            await self._over.wait()
            await self.server.close()

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        self.loop.call_soon_threadsafe(lambda: self._group.create_task(self.server.serve(theirs)))
        return ours

    def client(self, uid: int = 0, *, msize: int = 1 << 20, attach: bool = True) -> Client:
        made = Client(self.connect(), uid=uid, msize=msize, attach=attach)
        self._clients.append(made)
        return made

    def close(self) -> None:
        """Every bound's counter is at zero when clients are gone."""
        self.loop.call_soon_threadsafe(self._over.set)
        self._thread.join(30)
        assert not self._thread.is_alive()
        self.loop.close()
        for client in self._clients:
            client.close()
        share = self.server.share
        assert (share.opened.used, len(share.locks), share.nodes.descriptors) == (0, 0, 0)
        assert self.server.describe()["contained"] == 0, "bugs of ours"


@contextlib.contextmanager
def site(export: Path, owner: str = "passthrough", **how: Any) -> Iterator[Site]:
    """A `Site`, closed afterwards."""
    made = Site(export, owner, **how)
    try:
        yield made
    finally:
        made.close()
