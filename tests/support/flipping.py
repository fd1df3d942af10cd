"""Guest memory that another process changes while the device reads it (threats G4): `flipper` at work, for a while."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import flipper
from tests.support.guest_memory import GuestMemory


@contextmanager
def flipping(memory: GuestMemory, ranges: list[tuple[int, int]], seed: int) -> Iterator[memoryview]:
    """While it lasts, octets of these ranges (guest addresses, all in the first region) change; yields the count of changes."""
    region = memory.regions()[0]
    counter = os.memfd_create("counter", os.MFD_CLOEXEC)
    os.ftruncate(counter, 8)
    places = [f"{at - region.guest_address}:{length}" for at, length in ranges]
    child = subprocess.Popen(
        [sys.executable, str(Path(flipper.__file__)), str(region.fd), str(counter), str(seed), *places],
        pass_fds=[region.fd, counter],
    )
    try:
        yield memoryview(mmap.mmap(counter, 8)).cast("Q")
    finally:
        child.kill()
        child.wait()
        os.close(counter)
