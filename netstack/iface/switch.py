"""A learning switch of the guests' links, and the port through which the stack talks to each. HOT PATH: `Port`.

The stack itself sits on every port: frames for its MAC go to the interface, broadcasts go there and to the other guests,
frames for another guest's MAC go to that guest's port. A frame from a link with offloads is made ordinary (checksums filled
in, super-frames cut) before it goes to another guest, because the other link may not have them.

What a link does not take at once waits in its port, bounded; while something waits the port is `congested` and TCP leaves
its octets in the host sockets. Frames that find the port full are dropped and counted, as on a wire.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Sequence
from itertools import chain, islice
from typing import Any, Final

from netstack.api import Frame, Link, Room
from netstack.errors import LinkDown
from netstack.observe.metrics import Counters, Drop

BACKLOG_OCTETS: Final = 4 << 20
"""Frames that wait for a link's peer to read, per port."""
_DRAIN: Final = 256
"""Waiting frames offered to a link at once."""
MAC_LIMIT: Final = 256
MACS_PER_PORT: Final = 64


class Port:
    """One link's place in the network."""

    __slots__ = (
        "_backlog",
        "_backlog_octets",
        "_link_room",
        "_link_send",
        "_link_send_one",
        "_queue",
        "alive",
        "congested",
        "counters",
        "frames_in",
        "frames_out",
        "headroom",
        "identity",
        "link",
        "mtu",
        "number",
        "on_blocked",
        "on_down",
        "partial",
        "partial_in",
        "polled",
        "publish",
        "tso",
        "waiting",
        "wakes_itself",
        "window",
    )

    def __init__(self, link: Link, number: int, counters: Counters, identity: str | None = None) -> None:
        self.use(link)
        self.number = number
        self.counters = counters
        self.identity = identity
        """The same for every link of one guest (a VMN3T UUID), so that it may attach twice."""
        self.headroom = link.headroom
        self.mtu = link.mtu
        self.tso = link.tso
        self.partial = link.partial_checksums
        self.partial_in = getattr(link, "partial_checksums_in", link.partial_checksums)
        self.publish: Callable[[], None] | None = getattr(link, "publish", None)
        """To be called when a turn is over."""
        self.polled = hasattr(link, "busy")
        """The link may want to be looked at again without being ready (`busy`)."""
        self.wakes_itself = hasattr(link, "watch")
        """The link watches its descriptors itself, and tells of room when there is some."""
        self.window = getattr(link, "window", 1 << 30)
        """Octets a guest's connection may send ahead, where the link's own queue is the bound."""
        self.alive = True
        self.congested = False
        self.frames_in = 0
        self.frames_out = 0
        self.waiting: list[Any] = []
        """Flows to pump when the congestion is over (objects with `resume()`)."""
        self.on_blocked: Callable[[Port], None] = lambda port: None
        """Called when the link stops taking frames; the stack then watches for room."""
        self.on_down: Callable[[Port, str], None] = lambda port, reason: None
        self._queue: list[Frame] = []
        self._backlog: deque[bytes] = deque()
        self._backlog_octets = 0

    def use(self, link: Link) -> None:
        """Send by `link` from here on: the same link, with or without a wrapper around it."""
        self.link = link
        self._link_send = link.send
        self._link_send_one: Callable[[memoryview], object] = getattr(link, "send_one", None) or self._one_of_many
        self._link_room: Callable[[int, int, bytes, bool], Room | None] | None = getattr(link, "room", None)

    @property
    def name(self) -> str:
        return self.link.name

    def same_guest(self, other: Port) -> bool:
        return self.identity is not None and self.identity == other.identity

    def put(self, frame: Frame) -> None:
        """Queue a frame whose buffers nobody will change; it leaves at the next `send` or `push`."""
        self._queue.append(frame)

    @property
    def queued(self) -> bool:
        """Whether `push` has something to do."""
        return bool(self._queue)

    def push(self) -> None:
        """Send what `put` queued."""
        if self._queue:
            frames, self._queue = self._queue, []
            self._send(frames)

    def send(self, frames: Sequence[Frame]) -> None:
        """Send frames now, after what was queued; their buffers may be reused when this returns."""
        if self._queue:
            self.push()
        self._send(frames)

    def send_one(self, frame: memoryview) -> None:
        """As `send` for one frame in one piece."""
        if self._queue or self.congested or not self.alive:
            self.send(((frame,),))
            return
        self.frames_out += 1
        counters = self.counters
        counters.frames_out += 1
        counters.octets_out += len(frame) - self.headroom
        try:
            if not self._link_send_one(frame):
                self._send_later(((frame,),))
        except LinkDown as error:
            self.down(str(error))

    @property
    def has_room(self) -> bool:
        """Whether frames can be made in the peer's own memory (`room`)."""
        return self._link_room is not None

    def room(self, octets: int, lead: int, key: bytes, native: bool) -> Room | None:
        """Room for a frame of `octets` octets with headroom, or of less, the first `lead` of them headers; `None` when there is
        none now: the port is then congested, or down. Once the frame is there: `sent`."""
        assert self._link_room is not None
        try:
            room = self._link_room(octets, lead, key, native)
        except LinkDown as error:
            self.down(str(error))
            return None
        if room is None and not self.congested:
            self.congested = True
            self.on_blocked(self)
        return room

    def sent(self, room: Room, octets: int) -> None:
        """The frame in `room` has `octets` octets."""
        room.sent(octets)
        self.frames_out += 1
        counters = self.counters
        counters.frames_out += 1
        counters.octets_out += octets - self.headroom

    def _one_of_many(self, frame: memoryview) -> int:
        return self._link_send(((frame,),))

    def _send_later(self, frames: Sequence[Frame]) -> None:
        """The link is full: what it did not take waits."""
        self.congested = True
        self._keep(frames)
        self.on_blocked(self)

    def _send(self, frames: Sequence[Frame]) -> None:
        self.frames_out += len(frames)
        counters = self.counters
        counters.frames_out += len(frames)
        counters.octets_out += sum(map(len, chain.from_iterable(frames))) - self.headroom * len(frames)
        if self.congested:
            self._keep(frames)
            return
        if not self.alive:
            self.counters.drops[Drop.LINK_GONE] += len(frames)
            return
        try:
            taken = self._link_send(frames)
        except LinkDown as error:
            self.down(str(error))
            return
        if taken < len(frames):
            self._send_later(frames[taken:])

    def _keep(self, frames: Sequence[Frame]) -> None:
        for frame in frames:
            octets = sum(map(len, frame))
            if self._backlog_octets + octets > BACKLOG_OCTETS:
                self.counters.drops[Drop.LINK_FULL] += 1
                continue
            self._backlog.append(b"".join(frame))
            self._backlog_octets += octets

    def drain(self) -> bool:
        """The link may have room again: send what waits. False when it took nothing."""
        if not self.alive:
            return True
        waited = self._backlog_octets
        try:
            if not self.link.flush():
                return False
            while self._backlog:
                batch: list[Frame] = [(frame,) for frame in islice(self._backlog, _DRAIN)]
                taken = self.link.send(batch)
                for _ in range(taken):
                    self._backlog_octets -= len(self._backlog.popleft())
                if taken < len(batch):
                    return self._backlog_octets < waited
        except LinkDown as error:
            self.down(str(error))
            return True
        self.congested = False
        return True

    def resume(self) -> None:
        """After `drain`: let the flows that waited go on, or wait for more room."""
        if self.congested:
            self.on_blocked(self)
            return
        waiting, self.waiting = self.waiting, []
        for flow in waiting:
            flow.resume()

    def down(self, reason: str) -> None:
        """The link is gone; the stack detaches the port."""
        if self.alive:
            self.alive = False
            self.congested = False
            self._queue.clear()
            self._backlog.clear()
            self._backlog_octets = 0
            self.on_down(self, reason)


class Switch:
    """MAC addresses and their ports."""

    def __init__(self, counters: Counters, make_plain: Callable[[memoryview, int, int], list[bytes]]) -> None:
        self.ports: list[Port] = []
        self._macs: dict[bytes, Port] = {}
        self._counters = counters
        self._make_plain = make_plain
        """`(frame with virtio-net header, octets of that, mtu)` -> ordinary Ethernet frames."""
        self.on_learnt: Callable[[bytes], None] = lambda mac: None
        """Told of each address that is new in the table."""
        self.on_forgotten: Callable[[bytes], None] = lambda mac: None
        """And of each that is no longer in it."""

    def learn(self, mac: bytes, port: Port) -> bool:
        """`mac` sent a frame on `port`; False when the address is not to be believed."""
        known = self._macs.get(mac)
        if known is port:
            return True
        if mac[0] & 1:
            return False
        if known is not None and known.alive and not known.same_guest(port):
            return False
        if known is None:
            per_port = Counter(self._macs.values())
            if len(self._macs) >= MAC_LIMIT or per_port[port] >= MACS_PER_PORT:
                # A guest that makes up addresses loses its own oldest one, never a guest that has few.
                loser = port if per_port[port] >= MACS_PER_PORT else per_port.most_common(1)[0][0]
                self._drop(next(old for old, owner in self._macs.items() if owner is loser or not owner.alive))
        self._macs[mac] = port
        if known is None:
            self.on_learnt(mac)
        return True

    def _drop(self, mac: bytes) -> None:
        del self._macs[mac]
        self.on_forgotten(mac)

    def forget(self, port: Port) -> None:
        for mac in [mac for mac, owner in self._macs.items() if owner is port]:
            self._drop(mac)

    def owner(self, mac: bytes) -> Port | None:
        return self._macs.get(mac)

    def table(self) -> dict[bytes, Port]:
        return dict(self._macs)

    def forward(self, port: Port, frame: memoryview, destination: bytes) -> None:
        """A frame (with `port`'s headroom) for somebody else: to its port, or to all others when it is for many."""
        if destination[0] & 1:
            targets = [other for other in self.ports if other is not port and other.alive]
        else:
            owner = self._macs.get(destination)
            if owner is None or owner is port or not owner.alive:
                self._counters.drops[Drop.SWITCH_UNKNOWN] += 1
                return
            targets = [owner]
        if not targets:
            return
        for target in targets:
            if port.partial_in:
                plain = self._make_plain(frame, port.headroom, target.mtu)
            else:
                plain = [bytes(frame[port.headroom :])]
            for octets in plain:
                if len(octets) > target.mtu + 14:
                    self._counters.drops[Drop.FRAME_LONG] += 1
                    continue
                target.put((target.link.prefix(len(octets)), octets))
            target.push()
