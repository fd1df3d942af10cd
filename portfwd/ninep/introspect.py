"""The read-only tree for looking in (spec vpnkit 8.2): text about the network, and the captures, as files.

    /connections  /flows  /endpoints  /ports  /capture/all.pcap ...

A tree is a mapping of names to functions that return what the file has now, or to mappings that are directories. A file is as
it was when it was opened. The same mapping makes the archive of `--diagnostics`.

What may not be done is refused in the operating system's words, all of which Linux knows. VPNKit says "Read-only file" and "Is not
a directory" for two of them; Linux 6.1 makes errno 526 of the first.
"""

from __future__ import annotations

import errno
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

from netstack.observe.classic import Rings
from portfwd.ninep.files import Contents, Node, Nothing, Opened, Refused, Words
from portfwd.ninep.messages import DMDIR, ORDWR, OTRUNC, OWRITE, QTDIR, Qid, Stat

Supplier: TypeAlias = Callable[[], str | bytes]
Tree: TypeAlias = Mapping[str, "Supplier | Tree"]

_WORDS: Final = Words(
    unknown="Unknown fid {fid}",
    in_use="Fid {fid} already in use",
    not_open="Can't read from unopened fid",
    already_open="Already open",
)


@dataclass(frozen=True, slots=True)
class Sources:
    """Who tells what is in the files: each returns the lines of one, made by the functions below."""

    connections: Supplier
    flows: Supplier
    endpoints: Supplier
    ports: Supplier


def network_tree(sources: Sources, rings: Rings) -> Tree:
    """VPNKit's tree."""
    return {
        "connections": sources.connections,
        "capture": {f"{name}.pcap": ring.file for name, ring in rings.rings.items()},
        "flows": sources.flows,
        "endpoints": sources.endpoints,
        "ports": sources.ports,
    }


def connection_line(protocol: str, local: str, flow: str = "") -> str:
    """A line of `connections`, such as `tcp:1.2.3.4:443`: a socket of the host, and for UDP whose it is (`GUEST-REMOTE`)."""
    return f"{protocol}:{local}" + (f" {protocol}:{flow}" if flow else "") + "\n"


def flow_line(source: str, destination: str, *, is_open: bool, last_active: float) -> str:
    """A line of `flows`: a TCP connection of a guest, and when something last went through it (seconds since 1970)."""
    state = "open" if is_open else "closed"
    return f"TCP {source} > {destination} socket = {state} last_active = {last_active:.6f}\n"


def endpoint_line(remote: str, local: str, last_active: float) -> str:
    """A line of `endpoints`: an address outside that the guest at `local` has talked to."""
    return f"{remote} <-> {local} last_active_time = {last_active:.6f}\n"


def port_line(address: str, last_active: float) -> str:
    """A line of `ports`: a guest's port of the switch."""
    return f"{address} last_active_time = {last_active:.6f}\n"


def octets_of(supplier: Supplier) -> bytes:
    """What the file has now."""
    found = supplier()
    return found.encode() if isinstance(found, str) else found


class TreeFiles:
    """A tree for one connection."""

    words = _WORDS

    def __init__(self, tree: Tree, *, wall: Callable[[], float] = time.time) -> None:
        self._tree = tree
        self.wall = wall

    def root(self) -> Node:
        return _Directory(self, (), self._tree)

    def gone(self) -> None: ...


class _Node:
    mode = 0o444

    def __init__(self, files: TreeFiles, path: tuple[str, ...]) -> None:
        self.files = files
        self.path = path

    @property
    def qid(self) -> Qid:
        raise NotImplementedError

    def _number(self) -> int:
        """The same for the same path, whoever asks."""
        name = "/".join(self.path).encode()
        return zlib.crc32(name) << 32 | zlib.adler32(name)

    def stat(self) -> Stat:
        qid, now = self.qid, int(self.files.wall())
        mode = self.mode | (DMDIR if qid.kind & QTDIR else 0)
        name = self.path[-1] if self.path else "/"
        return Stat(0, 0, qid, mode, now, now, 0, name, "root", "root", "root", "", 0, 0, 0)

    def entries(self) -> Sequence[Stat]:
        return ()

    def create(self, name: str, perm: int, mode: int) -> Node:
        raise Refused.errno(errno.EPERM)

    def wstat(self, stat: Stat) -> None:
        raise Refused.errno(errno.EPERM)

    def remove(self) -> None:
        raise Refused.errno(errno.EPERM)


class _Directory(_Node):
    mode = 0o555

    def __init__(self, files: TreeFiles, path: tuple[str, ...], tree: Tree, parent: _Directory | None = None) -> None:
        super().__init__(files, path)
        self._tree = tree
        self._parent = parent

    @property
    def qid(self) -> Qid:
        return Qid(QTDIR, 0, self._number())

    def walk(self, name: str) -> Node:
        if name == "..":
            return self._parent or self
        found = self._tree.get(name)
        if found is None:
            raise Refused.errno(errno.ENOENT)
        return self._child(name, found)

    def _child(self, name: str, found: Supplier | Tree) -> Node:
        path = (*self.path, name)
        if isinstance(found, Mapping):
            return _Directory(self.files, path, found, self)
        return _File(self.files, path, found)

    def entries(self) -> Sequence[Stat]:
        return [self._child(name, found).stat() for name, found in self._tree.items()]

    def open(self, mode: int) -> Opened:
        if mode & (OWRITE | ORDWR | OTRUNC) and mode & 3 != 3:
            raise Refused.errno(errno.EISDIR)
        return Nothing()


class _File(_Node):
    def __init__(self, files: TreeFiles, path: tuple[str, ...], supplier: Supplier) -> None:
        super().__init__(files, path)
        self._supplier = supplier

    @property
    def qid(self) -> Qid:
        return Qid(0, 0, self._number())

    def walk(self, name: str) -> Node:
        raise Refused.errno(errno.ENOTDIR)

    def open(self, mode: int) -> Opened:
        if mode & 3 in (OWRITE, ORDWR) or mode & OTRUNC:
            raise Refused.errno(errno.EROFS)
        return Contents(octets_of(self._supplier))
