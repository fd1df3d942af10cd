"""Whose a file is: what guests are told, and what becomes of their chown and chmod on the host (spec companions 2.1, 2.3).

                 guests see                          chown                 chmod              a new file on the host
    passthrough  what the host has                   really                really             the asker's, if we may
    squash       one owner for all; real modes       EPERM for any other   without s-bits     the server's user's
    mapped       what they set, kept in xattrs       kept in xattrs        kept in xattrs     ours, 0600 (directories 0700)
    requester    that who asks owns it, until chown  kept in xattrs        without s-bits     the server's user's

The xattrs are those of QEMU's mapped-xattr, so that a folder can be shared by either: `user.virtfs.uid`, `.gid` and `.mode`,
little-endian u32, and `.rdev`, u64. As there, with `mapped` a symbolic link, a fifo or a socket of the guest is a plain file here.

Who asks is who attached (n_uname). The server trusts the guest's kernel to check what its users may do, as every server for
`access=user` does that runs as one user; the host's kernel checks what the server's user may. Set-user-id bits reach the host with
`passthrough` alone: a program that a guest has written must not run here with the rights of the server.

All calls may block. Each `fd` may be one with O_PATH.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from netstack.errors import ConfigError
from vm.filesystems.ninep.beneath import by_fd

PREFIX: Final = b"user.virtfs."
_UID, _GID, _MODE, _RDEV = (PREFIX.decode() + name for name in ("uid", "gid", "mode", "rdev"))
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")
_SAFE_BITS: Final = 0o777
_SAFE_DIR_BITS: Final = 0o3777
"""Set-group-id of a directory says whose new files are, and lets nobody run anything."""
_SPECIAL: Final = (stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
_NONE: Final = (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
"""No such attribute, or none that we may read."""


class View(NamedTuple):
    """What a guest is told."""

    mode: int
    """With the kind of file."""
    uid: int
    gid: int
    rdev: int


@dataclass(frozen=True, slots=True)
class Asker:
    """Who wants something; numbers of the guest."""

    uid: int | None
    """None: a client that did not say (`access=any`)."""
    gid: int | None = None
    """Where a message has it; the user's own group is taken to have the user's number elsewhere."""


def _get(fd: int, name: str, form: struct.Struct) -> int | None:
    try:
        octets = os.getxattr(by_fd(fd), name)
    except OSError as error:
        if error.errno in _NONE:
            return None
        raise
    return int(form.unpack(octets)[0]) if len(octets) == form.size else None


@contextlib.contextmanager
def _writable(fd: int) -> Iterator[None]:
    """For setting an attribute the file must be writable, which its owner's chmod need not have left it (xattr(7))."""
    state = os.fstat(fd)
    mode = stat.S_IMODE(state.st_mode)
    hindered = os.geteuid() == state.st_uid and mode & 0o600 != 0o600 and not os.access(by_fd(fd), os.W_OK)
    if hindered:
        os.chmod(by_fd(fd), mode | 0o600)
    try:
        yield
    finally:
        if hindered:
            os.chmod(by_fd(fd), mode)


def _set(fd: int, **values: tuple[struct.Struct, int | None]) -> None:
    with _writable(fd):
        for name, (form, value) in values.items():
            if value is not None:
                os.setxattr(by_fd(fd), PREFIX.decode() + name, form.pack(value))


class Owners:
    """`passthrough`, and what the others change of it."""

    name = "passthrough"
    maps_kinds = False
    """Whether a plain file of the host may be something else to a guest."""

    def check(self, root: int) -> None:
        """Raises `ConfigError` where the host's file system cannot hold what this needs."""

    def view(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        return View(state.st_mode, state.st_uid, state.st_gid, state.st_rdev)

    def view_of_root(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        """Of the folder itself."""
        return self.view(fd, state, asker)

    def host_mode(self, mode: int) -> int:
        """Of a file on the host that is to have `mode` (with its kind) for guests."""
        return stat.S_IMODE(mode)

    def created(self, fd: int, mode: int, asker: Asker) -> None:
        """What `asker` has made; it is `mode`, with its kind."""
        wanted = tuple(-1 if number is None else number for number in (asker.uid, asker.gid))
        with contextlib.suppress(PermissionError):  # not root: then it is the server's user's
            os.chown(by_fd(fd), *wanted)
        self._set_mode(fd, self.host_mode(mode))

    def _set_mode(self, fd: int, mode: int) -> None:
        """The umask of this process has nothing to say; the client has applied its own."""
        state = os.fstat(fd)
        if not stat.S_ISLNK(state.st_mode) and stat.S_IMODE(state.st_mode) != mode:
            os.chmod(by_fd(fd), mode)

    def chmod(self, fd: int, mode: int) -> None:
        """`mode` without the kind."""
        os.chmod(by_fd(fd), self.host_mode(mode | stat.S_IFMT(os.fstat(fd).st_mode)))

    def chown(self, fd: int, uid: int | None, gid: int | None) -> None:
        os.chown(by_fd(fd), -1 if uid is None else uid, -1 if gid is None else gid)

    def __str__(self) -> str:
        return self.name


class _Private(Owners):
    """Files on the host are the server's user's, without set-user-id bits."""

    def host_mode(self, mode: int) -> int:
        return mode & (_SAFE_DIR_BITS if stat.S_ISDIR(mode) else _SAFE_BITS)

    def created(self, fd: int, mode: int, asker: Asker) -> None:
        self._set_mode(fd, self.host_mode(mode))


class Squash(_Private):
    name = "squash"

    def __init__(self, uid: int, gid: int) -> None:
        self.uid = uid
        self.gid = gid

    def view(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        return View(state.st_mode, self.uid, self.gid, state.st_rdev)

    def chown(self, fd: int, uid: int | None, gid: int | None) -> None:
        if uid not in (None, self.uid) or gid not in (None, self.gid):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def __str__(self) -> str:
        return f"{self.name}:{self.uid}:{self.gid}"


class Requester(_Private):
    name = "requester"

    def view(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        uid, gid = _get(fd, _UID, _U32), _get(fd, _GID, _U32)
        if uid is None:
            uid = state.st_uid if asker.uid is None else asker.uid
        if gid is None:
            gid = state.st_gid if asker.uid is None else asker.uid
        return View(state.st_mode, uid, gid, state.st_rdev)

    def view_of_root(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        """Whoever asks may do there what its owner may, without having asked: Linux keeps what the last one was told of a directory
        that is in use, as that of a mount always is, and would turn others away by it."""
        mode, *rest = self.view(fd, state, asker)
        if _get(fd, _UID, _U32) is None:
            mode |= (mode & stat.S_IRWXU) >> 3 | (mode & stat.S_IRWXU) >> 6
        return View(mode, *rest)

    def chown(self, fd: int, uid: int | None, gid: int | None) -> None:
        if stat.S_IFMT(os.fstat(fd).st_mode) in _SPECIAL:
            return  # Linux keeps no such attributes for them; whoever asks goes on owning them
        _set(fd, uid=(_U32, uid), gid=(_U32, gid))


class Mapped(Owners):
    name = "mapped"
    maps_kinds = True

    def check(self, root: int) -> None:
        try:
            os.getxattr(by_fd(root), _UID)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                raise ConfigError(
                    "--owner: mapped: the file system of this folder keeps no extended attributes (user.*); "
                    "use requester, squash:UID:GID or passthrough, or another file system"
                ) from None

    def view(self, fd: int, state: os.stat_result, asker: Asker) -> View:
        if stat.S_IFMT(state.st_mode) in _SPECIAL:
            return super().view(fd, state, asker)
        mode, uid, gid = _get(fd, _MODE, _U32), _get(fd, _UID, _U32), _get(fd, _GID, _U32)
        rdev = 0
        if mode is None:
            mode = state.st_mode
        elif not stat.S_ISREG(state.st_mode) or stat.S_IFMT(mode) not in (stat.S_IFREG, *_SPECIAL):
            mode = stat.S_IMODE(mode) | stat.S_IFMT(state.st_mode)
        elif stat.S_ISCHR(mode) or stat.S_ISBLK(mode):  # made by QEMU; we make none
            rdev = _get(fd, _RDEV, _U64) or 0
        return View(mode, state.st_uid if uid is None else uid, state.st_gid if gid is None else gid, rdev)

    def host_mode(self, mode: int) -> int:
        return 0o700 if stat.S_ISDIR(mode) else 0o600

    def created(self, fd: int, mode: int, asker: Asker) -> None:
        self._set_mode(fd, self.host_mode(mode))
        _set(fd, uid=(_U32, asker.uid), gid=(_U32, asker.gid), mode=(_U32, mode))

    def chmod(self, fd: int, mode: int) -> None:
        kind = stat.S_IFMT(self.view(fd, os.fstat(fd), Asker(None)).mode)
        _set(fd, mode=(_U32, kind | mode))

    def chown(self, fd: int, uid: int | None, gid: int | None) -> None:
        _set(fd, uid=(_U32, uid), gid=(_U32, gid))


_SQUASH: Final = re.compile(r"squash:(\d{1,10}):(\d{1,10})")
ACCEPTED: Final = "passthrough, mapped, requester, or squash:UID:GID with two numbers below 4294967295"


def parse_owner(text: str) -> Owners:
    """The inverse of `str`. Raises `ConfigError`."""
    for kind in (Owners, Mapped, Requester):
        if text == kind.name:
            return kind()
    found = _SQUASH.fullmatch(text)
    if found is not None and all(int(number) < 0xFFFFFFFF for number in found.groups()):
        return Squash(int(found[1]), int(found[2]))
    raise ConfigError(f"--owner: {text!r} is none; what is accepted: {ACCEPTED}")
