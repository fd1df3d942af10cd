"""Connections as they come in: so many at once and no more, from nobody but this user, and none can harm another.

Theory of operation. An `Acceptor` owns a listening socket and a task for each connection. More than `limit` at once are closed as
they come, and counted: a caller sees the end of the file at once, rather than wait for what does not come. When this process has
no descriptor left, accepting rests for `REST_S` and the callers wait in the kernel's queue. What `serve` raises ends that
connection only: `OSError` and our own errors are how peers go away, and anything else is a bug of ours, which is logged once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final

from netstack.errors import NetstackError
from netstack.link.listening import peer_uid
from vm.api import Serve

log = logging.getLogger("pyvpnkit")

LIMIT: Final = 256
"""Connections at once."""
REST_S: Final = 0.1

_EXHAUSTED: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


@dataclass(slots=True)
class Accepted:
    """Counters of one listener."""

    accepted: int = 0
    over_limit: int = 0
    strangers: int = 0
    """Callers that another user runs, or that another machine is."""
    rests: int = 0
    """Times that there was no descriptor left."""
    failed: int = 0
    """Connections that ended by an error."""
    contained: int = 0
    """Bugs of ours; anything but 0 deserves a report."""

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def same_user(sock: socket.socket) -> bool:
    """Whether the other end of a Unix socket is run by this user or root, as far as that can be known (threat L1)."""
    return peer_uid(sock) in (None, 0, os.geteuid())


class Acceptor:
    """Serves what `listener` accepts until `close`, which ends all connections; it takes the listening socket over.

    `name` is for the log. `admit` says who may come in. Wants a running loop.
    """

    def __init__(
        self,
        listener: socket.socket,
        serve: Serve,
        *,
        name: str,
        limit: int = LIMIT,
        admit: Callable[[socket.socket], bool] = same_user,
    ) -> None:
        self.counts = Accepted()
        self._listener = listener
        self._serve = serve
        self._name = name
        self._limit = limit
        self._admit = admit
        self._connections: set[asyncio.Task[None]] = set()
        self._resting: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        listener.setblocking(False)
        self._loop.add_reader(listener, self._come)

    def __len__(self) -> int:
        """Connections there are now."""
        return len(self._connections)

    async def close(self) -> None:
        """No more are accepted, and those there are end now. Harmless when repeated."""
        if self._resting is not None:
            self._resting.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener)
            self._listener.close()
        tasks = tuple(self._connections)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _come(self) -> None:
        # Not by `sock_accept`: whoever cancels that just then loses the socket.
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return  # the caller has gone again
        except OSError as error:
            if error.errno in _EXHAUSTED and not self.counts.rests:
                log.warning("%s: %s; callers wait; further times are only counted", self._name, error.strerror)
            self.counts.rests += 1
            self._loop.remove_reader(self._listener)
            self._resting = self._loop.call_later(REST_S, self._loop.add_reader, self._listener, self._come)
            return
        sock.setblocking(False)
        if len(self._connections) >= self._limit:
            self.counts.over_limit += 1
            sock.close()
        elif not self._admits(sock):
            sock.close()
        else:
            self.counts.accepted += 1
            task = asyncio.create_task(self._contain(sock))
            self._connections.add(task)
            task.add_done_callback(lambda done: self._over(done, sock))

    def _admits(self, sock: socket.socket) -> bool:
        try:
            if self._admit(sock):
                return True
        except OSError:  # it has gone again
            return False
        if not self.counts.strangers:
            log.warning("%s: a caller who may not come in is closed; further ones are only counted", self._name)
        self.counts.strangers += 1
        return False

    def _over(self, task: asyncio.Task[None], sock: socket.socket) -> None:
        self._connections.discard(task)
        sock.close()  # of one, too, that ended before it began

    async def _contain(self, sock: socket.socket) -> None:
        try:
            await self._serve(sock)
        except (OSError, NetstackError, asyncio.IncompleteReadError) as error:
            self.counts.failed += 1
            log.debug("%s: a connection ended: %s", self._name, error)
        except Exception:
            if not self.counts.contained:
                log.exception("%s: a connection failed; further failures are only counted", self._name)
            self.counts.contained += 1
