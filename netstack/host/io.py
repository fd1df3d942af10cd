"""The one place host sockets come from and where their readiness is noticed.

`HostIO` is a seam of two parts. `socket` makes a non-blocking, close-on-exec socket; tests hand in one whose sockets are
played by a script, fault tests one that fails at the n-th call. `watch` registers a descriptor *once*, edge-triggered for
reading and peer shutdown (or level-triggered for reading, as links want it), with the function to call; writing is added
when a socket was full for the first time, which most never are. `poll` returns what is ready. On Linux that is one private
`epoll`, elsewhere `kqueue`; the whole set is a single descriptor in the asyncio loop, which costs 30 % less CPU per
connection than a reader per socket (spec dataplane A).
"""

from __future__ import annotations

import _socket
import errno
import select
import socket
import struct
import sys
from typing import Any, Final, Protocol

from netstack.api import READABLE, ROOM, Ready

READ: Final = READABLE
"""Octets, a datagram or a connection wait (epoll's own numbers, so the Linux path translates nothing)."""
URGENT: Final = 2
"""Urgent octets are in the stream (EPOLLPRI): reads stop short at their mark, so a short read says nothing."""
WRITE: Final = ROOM
ERROR: Final = 8
HANGUP: Final = 16
READ_CLOSED: Final = 0x2000
"""The peer will send no more (EPOLLRDHUP)."""

_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
_EDGES: Final = READ | URGENT | READ_CLOSED | 1 << 31  # EPOLLET
_FLAGS: Final = getattr(socket, "SOCK_NONBLOCK", 0) | getattr(socket, "SOCK_CLOEXEC", 0)


class HostIO(Protocol):
    def socket(self, family: int, kind: int, protocol: int = 0) -> Any:
        """A new non-blocking socket (the methods of `socket.socket` that the stack uses). Raises `OSError`."""
        ...

    def admit(self, sock: Any) -> Any:
        """A socket from elsewhere (an accepted client, a pair) that is to count as the guests'. Raises `OSError`, and resets
        it, where only the reserved descriptors are left."""
        ...

    def watch(self, fd: int, ready: Ready, *, edge: bool = True, write: bool = False) -> None:
        """Call `ready(mask)` when `fd` becomes readable or closed, with `write` also when it becomes writable;
        `edge=False`: while it is readable."""
        ...

    def watch_write(self, fd: int) -> None:
        """For a descriptor watched at its edges: call from now on also when it becomes writable (or is by now)."""
        ...

    def want_write(self, fd: int, wanted: bool) -> None:
        """For a descriptor watched with `edge=False`: also call while it is writable, or no longer."""
        ...

    def unwatch(self, fd: int) -> None:
        """Forget `fd`; before it is closed."""
        ...

    def forget(self, fd: int) -> None:
        """As `unwatch`, for a descriptor of ours alone that is closed at once: closing ends the kernel's watch."""
        ...

    def poll(self) -> list[tuple[Ready, int]]:
        """What is ready now, without waiting: functions and masks, at most one batch."""
        ...

    def fileno(self) -> int:
        """Readable while `poll` would return something."""
        ...

    def close(self) -> None: ...


def highest_descriptor(reserve: int) -> int:
    """The number from which on descriptors are kept for listeners, DNS and control; at most a quarter is kept."""
    try:
        import resource
    except ImportError:
        return 1 << 30
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft - min(reserve, soft // 4)


def _within(sock: Any, highest: int) -> Any:
    """Numbers are given out lowest first, so a high one means that few are left."""
    if sock.fileno() >= highest:
        sock.close()
        raise OSError(errno.EMFILE, "descriptors are reserved for listeners and control")
    return sock


def _admitted(sock: Any, highest: int) -> Any:
    """As `_within`, for a connected socket: its peer sees RST, since an end by itself reads as an empty answer."""
    if sock.fileno() >= highest:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    return _within(sock, highest)


def first_source_port() -> int:
    """From where on the kernel chooses source ports of its own, as of now (ip(7): `ip_local_port_range`)."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            return int(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 1024


class EpollIO:
    """`HostIO` of Linux; guests may not use the last `reserve` descriptors. HOT PATH: `poll` once per turn."""

    BATCH: Final = 64

    def __init__(self, reserve: int = 0) -> None:
        self._epoll = select.epoll()
        self._ready: dict[int, Ready] = {}
        self._highest = highest_descriptor(reserve)

    def socket(self, family: int, kind: int, protocol: int = 0) -> Any:
        # The class in C: what `socket.socket` adds costs 2 µs per connection and nothing here uses it.
        return _within(_socket.socket(family, kind | _FLAGS, protocol), self._highest)

    def admit(self, sock: Any) -> Any:
        return _admitted(sock, self._highest)

    def watch(self, fd: int, ready: Ready, *, edge: bool = True, write: bool = False) -> None:
        self._epoll.register(fd, (_EDGES | WRITE if write else _EDGES) if edge else READ)
        self._ready[fd] = ready

    def watch_write(self, fd: int) -> None:
        self._epoll.modify(fd, _EDGES | WRITE)

    def want_write(self, fd: int, wanted: bool) -> None:
        if fd in self._ready:
            self._epoll.modify(fd, READ | WRITE if wanted else READ)

    def unwatch(self, fd: int) -> None:
        if self._ready.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def forget(self, fd: int) -> None:
        self._ready.pop(fd, None)

    def poll(self) -> list[tuple[Ready, int]]:
        ready = self._ready
        return [(ready[fd], mask) for fd, mask in self._epoll.poll(0, self.BATCH) if fd in ready]

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        self._epoll.close()
        self._ready.clear()


class KqueueIO:
    """`HostIO` of macOS and the BSDs, on `EV_CLEAR` events, which are edge-triggered as `EPOLLET` is."""

    BATCH: Final = 64

    def __init__(self, reserve: int = 0) -> None:
        self._highest = highest_descriptor(reserve)
        self._kqueue: Any = select.kqueue()  # type: ignore[attr-defined,unused-ignore]  # absent on Linux
        self._ready: dict[int, Ready] = {}
        self._writes: set[int] = set()
        """Descriptors that have a write filter; to delete one that is not there is ENOENT."""

    def socket(self, family: int, kind: int, protocol: int = 0) -> Any:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        return _within(sock, self._highest)

    def admit(self, sock: Any) -> Any:
        return _admitted(sock, self._highest)

    def _change(self, fd: int, kind: int, flags: int) -> None:
        if sys.platform != "linux":
            self._kqueue.control([select.kevent(fd, kind, flags)], 0)

    def watch(self, fd: int, ready: Ready, *, edge: bool = True, write: bool = False) -> None:
        self._writes.discard(fd)
        if sys.platform != "linux":
            clear = select.KQ_EV_ADD | (select.KQ_EV_CLEAR if edge else 0)
            self._change(fd, select.KQ_FILTER_READ, clear)
            if write:
                self._change(fd, select.KQ_FILTER_WRITE, clear)
                self._writes.add(fd)
        self._ready[fd] = ready

    def watch_write(self, fd: int) -> None:
        if sys.platform != "linux":
            self._change(fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD | select.KQ_EV_CLEAR)
            self._writes.add(fd)

    def want_write(self, fd: int, wanted: bool) -> None:
        if sys.platform != "linux" and fd in self._ready and wanted != (fd in self._writes):
            self._change(fd, select.KQ_FILTER_WRITE, select.KQ_EV_ADD if wanted else select.KQ_EV_DELETE)
            (self._writes.add if wanted else self._writes.discard)(fd)

    def unwatch(self, fd: int) -> None:
        # The descriptor may stay open, as the shared socket of `unixgram` does, and would wake the loop for nobody.
        if sys.platform != "linux" and self._ready.pop(fd, None) is not None:
            if fd in self._writes:
                self._change(fd, select.KQ_FILTER_WRITE, select.KQ_EV_DELETE)
            self._change(fd, select.KQ_FILTER_READ, select.KQ_EV_DELETE)
        self._writes.discard(fd)

    def forget(self, fd: int) -> None:
        self._ready.pop(fd, None)
        self._writes.discard(fd)

    def poll(self) -> list[tuple[Ready, int]]:
        found: list[tuple[Ready, int]] = []
        if sys.platform != "linux":
            for event in self._kqueue.control(None, self.BATCH, 0):
                ready = self._ready.get(event.ident)
                if ready is None:
                    continue
                mask = READ if event.filter == select.KQ_FILTER_READ else WRITE
                if event.flags & select.KQ_EV_EOF:
                    mask |= READ_CLOSED
                found.append((ready, mask))
        return found

    def fileno(self) -> int:
        return self._kqueue.fileno() if sys.platform != "linux" else -1

    def close(self) -> None:
        if sys.platform != "linux":
            self._kqueue.close()
        self._ready.clear()
        self._writes.clear()


def native_io(reserve: int = 0) -> HostIO:
    """The `HostIO` of this operating system; `reserve` descriptors are kept from guests."""
    return EpollIO(reserve) if hasattr(select, "epoll") else KqueueIO(reserve)
