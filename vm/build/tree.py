"""A file tree that is still to be written: what images are unpacked into, and what the cpio archive is made from.

Nothing here touches the host's file system but to read what a `Slice` names. A tree holds names, modes, owners, device numbers and
where a file's octets are to be found, so an archive with device nodes needs no root, and a link in one leads nowhere but within it.

Links in the middle of a path are followed, as they would be by who unpacks at `/` of the machine: `lib/x` added where `lib` is a
link to `usr/lib` becomes `usr/lib/x`. `..` in a link's target stops at the root. One `Entry` at two paths is a hard link.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from netstack.errors import ConfigError, HostError

MAX_ENTRIES: Final = 200_000
"""In one tree. Debian's whole `python3` has 4,000, its kernel's modules 4,500."""
MAX_PATH: Final = 4095  # Linux: PATH_MAX without its NUL; the kernel's unpacker skips what is longer
MAX_NAME: Final = 255
MAX_HOPS: Final = 40  # Linux: MAXSYMLINKS
MAX_READ: Final = 16 << 20
"""Octets of one file that are ever held in memory."""
_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Slice:
    """Octets that are in a file of the host: `size` of them from `offset` on."""

    path: Path
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        """The octets, some at a time. Raises `HostError` where the file is gone or has become shorter."""
        left = self.size
        with self.open() as file:
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise HostError(f"{self.path}: became shorter while it was read; build again")
                left -= len(chunk)
                yield chunk

    def open(self) -> BinaryIO:
        """The file, at the first octet of the slice; the reader minds the end."""
        try:
            file = os.fdopen(os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
            file.seek(self.offset)
        except OSError as error:
            raise HostError(f"{self.path}: {error.strerror}") from None
        return file


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One inode. `mode` has the type; `content` is a file's octets or a symbolic link's target; `device` is of a node."""

    mode: int
    uid: int = 0
    gid: int = 0
    content: Slice | bytes = b""
    device: tuple[int, int] = (0, 0)

    @property
    def size(self) -> int:
        return self.content.size if isinstance(self.content, Slice) else len(self.content)

    def chunks(self) -> Iterator[bytes]:
        if isinstance(self.content, Slice):
            yield from self.content.chunks()
        elif self.content:
            yield self.content

    def read(self, limit: int = MAX_READ) -> bytes:
        """All octets. Raises `ConfigError` where there are more than `limit`."""
        if self.size > limit:
            raise ConfigError(f"a file of {self.size:,} octets where at most {limit:,} are read")
        return b"".join(self.chunks())

    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def is_link(self) -> bool:
        return stat.S_ISLNK(self.mode)

    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)


DIRECTORY: Final = Entry(mode=stat.S_IFDIR | 0o755)


class _Node:
    __slots__ = ("children", "entry")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.children: dict[str, _Node] = {}


def names(path: str) -> list[str]:
    """The components of `path` from the root on. Raises `ConfigError` for `..`, a NUL, and what Linux could not hold."""
    found = [name for name in path.split("/") if name not in ("", ".")]
    if ".." in found:
        raise ConfigError(f"path {path!r} leads out of the tree: a path without `..` is wanted")
    if "\0" in path or len(path) > MAX_PATH or any(len(os.fsencode(name)) > MAX_NAME for name in found):
        raise ConfigError(
            f"path {path[:80]!r} cannot be a file's: up to {MAX_NAME} octets a name, {MAX_PATH} in all, and no NUL"
        )
    return found


class Tree:
    """Names -> entries. `limit` bounds how many there may be."""

    def __init__(self, limit: int = MAX_ENTRIES) -> None:
        self._root = _Node(DIRECTORY)
        self._limit = limit
        self._count = 0

    def __len__(self) -> int:
        """Entries, without the root."""
        return self._count

    def add(self, path: str, entry: Entry, *, layer: bool = False) -> None:
        """Put `entry` at `path`; directories on the way are made, 0755 and root's.

        What is there is replaced: a directory's owner and mode by a directory's, and anything that is none by anything that is
        none. A directory is not lost to a file, nor a file to a directory: `ConfigError`. Where `layer`, it is (as in OCI layers),
        and a link is lost to a directory, which otherwise stays where it leads to one.
        """
        *parents, name = names(path) or [""]
        if not name:
            if entry.is_dir():
                self._root.entry = entry
            return
        parent = self._walk(parents, path, make=True)
        assert parent is not None
        old = parent.children.get(name)
        if old is None:
            self._grow()
            parent.children[name] = _Node(entry)
        elif old.entry.is_dir() and entry.is_dir():
            old.entry = entry
        elif layer:
            self._count -= _size(old) - 1
            parent.children[name] = _Node(entry)
        elif entry.is_dir() and old.entry.is_link() and self._leads_to_directory(path):
            return
        elif old.entry.is_dir() or entry.is_dir():
            what = ("directory", "file") if old.entry.is_dir() else ("file", "directory")
            raise ConfigError(f"/{'/'.join([*parents, name])} is a {what[0]} already and cannot become a {what[1]}")
        else:
            old.entry = entry

    def file(self, path: str, content: bytes | str, mode: int = 0o644, uid: int = 0, gid: int = 0) -> None:
        octets = content.encode() if isinstance(content, str) else content
        self.add(path, Entry(mode=stat.S_IFREG | mode, uid=uid, gid=gid, content=octets))

    def directory(self, path: str, mode: int = 0o755, uid: int = 0, gid: int = 0) -> None:
        self.add(path, Entry(mode=stat.S_IFDIR | mode, uid=uid, gid=gid))

    def symlink(self, path: str, target: str, uid: int = 0, gid: int = 0) -> None:
        self.add(path, Entry(mode=stat.S_IFLNK | 0o777, uid=uid, gid=gid, content=os.fsencode(target)))

    def link(self, path: str, old: str, *, layer: bool = False) -> None:
        """Make `path` a hard link to `old`. Raises `ConfigError` where that is not, or is a directory."""
        entry = self.get(old, follow=False)
        if entry is None or entry.is_dir():
            raise ConfigError(f"hard link {path!r} to {old!r}: there is no such file")
        self.add(path, entry, layer=layer)

    def get(self, path: str, *, follow: bool = True) -> Entry | None:
        """What is at `path`, at the end of its links if `follow`."""
        node = self._find(names(path), path, follow=follow)
        return node.entry if node else None

    def remove(self, path: str) -> None:
        """Take away `path` and what is under it; nothing where there is none."""
        *parents, name = names(path) or [""]
        parent = self._walk(parents, path)
        if parent is not None and (node := parent.children.pop(name, None)) is not None:
            self._count -= _size(node)

    def empty(self, path: str) -> None:
        """Take away what is under the directory `path`."""
        node = self._walk(names(path), path)
        if node is not None:
            self._count -= _size(node) - 1
            node.children.clear()

    def merge(self, other: Tree, at: str = "") -> None:
        """Put all of `other` under the directory `at`; what both have is the other's afterwards (see `add`)."""
        prefix = "/".join(names(at))
        copies: dict[int, Entry] = {}  # so that an image in two places is not one by hard links
        self.add(prefix, other._root.entry)
        for path, entry in other.walk():
            self.add(f"{prefix}/{path}", copies.setdefault(id(entry), replace(entry)))

    def walk(self) -> Iterator[tuple[str, Entry]]:
        """`(path, entry)` of all but the root, parents first, else by name: always in the same order."""
        stack = [("", iter(sorted(self._root.children.items())))]
        while stack:
            prefix, children = stack[-1]
            step = next(children, None)
            if step is None:
                stack.pop()
                continue
            name, node = step
            path = f"{prefix}{name}"
            yield path, node.entry
            if node.children:
                stack.append((f"{path}/", iter(sorted(node.children.items()))))

    def _grow(self) -> None:
        if self._count >= self._limit:
            raise ConfigError(f"more than {self._limit:,} files; leave some out")
        self._count += 1

    def _walk(self, path: list[str], whole: str, *, make: bool = False) -> _Node | None:
        """The directory that `path` leads to."""
        node = self._find(path, whole, follow=True, make=make)
        if node is not None and not node.entry.is_dir():
            if make:
                raise ConfigError(f"{whole!r}: /{'/'.join(path)} is a file already, and would have to be a directory")
            return None
        return node

    def _find(self, path: list[str], whole: str, *, follow: bool, make: bool = False) -> _Node | None:
        trail = [self._root]
        todo = path[::-1]
        hops = 0
        while todo:
            name = todo.pop()
            if name in ("", "."):
                continue
            if name == "..":
                if len(trail) > 1:
                    trail.pop()
                continue
            node = trail[-1].children.get(name)
            if node is None:
                if not make or not trail[-1].entry.is_dir():
                    return None
                self._grow()
                node = trail[-1].children[name] = _Node(DIRECTORY)
            if node.entry.is_link() and (todo or follow):
                hops += 1
                target = os.fsdecode(node.entry.read(MAX_PATH))
                if hops > MAX_HOPS or len(todo) > MAX_PATH:
                    raise ConfigError(f"{whole!r}: links that lead to each other")
                if target.startswith("/"):
                    trail = [self._root]
                todo += target.split("/")[::-1]
                continue
            trail.append(node)
        return trail[-1]

    def _leads_to_directory(self, path: str) -> bool:
        entry = self.get(path)
        return entry is not None and entry.is_dir()


def _size(node: _Node) -> int:
    """Entries from `node` on, with it."""
    count, stack = 0, [node]
    while stack:
        count += 1
        stack += stack.pop().children.values()
    return count
