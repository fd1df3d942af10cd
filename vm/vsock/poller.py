"""An epoll of our own inside the loop's: descriptors are watched once, by edges, and their news comes in batches.

asyncio's `add_reader` tells neither of hang-ups nor of edges, and costs a system call whenever interest changes. Here a descriptor
is watched for everything from the start; who is told that it is readable remembers that until a read says otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
from collections.abc import Callable
from typing import Final, TypeAlias

# EPOLL* as numbers: the module can be imported where there is no epoll.
IN: Final = 0x1
OUT: Final = 0x4
HANGUP: Final = 0x10 | 0x8  # EPOLLHUP, EPOLLERR
"""Both directions are closed, by whomever."""
_RDHUP: Final = 0x2000
END: Final = _RDHUP | HANGUP
"""The other end sends no more than what waits already."""
READABLE: Final = IN | END
"""Octets, or their end."""
_ALL: Final = IN | OUT | _RDHUP | 1 << 31  # EPOLLET
_BATCH: Final = 256

Ready: TypeAlias = Callable[[int], None]


class Poller:
    """`after` is called once after each batch of news; `contain` keeps its faults, and those of who is told, from the loop.
    `start` has the running loop call `poll`; it may be called by hand as well."""

    def __init__(
        self,
        after: Callable[[], None],
        *,
        contain: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}
        self._after = after
        self._contain = contain
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.watch(self._wake, lambda mask: None)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Have the running loop call `poll`."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._epoll.fileno(), self.poll)

    def watch(self, descriptor: int, ready: Ready) -> None:
        """Call `ready` with the mask of events; at once where something is there already."""
        self._epoll.register(descriptor, _ALL)
        self._ready[descriptor] = ready

    def unwatch(self, descriptor: int) -> None:
        """No more; to be called before the descriptor is closed. Harmless when repeated."""
        if self._ready.pop(descriptor, None) is not None:
            self._epoll.unregister(descriptor)

    def fileno(self) -> int:
        """Readable when there is news."""
        return self._epoll.fileno()

    def wake(self) -> None:
        """Have `poll` called soon."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_write(self._wake, 1)

    def poll(self) -> None:
        """Tell the news that there is."""
        with self._contain():
            ready = self._ready
            # Looked up first: a number may be somebody else's by the time its turn comes.
            news = [(descriptor, ready.get(descriptor), mask) for descriptor, mask in self._epoll.poll(0, _BATCH)]
            for descriptor, one, mask in news:
                if one is not None and ready.get(descriptor) == one:
                    one(mask)
            self._after()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._epoll.fileno())
        self._ready.clear()
        self._epoll.close()
        os.close(self._wake)
