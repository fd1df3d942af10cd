"""The multiplexer without I/O: any number of flow-controlled streams in one connection (spec vpnkit 7.3.2, 7.3.3). HOT PATH.

As the TCP engine it counts octets and keeps none: what arrives is passed on as views, what is sent is a view in the queue.

    received octets --receive()--> events (opened, octets, ended, closed, credit, overrun)
    open accept send consumed shutdown close --> queue --gather()/sent()--> octets for the transport

Credit. Either side may send what the other one allowed by an absolute Window, counted from the opening of the channel. We allow
`FIRST_WINDOW` as VPNKit does, and double the window of a channel each time its reader had taken everything by the time half
of it was used, up to `Limits.window` and its share of half of `Limits.windows`: a fast reader is not slowed down by turns of two
event loops, a slow one holds no more than before, and many channels have equal windows. When all windows together reach
`Limits.windows`, new channels begin with `LEAST_WINDOW`.

Overrun. VPNKit in OCaml sends beyond its credit (it does not count what it sent). We take up to `Limits.overrun` octets more,
`Limits.overruns` over all channels; then that channel is closed. The reader of the connection never waits for a channel.

A channel ends when either side has sent its one Close; its id is free when both have. `Flow` keeps these facts as four flags:
`shut`, `closed` (we said so), `peer_shut`, `peer_closed` (the peer did). Nothing is sent for a channel after our Close, and
no Window after the peer's, so a peer that knows no late frames (VPNKit ends the connection for an unknown id) sees none.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Any, Final, TypeAlias

from netstack.errors import HostError
from portfwd.carriers import Destination
from portfwd.mux.frames import (
    CLOSE,
    DATA,
    HANDSHAKE,
    MAGIC,
    MULTIPLEXED,
    NAMES,
    OPEN,
    SHUTDOWN,
    WINDOW,
    Close,
    Decoder,
    MuxError,
    Open,
    Shutdown,
    Window,
    data_header,
    emit,
)

FIRST_WINDOW: Final = 65536
"""What VPNKit's ends advertise."""
LEAST_WINDOW: Final = 8192
"""Of new channels when `Limits.windows` are used up."""
HIGH_WATER: Final = 1 << 15
"""Octets in the queue from which on no channel may send."""
REMEMBERED: Final = 500
"""Events for `dump`, as VPNKit's."""


class TooManyChannels(HostError):
    """One more channel would exceed `Limits.channels`."""


class Role(Enum):
    """Who takes which channel ids, so that both sides may open at the same time (spec vpnkit 7.3.3)."""

    LISTENER = (0, 1)
    """Go, the side that accepted the connection: 0, 1, 2 ..."""
    CONNECTOR = (0xFFFFFFFF, -1)
    """Go, the side that connected: 0xffffffff, 0xfffffffe ..."""
    OCAML = (0x7FFFFFFF, 1)
    """VPNKit in OCaml (the host of generation 2): 0x7fffffff, 0x80000000 ..."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a peer can make us hold in one connection."""

    channels: int = 4096
    """At once, those that only one side has closed included; an Open beyond is answered with Close."""
    window: int = 1 << 20
    """Largest of one channel, octets."""
    windows: int = 1 << 26
    """All windows together, octets, but for `LEAST_WINDOW` of each channel."""
    overrun: int = 1 << 24
    """Octets beyond its window that one channel may hold ..."""
    overruns: int = 1 << 25
    """... and all of them."""
    queued: int = 1 << 23
    """Octets for the peer that it does not read; more ends the connection. Data stops at `HIGH_WATER` already."""


DEFAULT: Final = Limits()


class Flow:
    """One channel, in numbers. `user` is whatever the caller hangs on it."""

    __slots__ = (
        "accepted",
        "closed",
        "consumed",
        "credit",
        "destination",
        "granted",
        "hungry",
        "id",
        "ours",
        "peer_closed",
        "peer_shut",
        "received",
        "sent",
        "shut",
        "user",
        "waiting",
        "window",
    )

    def __init__(self, id: int, destination: Destination, ours: bool) -> None:
        self.id = id
        self.destination = destination
        self.ours = ours
        self.user: Any = None
        self.accepted = False
        self.sent = 0
        self.credit = 0
        """The peer's last Window: `sent` may grow to it."""
        self.received = 0
        self.consumed = 0
        """Of `received`, what went on."""
        self.granted = 0
        """Our last Window."""
        self.window = 0
        self.shut = self.closed = self.peer_shut = self.peer_closed = False
        self.hungry = False
        """Told that it has no credit, and waits for some."""
        self.waiting = False
        """Told that the queue is full; stands in line."""


OPENED: Final = 0
"""The peer opened this flow: `accept` or `close` it."""
OCTETS: Final = 1
"""The view came; tell `consumed`."""
ENDED: Final = 2
"""The peer will send no more."""
CLOSED: Final = 3
"""The peer closed: nothing can be sent. `close` it when what was received went on."""
CREDIT: Final = 4
"""`sendable` was 0 and is not any more."""
OVERRUN: Final = 5
"""The peer exceeded its credit by too much; the flow was closed."""

Event: TypeAlias = tuple[int, Flow, memoryview]
NOTHING: Final = memoryview(b"")
REFUSED: Final = memoryview(b"refused")
"""With `CLOSED`: the peer closed without a word, so what it was to reach refused."""


class Multiplexer:
    """One connection. Methods raise nothing; `receive` raises `MuxError`, after which the connection is to be ended."""

    def __init__(self, *, role: Role, handshake: bool, limits: Limits = DEFAULT) -> None:
        """`handshake`: as generation 3; what we say is queued at once, as both sides speak at the same time."""
        self._limits = limits
        self._next, self._step = role.value
        self._decoder = Decoder()
        self._greeting: bytearray | None = bytearray() if handshake else None
        self._skip = 0
        """Octets of the handshake's payload that are still to come."""
        self.flows: dict[int, Flow] = {}
        self._queue: deque[bytes | memoryview] = deque()
        self.queued = 0
        self._line: deque[Flow] = deque()
        self._windows = 0
        self._overruns = 0
        self._ring: deque[tuple[str, int, int, Any]] = deque(maxlen=REMEMBERED)
        self.opened = self.accepted = self.refused = 0
        self.unknown = 0
        """Frames for channels that are not there (late ones, or a confused peer)."""
        self.dropped = 0
        """Octets of Data after Shutdown or Close."""
        self.overran = 0
        """Channels closed because the peer exceeded its credit by too much."""
        if handshake:
            self._push(HANDSHAKE)

    @property
    def greeted(self) -> bool:
        """The handshake is complete, or there is none: channels can be opened."""
        return self._greeting is None and not self._skip

    @property
    def between_frames(self) -> bool:
        """The octets so far end where a frame does (or nothing came at all): a good place for the connection to end."""
        return not self._greeting and not self._skip and self._decoder.idle

    # What the other side said.

    def receive(self, octets: memoryview) -> Iterator[Event]:
        """What the octets mean, in order; the views are parts of `octets`. Run it to its end. Raises `MuxError`."""
        if self._greeting is not None or self._skip:
            octets = self._greet(octets)
        flows, ring, limit = self.flows, self._ring, self._limits.queued
        for command, id, number, more in self._decoder.feed(octets):
            flow = flows.get(id)
            if command == DATA:
                if not isinstance(more, memoryview):
                    ring.append(("recv", id, DATA, number))
                    if flow is None:
                        self.unknown += 1
                elif flow is not None:
                    size = len(more)
                    if flow.peer_shut or flow.closed:
                        self.dropped += size
                        continue
                    over = flow.received - flow.granted
                    flow.received += size
                    over += size
                    if over > 0 and not self._overrun(flow, over, min(size, over)):
                        yield OVERRUN, flow, NOTHING
                    else:
                        yield OCTETS, flow, more
                continue
            ring.append(("recv", id, command, number if command == WINDOW else more))
            if command == OPEN:
                assert isinstance(more, Open)
                if (opened := self._opened(more)) is not None:
                    yield OPENED, opened, NOTHING
            elif flow is None:
                self.unknown += 1
            elif command == WINDOW:
                if number > flow.credit:
                    flow.credit = number
                    if flow.hungry:
                        flow.hungry = False
                        yield CREDIT, flow, NOTHING
            elif command == SHUTDOWN:
                if not flow.peer_shut:
                    flow.peer_shut = True
                    if not flow.closed:
                        yield ENDED, flow, NOTHING
            elif flow.peer_closed:
                self.unknown += 1
            else:
                was_shut, flow.peer_closed, flow.peer_shut = flow.peer_shut, True, True
                if flow.closed:
                    self._free(flow)
                    continue
                refused = not was_shut and not flow.received
                if not was_shut and not refused:
                    yield ENDED, flow, NOTHING
                if not flow.closed:
                    yield CLOSED, flow, NOTHING if not refused else REFUSED
            if self.queued > limit:
                raise MuxError("mux: the peer sends frames and does not read their answers")

    def _greet(self, octets: memoryview) -> memoryview:
        """Take the handshake off the front."""
        greeting = self._greeting
        if greeting is not None:
            take = len(HANDSHAKE) - len(greeting)
            greeting += octets[:take]
            if not MAGIC.startswith(greeting[: len(MAGIC)]):
                raise MuxError("mux: the peer does not greet as generation 3; set generation=1 or 2 for older ones")
            if len(greeting) < len(HANDSHAKE):
                return NOTHING
            octets = octets[take:]
            self._skip = greeting[-2] | greeting[-1] << 8
            self._greeting = None
        take = min(self._skip, len(octets))
        self._skip -= take
        return octets[take:]

    def _opened(self, frame: Open) -> Flow | None:
        if frame.connection != MULTIPLEXED:
            raise MuxError(f"mux: an Open for a connection of kind {frame.connection}, which nobody implements")
        if frame.id in self.flows:
            raise MuxError(f"mux: an Open for channel {frame.id}, which is open")
        if len(self.flows) >= self._limits.channels:
            # No state is kept: the frames that follow are those of an unknown channel, and ignored.
            self.refused += 1
            self._say(frame.id, CLOSE, emit(Close(frame.id)))
            return None
        self.accepted += 1
        flow = self.flows[frame.id] = Flow(frame.id, frame.destination, False)
        return flow

    def _overrun(self, flow: Flow, over: int, more: int) -> bool:
        """Account for octets beyond the credit; False where they are too many, and the flow was closed."""
        self._overruns += more
        if over <= self._limits.overrun and self._overruns <= self._limits.overruns:
            return True
        self.overran += 1
        self.close(flow)
        return False

    # What we say.

    def open(self, destination: Destination) -> Flow:
        """A new channel. Raises `TooManyChannels`, and `Malformed` for a destination that cannot be said."""
        if len(self.flows) >= self._limits.channels:
            raise TooManyChannels(f"mux: {self._limits.channels} channels are open; {destination} has to wait")
        while self._next in self.flows:
            self._next = (self._next + self._step) & 0xFFFFFFFF
        flow = Flow(self._next, destination, True)
        frame = emit(Open(flow.id, destination))
        self.flows[flow.id] = flow
        self._next = (self._next + self._step) & 0xFFFFFFFF
        self.opened += 1
        self._say(flow.id, OPEN, frame, destination)
        self.accept(flow)
        return flow

    def accept(self, flow: Flow) -> None:
        """Let the peer send. Harmless twice."""
        if flow.accepted or flow.closed:
            return
        flow.accepted = True
        first = FIRST_WINDOW if self._windows + FIRST_WINDOW <= self._limits.windows else LEAST_WINDOW
        flow.window = min(first, self._limits.window)
        self._windows += flow.window
        if not flow.peer_shut:
            self._grant(flow, flow.consumed + flow.window)

    def sendable(self, flow: Flow) -> int:
        """Octets that may be sent now. Where that is 0, `CREDIT` tells of some, or `next_in_line` returns the flow."""
        if flow.shut or flow.closed or flow.peer_closed:
            return 0
        credit = flow.credit - flow.sent
        if credit <= 0:
            flow.hungry = True
            return 0
        if self.queued >= HIGH_WATER:
            if not flow.waiting:
                flow.waiting = True
                self._line.append(flow)
            return 0
        return credit

    def send(self, flow: Flow, octets: memoryview) -> None:
        """Queue at most `sendable` octets; the view is lent until `keep`."""
        size = len(octets)
        flow.sent += size
        self._ring.append(("send", flow.id, DATA, size))
        self._queue.append(data_header(11, DATA, flow.id, size))
        self._queue.append(octets)
        self.queued += 11 + size

    def consumed(self, flow: Flow, octets: int) -> None:
        """So many octets of those received went on (or were dropped): allow the peer more when half a window is free."""
        flow.consumed += octets
        if flow.peer_shut or flow.closed or not flow.accepted:
            return
        window = flow.window
        # VPNKit tells "when less than half is left"; that would be every few octets for a reader that lags behind.
        if flow.consumed + window - flow.granted < window >> 1:
            return
        share = (self._limits.windows >> 1) // len(self.flows)
        most = min(self._limits.window, max(share, FIRST_WINDOW))
        if window > most or (window < most and flow.consumed == flow.received):
            flow.window = min(window << 1, most)
            if self._windows + flow.window - window > self._limits.windows:
                flow.window = window
            self._windows += flow.window - window
            window = flow.window
            if flow.consumed + window <= flow.granted:
                return  # it shrank: what was allowed before is used up first
        self._grant(flow, flow.consumed + window)

    def _grant(self, flow: Flow, seq: int) -> None:
        if self._overruns and flow.received > flow.granted:
            self._overruns -= min(flow.received, seq) - flow.granted
        flow.granted = seq
        self._say(flow.id, WINDOW, emit(Window(flow.id, seq)), seq)

    def shutdown(self, flow: Flow) -> None:
        """No more will be sent. Harmless twice, and after either Close."""
        if not (flow.shut or flow.closed or flow.peer_closed):
            flow.shut = True
            self._say(flow.id, SHUTDOWN, emit(Shutdown(flow.id)))

    def close(self, flow: Flow) -> None:
        """Done with it. Harmless twice."""
        if not flow.closed:
            flow.closed = True
            self._overruns -= max(0, flow.received - flow.granted)
            self._windows -= flow.window
            self._say(flow.id, CLOSE, emit(Close(flow.id)))
            if flow.peer_closed:
                self._free(flow)

    def _free(self, flow: Flow) -> None:
        del self.flows[flow.id]
        self._ring.append(("free", flow.id, 0, None))

    # The queue.

    def _say(self, id: int, command: int, frame: bytes, more: Any = None) -> None:
        self._ring.append(("send", id, command, more))
        self._push(frame)

    def _push(self, octets: bytes) -> None:
        self._queue.append(octets)
        self.queued += len(octets)

    def gather(self, most: int) -> list[bytes | memoryview]:
        """The first buffers of the queue."""
        return list(islice(self._queue, most))

    def sent(self, octets: int) -> None:
        """The transport took so many octets of the queue."""
        queue = self._queue
        self.queued -= octets
        while octets:
            first = queue[0]
            size = len(first)
            if size > octets:
                queue[0] = memoryview(first)[octets:]
                return
            octets -= size
            queue.popleft()

    def keep(self) -> None:
        """Copy the payload queued last, if it is still there: its view is wanted back."""
        if self._queue and isinstance(self._queue[-1], memoryview):
            self._queue[-1] = bytes(self._queue[-1])

    def discard(self) -> None:
        """Forget the queue: the peer reads no more."""
        self._queue.clear()
        self.queued = 0

    def next_in_line(self) -> Flow | None:
        """The next flow that waits for room in the queue, while there is some."""
        while self._line and self.queued < HIGH_WATER:
            flow = self._line.popleft()
            flow.waiting = False
            if not (flow.closed or flow.peer_closed or flow.shut):
                return flow
        return None

    def dump(self) -> str:
        """The last 500 events, one a line, oldest first."""
        return "\n".join(f"{verb} {id}{_told(command, more)}" for verb, id, command, more in self._ring)


def _told(command: int, more: Any) -> str:
    if not command:
        return ""
    if isinstance(more, Open):
        more = more.destination
    return f" {NAMES[command]}" if more is None else f" {NAMES[command]} {more}"
