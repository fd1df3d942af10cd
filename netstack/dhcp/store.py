"""The lease table in a file, so that guests keep their addresses when the daemon is restarted. The only module here with I/O."""

from __future__ import annotations

import os

from netstack.dhcp.leases import Leases
from netstack.errors import Malformed
from netstack.jsonfile import JsonFile


class Store(JsonFile):
    """One lease file. The caller decides when to save: look at `leases.dirty`, wait a little, `save`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "leases", "guests may get other addresses later")

    def load(self, leases: Leases, *, now: float, now_wall: float) -> bool:
        """Fill an empty table; `now` and `now_wall` are the same moment on the engine's clock and since 1970.

        Returns whether there was a file to take over. One that is none of ours is renamed to `NAME.bad`.
        """
        document = self.read()
        if document is None:
            return False
        try:
            leases.restore(document, now=now, now_wall=now_wall)
        except (Malformed, ValueError, RecursionError) as error:
            self.set_aside(error)
            return False
        return True

    def save(self, leases: Leases, *, now: float, now_wall: float) -> bool:
        """Write the table; returns whether it worked. A failure is logged once until saving works again, and leaves
        `leases.dirty` set and the old file as it was."""
        document = leases.snapshot(now=now, now_wall=now_wall)
        leases.dirty = False
        if self.write(document):
            return True
        leases.dirty = True
        return False
