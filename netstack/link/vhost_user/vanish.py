"""What happens when a file that is mapped here is made shorter: SIGBUS, and how one bad front-end does not end the process.

The signal comes on the very access, to whoever touches the page. `watch` notes where each region lies; on the first one a handler
is installed. It lays zero pages of our own over the whole region, marks it as vanished and returns, so the access that failed is
made again and reads zeros. The link sees the mark and stops the device; nobody else notices. (System calls that meet such a
page return EFAULT and raise no signal.)

A signal handler in Python usually runs later, between two instructions of the interpreter, which here would never come. So this is
one of C's: a ctypes callback, run by the kernel on the spot. It may run Python because the signal is no surprise to the
interpreter: it is raised by a memory access of this thread, inside a call that copies octets and holds the interpreter's lock. A
SIGBUS for any other reason ends the process as it always did.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
import weakref
from typing import Any, Final

_SA_SIGINFO: Final = 4
_ACTION: Final = struct.Struct("P128siP")
"""`struct sigaction` of glibc and musl on 64-bit Linux: handler, mask, flags, restorer."""
_ADDRESS_AT: Final = 16
"""`si_addr` in `siginfo_t`."""
_PROTECTION: Final = 3  # PROT_READ | PROT_WRITE
_FLAGS: Final = 0x02 | 0x10 | 0x20 | 0x4000  # MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS | MAP_NORESERVE


class Watched:
    """One mapping; `vanished` turns true when it was cut off."""

    __slots__ = ("__weakref__", "end", "start", "vanished")

    def __init__(self, start: int, end: int) -> None:
        self.start = start
        self.end = end
        self.vanished = False


_watched: weakref.WeakSet[Watched] = weakref.WeakSet()
happened: Final[list[Watched]] = []
"""Every mapping that was cut off so far; as a rule empty, so a look at it costs nothing."""
_handler: Any = None
"""The callback, kept alive, once installed."""


def watch(mapping: mmap.mmap) -> Watched:
    """Survive that the file behind `mapping` is cut off; hold the result as long as the mapping."""
    first = ctypes.c_char.from_buffer(mapping)
    start = ctypes.addressof(first)
    watched = Watched(start, start + len(mapping))
    _watched.add(watched)
    if _handler is None:
        _install()
    return watched


def _install() -> None:
    global _handler
    if sys.platform != "linux" or struct.calcsize("P") != 8:
        return
    # PyDLL: the interpreter's lock stays with us during the call.
    library = ctypes.PyDLL(None)
    lay_over = library.mmap
    lay_over.restype = ctypes.c_void_p
    lay_over.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]

    def on_bus_error(number: int, info: int, _context: int) -> None:
        address = ctypes.c_uint64.from_address(info + _ADDRESS_AT).value
        for one in _watched:
            if one.start <= address < one.end:
                one.vanished = True
                happened.append(one)
                if lay_over(one.start, one.end - one.start, _PROTECTION, _FLAGS, -1, 0) == one.start:
                    return
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGBUS)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(on_bus_error)
    action = _ACTION.pack(ctypes.cast(_handler, ctypes.c_void_p).value, bytes(128), _SA_SIGINFO, 0)
    library.sigaction(int(signal.SIGBUS), action, None)
