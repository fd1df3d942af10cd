"""A link in memory: what the test feeds is received, what the stack sends is kept.

The buffers behind received views are overwritten as soon as the link may do so (at the next `receive`), so a view that the
stack kept too long turns into 0xDD and is noticed.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence

from netstack.api import Frame
from netstack.errors import LinkDown

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
            self._lent.append(bytearray(self._waiting.popleft()))
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
