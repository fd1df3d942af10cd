"""The host's `getaddrinfo`, which blocks, in threads: one per name that is being looked up, `MAX_LOOKUPS` at once.

Who asks for a name that is being looked up already shares the answer. A thread goes on when nobody waits for it any more,
since nothing can stop it, and counts until it has ended; threads are daemons, so that none holds up the end of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Sequence
from typing import Final, TypeAlias

MAX_LOOKUPS: Final = 32

_Found: TypeAlias = list[bytes] | Exception


def getaddrinfo(name: str) -> list[bytes]:
    """The addresses of a name, 4 or 16 octets each, best first. Raises `OSError` and `UnicodeError`. Blocks."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return [socket.inet_pton(family, str(place[0]).partition("%")[0]) for family, _, _, _, place in found]


class Names:
    """See the module."""

    def __init__(self) -> None:
        self._room = asyncio.Semaphore(MAX_LOOKUPS)
        self._running: dict[str, asyncio.Future[list[bytes]]] = {}

    async def look_up(self, name: str) -> Sequence[bytes]:
        """As `getaddrinfo`, without blocking."""
        if name not in self._running:
            await self._room.acquire()
            if name in self._running:  # somebody else was faster
                self._room.release()
        if name in self._running:
            return await asyncio.shield(self._running[name])
        loop = asyncio.get_running_loop()
        future = self._running[name] = loop.create_future()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # perhaps nobody waits
        try:
            threading.Thread(target=self._run, args=(loop, name), name="pyvpnkit-proxy-name", daemon=True).start()
        except RuntimeError as error:  # no more threads
            self._ended(name, OSError(str(error)))
        return await asyncio.shield(future)

    def _run(self, loop: asyncio.AbstractEventLoop, name: str) -> None:
        try:
            found: _Found = getaddrinfo(name)
        except Exception as error:  # whatever it is, is told to who asked
            found = error
        with contextlib.suppress(RuntimeError):  # the loop is closed, nobody waits
            loop.call_soon_threadsafe(self._ended, name, found)

    def _ended(self, name: str, found: _Found) -> None:
        self._room.release()
        future = self._running.pop(name)
        if isinstance(found, Exception):
            future.set_exception(found)
        else:
            future.set_result(found)
