"""A small 9P2000 client over any connected stream socket, and VPNKit's way to publish a port with it (spec vpnkit, appendix A).

It blocks, and has one request on its way at a time: for a program that wants a port and then waits, as `expose-port` does, and for
tests. One client is used by one thread at a time.
"""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Final, Self, TypeVar

from netstack.errors import HostError, Malformed
from portfwd.ninep.messages import (
    DMDIR,
    NOFID,
    NOTAG,
    ORDWR,
    OREAD,
    Message,
    Qid,
    Rattach,
    Rclunk,
    Rcreate,
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
from portfwd.ninep.wire import IO_OVERHEAD, Decoder, emit, parse, parse_stats

MSIZE: Final = 4096  # as VPNKit's own mount helper asks for
RESULT_OCTETS: Final = 1024
TIMEOUT_S: Final = 30.0

_Answer = TypeVar("_Answer", bound=Message)


class Rejected(HostError):
    """The server answered Rerror; `number` is its errno, 0 where it has none (9P2000)."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.text = text
        self.number = number


class Client:
    """A session on `sock`, which it owns. Methods raise `Rejected`, and `HostError` when the server is lost or makes no sense."""

    def __init__(
        self, sock: socket.socket, *, version: str = "9P2000", msize: int = MSIZE, timeout_s: float = TIMEOUT_S
    ) -> None:
        sock.settimeout(timeout_s)
        self._sock = sock
        self._unix = False
        self._decoder = Decoder(msize)
        self._fids = itertools.count(1)
        try:
            agreed = self.call(Tversion(NOTAG, msize, version), Rversion)
            if agreed.version != version or agreed.msize > msize:
                raise HostError(f"9p: asked for {version} and messages of {msize} octets, got {agreed}")
            self.msize = agreed.msize
            self._unix = version == "9P2000.u"
            self.root = next(self._fids)
            self.call(Tattach(0, self.root, NOFID, "root", "", 0), Rattach)
        except BaseException:
            sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, and with it every fid."""
        self._sock.close()

    def fileno(self) -> int:
        """Readable while nothing is asked: the server has ended the connection."""
        return self._sock.fileno()

    def call(self, request: Request, expected: type[_Answer]) -> _Answer:
        """The answer to any request."""
        try:
            self._sock.sendall(emit(request, unix=self._unix))
            while (message := self._decoder.next()) is None:
                octets = self._sock.recv(65536)
                if not octets:
                    raise HostError("9p: the server has ended the connection")
                self._decoder.feed(octets)
            answer = parse(message, unix=self._unix)
        except OSError as error:
            raise HostError(f"9p: the server is lost: {error.strerror or error}") from None
        except Malformed as error:
            raise HostError(f"{error}; is that a 9P server?") from None
        if isinstance(answer, Rerror):
            raise Rejected(answer.ename, answer.errno)
        if not isinstance(answer, expected) or answer.tag != request.tag:
            raise HostError(f"9p: {answer} is no answer to {request}")
        return answer

    def walk(self, *names: str, begin: int | None = None) -> int:
        """A new fid at `names` from the root, or from the fid `begin`. Raises `Rejected` where only a part was found."""
        fid = next(self._fids)
        found = self.call(Twalk(0, self.root if begin is None else begin, fid, names), Rwalk)
        if len(found.qids) != len(names):
            raise Rejected(f"{'/'.join(names)}: only {len(found.qids)} of these were found", 0)
        return fid

    def open(self, fid: int, mode: int = OREAD) -> Qid:
        return self.call(Topen(0, fid, mode), Ropen).qid

    def create(self, fid: int, name: str, perm: int, mode: int = OREAD) -> Qid:
        """`fid` denotes the new file afterwards, opened with `mode`."""
        return self.call(Tcreate(0, fid, name, perm, mode), Rcreate).qid

    def read(self, fid: int, offset: int = 0, count: int = RESULT_OCTETS) -> bytes:
        return self.call(Tread(0, fid, offset, min(count, self.msize - IO_OVERHEAD)), Rread).data

    def read_all(self, fid: int) -> bytes:
        """From the beginning to the end."""
        return b"".join(self._pieces(fid))

    def _pieces(self, fid: int) -> Iterator[bytes]:
        offset = 0
        while piece := self.read(fid, offset, self.msize):
            offset += len(piece)
            yield piece

    def write(self, fid: int, data: bytes, offset: int = 0) -> int:
        return self.call(Twrite(0, fid, offset, data), Rwrite).count

    def clunk(self, fid: int) -> None:
        self.call(Tclunk(0, fid), Rclunk)

    def remove(self, fid: int) -> None:
        self.call(Tremove(0, fid), Rremove)

    def stat(self, fid: int) -> Stat:
        return self.call(Tstat(0, fid), Rstat).stat

    def wstat(self, fid: int, stat: Stat) -> None:
        self.call(Twstat(0, fid, stat), Rwstat)

    def flush(self, oldtag: int) -> None:
        self.call(Tflush(0, oldtag), Rflush)

    # What is wanted of a path from the root.

    def load(self, *names: str) -> bytes:
        """The contents of a file."""
        fid = self.walk(*names)
        try:
            self.open(fid)
            return self.read_all(fid)
        finally:
            self._forget(fid)

    def list(self, *names: str) -> Sequence[Stat]:
        """The entries of a directory."""
        return parse_stats(self.load(*names), unix=self._unix)

    def mkdir(self, name: str) -> None:
        fid = self.walk()
        try:
            self.create(fid, name, DMDIR | 0o755)
        finally:
            self._forget(fid)

    def _forget(self, fid: int) -> None:
        with suppress(HostError):  # what went wrong before is what is worth telling
            self.clunk(fid)


class Exposed:
    """A port that is published until `close`, or until the connection ends."""

    def __init__(self, client: Client, fid: int, request: str) -> None:
        self._client = client
        self._fid = fid
        self.request = request
        """As the server has it: with the real port."""

    def close(self) -> None:
        """Give the port back. Raises `HostError`."""
        self._client.clunk(self._fid)


def expose(client: Client, request: str, name: str | None = None) -> Exposed:
    """Publish what `request` says (`portfwd.ninep.requests`), in a directory called `name` (default: the request).

    Raises `HostError` with the server's words when it is not published; nothing is left behind then.
    """
    client.mkdir(request if name is None else name)
    fid = client.walk(request if name is None else name, "ctl")
    try:
        client.open(fid, ORDWR)
        client.write(fid, request.encode())
        result = client.read(fid).decode(errors="replace")
        if not result.startswith("OK "):
            raise HostError(result.removeprefix("ERROR ").strip() or "the server answered nothing")
    except BaseException:
        with suppress(HostError):
            client.remove(fid)
        raise
    return Exposed(client, fid, result.removeprefix("OK ").strip())
