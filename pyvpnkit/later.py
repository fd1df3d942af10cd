"""A server that is made when its first client comes, because most daemons never have one and aiohttp alone is 20 MiB.

What must be imported is imported in a thread, so that guests do not wait for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

log = logging.getLogger("pyvpnkit")


class Accepts(Protocol):
    """What is made."""

    def accept(self, sock: socket.socket) -> None:
        """Serve an accepted connection, and own it."""
        ...


class Later:
    """Makes what `make` returns, once; `modules` are imported first. Clients wait meanwhile."""

    def __init__(self, make: Callable[[], Awaitable[Accepts]], modules: Sequence[str]) -> None:
        self._make = make
        self._modules = modules
        self._made: asyncio.Task[Accepts] | None = None
        self._waiting: set[asyncio.Task[None]] = set()

    def accept(self, sock: socket.socket) -> None:
        """Own an accepted connection and hand it on. Never raises."""
        task = asyncio.get_running_loop().create_task(self._hand(sock))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def _hand(self, sock: socket.socket) -> None:
        try:
            (await self.server()).accept(sock)
        except Exception:  # a door that cannot be opened must not end the network
            log.exception("a control connection could not be served")
            sock.close()
        except asyncio.CancelledError:
            sock.close()
            raise

    async def server(self) -> Accepts:
        """The server, made by now."""
        if self._made is None:
            self._made = asyncio.get_running_loop().create_task(self._begin())
        return await asyncio.shield(self._made)

    async def _begin(self) -> Accepts:
        for module in self._modules:
            await asyncio.to_thread(importlib.import_module, module)
        return await self._make()

    async def close(self) -> None:
        """No more; what was made is its maker's to end."""
        tasks = [*self._waiting, *([self._made] if self._made is not None else [])]
        for task in tasks:
            task.cancel()
        for task in tasks:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
