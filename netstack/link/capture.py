"""A link with a capture around it: every frame of both directions is written, the link's headroom is not.

Put around a link and taken off again while it runs (who holds the link, and its bound methods, holds the wrapper instead);
where there is none, there is nothing to pay. Frames are written as they are on the link. With offloads (TAP, packet) that
means: super-frames longer than the MTU, and TCP and UDP checksums of frames *towards* the guest that hold the partial sum
which the guest's kernel completes. Wireshark does not verify these checksums unless told to; filling them in would cost a pass
over every octet, which is what the offload saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from netstack.api import Frame, Link
from netstack.link.common import Wrapper
from netstack.observe.pcap import INBOUND, OUTBOUND


class Sink(Protocol):
    """Where frames are written: a capture file (`PcapWriter`), or whoever looks on (`Live`)."""

    def add_interface(self, name: str) -> int:
        """The number of the link `name`."""
        ...

    def write(self, number: int, direction: int, time_ns: int, frame: bytes | memoryview, /) -> None:
        """One frame; the view ends with the call."""
        ...


class CaptureLink(Wrapper):
    """`Link` that records. `inner` is the link itself. `wall_ns` are nanoseconds since 1970."""

    def __init__(self, inner: Link, writer: Sink, *, wall_ns: Callable[[], int] = time.time_ns) -> None:
        super().__init__(inner)
        self._writer = writer
        self._wall_ns = wall_ns
        self._interface = writer.add_interface(inner.name)
        self.flush = inner.flush

    def receive(self) -> Sequence[memoryview]:
        """As the inner link's."""
        frames = self.inner.receive()
        if frames:
            now, headroom, write, number = self._wall_ns(), self.headroom, self._writer.write, self._interface
            for frame in frames:
                write(number, INBOUND, now, frame[headroom:])
        return frames

    def send(self, frames: Sequence[Frame]) -> int:
        """As the inner link's; records what was taken."""
        taken = self.inner.send(frames)
        if taken:
            now, headroom, write, number = self._wall_ns(), self.headroom, self._writer.write, self._interface
            for frame in frames[:taken]:
                write(number, OUTBOUND, now, memoryview(b"".join(frame))[headroom:])
        return taken
