"""What outlives the daemon, in its state directory: leases, and forwards made by hand.

A change is written half a second later, in a thread, since fsync may take a tenth of a second and every guest would wait for
it; what is still to be written at the end is written then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from netstack.api import Clock
from netstack.dhcp.leases import Leases
from netstack.dhcp.store import Store
from netstack.jsonfile import JsonFile
from portfwd.registry import Registry
from portfwd.store import ForwardStore

SAVE_AFTER_S: Final = 0.5
"""So that guests that start together cost one write."""


class _Saver:
    """One file, written when its contents have changed. `document` gives them, or `None` when they have not."""

    def __init__(self, file: JsonFile, document: Callable[[], Any | None], loop: asyncio.AbstractEventLoop) -> None:
        self._file = file
        self._document = document
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[bool] | None = None

    def soon(self) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(SAVE_AFTER_S, self._save)

    def _save(self) -> None:
        self._timer = None
        if self._writing is not None and not self._writing.done():
            self.soon()
            return
        document = self._document()
        if document is not None:
            self._writing = self._loop.run_in_executor(None, self._file.write, document)

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._writing is not None:
            await self._writing
        document = self._document()
        if document is not None:
            self._file.write(document)


class State:
    """Fills an empty lease table and registry from `directory`, and keeps the files up to date until `close`."""

    def __init__(
        self, directory: Path, leases: Leases, registry: Registry, *, clock: Clock, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._leases = leases
        self._registry = registry
        self._clock = clock
        lease_file = Store(directory / "leases.json")
        lease_file.load(leases, now=clock(), now_wall=time.time())
        self.forwards = ForwardStore(directory / "forwards.json")
        """Those made by hand; it knows what could not be had again."""
        self.forwards.restore(registry)
        self._changed = False
        self._last: dict[str, object] | None = None
        self._savers = (_Saver(lease_file, self._lease_document, loop), _Saver(self.forwards, self._document, loop))
        registry.changed = self.forwards_changed

    def leases_changed(self) -> None:
        """Something about leases may have changed."""
        self._savers[0].soon()

    def forwards_changed(self) -> None:
        """A forward was made or removed."""
        self._changed = True
        self._savers[1].soon()

    def freeze(self) -> None:
        """The ports are freed now because the daemon ends: what was made by hand is not to be forgotten for that."""
        if self._last is None:
            self._last = self.forwards.snapshot(self._registry)
            self._registry.changed = lambda: None

    def _lease_document(self) -> dict[str, object] | None:
        if not self._leases.dirty:
            return None
        document = self._leases.snapshot(now=self._clock(), now_wall=time.time())
        self._leases.dirty = False
        return document

    def _document(self) -> dict[str, object] | None:
        if not self._changed:
            return None
        self._changed = False
        return self._last if self._last is not None else self.forwards.snapshot(self._registry)

    async def close(self) -> None:
        """Write what is still to be written."""
        self.freeze()
        for saver in self._savers:
            await saver.close()
