"""A client of 9P2000.L for tests: blocking, with one request on its way at a time, and names for the usual ones."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from typing import TypeVar

from portfwd.ninep.wire import Decoder
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep import wire

TIMEOUT_S = 30.0
_Reply = TypeVar("_Reply", bound=m.Message)


class Client:
    """Attached as `uid`, at fid 0. Methods raise `OSError` as answered, and `EOFError` when the server is gone."""

    def __init__(self, sock: socket.socket, *, uid: int = 0, msize: int = 1 << 20, attach: bool = True) -> None:
        sock.settimeout(TIMEOUT_S)
        self.sock = sock
        self._decoder = Decoder(1 << 20)
        self._fids = itertools.count(1)
        self.msize = 0
        if attach:
            self.msize = self.call(m.Tversion(m.NOTAG, msize, b"9P2000.L"), m.Rversion).msize
            self.attach(0, uid)

    def close(self) -> None:
        self.sock.close()

    def send(self, *requests: m.Message) -> None:
        self.sock.sendall(b"".join(map(wire.emit, requests)))

    def receive(self) -> m.Message:
        while (message := self._decoder.next()) is None:
            octets = self.sock.recv(1 << 18)
            if not octets:
                raise EOFError
            self._decoder.feed(octets)
        return wire.parse(message)

    def call(self, request: m.Message, expected: type[_Reply]) -> _Reply:
        self.send(request)
        reply = self.receive()
        assert reply.tag == request.tag
        if isinstance(reply, m.Rlerror):
            raise OSError(reply.errno, os.strerror(reply.errno))
        assert isinstance(reply, expected), reply
        return reply

    def attach(self, fid: int, uid: int) -> m.Qid:
        return self.call(m.Tattach(1, fid, m.NOFID, b"", b"", uid), m.Rattach).qid

    def walk(self, *names: str | bytes, begin: int = 0) -> int:
        """A new fid."""
        fid = next(self._fids)
        wanted = tuple(map(os.fsencode, names))
        for index in range(0, max(len(wanted), 1), 16):
            some = wanted[index : index + 16]
            walked = self.call(m.Twalk(1, fid if index else begin, fid, some), m.Rwalk)
            if len(walked.qids) != len(some):
                raise FileNotFoundError(2, "only a part was found")
        return fid

    def open(self, *names: str | bytes, flags: int = os.O_RDONLY, begin: int = 0) -> int:
        fid = self.walk(*names, begin=begin)
        try:
            self.call(m.Tlopen(1, fid, flags), m.Rlopen)
        except OSError:
            self.clunk(fid)
            raise
        return fid

    def create(
        self, name: str | bytes, *, flags: int = os.O_RDWR, mode: int = 0o644, gid: int = 0, begin: int = 0
    ) -> int:
        """An opened fid of a new file in the directory `begin`."""
        fid = self.walk(begin=begin)
        try:
            self.call(m.Tlcreate(1, fid, os.fsencode(name), flags | os.O_CREAT, mode, gid), m.Rlcreate)
        except OSError:
            self.clunk(fid)
            raise
        return fid

    def clunk(self, fid: int) -> None:
        self.call(m.Tclunk(1, fid), m.Rclunk)

    def read(self, fid: int, offset: int = 0, count: int = 1 << 20) -> bytes:
        return bytes(self.call(m.Tread(1, fid, offset, count), m.Rread).data)

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        return self.call(m.Twrite(1, fid, offset, data), m.Rwrite).count

    def store(self, name: str | bytes, data: bytes, *, mode: int = 0o644, begin: int = 0) -> None:
        """A new file in the directory `begin`."""
        fid = self.create(name, mode=mode, begin=begin)
        assert self.write(fid, data) == len(data)
        self.clunk(fid)

    def load(self, *names: str | bytes, begin: int = 0) -> bytes:
        fid = self.open(*names, begin=begin)
        data = self.read(fid)
        self.clunk(fid)
        return data

    def stat(self, *names: str | bytes, begin: int = 0) -> m.Rgetattr:
        fid = self.walk(*names, begin=begin)
        try:
            return self.getattr(fid)
        finally:
            self.clunk(fid)

    def getattr(self, fid: int) -> m.Rgetattr:
        return self.call(m.Tgetattr(1, fid, m.GETATTR_BASIC), m.Rgetattr)

    def set(self, *names: str | bytes, valid: int, **values: int) -> None:
        fid = self.walk(*names)
        try:
            self.call(m.Tsetattr(1, fid, valid, **values), m.Rsetattr)
        finally:
            self.clunk(fid)

    def chmod(self, name: str | bytes, mode: int) -> None:
        self.set(name, valid=m.SET_MODE, mode=mode)

    def chown(self, name: str | bytes, uid: int, gid: int) -> None:
        self.set(name, valid=m.SET_UID | m.SET_GID, uid=uid, gid=gid)

    def mkdir(self, name: str | bytes, mode: int = 0o755, gid: int = 0, begin: int = 0) -> m.Qid:
        return self.call(m.Tmkdir(1, begin, os.fsencode(name), mode, gid), m.Rmkdir).qid

    def symlink(self, name: str | bytes, target: str | bytes, begin: int = 0) -> m.Qid:
        return self.call(m.Tsymlink(1, begin, os.fsencode(name), os.fsencode(target), 0), m.Rsymlink).qid

    def mknod(self, name: str | bytes, mode: int, major: int = 0, minor: int = 0) -> m.Qid:
        return self.call(m.Tmknod(1, 0, os.fsencode(name), mode, major, minor, 0), m.Rmknod).qid

    def readlink(self, *names: str | bytes) -> bytes:
        fid = self.walk(*names)
        try:
            return self.call(m.Treadlink(1, fid), m.Rreadlink).target
        finally:
            self.clunk(fid)

    def unlink(self, name: str | bytes, flags: int = 0, begin: int = 0) -> None:
        self.call(m.Tunlinkat(1, begin, os.fsencode(name), flags), m.Runlinkat)

    def rename(self, name: str | bytes, to: str | bytes, begin: int = 0, end: int = 0) -> None:
        self.call(m.Trenameat(1, begin, os.fsencode(name), end, os.fsencode(to)), m.Rrenameat)

    def link(self, fid: int, name: str | bytes, begin: int = 0) -> None:
        self.call(m.Tlink(1, begin, fid, os.fsencode(name)), m.Rlink)

    def entries(self, fid: int, count: int = 1 << 20) -> Iterator[tuple[m.Qid, int, int, bytes]]:
        """Of an opened directory."""
        offset = 0
        while data := self.call(m.Treaddir(1, fid, offset, count), m.Rreaddir).data:
            for entry in wire.parse_entries(data):
                offset = entry[1]
                yield entry

    def list(self, *names: str | bytes, begin: int = 0) -> list[bytes]:
        """Names, sorted, without . and .. ."""
        fid = self.open(*names, begin=begin)
        try:
            return sorted(name for *_, name in self.entries(fid) if name not in (b".", b".."))
        finally:
            self.clunk(fid)

    def xattr(self, name: str | bytes, attribute: str | bytes) -> bytes:
        """Of a file in the root; of no name, the list."""
        fid, new = self.walk(name), next(self._fids)
        try:
            size = self.call(m.Txattrwalk(1, fid, new, os.fsencode(attribute)), m.Rxattrwalk).size
            value = self.read(new, 0, size)
            self.clunk(new)
            return value
        finally:
            self.clunk(fid)

    def set_xattr(self, name: str | bytes, attribute: str | bytes, value: bytes, flags: int = 0) -> None:
        fid = self.walk(name)
        try:
            self.call(m.Txattrcreate(1, fid, os.fsencode(attribute), len(value), flags), m.Rxattrcreate)
            if value:
                self.write(fid, value)
        except OSError:
            self.clunk(fid)
            raise
        self.clunk(fid)

    def lock(self, fid: int, kind: int, *, process: int = 1, start: int = 0, length: int = 0) -> int:
        return self.call(m.Tlock(1, fid, kind, 0, start, length, process, b"guest"), m.Rlock).status
