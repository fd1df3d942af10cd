"""The messages of 9P2000.L as values (the protocol description of diod; Linux's `include/net/9p/9p.h` for numbers).

`wire` makes octets of them. Strings are octets, for a file's name on Linux need not be UTF-8. Numbers are unsigned, of as many bits
as `wire` says; errno, open flags and modes are those of Linux whatever the host. Where a reply has nothing but its tag it is a
`Done`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from portfwd.ninep.wire import Qid

NOTAG: Final = 0xFFFF
NOFID: Final = 0xFFFFFFFF
NONUNAME: Final = 0xFFFFFFFF
"""In Tattach: the user has no number."""
QTDIR, QTSYMLINK, QTFILE = 0x80, 0x02, 0x00
AT_REMOVEDIR: Final = 0x200
"""In Tunlinkat."""

GETATTR_BASIC: Final = 0x7FF
"""Rgetattr.valid: all but btime, gen and data_version."""
SET_MODE, SET_UID, SET_GID, SET_SIZE, SET_ATIME, SET_MTIME, SET_CTIME = 1, 2, 4, 8, 16, 32, 64
SET_ATIME_TO, SET_MTIME_TO = 128, 256
"""With SET_ATIME, SET_MTIME: to what the message says; otherwise to now."""

RDLCK, WRLCK, UNLCK = 0, 1, 2
LOCK_SUCCESS, LOCK_BLOCKED, LOCK_ERROR = 0, 1, 2
XATTR_CREATE, XATTR_REPLACE = 1, 2


@dataclass(frozen=True, slots=True)
class Message:
    tag: int


@dataclass(frozen=True, slots=True)
class Done(Message):
    """A reply that says no more than that it was done."""


@dataclass(frozen=True, slots=True)
class OfFid(Message):
    """A request about a file, which says no more."""

    fid: int


@dataclass(frozen=True, slots=True)
class WithQid(Message):
    """A reply that says what was found or made."""

    qid: Qid


@dataclass(frozen=True, slots=True)
class WithOpened(WithQid):
    iounit: int
    """0: go by msize."""


@dataclass(frozen=True, slots=True)
class Rlerror(Message):
    errno: int


class Tstatfs(OfFid): ...


@dataclass(frozen=True, slots=True)
class Rstatfs(Message):
    type: int
    bsize: int
    blocks: int
    bfree: int
    bavail: int
    files: int
    ffree: int
    fsid: int
    namelen: int


@dataclass(frozen=True, slots=True)
class Tlopen(Message):
    fid: int
    flags: int


class Rlopen(WithOpened): ...


@dataclass(frozen=True, slots=True)
class Tlcreate(Message):
    fid: int
    """The directory; the new file afterwards."""
    name: bytes
    flags: int
    mode: int
    gid: int


class Rlcreate(WithOpened): ...


@dataclass(frozen=True, slots=True)
class Tsymlink(Message):
    fid: int
    name: bytes
    target: bytes
    gid: int


class Rsymlink(WithQid): ...


@dataclass(frozen=True, slots=True)
class Tmknod(Message):
    fid: int
    name: bytes
    mode: int
    major: int
    minor: int
    gid: int


class Rmknod(WithQid): ...


@dataclass(frozen=True, slots=True)
class Trename(Message):
    fid: int
    dfid: int
    name: bytes


class Rrename(Done): ...


class Treadlink(OfFid): ...


@dataclass(frozen=True, slots=True)
class Rreadlink(Message):
    target: bytes


@dataclass(frozen=True, slots=True)
class Tgetattr(Message):
    fid: int
    request_mask: int


@dataclass(frozen=True, slots=True)
class Rgetattr(Message):
    valid: int
    qid: Qid
    mode: int
    uid: int
    gid: int
    nlink: int
    rdev: int
    size: int
    blksize: int
    blocks: int
    """Of 512 octets."""
    atime_sec: int
    atime_nsec: int
    mtime_sec: int
    mtime_nsec: int
    ctime_sec: int
    ctime_nsec: int
    btime_sec: int = 0
    btime_nsec: int = 0
    gen: int = 0
    data_version: int = 0


@dataclass(frozen=True, slots=True)
class Tsetattr(Message):
    fid: int
    valid: int
    mode: int = 0
    uid: int = 0
    gid: int = 0
    size: int = 0
    atime_sec: int = 0
    atime_nsec: int = 0
    mtime_sec: int = 0
    mtime_nsec: int = 0


class Rsetattr(Done): ...


@dataclass(frozen=True, slots=True)
class Txattrwalk(Message):
    fid: int
    newfid: int
    name: bytes
    """Empty: the list of names."""


@dataclass(frozen=True, slots=True)
class Rxattrwalk(Message):
    size: int


@dataclass(frozen=True, slots=True)
class Txattrcreate(Message):
    fid: int
    name: bytes
    size: int
    flags: int


class Rxattrcreate(Done): ...


@dataclass(frozen=True, slots=True)
class Treaddir(Message):
    fid: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Tfsync(Message):
    fid: int
    datasync: int = 0
    """Missing in messages of Linux before 2011."""


class Rfsync(Done): ...


@dataclass(frozen=True, slots=True)
class Tlock(Message):
    fid: int
    type: int
    flags: int
    start: int
    length: int
    """0: to the end, however far that is."""
    proc_id: int
    client_id: bytes


@dataclass(frozen=True, slots=True)
class Rlock(Message):
    status: int


@dataclass(frozen=True, slots=True)
class Tgetlock(Message):
    fid: int
    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


@dataclass(frozen=True, slots=True)
class Rgetlock(Message):
    type: int
    start: int
    length: int
    proc_id: int
    client_id: bytes


@dataclass(frozen=True, slots=True)
class Tlink(Message):
    dfid: int
    fid: int
    name: bytes


class Rlink(Done): ...


@dataclass(frozen=True, slots=True)
class Tmkdir(Message):
    fid: int
    name: bytes
    mode: int
    gid: int


class Rmkdir(WithQid): ...


@dataclass(frozen=True, slots=True)
class Trenameat(Message):
    olddirfid: int
    oldname: bytes
    newdirfid: int
    newname: bytes


class Rrenameat(Done): ...


@dataclass(frozen=True, slots=True)
class Tunlinkat(Message):
    fid: int
    name: bytes
    flags: int


class Runlinkat(Done): ...


@dataclass(frozen=True, slots=True)
class Tversion(Message):
    msize: int
    version: bytes


@dataclass(frozen=True, slots=True)
class Rversion(Message):
    msize: int
    version: bytes


@dataclass(frozen=True, slots=True)
class Tauth(Message):
    afid: int
    uname: bytes
    aname: bytes
    n_uname: int


@dataclass(frozen=True, slots=True)
class Tattach(Message):
    fid: int
    afid: int
    uname: bytes
    aname: bytes
    n_uname: int


class Rattach(WithQid): ...


@dataclass(frozen=True, slots=True)
class Tflush(Message):
    oldtag: int


class Rflush(Done): ...


@dataclass(frozen=True, slots=True)
class Twalk(Message):
    fid: int
    newfid: int
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Rwalk(Message):
    qids: tuple[Qid, ...]


@dataclass(frozen=True, slots=True)
class Tread(Message):
    fid: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Rread(Message):
    data: bytes | memoryview


class Rreaddir(Rread): ...


@dataclass(frozen=True, slots=True)
class Twrite(Message):
    fid: int
    offset: int
    data: bytes | memoryview


@dataclass(frozen=True, slots=True)
class Rwrite(Message):
    count: int


class Tclunk(OfFid): ...


class Rclunk(Done): ...


class Tremove(OfFid): ...


class Rremove(Done): ...
