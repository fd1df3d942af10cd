"""Memory barriers for rings that are shared with another processor.

What ring code needs, and why Python may: every access of a `memoryview` element is one load or store of its width in C, and the
interpreter makes it through calls that no compiler moves it across. So the program order is the order in which the processor
gets the accesses. What the processor then makes of it:

* x86-64 keeps loads in order, stores in order, and no store passes an earlier load. That is all that "entries before index" needs,
  both ways: `acquire` and `release` do nothing there. It does let a load pass an earlier store to another place, so between
  "publish an index" and "does the other side want to be told" stands `full`: a LOCK-prefixed instruction, which is what an
  uncontended lock is made of.
* arm64 and the others keep none of these orders, and a lock is no full barrier there. `membarrier(2)`, private expedited, has
  a full one at its entry and its exit. It costs about 1.6 µs, so it is made once per batch and place, not per frame.
* Where neither is to be had, `SAFE` is False: then who wants to be told is told always, and nobody is asked to be quiet.
"""

from __future__ import annotations

import platform
import sys
import threading
from collections.abc import Callable
from typing import Final

_TOTAL_STORE_ORDER: Final = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")
_MEMBARRIER: Final = {"aarch64": 283, "arm64": 283, "riscv64": 283, "loongarch64": 283}.get(platform.machine().lower())
_PRIVATE_EXPEDITED: Final = 1 << 3
_REGISTER_PRIVATE_EXPEDITED: Final = 1 << 4


def _nothing() -> None:
    """The processor keeps the order by itself."""


def _lock_barrier() -> Callable[[], object]:
    lock = threading.Lock()
    acquire, release = lock.acquire, lock.release

    def full() -> None:
        acquire(False)
        release()

    return full


def _membarrier() -> Callable[[], object] | None:
    if _MEMBARRIER is None or sys.platform != "linux":
        return None
    import ctypes

    syscall = ctypes.CDLL(None).syscall
    if syscall(_MEMBARRIER, _REGISTER_PRIVATE_EXPEDITED, 0, 0) != 0:
        return None

    def full() -> None:
        syscall(_MEMBARRIER, _PRIVATE_EXPEDITED, 0, 0)

    return full


def _choose() -> tuple[Callable[[], object], Callable[[], object], bool]:
    if _TOTAL_STORE_ORDER:
        return _lock_barrier(), _nothing, True
    found = _membarrier()
    if found is None:
        return _lock_barrier(), _lock_barrier(), False
    return found, found, True


full, ordered, SAFE = _choose()
"""`full()`: no access after it is made before one that precedes it. `ordered()`: the same but for a load after a store, which is
"acquire" after an index was read and "release" before one is written."""
