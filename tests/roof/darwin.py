"""Pretend to be macOS: what only Linux has is hidden, and `kqueue` is played on a real `epoll`.

    PYTHONPATH=<a directory whose sitecustomize.py calls pretend()>  python -m pyvpnkit ...

It shows what is missing, not how macOS behaves: the kernel below is still Linux's.
"""

from __future__ import annotations

import asyncio  # first, with all that they import: the standard library is not under test
import concurrent.futures
import errno
import importlib
import os
import posix
import select
import selectors
import signal
import socket
import sys
import time
from dataclasses import dataclass
from types import ModuleType
from typing import Any

LINUX_ONLY: dict[ModuleType, str] = {
    select: "epoll",
    signal: "sigtimedwait sigwaitinfo SIGPWR SIGSTKFLT SIGPOLL SIGRTMIN SIGRTMAX SIGCLD",
    time: "CLOCK_BOOTTIME CLOCK_TAI",
    errno: "EBADFD ENONET ECOMM EREMOTEIO ENOTUNIQ ERESTART EUCLEAN ENOMEDIUM ERFKILL EHWPOISON EKEYREJECTED",
    os: "setns unshare pidfd_open PIDFD_NONBLOCK P_PIDFD memfd_create eventfd timerfd_create pipe2 splice copy_file_range "
    "sched_getaffinity sched_setaffinity setresuid setresgid getresuid getresgid getrandom posix_fadvise posix_fallocate "
    "fdatasync O_PATH O_TMPFILE O_DIRECT O_NOATIME O_RSYNC getxattr setxattr listxattr",
    socket: "AF_PACKET AF_NETLINK AF_VSOCK AF_ALG AF_CAN AF_TIPC AF_QIPCRTR SOCK_NONBLOCK SOCK_CLOEXEC SO_BINDTODEVICE "
    "SO_MARK SO_PEERCRED SO_PASSCRED SO_DOMAIN SO_PROTOCOL SO_PRIORITY SO_PEERSEC SO_PASSSEC SO_INCOMING_CPU MSG_ERRQUEUE "
    "MSG_CMSG_CLOEXEC MSG_MORE MSG_CONFIRM TCP_QUICKACK TCP_USER_TIMEOUT TCP_CORK TCP_DEFER_ACCEPT TCP_LINGER2 TCP_SYNCNT "
    "TCP_WINDOW_CLAMP TCP_INFO TCP_CONGESTION IP_TRANSPARENT IP_BIND_ADDRESS_NO_PORT IP_RECVERR IP_MTU_DISCOVER IP_MTU",
}
_BELOW: dict[ModuleType, ModuleType] = {os: posix, socket: sys.modules["_socket"]}
LIBRARIES = "aiohttp dnslib dpkt numpy rich uvloop yaml"

KQ_FILTER_READ, KQ_FILTER_WRITE = -1, -2
KQ_EV_ADD, KQ_EV_DELETE, KQ_EV_CLEAR, KQ_EV_EOF = 1, 2, 0x20, 0x8000
_EPOLLET, _EPOLLRDHUP = 1 << 31, 0x2000
_MASKS = {KQ_FILTER_READ: select.POLLIN | _EPOLLRDHUP, KQ_FILTER_WRITE: select.POLLOUT}
_epoll = getattr(select, "epoll", None)


@dataclass
class Kevent:
    ident: int
    filter: int = KQ_FILTER_READ
    flags: int = KQ_EV_ADD


class Kqueue:
    """`select.kqueue` for filters READ and WRITE, with the errors of the real one."""

    def __init__(self) -> None:
        assert _epoll is not None
        self._epoll = _epoll()
        self._filters: dict[int, dict[int, int]] = {}

    def control(self, changes: list[Kevent] | None, most: int, timeout: float | None = None) -> list[Kevent]:
        for change in changes or ():
            self._change(change)
        return self._events(most) if most else []

    def _change(self, change: Kevent) -> None:
        fd = change.ident
        filters = self._filters.setdefault(fd, {})
        if change.flags & KQ_EV_DELETE:
            if change.filter not in filters:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            del filters[change.filter]
            if not filters:
                self._epoll.unregister(fd)
                return
        else:
            filters[change.filter] = change.flags & KQ_EV_CLEAR
        try:
            self._epoll.modify(fd, self._mask(fd))
        except FileNotFoundError:  # a new descriptor, perhaps of a number known before
            self._filters[fd] = {change.filter: change.flags & KQ_EV_CLEAR}
            self._epoll.register(fd, self._mask(fd))

    def _mask(self, fd: int) -> int:
        filters = self._filters[fd]
        return sum(_MASKS[kind] for kind in filters) | (_EPOLLET if any(filters.values()) else 0)

    def _events(self, most: int) -> list[Kevent]:
        found = []
        for fd, mask in self._epoll.poll(0, most):
            for kind in self._filters[fd]:
                ended = mask & (select.POLLHUP | select.POLLERR | (_EPOLLRDHUP if kind == KQ_FILTER_READ else 0))
                if ended or mask & _MASKS[kind]:
                    found.append(Kevent(fd, kind, KQ_EV_EOF if ended else 0))
        return found

    def fileno(self) -> int:
        return int(self._epoll.fileno())

    def close(self) -> None:
        self._epoll.close()


def pretend() -> None:
    """From now on this process believes to be on macOS. Libraries are imported before, for they are not under test."""
    for name in LIBRARIES.split():
        importlib.import_module(name)
    for module, names in LINUX_ONLY.items():
        for name in names.split():
            for one in (module, _BELOW.get(module, module)):
                if hasattr(one, name):
                    delattr(one, name)
    for name in [name for name in vars(select) if name.startswith("EPOLL")]:
        delattr(select, name)
    played: dict[str, Any] = {name: value for name, value in globals().items() if name.startswith("KQ_")}
    for name, value in {**played, "kqueue": Kqueue, "kevent": Kevent}.items():
        setattr(select, name, value)
    selectors.DefaultSelector = selectors.PollSelector  # type: ignore[misc,assignment]
    pair = socket.socketpair

    def socketpair(family: int = socket.AF_UNIX, kind: int = socket.SOCK_STREAM, protocol: int = 0) -> Any:
        if kind == socket.SOCK_SEQPACKET:
            raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))
        return pair(family, kind, protocol)

    socket.socketpair = socketpair
    sys.platform = "darwin"


_ = (asyncio, concurrent.futures)
