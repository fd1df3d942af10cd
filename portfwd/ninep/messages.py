"""The messages of 9P2000 and 9P2000.u as values (spec vpnkit, appendix D; section 5 of Plan 9's manual).

`wire` makes octets of them. Numbers are what the protocol says: fids and counts have 32 bits, offsets 64. Fields with a default, at
the end, are those that 9P2000.u has besides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

NOTAG: Final = 0xFFFF
NOFID: Final = 0xFFFFFFFF
QTDIR: Final = 0x80
DMDIR: Final = 0x80000000
OREAD, OWRITE, ORDWR, OEXEC, OTRUNC, ORCLOSE = 0, 1, 2, 3, 0x10, 0x40
MAX_WALK: Final = 16
"""Names in one Twalk (MAXWELEM of walk(5))."""


@dataclass(frozen=True, slots=True)
class Qid:
    """What a file is to the server: two files are the same if their qids are."""

    kind: int
    """`QTDIR` or 0."""
    version: int
    path: int


@dataclass(frozen=True, slots=True)
class Stat:
    """A directory entry. The defaults say "do not touch" in a Twstat; the fields from `extension` on are those of 9P2000.u."""

    type: int = 0xFFFF
    dev: int = 0xFFFFFFFF
    qid: Qid = Qid(0xFF, 0xFFFFFFFF, (1 << 64) - 1)
    mode: int = 0xFFFFFFFF
    atime: int = 0xFFFFFFFF
    mtime: int = 0xFFFFFFFF
    length: int = (1 << 64) - 1
    name: str = ""
    uid: str = ""
    gid: str = ""
    muid: str = ""
    extension: str = ""
    n_uid: int = 0xFFFFFFFF
    n_gid: int = 0xFFFFFFFF
    n_muid: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Tversion:
    tag: int
    msize: int
    version: str


@dataclass(frozen=True, slots=True)
class Rversion:
    tag: int
    msize: int
    version: str


@dataclass(frozen=True, slots=True)
class Tauth:
    tag: int
    afid: int
    uname: str
    aname: str
    n_uname: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Rauth:
    tag: int
    aqid: Qid


@dataclass(frozen=True, slots=True)
class Tattach:
    tag: int
    fid: int
    afid: int
    uname: str
    aname: str
    n_uname: int = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Rattach:
    tag: int
    qid: Qid


@dataclass(frozen=True, slots=True)
class Rerror:
    tag: int
    ename: str
    errno: int = 0


@dataclass(frozen=True, slots=True)
class Tflush:
    tag: int
    oldtag: int


@dataclass(frozen=True, slots=True)
class Rflush:
    tag: int


@dataclass(frozen=True, slots=True)
class Twalk:
    tag: int
    fid: int
    newfid: int
    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Rwalk:
    tag: int
    qids: tuple[Qid, ...]


@dataclass(frozen=True, slots=True)
class Topen:
    tag: int
    fid: int
    mode: int


@dataclass(frozen=True, slots=True)
class Ropen:
    tag: int
    qid: Qid
    iounit: int


@dataclass(frozen=True, slots=True)
class Tcreate:
    tag: int
    fid: int
    name: str
    perm: int
    mode: int
    extension: str = ""


@dataclass(frozen=True, slots=True)
class Rcreate:
    tag: int
    qid: Qid
    iounit: int


@dataclass(frozen=True, slots=True)
class Tread:
    tag: int
    fid: int
    offset: int
    count: int


@dataclass(frozen=True, slots=True)
class Rread:
    tag: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Twrite:
    tag: int
    fid: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Rwrite:
    tag: int
    count: int


@dataclass(frozen=True, slots=True)
class Tclunk:
    tag: int
    fid: int


@dataclass(frozen=True, slots=True)
class Rclunk:
    tag: int


@dataclass(frozen=True, slots=True)
class Tremove:
    tag: int
    fid: int


@dataclass(frozen=True, slots=True)
class Rremove:
    tag: int


@dataclass(frozen=True, slots=True)
class Tstat:
    tag: int
    fid: int


@dataclass(frozen=True, slots=True)
class Rstat:
    tag: int
    stat: Stat


@dataclass(frozen=True, slots=True)
class Twstat:
    tag: int
    fid: int
    stat: Stat


@dataclass(frozen=True, slots=True)
class Rwstat:
    tag: int


Request: TypeAlias = (
    Tversion | Tauth | Tattach | Tflush | Twalk | Topen | Tcreate | Tread | Twrite | Tclunk | Tremove | Tstat | Twstat
)
Reply: TypeAlias = (
    Rversion
    | Rauth
    | Rattach
    | Rerror
    | Rflush
    | Rwalk
    | Ropen
    | Rcreate
    | Rread
    | Rwrite
    | Rclunk
    | Rremove
    | Rstat
    | Rwstat
)
Message: TypeAlias = Request | Reply
