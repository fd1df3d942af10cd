"""One connection of 9P2000.L, without its socket: a request's octets in, its answer's octets out (`messages`, `wire`).

    `answer(message)`    in any thread, several at a time; it may block as long as the host's file system does

What a client must not do, it must not do: requests that depend on each other are sent one after the other's answer, as Linux does.
Still nothing it sends can do more than make its own requests fail: whatever the octets are, the answer is a message.

Tversion and Tflush are the caller's to put in order (`listen`): before `answer` is given a Tversion, all requests must have been
answered, and Tflush is not answered here.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

from netstack.errors import Malformed
from portfwd.ninep.wire import Octets, tag_of
from vm.filesystems.ninep import attributes, wire
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep.beneath import NAME_MAX, good_name
from vm.filesystems.ninep.fids import Attribute, Fid, Fids
from vm.filesystems.ninep.limits import MIN_MSIZE, SessionAllowances
from vm.filesystems.ninep.locks import END, Lock, Owner
from vm.filesystems.ninep.owners import Asker
from vm.filesystems.ninep.share import Share, refuse, writes

VERSION: Final = b"9P2000.L"
MAGIC: Final = 0x01021997
"""Of a 9P file system in statfs(2)."""


class Session:
    """With the fids of one client of `share`."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self.allowances = SessionAllowances(share.limits, share.descriptors)
        self._fids = Fids(share, self.allowances)
        self.msize = 0
        """What was agreed on; 0 before the first Tversion, and after one that asked for a version unknown here."""
        self.requests = 0
        self.errors = 0
        """Requests that were answered Rlerror."""

    @property
    def fids(self) -> int:
        return len(self._fids)

    def close(self) -> None:
        """Nothing runs any more: every fid ends. May block."""
        self._fids.end_all()

    def answer(self, message: Octets) -> Octets:
        """Of a whole message, at least a header long; data in it are used until this returns."""
        tag = tag_of(message)
        self.requests += 1
        try:
            request = wire.parse(message)
            handle = _HANDLERS.get(type(request))
            if handle is None:
                raise refuse(errno.EOPNOTSUPP)
            if not self.msize and not isinstance(request, m.Tversion):
                raise refuse(errno.EPROTO)
            made = handle(self, request)
            octets = made if isinstance(made, memoryview) else wire.emit(made)
            if self.msize and len(octets) > self.msize:
                raise refuse(errno.EMSGSIZE)
            return octets
        except OSError as error:
            number = error.errno or errno.EIO
        except Malformed:
            number = errno.EINVAL
        except (ValueError, OverflowError):  # a number that the host's calls do not take
            number = errno.EINVAL
        self.errors += 1
        return wire.emit(m.Rlerror(tag, number))

    # The connection.

    def version(self, r: m.Tversion) -> m.Rversion:
        self._fids.end_all()
        self.msize = 0
        if r.msize < MIN_MSIZE:
            raise refuse(errno.EINVAL)
        msize = min(r.msize, self._share.limits.msize)
        if r.version != VERSION:
            return m.Rversion(r.tag, msize, b"unknown")
        self.msize = msize
        return m.Rversion(r.tag, msize, VERSION)

    def auth(self, r: m.Tauth) -> m.Message:
        raise refuse(errno.EOPNOTSUPP)  # who may connect may attach

    def attach(self, r: m.Tattach) -> m.Rattach:
        if r.afid != m.NOFID:
            raise refuse(errno.EOPNOTSUPP)
        nodes = self._share.nodes
        asker = Asker(None if r.n_uname == m.NONUNAME else r.n_uname)
        self._fids.add(r.fid, Fid(nodes.again(nodes.root), asker))
        return m.Rattach(r.tag, self._share.qid(nodes.root))

    def walk(self, r: m.Twalk) -> m.Rwalk:
        nodes = self._share.nodes
        with self._fids.use(r.fid) as begin:
            if r.newfid == r.fid and not begin.plain:
                raise refuse(errno.EBUSY)
            node = nodes.again(begin.node)
            try:
                qids = []
                for name in r.names:
                    try:
                        found = self._step(node, name)
                        nodes.drop(node)
                        node = found
                        qids.append(self._share.qid(node))
                    except OSError:
                        if not qids:
                            raise
                        nodes.drop(node)
                        return m.Rwalk(r.tag, tuple(qids))
            except BaseException:
                nodes.drop(node)
                raise
            if r.newfid == r.fid:
                with begin.lock:
                    if not begin.plain:  # it was opened while we walked
                        nodes.drop(node)
                        raise refuse(errno.EBUSY)
                    self._fids.replace_node(begin, node)
            else:
                self._fids.add(r.newfid, Fid(node, begin.asker))
            return m.Rwalk(r.tag, tuple(qids))

    def _step(self, node: Any, name: bytes) -> Any:
        if name == b"..":
            return self._share.above(node)
        if name == b".":
            return self._share.nodes.again(node)
        if not good_name(name):
            raise refuse(errno.ENAMETOOLONG if len(name) > 255 else errno.ENOENT)
        return self._share.find(node, name)

    def clunk(self, r: m.Tclunk) -> m.Rclunk:
        with self._fids.use(r.fid) as fid:
            self._fids.end(r.fid)
            written = fid.attribute
            if written is not None and written.written >= 0:
                if written.written != len(written.octets):
                    raise refuse(errno.EINVAL)
                attributes.set_extended(fid.node, written.name, bytes(written.octets), written.flags)
        return m.Rclunk(r.tag)

    # Files.

    def getattr(self, r: m.Tgetattr) -> m.Rgetattr:
        with self._fids.use(r.fid) as fid:
            qid, state, view = self._share.look(fid.node, fid.asker)
        times = [part for ns in (state.st_atime_ns, state.st_mtime_ns, state.st_ctime_ns) for part in _split(ns)]
        mode, uid, gid, rdev = view
        sizes = (state.st_size, state.st_blksize, state.st_blocks)
        return m.Rgetattr(r.tag, m.GETATTR_BASIC, qid, mode, uid, gid, state.st_nlink, rdev, *sizes, *times)

    def setattr(self, r: m.Tsetattr) -> m.Rsetattr:
        with self._fids.use(r.fid) as fid:
            attributes.set_attributes(self._share, fid.node, fid.fd if fid.writable else None, r)
        return m.Rsetattr(r.tag)

    def statfs(self, r: m.Tstatfs) -> m.Rstatfs:
        with self._fids.use(r.fid) as fid, fid.node.held() as fd:
            found = os.fstatvfs(fd)
        blocks = (found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree)
        # Linux reckons in bsize; the host counts in frsize.
        return m.Rstatfs(r.tag, MAGIC, found.f_frsize, *blocks, found.f_fsid & (1 << 64) - 1, found.f_namemax)

    def lopen(self, r: m.Tlopen) -> m.Rlopen:
        with self._fids.use(r.fid) as fid, fid.lock:
            if not fid.plain:
                raise refuse(errno.EBUSY)
            with self._fids.may_open():
                fd = self._share.open(fid.node, r.flags)
            self._fids.opened(fid, fd, writes(r.flags))
            return m.Rlopen(r.tag, self._share.qid(fid.node), 0)

    def lcreate(self, r: m.Tlcreate) -> m.Rlcreate:
        with self._fids.use(r.fid) as fid, fid.lock:
            if not fid.plain:
                raise refuse(errno.EBUSY)
            directory = self._directory(fid, r.name)
            asker = Asker(fid.asker.uid, r.gid)
            with self._fids.may_open():
                node, fd = self._share.create(directory, r.name, r.flags, r.mode, asker)
            self._fids.replace_node(fid, node)
            self._fids.opened(fid, fd, writes(r.flags))
            return m.Rlcreate(r.tag, self._share.qid(node), 0)

    def _directory(self, fid: Fid, name: bytes) -> Any:
        """The node, in which `name` can be the name of something."""
        if not fid.node.is_dir:
            raise refuse(errno.ENOTDIR)
        if name in (b".", b".."):
            raise refuse(errno.EEXIST)
        if not good_name(name):
            raise refuse(errno.ENAMETOOLONG if len(name) > 255 else errno.EINVAL)
        return fid.node

    def read(self, r: m.Tread) -> m.Message | memoryview:
        count = min(r.count, self.msize - wire.READ_OVERHEAD)
        with self._fids.use(r.fid) as fid:
            if fid.attribute is not None:
                if fid.attribute.written >= 0:
                    raise refuse(errno.EBADF)
                return m.Rread(r.tag, bytes(fid.attribute.octets[r.offset : r.offset + count]))
            fd = self._opened(fid)
            message = bytearray(wire.READ_OVERHEAD + count)  # the file's octets go where they are sent from
            view = memoryview(message)
            got = os.preadv(fd, [view[wire.READ_OVERHEAD :]], r.offset)
        wire.put_read_header(message, r.tag, got)
        return view[: wire.READ_OVERHEAD + got]

    def _opened(self, fid: Fid) -> int:
        if fid.fd < 0:
            raise refuse(errno.EBADF)
        if fid.listing is not None:
            raise refuse(errno.EISDIR)
        return fid.fd

    def write(self, r: m.Twrite) -> m.Rwrite:
        with self._fids.use(r.fid) as fid:
            if fid.attribute is not None:
                return m.Rwrite(r.tag, self._write_attribute(fid, fid.attribute, r))
            return m.Rwrite(r.tag, os.pwrite(self._opened(fid), r.data, r.offset))

    def _write_attribute(self, fid: Fid, attribute: Attribute, r: m.Twrite) -> int:
        with fid.lock:
            if attribute.written < 0 or r.offset != attribute.written:
                raise refuse(errno.EBADF if attribute.written < 0 else errno.EINVAL)
            end = r.offset + len(r.data)
            if end > len(attribute.octets):
                raise refuse(errno.ENOSPC)
            attribute.octets[r.offset : end] = r.data
            attribute.written = end
            return len(r.data)

    def readdir(self, r: m.Treaddir) -> m.Rreaddir:
        count = min(r.count, self.msize - wire.READ_OVERHEAD)
        with self._fids.use(r.fid) as fid, fid.lock:
            if fid.listing is None:
                raise refuse(errno.EBADF if fid.fd < 0 else errno.ENOTDIR)
            if r.offset == 0:
                self._fids.list(fid, fid.listing)
            return m.Rreaddir(r.tag, fid.listing.read(r.offset, count))

    def fsync(self, r: m.Tfsync) -> m.Rfsync:
        with self._fids.use(r.fid) as fid:
            if fid.fd < 0:
                raise refuse(errno.EBADF)
            (os.fdatasync if r.datasync else os.fsync)(fid.fd)
        return m.Rfsync(r.tag)

    # Names.

    def symlink(self, r: m.Tsymlink) -> m.Rsymlink:
        with self._fids.use(r.fid) as fid:
            directory, asker = self._directory(fid, r.name), Asker(fid.asker.uid, r.gid)
            return m.Rsymlink(r.tag, self._share.symlink(directory, r.name, r.target, asker))

    def mknod(self, r: m.Tmknod) -> m.Rmknod:
        with self._fids.use(r.fid) as fid:
            directory, asker = self._directory(fid, r.name), Asker(fid.asker.uid, r.gid)
            return m.Rmknod(r.tag, self._share.mknod(directory, r.name, r.mode, asker))

    def mkdir(self, r: m.Tmkdir) -> m.Rmkdir:
        with self._fids.use(r.fid) as fid:
            directory, asker = self._directory(fid, r.name), Asker(fid.asker.uid, r.gid)
            return m.Rmkdir(r.tag, self._share.mkdir(directory, r.name, r.mode, asker))

    def link(self, r: m.Tlink) -> m.Rlink:
        with self._fids.use(r.dfid) as directory, self._fids.use(r.fid) as fid:
            self._share.link(self._directory(directory, r.name), r.name, fid.node)
        return m.Rlink(r.tag)

    def readlink(self, r: m.Treadlink) -> m.Rreadlink:
        with self._fids.use(r.fid) as fid:
            return m.Rreadlink(r.tag, self._share.read_link(fid.node))

    def rename(self, r: m.Trename) -> m.Rrename:
        with self._fids.use(r.fid) as fid, self._fids.use(r.dfid) as to:
            parent, name = self._share.place_of(fid.node)
            self._share.rename(parent, name, self._directory(to, r.name), r.name)
        return m.Rrename(r.tag)

    def renameat(self, r: m.Trenameat) -> m.Rrenameat:
        with self._fids.use(r.olddirfid) as old, self._fids.use(r.newdirfid) as new:
            directory, to = self._directory(old, r.oldname), self._directory(new, r.newname)
            self._share.rename(directory, r.oldname, to, r.newname)
        return m.Rrenameat(r.tag)

    def unlinkat(self, r: m.Tunlinkat) -> m.Runlinkat:
        with self._fids.use(r.fid) as fid:
            self._share.unlink(self._directory(fid, r.name), r.name, r.flags)
        return m.Runlinkat(r.tag)

    def remove(self, r: m.Tremove) -> m.Rremove:
        with self._fids.use(r.fid) as fid:
            self._fids.end(r.fid)  # remove(5): clunked whether or not the file is removed
            self._share.writable()
            parent, name = self._share.place_of(fid.node)
            self._share.unlink(parent, name, m.AT_REMOVEDIR if fid.node.is_dir else 0)
        return m.Rremove(r.tag)

    # Extended attributes and locks.

    def xattrwalk(self, r: m.Txattrwalk) -> m.Rxattrwalk:
        nodes = self._share.nodes
        with self._fids.use(r.fid) as fid:
            value = attributes.extended(fid.node, r.name)
            new = Fid(nodes.again(fid.node), fid.asker)
            new.attribute = Attribute(bytearray(value), r.name)
            try:
                self._fids.hold(new, len(value))
            except OSError:
                nodes.drop(new.node)
                raise
            try:
                self._fids.add(r.newfid, new)
            except OSError:
                self._fids.hold(new, 0)
                raise
        return m.Rxattrwalk(r.tag, len(value))

    def xattrcreate(self, r: m.Txattrcreate) -> m.Rxattrcreate:
        with self._fids.use(r.fid) as fid, fid.lock:
            if not fid.plain:
                raise refuse(errno.EBUSY)
            attributes.may_set(self._share, r.name, r.size)
            self._fids.hold(fid, r.size)
            fid.attribute = Attribute(bytearray(r.size), r.name, r.flags, 0)
        return m.Rxattrcreate(r.tag)

    def lock(self, r: m.Tlock) -> m.Rlock:
        with self._fids.use(r.fid) as fid:
            if fid.fd < 0:
                raise refuse(errno.EBADF)
            wanted = self._range(fid, r)
            done = self._share.locks.set(fid.node.key, wanted, self.allowances.locks)
        return m.Rlock(r.tag, m.LOCK_SUCCESS if done else m.LOCK_BLOCKED)

    def getlock(self, r: m.Tgetlock) -> m.Rgetlock:
        with self._fids.use(r.fid) as fid:
            found = self._share.locks.conflict(fid.node.key, self._range(fid, r))
        if found is None:
            return m.Rgetlock(r.tag, m.UNLCK, r.start, r.length, r.proc_id, r.client_id)
        return m.Rgetlock(r.tag, found.type, found.start, found.length, found.owner.proc_id, found.owner.client_id)

    def _range(self, fid: Fid, r: m.Tlock | m.Tgetlock) -> Lock:
        if r.type not in (m.RDLCK, m.WRLCK, m.UNLCK) or len(r.client_id) > NAME_MAX:
            raise refuse(errno.EINVAL)
        end = END if not r.length else min(r.start + r.length, END)
        return Lock(Owner(self, r.client_id, r.proc_id), fid, r.type, r.start, end)


def _split(ns: int) -> tuple[int, int]:
    """Seconds, before 1970 as 64 bits have them, and the rest."""
    seconds, rest = divmod(ns, 1_000_000_000)
    return seconds & (1 << 64) - 1, rest


_HANDLERS: Final[dict[type[m.Message], Callable[[Session, Any], m.Message | memoryview]]] = {
    m.Tversion: Session.version,
    m.Tauth: Session.auth,
    m.Tattach: Session.attach,
    m.Twalk: Session.walk,
    m.Tclunk: Session.clunk,
    m.Tgetattr: Session.getattr,
    m.Tsetattr: Session.setattr,
    m.Tstatfs: Session.statfs,
    m.Tlopen: Session.lopen,
    m.Tlcreate: Session.lcreate,
    m.Tread: Session.read,
    m.Twrite: Session.write,
    m.Treaddir: Session.readdir,
    m.Tfsync: Session.fsync,
    m.Tsymlink: Session.symlink,
    m.Tmknod: Session.mknod,
    m.Tmkdir: Session.mkdir,
    m.Tlink: Session.link,
    m.Treadlink: Session.readlink,
    m.Trename: Session.rename,
    m.Trenameat: Session.renameat,
    m.Tunlinkat: Session.unlinkat,
    m.Tremove: Session.remove,
    m.Txattrwalk: Session.xattrwalk,
    m.Txattrcreate: Session.xattrcreate,
    m.Tlock: Session.lock,
    m.Tgetlock: Session.getlock,
}
