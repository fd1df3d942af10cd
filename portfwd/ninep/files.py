"""What a 9P server serves: a tree of nodes, as `portfwd.ninep.server` asks for it.

A node is a file or a directory; several fids may stand on one. What belongs to one fid alone, and ends with it, is in what `open`
returns. Nothing here waits: every answer is there at once.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from netstack.errors import GuestError
from portfwd.ninep.messages import Qid, Stat


class Refused(GuestError):
    """The answer is Rerror with this text; `number` is the errno that 9P2000.u has besides.

    9P2000 has the text alone. Linux makes an errno of those it knows and ESERVERFAULT (526) of all others.
    """

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.text = text
        self.number = number

    @classmethod
    def errno(cls, number: int) -> Refused:
        """With the operating system's words, all of which Linux knows."""
        return cls(os.strerror(number), number)


@dataclass(frozen=True, slots=True)
class Words:
    """What a client is told that confuses its fids, `{fid}` being the number; the trees of VPNKit differ in it."""

    unknown: str
    in_use: str
    not_open: str
    already_open: str


class Opened(Protocol):
    """One opened fid."""

    @property
    def held(self) -> int:
        """Octets that are kept for it alone."""
        ...

    def read(self, offset: int, count: int) -> bytes:
        """At most `count` octets from `offset`; none at the end. Raises `Refused`."""
        ...

    def write(self, offset: int, data: bytes) -> int:
        """How many octets were taken. Raises `Refused`."""
        ...

    def close(self) -> None:
        """The fid is clunked, or removed, or its connection is gone. Called once."""
        ...


class Node(Protocol):
    """A file or directory. Each method raises `Refused`."""

    @property
    def qid(self) -> Qid:
        """With `QTDIR` for a directory; asked anew each time, since a node may change what it is."""
        ...

    def stat(self) -> Stat: ...

    def walk(self, name: str) -> Node:
        """The node called `name` in this one; `..` is asked for too."""
        ...

    def entries(self) -> Sequence[Stat]:
        """What is in a directory; not asked of files."""
        ...

    def open(self, mode: int) -> Opened:
        """`mode` is that of Topen. A directory's `Opened` is only closed: the server lists `entries` itself."""
        ...

    def create(self, name: str, perm: int, mode: int) -> Node:
        """Make `name` in this directory; the server opens what is returned with `mode`."""
        ...

    def wstat(self, stat: Stat) -> None: ...

    def remove(self) -> None: ...


class Filesystem(Protocol):
    """One connection's view of a tree."""

    words: Words

    def root(self) -> Node: ...

    def gone(self) -> None:
        """The connection has ended, and all its fids are closed. Called once."""
        ...


class Nothing:
    """An opened directory."""

    held = 0

    def read(self, offset: int, count: int) -> bytes:
        raise Refused.errno(errno.EISDIR)

    def write(self, offset: int, data: bytes) -> int:
        raise Refused.errno(errno.EISDIR)

    def close(self) -> None: ...


class Contents:
    """A file as it was when it was opened."""

    def __init__(self, octets: bytes) -> None:
        self._octets = octets
        self.held = len(octets)

    def read(self, offset: int, count: int) -> bytes:
        return self._octets[offset : offset + count]

    def write(self, offset: int, data: bytes) -> int:
        raise Refused.errno(errno.EPERM)

    def close(self) -> None: ...
