"""Frames on a stream socket, each after its length: QEMU's netdev, VPNKit's vmnet. HOT PATH: once per frame, both ways.

The peer is trusted with its own frames only. One `recv_into` fills a reused buffer, `_cut` slices it into views that
begin with the length prefix (the link's headroom), and what is left of an unfinished frame moves to the front before
the next read. So a batch costs one system call and each frame one unpack and one slice. The buffer is bounded by
construction: a length above `LARGEST_BELIEVED` ends the connection (spec: threats G10), a frame of an odd size only
itself.

Outbound, a batch leaves in one `sendmsg` per 1024 pieces. When the socket takes only part, the frame that was cut is
kept (the peer must get its rest before anything else) and the frames after it are left to the caller.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from itertools import chain
from struct import Struct
from typing import ClassVar, Final, TypeVar

from netstack.api import Frame
from netstack.errors import LinkDown
from netstack.link.common import ETHERNET_HEADER, VLAN_TAG, only_busy
from netstack.link.trains import FEWEST, SHORTEST, Train, TrainFinder
from netstack.observe.metrics import Counters, Drop

LARGEST_BELIEVED: Final = 69632
"""A longer frame means that framing is lost; QEMU hangs up at the same limit (4096 + 65536, spec: gvproxy 1.4)."""

READ_OCTETS: Final = 256 * 1024
"""One read; at MTU 1500 a batch of about 170 frames (spec: dataplane D)."""

T = TypeVar("T")

IOV_MAX: Final = 1024
"""Pieces per `sendmsg`: Linux, macOS and the BSDs agree on this number."""


class StreamLink:
    """A `Link` over a connected stream socket. Use `QemuLink` or `VmnetLink`, which say what the length looks like.

    `sock` becomes the link's own and is made non-blocking.
    """

    headroom: ClassVar[int]
    tso: int = 0
    partial_checksums: bool = False

    _length: ClassVar[Struct]

    def __init__(
        self,
        sock: socket.socket,
        name: str,
        mtu: int,
        *,
        counters: Counters | None = None,
        max_frame: int | None = None,
    ) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self.name = name
        self.mtu = mtu
        self.max_frame = mtu + ETHERNET_HEADER + VLAN_TAG if max_frame is None else max_frame
        self._counters = counters if counters is not None else Counters()
        self._sock = sock
        self._recv_into = sock.recv_into
        self._sendmsg = sock.sendmsg
        self._buffer = bytearray(self.headroom + LARGEST_BELIEVED + READ_OCTETS)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        """Octets `start:end` of the buffer wait to be cut into frames."""
        self._lie = ""
        self._trains: TrainFinder | None = None
        self._rest: memoryview | bytes = b""

    def fileno(self) -> int:
        return self._sock.fileno()

    def prefix(self, octets: int) -> bytes:
        return self._length.pack(octets)

    # -- from the peer

    def receive(self) -> Sequence[memoryview]:
        """See `Link`. One read of at most 256 KiB and the whole frames in it."""
        self._fill()
        return self._unless_lost(self._cut())

    def receive_trains(self) -> list[memoryview | Train]:
        """As `receive`, but runs of segments come as one `Train` each. Do not mix the two within a batch."""
        self._fill()
        if self._trains is None:
            if self._end - self._start < FEWEST * SHORTEST:
                return self._unless_lost([*self._cut()])
            self._trains = TrainFinder(self.headroom)
        return self._unless_lost(self._couple(self._trains))

    def _couple(self, finder: TrainFinder) -> list[memoryview | Train]:
        """`_cut` that tries for a train at each large frame with enough behind it; after a miss, not for a while."""
        view, buffer, headroom = self._view, self._buffer, self.headroom
        unpack = self._length.unpack_from
        found: list[memoryview | Train] = []
        while True:
            position, end = self._start, self._end
            if position + headroom > end or self._lie:
                break
            (length,) = unpack(buffer, position)
            stride = headroom + length
            if SHORTEST <= length <= self.max_frame and end - position >= FEWEST * stride:
                train = finder.find(buffer, view, position, end, length)
                if train is not None:
                    found.append(train)
                    self._start = position + train.stride * train.count
                    continue
                found += self._cut(FEWEST)
            else:
                some = self._cut(FEWEST)
                if self._start == position:
                    break
                found += some
        return found

    def _fill(self) -> None:
        """Keep the unfinished frame, read once behind it. Raises `LinkDown` at the end of the stream."""
        if self._lie:
            raise LinkDown(self._lie)
        start, end, view = self._start, self._end, self._view
        if start:
            if start != end:
                view[: end - start] = view[start:end]  # the views of the last batch end here, as promised
            end -= start
            self._start = 0
            self._end = end
        try:
            got = self._recv_into(view[end : end + READ_OCTETS])
        except OSError as error:
            return only_busy(self.name, error)
        if not got:
            raise LinkDown(f"{self.name}: closed by the peer" + (" inside a frame" if end else ""))
        self._end = end + got

    def _cut(self, most: int = 1 << 30) -> list[memoryview]:
        """The whole frames of what was read, or the first `most` of them."""
        position, end, view, buffer = self._start, self._end, self._view, self._buffer
        unpack, headroom, largest = self._length.unpack_from, self.headroom, self.max_frame
        last = end - headroom
        frames: list[memoryview] = []
        append = frames.append
        while position <= last and len(frames) < most:
            (length,) = unpack(buffer, position)
            stop = position + headroom + length
            if stop > end:
                if length > LARGEST_BELIEVED:
                    self._disbelieve(length)
                break
            if ETHERNET_HEADER <= length <= largest:
                append(view[position:stop])
            elif length > LARGEST_BELIEVED:
                self._disbelieve(length)
                break
            else:
                self._counters.drops[Drop.FRAME_SHORT if length < ETHERNET_HEADER else Drop.FRAME_LONG] += 1
            position = stop
        self._start = position
        return frames

    def _unless_lost(self, found: list[T]) -> list[T]:
        """What was found before framing was lost is still good; with nothing found the link is down now."""
        if self._lie and not found:
            raise LinkDown(self._lie)
        return found

    def _disbelieve(self, length: int) -> None:
        """Framing is lost; the next `receive` raises."""
        self._lie = (
            f"{self.name}: the peer announced a frame of {length} octets; at most {LARGEST_BELIEVED} are believed"
        )
        self._counters.drops[Drop.FRAME_LONG] += 1
        try:
            self._sock.shutdown(socket.SHUT_RDWR)  # makes the descriptor readable, so that `receive` is called soon
        except OSError:
            pass  # the peer was faster

    # -- to the peer

    def send(self, frames: Sequence[Frame]) -> int:
        """See `Link`. What is longer than MTU + 14 is dropped and counted: peers may crash on it (gvforwarder does)."""
        if self._rest and not self.flush():
            return 0
        lengths = [sum(map(len, frame)) for frame in frames]
        if lengths and max(lengths) > self.headroom + ETHERNET_HEADER + self.mtu:
            return self._send_fitting(frames, lengths)
        return self._send(frames, lengths)

    def _send(self, frames: Sequence[Frame], lengths: list[int]) -> int:
        pieces = list(chain.from_iterable(frames))
        total = sum(lengths)
        sent = 0
        try:
            if len(pieces) <= IOV_MAX:
                if pieces:
                    sent = self._sendmsg(pieces)
            else:
                for first in range(0, len(pieces), IOV_MAX):
                    some = pieces[first : first + IOV_MAX]
                    took = self._sendmsg(some)
                    sent += took
                    if took < sum(map(len, some)):
                        break
        except OSError as error:
            only_busy(self.name, error)
        return len(frames) if sent == total else self._keep_cut(frames, lengths, sent)

    def _keep_cut(self, frames: Sequence[Frame], lengths: list[int], sent: int) -> int:
        """How many frames are gone or begun when `sent` octets left; the rest of the begun one is copied."""
        for index, length in enumerate(lengths):
            if sent < length:
                if not sent:
                    return index
                self._rest = memoryview(b"".join(frames[index]))[sent:]
                return index + 1
            sent -= length
        return len(frames)

    def _send_fitting(self, frames: Sequence[Frame], lengths: list[int]) -> int:
        limit = self.headroom + ETHERNET_HEADER + self.mtu
        fitting = [index for index, length in enumerate(lengths) if length <= limit]
        taken = self._send([frames[index] for index in fitting], [lengths[index] for index in fitting])
        passed = fitting[taken] if taken < len(fitting) else len(frames)
        self._counters.drops[Drop.FRAME_LONG] += passed - taken
        return passed

    def flush(self) -> bool:
        """See `Link`: the rest of the frame that was cut."""
        while self._rest:
            try:
                self._rest = self._rest[self._sock.send(self._rest) :]
            except OSError as error:
                only_busy(self.name, error)
                return False
        return True

    def close(self) -> None:
        """End the connection; harmless when repeated."""
        self._sock.close()


class QemuLink(StreamLink):
    """QEMU `-netdev stream` and `-netdev socket`: u32 big-endian length, then the frame (spec: gvproxy 1.4)."""

    headroom = 4
    _length = Struct(">I")


class VmnetLink(StreamLink):
    """VPNKit's ethernet socket after the handshake: u16 little-endian length, then the frame (spec: vpnkit 2.2)."""

    headroom = 2
    _length = Struct("<H")
