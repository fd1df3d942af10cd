"""The files of a share that clients know of, each once however many fids stand for it.

A `Node` is an inode: a descriptor (O_PATH, see `beneath`), and the name under which it was last found. While the descriptor is
there, names do not matter: what was renamed or removed, on the host too, stays what it was. At most `max_held` descriptors are
kept; the one that was not used for longest goes first, and is found again by its names when it is wanted. If something else has
its name by then the answer is ESTALE, after which Linux looks the path up anew. Our own renames are followed, and what a client
removes while fids stand for it keeps its descriptor, as open files do on Linux.

`with node.held() as fd:` gives the descriptor, which is not taken away meanwhile. Nodes are counted: who got one from `root` or
`found` ends it with `drop`. Any thread may call anything here; the lock is not held over a call that may block, but for closing,
which with O_PATH does not.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final

from vm.filesystems.ninep import beneath

DEPTH: Final = 1024
"""Directories within each other through which a node is found again; more have no path that is short enough (PATH_MAX)."""


class Node:
    """A file, directory or whatever there is; made by `Nodes` alone."""

    __slots__ = ("_fd", "_nodes", "_users", "key", "kind", "name", "parent", "refs", "removed")

    def __init__(self, nodes: Nodes, fd: int, found: os.stat_result, parent: Node | None, name: bytes) -> None:
        self._nodes = nodes
        self._fd = fd
        self._users = 0
        self.key = (found.st_dev, found.st_ino)
        self.kind = stat.S_IFMT(found.st_mode)
        self.parent = parent
        """None for the root."""
        self.name = name
        self.refs = 1
        self.removed = False
        """By one of our clients: its descriptor is all there is of it."""

    @property
    def is_dir(self) -> bool:
        return self.kind == stat.S_IFDIR

    @contextlib.contextmanager
    def held(self) -> Iterator[int]:
        """Its descriptor, until the end of the block. Raises `OSError`, ESTALE when it cannot be found again."""
        fd = self._nodes.hold(self)
        try:
            yield fd
        finally:
            self._nodes.let_go(self)


class Nodes:
    """Those below the directory `root`, an O_PATH descriptor, which is owned from now on."""

    def __init__(self, root: int, *, max_held: int, max_nodes: int) -> None:
        self._lock = threading.Lock()
        self._max_held = max_held
        self._max_nodes = max_nodes
        self._root_fd = root
        self.root = Node(self, root, os.fstat(root), None, b"")
        self._by_key = {self.root.key: self.root}
        self._idle: OrderedDict[Node, None] = OrderedDict()
        """With a descriptor that nobody uses; least recently used first."""
        self._removed = 0
        self._held = 1
        self.evicted = 0
        """Descriptors that were given back, for there were too many."""
        self.stale = 0
        """Nodes that were not found again."""
        self.refused = 0
        """Nodes that would have been too many; ENFILE was answered."""

    def __len__(self) -> int:
        return len(self._by_key)

    @property
    def descriptors(self) -> int:
        """Held now."""
        return self._held

    def close(self) -> None:
        """Nobody uses any node any more."""
        with self._lock:
            for node in self._by_key.values():
                if node._fd >= 0:
                    os.close(node._fd)
                    node._fd = -1
            self._by_key.clear()
            self._idle.clear()
            self._held = 0

    # Descriptors.

    def hold(self, node: Node) -> int:
        """For `Node.held`."""
        with self._lock:
            node._users += 1
            self._idle.pop(node, None)
            if node._fd >= 0:
                return node._fd
            path = self._path(node)
        try:
            fd = self._find_again(node, path)
        except OSError:
            self.let_go(node)
            raise
        with self._lock:
            if node._fd < 0:
                node._fd = fd
                self._held += 1
            else:  # another thread was faster
                os.close(fd)
            self._evict()
            return node._fd

    def let_go(self, node: Node) -> None:
        with self._lock:
            node._users -= 1
            self._rest(node)
            self._evict()

    def _rest(self, node: Node) -> None:
        """The node is not in use: close it, if nobody knows it any more, or keep it for a while."""
        if node._users or node._fd < 0 or node is self.root:
            return
        if not node.refs:
            self._close(node)
        elif not node.removed:
            self._idle[node] = None

    def _close(self, node: Node) -> None:
        os.close(node._fd)
        node._fd = -1
        self._held -= 1

    def _evict(self) -> None:
        while self._held > self._max_held and self._idle:
            node, _ = self._idle.popitem(last=False)
            self._close(node)
            self.evicted += 1

    def _path(self, node: Node) -> bytes:
        names = []
        at: Node = node
        while at.parent is not None:
            names.append(at.name)
            at = at.parent
            if len(names) > DEPTH:
                self._stale()
        return b"/".join(reversed(names))

    def _stale(self) -> None:
        self.stale += 1
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _find_again(self, node: Node, path: bytes) -> int:
        try:
            fd = beneath.find(self._root_fd, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
                self._stale()
            raise
        found = os.fstat(fd)
        if (found.st_dev, found.st_ino) != node.key:
            os.close(fd)
            self._stale()
        return fd

    # Nodes.

    def found(self, fd: int, parent: Node, name: bytes) -> Node:
        """The node of what was found as `name` in `parent`; owns `fd`, and is to be dropped."""
        try:
            state = os.fstat(fd)
        except OSError:
            os.close(fd)
            raise
        with self._lock:
            if not parent.refs:  # as in `again`
                os.close(fd)
                self._stale()
            node = self._by_key.get((state.st_dev, state.st_ino))
            if node is None or node.kind != stat.S_IFMT(state.st_mode):  # an inode may be used for something new
                if len(self._by_key) >= self._max_nodes:
                    self.refused += 1
                    os.close(fd)
                    raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
                node = Node(self, fd, state, parent, name)
                parent.refs += 1
                self._by_key[node.key] = node
                self._held += 1
                self._idle[node] = None
                self._evict()
                return node
            node.refs += 1
            if node._fd >= 0:
                os.close(fd)
            else:
                node._fd = fd
                self._held += 1
                if not node._users:
                    self._idle[node] = None
            self._has_name(node)
            self._place(node, parent, name)
            self._evict()
            return node

    def again(self, node: Node) -> Node:
        """One more that is to be dropped. Raises ESTALE where it was dropped for good meanwhile."""
        with self._lock:
            if not node.refs:  # its last fid went on to another file just now
                self._stale()
            node.refs += 1
            return node

    def drop(self, node: Node) -> None:
        with self._lock:
            self._drop(node)

    def _drop(self, node: Node | None) -> None:
        while node is not None:
            node.refs -= 1
            if node.refs or node.parent is None:
                return
            if self._by_key.get(node.key) is node:
                del self._by_key[node.key]
            self._idle.pop(node, None)
            self._has_name(node)
            self._rest(node)
            node = node.parent

    def _has_name(self, node: Node) -> None:
        """Its descriptor need not be kept."""
        if node.removed:
            node.removed = False
            self._removed -= 1

    def _place(self, node: Node, parent: Node, name: bytes) -> None:
        """It is called `name` in `parent` now."""
        if node.parent is None or (node.parent is parent and node.name == name):
            return
        above: Node | None = parent
        for _ in range(DEPTH):
            if above is node:  # somebody moves directories while we look: no ring may come of that
                return
            if above is None:
                break
            above = above.parent
        parent.refs += 1
        former, node.parent, node.name = node.parent, parent, name
        self._drop(former)

    def moved(self, key: tuple[int, int], parent: Node, name: bytes) -> None:
        """A client has renamed the inode `key`."""
        with self._lock:
            node = self._by_key.get(key)
            if node is not None:
                self._place(node, parent, name)

    def keep(self, key: tuple[int, int], parent: Node, name: bytes) -> Node | None:
        """The inode `key` is about to lose the name `name`: its node, if by that name it is known, to be dropped.

        Then hold it while the name goes away, and call `lost` if it did. Half of all descriptors may be kept so.
        """
        with self._lock:
            node = self._by_key.get(key)
            if node is None or node.parent is not parent or node.name != name or self._removed >= self._max_held // 2:
                return None
            node.refs += 1
            return node

    def lost(self, node: Node) -> None:
        """The name is gone; `node` is held."""
        with self._lock:
            if not node.removed:
                node.removed = True
                self._removed += 1
