"""A folder of the host as guests are given it: what can be done to its files, with descriptors for names (`nodes`, `beneath`).

All of it blocks and runs in any thread. Names are of one component and were checked by `beneath.good_name` before. Raises
`OSError`, whose errno goes to the client as it is: Linux's, for this is for Linux.

What is never done: opening a device, a fifo or a socket; making a device; following a symbolic link; acting as another user. With
`read_only` whatever would write says EROFS.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from portfwd.ninep.wire import Qid
from vm.filesystems.ninep import beneath
from vm.filesystems.ninep.beneath import by_fd
from vm.filesystems.ninep.limits import Limits, of_share
from vm.filesystems.ninep.locks import Locks
from vm.filesystems.ninep.messages import AT_REMOVEDIR, QTDIR, QTFILE, QTSYMLINK
from vm.filesystems.ninep.nodes import Node, Nodes
from vm.filesystems.ninep.owners import Asker, Owners, View

O_WRONLY, O_RDWR, O_CREAT, O_EXCL = 0o1, 0o2, 0o100, 0o200
_ACCESS: Final = 0o3
# Flags in messages have the values that most architectures of Linux have; others than these are not passed on.
_FLAGS: Final = (
    (0o1000, os.O_TRUNC),
    (0o2000, os.O_APPEND),
    (0o10000, os.O_DSYNC),
    (0o4000000, os.O_SYNC),
    (0o200000, os.O_DIRECTORY),
)
_TRUNC: Final = 0o1000
_QID_KINDS: Final = {stat.S_IFDIR: QTDIR, stat.S_IFLNK: QTSYMLINK}
_DIRS, _LINKS, _FILES, _UNKNOWN = 4, 10, 8, 0  # DT_ of readdir(3)


def refuse(number: int) -> OSError:
    """To be raised."""
    return OSError(number, os.strerror(number))


def host_flags(flags: int) -> int:
    """Those of a message that are passed on, as this host has them."""
    if flags & _ACCESS == _ACCESS:
        raise refuse(errno.EINVAL)
    return flags & _ACCESS | sum(ours for theirs, ours in _FLAGS if flags & theirs)


def writes(flags: int) -> bool:
    """Whether a file that is opened so may change."""
    return bool(flags & (_ACCESS | _TRUNC))


class Share:
    """`export`, a directory. Raises `ConfigError` where it cannot be served."""

    def __init__(self, export: Path, owners: Owners, *, read_only: bool = False, limits: Limits | None = None) -> None:
        beneath.check_host()
        self.limits = limits or Limits()
        self.descriptors = self.limits.share_of_descriptors()
        self.owners = owners
        self.read_only = read_only
        try:
            root = os.open(export, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"--export: {export}: {error.strerror}; name a directory that you may read") from None
        try:
            owners.check(root)
        except BaseException:
            os.close(root)
            raise
        self.nodes = Nodes(root, max_held=self.descriptors // 2, max_nodes=self.limits.nodes)
        self.opened = of_share(self.descriptors)
        self.locks = Locks()
        self._device = self.nodes.root.key[0]

    def close(self) -> None:
        """Nobody uses it any more."""
        self.nodes.close()

    def writable(self) -> None:
        """Raises EROFS where it is not."""
        if self.read_only:
            raise refuse(errno.EROFS)

    # What files are.

    def _number(self, device: int, inode: int) -> int:
        """For a qid: the inode number, but that of another file system below might be the same."""
        if device == self._device:
            return inode
        return int.from_bytes(blake2b(b"%d %d" % (device, inode), digest_size=8).digest(), "little")

    def _qid(self, state: os.stat_result, mode: int) -> Qid:
        version = (state.st_mtime_ns ^ state.st_size << 8) & 0xFFFFFFFF
        number = self._number(state.st_dev, state.st_ino)
        return Qid(_QID_KINDS.get(stat.S_IFMT(mode), QTFILE), version or 1, number)  # Linux does not cache version 0

    def look(self, node: Node, asker: Asker) -> tuple[Qid, os.stat_result, View]:
        """What `node` is to `asker`."""
        with node.held() as fd:
            state = os.fstat(fd)
            view = (self.owners.view_of_root if node is self.nodes.root else self.owners.view)(fd, state, asker)
        return self._qid(state, view.mode), state, view

    def qid(self, node: Node) -> Qid:
        return self.look(node, Asker(None))[0]

    def find(self, directory: Node, name: bytes) -> Node:
        """To be dropped."""
        if not directory.is_dir:
            raise refuse(errno.ENOTDIR)
        with directory.held() as fd:
            return self.nodes.found(beneath.find(fd, name), directory, name)

    def above(self, node: Node) -> Node:
        """`..`; of the root, the root. To be dropped."""
        return self.nodes.again(node.parent or node)

    # Opening and making.

    def open(self, node: Node, flags: int) -> int:
        """A descriptor."""
        if writes(flags):
            self.writable()
        with node.held() as fd:
            if self.owners.maps_kinds:  # a plain file may be a link of the guest
                kind = stat.S_IFMT(self.owners.view(fd, os.fstat(fd), Asker(None)).mode)
                if kind not in (stat.S_IFREG, stat.S_IFDIR):
                    raise refuse(errno.ELOOP if kind == stat.S_IFLNK else errno.ENXIO)
            return beneath.open_found(fd, host_flags(flags))

    def create(self, directory: Node, name: bytes, flags: int, mode: int, asker: Asker) -> tuple[Node, int]:
        """A plain file, which may be there already unless `flags` have O_EXCL; and a descriptor of it."""
        self.writable()
        mode = stat.S_IFREG | mode & 0o7777
        ours = host_flags(flags) & ~os.O_DIRECTORY
        create = ours | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with directory.held() as parent:
            try:
                fd = os.open(name, create, self.owners.host_mode(mode), dir_fd=parent)
            except FileExistsError:
                if flags & O_EXCL:
                    raise
                node = self.find(directory, name)
                try:
                    return node, self.open(node, flags)
                except BaseException:
                    self.nodes.drop(node)
                    raise
            try:
                with self._undone(os.unlink, name, parent):
                    self.owners.created(fd, mode, asker)
                    return self.nodes.found(beneath.same(fd), directory, name), fd
            except BaseException:
                os.close(fd)
                raise

    @contextlib.contextmanager
    def _undone(self, undo: Callable[..., None], name: bytes, parent: int) -> Iterator[None]:
        """What was just made is taken away again if that fails."""
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):
                undo(name, dir_fd=parent)
            raise

    def _made(self, directory: Node, parent: int, name: bytes, found: int, mode: int, asker: Asker) -> Qid:
        """What was made on the host, and is `found`, gets its owner."""
        undo = os.rmdir if stat.S_ISDIR(mode) else os.unlink
        with self._undone(undo, name, parent):
            node = self.nodes.found(found, directory, name)
        try:
            kind = stat.S_IFREG if self.owners.maps_kinds and not stat.S_ISDIR(mode) else stat.S_IFMT(mode)
            if node.kind != kind:
                raise refuse(errno.ESTALE)  # somebody has put something else there meanwhile, which is none of ours
            with self._undone(undo, name, parent), node.held() as fd:
                self.owners.created(fd, mode, asker)
            return self.qid(node)
        finally:
            self.nodes.drop(node)

    def mkdir(self, directory: Node, name: bytes, mode: int, asker: Asker) -> Qid:
        self.writable()
        mode = stat.S_IFDIR | mode & 0o7777
        with directory.held() as parent:
            os.mkdir(name, self.owners.host_mode(mode), dir_fd=parent)
            return self._made(directory, parent, name, beneath.find(parent, name), mode, asker)

    def _plain(self, parent: int, name: bytes, content: bytes = b"") -> int:
        """Make a file that stands for something else; as `beneath.find` finds it."""
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=parent)
        try:
            os.write(fd, content)
            return beneath.same(fd)
        finally:
            os.close(fd)

    def symlink(self, directory: Node, name: bytes, target: bytes, asker: Asker) -> Qid:
        self.writable()
        if not target or b"\0" in target:
            raise refuse(errno.EINVAL)
        if len(target) > beneath.PATH_MAX:
            raise refuse(errno.ENAMETOOLONG)
        with directory.held() as parent:
            if self.owners.maps_kinds:
                found = self._plain(parent, name, target)
            else:
                os.symlink(target, name, dir_fd=parent)
                found = beneath.find(parent, name)
            return self._made(directory, parent, name, found, stat.S_IFLNK | 0o777, asker)

    def mknod(self, directory: Node, name: bytes, mode: int, asker: Asker) -> Qid:
        """A fifo, a socket, or a plain file; EPERM for a device, which nobody may make here."""
        self.writable()
        kind = stat.S_IFMT(mode) or stat.S_IFREG
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            raise refuse(errno.EPERM)
        if kind not in (stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK):
            raise refuse(errno.EINVAL)
        mode = kind | mode & 0o7777
        with directory.held() as parent:
            if self.owners.maps_kinds or kind == stat.S_IFREG:
                found = self._plain(parent, name)
            else:
                os.mknod(name, kind | self.owners.host_mode(mode), dir_fd=parent)
                found = beneath.find(parent, name)
            return self._made(directory, parent, name, found, mode, asker)

    def link(self, directory: Node, name: bytes, node: Node) -> None:
        self.writable()
        with directory.held() as parent, node.held() as fd:
            os.link(
                by_fd(fd), name, dst_dir_fd=parent, follow_symlinks=True
            )  # leads to the file, be that a link itself

    def read_link(self, node: Node) -> bytes:
        with node.held() as fd:
            if node.kind == stat.S_IFLNK:
                return os.readlink(b"", dir_fd=fd)
            if not stat.S_ISLNK(self.owners.view(fd, os.fstat(fd), Asker(None)).mode):
                raise refuse(errno.EINVAL)
            opened = beneath.open_found(fd, os.O_RDONLY)
            try:
                return os.read(opened, beneath.PATH_MAX)
            finally:
                os.close(opened)

    # Names.

    @contextlib.contextmanager
    def _loses_name(self, state: os.stat_result | None, directory: Node, name: bytes) -> Iterator[None]:
        """What fids stand for lives on without its name."""
        node = None if state is None else self.nodes.keep((state.st_dev, state.st_ino), directory, name)
        if node is None:
            yield
            return
        try:
            with contextlib.ExitStack() as stack:
                with contextlib.suppress(OSError):
                    stack.enter_context(node.held())
                yield
                self.nodes.lost(node)
        finally:
            self.nodes.drop(node)

    def unlink(self, directory: Node, name: bytes, flags: int) -> None:
        self.writable()
        if flags & ~AT_REMOVEDIR:
            raise refuse(errno.EINVAL)
        with directory.held() as parent:
            state = os.stat(name, dir_fd=parent, follow_symlinks=False)
            with self._loses_name(state, directory, name):
                (os.rmdir if flags else os.unlink)(name, dir_fd=parent)

    def rename(self, directory: Node, name: bytes, to: Node, new_name: bytes) -> None:
        self.writable()
        with directory.held() as parent, to.held() as new_parent:
            state = os.stat(name, dir_fd=parent, follow_symlinks=False)
            victim: os.stat_result | None = None
            with contextlib.suppress(FileNotFoundError):
                victim = os.stat(new_name, dir_fd=new_parent, follow_symlinks=False)
            if victim is not None and os.path.samestat(victim, state):
                victim = None
            with self._loses_name(victim, to, new_name):
                os.rename(name, new_name, src_dir_fd=parent, dst_dir_fd=new_parent)
            self.nodes.moved((state.st_dev, state.st_ino), to, new_name)

    def place_of(self, node: Node) -> tuple[Node, bytes]:
        """Where `node` is, for messages that have no name for it. Raises ESTALE when something else is there by now."""
        parent, name = node.parent, node.name
        if parent is None:
            raise refuse(errno.EBUSY)
        with parent.held() as fd:
            state = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if (state.st_dev, state.st_ino) != node.key:
            raise refuse(errno.ESTALE)
        return parent, name

    def entries(self, node: Node, opened: int) -> Iterator[tuple[Qid, int, bytes]]:
        """Of a directory: qid (its version is 1), DT_, name. `.` and `..` come first."""
        device = node.key[0]
        yield Qid(QTDIR, 1, self._number(*node.key)), _DIRS, b"."
        yield Qid(QTDIR, 1, self._number(*(node.parent or node).key)), _DIRS, b".."
        with os.scandir(opened) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    kind = _DIRS
                elif entry.is_symlink():
                    kind = _LINKS
                else:  # a mapped one may be anything
                    kind = _UNKNOWN if self.owners.maps_kinds or not entry.is_file(follow_symlinks=False) else _FILES
                qid_kind = {_DIRS: QTDIR, _LINKS: QTSYMLINK}.get(kind, QTFILE)
                yield Qid(qid_kind, 1, self._number(device, entry.inode())), kind, os.fsencode(entry.name)
