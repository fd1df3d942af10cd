"""Open a descriptor inside another network namespace (Linux only).

`setns` into a user namespace is refused to a process with threads and cannot be undone, so a forked child goes in, opens,
and sends the descriptor back over a socket pair.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Final

from netstack.errors import ConfigError

_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000


def namespace_paths(kind: str, target: str, user: str | None = None) -> list[tuple[str, int]]:
    """What to enter, in order, for `netns` (a name of `ip netns` or a path) or `pid` (a process id).

    The user namespace at the path `user`, for a process its own, is entered first when it differs from ours, since it owns
    the network namespace.
    """
    if kind == "pid":
        user, net = user or f"/proc/{target}/ns/user", f"/proc/{target}/ns/net"
    else:
        net = target if target.startswith("/") else f"/run/netns/{target}"
    paths = [(net, _CLONE_NEWNET)]
    if user is not None and os.stat(user).st_ino != os.stat("/proc/self/ns/user").st_ino:
        paths.insert(0, (user, _CLONE_NEWUSER))
    return paths


def process_handle(pid: int) -> int | None:
    """A descriptor that becomes readable when process `pid` ends (pidfd_open(2)); `None` where it cannot be had."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return None


def _setns(path: str, kind: int) -> None:
    import ctypes

    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(fd, kind) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), path)
    finally:
        os.close(fd)


def open_inside(namespaces: Sequence[tuple[str, int]], task: Callable[[], int]) -> int:
    """Run `task` in the namespaces and return the descriptor it opened, as ours. Raises `ConfigError` with its reason."""
    if sys.platform != "linux":
        raise ConfigError(
            "network namespaces, TAP and packet links need Linux; use a socket link (qemu, vmnet, unixgram)"
        )
    if not namespaces:
        return task()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    child = os.fork()
    if child == 0:
        try:
            for path, kind in namespaces:
                _setns(path, kind)
            socket.send_fds(theirs, [b"ok"], [task()])
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            theirs.send(f"{error.strerror}{where}".encode())
        except BaseException as error:
            theirs.send(repr(error).encode()[:512])
        finally:
            os._exit(0)
    theirs.close()
    try:
        message, fds, _flags, _address = socket.recv_fds(ours, 512, 1)
    finally:
        ours.close()
        os.waitpid(child, 0)
    if not fds:
        raise ConfigError(message.decode(errors="replace") or "the child that enters the namespace died")
    return fds[0]
