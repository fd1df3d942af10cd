"""A link in memory: what the test feeds is received, what the stack sends is kept.

The buffers behind received views are overwritten as soon as the link may do so (at the next `receive`), so a view that the
stack kept too long turns into 0xDD and is noticed.
"""

from __future__ import annotations

import errno
import itertools
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from netstack.api import Frame
from netstack.errors import LinkDown
from netstack.link.stream import QemuLink

VNET_HEADER = 12
BATCH = 16
_fds = itertools.count(1 << 20)


class MemoryLink:
    """`netstack.api.Link`. `offload=True`: virtio-net header of 12 octets, TSO and partial checksums."""

    def __init__(self, name: str = "memory:0", *, mtu: int = 1500, offload: bool = False) -> None:
        self.name = name
        self.mtu = mtu
        self.headroom = VNET_HEADER if offload else 0
        self.partial_checksums = offload
        self.max_frame = 65550 if offload else mtu + 14
        self.tso = max(mtu - 40, 45 * 1448 // (mtu - 40) * (mtu - 40)) if offload else 0
        self.sent: deque[bytes] = deque()
        """Frames the stack sent, headroom included."""
        self.on_send: Callable[[bytes], None] | None = None
        """Called with each sent frame instead of keeping it in `sent`."""
        self.on_receive: Callable[[bytes], None] | None = None
        """Told of each frame, without headroom, when the stack takes it."""
        self.room: int | None = None
        """Frames the peer still takes; `None` for any number."""
        self.down: str | None = None
        self.closed = False
        self.flushes = 0
        self._waiting: deque[bytes] = deque()
        self._lent: list[bytearray] = []
        self._fd = next(_fds)

    def feed(self, frame: bytes, header: bytes | None = None) -> None:
        """Let the stack receive `frame`; `header` replaces the link's ordinary headroom."""
        self._waiting.append((bytes(self.headroom) if header is None else header) + frame)

    def mask(self) -> int:
        """Level-triggered readiness in epoll's numbers."""
        return (1 if self._waiting or self.down else 0) | (4 if self.room is None or self.room > 0 else 0)

    def fileno(self) -> int:
        return self._fd

    def receive(self) -> Sequence[memoryview]:
        for buffer in self._lent:
            buffer[:] = b"\xdd" * len(buffer)
        self._lent = []
        if self.down is not None:
            raise LinkDown(self.down)
        while self._waiting and len(self._lent) < BATCH:
            octets = self._waiting.popleft()
            if self.on_receive is not None:
                self.on_receive(octets[self.headroom :])
            self._lent.append(bytearray(octets))
        return [memoryview(buffer) for buffer in self._lent]

    def send(self, frames: Sequence[Frame]) -> int:
        if self.down is not None:
            raise LinkDown(self.down)
        taken = 0
        for frame in frames:
            if self.room is not None:
                if self.room <= 0:
                    break
                self.room -= 1
            octets = b"".join(bytes(part) for part in frame)
            if self.on_send is not None:
                self.on_send(octets)
            else:
                self.sent.append(octets)
            taken += 1
        return taken

    def flush(self) -> bool:
        self.flushes += 1
        return True

    def prefix(self, octets: int) -> bytes:
        return bytes(self.headroom)

    def close(self) -> None:
        self.closed = True


class _Pipe:
    """The socket under a `StreamMemoryLink`: what the peer wrote is read, as much of it at once as fits."""

    family = socket.AF_UNIX

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.written = bytearray()
        self.closed = False
        self.room: int | None = None
        self.fd = next(_fds)

    def setblocking(self, blocking: bool) -> None: ...

    def setsockopt(self, level: int, option: int, value: int) -> None: ...

    def fileno(self) -> int:
        return self.fd

    def recv_into(self, buffer: Any) -> int:
        if not self.waiting:
            if self.closed:
                return 0
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        view = memoryview(buffer)
        count = min(len(view), len(self.waiting))
        view[:count] = self.waiting[:count]
        del self.waiting[:count]
        return count

    def sendmsg(self, buffers: Iterable[Any]) -> int:
        data = b"".join(bytes(buffer) for buffer in buffers)
        if self.room is not None:
            data = data[: self.room]
            self.room -= len(data)
            if not data:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.written += data
        return len(data)

    def send(self, data: Any) -> int:
        return self.sendmsg([data])

    def shutdown(self, how: int) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class StreamMemoryLink(QemuLink):
    """The stream link of QEMU (`netstack.link.stream`) over a pipe in memory, with the test's side of `MemoryLink`.

    It brings what a stream brings: many frames in one read, frames cut anywhere, runs of segments found as trains.
    """

    def __init__(self, name: str = "memory:stream", *, mtu: int = 1500) -> None:
        self.pipe = _Pipe()
        super().__init__(self.pipe, name, mtu)  # type: ignore[arg-type]
        self.on_send: Callable[[bytes], None] | None = None
        self.on_receive: Callable[[bytes], None] | None = None
        self._fed: list[bytes] = []
        self._sent: deque[bytes] = deque()

    def feed(self, frame: bytes, header: bytes | None = None) -> None:
        self.pipe.waiting += struct.pack(">I", len(frame)) + frame
        if self.on_receive is not None:
            self._fed.append(frame)

    def _fill(self) -> None:
        fed, self._fed = self._fed, []
        for frame in fed:
            if self.on_receive is not None:
                self.on_receive(frame)
        super()._fill()

    @property
    def sent(self) -> deque[bytes]:
        """Frames the stack sent, prefix included."""
        self._parse()
        return self._sent

    def _parse(self) -> None:
        written = self.pipe.written
        at = 0
        while len(written) - at >= 4:
            (length,) = struct.unpack_from(">I", written, at)
            if len(written) - at < 4 + length:
                break
            frame = bytes(written[at : at + 4 + length])
            at += 4 + length
            if self.on_send is not None:
                self.on_send(frame)
            else:
                self._sent.append(frame)
        del written[:at]

    def send(self, frames: Sequence[Frame]) -> int:
        taken = super().send(frames)
        if self.on_send is not None:
            self._parse()
        return taken

    def mask(self) -> int:
        room = self.pipe.room
        return (1 if self.pipe.waiting or self.pipe.closed else 0) | (4 if room is None or room > 0 else 0)


KINDS = ("plain", "vnet", "stream")


def make_link(kind: str, mtu: int) -> MemoryLink | StreamMemoryLink:
    """A link of one of `KINDS`."""
    return StreamMemoryLink(mtu=mtu) if kind == "stream" else MemoryLink(mtu=mtu, offload=kind == "vnet")
