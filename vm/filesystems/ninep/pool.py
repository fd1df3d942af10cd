"""A few threads for calls that may block.

Measured here with a socket pair and stat(2) per round: on the loop 8 us, by these threads 35 us, by asyncio's own 55 us. On the
loop a slow disk would stop every share of the process; and asyncio's threads are waited for when Python ends, which for one in a
call to a dead NFS server is for ever. These are daemons.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import Final, TypeVar

log = logging.getLogger("pyvpnkit.ninep")

JOIN_S: Final = 0.5
_Made = TypeVar("_Made")


class Pool:
    """At most `limit` threads, each started when it is wanted. Its methods are for the loop's thread."""

    def __init__(self, limit: int, *, name: str) -> None:
        self._limit = limit
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self.pending = 0
        """Jobs that were given and not finished."""
        self.contained = 0
        """Jobs that failed, which none should."""

    @property
    def threads(self) -> int:
        return len(self._threads)

    def submit(self, work: Callable[[], _Made], done: Callable[[_Made | None], None]) -> None:
        """Call `done` on the loop with what `work` made; None when it failed, which is logged."""
        self.pending += 1

        def finish(made: _Made | None, failed: bool) -> None:
            self.pending -= 1
            self.contained += failed
            done(made)

        def job() -> None:
            made, failed = None, False
            try:
                made = work()
            except Exception:  # a bug of ours must not cost a thread
                failed = True
                log.exception("%s: a request could not be served", self._name)
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(finish, made, failed)

        if self.pending > len(self._threads) and len(self._threads) < self._limit:
            thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)
        if self._closed:  # what is left to do when a call came back after all
            self._jobs.put(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # and with it a message of a megabyte

    def close(self) -> None:
        """Threads end when their jobs do; who is stuck in the host's kernel is left there."""
        self._closed = True
        threads, self._threads = self._threads, []
        for _ in threads:
            self._jobs.put(None)
        if not self.pending:
            for thread in threads:
                thread.join(JOIN_S)
