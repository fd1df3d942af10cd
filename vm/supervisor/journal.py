"""What happens to a machine, in order: for the log, for `vm up` that waits, and for readers of the events.

The last `KEPT` are kept for who comes later. A reader that does not keep up with `KEPT` of them is let go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

KEPT: Final = 256
MAX_READERS: Final = 32

log = logging.getLogger("vm.supervisor")

Entry = dict[str, Any]
"""`{"id": 1, "time": 1700000000.0, "kind": "state", "text": "...", ...}`; `time` is the wall clock's."""


class Journal:
    """The events of one supervisor."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last = 0
        self._kept: deque[Entry] = deque(maxlen=KEPT)
        self._readers: set[asyncio.Queue[Entry | None]] = set()
        self._ended = False

    def add(self, kind: str, text: str, *, level: int = logging.INFO, **more: Any) -> None:
        """Something happened. `more` are values of JSON."""
        self._last += 1
        entry = {"id": self._last, "time": round(self._clock(), 3), "kind": kind, "text": text, **more}
        log.log(level, "%s", text)
        self._kept.append(entry)
        for queue in list(self._readers):
            try:
                queue.put_nowait(entry)
            except asyncio.QueueFull:
                self._readers.discard(queue)
                queue.get_nowait()
                queue.put_nowait(None)

    def end(self) -> None:
        """No more will come; readers are let go after what there is."""
        self._ended = True
        for queue in self._readers:
            with contextlib.suppress(asyncio.QueueFull):
                queue.put_nowait(None)

    @property
    def full(self) -> bool:
        """Whether there are as many readers as may be."""
        return len(self._readers) >= MAX_READERS

    @property
    def last(self) -> int:
        """The id of the last one."""
        return self._last

    async def read(self, after: int = 0) -> AsyncGenerator[Entry, None]:
        """All events that are kept with an id above `after`, and then those that come."""
        queue: asyncio.Queue[Entry | None] = asyncio.Queue(KEPT)
        self._readers.add(queue)
        try:
            for entry in [one for one in self._kept if one["id"] > after]:
                yield entry
            while not (self._ended and queue.empty()):
                found = await queue.get()
                if found is None:
                    return
                yield found
        finally:
            self._readers.discard(queue)
