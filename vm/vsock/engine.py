"""All connections of one guest over vsock, without I/O (virtio 1.2, 5.10.6).

Theory of operation. The device feeds the guest's packets (`arrives`), the host's side dials in (`connect`) and answers the guest's
requests (`accept`, `refuse`). What came of it is in `events`, to be dispatched before the next packet, so that octets and
half-closes keep their order. `next_packet` hands out the control packets that are due; packets with payload are made by the device,
which knows how much fits into the guest's buffers.

RST is never answered. Packets without a connection are answered with RST, and those RSTs wait in a queue of `REPLIES`; when it is
full (`full`) the device takes no more packets until the guest makes room for answers (5.10.6.1.2). RSTs of connections wait there
too, one each at most: a connection whose REQUEST has not left vanishes without.

When the guest closes, the connection is forgotten at once and RST confirms that, as 5.10.6.5 asks; what the host has not taken
by then stays with whoever has the socket. A host that is gone altogether is told to the guest by SHUTDOWN with both flags; if the
guest does not confirm it within `CLOSE_S`, RST ends it.
"""

from __future__ import annotations

from collections import Counter, deque
from enum import StrEnum
from struct import Struct
from typing import Final, NamedTuple

from vm.vsock import packet
from vm.vsock.connection import Connection, State
from vm.vsock.packet import HOST, NO_MORE, NO_MORE_SEND, RST, STREAM, Header

LIMIT: Final = 1024
"""Connections of one guest, whoever began them; one more is refused."""
BUF_ALLOC: Final = 256 << 10
"""Octets that one connection's guest may send ahead of its host; Linux has the same default. Times `LIMIT` it is the most that a
guest can make us hold."""
REPLIES: Final = 256
"""RSTs for packets without a connection that wait for room in the guest's ring."""
CONNECT_S: Final = 10.0
"""How long the guest has to answer REQUEST. Linux answers at once, and gives its own connects 2 s."""
CLOSE_S: Final = 8.0
"""How long the guest has to confirm that the host is gone; VSOCK_CLOSE_TIMEOUT of Linux."""
FIRST_PORT: Final = 1 << 30
"""Of the host's ports for its own connections; below are those that services have."""
LAST_PORT: Final = (1 << 31) - 1
_KEY: Final = Struct("<II")
_FULL_TURN: Final = LAST_PORT - FIRST_PORT + 1


class Count(StrEnum):
    """What is counted. The text is the counter's public name."""

    FROM_GUEST = "connections_from_guest"
    TO_GUEST = "connections_to_guest"
    REFUSED_BY_GUEST = "refused_by_guest"
    REFUSED_BY_HOST = "refused_by_host"
    REFUSED_LIMIT = "refused_limit"
    RESET_BY_GUEST = "reset_by_guest"
    RESET_PROTOCOL = "reset_protocol"
    RESET_CREDIT = "reset_credit"
    RESET_TIMEOUT = "reset_timeout"
    RESET_TRANSPORT = "reset_transport"
    CLOSED_BY_GUEST = "closed_by_guest"
    UNKNOWN = "packets_without_connection"
    WRONG_CID = "packets_wrong_cid"
    MALFORMED = "packets_malformed"
    OUTBOUND = "octets_outbound"
    INBOUND = "octets_inbound"
    PACKETS_OUTBOUND = "packets_outbound"
    PACKETS_INBOUND = "packets_inbound"
    BUFFERS_SMALL = "buffers_too_small"


class Asked(NamedTuple):
    """The guest wants a connection to the host's port `connection.host_port`."""

    connection: Connection


class Opened(NamedTuple):
    """The guest has taken the host's connection."""

    connection: Connection


class Shut(NamedTuple):
    """The guest has said SHUTDOWN; see `connection.guest_shut`."""

    connection: Connection


class Room(NamedTuple):
    """The guest can take octets again (after `Connection.starves`)."""

    connection: Connection


class Closed(NamedTuple):
    """The connection is gone. What the host has not taken yet was sent before that, and is still its."""

    connection: Connection
    why: Count


Event = Asked | Opened | Shut | Room | Closed


class Engine:
    """See the module. `first_port` is a number by chance from `FIRST_PORT` to `LAST_PORT`: a guest may remember ports of
    somebody before us. `now` is seconds on a clock that never goes back."""

    def __init__(self, guest_cid: int, *, first_port: int, limit: int = LIMIT, buf_alloc: int = BUF_ALLOC) -> None:
        self.guest_cid = guest_cid
        self.limit = limit
        self.buf_alloc = buf_alloc
        self.connections: dict[bytes, Connection] = {}
        """By `Connection.key`: octets, for a guest chooses half of it, and numbers it could choose to collide."""
        self.events: deque[Event] = deque()
        self.counters: Counter[Count] = Counter()
        self._resets: deque[Header] = deque()
        self._talkers: dict[bytes, Connection] = {}
        """Connections that may have something to say, in order."""
        self._port = first_port

    # The guest.

    @property
    def full(self) -> bool:
        """The guest does not take our answers: no more packets are to be taken from it."""
        return len(self._resets) >= REPLIES

    def arrives(self, header: Header, key: bytes, payload: int, now: float) -> Connection | None:
        """A packet with `payload` octets behind its header; `key` is octets 16 to 24 of that. The connection whose host gets the
        first `header.length` of them, None where nobody does."""
        op = header.op
        if header.src_cid != self.guest_cid:
            self.counters[Count.WRONG_CID] += 1  # "discard", 5.10.6.4.1: nobody else's answers to this guest
            return None
        if header.dst_cid != HOST or header.type != STREAM:
            self.counters[Count.WRONG_CID if header.dst_cid != HOST else Count.UNKNOWN] += 1
            self._reply(header)
            return None
        connection = self.connections.get(key)
        if connection is None:
            if op == packet.REQUEST:
                self._requested(header, key)
            else:
                self.counters[Count.UNKNOWN] += 1
                self._reply(header)
            return None
        if connection.credit(header):
            self.events.append(Room(connection))
        if op == packet.RW and connection.state is State.OPEN and not connection.guest_shut & NO_MORE_SEND:
            if header.length > payload:
                self.counters[Count.MALFORMED] += 1
                self._end(connection, Count.RESET_PROTOCOL)
                return None
            if connection.payload_arrives(header.length):
                return connection
            self._end(connection, Count.RESET_CREDIT)
        elif op == packet.CREDIT_UPDATE:
            pass
        elif op == packet.CREDIT_REQUEST:
            connection.credit_asked()
        elif op == packet.RESPONSE and connection.state is State.CONNECTING:
            connection.state = State.OPEN
            connection.deadline = None
            self.counters[Count.TO_GUEST] += 1
            self.events.append(Opened(connection))
        elif op == packet.RST:
            refused = connection.state is State.CONNECTING
            self._forget(connection, Count.REFUSED_BY_GUEST if refused else Count.RESET_BY_GUEST)
        elif op == packet.SHUTDOWN and connection.state is State.OPEN:
            connection.guest_shut |= header.flags & NO_MORE
            if connection.guest_shut == NO_MORE:
                self._end(connection, Count.CLOSED_BY_GUEST)
            else:
                self.events.append(Shut(connection))
        else:
            self._end(connection, Count.RESET_PROTOCOL)
        return None

    def _requested(self, header: Header, key: bytes) -> None:
        if len(self.connections) >= self.limit:
            self.counters[Count.REFUSED_LIMIT] += 1
            self._reply(header)
            return
        connection = self._add(key, header.src_port, header.dst_port, State.DIALLING)
        connection.credit(header)
        self.events.append(Asked(connection))

    # The host.

    def connect(self, guest_port: int, now: float) -> Connection | None:
        """Ask the guest for a connection to its port; `Opened` or `Closed` tells what came of it. None at the limit."""
        if len(self.connections) >= self.limit:
            self.counters[Count.REFUSED_LIMIT] += 1
            return None
        key = self._free_key(guest_port)
        connection = self._add(key, guest_port, self._port, State.CONNECTING)
        connection.deadline = now + CONNECT_S
        return connection

    def _free_key(self, guest_port: int) -> bytes:
        """There are more ports than connections."""
        for _ in range(_FULL_TURN):
            self._port = self._port + 1 if self._port < LAST_PORT else FIRST_PORT
            key = _KEY.pack(guest_port, self._port)
            if key not in self.connections:
                return key
        raise AssertionError("every port is in use")

    def accept(self, connection: Connection) -> None:
        """The host's service has taken the guest's connection."""
        if connection.state is State.DIALLING:
            self.counters[Count.FROM_GUEST] += 1
            connection.answers()

    def refuse(self, connection: Connection) -> None:
        """There is no such service, or it does not want to."""
        if connection.state is State.DIALLING:
            self.counters[Count.REFUSED_BY_HOST] += 1
            self.close(connection)

    def close(self, connection: Connection) -> None:
        """Forget a connection and tell the guest, without an event: the host's side has ended it. Harmless when repeated."""
        known_to_guest = _known_to_guest(connection)
        if self._remove(connection) and known_to_guest:
            self._reset(connection)

    def drop_all(self, why: Count = Count.RESET_TRANSPORT) -> None:
        """The guest's driver began anew, or is gone: it remembers none of these."""
        for connection in list(self.connections.values()):
            self._forget(connection, why)
        self._resets.clear()

    def timeout(self, now: float) -> None:
        """End what waited for too long; to be called every second or so."""
        for connection in [
            one for one in self.connections.values() if one.deadline is not None and one.deadline <= now
        ]:
            self._end(connection, Count.RESET_TIMEOUT)

    # What the guest is told.

    def next_packet(self, now: float) -> bytes | None:
        """The next packet without payload that is due, which counts as sent."""
        if self._resets:
            return packet.emit(self._resets.popleft())
        while self._talkers:
            key = next(iter(self._talkers))
            connection = self._talkers[key]
            said = connection.next_op()
            if said is not None:
                if connection.shut_told == NO_MORE and connection.deadline is None:
                    connection.deadline = now + CLOSE_S
                return packet.emit(self._header(connection, *said))
            del self._talkers[key]
        return None

    @property
    def has_packets(self) -> bool:
        """Whether `next_packet` may have something; it may turn out to be nothing."""
        return bool(self._resets or self._talkers)

    def _header(self, connection: Connection, op: int, flags: int) -> Header:
        ports = connection.host_port, connection.guest_port
        return Header(HOST, self.guest_cid, *ports, 0, STREAM, op, flags, connection.buf_alloc, connection.fwd_cnt)

    def _due(self, connection: Connection) -> None:
        if connection.state is not State.CLOSED:  # its key may be somebody else's already
            self._talkers[connection.key] = connection

    def _reply(self, header: Header) -> None:
        """RST for a packet that belongs to nothing; for one that is RST itself nothing."""
        if header.op != RST:
            ends = header.dst_cid, header.src_cid, header.dst_port, header.src_port
            self._resets.append(Header(*ends, 0, header.type, RST, 0, 0, 0))

    def _reset(self, connection: Connection) -> None:
        self._resets.append(self._header(connection, RST, 0))

    # The table.

    def _add(self, key: bytes, guest_port: int, host_port: int, state: State) -> Connection:
        connection = Connection(key, guest_port, host_port, state, self.buf_alloc, self._due)
        self.connections[key] = connection
        if state is State.CONNECTING:
            self._due(connection)
        return connection

    def _remove(self, connection: Connection) -> bool:
        if connection.state is State.CLOSED:
            return False
        connection.state = State.CLOSED
        del self.connections[connection.key]
        self._talkers.pop(connection.key, None)
        return True

    def _forget(self, connection: Connection, why: Count) -> None:
        """Without a word to the guest."""
        if self._remove(connection):
            self.counters[why] += 1
            self.events.append(Closed(connection, why))

    def _end(self, connection: Connection, why: Count) -> None:
        known_to_guest = _known_to_guest(connection)
        self._forget(connection, why)
        if known_to_guest:
            self._reset(connection)


def _known_to_guest(connection: Connection) -> bool:
    """Whether it is to be told of the end: not if our REQUEST never left, for a guest that takes nothing would make us hold an RST
    for each."""
    return not (connection.fresh and connection.state is State.CONNECTING)
