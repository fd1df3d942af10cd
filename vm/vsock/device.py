"""virtio-vsock on vhost-user: a guest's rings on one side, host sockets on the other (virtio 1.2, 5.10).

Rings by number: 0 is what the guest receives by, 1 what it transmits by, 2 is for events (QEMU keeps that one for itself). Work is
done in turns, after whatever happened: the guest's packets are taken, the guest is told what is due, waiting sockets are read
(`datapath`). Where the guest has no buffers, sockets are not read; what a socket does not take is held, and the guest's credit with
it (`stream`, `connection`).

A driver that begins anew, and one whose rings were found to be broken, lose all connections. Rings that only stop and go on where
they were, as when a machine is paused, lose none. Rings that have been used before and are new to us belong to a guest that
remembers connections of somebody before us: it is told to forget them (TRANSPORT_RESET), by the event ring where we have that, and
by RST for whatever it sends. (QEMU's vhost-user-vsock takes no second connection; there the card is unplugged and plugged in.)
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, TypeAlias, assert_never

from netstack.link.vhost_user import vanish
from netstack.link.vhost_user.device import EVENT_IDX, INDIRECT_DESC, VERSION_1, Device, warn
from netstack.link.vhost_user.memory import Broken
from netstack.link.vhost_user.messages import ProtocolFeature
from netstack.link.vhost_user.ring import SplitQueue
from vm.vsock.connection import Connection, State
from vm.vsock.datapath import DataPath
from vm.vsock.engine import LIMIT, Asked, Closed, Engine, Opened, Room, Shut
from vm.vsock.packet import TRANSPORT_RESET
from vm.vsock.poller import Poller
from vm.vsock.stream import Stream

RX, TX, EVENTS = 0, 1, 2
FEATURES: Final = 1 << INDIRECT_DESC | 1 << EVENT_IDX | 1 << VERSION_1
"""VIRTIO_VSOCK_F_SEQPACKET is not among them: the host's conventions have no way to ask for it."""
PROTOCOL: Final = (
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.CONFIG,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.STATUS,
)
ROUNDS: Final = 8
"""Of both directions in one turn; then everybody else has theirs."""

Answer: TypeAlias = Callable[[socket.socket | None], None]
Dial: TypeAlias = Callable[[int, Answer], None]
"""`dial(port, answer)`: connect to the host's service of a port, and say `answer(socket)`, or `answer(None)` where there is none;
once, at once or later."""


class VsockDevice(Device):
    """See the module. `cid` is the guest's; `now` is a clock that never goes back, `first_port` as for `Engine`.

    `poller` is to call `turn` after each batch of news.
    """

    def __init__(
        self,
        name: str,
        cid: int,
        poller: Poller,
        dial: Dial,
        *,
        now: Callable[[], float],
        first_port: int,
        limit: int = LIMIT,
        complain: Callable[[str, str], None] = warn,
    ) -> None:
        super().__init__(name, features=FEATURES, queues=3, queue_number=3, protocol=PROTOCOL, complain=complain)
        self.cid = cid
        self.engine = Engine(cid, first_port=first_port, limit=limit)
        self.streams: dict[Stream, None] = {}
        """All that are open, the oldest first: those of connections, and those that only empty what they hold."""
        self.kicked = 0
        """How often the guest told us of something."""
        self._limit = limit
        self._poller = poller
        self._dial = dial
        self._now = now
        self._path: DataPath | None = None
        self._event_queue: SplitQueue | None = None
        self._watched: set[int] = set()
        self._places: tuple[int, int] | None = None
        """Where the rings were when they stopped."""
        self._reset_owed = False
        """The guest is to be told to forget its connections."""

    def config(self) -> bytes:
        return self.cid.to_bytes(8, "little")

    @property
    def running(self) -> bool:
        """The guest's driver is there."""
        return self._path is not None

    # The host.

    def connect(self, port: int, sock: socket.socket, greeting: Callable[[int], bytes]) -> bool:
        """Connect `sock`, which becomes ours, to the guest's `port`. It is closed when the guest refuses; `greeting(host port)` is
        what it is told first when it does not. False, and the socket is still the caller's, where that cannot be."""
        connection = self.engine.connect(port, self._now()) if self.running and self._make_room() else None
        if connection is None:
            return False
        self._adopt(connection, sock, greeting(connection.host_port))
        self._poller.wake()
        return True

    def _asked(self, connection: Connection) -> None:
        """The guest wants a service of the host."""

        def answer(sock: socket.socket | None) -> None:
            if connection.state is not State.DIALLING:
                if sock is not None:
                    sock.close()
            elif sock is None:
                self.engine.refuse(connection)
            elif self._make_room():
                self._adopt(connection, sock, b"")
                self.engine.accept(connection)
            else:
                sock.close()
                self.engine.refuse(connection)
            self._poller.wake()

        self._dial(connection.host_port, answer)

    def _make_room(self) -> bool:
        """For one more stream: the oldest that only empties what it holds goes first."""
        if len(self.streams) >= self._limit:
            for stream in self.streams:
                if stream.draining:
                    self._drop(stream)
                    return True
        return len(self.streams) < self._limit

    def _adopt(self, connection: Connection, sock: socket.socket, greeting: bytes) -> None:
        stream = Stream(
            sock, connection, wants_turn=self._wants_turn, lost=self._lost, ended=self._drop, greeting=greeting
        )
        connection.owner = stream
        self.streams[stream] = None
        self._poller.watch(sock.fileno(), stream.ready)

    def _wants_turn(self, stream: Stream) -> None:
        if self._path is not None:
            self._path.wants_turn(stream)

    def _lost(self, stream: Stream) -> None:
        """The host has cut the connection off, or given up waiting."""
        self.engine.close(stream.connection)
        self._drop(stream)

    def _drop(self, stream: Stream) -> None:
        self._poller.unwatch(stream.sock.fileno())
        self.streams.pop(stream, None)
        stream.close()

    # Turns.

    def turn(self) -> None:
        """Do what there is to do; harmless when there is nothing."""
        self._dispatch()
        path = self._path
        if path is None:
            return
        try:
            if vanish.happened and self.memory.vanished:
                raise Broken("the guest's memory was cut off")
            if self._reset_owed:
                self._tell_reset()
            for _ in range(ROUNDS):
                more = path.outbound()
                if not path.inbound() and not more:
                    return
            self._poller.wake()
        except Broken as error:
            self.stop_by_itself(str(error))

    def tick(self) -> None:
        """To be called every second or so, for what is given up after a time."""
        self.engine.timeout(self._now())
        self.turn()

    def _dispatch(self) -> None:
        events = self.engine.events
        while events:
            event = events.popleft()
            stream = event.connection.owner
            if isinstance(event, Asked):
                self._asked(event.connection)
            elif not isinstance(stream, Stream) or not stream.open:
                pass  # it was closed before anybody had a socket for it
            elif isinstance(event, Opened):
                stream.greet()
            elif isinstance(event, Room):
                self._wants_turn(stream)
            elif isinstance(event, Shut):
                stream.flush()
                stream.guest_shuts()
            elif isinstance(event, Closed):
                stream.finish()
            else:
                assert_never(event)

    def _tell_reset(self) -> None:
        queue = self._event_queue
        if queue is None or not queue.waiting():
            return
        head = queue.first()
        chain = queue.walk(head, writable=True)
        if not chain or len(chain[0]) < len(TRANSPORT_RESET):
            raise Broken("the event ring: a buffer that is too small for an event")
        chain[0][: len(TRANSPORT_RESET)] = TRANSPORT_RESET
        queue.used_next(head, len(TRANSPORT_RESET))
        queue.publish()
        self._reset_owed = False

    # Rings.

    def rings_changed(self) -> None:
        queues = [self._running(number) for number in (RX, TX, EVENTS)]
        rx, tx, self._event_queue = queues
        if self.broken:
            rx = None
        path = self._path
        if path is not None and (path.rx is not rx or path.tx is not tx):
            self._places = (path.rx.next, path.tx.next) if not self.broken else None
            self._path = None
        if rx is not None and tx is not None and self._path is None:
            self._begin(rx, tx)
        if not self.rings or self.broken:
            self._forget_all()
        self._watch()

    def _running(self, number: int) -> SplitQueue | None:
        ring = self.rings.get(number)
        return ring.queue if ring is not None and ring.runs else None

    def _begin(self, rx: SplitQueue, tx: SplitQueue) -> None:
        places = rx.next, tx.next
        if places != self._places:
            self._forget_all()
            self._reset_owed = places != (0, 0)
        self._path = DataPath(self.engine, rx, tx, self._dispatch, self._now)
        for stream in self.streams:
            if stream.readable:
                self._path.wants_turn(stream)
        self._poller.wake()

    def _forget_all(self) -> None:
        """The guest knows of no connection any more."""
        self._places = None
        self.engine.drop_all()
        self._dispatch()

    def _watch(self) -> None:
        """Kick descriptors come and go with the rings."""
        wanted: set[int] = set()
        if self._path is not None or self._event_queue is not None:
            wanted = {ring.kick for ring in self.rings.values() if ring.queue is not None and ring.kick >= 0}
        for descriptor in self._watched - wanted:
            self._poller.unwatch(descriptor)
        for descriptor in wanted - self._watched:
            self._poller.watch(descriptor, self._kick)
        self._watched = wanted

    def _kick(self, _mask: int) -> None:
        self.kicked += 1
        if self._path is not None:
            self._path.rx.hush()

    def close(self, reason: str) -> None:
        super().close(reason)
        self._forget_all()
        for stream in list(self.streams):
            self._drop(stream)

    def describe(self) -> dict[str, object]:
        """For status pages."""
        return {
            "cid": self.cid,
            "running": self.running,
            "connections": len(self.engine.connections),
            "streams": len(self.streams),
            "held": sum(one.held for one in self.engine.connections.values()),
            "memory": self.memory.describe(),
            "kicks": self.kicked,
            "calls": sum(ring.queue.calls for ring in self.rings.values() if ring.queue is not None),
            **{str(name): value for name, value in sorted(self.engine.counters.items())},
        }
