"""Fids of one connection: what a client's numbers stand for, for requests that run at the same time.

A fid stands for a file (`Node`); when it is opened, for a descriptor or a listing besides; or for an extended attribute on its way.
`Fids.use` lends one to a request. Clunked meanwhile, it ends with the last of these, so a descriptor is never closed, and its
number given to another file, under a read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

from vm.filesystems.ninep import wire
from vm.filesystems.ninep.limits import SessionAllowances
from vm.filesystems.ninep.messages import NOFID
from vm.filesystems.ninep.nodes import Node
from vm.filesystems.ninep.owners import Asker
from vm.filesystems.ninep.share import Share, refuse


@dataclass
class Listing:
    """An opened directory, as it was when its beginning was read. The offset of an entry is where the one before it ends."""

    octets: bytes = b""
    ends: array[int] = field(default_factory=lambda: array("Q"))

    def read(self, offset: int, count: int) -> bytes:
        """Whole entries from `offset` on."""
        if offset >= len(self.octets):
            return b""
        index = bisect_right(self.ends, offset)
        if offset and (not index or self.ends[index - 1] != offset):
            raise refuse(errno.EINVAL)
        last = bisect_right(self.ends, offset + count)
        if last == index:
            raise refuse(errno.EINVAL)  # not one fits
        return self.octets[offset : self.ends[last - 1]]


@dataclass
class Attribute:
    """An extended attribute that is read, or written: then it is set when the fid is clunked."""

    octets: bytearray
    name: bytes = b""
    flags: int = 0
    written: int = -1
    """Octets so far; -1 when it is read."""


class Fid:
    """What a number stands for."""

    __slots__ = ("asker", "attribute", "ended", "fd", "held", "listing", "lock", "node", "users", "writable")

    def __init__(self, node: Node, asker: Asker) -> None:
        self.node = node
        self.asker = asker
        self.fd = -1
        """When it is opened."""
        self.writable = False
        self.listing: Listing | None = None
        self.attribute: Attribute | None = None
        self.held = 0
        """Octets of these."""
        self.users = 0
        self.ended = False
        self.lock = threading.Lock()
        """For what one request after the other must do."""

    @property
    def plain(self) -> bool:
        """It stands for a file, and no more."""
        return self.fd < 0 and self.attribute is None


class Fids:
    """Those of one connection. Any thread may call; `end` and what leaves a `use` may block, as closing a file may."""

    def __init__(self, share: Share, allowances: SessionAllowances) -> None:
        self._share = share
        self._allowances = allowances
        self._lock = threading.Lock()
        self._fids: dict[int, Fid] = {}

    def __len__(self) -> int:
        return len(self._fids)

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[Fid]:
        """Raises EBADF when there is none."""
        with self._lock:
            fid = self._fids.get(number)
            if fid is None:
                raise refuse(errno.EBADF)
            fid.users += 1
        try:
            yield fid
        finally:
            self._done(fid)

    def _done(self, fid: Fid) -> None:
        with self._lock:
            fid.users -= 1
            last = fid.ended and not fid.users
        if last:
            self._close(fid)

    def add(self, number: int, fid: Fid) -> None:
        """Owns its node, and drops it when there can be no such fid. Raises `OSError`."""
        try:
            with self._lock:
                if number in self._fids or number == NOFID:
                    raise refuse(errno.EBADF)
                self._allowances.fids.take()
                self._fids[number] = fid
        except BaseException:
            self._share.nodes.drop(fid.node)
            raise

    def replace_node(self, fid: Fid, node: Node) -> None:
        """`fid` stands for `node` from now on, which was to be dropped."""
        former, fid.node = fid.node, node
        self._share.nodes.drop(former)

    def end(self, number: int) -> None:
        """Raises EBADF when there is none."""
        with self._lock:
            fid = self._fids.pop(number, None)
            if fid is None:
                raise refuse(errno.EBADF)
            fid.ended = True
            used = fid.users > 0
        if not used:
            self._close(fid)

    def end_all(self) -> None:
        for number in list(self._fids):
            with contextlib.suppress(OSError):
                self.end(number)

    def hold(self, fid: Fid, octets: int) -> None:
        """From now on `octets` are kept for `fid`. Raises `OSError`."""
        more = octets - fid.held
        if more > 0:
            self._allowances.octets.take(more)
        else:
            self._allowances.octets.give(-more)
        fid.held = octets

    def opened(self, fid: Fid, fd: int, writable: bool) -> None:
        """Owns the descriptor, for which `may_open` has made room."""
        fid.fd, fid.writable = fd, writable
        if fid.node.is_dir:
            fid.listing = Listing()

    @contextlib.contextmanager
    def may_open(self) -> Iterator[None]:
        """Raises `OSError` where there is no room for one opened file more; the block opens it, or raises."""
        self._allowances.opened.take()
        try:
            self._share.opened.take()
            try:
                yield
            except BaseException:
                self._share.opened.give()
                raise
        except BaseException:
            self._allowances.opened.give()
            raise

    def list(self, fid: Fid, listing: Listing) -> None:
        """Read the opened directory anew."""
        ends: array[int] = array("Q")
        end = 0
        parts = []
        listing.octets, listing.ends = b"", array("Q")
        try:
            for qid, kind, name in self._share.entries(fid.node, fid.fd):
                end += wire.entry_octets(name)
                ends.append(end)
                parts.append(wire.emit_entry(qid, end, kind, name))
                if len(parts) % 1024 == 0:
                    self.hold(fid, end)  # a directory may be larger than all that is allowed
            self.hold(fid, end)
        except OSError:
            self.hold(fid, 0)
            raise
        listing.octets, listing.ends = b"".join(parts), ends

    def _close(self, fid: Fid) -> None:
        allowances = self._allowances
        allowances.fids.give()
        self.hold(fid, 0)
        self._share.locks.end(fid.node.key, fid, allowances.locks)
        if fid.fd >= 0:
            with contextlib.suppress(OSError):  # what could not be written is told by fsync
                os.close(fid.fd)
            self._share.opened.give()
            allowances.opened.give()
        self._share.nodes.drop(fid.node)
