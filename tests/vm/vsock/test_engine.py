"""The engine by scripts: what a guest says, and what it is told (virtio 1.2, 5.10.6)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm.vsock import engine as engine_module
from vm.vsock import packet
from vm.vsock.connection import Connection, State
from vm.vsock.engine import (
    BUF_ALLOC,
    CLOSE_S,
    CONNECT_S,
    FIRST_PORT,
    LAST_PORT,
    Asked,
    Closed,
    Count,
    Engine,
    Opened,
    Room,
    Shut,
)
from vm.vsock.packet import (
    CREDIT_REQUEST,
    CREDIT_UPDATE,
    NO_MORE,
    NO_MORE_RECEIVE,
    NO_MORE_SEND,
    REQUEST,
    RESPONSE,
    RST,
    RW,
    SHUTDOWN,
    Header,
)

GUEST, HOST = 3, 2
GUEST_PORT, SERVICE = 1024, 5000


class Script:
    """A guest's side of the engine: says packets, reads what is due. `buf_alloc` octets of credit for the host."""

    def __init__(self, **options: int) -> None:
        self.engine = Engine(GUEST, first_port=FIRST_PORT, **options)
        self.now = 0.0
        self.buf_alloc = 1000
        self.fwd_cnt = 0

    def says(
        self,
        op: int,
        length: int = 0,
        flags: int = 0,
        *,
        src: int = GUEST_PORT,
        dst: int = SERVICE,
        cids: tuple[int, int] = (GUEST, HOST),
        kind: int = packet.STREAM,
        there: int | None = None,
    ) -> Connection | None:
        header = Header(*cids, src, dst, length, kind, op, flags, self.buf_alloc, self.fwd_cnt)
        key = packet.emit(header)[16:24]
        return self.engine.arrives(header, key, length if there is None else there, self.now)

    def hears(self) -> list[tuple[int, int]]:
        """`(op, flags)` of all packets that are due."""
        return [(header.op, header.flags) for header in self.headers()]

    def headers(self) -> list[Header]:
        found = []
        while (octets := self.engine.next_packet(self.now)) is not None:
            found.append(packet.parse(octets))
        return found

    def events(self) -> list[engine_module.Event]:
        found = list(self.engine.events)
        self.engine.events.clear()
        return found

    def open(self, **ports: int) -> Connection:
        """By the guest."""
        self.says(REQUEST, **ports)
        (asked,) = self.events()
        assert isinstance(asked, Asked)
        self.engine.accept(asked.connection)
        assert self.hears() == [(RESPONSE, 0)]
        return asked.connection

    def count(self, count: Count) -> int:
        return self.engine.counters[count]


@pytest.fixture
def script() -> Script:
    return Script()


# Begin.


def test_a_request_of_the_guest_is_answered_when_the_host_has_answered(script: Script) -> None:
    script.says(REQUEST)
    (asked,) = script.events()
    assert isinstance(asked, Asked) and asked.connection.host_port == SERVICE
    assert script.hears() == []
    script.engine.accept(asked.connection)
    (response,) = script.headers()
    assert response[:8] == (HOST, GUEST, SERVICE, GUEST_PORT, 0, packet.STREAM, RESPONSE, 0)
    assert response.buf_alloc == BUF_ALLOC
    assert asked.connection.room() == 1000


def test_a_guest_is_refused_with_rst(script: Script) -> None:
    script.says(REQUEST)
    (asked,) = script.events()
    script.engine.refuse(asked.connection)
    assert script.hears() == [(RST, 0)] and not script.engine.connections
    script.engine.accept(asked.connection)  # too late, and harmless
    assert script.hears() == [] and script.count(Count.REFUSED_BY_HOST) == 1


def test_the_host_asks_and_the_guest_takes_it(script: Script) -> None:
    connection = script.engine.connect(2376, 0.0)
    assert connection is not None and connection.host_port == FIRST_PORT + 1
    (request,) = script.headers()
    assert request[:8] == (HOST, GUEST, FIRST_PORT + 1, 2376, 0, packet.STREAM, REQUEST, 0)
    script.says(RESPONSE, src=2376, dst=FIRST_PORT + 1)
    assert script.events() == [Opened(connection)] and connection.room() == 1000
    script.now = CONNECT_S + 1
    script.engine.timeout(script.now)
    assert connection.state is State.OPEN


def test_the_host_asks_and_the_guest_refuses(script: Script) -> None:
    connection = script.engine.connect(2376, 0.0)
    assert connection is not None and script.hears() == [(REQUEST, 0)]
    script.says(RST, src=2376, dst=FIRST_PORT + 1)
    assert script.events() == [Closed(connection, Count.REFUSED_BY_GUEST)]
    assert script.hears() == []  # RST is never answered


def test_a_guest_that_does_not_answer_is_given_up(script: Script) -> None:
    connection = script.engine.connect(2376, 0.0)
    assert connection is not None and script.hears() == [(REQUEST, 0)]
    script.engine.timeout(CONNECT_S - 0.1)
    assert not script.events()
    script.engine.timeout(CONNECT_S)
    assert script.events() == [Closed(connection, Count.RESET_TIMEOUT)] and script.hears() == [(RST, 0)]


def test_a_host_that_gives_up_before_the_request_left_leaves_no_trace(script: Script) -> None:
    connection = script.engine.connect(2376, 0.0)
    assert connection is not None
    script.engine.close(connection)
    assert script.hears() == [] and not script.engine.connections and not script.events()


def test_a_guest_that_takes_nothing_makes_nothing_pile_up(script: Script) -> None:
    for number in range(3):
        script.now = number * CONNECT_S
        assert script.engine.connect(2376, script.now) is not None
        script.engine.timeout(script.now + CONNECT_S)
    assert script.count(Count.RESET_TIMEOUT) == 3 and script.hears() == []


def test_ports_of_the_host_begin_again_and_are_never_used_twice_at_once() -> None:
    script = Script()
    script.engine = Engine(GUEST, first_port=LAST_PORT - 1)
    ports = [connection.host_port for _ in range(3) if (connection := script.engine.connect(1, 0.0))]
    assert ports == [LAST_PORT, FIRST_PORT, FIRST_PORT + 1]
    script.engine._port = LAST_PORT - 1
    again = script.engine.connect(1, 0.0)
    assert again is not None and again.host_port == FIRST_PORT + 2


def test_more_connections_than_there_may_be_are_refused_both_ways() -> None:
    script = Script(limit=2)
    script.open()
    script.open(src=1025)
    script.says(REQUEST, src=1026)
    assert script.hears() == [(RST, 0)] and not script.events()
    assert script.engine.connect(1, 0.0) is None
    assert script.count(Count.REFUSED_LIMIT) == 2


# What belongs to nothing.


@pytest.mark.parametrize("op", [RESPONSE, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 0, 99])
def test_a_packet_without_a_connection_is_answered_with_rst(script: Script, op: int) -> None:
    assert script.says(op, 10) is None
    (reset,) = script.headers()
    assert reset[:8] == (HOST, GUEST, SERVICE, GUEST_PORT, 0, packet.STREAM, RST, 0)


def test_rst_without_a_connection_is_not_answered(script: Script) -> None:
    script.says(RST)
    assert script.hears() == []


def test_another_guests_address_is_not_answered(script: Script) -> None:
    script.says(REQUEST, cids=(4, HOST))
    assert script.hears() == [] and not script.events() and script.count(Count.WRONG_CID) == 1


def test_another_host_than_us_is_refused(script: Script) -> None:
    script.says(REQUEST, cids=(GUEST, 7))
    (reset,) = script.headers()
    assert (reset.src_cid, reset.dst_cid, reset.op) == (7, GUEST, RST) and not script.events()


@pytest.mark.parametrize("kind", [0, packet.SEQPACKET, 3])
def test_another_type_than_streams_is_refused_in_kind(script: Script, kind: int) -> None:
    script.says(REQUEST, kind=kind)
    (reset,) = script.headers()
    assert (reset.type, reset.op) == (kind, RST)


def test_a_guest_that_takes_no_answers_is_not_listened_to(script: Script) -> None:
    for number in range(engine_module.REPLIES):
        assert not script.engine.full
        script.says(RW, src=number)
    assert script.engine.full
    script.engine.next_packet(0.0)
    assert not script.engine.full


# Octets and credit.


def test_octets_count_until_the_host_has_taken_them(script: Script) -> None:
    connection = script.open()
    assert script.says(RW, 100) is connection and connection.held == 100
    connection.taken(100)
    assert connection.held == 0 and script.hears() == []
    assert script.says(RW, BUF_ALLOC) is connection
    connection.taken(BUF_ALLOC // 2)
    (update,) = script.headers()
    assert (update.op, update.fwd_cnt) == (CREDIT_UPDATE, BUF_ALLOC // 2 + 100)


def test_more_octets_than_there_is_credit_for_end_the_connection(script: Script) -> None:
    connection = script.open()
    assert script.says(RW, BUF_ALLOC) is connection
    assert script.says(RW, 1) is None
    assert script.events() == [Closed(connection, Count.RESET_CREDIT)] and script.hears() == [(RST, 0)]


def test_credit_is_told_to_who_asks(script: Script) -> None:
    connection = script.open()
    script.says(RW, 10)
    connection.taken(10)
    script.says(CREDIT_REQUEST)
    (update,) = script.headers()
    assert (update.op, update.buf_alloc, update.fwd_cnt) == (CREDIT_UPDATE, BUF_ALLOC, 10)


def test_octets_that_leave_carry_the_credit_and_no_update_is_needed(script: Script) -> None:
    connection = script.open()
    script.says(RW, BUF_ALLOC)
    connection.taken(BUF_ALLOC)
    connection.sent(1)
    assert script.hears() == []


def test_no_more_is_sent_than_the_guest_has_room_for(script: Script) -> None:
    connection = script.open()
    connection.sent(900)
    assert connection.room() == 100
    connection.sent(100)
    assert connection.room() == 0
    connection.starves()
    connection.starves()
    assert script.hears() == [(CREDIT_REQUEST, 0)]  # once
    script.fwd_cnt = 1000
    script.says(CREDIT_UPDATE)
    assert script.events() == [Room(connection)] and connection.room() == 1000


@pytest.mark.parametrize(("buf_alloc", "fwd_cnt"), [(0, 0), (10, 0xFFFFFFFF), (0xFFFFFFFF, 5)])
def test_a_guest_that_lies_about_its_room_gets_nothing_or_what_it_said(
    script: Script, buf_alloc: int, fwd_cnt: int
) -> None:
    connection = script.open()
    script.buf_alloc, script.fwd_cnt = buf_alloc, fwd_cnt
    script.says(CREDIT_UPDATE)
    assert 0 <= connection.room() <= buf_alloc


def test_counts_go_round(script: Script) -> None:
    connection = script.open()
    connection.tx_cnt = connection.peer_fwd_cnt = connection.rx_cnt = connection.fwd_cnt = connection._told = 0xFFFFFFF0
    script.fwd_cnt = 0xFFFFFFF0
    assert script.says(RW, 100) is connection and connection.held == 100
    connection.taken(100)
    connection.sent(100)
    assert (connection.room(), connection.held, connection.fwd_cnt) == (900, 0, 84)


def test_a_header_that_promises_more_than_there_is_ends_the_connection(script: Script) -> None:
    connection = script.open()
    assert script.says(RW, 100, there=99) is None
    assert script.events() == [Closed(connection, Count.RESET_PROTOCOL)] and script.hears() == [(RST, 0)]


# End.


def test_half_closes_of_the_guest_are_told_one_by_one(script: Script) -> None:
    connection = script.open()
    script.says(SHUTDOWN, flags=NO_MORE_SEND)
    assert script.events() == [Shut(connection)] and connection.guest_shut == NO_MORE_SEND
    assert connection.room() == 1000 and script.hears() == []
    script.says(SHUTDOWN, flags=NO_MORE_RECEIVE)
    assert script.events() == [Closed(connection, Count.CLOSED_BY_GUEST)]
    assert script.hears() == [(RST, 0)] and connection.room() == 0


def test_octets_behind_the_guests_end_are_its_fault(script: Script) -> None:
    connection = script.open()
    script.says(SHUTDOWN, flags=NO_MORE_SEND)
    script.events()
    assert script.says(RW, 1) is None
    assert script.events() == [Closed(connection, Count.RESET_PROTOCOL)]


def test_half_closes_of_the_host_add_up(script: Script) -> None:
    connection = script.open()
    connection.host_shuts(NO_MORE_SEND)
    assert script.hears() == [(SHUTDOWN, NO_MORE_SEND)]
    connection.host_shuts(NO_MORE_SEND)
    assert script.hears() == []
    connection.host_shuts(NO_MORE_RECEIVE)
    assert script.hears() == [(SHUTDOWN, NO_MORE)]
    script.says(RST)
    assert script.events() == [Closed(connection, Count.RESET_BY_GUEST)] and script.hears() == []


def test_a_guest_that_does_not_confirm_the_end_is_given_up(script: Script) -> None:
    connection = script.open()
    script.now = 5.0
    connection.host_shuts(NO_MORE)
    assert script.hears() == [(SHUTDOWN, NO_MORE)]
    script.engine.timeout(5.0 + CLOSE_S)
    assert script.events() == [Closed(connection, Count.RESET_TIMEOUT)] and script.hears() == [(RST, 0)]


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, 0, 77])
def test_what_makes_no_sense_on_an_open_connection_ends_it(script: Script, op: int) -> None:
    connection = script.open()
    script.says(op)
    assert script.events() == [Closed(connection, Count.RESET_PROTOCOL)] and script.hears() == [(RST, 0)]


@pytest.mark.parametrize("op", [REQUEST, RESPONSE, RW, SHUTDOWN])
def test_a_guest_that_does_not_wait_for_the_answer_is_reset(script: Script, op: int) -> None:
    script.says(REQUEST)
    (asked,) = script.events()
    script.says(op)
    assert script.events() == [Closed(asked.connection, Count.RESET_PROTOCOL)] and script.hears() == [(RST, 0)]
    script.engine.accept(asked.connection)
    assert script.hears() == []


def test_the_end_of_a_connection_does_not_disturb_the_next_one_with_its_ports(script: Script) -> None:
    before = script.open()
    script.says(RW, BUF_ALLOC)
    script.says(SHUTDOWN, flags=NO_MORE)
    assert script.hears() == [(RST, 0)]
    script.events()
    after = script.open()
    before.taken(BUF_ALLOC)  # the host's socket empties itself meanwhile
    assert script.hears() == [] and script.engine.connections == {after.key: after}


def test_a_guest_that_begins_anew_has_no_connections_and_is_told_nothing(script: Script) -> None:
    connection = script.open()
    script.says(RW, src=9)
    script.engine.connect(1, 0.0)
    script.engine.drop_all()
    closed = script.events()
    assert len(closed) == 2 and Closed(connection, Count.RESET_TRANSPORT) in closed
    assert script.hears() == [] and not script.engine.has_packets


# Anything at all.

OPS = st.sampled_from([0, REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST, 99])
SAID = st.tuples(
    OPS, st.integers(1, 4), st.sampled_from([0, 1, 300_000]), st.integers(0, 3), st.sampled_from([0, 5, 0xFFFFFFFF])
)
DONE = st.sampled_from(["connect", "close", "accept", "refuse", "sent", "taken", "shuts", "timeout", "hear", "starve"])


@given(st.lists(SAID | DONE, max_size=60))
def test_any_guest_and_any_host_leave_the_engine_in_order(steps: list[tuple[int, int, int, int, int] | str]) -> None:
    """Never an exception, never more than the limits; each connection ends once, and with nothing left to say."""
    script = Script(limit=4)
    seen: list[Connection] = []
    closed: list[Connection] = []
    for step in steps:
        live = list(script.engine.connections.values())
        if isinstance(step, tuple):
            op, src, length, flags, script.fwd_cnt = step
            script.buf_alloc = length
            connection = script.says(op, length, flags, src=src)
            assert connection is None or connection.held <= BUF_ALLOC
        elif step == "connect":
            script.engine.connect(1, script.now)
        elif step == "timeout":
            script.now += CONNECT_S
            script.engine.timeout(script.now)
        elif step == "hear":
            script.engine.next_packet(script.now)
        for connection in live if isinstance(step, str) else ():
            if step == "close":
                script.engine.close(connection)
                closed.append(connection)
            elif step == "accept":
                script.engine.accept(connection)
            elif step == "refuse" and connection.state is State.DIALLING:
                script.engine.refuse(connection)
                closed.append(connection)
            elif step == "sent" and connection.state is State.OPEN:
                connection.sent(connection.room())
            elif step == "taken":
                connection.taken(connection.held)
            elif step == "shuts" and connection.state is State.OPEN:
                connection.host_shuts(NO_MORE_SEND)
            elif step == "starve" and connection.state is State.OPEN and not connection.room():
                connection.starves()
        seen += [one for one in script.engine.connections.values() if one not in seen]
        closed += [event.connection for event in script.events() if isinstance(event, Closed)]
        assert len(script.engine.connections) <= 4
        assert all(0 <= one.room() <= one.peer_buf_alloc for one in script.engine.connections.values())
    live = list(script.engine.connections.values())
    assert len(closed) == len(set(closed)) and {*closed, *live} == set(seen)
    said = script.headers()
    assert len(said) <= 3 * (len(steps) * 4 + 1)
    script.engine.drop_all()
    assert script.headers() == []
