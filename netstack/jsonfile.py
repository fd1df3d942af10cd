"""A JSON document of ours that outlives the daemon: leases, forwards made by hand.

A file that cannot be read or is not ours never stops the network: it is moved aside and the log says where to. Writing is
whole or not at all: a new file, fsync, rename.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from pathlib import Path
from typing import Any, Final

from netstack.errors import Malformed

MAX_OCTETS: Final = 32 << 20
"""A larger file was not written by us."""

log = logging.getLogger("pyvpnkit")


class JsonFile:
    """One file. `what` names its contents in the log, `loss` what it means when they cannot be saved."""

    def __init__(self, path: str | os.PathLike[str], what: str, loss: str) -> None:
        self.path = Path(path)
        self._what = what
        self._loss = loss
        self._failing = False

    def read(self) -> Any | None:
        """The document, or `None` when there is none that can be used."""
        try:
            return json.loads(self._read())
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("%s in %s cannot be read (%s); starting without them", self._what, self.path, error)
        except (Malformed, ValueError, RecursionError) as error:
            self.set_aside(error)
        return None

    def set_aside(self, error: Exception) -> None:
        """What is in there is not usable: keep it as `NAME.bad`."""
        aside = self.path.with_name(self.path.name + ".bad")
        log.warning(
            "%s in %s are not usable (%s); kept as %s, starting without them", self._what, self.path, error, aside
        )
        with contextlib.suppress(OSError):
            self.path.replace(aside)

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

    def write(self, document: Any) -> bool:
        """Write; whether it worked. Waits for the disk. A failure is logged once until writing works again."""
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
                log.warning("%s cannot be saved in %s (%s); %s", self._what, self.path, error, self._loss)
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
