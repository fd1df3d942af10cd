"""The multiplexer's rules (spec vpnkit 7.3.3), two engines face to face or one before a scripted peer."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netstack.errors import Malformed
from portfwd.carriers import Destination
from portfwd.mux.engine import (
    CLOSED,
    CREDIT,
    ENDED,
    FIRST_WINDOW,
    HIGH_WATER,
    LEAST_WINDOW,
    OCTETS,
    OVERRUN,
    Limits,
    Multiplexer,
    Role,
    TooManyChannels,
)
from portfwd.mux.frames import DEDICATED, HANDSHAKE, Close, Data, MuxError, Open, Shutdown, Window
from tests.portfwd.mux.pair import TARGET, End, pair, run, said


def vm(*, handshake: bool = False, **options: object) -> End:
    return End(Role.LISTENER, handshake=handshake, **options)  # type: ignore[arg-type]


def frames_of(end: End) -> list[str]:
    """What it said since the last look, as a script."""
    told = end.mux.dump().splitlines()
    end.mux._ring.clear()
    end.take()
    return [line.removeprefix("send ") for line in told if line.startswith("send ")]


# Ids.


@pytest.mark.parametrize(
    ("role", "expected"),
    [
        (Role.LISTENER, [0, 1, 2]),
        (Role.CONNECTOR, [0xFFFFFFFF, 0xFFFFFFFE, 0xFFFFFFFD]),
        (Role.OCAML, [0x7FFFFFFF, 0x80000000, 0x80000001]),
    ],
    ids=["listener", "connector", "ocaml"],
)
def test_each_side_has_ids_of_its_own(role: Role, expected: list[int]) -> None:
    mux = Multiplexer(role=role, handshake=False)
    assert [mux.open(TARGET).id for _ in range(3)] == expected


def test_ids_in_use_are_skipped_and_numbers_wrap() -> None:
    mux = Multiplexer(role=Role.CONNECTOR, handshake=False)
    mux._next = 1
    list(mux.receive(memoryview(said(Open(0xFFFFFFFF, TARGET), Open(0, TARGET)))))
    assert [mux.open(TARGET).id for _ in range(2)] == [1, 0xFFFFFFFE]


def test_both_sides_open_twenty_at_once() -> None:
    host, guest = pair()
    flows = [(host, host.open()) for _ in range(20)] + [(guest, guest.open()) for _ in range(20)]
    for end, flow in flows:
        end.say(flow, b"hello %d" % flow.id, end=True)
    run(host, guest, random.Random(1))
    assert len(host.opened) == len(guest.opened) == 20
    for end, flow in flows:
        other = guest if end is host else host
        assert other.received[flow.id] == b"hello %d" % flow.id


# Credit.


def test_an_opener_allows_65536_octets_and_so_does_who_accepts() -> None:
    host, guest = End(Role.OCAML, handshake=False), vm()
    flow = host.open()
    assert frames_of(host) == [f"{flow.id} Open tcp:10.0.0.1:80", f"{flow.id} Window 65536"]
    guest.accept = False
    guest.hear(said(Open(flow.id, TARGET), Window(flow.id, 65536)))
    assert frames_of(guest) == []
    guest.mux.accept(guest.opened[0])
    guest.mux.accept(guest.opened[0])
    assert frames_of(guest) == [f"{flow.id} Window 65536"]


def test_nothing_is_sent_without_credit() -> None:
    host = End(Role.OCAML, handshake=False)
    flow = host.open()
    assert host.mux.sendable(flow) == 0
    host.say(flow, bytes(100_000))
    assert host.left(flow) == 100_000
    host.hear(said(Window(flow.id, 10)))
    assert host.left(flow) == 99_990 and host.mux.sendable(flow) == 0
    host.hear(said(Window(flow.id, 5)))
    assert flow.credit == 10 and host.count(CREDIT, flow) == 1, "a Window that goes back says nothing"
    host.hear(said(Window(flow.id, 1 << 63)))
    host.take()
    assert host.left(flow) == 0


def test_credit_is_renewed_when_half_of_it_is_used_and_consumed() -> None:
    guest = vm(greedy=False, limits=Limits(window=FIRST_WINDOW))
    guest.hear(said(Open(1, TARGET)))
    (flow,) = guest.opened
    assert frames_of(guest) == ["1 Window 65536"]
    guest.hear(said(Data(1, 40_000), bytes(40_000)))
    assert frames_of(guest) == [], "not consumed: no new credit"
    guest.mux.consumed(flow, 32_767)
    assert frames_of(guest) == []
    guest.mux.consumed(flow, 1)
    assert frames_of(guest) == [f"1 Window {32_768 + 65_536}"]


def test_a_reader_that_keeps_up_gets_a_larger_window_and_a_slow_one_does_not() -> None:
    limits = Limits(window=1 << 18)
    for greedy, expected in ((True, 1 << 18), (False, FIRST_WINDOW)):
        guest = vm(greedy=greedy, limits=limits)
        guest.hear(said(Open(1, TARGET)))
        (flow,) = guest.opened
        for _ in range(20):
            octets = flow.granted - flow.received
            guest.hear(said(Data(1, octets), bytes(octets)))
            if not greedy:
                guest.mux.consumed(flow, octets // 2 + 1)
        assert flow.window == expected
        assert flow.granted - flow.consumed <= expected


def test_windows_stay_within_their_sum_and_grown_ones_shrink_again() -> None:
    limits = Limits(window=1 << 20, windows=1 << 20)
    guest = vm(limits=limits)

    def use(id: int) -> None:
        flow = guest.mux.flows[id]
        octets = flow.granted - flow.received
        guest.hear(said(Data(id, octets), bytes(octets)))

    guest.hear(said(Open(0, TARGET)))
    for _ in range(10):
        use(0)
    assert guest.mux.flows[0].window == 1 << 19, "half of all"
    guest.hear(said(*(Open(id, TARGET) for id in range(1, 40))))
    for _ in range(3):
        for id in range(40):
            use(id)
    windows = [flow.window for flow in guest.mux.flows.values()]
    assert max(windows) == FIRST_WINDOW and min(windows) >= LEAST_WINDOW
    assert sum(windows) == guest.mux._windows <= limits.windows + 40 * LEAST_WINDOW
    guest.hear(said(*(Close(id) for id in range(40))))
    assert guest.mux._windows == 0


def test_a_channel_without_credit_does_not_stop_another() -> None:
    host, guest = pair(greedy=False)
    stuck, other = host.open(), host.open()
    run(host, guest)
    host.say(stuck, bytes(1_000_000))
    run(host, guest)
    assert host.left(stuck) == 1_000_000 - 65_536
    host.say(other, b"through", end=True)
    run(host, guest)
    assert guest.received[other.id] == b"through"


def test_a_full_queue_lets_channels_wait_in_line() -> None:
    host = End(Role.OCAML, handshake=False)
    flows = [host.open() for _ in range(3)]
    host.hear(said(*(Window(flow.id, 1 << 40) for flow in flows)))
    for flow in flows:
        host.say(flow, bytes(300_000))
    assert [host.left(flow) for flow in flows] == [250_000, 300_000, 300_000]
    assert host.mux.queued < HIGH_WATER + 51_000
    for _ in range(3):
        host.take()
    assert [host.left(flow) for flow in flows] == [200_000, 250_000, 250_000], "one after the other"


def test_a_peer_that_ignores_its_credit_is_borne_up_to_a_bound() -> None:
    """VPNKit in OCaml does not count what it sent [Q]."""
    guest = vm(greedy=False, limits=Limits(overrun=100_000, overruns=150_000))
    guest.hear(said(Open(1, TARGET), Open(2, TARGET), Open(3, TARGET)))
    one, two, _three = guest.opened
    guest.hear(said(Data(1, 165_536), bytes(165_536)))
    assert len(guest.received[1]) == 165_536
    guest.mux.consumed(one, 165_536)
    assert guest.mux._overruns == 0
    guest.hear(said(Data(1, 300_000), bytes(300_000)))
    assert guest.count(OVERRUN, one) == 1 and one.closed
    assert guest.mux._overruns == 0, "what a closed channel held is forgotten"
    guest.hear(said(Data(2, 155_536), bytes(155_536)))
    assert guest.count(OVERRUN, two) == 0
    guest.hear(said(Data(3, 135_536), bytes(135_536)))
    assert guest.count(OVERRUN, guest.opened[2]) == 1, "the sum over all channels is exceeded"
    assert guest.mux.overran == 2
    guest.hear(said(Open(4, TARGET), Data(4, 5), b"alive"))
    assert guest.received[4] == b"alive"


# The end of a channel.


def test_connect_and_disconnect_frees_the_id() -> None:
    host, guest = pair()
    flow = host.open()
    run(host, guest)
    host.mux.close(flow)
    run(host, guest)
    assert not host.mux.flows and not guest.mux.flows


@pytest.mark.parametrize("first", ["close", "shutdown"])
@pytest.mark.parametrize("second", ["close", "shutdown"])
def test_closing_twice_says_it_once_and_both_ends_go_on(first: str, second: str) -> None:
    host, guest = pair()
    flow = host.open()
    run(host, guest)
    for _ in range(2):
        getattr(host.mux, first)(flow)
        getattr(host.mux, second)(flow)
    run(host, guest)
    told = guest.mux.dump()
    assert told.count(f"recv {flow.id} Close") == ("close" in (first, second))
    assert told.count(f"recv {flow.id} Shutdown") == (first == "shutdown")
    again = host.open()
    run(host, guest)
    host.say(again, b"alive", end=True)
    run(host, guest)
    assert guest.received[again.id] == b"alive"


def test_a_shutdown_leaves_the_other_direction() -> None:
    host, guest = pair()
    flow = host.open()
    run(host, guest)
    host.say(flow, b"question", end=True)
    run(host, guest)
    (heard,) = guest.opened
    assert guest.count(ENDED, heard) == 1
    guest.say(heard, bytes(200_000), end=True)
    run(host, guest)
    assert len(host.received[flow.id]) == 200_000 and host.count(ENDED, flow) == 1


def test_a_close_ends_both_directions_after_what_was_sent() -> None:
    host, guest = pair()
    flow = host.open()
    run(host, guest)
    host.say(flow, b"last words")
    host.mux.close(flow)
    run(host, guest)
    (heard,) = guest.opened
    assert guest.received[flow.id] == b"last words"
    assert guest.count(ENDED, heard) == guest.count(CLOSED, heard) == 1
    assert flow.id not in guest.refused


def test_a_close_without_a_word_is_a_refusal() -> None:
    host, guest = pair()
    guest.accept = False
    flow = host.open()
    run(host, guest)
    guest.mux.close(guest.opened[0])
    run(host, guest)
    assert flow.id in host.refused and not host.mux.flows


def test_data_after_shutdown_is_dropped_and_the_stream_stays_in_step() -> None:
    guest = vm()
    guest.hear(
        said(Open(1, TARGET), Data(1, 2), b"ab", Shutdown(1), Data(1, 3), b"cde", Open(2, TARGET), Data(2, 1), b"f")
    )
    assert guest.received == {1: b"ab", 2: b"f"}
    assert guest.mux.dropped == 3


def test_frames_for_channels_that_are_not_there_are_ignored() -> None:
    guest = vm()
    guest.hear(said(Window(7, 9), Data(7, 4), b"lost", Shutdown(7), Close(7), Open(1, TARGET), Data(1, 2), b"ok"))
    assert guest.received == {1: b"ok"} and guest.mux.unknown == 4


def test_a_late_window_after_both_closes_is_ignored() -> None:
    host, guest = pair()
    flow = host.open()
    run(host, guest)
    host.mux.close(flow)
    run(host, guest)
    host.hear(said(Window(flow.id, 1 << 20), Close(flow.id)))
    assert not host.mux.flows and host.count(CREDIT, flow) == 0


def test_after_our_close_nothing_is_said_for_the_channel() -> None:
    """VPNKit in OCaml ends the connection for a frame of an unknown id."""
    guest = vm()
    guest.hear(said(Open(1, TARGET), Window(1, 1000)))
    (flow,) = guest.opened
    guest.mux.close(flow)
    frames_of(guest)
    guest.hear(said(Data(1, 60_000), bytes(60_000), Shutdown(1)))
    guest.mux.consumed(flow, 60_000)
    guest.mux.shutdown(flow)
    assert guest.mux.sendable(flow) == 0
    guest.hear(said(Close(1)))
    assert frames_of(guest) == [] and not guest.mux.flows


def test_after_the_peers_close_it_gets_a_close_alone() -> None:
    guest = vm(greedy=False)
    guest.hear(said(Open(1, TARGET), Data(1, 60_000), bytes(60_000)))
    (flow,) = guest.opened
    frames_of(guest)
    list(guest.mux.receive(memoryview(said(Close(1)))))
    guest.mux.consumed(flow, 60_000)
    guest.mux.shutdown(flow)
    assert guest.mux.sendable(flow) == 0
    guest.mux.close(flow)
    assert frames_of(guest) == ["1 Close"] and not guest.mux.flows


# What ends the connection, and what does not.


@pytest.mark.parametrize(
    "octets",
    [
        said(Open(1, TARGET, DEDICATED)),
        said(Open(1, TARGET, 3)),
        said(Open(1, TARGET), Open(1, TARGET)),
        bytes.fromhex("0700 06 01000000"),
    ],
    ids=["dedicated", "kind 3", "id in use", "unknown command"],
)
def test_what_nobody_may_say_ends_the_connection(octets: bytes) -> None:
    with pytest.raises(MuxError):
        vm().hear(octets)


def test_a_channel_too_many_is_refused_and_costs_nothing() -> None:
    guest = vm(limits=Limits(channels=2))
    guest.hear(said(*(Open(id, TARGET) for id in range(4)), Window(3, 5), Data(3, 4), b"skip", Data(1, 2), b"ok"))
    assert len(guest.mux.flows) == 2 and guest.mux.refused == 2
    assert "send 2 Close" in guest.mux.dump() and "send 3 Close" in guest.mux.dump()
    assert guest.received == {1: b"ok"}
    with pytest.raises(TooManyChannels, match="2 channels are open"):
        guest.open()
    guest.hear(said(Close(0)))
    guest.open()


def test_a_peer_that_never_reads_is_cut_off() -> None:
    guest = vm(limits=Limits(queued=10_000))
    with pytest.raises(MuxError, match="does not read"):
        for id in range(5000):
            guest.hear(said(Open(id, TARGET)))
    assert guest.mux.queued < 11_000


def test_a_destination_that_cannot_be_said_opens_nothing() -> None:
    host = End(Role.OCAML, handshake=False)
    with pytest.raises(Malformed):
        host.open(Destination("unix"))
    assert not host.mux.flows and not host.mux.queued


# The handshake.


def test_both_sides_greet_at_once() -> None:
    host, guest = End(Role.CONNECTOR), vm(handshake=True)
    assert not host.mux.greeted
    assert host.take() == guest.take() == HANDSHAKE
    host.hear(HANDSHAKE[:53])
    assert not host.mux.greeted and not host.mux.between_frames
    host.hear(HANDSHAKE[53:])
    assert host.mux.greeted and host.mux.between_frames


@given(cut=st.integers(0, 400), payload=st.binary(max_size=300))
def test_a_greeting_may_have_a_payload(cut: int, payload: bytes) -> None:
    stream = HANDSHAKE[:-2] + len(payload).to_bytes(2, "little") + payload + said(Open(1, TARGET), Data(1, 2), b"ok")
    guest = vm(handshake=True)
    guest.hear(stream[:cut])
    guest.hear(stream[cut:])
    assert guest.mux.greeted and guest.received == {1: b"ok"}


@pytest.mark.parametrize(
    "octets", [b"x", b"https://github.com/moby/vpnkit multiplexer protocol\r\n", said(Open(1, TARGET))]
)
def test_a_stranger_is_turned_away(octets: bytes) -> None:
    with pytest.raises(MuxError, match="does not greet"):
        vm(handshake=True).hear(octets)


def test_an_end_before_the_handshake_is_no_fault() -> None:
    guest = vm(handshake=True)
    assert guest.mux.between_frames
    guest.hear(HANDSHAKE[:10])
    assert not guest.mux.between_frames


def test_the_last_500_events_are_remembered() -> None:
    guest = vm()
    guest.hear(said(Open(1, Destination("unix", path="/x")), *(Window(1, seq) for seq in range(600))))
    lines = guest.mux.dump().splitlines()
    assert len(lines) == 500 and lines[-1] == "recv 1 Window 599"
    guest.hear(said(Open(2, Destination("unix", path="/x")), Data(2, 2), b"ab", Shutdown(2), Close(2)))
    assert guest.mux.dump().splitlines()[-7:] == [
        "recv 2 Open unix:/x",
        "send 2 Window 65536",
        "recv 2 Data 2",
        "recv 2 Shutdown",
        "recv 2 Close",
        "send 2 Close",
        "free 2",
    ]


# All of it.


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    sizes=st.lists(
        st.tuples(st.booleans(), st.sampled_from([0, 1, 500, 66_000, 200_000]), st.sampled_from([0, 3, 70_000])),
        min_size=1,
        max_size=8,
    ),
    window=st.sampled_from([LEAST_WINDOW, FIRST_WINDOW, 1 << 20]),
    handshake=st.booleans(),
)
def test_a_wire_that_cuts_anywhere_loses_and_mixes_nothing(
    seed: int, sizes: list[tuple[bool, int, int]], window: int, handshake: bool
) -> None:
    rng = random.Random(seed)
    host = End(Role.CONNECTOR, handshake=handshake, limits=Limits(window=window))
    guest = End(Role.LISTENER, handshake=handshake)
    expected = []
    for ours, there, back in sizes:
        end, other = (host, guest) if ours else (guest, host)
        flow = end.open()
        question, answer = rng.randbytes(there), rng.randbytes(back)
        end.say(flow, question, end=True)
        run(host, guest, rng)
        heard = other.opened[-1]
        other.say(heard, answer, end=True)
        expected.append((end, other, flow, heard, question, answer))
    run(host, guest, rng)
    for end, other, flow, heard, question, answer in expected:
        assert other.received[flow.id] == question
        assert end.received[flow.id] == answer
        assert other.count(OCTETS, heard) > 0 or not question
        end.mux.close(flow)
    run(host, guest, rng)
    assert not host.mux.flows and not guest.mux.flows
    assert host.mux._windows == guest.mux._windows == 0
    assert host.mux.unknown == guest.mux.unknown == host.mux.dropped == guest.mux.dropped == 0
