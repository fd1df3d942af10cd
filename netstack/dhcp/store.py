"""The lease table in a file, so that guests keep their addresses when the daemon is restarted.

The only module here with I/O. A file that cannot be read or is not ours never stops the network: it is moved aside, the
log says where to, and the table begins empty. Writing is whole or not at all: a new file, fsync, rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from pathlib import Path

from netstack.dhcp.leases import Leases
from netstack.errors import Malformed

MAX_OCTETS = 32 << 20
"""A larger file was not written by us."""

log = logging.getLogger("pyvpnkit.dhcp")


class Store:
    """One lease file. The caller decides when to save: look at `leases.dirty`, wait a little, `save`."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._failing = False

    def load(self, leases: Leases, *, now: float, now_wall: float) -> bool:
        """Fill an empty table; `now` and `now_wall` are the same moment on the engine's clock and since 1970.

        Returns whether there was a file to take over. One that is none of ours is renamed to `NAME.bad`.
        """
        try:
            document = json.loads(self._read())
            leases.restore(document, now=now, now_wall=now_wall)
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("leases in %s cannot be read (%s); starting without them", self.path, error)
            return False
        except (Malformed, ValueError, RecursionError) as error:
            aside = self.path.with_name(self.path.name + ".bad")
            log.warning("leases in %s are not usable (%s); kept as %s, starting without them", self.path, error, aside)
            with contextlib.suppress(OSError):
                self.path.replace(aside)
            return False
        return True

    def _read(self) -> bytes:
        # Not blocking, because the path may turn out to be a FIFO.
        descriptor = os.open(self.path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError("not a regular file")
            data = file.read(MAX_OCTETS + 1)
        if len(data) > MAX_OCTETS:
            raise Malformed(f"larger than {MAX_OCTETS} octets")
        return data

    def save(self, leases: Leases, *, now: float, now_wall: float) -> bool:
        """Write the table; returns whether it worked. A failure is logged once until saving works again, and leaves
        `leases.dirty` set and the old file as it was."""
        document = leases.snapshot(now=now, now_wall=now_wall)
        leases.dirty = False
        if self.write(document):
            return True
        leases.dirty = True
        return False

    def write(self, document: dict[str, object]) -> bool:
        """Write a snapshot; the part of `save` that waits for the disk, for a caller that does it in a thread."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()  # of a process that was killed while writing and had our number
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o600)
            try:
                with open(descriptor, "w", encoding="ascii") as file:
                    json.dump(document, file, indent=1)
                    file.write("\n")
                    file.flush()
                    os.fsync(descriptor)
                temporary.replace(self.path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            self._sync_directory()
        except OSError as error:
            if not self._failing:
                log.warning("leases cannot be saved in %s (%s); guests may get other addresses later", self.path, error)
            self._failing = True
            return False
        self._failing = False
        return True

    def _sync_directory(self) -> None:
        """So that the rename outlives a power cut; not every system can open a directory."""
        with contextlib.suppress(OSError):
            descriptor = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
