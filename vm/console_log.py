"""What a console said, in two files that together have a bound: `console.log` and, older, `console.log.1`.

A guest may write to its console without end, and nobody may be there to read; so when the newer half is full it is renamed over
the older one. Hypervisors that write the log themselves cannot be told to open another: for them the older half is a copy, and the
newer one is cut (`trim`), for which they have to append (QEMU: `logappend=on`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from pathlib import Path
from typing import Final

log = logging.getLogger("pyvpnkit")

MOST: Final = 4 << 20
"""Octets of both halves."""
TRIM_EVERY_S: Final = 1.0
MOST_REPLAYED: Final = 256 << 10

_FLAGS: Final = os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW


def older(path: Path) -> Path:
    """The older half of the log at `path`."""
    return path.with_name(path.name + ".1")


class ConsoleLog:
    """Appends to the log at `path`. Raises `OSError` when made; a disk that is full later costs what was said, and is counted."""

    def __init__(self, path: Path, most: int = MOST) -> None:
        self._path = path
        self._half = most // 2
        self._fd = os.open(path, _FLAGS | os.O_WRONLY, 0o600)
        self._size = os.fstat(self._fd).st_size
        self.lost = 0
        """Octets that could not be written."""

    def write(self, data: bytes) -> None:
        """Keep `data`; a piece longer than half the bound loses its beginning."""
        data = data[-self._half :]
        try:
            if self._size and self._size + len(data) > self._half:
                self._turn()
            self._size += os.write(self._fd, data)
        except OSError as error:
            if not self.lost:
                log.warning("%s: %s; what the console says is not kept", self._path, error.strerror)
            self.lost += len(data)

    def close(self) -> None:
        """Harmless when repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _turn(self) -> None:
        os.replace(self._path, older(self._path))
        fresh = os.open(self._path, _FLAGS | os.O_WRONLY, 0o600)
        os.close(self._fd)
        self._fd = fresh
        self._size = 0


def trim(path: Path, most: int = MOST) -> bool:
    """Halve a log that another program appends to, when it is longer than half of `most`; whether that was so. Raises `OSError`.

    What it writes between the copy and the cut is lost. A log that is not there yet is short enough. It is cut even if the copy
    fails: a disk that the log has filled would stay full otherwise.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with open(fd, "rb+", buffering=0) as current:
        size = os.fstat(fd).st_size
        if size <= most // 2:
            return False
        current.seek(max(0, size - most // 2))
        copy = path.with_name(path.name + ".1.new")
        try:
            with open(os.open(copy, _FLAGS | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as kept:
                kept.write(current.read(most // 2))  # and not what is added meanwhile
            os.replace(copy, older(path))
        except OSError:
            copy.unlink(missing_ok=True)
            raise
        finally:
            os.ftruncate(fd, 0)
    return True


class LogKeeper:
    """Trims the log of another program each `TRIM_EVERY_S`, until `close`. Wants a running loop."""

    def __init__(self, path: Path, most: int = MOST, *, every_s: float = TRIM_EVERY_S) -> None:
        self.path = path
        self._most = most
        self._every_s = every_s
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        warned = False
        while True:
            try:
                trim(self.path, self._most)
            except OSError as error:
                if not warned:
                    log.warning("%s: %s; what the console says is not kept", self.path, error.strerror)
                warned = True
            await asyncio.sleep(self._every_s)

    async def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task


def last_lines(path: Path, count: int, most: int = MOST_REPLAYED) -> bytes:
    """The last `count` lines of the log at `path`, both halves taken together, at most `most` octets. Raises `OSError`."""
    kept = b""
    for half in (path, older(path)):
        if len(kept) >= most or kept.count(b"\n") > count:
            break
        with contextlib.suppress(FileNotFoundError), open(half, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (most - len(kept))))
            kept = file.read(most - len(kept)) + kept
    lines = kept.splitlines(keepends=True)
    return b"".join(lines[-count:]) if count > 0 else b""
