"""A file of the host that is followed while it changes, without a thread and without asking the kernel to tell us.

The status of the file is looked at when its content is wanted, at most once in `every_s` seconds. That sees what editors and
VPN clients do: writing in place, renaming a new file over the old (another inode), replacing a symlink (`stat` follows it),
removing the file and making it again. A busy server pays one `stat` a second, an idle one nothing.

`parse` is called only when the text is another, so that who compares objects sees no change where there is none.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from netstack.api import Clock

log = logging.getLogger("pyvpnkit.dns")

Parsed = TypeVar("Parsed")

MAX_OCTETS: Final = 16 << 20
"""A larger file is cut here: nobody means gigabytes of hosts."""

EVERY_S: Final = 1.0

_FRESH_NS: Final = 2_000_000_000
"""A file written so recently may be written again within one tick of its timestamps, and so without another status."""


class WatchedFile(Generic[Parsed]):
    """What `parse` makes of the text of the file at `path`; of the empty text while the file cannot be read.

    `path` may be `None`: there is no such file. `clock` gives monotonic seconds. `parse` must not raise.
    """

    def __init__(
        self, path: str | None, parse: Callable[[str], Parsed], clock: Clock, every_s: float = EVERY_S
    ) -> None:
        self.path = path
        self._parse = parse
        self._clock = clock
        self._every_s = every_s
        self._look_at = float("-inf")
        self._seen: tuple[int, ...] | None = None
        """Status of the file that was read last; `None` when it must be read again."""
        self._text = ""
        self._there = False
        self._parsed = parse("")

    def current(self) -> Parsed:
        """The parsed content, not older than `every_s`."""
        now = self._clock()
        if now >= self._look_at:
            self._look_at = now + self._every_s
            self._look()
        return self._parsed

    def expire(self) -> None:
        """Look again the next time: somebody knows that the network has changed."""
        self._look_at = float("-inf")

    def _look(self) -> None:
        if self.path is None:
            return
        try:
            status = os.stat(self.path)
            seen = (status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev, status.st_size)
            if seen == self._seen:
                return
            with open(self.path, "rb") as file:
                text = file.read(MAX_OCTETS).decode("utf-8", "replace")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or what is no text in its encoding
            if self._there:
                log.warning(
                    "%s cannot be read any more (%s); going on without it", self.path, getattr(error, "strerror", error)
                )
            self._there, self._seen = False, None
            self._become("")
            return
        # The status is from before the reading: a change in between shows as another status the next time.
        self._there = True
        self._seen = None if time.time_ns() - status.st_mtime_ns < _FRESH_NS else seen
        self._become(text)

    def _become(self, text: str) -> None:
        if text != self._text:
            self._text = text
            self._parsed = self._parse(text)
