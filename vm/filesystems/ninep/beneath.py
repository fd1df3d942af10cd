"""Files below a directory and nowhere else: how names of a guest become descriptors (openat2(2), open(2), proc(5)).

A descriptor with O_PATH is the file itself: nothing is opened, no device is touched, and it stays the same file whatever happens to
names. From there everything is done through `/proc/self/fd/N`, which leads to that file and to no other; so between the look
at what a file is and its use nothing can be exchanged.

`find` never follows a symbolic link, neither at the end nor on the way, and never goes up. The kernel sees to that where it has
openat2 (5.6); elsewhere each component is opened by itself. A name of one component cannot lead out of its directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import sys
from typing import Final

from netstack.errors import ConfigError

NAME_MAX: Final = 255
PATH_MAX: Final = 4095
"""Octets of a symbolic link's target."""

_FIND: Final = getattr(os, "O_PATH", 0) | os.O_NOFOLLOW | os.O_CLOEXEC
_OPENAT2: Final = 437  # one number on every architecture, as all calls since 424
_RESOLVE: Final = 0x08 | 0x04 | 0x02  # RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS, RESOLVE_NO_MAGICLINKS
_HOW: Final = struct.pack("=QQQ", _FIND, 0, _RESOLVE)
_KINDS_TO_OPEN: Final = (stat.S_IFREG, stat.S_IFDIR)

_syscall = ctypes.CDLL(None, use_errno=True).syscall if sys.platform == "linux" else None


def check_host() -> None:
    """Raises `ConfigError` where the host cannot do what this module needs."""
    if sys.platform != "linux":
        raise ConfigError(
            f"--export: folders can be served on Linux, not on {sys.platform}: O_PATH and /proc are needed"
        )
    if not os.path.exists("/proc/self/fd/0") and not os.path.isdir("/proc/self/fd"):
        raise ConfigError("--export: /proc is not mounted, and is needed to open files safely; mount it")


def good_name(name: bytes) -> bool:
    """Whether a file may be called that."""
    return 0 < len(name) <= NAME_MAX and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


def by_fd(fd: int) -> str:
    """A path of the very file that `fd` is."""
    return f"/proc/self/fd/{fd}"


def find_by_openat2(directory: int, path: bytes) -> int:
    """As `find`; raises `OSError` with ENOSYS where there is no openat2."""
    assert _syscall is not None
    fd: int = _syscall(_OPENAT2, directory, path, _HOW, len(_HOW))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd


def find_by_steps(directory: int, path: bytes) -> int:
    """As `find`, without openat2."""
    names = path.split(b"/")
    if not all(map(good_name, names)):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    at = directory
    try:
        for name in names[:-1]:
            step = os.open(name, _FIND | os.O_DIRECTORY, dir_fd=at)
            if at != directory:
                os.close(at)
            at = step
        return os.open(names[-1], _FIND, dir_fd=at)
    finally:
        if at != directory:
            os.close(at)


def _has_openat2() -> bool:
    """ENOSYS is said by old kernels, EPERM by sandboxes."""
    if _syscall is None:
        return False
    try:
        root = os.open("/", _FIND | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        os.close(find_by_openat2(root, b"."))
    except OSError:
        return False
    finally:
        os.close(root)
    return True


find = find_by_openat2 if _has_openat2() else find_by_steps
"""`find(directory, b"a/b/c")`: a descriptor (O_PATH) of what is there, be it a symbolic link. Raises `OSError`."""


def open_found(fd: int, flags: int) -> int:
    """Open what `find` found, for good. Only files and directories: to open a device, a fifo or a socket has effects of its own.

    Raises `OSError`.
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind not in _KINDS_TO_OPEN:
        number = (
            errno.ELOOP if kind == stat.S_IFLNK else errno.ENXIO
        )  # as open(2) says of a link with O_NOFOLLOW, and a socket
        raise OSError(number, os.strerror(number))
    return os.open(by_fd(fd), flags | os.O_CLOEXEC | os.O_NOCTTY)


def same(fd: int) -> int:
    """Another descriptor (O_PATH) of what `fd` is."""
    return os.open(by_fd(fd), os.O_PATH | os.O_CLOEXEC)
