"""Packets between a guest's rings and host sockets (virtio 1.2, 5.10.6). HOT PATH.

Outbound, a batch of chains is taken; each header is copied before it is looked at, for the guest may change it meanwhile. Octets of
payload go to the sockets as views of the guest's memory, those of several packets by one call where nothing is between them. The
chains are used up when nobody looks at them any more.

Inbound, a socket's octets are read straight into the guest's next buffers, behind room for a header in each; the headers are
written when it is known how much came. A packet is as long as its buffer (that of Linux 6.1 has 3776 octets), and as
the guest's credit. Buffers that could not even hold a header are given back empty.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from netstack.link.vhost_user.ring import DESCRIPTOR, WRITE, SplitQueue
from vm.vsock import packet
from vm.vsock.connection import State
from vm.vsock.engine import Count, Engine
from vm.vsock.packet import HEADER, HOST, RW, SIZE, STREAM
from vm.vsock.stream import FEWEST, MOST, Stream

BATCH: Final = 64
"""Packets of the guest that are taken at once."""
READS: Final = 16
"""Sockets that are read before the guest is looked at again."""
_unpack: Final = DESCRIPTOR.unpack_from
_pack: Final = HEADER.pack_into


class DataPath:
    """See the module. `dispatch` is called when `engine` has events; it may flush and close streams. `now` is the clock.

    Both ways raise `netstack.link.vhost_user.memory.Broken` where the guest's rings say what cannot be.
    """

    def __init__(
        self, engine: Engine, rx: SplitQueue, tx: SplitQueue, dispatch: Callable[[], None], now: Callable[[], float]
    ) -> None:
        self.rx = rx
        """What the guest receives by."""
        self.tx = tx
        self._engine = engine
        self._dispatch = dispatch
        self._now = now
        self._readable: deque[Stream] = deque()
        self._dirty: list[Stream] = []
        """Streams with views into chains of this batch."""
        self._held_back = False
        """Packets were left in the ring because the guest did not take our answers to others."""
        rx.hush()

    def wants_turn(self, stream: Stream) -> None:
        """There may be something to read, and a guest to read it for."""
        if not stream.queued:
            stream.queued = True
            self._readable.append(stream)

    # From the guest.

    def outbound(self) -> bool:
        """Take a batch of packets; whether there may be more. If not, the guest will tell of the next one."""
        engine, tx = self._engine, self.tx
        self._held_back = engine.full
        if self._held_back:
            return False  # `inbound` has something to tell first
        count = min(tx.waiting(), BATCH)
        if not count:
            return tx.listen(tx.next)
        tx.hush()
        now = self._now()
        heads = tx.heads(count)
        for head in heads:
            self._packet(tx.walk(head, writable=False), now)
            if engine.events:
                self._dispatch()
        for stream in self._dirty:
            stream.flush()
        self._dirty.clear()
        tx.complete(heads)
        tx.publish()
        engine.counters[Count.PACKETS_OUTBOUND] += count
        return True

    def _packet(self, chain: list[memoryview], now: float) -> None:
        if chain and len(chain[0]) >= SIZE:
            octets = bytes(chain[0][:SIZE])
            payload = [chain[0][SIZE:], *chain[1:]] if len(chain[0]) > SIZE else chain[1:]
        else:
            octets, payload = _split(chain)
            if len(octets) < SIZE:
                self._engine.counters[Count.MALFORMED] += 1
                return
        header = packet.parse(octets)
        connection = self._engine.arrives(header, octets[16:24], sum(map(len, payload)), now)
        if connection is None:
            return
        stream = connection.owner
        assert isinstance(stream, Stream)
        if not stream.views:
            self._dirty.append(stream)
        left = header.length
        self._engine.counters[Count.OUTBOUND] += left
        for view in payload:
            if left <= len(view):
                if left:
                    stream.views.append(view[:left])
                break
            stream.views.append(view)
            left -= len(view)

    # To the guest.

    def inbound(self) -> bool:
        """Tell the guest what is due and read some sockets; whether there may be more. If not, something will tell: a socket, the
        guest's next buffers, or its credit."""
        more = self._tell()
        if more is None:
            more = False
            for _ in range(min(READS, len(self._readable))):
                stream = self._readable.popleft()
                stream.queued = False
                if self._wants_reading(stream) and not self._read(stream):
                    stream.queued = True
                    self._readable.appendleft(stream)
                    more = self.rx.listen(self.rx.next)
                    break
            else:
                more = bool(self._readable) or self._engine.has_packets
        self.rx.publish()
        return more or (self._held_back and not self._engine.full)

    def _tell(self) -> bool | None:
        """Packets without payload. None when all of them are told, else whether there are buffers after all."""
        engine, rx = self._engine, self.rx
        while engine.has_packets:
            chain, head = self._buffer()
            if chain is None:
                return rx.listen(rx.next)
            octets = engine.next_packet(self._now())
            if octets is None:
                return None
            _write(chain, octets)
            rx.used_next(head, SIZE)
            engine.counters[Count.PACKETS_INBOUND] += 1
        return None

    def _buffer(self) -> tuple[list[memoryview] | None, int]:
        """The guest's next buffer that holds a header, which stays available."""
        rx = self.rx
        while rx.waiting():
            head = rx.first()
            chain = rx.walk(head, writable=True)
            if sum(map(len, chain)) >= SIZE:
                return chain, head
            self._too_small(head)
        return None, 0

    def _too_small(self, head: int) -> None:
        self._engine.counters[Count.BUFFERS_SMALL] += 1
        self.rx.used_next(head, 0)

    @staticmethod
    def _wants_reading(stream: Stream) -> bool:
        """Whether there may be octets, and a guest that can take some."""
        connection = stream.connection
        if not stream.readable or not stream.open or connection.state is not State.OPEN:
            return False
        if connection.guest_shut & packet.NO_MORE_RECEIVE:
            return False
        if not connection.room():
            connection.starves()
            return False
        return True

    def _read(self, stream: Stream) -> bool:
        """Read once. False where the guest has no buffers."""
        rx, connection = self.rx, stream.connection
        waiting = rx.waiting()
        if not waiting:
            return False
        heads = rx.heads_after(0, min(waiting, stream.pieces))
        left = room = connection.room()
        low, high, region, descriptors = rx.low, rx.high, rx.region, rx.descriptors
        buffers: list[memoryview] = []
        sizes: list[int] = []
        """Of the payload in each chain."""
        places: list[int | list[memoryview]] = []
        """Of the headers: in `region`, or the chain."""
        for head in heads:
            address, length, flags, _ = _unpack(descriptors, head << 4)
            if flags == WRITE and low <= address and address + length <= high and length > SIZE:
                at = address - low
                size = min(length - SIZE, left)
                buffers.append(region[at + SIZE : at + SIZE + size])
                places.append(at)
            else:
                chain = rx.walk(head, writable=True)
                size = min(sum(map(len, chain)) - SIZE, left)
                if size <= 0:
                    if not sizes:
                        self._too_small(head)
                        self.wants_turn(stream)
                        return True
                    break
                buffers += _behind_header(chain, size)
                places.append(chain)
            sizes.append(size)
            left -= size
            if not left:
                break
        count = stream.read_into(buffers, room - left)
        if count > 0:
            self._filled(stream, count, heads, sizes, places)
        if stream.readable:
            self.wants_turn(stream)
        return True

    def _filled(
        self, stream: Stream, count: int, heads: list[int], sizes: list[int], places: list[int | list[memoryview]]
    ) -> None:
        """Write the headers of the packets that `count` octets became, and use up their chains."""
        rx, connection, cid, region = self.rx, stream.connection, self._engine.guest_cid, self.rx.region
        source, target = connection.host_port, connection.guest_port
        buf_alloc, fwd_cnt = connection.buf_alloc, connection.fwd_cnt
        left = count
        lens = []
        for size, place in zip(sizes, places, strict=True):
            octets = size if size < left else left
            if isinstance(place, int):
                _pack(region, place, HOST, cid, source, target, octets, STREAM, RW, 0, buf_alloc, fwd_cnt)
            else:
                _write(place, HEADER.pack(HOST, cid, source, target, octets, STREAM, RW, 0, buf_alloc, fwd_cnt))
            lens.append(SIZE + octets)
            left -= octets
            if not left:
                break
        used = len(lens)
        rx.use(heads[:used], lens[:-1], lens[-1])
        connection.sent(count)
        # As many as are likely to be filled: laying out what stays empty is half of the work for a short message.
        if used == stream.pieces:
            stream.pieces = min(4 * used, MOST)
        else:
            stream.pieces = max(used + 1, FEWEST)
        counters = self._engine.counters
        counters[Count.INBOUND] += count
        counters[Count.PACKETS_INBOUND] += used


def _split(chain: list[memoryview]) -> tuple[bytes, list[memoryview]]:
    """The header of a packet whose first descriptor does not hold it all, and what is behind it."""
    octets = b""
    for number, view in enumerate(chain):
        missing = SIZE - len(octets)
        octets += view[:missing]
        if len(octets) == SIZE:
            return octets, [view[missing:], *chain[number + 1 :]]
    return octets, []


def _behind_header(chain: list[memoryview], size: int) -> list[memoryview]:
    """Room for `size` octets behind that for the header. The chain has so much."""
    found = []
    skipped = SIZE
    for view in chain:
        if skipped < len(view):
            piece = view[skipped : skipped + size]
            found.append(piece)
            size -= len(piece)
            if not size:
                break
        skipped = max(skipped - len(view), 0)
    return found


def _write(chain: list[memoryview], octets: bytes) -> None:
    """At the beginning of a chain, which is long enough."""
    for view in chain:
        size = min(len(view), len(octets))
        view[:size] = octets[:size]
        octets = octets[size:]
        if not octets:
            return
