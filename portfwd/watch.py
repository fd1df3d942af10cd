"""A file of the host that is followed while it changes: its status is looked at once in a second, from the event loop.

That sees what editors and VPN clients do: writing in place, renaming a new file over the old, replacing a symlink on the way
(`stat` follows it), removing the file and making it again, a file that comes later. inotify would have to watch every
directory on the path, and sees nothing on network file systems and bind mounts of containers; a `stat` costs 2 µs.

Who listens is told the content when it differs from what it was told last: octets, `None` while there is no such file, or
the `OSError` for which it cannot be read.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
import time
from collections.abc import Callable
from typing import Final, TypeAlias

EVERY_S: Final = 1.0
MAX_OCTETS: Final = 4 << 20
"""A larger file is refused: it is read in the event loop."""
_FRESH_NS: Final = 2_000_000_000
"""A file written so recently may be written again within one tick of its timestamps, and so without another status."""
_NOTHING: Final = object()

Content: TypeAlias = bytes | OSError | None


class FileWatch:
    """See the module. `changed` must not raise; `now_ns` is the wall clock, as file systems use it."""

    def __init__(
        self,
        path: str,
        changed: Callable[[Content], None],
        *,
        every_s: float = EVERY_S,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.path = path
        self._changed = changed
        self._every_s = every_s
        self._now_ns = now_ns
        self._status: tuple[int, ...] | None = None
        """Of the content that was read last; `None` when it must be read again."""
        self._told: object = _NOTHING
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look now, and from now on."""
        self._loop = loop
        self._again()

    def close(self) -> None:
        """Look no more. Harmless when repeated."""
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def look(self) -> None:
        """Look now: somebody knows that the file has changed."""
        try:
            if self._status is not None and _status(os.stat(self.path)) == self._status:
                return
            content: Content = self._read()
        except FileNotFoundError:
            content = None
            self._status = None
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            content = error if isinstance(error, OSError) else OSError(errno.EINVAL, str(error))
            self._status = None
        told = (content.errno, content.strerror) if isinstance(content, OSError) else content
        if told != self._told:
            self._told = told
            self._changed(content)

    def _again(self) -> None:
        self.look()
        if self._loop is not None:
            self._timer = self._loop.call_later(self._every_s, self._again)

    def _read(self) -> bytes:
        # Not to be held up by a pipe nobody writes to.
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with open(fd, "rb") as file:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            content = file.read(MAX_OCTETS + 1)
        if len(content) > MAX_OCTETS:
            raise OSError(errno.EFBIG, f"larger than {MAX_OCTETS} octets")
        # The status is from before the reading: a change in between shows as another status the next time.
        self._status = None if self._now_ns() - before.st_mtime_ns < _FRESH_NS else _status(before)
        return content


def _status(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev, status.st_size
