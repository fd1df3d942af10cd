"""Waiting for many short-lived sockets at once. HOT PATH: twice per relayed query.

A loop's own `add_reader` and `remove_reader` cost two system calls and an object for a socket that gets one datagram. On Linux the
sockets are in an epoll(7) of their own, which the loop knows as one descriptor: a socket is entered by one call, leaves it when it
is closed, and all answers of one turn are heard together. Elsewhere the loop is asked.
"""

from __future__ import annotations

import asyncio
import select
import sys
from collections.abc import Callable
from typing import Final, Generic, TypeVar

AT_ONCE: Final = 64
"""Sockets heard in one turn of the loop; the others come with the next."""

Owner = TypeVar("Owner")


class Readers(Generic[Owner]):
    """`readable(owner, fd)` is called when the socket `fd` that was added for `owner` can be read, and perhaps when it cannot."""

    def __init__(self, loop: asyncio.AbstractEventLoop, readable: Callable[[Owner, int], None]) -> None:
        self._loop = loop
        self._readable = readable
        self._owners: dict[int, Owner] = {}
        self._epoll = select.epoll() if sys.platform == "linux" else None
        if self._epoll is not None:
            loop.add_reader(self._epoll.fileno(), self._ready)

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, fd: int, owner: Owner) -> None:
        """From now on; `OSError` when the system cannot."""
        if self._epoll is None:
            self._loop.add_reader(fd, self._readable, owner, fd)
        else:
            self._epoll.register(fd, select.EPOLLIN)
        self._owners[fd] = owner

    def remove(self, fd: int) -> None:
        """No longer; the socket must be closed at once."""
        if self._epoll is None:
            self._loop.remove_reader(fd)
        del self._owners[fd]

    def _ready(self) -> None:
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0, AT_ONCE):
            # An answer heard just before may have closed this socket, and another may have its number by now.
            owner = self._owners.get(fd)
            if owner is not None:
                self._readable(owner, fd)
            if self._epoll.closed:
                break

    def close(self) -> None:
        """All sockets must have been removed."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
