"""Octets on their way to the guest, kept until it has acknowledged them.

Two ways with one face. On Linux 6.9 and later they stay in the host socket: reading is `MSG_PEEK` at an offset
(`SO_PEEK_OFF`), acknowledging discards (`MSG_TRUNC`), and the kernel's own receive buffer is the bound. A small answer with
nothing outstanding is taken out at once and kept here, which saves a system call per request. Elsewhere all that was
read is kept here, bounded by `limit`. Without `SO_PEEK_OFF`, peeking would cost more the more is outstanding (spec
dataplane A), so there is no third way. HOT PATH: `read`, `take`, `discard`.
"""

from __future__ import annotations

import _socket
import errno
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from typing import Any, Final, Protocol

SO_PEEK_OFF: Final = 42
CEILING: Final = 16384
"""Octets that one flow may hold while all together hold more than half of what they may."""
_TRASH: Final = memoryview(bytearray(1 << 20))
"""`MSG_TRUNC` on TCP writes nothing here, but Python wants a buffer as long as the count."""


@cache
def _native_recvmsg() -> tuple[Callable[[int, int, int], int], Callable[[], int]]:
    """The C library's, with the message by its address (`socket.recvmsg_into` makes a view of every piece), and its `errno`.

    Imported by need: few links use it.
    """
    import ctypes

    function = ctypes.CDLL(None, use_errno=True).recvmsg
    function.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
    function.restype = ctypes.c_ssize_t
    return function, ctypes.get_errno


class Budget:
    """What all flows together hold: octets that hosts did not take, that lie beyond holes, that guests did not acknowledge."""

    __slots__ = ("held", "limit", "tight")

    def __init__(self, limit: int) -> None:
        self.held = 0
        self.limit = limit
        self.tight = limit >> 1
        """Beyond this nobody gets more room than `CEILING` octets."""


class Octets(Protocol):
    """`offset` 0 is the first octet the guest has not acknowledged (SND.UNA as of the last `discard`)."""

    full: bool
    """Nothing is read although something may wait: the guest must acknowledge first."""

    def begin_with(self, octets: bytes) -> None:
        """Before anything is read: `octets` come in front of what the socket has."""
        ...

    def read(self, offset: int, into: memoryview) -> int | None:
        """Fill `into` from `offset` on; the count, 0 at the end of the stream, `None` when nothing waits. Raises `OSError`."""
        ...

    def read_scattered(self, offset: int, into: list[memoryview]) -> int | None:
        """As `read`, into several views in order."""
        ...

    def native(self, offset: int) -> bool:
        """Whether `read_message` works from `offset` on: the octets are in a socket of the kernel's."""
        ...

    def read_message(self, offset: int, message: int) -> int | None:
        """As `read`, into what the `struct msghdr` at address `message` says."""
        ...

    def take(self, into: memoryview) -> int | None:
        """As `read` from 0, into a small view, while nothing is outstanding."""
        ...

    def ended(self) -> bool:
        """After `take`: whether nothing can come any more. Raises `OSError`."""
        ...

    def discard(self, count: int) -> None:
        """The guest acknowledged `count` more octets."""
        ...

    def close(self) -> None:
        """The flow has ended."""
        ...


class PeekedOctets:
    """In the host socket, but for a small answer in front that was taken out."""

    full = False

    __slots__ = ("_at", "_is_native", "_kept", "_recv_into", "_sock")

    def __init__(self, sock: Any) -> None:
        self._sock = sock
        self._is_native = isinstance(sock, _socket.socket)
        self._recv_into = sock.recv_into
        self._at = -1
        """Where the kernel will peek next; at -1 it does not count yet."""
        self._kept = b""
        """Octets before those in the socket."""

    def begin_with(self, octets: bytes) -> None:
        self._kept = octets

    def _peek_from(self, offset: int) -> None:
        if offset != self._at and (offset or self._at > 0):
            self._sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
            self._at = offset

    def read(self, offset: int, into: memoryview) -> int | None:
        if self._kept:
            offset -= len(self._kept)
            if offset < 0:
                return self._read_kept(offset, [into])
        self._peek_from(offset)
        try:
            count: int = self._recv_into(into, 0, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        if self._at >= 0:
            self._at += count
        return count

    def read_scattered(self, offset: int, into: list[memoryview]) -> int | None:
        if self._kept:
            offset -= len(self._kept)
            if offset < 0:
                return self._read_kept(offset, into)
        self._peek_from(offset)
        try:
            count: int = self._sock.recvmsg_into(into, 0, socket.MSG_PEEK)[0]
        except BlockingIOError:
            return None
        if self._at >= 0:
            self._at += count
        return count

    def native(self, offset: int) -> bool:
        return self._is_native and offset >= len(self._kept)

    def read_message(self, offset: int, message: int) -> int | None:
        self._peek_from(offset - len(self._kept))
        recvmsg, failure = _native_recvmsg()
        count = recvmsg(self._sock.fileno(), message, socket.MSG_PEEK)
        if count < 0:
            number = failure()
            if number == errno.EINTR:
                return self.read_message(offset, message)
            if number == errno.EAGAIN:
                return None
            raise OSError(number, os.strerror(number))
        if self._at >= 0:
            self._at += count
        return count

    def _read_kept(self, start: int, into: list[memoryview]) -> int:
        """From `start` octets before the end of what was taken out, and on with what the socket has."""
        octets = self._kept[start:]
        done = 0
        for number, view in enumerate(into):
            part = octets[done : done + len(view)]
            view[: len(part)] = part
            done += len(part)
            if done == len(octets):
                rest = [view[len(part) :], *into[number + 1 :]]
                return done + (self.read_scattered(len(self._kept), rest) or 0)
        return done

    def take(self, into: memoryview) -> int | None:
        if self._at > 0 or self._kept:
            return self.read(0, into)
        try:
            count: int = self._recv_into(into)
        except BlockingIOError:
            return None
        self._kept = bytes(into[:count])
        return count

    def ended(self) -> bool:
        try:
            return self.read(len(self._kept), _TRASH[:1]) == 0
        except BlockingIOError:
            return False

    def close(self) -> None:
        """Nothing is held anywhere else."""

    def discard(self, count: int) -> None:
        kept = self._kept
        if kept:
            self._kept = kept[count:]
            count -= len(kept)
        while count > 0:
            step = self._recv_into(_TRASH, min(count, len(_TRASH)), socket.MSG_TRUNC)
            if step <= 0:
                return
            count -= step
            # The kernel moves its offset back by what was taken away in front of it.
            if self._at > 0:
                self._at = max(self._at - step, 0)


class KeptOctets:
    """In a buffer of ours, at most `limit` octets; reading stops there until the guest acknowledges."""

    __slots__ = ("_budget", "_kept", "_limit", "_sock", "_start", "full")

    def __init__(self, sock: Any, limit: int, budget: Budget) -> None:
        self._sock = sock
        self._budget = budget
        self.full = False
        self._limit = limit
        self._kept = bytearray()
        self._start = 0
        """Octets at the front already acknowledged; cut off now and then, since cutting moves the rest."""

    def begin_with(self, octets: bytes) -> None:
        self._kept += octets
        self._budget.held += len(octets)

    def read(self, offset: int, into: memoryview) -> int | None:
        at = self._start + offset
        waiting = len(self._kept) - at
        if waiting > 0:
            count = min(waiting, len(into))
            with memoryview(self._kept) as kept:
                into[:count] = kept[at : at + count]
            return count + (self._fetch(into[count:]) or 0) if count < len(into) else count
        return self._fetch(into)

    def _fetch(self, into: memoryview) -> int | None:
        budget = self._budget
        limit = self._limit if budget.held <= budget.tight else min(self._limit, CEILING)
        room = limit - (len(self._kept) - self._start)
        self.full = room <= 0
        if self.full:
            return None
        try:
            got: int = self._sock.recv_into(into[:room])
        except BlockingIOError:
            return None
        self._kept += into[:got]
        self.full = got == room
        budget.held += got
        return got

    def read_scattered(self, offset: int, into: list[memoryview]) -> int | None:
        total = 0
        for view in into:
            got = self.read(offset + total, view)
            if not got:
                return total or got
            total += got
            if got < len(view):
                break
        return total

    def native(self, offset: int) -> bool:
        return False

    def read_message(self, offset: int, message: int) -> int | None:
        raise NotImplementedError

    def take(self, into: memoryview) -> int | None:
        return self.read(0, into)

    def ended(self) -> bool:
        try:
            return not self._sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False

    def close(self) -> None:
        self.discard(len(self._kept) - self._start)

    def discard(self, count: int) -> None:
        self._budget.held -= count
        self._start += count
        if self._start >= len(self._kept):
            self._kept.clear()
            self._start = 0
        elif self._start > 1 << 18:
            del self._kept[: self._start]
            self._start = 0


class OctetsOf:
    """The best way this kernel has for a socket; `limit` octets at most are kept here. Asks once per address family."""

    def __init__(self, limit: int, budget: Budget) -> None:
        self._limit = limit
        self._budget = budget
        self._peekable: dict[int, bool] = {}

    def __call__(self, sock: Any) -> PeekedOctets | KeptOctets:
        peekable = self._peekable.get(sock.family)
        if peekable is None:
            try:
                sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)  # as it is anyway
                peekable = sys.platform == "linux"
            except OSError:
                peekable = False
            self._peekable[sock.family] = peekable
        return PeekedOctets(sock) if peekable else KeptOctets(sock, self._limit, self._budget)
