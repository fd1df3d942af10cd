"""What files have besides their contents, set by clients: Tsetattr, and extended attributes.

Of the latter clients see those called `user.*`, but for `user.virtfs.*`, where `owners` keeps what it must remember. Others are
answered EOPNOTSUPP, without a look at the file: Linux asks for `security.capability` often.
"""

from __future__ import annotations

import errno
import os
import time
from typing import Final

from vm.filesystems.ninep import beneath
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep.beneath import by_fd
from vm.filesystems.ninep.nodes import Node
from vm.filesystems.ninep.owners import PREFIX
from vm.filesystems.ninep.share import Share, refuse

MAX_VALUE: Final = 1 << 16
"""Octets of a value, as on Linux (XATTR_SIZE_MAX)."""
_USER: Final = b"user."
_NOBODY: Final = 0xFFFFFFFF
_SECOND: Final = 1_000_000_000


def set_attributes(share: Share, node: Node, opened: int | None, wanted: m.Tsetattr) -> None:
    """Owner first, for that takes set-user-id bits away. `opened`: a descriptor for writing, that it may be cut by."""
    share.writable()
    valid = wanted.valid
    with node.held() as fd:
        if valid & (m.SET_UID | m.SET_GID):
            uid = wanted.uid if valid & m.SET_UID and wanted.uid != _NOBODY else None
            gid = wanted.gid if valid & m.SET_GID and wanted.gid != _NOBODY else None
            share.owners.chown(fd, uid, gid)
        if valid & m.SET_MODE:
            share.owners.chmod(fd, wanted.mode & 0o7777)
        if valid & m.SET_SIZE:
            if opened is not None:
                os.ftruncate(opened, wanted.size)
            else:  # what is not a plain file is refused by the kernel
                os.truncate(by_fd(fd), wanted.size)
        if valid & (m.SET_ATIME | m.SET_MTIME):
            _set_times(fd, wanted)


def _set_times(fd: int, wanted: m.Tsetattr) -> None:
    both = m.SET_ATIME | m.SET_MTIME
    if wanted.valid & both == both and not wanted.valid & (m.SET_ATIME_TO | m.SET_MTIME_TO):
        os.utime(by_fd(fd))  # whoever may write may do that; to set others is for the owner
        return
    state = os.fstat(fd)
    now = time.time_ns()

    def one(which: int, to: int, seconds: int, more: int, former: int) -> int:
        if not wanted.valid & which:
            return former
        return _signed(seconds) * _SECOND + more if wanted.valid & to else now

    atime = one(m.SET_ATIME, m.SET_ATIME_TO, wanted.atime_sec, wanted.atime_nsec, state.st_atime_ns)
    mtime = one(m.SET_MTIME, m.SET_MTIME_TO, wanted.mtime_sec, wanted.mtime_nsec, state.st_mtime_ns)
    os.utime(by_fd(fd), ns=(atime, mtime))


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number


def _of_users(name: bytes) -> None:
    if not name.startswith(_USER) or name.startswith(PREFIX) or b"\0" in name:
        raise refuse(errno.EOPNOTSUPP)
    if len(name) > beneath.NAME_MAX:
        raise refuse(errno.ERANGE)


def is_foreign(name: bytes) -> bool:
    """Whether no attribute of that name is there for clients."""
    return bool(name) and (not name.startswith(_USER) or name.startswith(PREFIX))


def extended(node: Node, name: bytes) -> bytes:
    """Its value; with no name, a list of names, each with a NUL behind it."""
    if name:
        _of_users(name)
    with node.held() as fd:
        if name:
            return os.getxattr(by_fd(fd), name)
        try:
            names = list(map(os.fsencode, os.listxattr(by_fd(fd))))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            return b""
        return b"".join(found + b"\0" for found in names if not is_foreign(found))


def may_set(share: Share, name: bytes, octets: int) -> None:
    """Raises where there can be no attribute of that name, and so long a value."""
    _of_users(name)
    share.writable()
    if octets > MAX_VALUE:
        raise refuse(errno.E2BIG)


def set_extended(node: Node, name: bytes, value: bytes, flags: int) -> None:
    """Linux removes one by an empty value in place of one that must be there."""
    with node.held() as fd:
        if not value and flags & m.XATTR_REPLACE:
            os.removexattr(by_fd(fd), name)
        else:
            os.setxattr(by_fd(fd), name, value, flags)
