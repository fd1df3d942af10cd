"""Live captures: any number of readers see the frames of all links as pcapng, each through a filter of its own.

Theory of operation. The first reader has the stack put a capture around its links (`netstack.link.capture`), the last one to close
has it taken off; in between there is nothing of this on the path of frames. The captures call `add_interface` and `write`, as they
do of a `PcapWriter`. A reader keeps blocks until somebody takes them (`take`), at most `limit` octets; frames that find no room are
lost to that reader alone, counted, and told in the stream: in the next block (epb_dropcount) and at the end (`statistics`). So a
slow reader costs the network nothing but its buffer.

Nobody here waits or wakes up: `on_data` says that there is something to take, once until it is taken, from within the stack's turn.

A `tap` gets the frames themselves, for who keeps a capture of its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, TypeAlias

from netstack.errors import ConfigError
from netstack.observe.pcap import (
    DEFAULT_SNAPLEN,
    interface,
    packet_octets,
    put_packet,
    section_header,
    statistics,
)

log = logging.getLogger("pyvpnkit.capture")

MAX_READERS: Final = 16
"""Readers and taps together; one more is refused."""
MAX_INTERFACES: Final = 256
"""Links told apart by name until the last reader closes; frames of any more are under one name, `more links`."""
DEFAULT_LIMIT: Final = 4 << 20
SMALLEST_LIMIT: Final = 128 << 10
"""Room for one super-frame at least."""

Accepts: TypeAlias = Callable[[bytes | memoryview], bool]
"""`netstack.observe.filter.Filter`, or any other question about an Ethernet frame."""
Tap: TypeAlias = Callable[[bytes, int, int], None]
"""`tap(frame, direction, time_ns)`: direction is `INBOUND` or `OUTBOUND` of `netstack.observe.pcap`, time since 1970."""


class _Counts:
    __slots__ = ("accepted", "lost", "received", "untold")

    def __init__(self) -> None:
        self.received = self.accepted = self.lost = 0
        self.untold = 0
        """Lost since the last frame that was kept."""


class Reader:
    """One live capture. Made by `Live.open`."""

    def __init__(
        self,
        live: Live,
        accepts: Accepts | None,
        snaplen: int,
        limit: int,
        on_data: Callable[[], None],
    ) -> None:
        self.frames = 0
        """Written to the stream."""
        self.lost = 0
        """Frames for which the buffer had no room."""
        self.closed = False
        self._live = live
        self._accepts = accepts
        self._snaplen = snaplen
        self._limit = limit
        self._on_data = on_data
        self._told = False
        self._buffer = bytearray(section_header())
        self._counts: list[_Counts] = []

    def take(self) -> bytes:
        """The blocks since the last call, whole ones; the first begin the stream. Empty when there is nothing new."""
        taken, self._buffer = bytes(self._buffer), bytearray()
        self._told = False
        return taken

    def statistics(self) -> bytes:
        """Interface Statistics Blocks of all links, for the end of the stream: what was seen, let through and lost."""
        now = self._live.wall_ns()
        return b"".join(
            statistics(number, now, received=one.received, accepted=one.accepted, lost=one.lost)
            for number, one in enumerate(self._counts)
        )

    def close(self) -> None:
        """No more frames; what waits can still be taken, and the statistics asked for. Harmless when repeated."""
        if not self.closed:
            self.closed = True
            self._live.remove(self)

    # What `Live` calls.

    def interface(self, name: str) -> None:
        """One more link; these few octets are beyond the limit."""
        self._buffer += interface(name, self._snaplen)
        self._counts.append(_Counts())

    def frame(self, number: int, direction: int, time_ns: int, frame: bytes | memoryview) -> None:
        if number >= len(self._counts):
            return  # of a capture that was taken off in the middle of a batch
        counts = self._counts[number]
        counts.received += 1
        if self._accepts is not None and not self._accepts(frame):
            return
        counts.accepted += 1
        captured = min(len(frame), self._snaplen)
        buffer = self._buffer
        if len(buffer) + packet_octets(captured, counts.untold) > self._limit:
            counts.lost += 1
            counts.untold += 1
            self.lost += 1
            return
        put_packet(buffer, number, direction, time_ns, frame, captured, counts.untold)
        counts.untold = 0
        self.frames += 1
        if not self._told:
            self._told = True
            self._on_data()


class _Tapped:
    """A tap among the readers."""

    def __init__(self, tap: Tap) -> None:
        self.closed = False
        self._tap = tap

    def interface(self, name: str) -> None:
        pass

    def frame(self, number: int, direction: int, time_ns: int, frame: bytes | memoryview) -> None:
        self._tap(bytes(frame), direction, time_ns)


class Live:
    """See the module. `switch(on)` is called when the first reader opens and when the last one has closed; the links are then
    to be captured, or no longer. It may add interfaces. `wall_ns` are nanoseconds since 1970."""

    def __init__(
        self, switch: Callable[[bool], None] = lambda on: None, *, wall_ns: Callable[[], int] = time.time_ns
    ) -> None:
        self.wall_ns = wall_ns
        self.failed = 0
        """Readers and taps closed because what they called failed; a fault of ours."""
        self._switch = switch
        self._names: dict[str, int] = {}
        self._readers: tuple[Reader | _Tapped, ...] = ()

    def __len__(self) -> int:
        """Readers and taps."""
        return len(self._readers)

    def open(
        self,
        filter: Accepts | None = None,
        *,
        snaplen: int = DEFAULT_SNAPLEN,
        limit: int = DEFAULT_LIMIT,
        on_data: Callable[[], None] = lambda: None,
    ) -> Reader:
        """A new reader of all frames that `filter` lets through, `snaplen` octets of each, that keeps up to `limit` octets for
        who takes them. Its first octets (section and links) can be taken at once. `on_data` is called when the first frame
        after a `take` has come; it may close the reader, and should do no more than wake somebody up.

        Raises `ConfigError` where there are too many readers, or a number makes no sense.
        """
        if not 64 <= snaplen <= 262144 or limit < SMALLEST_LIMIT:
            raise ConfigError(
                f"capture: snaplen={snaplen}, limit={limit}; 64 to 262144 octets of each frame, and at least {SMALLEST_LIMIT}"
            )
        reader = Reader(self, filter, snaplen, limit, on_data)
        self._add(reader)
        return reader

    def tap(self, callback: Tap) -> Callable[[], None]:
        """Call `callback` for every frame; the function that is returned ends that, and is harmless when repeated.

        Raises `ConfigError` where there are too many readers.
        """
        tapped = _Tapped(callback)
        self._add(tapped)

        def remove() -> None:
            if not tapped.closed:
                tapped.closed = True
                self.remove(tapped)

        return remove

    def _add(self, reader: Reader | _Tapped) -> None:
        if len(self._readers) >= MAX_READERS:
            raise ConfigError(f"capture: there are {MAX_READERS} readers already; close one of them")
        first = not self._readers
        for name in self._names:
            reader.interface(name)
        self._readers = (*self._readers, reader)
        if first:
            self._switch(True)

    def remove(self, reader: Reader | _Tapped) -> None:
        """`reader` has closed."""
        before = self._readers
        self._readers = tuple(one for one in before if one is not reader)
        if before and not self._readers:
            self._names.clear()
            self._switch(False)

    def close(self) -> None:
        """Close every reader and tap."""
        for reader in self._readers:
            reader.closed = True
            self.remove(reader)

    # What captures around links call.

    def add_interface(self, name: str) -> int:
        """The number under which frames of the link `name` are written; the same again for the same name."""
        if name not in self._names and len(self._names) >= MAX_INTERFACES - 1:
            name = "more links"
        number = self._names.get(name)
        if number is None:
            number = self._names[name] = len(self._names)
            for reader in self._readers:
                reader.interface(name)
        return number

    def write(self, number: int, direction: int, time_ns: int, frame: bytes | memoryview) -> None:
        """One Ethernet frame of link `number`."""
        for reader in self._readers:
            try:
                reader.frame(number, direction, time_ns, frame)
            except Exception:  # contained: this reader ends, the frame and the network go on
                self.failed += 1
                if self.failed == 1:
                    log.exception("a reader of the live capture failed and is closed")
                reader.closed = True
                self.remove(reader)
