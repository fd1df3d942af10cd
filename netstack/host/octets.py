"""Octets on their way to the guest, kept until it has acknowledged them.

Two ways with one face. On Linux 6.9 and later they stay in the host socket: reading is `MSG_PEEK` at an offset
(`SO_PEEK_OFF`), acknowledging discards (`MSG_TRUNC`), and the kernel's own receive buffer is the bound. Elsewhere what was
read is kept here, bounded by `limit`. Without `SO_PEEK_OFF`, peeking would cost more the more is outstanding (spec
dataplane A), so there is no third way. HOT PATH: `read`, `discard`.
"""

from __future__ import annotations

import socket
from typing import Any, Final, Protocol

SO_PEEK_OFF: Final = 42
_TRASH: Final = memoryview(bytearray(1 << 20))
"""`MSG_TRUNC` on TCP writes nothing here, but Python wants a buffer as long as the count."""


class Octets(Protocol):
    """`offset` 0 is the first octet the guest has not acknowledged (SND.UNA as of the last `discard`)."""

    def read(self, offset: int, into: memoryview) -> int | None:
        """Fill `into` from `offset` on; the count, 0 at the end of the stream, `None` when nothing waits. Raises `OSError`."""
        ...

    def read_scattered(self, offset: int, into: list[memoryview]) -> int | None:
        """As `read`, into several views in order."""
        ...

    def discard(self, count: int) -> None:
        """The guest acknowledged `count` more octets."""
        ...


class PeekedOctets:
    """In the host socket."""

    __slots__ = ("_at", "_recv_into", "_sock")

    def __init__(self, sock: Any) -> None:
        """Raises `OSError` where the kernel has no `SO_PEEK_OFF` for this kind of socket."""
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
        self._sock = sock
        self._recv_into = sock.recv_into
        self._at = 0
        """Where the kernel will peek next."""

    def read(self, offset: int, into: memoryview) -> int | None:
        if offset != self._at:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
            self._at = offset
        try:
            count: int = self._recv_into(into, 0, socket.MSG_PEEK)
        except BlockingIOError:
            return None
        self._at += count
        return count

    def read_scattered(self, offset: int, into: list[memoryview]) -> int | None:
        if offset != self._at:
            self._sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, offset)
            self._at = offset
        try:
            count: int = self._sock.recvmsg_into(into, 0, socket.MSG_PEEK)[0]
        except BlockingIOError:
            return None
        self._at += count
        return count

    def discard(self, count: int) -> None:
        while count > 0:
            step = self._recv_into(_TRASH, min(count, len(_TRASH)), socket.MSG_TRUNC)
            if step <= 0:
                return
            count -= step
            # The kernel moves its offset back by what was taken away in front of it.
            self._at = max(self._at - step, 0)


class KeptOctets:
    """In a buffer of ours, at most `limit` octets; reading stops there until the guest acknowledges."""

    __slots__ = ("_kept", "_limit", "_sock", "_start")

    def __init__(self, sock: Any, limit: int) -> None:
        self._sock = sock
        self._limit = limit
        self._kept = bytearray()
        self._start = 0
        """Octets at the front already acknowledged; cut off now and then, since cutting moves the rest."""

    def read(self, offset: int, into: memoryview) -> int | None:
        at = self._start + offset
        waiting = len(self._kept) - at
        if waiting > 0:
            count = min(waiting, len(into))
            with memoryview(self._kept) as kept:
                into[:count] = kept[at : at + count]
            return count
        room = self._limit - (len(self._kept) - self._start)
        if room <= 0:
            return None
        try:
            got: int = self._sock.recv_into(into[:room])
        except BlockingIOError:
            return None
        self._kept += into[:got]
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

    def discard(self, count: int) -> None:
        self._start += count
        if self._start >= len(self._kept):
            self._kept.clear()
            self._start = 0
        elif self._start > 1 << 18:
            del self._kept[: self._start]
            self._start = 0


def octets_of(sock: Any, limit: int) -> PeekedOctets | KeptOctets:
    """The best way this kernel has for `sock`."""
    try:
        return PeekedOctets(sock)
    except OSError:
        return KeptOctets(sock, limit)
