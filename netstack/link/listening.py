"""Sockets that guests' hypervisors find by name: made private, found stale or not, removed afterwards (threats L1, L2).

A path that exists is removed only when it is a socket, ours, in a directory that strangers cannot change, and nobody
answers there. Anything else is the person's to decide, and the error says so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import sys

from netstack.errors import ConfigError

BACKLOG = 64


class UnixSocket:
    """A bound (and for stream and seqpacket, listening) Unix socket of mode 0600, and the path it was bound to.

    Raises `ConfigError` when the path cannot be had. `close` removes the path if it still is this socket.
    """

    def __init__(self, path: str, kind: int, *, setting: str, backlog: int = BACKLOG) -> None:
        self.path = path
        _remove_stale(path, setting)
        self.sock = socket.socket(socket.AF_UNIX, kind)
        try:
            mask = os.umask(0o177)  # not chmod afterwards: between the two anybody could connect
            try:
                self.sock.bind(path)
            finally:
                os.umask(mask)
            self._identity = _identity(path)
            self.sock.setblocking(False)
            if kind != socket.SOCK_DGRAM:
                self.sock.listen(backlog)
        except OSError as error:
            self.sock.close()
            raise ConfigError(f"{setting}: {path}: {_why(error)}") from None

    def close(self) -> None:
        self.sock.close()
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._identity:
                os.unlink(self.path)


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino


def _why(error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "the directory does not exist; create it or choose another path"
    if error.errno is None:  # Python's own complaint about the length
        return f"{error}; a socket's path has at most {103 if sys.platform == 'darwin' else 107} octets, choose a shorter one"
    return f"{error.strerror}; choose a path in a directory that you may write to"


def _remove_stale(path: str, setting: str) -> None:
    """Free `path` when a dead socket of ours holds it. Raises `ConfigError` when something else does."""
    directory, name = os.path.split(os.path.abspath(path))
    try:
        where = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # bind says it better
    try:
        found = os.stat(name, dir_fd=where, follow_symlinks=False)
        if not stat.S_ISSOCK(found.st_mode):
            raise ConfigError(f"{setting}: {path} exists and is not a socket; remove it or choose another path")
        if answers(path):
            raise ConfigError(f"{setting}: another program listens on {path}; stop it or choose another path")
        mode = os.fstat(where).st_mode
        if found.st_uid != os.geteuid() or (mode & stat.S_IWOTH and not mode & stat.S_ISVTX):
            raise ConfigError(
                f"{setting}: a stale socket is at {path}, and it or its directory is open to other users; "
                "remove it or choose another path"
            )
        os.unlink(name, dir_fd=where)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: {_why(error)}") from None
    finally:
        os.close(where)


def answers(path: str) -> bool:
    """Whether any socket, of whatever type, is bound to `path`; nothing is sent."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except OSError as error:
            return error.errno not in (errno.ECONNREFUSED, errno.ENOENT)
    return True


def peer_pid(sock: socket.socket) -> int | None:
    """The process that connected a Unix stream socket; None where that cannot be known."""
    if sys.platform != "linux":
        return None
    try:
        pid, _uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    except OSError:
        return None
    return int(pid)


def peer_uid(sock: socket.socket) -> int | None:
    """The user at the other end of a Unix stream socket; None where that cannot be known."""
    try:
        if sys.platform == "linux":
            _pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            return int(uid) & 0xFFFFFFFF
        if sys.platform == "darwin":
            _version, uid = struct.unpack_from("II", sock.getsockopt(0, 1, 76))  # SOL_LOCAL, LOCAL_PEERCRED: xucred
            return int(uid)
    except OSError:
        pass
    return None
