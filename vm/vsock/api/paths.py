"""Unix sockets in a directory of any depth: a path that is too long for a socket is reached by a descriptor of its directory."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError

MAX_OCTETS: Final = 103 if sys.platform == "darwin" else 107
"""unix(7) has 108 with the final NUL, BSD 104."""


class ShortPath:
    """A path that fits a socket's address and leads to the same place; good until `close`. Raises `ConfigError`, `OSError`."""

    def __init__(self, path: Path) -> None:
        self.text = str(path)
        self._directory: int | None = None
        if len(os.fsencode(self.text)) <= MAX_OCTETS:
            return
        if sys.platform == "linux":
            self._directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.text = f"/proc/self/fd/{self._directory}/{path.name}"
        else:
            self.text = os.path.relpath(path)
        if len(os.fsencode(self.text)) > MAX_OCTETS:
            self.close()
            raise ConfigError(
                f"{path} is too long for a socket's path, which has at most {MAX_OCTETS} octets; use a shorter one"
            )

    def close(self) -> None:
        if self._directory is not None:
            os.close(self._directory)
            self._directory = None


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """The text of a `ShortPath`, for a moment."""
    short = ShortPath(path)
    try:
        yield short.text
    finally:
        short.close()
