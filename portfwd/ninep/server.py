"""One connection of a 9P2000 server, without I/O (spec vpnkit, appendix D; section 5 of Plan 9's manual).

    octets -> `feed`     `next` -> one answer, until there is none    `close` when the connection is gone

A request is answered before the next one is looked at, so none is ever outstanding: a Tflush finds nothing to flush, and a tag
may be used again at once. The caller takes answers one by one and writes them before it asks for more; that bounds what waits to
`feed`'s octets and one answer. What opened files keep for a connection is bounded by `MAX_HELD`.

A fid is made by attach, walk or create, and ends with clunk, remove (also one that fails), a Tversion, or the connection. There
are at most `max_fids`. An error never ends a connection, but for a size that cannot be believed (`Malformed` from `next`):
nothing behind it can be found.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final, assert_never

from netstack.errors import Malformed
from portfwd.ninep.files import Filesystem, Node, Opened, Refused
from portfwd.ninep.messages import (
    NOFID,
    ORCLOSE,
    QTDIR,
    Message,
    Qid,
    Rattach,
    Rclunk,
    Rcreate,
    Reply,
    Request,
    Rerror,
    Rflush,
    Ropen,
    Rread,
    Rremove,
    Rstat,
    Rversion,
    Rwalk,
    Rwrite,
    Rwstat,
    Stat,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
)
from portfwd.ninep.wire import Decoder, emit, emit_stat, names_fit, parse, tag_of

MAX_MSIZE: Final = 16384
"""Octets of the longest message either way, as in VPNKit's library."""
MIN_MSIZE: Final = 512
"""Enough for every answer but one about a long name. Linux asks for 4096 at least."""
MAX_FIDS: Final = 1024
MAX_HELD: Final = 4 << 20
"""Octets that the opened files and directories of one connection may keep for it, such as captures."""
MAX_NAME: Final = 1024
"""Octets of a name; Linux has none above 255, but two socket paths in base64 are longer."""
OPEN_IOUNIT: Final = 32768  # spec vpnkit 7.1; above any msize of ours, so a client goes by msize
CREATE_IOUNIT: Final = 512  # spec vpnkit 7.1
PLAIN, UNIX = "9P2000", "9P2000.u"

_READ_OVERHEAD: Final = 11  # size, type, tag, count of an Rread
_FAMILY: Final = (
    Tversion | Tauth | Tattach | Tflush | Twalk | Topen | Tcreate | Tread | Twrite | Tclunk | Tremove | Tstat | Twstat
)


class _Fid:
    """Where a fid stands, and what it has opened."""

    __slots__ = ("end", "held", "listing", "node", "opened")

    def __init__(self, node: Node) -> None:
        self.node = node
        self.opened: Opened | None = None
        self.listing: list[bytes] = []
        """Entries of an opened directory that were not read yet ..."""
        self.end = 0
        """... and the offset at which they are to be read."""
        self.held = 0
        """Octets that are kept for it."""


class Session:
    """The server's end of one connection."""

    def __init__(self, files: Filesystem, *, max_msize: int = MAX_MSIZE, max_fids: int = MAX_FIDS) -> None:
        self._files = files
        self._words = files.words
        self._max_msize = max_msize
        self._max_fids = max_fids
        self._decoder = Decoder(max_msize)
        self._fids: dict[int, _Fid] = {}
        self._held = 0
        self._unix = False
        self._closed = False
        self.msize = 0
        """What was agreed on; 0 before the first Tversion, and after one that asked for a version unknown here."""
        self.requests = 0
        self.errors = 0
        """Requests that were answered Rerror."""

    @property
    def fids(self) -> int:
        """How many are held."""
        return len(self._fids)

    def feed(self, octets: bytes | bytearray | memoryview) -> None:
        """What arrived."""
        self._decoder.feed(octets)

    def next(self) -> bytes | None:
        """The answer to the next whole request; `None` when there is none. Raises `Malformed`: close the connection."""
        message = self._decoder.next()
        if message is None:
            return None
        self.requests += 1
        tag = tag_of(message)
        unix = self._unix
        answer: Message
        try:
            request = parse(message, unix=unix)
            if not isinstance(request, _FAMILY):
                raise Refused("only a server sends that message", errno.EINVAL)
            answer = self._answer(request)
            octets = emit(answer, unix=unix)
            if len(octets) > (self.msize or self._max_msize):
                raise Refused("the answer is longer than msize", errno.EMSGSIZE)
            return octets
        except Refused as refused:
            answer = Rerror(tag, refused.text, refused.number)
        except Malformed as malformed:
            answer = Rerror(tag, str(malformed), errno.EINVAL)
        self.errors += 1
        return emit(answer, unix=unix)

    def close(self) -> None:
        """The connection is gone: every fid is clunked. Harmless when repeated."""
        if self._closed:
            return
        self._closed = True
        self._clunk_all()
        self._files.gone()

    def _clunk_all(self) -> None:
        while self._fids:
            self._end(self._fids.popitem()[1])

    def _end(self, fid: _Fid) -> None:
        self._held -= fid.held
        if fid.opened is not None:
            fid.opened.close()

    def _hold(self, fid: _Fid, octets: int) -> None:
        """From now on `octets` are kept for `fid`."""
        if self._held - fid.held + octets > MAX_HELD:
            raise Refused.errno(errno.ENOMEM)
        self._held += octets - fid.held
        fid.held = octets

    def _answer(self, request: Request) -> Reply:
        tag = request.tag
        if isinstance(request, Tversion):
            return self._version(request)
        if not self.msize:
            raise Refused("no version was agreed on; Tversion comes first", errno.EPROTO)
        match request:
            case Tauth():
                raise Refused("authentication not required", errno.EINVAL)
            case Tflush():
                return Rflush(tag)
            case Tattach():
                if request.afid != NOFID:
                    raise Refused("authentication not required", errno.EINVAL)
                self._free(request.fid)
                root = self._files.root()
                self._fids[request.fid] = _Fid(root)
                return Rattach(tag, root.qid)
            case Twalk():
                return self._walk(request)
            case Topen():
                fid = self._closed_fid(request.fid)
                self._open(fid, fid.node, request.mode)
                return Ropen(tag, fid.node.qid, OPEN_IOUNIT)
            case Tcreate():
                fid = self._closed_fid(request.fid)
                if request.name in (".", "..") or not names_fit([request.name], MAX_NAME):
                    raise Refused.errno(errno.EINVAL)
                made = fid.node.create(request.name, request.perm, request.mode)
                self._open(fid, made, request.mode)
                fid.node = made
                return Rcreate(tag, made.qid, CREATE_IOUNIT)
            case Tread():
                return Rread(tag, self._read(request))
            case Twrite():
                return Rwrite(tag, self._opened(request.fid).write(request.offset, request.data))
            case Tclunk():
                if request.fid in self._fids:  # spec vpnkit 7.1: "Clunk of an unknown fid succeeds"
                    self._end(self._fids.pop(request.fid))
                return Rclunk(tag)
            case Tremove():
                ended = self._fid(request.fid)
                del self._fids[request.fid]
                try:
                    ended.node.remove()
                finally:  # remove(5): the fid is clunked whether or not the file is removed
                    self._end(ended)
                return Rremove(tag)
            case Tstat():
                return Rstat(tag, self._fid(request.fid).node.stat())
            case Twstat():
                self._fid(request.fid).node.wstat(request.stat)
                return Rwstat(tag)
            case _:
                assert_never(request)

    def _version(self, request: Tversion) -> Reply:
        self._clunk_all()  # version(5): "a successful reply initializes the connection: all outstanding fids are clunked"
        self.msize, self._unix = 0, False
        msize = min(request.msize, self._max_msize)
        if msize < MIN_MSIZE:
            raise Refused(f"msize of {request.msize} is too small; at least {MIN_MSIZE}", errno.EINVAL)
        if request.version not in (PLAIN, UNIX):
            return Rversion(request.tag, msize, "unknown")
        self.msize = self._decoder.limit = msize
        self._unix = request.version == UNIX
        return Rversion(request.tag, msize, request.version)

    def _fid(self, number: int) -> _Fid:
        fid = self._fids.get(number)
        if fid is None:
            raise Refused(self._words.unknown.format(fid=number), errno.EBADF)
        return fid

    def _free(self, number: int) -> None:
        """`number` may be given to a new fid."""
        if number in self._fids or number == NOFID:
            raise Refused(self._words.in_use.format(fid=number), errno.EBADF)
        if len(self._fids) >= self._max_fids:
            raise Refused.errno(errno.EMFILE)

    def _closed_fid(self, number: int) -> _Fid:
        fid = self._fid(number)
        if fid.opened is not None:
            raise Refused(self._words.already_open.format(fid=number), errno.EBADF)
        return fid

    def _opened(self, number: int) -> Opened:
        opened = self._fid(number).opened
        if opened is None:
            raise Refused(self._words.not_open.format(fid=number), errno.EBADF)
        return opened

    def _open(self, fid: _Fid, node: Node, mode: int) -> None:
        if mode & ORCLOSE:
            raise Refused.errno(errno.EOPNOTSUPP)
        opened = node.open(mode)
        try:
            self._hold(fid, opened.held)
        except Refused:
            opened.close()
            raise
        fid.opened = opened

    def _walk(self, request: Twalk) -> Reply:
        # walk(5) forbids to walk from an open fid; Linux clones such fids, and nothing is the worse for it.
        begin = self._fid(request.fid)
        if request.newfid != request.fid:
            self._free(request.newfid)
        elif begin.opened is not None:
            raise Refused(self._words.already_open.format(fid=request.fid), errno.EBADF)
        node = begin.node
        qids: list[Qid] = []
        for name in request.names:
            try:
                node = node.walk(name)
            except Refused:
                if not qids:
                    raise
                return Rwalk(request.tag, tuple(qids))
            qids.append(node.qid)
        self._fids[request.newfid] = _Fid(node)
        return Rwalk(request.tag, tuple(qids))

    def _read(self, request: Tread) -> bytes:
        opened = self._opened(request.fid)
        count = min(request.count, self.msize - _READ_OVERHEAD)
        fid = self._fids[request.fid]
        if not fid.node.qid.kind & QTDIR:
            return opened.read(request.offset, count)
        if request.offset == 0:
            listing = self._listing(fid.node.entries())
            self._hold(fid, sum(map(len, listing)))
            fid.listing, fid.end = listing, 0
        elif request.offset != fid.end:
            raise Refused.errno(errno.ESPIPE)
        whole = 0
        taken = 0
        while taken < len(fid.listing) and whole + len(fid.listing[taken]) <= count:
            whole += len(fid.listing[taken])
            taken += 1
        if not taken and fid.listing:
            raise Refused("the next directory entry is longer than count", errno.EINVAL)
        entries, fid.listing = b"".join(fid.listing[:taken]), fid.listing[taken:]
        fid.end += whole
        return entries

    def _listing(self, entries: Sequence[Stat]) -> list[bytes]:
        """As octets; without those that fit no answer."""
        longest = self.msize - _READ_OVERHEAD
        made = (emit_stat(entry, unix=self._unix) for entry in entries)
        return [octets for octets in made if len(octets) <= longest]
