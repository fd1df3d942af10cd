"""The data path of a vhost-user network card: `netstack.api.Link` over the rings of one guest. HOT PATH.

Outbound, a batch of chains is taken and its octets are handed on as views of the guest's own memory; what reaches a host socket is
sent from there. What must be parsed (the virtio-net header and the protocol headers) is copied first, because the guest may
change it meanwhile: all of a frame of up to `SMALL` octets, the first `HEAD` octets of a longer one. The chains are used up when
the turn is over (`publish`), when nobody looks at them any more.

Inbound, TCP asks for `room` and has the host's octets read straight into the guest's buffers, writes the headers in front and says
how much it was (`places`). Everything else is copied into the next buffers (`send`). Where the guest has none left nothing is
dropped: `send` takes no more, TCP leaves its octets in the host socket, and the guest's next buffers wake us.

While frames keep coming the guest is not asked to tell of new ones: `busy` has the stack look again in each round, and only a look
that finds nothing asks to be told.

Queue pairs: frames are taken from all of them; a flow's frames leave by the pair that its own came in on (virtio 1.2, 5.1.6.5.6).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final

from netstack.api import READABLE, ROOM, Frame, Ready, Room, Watch
from netstack.errors import LinkDown
from netstack.link.common import ETHERNET_HEADER, LARGEST_FRAME, VLAN_TAG, super_frame_payload
from netstack.link.vhost_user import vanish
from netstack.link.vhost_user.fast_places import FastPlace
from netstack.link.vhost_user.memory import Broken, GuestMemory
from netstack.link.vhost_user.places import Place, note_buffers, scatter
from netstack.link.vhost_user.ring import DESCRIPTOR, WRITE, SplitQueue
from netstack.observe.metrics import Counters, Drop

BATCH: Final = 64
"""Frames per `receive` of each queue, while they are small; they cost no memory of ours."""
LONG_BATCH: Final = 8
"""The same while they are long: half a window of TCP, so that the guest goes on while we still send."""

SHOWN_EARLY: Final = 8
"""Short frames that the guest is shown in the middle of a turn, so that it works while we do."""
HEADERS_REMEMBERED: Final = 256
LOOKS: Final = 4
"""How often room is looked for again because the guest made some meanwhile."""
SMALL: Final = 2048
HEAD: Final = 192
"""Octets of a long frame that are copied: virtio-net header, Ethernet, and IP and TCP with all their options."""
_LONGEST: Final = LARGEST_FRAME + VLAN_TAG
_unpack: Final = DESCRIPTOR.unpack_from
_header: Final = Struct("<BBHHHH").unpack_from
"""Flags, gso_type, hdr_len, gso_size, csum_start, csum_offset (virtio 1.2, 5.1.6)."""
_NEEDS_CHECKSUM: Final = 1
_GSO_ECN: Final = 0x80
_HEADER: Final = 10
"""Octets of a virtio-net header that say something to us."""
_NEVER: Final = 1 << 30
_PORTS: Final = 34
"""Where the source port of TCP and UDP begins in an Ethernet frame with IPv4 without options; the destination's is 2 further."""


class Scattered:
    """A frame in pieces of the guest's memory. `head` is a copy of its first octets, as many as are parsed."""

    __slots__ = ("head", "octets", "pieces")

    def __init__(self, head: bytes, pieces: list[memoryview], octets: int) -> None:
        self.head = head
        self.pieces = pieces
        self.octets = octets

    def joined(self) -> memoryview:
        """A copy in one piece, with the head that was parsed before."""
        return memoryview(b"".join((self.head, *self.after(len(self.head)))))

    def after(self, at: int) -> list[memoryview]:
        """The octets from `at` on."""
        pieces = self.pieces
        first = len(pieces[0])
        if at < first:
            return [pieces[0][at:], *pieces[1:]]
        for number, piece in enumerate(pieces):
            if at < len(piece):
                return [piece[at:], *pieces[number + 1 :]]
            at -= len(piece)
        return []


class Offloads:
    """What the driver agreed to, as the data path wants it."""

    __slots__ = ("gso", "headroom", "mergeable", "partial_in", "partial_out", "tso")

    def __init__(
        self,
        *,
        headroom: int,
        mergeable: bool,
        partial_out: bool,
        partial_in: bool,
        tso: bool,
        gso: frozenset[int],
    ) -> None:
        self.headroom = headroom
        """Octets of the virtio-net header: 12, or 10 on a legacy device without mergeable buffers."""
        self.mergeable = mergeable
        """A frame may fill several buffers."""
        self.partial_out = partial_out
        """The guest takes frames whose checksum is left to it."""
        self.partial_in = partial_in
        """The guest may leave checksums to us."""
        self.tso = tso
        """The guest takes TCP super-frames."""
        self.gso = gso
        """Segmentations that the guest may leave to us (`gso_type`, without the ECN bit)."""


class VhostUserLink:
    """See the module. `pairs` are `(receive, transmit)` queues by the guest's names: `receive` is what the guest receives by."""

    def __init__(
        self,
        name: str,
        mtu: int,
        offloads: Offloads,
        memory: GuestMemory,
        pairs: Sequence[tuple[SplitQueue, SplitQueue]],
        *,
        counters: Counters | None = None,
    ) -> None:
        self.name = name
        self.mtu = mtu
        self.headroom = offloads.headroom
        self.partial_checksums = offloads.partial_out
        self.partial_checksums_in = offloads.partial_in
        self.tso = super_frame_payload(mtu) if offloads.tso else 0
        self.max_frame = _LONGEST if offloads.gso else mtu + ETHERNET_HEADER + VLAN_TAG
        self.busy = False
        """Look again without being told."""
        self.whole = True
        """What `receive_trains` returned last has no frame in pieces."""
        self.details: Callable[[], dict[str, object]] = dict
        """For status pages."""
        self.taken = self.kicked = 0
        """Outbound frames, and how often we were told of some."""
        self._offloads = offloads
        self._counters = counters if counters is not None else Counters()
        self._memory = memory
        self._most = 1 << 30 if offloads.mergeable else 1
        """Chains that a frame may fill."""
        self._plain_prefix = bytes(10) + (b"\x01\x00" if self.headroom == 12 else b"")
        self._shortest = self.headroom + ETHERNET_HEADER
        self._longest = self.headroom + self.max_frame
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._watch: Watch | None = None
        self._ready: Ready = lambda mask: None
        self._watched: dict[int, Ready] = {}
        self._kicks: dict[int, Ready] = {}
        self._places: list[Place] = []
        self._fast_places: list[FastPlace | None] = []
        self.on_broken: Callable[[str], None] = lambda reason: None
        """Told once when the guest's rings turn out to be broken, just before `LinkDown`."""
        self._down = ""
        self._batch = BATCH
        self._sensible_from: dict[bytes, int] = {}
        """How long a frame must be for a header that was found sensible; guests use few different ones."""
        self._steer = bytearray(256)
        """By the low octet of a guest's port: the queue pair of its frames."""
        self._pairs: list[tuple[SplitQueue, SplitQueue]] = []
        self.use(pairs)

    # -- the device's side

    def use(self, pairs: Sequence[tuple[SplitQueue, SplitQueue]]) -> None:
        """These are the queue pairs from now on, the first of them for what belongs to none."""
        self._pairs = list(pairs)
        self._receive = pairs[0][0]
        self._places = [Place(receive) for receive, _ in pairs]
        self._fast_places = [None] * len(pairs)
        self._transmit = [transmit for _, transmit in pairs]
        self._several = len(pairs) > 1
        self.busy = True
        self.wake()

    def remap(self, memory: GuestMemory) -> None:
        """The guest's memory changed its shape."""
        self._memory = memory

    def kicks(self, transmit: Sequence[int], receive: Sequence[int], other: dict[int, Callable[[], None]]) -> None:
        """Descriptors that become readable when the guest has frames, when it has room, and for what else there is."""
        if self._watch is not None:
            self._unwatch()
        self._kicks = {
            **dict.fromkeys(transmit, self._kicked),
            **dict.fromkeys(receive, self._refilled),
            **{descriptor: self._contained(function) for descriptor, function in other.items()},
        }
        if self._watch is not None:
            self._watch_all()

    def _kicked(self, _mask: int) -> None:
        self.kicked += 1
        self._ready(READABLE)

    def _refilled(self, _mask: int) -> None:
        for receive, _ in self._pairs:
            receive.hush()
        self._ready(ROOM)

    def _awake(self, _mask: int) -> None:
        self._ready(READABLE)

    def _contained(self, function: Callable[[], None]) -> Ready:
        def ready(_mask: int) -> None:
            try:
                function()
            except Broken as error:
                self.fail(str(error))

        return ready

    def fail(self, reason: str) -> None:
        """No more of this: the next `receive` says so to the stack."""
        if not self._down:
            self._down = reason
            self.on_broken(reason)
        self.wake()

    def wake(self) -> None:
        """Have `receive` called soon, from outside of a turn."""
        try:
            os.eventfd_write(self._wake, 1)
        except OSError:
            pass  # closed, or told already

    # -- the stack's side

    def fileno(self) -> int:
        return self._wake

    def watch(self, watch: Watch, ready: Ready) -> None:
        """Call `ready` with `READABLE` when there may be frames, with `ROOM` when there may be room."""
        self._watch = watch
        self._ready = ready
        self._watch_all()

    def unwatch(self) -> None:
        """No more calls of `ready`."""
        if self._watch is not None:
            self._unwatch()
            self._watch = None

    def _watch_all(self) -> None:
        assert self._watch is not None
        # Edges: each write to an eventfd is one, so nobody has to read it.
        self._watched = {self._wake: self._awake, **self._kicks}
        for descriptor, ready in self._watched.items():
            self._watch.watch(descriptor, ready)

    def _unwatch(self) -> None:
        assert self._watch is not None
        for descriptor in self._watched:
            self._watch.unwatch(descriptor)
        self._watched = {}

    def receive(self) -> Sequence[memoryview]:
        """See `Link`: every frame in one piece."""
        return [item if isinstance(item, memoryview) else item.joined() for item in self.receive_trains()]

    def receive_trains(self) -> list[memoryview | Scattered]:
        """Frames of up to `SMALL` octets in one piece (a copy), longer ones in the guest's own pieces."""
        if self._down:
            raise LinkDown(f"{self.name}: {self._down}")
        found: list[memoryview | Scattered] = []
        busy = False
        self.whole = True
        try:
            for number, queue in enumerate(self._transmit):
                heads = queue.heads(self._batch)
                if not heads and queue.listen(queue.next):
                    heads = queue.heads(self._batch)
                if heads:
                    busy = True
                    queue.hush()
                    self._take(queue, heads, found, number)
                    queue.complete(heads)
        except Broken as error:
            self._break(error)
        self.busy = busy
        self._batch = BATCH if self.whole else LONG_BATCH
        self.taken += len(found)
        return found

    def _take(self, queue: SplitQueue, heads: list[int], found: list[memoryview | Scattered], number: int) -> None:
        """The frames of these chains."""
        descriptors, low, high, region = queue.descriptors, queue.low, queue.high, queue.region
        unpack = _unpack
        shortest, longest = self._shortest, self._longest
        small = min(SMALL, longest)
        append = found.append
        sensible = self._sensible_from
        for head in heads:
            address, octets, flags, _next = unpack(descriptors, head << 4)
            if not flags and low <= address and address + octets <= high:
                if octets <= small:
                    if octets < shortest:
                        self._counters.drops[Drop.FRAME_SHORT] += 1
                        continue
                    copy = region[address - low : address - low + octets].tobytes()
                    if octets < sensible.get(copy[:_HEADER], _NEVER) and not self._sensible(copy, octets):
                        continue
                    frame = memoryview(copy)
                    append(frame)
                    if self._several and octets > _PORTS + shortest:
                        self._steer[frame[self.headroom + _PORTS + 1]] = number
                    continue
                pieces = [region[address - low : address - low + octets]]
            else:
                pieces = queue.walk(head, writable=False)
                octets = sum(map(len, pieces))
            if not shortest <= octets <= longest:
                self._counters.drops[Drop.FRAME_SHORT if octets < shortest else Drop.FRAME_LONG] += 1
                continue
            if octets <= SMALL:
                first = b"".join(pieces)
            else:
                first = bytes(pieces[0][:HEAD])
                if len(first) < HEAD:
                    first = self._head_of(pieces)
            if octets < sensible.get(first[:_HEADER], _NEVER) and not self._sensible(first, octets):
                continue
            if octets <= SMALL:
                append(memoryview(first))
            else:
                append(Scattered(first, pieces, octets))
                self.whole = False
            if self._several and octets > _PORTS + shortest:
                self._steer[first[self.headroom + _PORTS + 1]] = number

    @staticmethod
    def _head_of(pieces: list[memoryview]) -> bytes:
        """The first `HEAD` octets, of however many pieces."""
        head = b""
        for piece in pieces:
            head += piece[: HEAD - len(head)]
            if len(head) >= HEAD:
                break
        return head

    def _sensible(self, frame: bytes, octets: int) -> bool:
        """Whether a virtio-net header says something that was agreed on and can be; what does not is counted."""
        flags, gso_type, _length, gso_size, start, offset = _header(frame)
        flags &= _NEEDS_CHECKSUM  # others are to be ignored (virtio 1.2, 5.1.6.2.2)
        gso_type &= ~_GSO_ECN
        shortest = self.headroom + start + offset + 2 if flags else 0
        if (
            (flags and (not self._offloads.partial_in or start < ETHERNET_HEADER))
            or (gso_type and not (flags and gso_size and gso_type in self._offloads.gso))
            or octets < shortest
        ):
            self._counters.drops[Drop.OFFLOAD_HEADER] += 1
            return False
        if len(self._sensible_from) >= HEADERS_REMEMBERED:
            self._sensible_from.clear()
        self._sensible_from[frame[:_HEADER]] = shortest
        return True

    # -- to the guest

    def prefix(self, octets: int) -> bytes:
        return self._plain_prefix

    def _pair_for(self, frame: Frame | tuple[memoryview]) -> SplitQueue:
        head = frame[0]
        at = self.headroom + _PORTS + 3
        return self._pairs[self._steer[head[at]] % len(self._pairs)][0] if len(head) > at else self._receive

    def send(self, frames: Sequence[Frame]) -> int:
        """See `Link`: each frame is copied into the guest's next buffers."""
        taken = 0
        try:
            for frame in frames:
                queue = self._pair_for(frame) if self._several else self._receive
                if not self._put(queue, frame[0] if len(frame) == 1 else b"".join(frame)):
                    break
                taken += 1
        except Broken as error:
            self._break(error)
        return taken

    def send_one(self, frame: memoryview) -> bool:
        """As `send` for one frame in one piece; whether it was taken."""
        queue = self._pair_for((frame,)) if self._several else self._receive
        try:
            at = queue.next
            if queue.seen != at or queue.waiting():
                head = queue.first()
                address, octets, flags, _next = _unpack(queue.descriptors, head << 4)
                length = len(frame)
                low = queue.low
                if flags == WRITE and octets >= length and low <= address and address + octets <= queue.high:
                    address -= low
                    queue.region[address : address + length] = frame
                    if queue.used_next(head, length) >= SHOWN_EARLY:
                        queue.publish()
                    return True
            return self._put(queue, frame)
        except Broken as error:
            self._break(error)
            return False

    def _put(self, queue: SplitQueue, frame: bytes | bytearray | memoryview) -> bool:
        octets = len(frame)
        most = self._most
        for _ in range(queue.size + LOOKS):
            room = queue.gather(octets, most)
            if room >= octets:
                break
            if queue.taken_heads and (most == 1 or len(queue.taken_heads) == queue.size):
                # The guest leaves no room for such a frame. A single chain goes back, or it would stand in the way of all others.
                if most == 1:
                    queue.use(queue.taken_heads, [], 0)
                if room >= self._shortest:
                    self._counters.drops[Drop.FRAME_LONG] += 1
                    return True
            elif not queue.listen(queue.seen):
                return False
            else:
                queue.waiting()
        else:
            return False
        scatter(memoryview(frame), queue.views)
        count = queue.commit(octets)
        if count > 1:
            note_buffers(queue.views, count)
        return True

    def room(self, octets: int, lead: int, key: bytes, native: bool) -> Room | None:
        """Room in the guest's buffers for a frame of up to `octets` octets with its headroom, perhaps for fewer, of which the first
        `lead` are headers; None when there is none just now. `key` is the flow's: addresses and ports of the guest's own frames.
        `native`: it will be filled by the kernel (`read_message`)."""
        number = self._steer[key[9]] % len(self._pairs) if self._several else 0
        try:
            if native and self._most > 1:
                fast = self._fast_places[number] or self._new_fast_place(number)
                if fast.find(octets, lead):
                    return fast
            place = self._places[number]
            queue, most = place.queue, self._most
            for _ in range(LOOKS):
                if place.find(octets, lead, most):
                    return place
                if not queue.listen(queue.seen):
                    break
                queue.waiting()
        except Broken as error:
            self._break(error)
        return None

    def _new_fast_place(self, number: int) -> FastPlace:
        place = self._fast_places[number] = FastPlace(self._pairs[number][0], self._memory)
        return place

    def publish(self) -> None:
        """The turn is over: show the guest what was used, and tell it where it wants to know."""
        for receive, transmit in self._pairs:
            if receive.done:
                receive.publish()
            if transmit.done:
                transmit.publish()
        if vanish.happened and not self._down and self._memory.vanished:
            self.fail("the file behind the guest's memory was cut off")

    def flush(self) -> bool:
        return True

    def _break(self, error: Broken) -> None:
        if not self._down:
            self._down = str(error)
            self.on_broken(self._down)
        raise LinkDown(f"{self.name}: {error}") from None

    def close(self) -> None:
        """Let go of everything, above all of the guest's memory, which would stay pinned; harmless when repeated."""
        self.unwatch()
        if self._wake < 0:
            return
        os.close(self._wake)
        self._wake = -1
        self._kicks = {}
        self._ready = lambda mask: None
        self.details = dict
        self.on_broken = lambda reason: None
        self._pairs, self._transmit, self._places, self._fast_places = [], [], [], []
        del self._receive
        self._memory = GuestMemory()
