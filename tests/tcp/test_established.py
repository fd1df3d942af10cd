"""TCP once established (conformance.md section 5), in both directions of opening where the row applies."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

import pytest

from netstack.settings import Timeouts
from tests.support import packets
from tests.support.drill import Drill, Flow, pattern
from tests.support.fake_host import Accept
from tests.support.packets import ACK, FIN, MASK, RST

Established = Callable[..., Flow]


# Receiving.


def test_t30_data_is_delivered_once_whatever_psh_says(d: Drill, established: Established) -> None:
    f = established()
    for flags in (".", "P.", ".", "P."):
        d.guest(f, flags, data=flags.encode() * 50)
    d.guest(f, ".", seq=f.snd - 100, data=b"again" * 20)
    d.collect(f, within=0.05)
    assert d.host(f).received == b"".join(flags.encode() * 50 for flags in (".", "P.", ".", "P."))


def test_t30_every_second_full_segment_is_acknowledged(d: Drill, established: Established) -> None:
    f = established()
    for count in range(1, 11):
        d.guest(f, ".", data=pattern(1460, count))
        acked = [segment.ack for segment in d.collect(f)]
        if count % 2 == 0:
            d.settle()
    d.advance(0.04)
    acked += [segment.ack for segment in d.collect(f)]
    assert acked[-1] == f.snd


def test_t30_an_ack_is_never_later_than_40_ms(d: Drill, established: Established) -> None:
    """Also in a dialogue, where an ACK may wait for the answer to carry it."""
    f = established()
    for turn in range(8):
        d.guest(f, "P.", data=b"question")
        d.host(f).send(b"answer")
        d.collect(f, within=0.001)
        d.guest(f, ".")
        assert d.host(f).received == b"question" * (turn + 1)
    d.guest(f, "P.", data=b"no answer this time")
    got = d.expect(f, ".", ack=f.snd, within=0.0401)
    assert not got.payload


def test_t30_a_batch_of_segments_is_acknowledged_once(d: Drill, established: Established) -> None:
    f = established()
    for index in range(8):
        d.guest(f, ".", data=pattern(1460, index), queue=True)
    d.settle()
    acks = d.collect(f)
    assert len(acks) <= 4 and acks[-1].ack == f.snd
    assert d.host(f).received == b"".join(pattern(1460, index) for index in range(8))


@pytest.mark.parametrize(
    ("offset", "data", "flags"),
    [
        pytest.param(-100, b"old", ".", id="old data"),
        pytest.param(-1, b"", ".", id="keep-alive without data"),
        pytest.param(-1, b"k", ".", id="T50 keep-alive with one octet"),
        pytest.param(3 << 20, b"far", ".", id="beyond the window"),
        pytest.param(-100, b"", "F.", id="old FIN"),
        pytest.param(3 << 20, b"", "F.", id="FIN beyond the window"),
        pytest.param(1 << 31, b"half way round", ".", id="half the space away"),
    ],
)
def test_t31_t50_a_segment_out_of_the_window_is_acknowledged_and_not_processed(
    d: Drill, established: Established, offset: int, data: bytes, flags: str
) -> None:
    f = established()
    d.guest(f, ".", data=pattern(200))
    d.collect(f, within=0.05)
    snd = f.snd
    d.guest(f, flags, seq=f.snd + offset, data=data)
    got = d.expect(f, ".", ack=snd)
    assert not got.payload
    assert d.host(f).received == pattern(200)
    assert not d.host(f).eof


def test_t32_a_segment_partly_old_is_trimmed_at_the_front(d: Drill, established: Established) -> None:
    f = established()
    whole = pattern(3000)
    d.guest(f, ".", data=whole[:1000])
    d.guest(f, ".", seq=f.isn + 1 + 500, data=whole[500:1900])
    f.snd = (f.isn + 1 + 1900) & MASK
    d.guest(f, ".", data=whole[1900:])
    d.collect(f, within=0.05)
    assert d.host(f).received == whole


def test_t32_a_segment_partly_beyond_the_window_is_trimmed_at_the_end_and_its_fin_with_it(
    d: Drill, established: Established
) -> None:
    f = established(scale=None)
    far = d.host(f)
    far.stop_reading()
    d.io.sent_buffer = 0
    assert f.sock is not None
    f.sock.sent_buffer = 1000  # the host takes so much, the stack keeps the rest
    sent = b""
    window = 65535
    while True:
        part = pattern(1460, len(sent))
        if len(part) > window:
            break
        d.guest(f, ".", data=part)
        sent += part
        window = d.window_of(f, d.collect(f)[-1])
    assert 0 < window < 1460, window
    d.guest(f, "F.", data=pattern(1460, 99))
    got = d.collect(f)[-1]
    assert got.ack == (f.isn + 1 + len(sent) + window) & MASK
    f.sock.sent_buffer = 256 << 10
    far.resume()
    d.settle()
    assert far.received == sent + pattern(1460, 99)[:window]
    assert not far.eof
    f.snd = got.ack


def test_t33_segments_out_of_order_are_put_together(d: Drill, established: Established) -> None:
    f = established(sack=False)
    whole = pattern(10_000)
    order = [3, 1, 7, 0, 9, 2, 2, 5, 4, 8, 6]
    for index in order:
        f_before = f.snd
        d.guest(f, ".", seq=f.isn + 1 + index * 1000, data=whole[index * 1000 : index * 1000 + 1000])
        if index != 0:
            assert d.collect(f), f"a duplicate ACK at once for {index} ({f_before})"
    d.settle()
    assert d.host(f).received == whole
    f.snd = (f.isn + 1 + 10_000) & MASK
    d.guest(f, ".", data=b"more")
    assert d.collect(f, within=0.05)[-1].ack == f.snd


def test_t33_overlapping_segments_beyond_a_hole_keep_every_octet_right(d: Drill, established: Established) -> None:
    f = established()
    whole = pattern(6000)
    for begin, end in ((1000, 2000), (1500, 2500), (500, 1200), (3000, 4000), (2400, 3100), (5000, 6000), (900, 5200)):
        d.guest(f, ".", seq=f.isn + 1 + begin, data=whole[begin:end])
    assert d.host(f).received == b""
    d.guest(f, ".", seq=f.isn + 1, data=whole[:600])
    d.settle()
    delivered = len(d.host(f).received)
    assert d.host(f).received == whole[:delivered]
    f.snd = (f.isn + 1 + delivered) & MASK
    d.collect(f)
    d.guest(f, ".", data=whole[delivered:])
    assert d.host(f).received == whole
    f.snd = (f.isn + 1 + 6000) & MASK


def test_t33_g20_intervals_beyond_a_hole_are_bounded(d: Drill, established: Established) -> None:
    """SegmentSmack: every other octet, 5,000 times; then the stream is sent properly and must come out right."""
    f = established()
    whole = pattern(10_000)
    for at in range(1, 10_000, 2):
        d.guest(f, ".", seq=f.isn + 1 + at, data=whole[at : at + 1])
    f.inbox.clear()
    flow = next(iter(d.stack.tcp.flows.values()))
    assert flow.conn is not None
    assert len(flow.conn.rcv.ranges()) <= 32
    for at in range(0, 10_000, 1000):
        d.guest(f, ".", seq=f.isn + 1 + at, data=whole[at : at + 1000])
    assert d.host(f).received == whole
    f.snd = (f.isn + 1 + 10_000) & MASK
    f.inbox.clear()


@pytest.mark.parametrize("sack", [True, False], ids=["sack", "no sack"])
def test_t34_sequence_numbers_wrap(d: Drill, direction: str, sack: bool) -> None:
    isn = (1 << 32) - 2500
    f = d.open(isn=isn, sack=sack) if direction == "guest-open" else d.forward(isn=isn, sack=sack)
    flow = next(iter(d.stack.tcp.flows.values()))
    whole = pattern(8000)
    d.guest(f, ".", data=whole[:2000])
    d.guest(f, ".", seq=isn + 1 + 3000, data=whole[3000:4000])  # a hole across the wrap
    got = d.collect(f)[-1]
    assert got.ack == (isn + 1 + 2000) & MASK
    if sack:
        assert got.sack == [((isn + 1 + 3000) & MASK, (isn + 1 + 4000) & MASK)]
    d.guest(f, "F.", seq=isn + 1 + 4000, data=whole[4000:])
    d.guest(f, ".", seq=isn + 1 + 2000, data=whole[2000:3000])
    assert d.host(f).received == whole
    assert d.host(f).eof
    f.snd = (isn + 1 + 8000 + 1) & MASK
    assert d.collect(f, within=0.05)[-1].ack == f.snd
    assert flow.conn is not None


def test_t34_our_own_numbers_wrap_with_loss_timers_and_window(drill: Callable[..., Drill]) -> None:
    """Bulk from the host across 2**32 of ours: a lost segment, a time-out, window updates."""
    d = drill()
    near = (1 << 32) - 30_000
    d.stack.tcp.isn = lambda key: near  # type: ignore[method-assign]
    f = d.open(window=20_000)
    assert f.iss == near
    data = pattern(100_000)
    d.host(f).send(data)
    d.settle()
    first = d.collect(f)
    d.guest(f, ".", ack=f.iss + 1 + 1460)  # only the first one arrived, the rest is lost
    f.received = bytearray(data[:1460])
    f.rcv = (f.iss + 1 + 1460) & MASK
    assert len(first) >= 13
    f.inbox.clear()
    assert d.transfer(f, 98_540) == data[1460:]


# Acknowledgements and resets of the guest.


def test_t35_an_old_ack_is_ignored_and_its_data_taken(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(pattern(3000))
    d.transfer(f, 3000)
    d.guest(f, ".", ack=f.rcv - 2000, data=b"with an old ack")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"with an old ack"


@pytest.mark.parametrize("ahead", [1, 1460, 1 << 20, 1 << 30])
def test_t35_g20_an_ack_of_what_was_never_sent_is_answered_and_dropped(
    d: Drill, established: Established, ahead: int
) -> None:
    f = established()
    d.guest(f, ".", ack=f.rcv + ahead, seq=f.snd, data=b"poison")
    f.snd = (f.isn + 1) & MASK
    d.expect(f, ".", seq=f.rcv, ack=f.snd)
    assert d.host(f).received == b""
    d.guest(f, ".", data=b"fine")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"fine"


def test_t36_t65_a_rst_with_the_exact_number_closes_and_the_host_sees_rst(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, ".", data=b"x")
    d.collect(f, within=0.05)
    d.guest(f, "R", seq=f.snd)
    d.expect_none(1.0)
    assert d.host(f).aborted
    d.assert_clean()


@pytest.mark.parametrize("offset", [1, 100, 60_000])
def test_t36_a_rst_elsewhere_in_the_window_is_challenged(d: Drill, established: Established, offset: int) -> None:
    f = established()
    d.guest(f, "R", seq=f.snd + offset)
    d.expect(f, ".", seq=f.rcv, ack=f.snd)
    assert not d.host(f).aborted
    d.guest(f, "R", seq=f.snd)
    assert d.host(f).aborted


@pytest.mark.parametrize("offset", [-1, -1000, 9 << 20, 1 << 31])
def test_t36_a_rst_out_of_the_window_is_met_with_silence(d: Drill, established: Established, offset: int) -> None:
    f = established()
    d.guest(f, "R", seq=f.snd + offset)
    d.expect_none(0.5, f)
    d.guest(f, ".", data=b"alive")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"alive"


def test_t37_a_syn_is_challenged_at_a_limited_rate(d: Drill, established: Established) -> None:
    f = established()
    for _ in range(100):
        d.guest(f, "S", seq=f.snd + 5, ack=0)
    answers = d.collect(f)
    assert 1 <= len(answers) <= 10
    assert all(segment.flags == ACK and segment.ack == f.snd for segment in answers)
    d.advance(2.0)
    d.guest(f, "S", seq=f.snd + 5, ack=0)
    d.expect(f, ".", ack=f.snd)


def test_t37_the_limit_is_per_flow(d: Drill) -> None:
    """A common limit would let one flow learn about another (CVE-2016-5696)."""
    f, g = d.open(), d.open()
    for _ in range(100):
        d.guest(f, "S", seq=f.snd + 5, ack=0)
    f.inbox.clear()
    d.guest(g, "S", seq=g.snd + 5, ack=0)
    d.expect(g, ".", ack=g.snd)


# Our window.


def fill(d: Drill, f: Flow) -> bytes:
    """Send until the stack's window is closed (the host does not read); returns what was sent."""
    d.host(f).stop_reading()
    sent = bytearray()
    window = d.window_of(f, f.synack) if f.synack is not None else 65535
    for index in range(2000):
        size = min(1460, window)
        if size <= 0:
            break
        part = pattern(size, index)
        d.guest(f, ".", data=part)
        sent += part
        answers = d.collect(f)
        if answers:
            window = d.window_of(f, answers[-1])
        else:
            window -= size
    assert window == 0, f"the window stays at {window} after {len(sent)} octets"
    return bytes(sent)


def test_t38_g19_the_window_closes_when_the_host_does_not_read_and_opens_when_it_does(
    d: Drill, established: Established
) -> None:
    """The oracle sees to it that the right edge never moves left."""
    f = established()
    sent = fill(d, f)
    assert 256 << 10 <= len(sent) <= (1 << 20) + (256 << 10) + 65536, "bounded by host buffer and flow buffer"
    d.expect_none(5.0, f)
    d.host(f).resume()
    update = d.collect(f)
    assert update and d.window_of(f, update[-1]) >= 1460
    assert d.host(f).received == sent
    d.guest(f, ".", data=b"on we go")
    d.collect(f, within=0.05)
    assert d.host(f).received == sent + b"on we go"


def test_t38_a_window_is_not_opened_by_crumbs(d: Drill, established: Established) -> None:
    """Silly window avoidance (RFC 9293 3.8.6.2.2): no update for less than a segment."""
    f = established()
    fill(d, f)
    far = d.host(f)
    assert f.sock is not None
    # The host reads 100 octets; its kernel may take 100 more from us.
    far.drain(100)
    f.sock.no_space = False
    f.sock.wake()
    d.settle()
    windows = [d.window_of(f, segment) for segment in d.collect(f, within=1.0)]
    assert all(window == 0 or window >= 1460 for window in windows), windows


def test_t40_a_probe_of_our_closed_window_is_answered_with_the_window_and_its_octet_dropped(
    d: Drill, established: Established
) -> None:
    f = established()
    sent = fill(d, f)
    for wait in (0.3, 0.6, 1.2):
        d.advance(wait)
        d.guest(f, ".", seq=f.snd, data=b"p")
        f.snd = (f.isn + 1 + len(sent)) & MASK
        d.expect(f, ".", ack=f.snd, window=0)
    d.host(f).resume()
    d.settle()
    assert d.host(f).received == sent
    d.collect(f)
    d.guest(f, ".", data=b"p")
    d.collect(f, within=0.05)
    assert d.host(f).received == sent + b"p"


def test_t40_an_ack_at_a_closed_window_still_counts(d: Drill, established: Established) -> None:
    """RFC 9293 3.10.7.4: with a zero window ACKs are processed although no segment is acceptable."""
    f = established()
    d.host(f).send(b"to be acknowledged")
    d.expect(f, ".")
    sent = fill(d, f)
    assert len(sent) > 0
    d.host(f).send(b" and more")
    got = d.expect(f, ".")
    d.guest(f, ".", ack=got.end)
    d.expect_none(3.0, f)


# The guest's window.


def test_t39_a_closed_window_of_the_guest_is_probed_with_backoff_and_opens(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(pattern(1000))
    d.expect(f, ".", length=1000)
    d.guest(f, ".", window=0)
    d.host(f).send(pattern(5000, 2))
    d.settle()
    times = []
    for _ in range(9):
        got = d.expect(f, ".", within=61.0)
        assert len(got.payload) <= 1
        times.append(got.time)
        f.rcv = (f.iss + 1001) & MASK
        d.guest(f, ".", window=0)
        d.collect(f)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert gaps[0] >= 0.19
    assert all(b >= a * 0.9 for a, b in itertools.pairwise(gaps)), gaps
    assert max(gaps) <= 61.0
    for _ in range(60):
        d.expect(f, ".", within=61.0)
        f.rcv = (f.iss + 1001) & MASK
        d.guest(f, ".", window=0)
    assert not d.host(f).aborted, "a guest that answers probes for an hour is alive"
    d.collect(f)
    f.rcv = (f.iss + 1001) & MASK
    f.received = f.received[:1000]
    d.guest(f, ".", window=65535)
    assert d.transfer(f, 5000) == pattern(5000, 2)


def test_t39_the_window_update_is_enough(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, ".", window=0)
    d.host(f).send(pattern(3000))
    d.expect_none(0.1, f)
    d.guest(f, ".", window=65535)
    assert d.transfer(f, 3000, limit_s=0.1) == pattern(3000)


def test_t41_a_guest_that_shrinks_its_window_gets_its_octets_when_it_opens(d: Drill, established: Established) -> None:
    f = established(window=20_000)
    data = pattern(15_000)
    d.host(f).send(data)
    d.settle()
    f.inbox.clear()  # all of it lost
    d.guest(f, ".", window=1000, ack=f.iss + 1)
    for _ in range(6):
        d.advance(1.0)
    assert all(len(segment.payload) <= 1460 for segment in f.inbox)
    f.inbox.clear()
    d.guest(f, ".", window=60_000, ack=f.iss + 1)
    assert d.transfer(f, 15_000, limit_s=70.0) == data


@pytest.mark.parametrize("window", [1, 100, 1459, 1460, 3000, 65535])
@pytest.mark.parametrize("mss", [100, 536, 1460])
def test_t42_neither_the_window_nor_the_mss_of_the_guest_is_exceeded(d: Drill, window: int, mss: int) -> None:
    f = d.open(mss=mss, scale=0, window=window)
    d.host(f).send(pattern(9000))
    d.settle()
    first = d.collect(f)
    assert sum(len(segment.payload) for segment in first) <= window
    assert all(len(segment.payload) <= mss for segment in first)
    f.received.clear()
    f.rcv = (f.iss + 1) & MASK
    for segment in first:
        f.received += segment.payload
        f.rcv = segment.end
    d.guest(f, ".", window=min(window, 65535))
    total = len(f.received)
    d.transfer(f, 9000 - total, limit_s=2000.0)
    assert f.received == pattern(9000)


def test_t42_an_octet_at_a_time_window_makes_progress(d: Drill, established: Established) -> None:
    """G19: a guest with a window of a few octets gets what fits, at persist pace at worst."""
    f = established(window=10, scale=0)
    d.host(f).send(b"0123456789abcdef")
    assert d.transfer(f, 16, limit_s=120.0) == b"0123456789abcdef"


# Retransmission.


def test_t43_the_retransmission_timer_doubles_and_ends_with_rst_on_both_sides(
    drill: Callable[..., Drill], direction: str
) -> None:
    d = drill(timeouts=Timeouts(tcp_user_s=100.0))
    f = d.open() if direction == "guest-open" else d.forward()
    d.advance(1.0)
    d.host(f).send(b"lost")
    first = d.expect(f, ".", data=b"lost")
    times = [first.time]
    while True:
        d._wait(lambda: bool(f.inbox), 200.0)
        assert f.inbox, "no RST in the end"
        if f.inbox[0].flags & RST:
            break
        times.append(f.inbox.popleft().time)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert 0.19 <= gaps[0] <= 1.1
    assert all(1.8 <= b / a <= 2.2 or b >= 59 for a, b in itertools.pairwise(gaps)), gaps
    assert max(gaps) <= 120
    assert d.host(f).aborted
    assert 90 <= f.inbox[0].time - first.time <= 200
    d.advance(10.0)
    f.inbox.clear()
    d.assert_clean()


def test_t43_the_first_rto_without_a_sample_is_1_s(d: Drill) -> None:
    d.io.on_connect(("1.2.3.4", 80), Accept())
    f = d.flow(("1.2.3.4", 80))
    d.syn(f)
    first = d.expect(f, "S.")
    again = d.expect(f, "S.", within=1.2)
    assert again.time - first.time == pytest.approx(1.0, abs=0.01)


def test_t43_karn_a_retransmitted_segment_gives_no_sample(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(b"a")
    first = d.expect(f, ".", data=b"a")
    d.expect(f, ".", seq=first.seq, within=2.0)
    d.expect(f, ".", seq=first.seq, within=4.0)
    d.advance(0.001)
    d.guest(f, ".")  # ambiguous: 1 ms after the second copy, or long after the first
    d.host(f).send(b"b")
    second = d.expect(f, ".", data=b"b")
    third = d.expect(f, ".", seq=second.seq, within=70.0)
    assert third.time - second.time >= 0.19


def test_t44_a_lost_segment_is_sent_again_and_a_partial_ack_goes_on_from_there(
    d: Drill, established: Established
) -> None:
    f = established(mss=1000, sack=False)
    data = pattern(5000)
    d.host(f).send(data)
    d.settle()
    d.collect(f)
    f.received.clear()
    f.rcv = (f.iss + 1) & MASK
    got = d.expect(f, ".", seq=f.iss + 1, within=2.0)
    f.rcv = got.end
    d.guest(f, ".", ack=f.iss + 1 + 2000)  # partial: 0..2000 were there
    f.rcv = (f.iss + 1 + 2000) & MASK
    f.received = bytearray(data[:2000])
    while f.rcv != (f.iss + 1 + 5000) & MASK:
        d.expect(f, ".", within=3.0)
        d.guest(f, ".")
    assert bytes(f.received) == data
    d.expect_none(5.0, f)


def test_t44_an_ack_of_more_than_the_retransmitted_segment_is_believed(d: Drill, established: Established) -> None:
    f = established(mss=1000)
    d.host(f).send(pattern(3000))
    d.settle()
    d.collect(f)
    again = d.expect(f, ".", seq=f.iss + 1, within=2.0)
    assert again.payload == pattern(3000)[: len(again.payload)]
    f.inbox.clear()
    d.guest(f, ".", ack=f.iss + 1 + 3000)
    f.rcv = (f.iss + 1 + 3000) & MASK
    d.expect_none(5.0, f)
    d.host(f).send(b"next")
    d.expect(f, ".", seq=f.iss + 1 + 3000, data=b"next")


def test_t45_three_duplicate_acks_resend_at_once(d: Drill, established: Established) -> None:
    f = established(mss=1000)
    d.advance(1.0)
    d.script(
        f,
        """
        +0    send 5000
        +0    > P. 1:5001(5000)   ack 1
        +.01  < .  1:1(0)         ack 1   win 65408 <sack 1001:2001>
        +0    < .  1:1(0)         ack 1   win 65408 <sack 1001:3001>
        +0    < .  1:1(0)         ack 1   win 65408 <sack 1001:4001>
        +0    > .  1:1001(1000)   ack 1
        +.01  < .  1:1(0)         ack 5001 win 65408
        +5    none
        """,
    )


def test_t45_three_duplicate_acks_without_sack_resend_at_once(d: Drill, established: Established) -> None:
    f = established(mss=1000, sack=False)
    d.advance(1.0)
    d.script(
        f,
        """
        +0    < .  1:1(0)         ack 1   win 65408
        +0    send 5000
        +0    > P. 1:5001(5000)   ack 1
        +.01  < .  1:1(0)         ack 1   win 65408
        +0    < .  1:1(0)         ack 1   win 65408
        +0    < .  1:1(0)         ack 1   win 65408
        +0    > .  1:1001(1000)   ack 1
        +.01  < .  1:1(0)         ack 5001 win 65408
        +5    none
        """,
    )


def test_t45_window_updates_and_data_are_no_duplicate_acks(d: Drill, established: Established) -> None:
    f = established(mss=1000)
    d.host(f).send(pattern(5000))
    d.settle()
    d.collect(f)
    una = (f.iss + 1) & MASK
    for index in range(4):
        d.guest(f, ".", ack=una, window=60_000 - 1280 * index)
    for _ in range(4):
        d.guest(f, ".", ack=una, data=b"data")
    resent = [segment for segment in d.collect(f) if segment.payload]
    assert not resent


def test_t46_sack_blocks_come_most_recent_first(d: Drill, established: Established) -> None:
    f = established()
    d.script(
        f,
        """
        +0    < .  1001:2001(1000) ack 1
        +0    > .  1:1(0)  ack 1 <sack 1001:2001>
        +0    < .  3001:4001(1000) ack 1
        +0    > .  1:1(0)  ack 1 <sack 3001:4001 1001:2001>
        +0    < .  2001:2501(500) ack 1
        +0    > .  1:1(0)  ack 1 <sack 1001:2501 3001:4001>
        +0    < .  5001:6001(1000) ack 1
        +0    > .  1:1(0)  ack 1 <sack 5001:6001 1001:2501 3001:4001>
        """,
    )


def test_t48_a_full_window_may_go_out_at_once(d: Drill) -> None:
    f = d.open(window=60_000)
    d.host(f).send(pattern(100_000))
    d.settle()
    assert 14_600 <= sum(len(segment.payload) for segment in d.collect(f)) <= 60_000


def test_t49_segments_without_timestamps_pass(d: Drill) -> None:
    f = d.open(options=packets.mss_option(1460) + packets.timestamp_option(100, 0))
    d.guest(f, ".", data=b"with", options=packets.timestamp_option(101, 0))
    d.guest(f, ".", data=b"without")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"withwithout"


def test_t51_an_idle_flow_is_kept_for_a_day(d: Drill, established: Established) -> None:
    f = established()
    d.advance(86_400.0)
    d.collect(f)
    d.guest(f, ".", data=b"still here")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"still here"


def test_t51_an_idle_flow_ends_when_asked_for(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(timeouts=Timeouts(tcp_idle_s=300.0))
    f = d.open() if direction == "guest-open" else d.forward()
    d.advance(200.0)
    d.guest(f, ".", data=b"x")
    d.advance(290.0)
    assert not d.host(f).aborted
    d.advance(400.0)
    assert d.host(f).aborted
    assert f.inbox[-1].flags & RST
    d.assert_clean()


def test_t52_urgent_data_is_delivered_inline(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "U.", data=b"urgent", urgent=3)
    d.guest(f, "U.", data=b" wild", urgent=60_000)
    d.collect(f, within=0.05)
    assert d.host(f).received == b"urgent wild"


def test_t53_small_writes_of_the_host_go_out_at_once(d: Drill, established: Established) -> None:
    f = established()
    for index in range(5):
        d.host(f).send(b"%d" % index)
        d.expect(f, ".", data=b"%d" % index)


def test_t54_data_the_guest_never_acknowledges_resets_both_sides(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(timeouts=Timeouts(tcp_user_s=30.0))
    f = d.open() if direction == "guest-open" else d.forward()
    d.host(f).send(pattern(5000))
    d.advance(100.0)
    assert d.host(f).aborted
    assert f.inbox[-1].flags & RST
    f.inbox.clear()
    d.assert_clean()


def test_t54_g19_a_window_held_closed_by_a_dead_guest_ends_too(drill: Callable[..., Drill]) -> None:
    d = drill(timeouts=Timeouts(tcp_user_s=30.0))
    f = d.open()
    d.guest(f, ".", window=0)
    d.host(f).send(pattern(5000))
    d.advance(300.0)  # no probe is answered
    assert d.host(f).aborted
    f.inbox.clear()
    d.assert_clean()


# Path MTU, offloads, checksums, the host's errors.


def frag_needed(f: Flow, mtu: int, seq: int) -> bytes:
    inner = packets.tcp(f.remote, f.guest, f.dport, f.sport, seq, 0, ACK, 65535, bytes(1460))
    quoted = packets.ipv4(f.remote, f.guest, packets.TCP, inner, df=True)[:28]
    return packets.icmp(3, 4, struct.pack("!HH", 0, mtu), quoted)


def test_t55_fragmentation_needed_from_the_guest_makes_segments_smaller(d: Drill, established: Established) -> None:
    f = established()
    data = pattern(4380)
    d.host(f).send(data)
    d.settle()
    d.collect(f)
    f.received.clear()
    f.rcv = (f.iss + 1) & MASK
    d.ip(packets.ICMP, frag_needed(f, 1000, f.iss + 1), dst=f.remote)
    d.settle()
    assert d.transfer(f, 4380, limit_s=10.0) == data
    d.host(f).send(pattern(5000, 3))
    d.settle()
    assert max(len(segment.payload) for segment in d.collect(f)) == 960


@pytest.mark.parametrize(
    ("mtu", "offset"),
    [
        pytest.param(1000, 1 << 24, id="number not in flight"),
        pytest.param(1000, -100_000, id="number long acknowledged"),
        pytest.param(0, 0, id="MTU 0"),
        pytest.param(68, 0, id="MTU 68"),
    ],
)
def test_t55_g29_forged_fragmentation_needed_is_not_believed(
    d: Drill, established: Established, mtu: int, offset: int
) -> None:
    f = established()
    d.host(f).send(pattern(4380))
    d.settle()
    d.collect(f)
    d.ip(packets.ICMP, frag_needed(f, mtu, f.iss + 1 + offset), dst=f.remote)
    d.guest(f, ".")
    d.collect(f)
    d.guest(f, ".", ack=f.iss + 1 + 4380)
    f.rcv = (f.iss + 1 + 4380) & MASK
    d.host(f).send(pattern(6000))
    d.settle()
    largest = max(len(segment.payload) for segment in d.collect(f))
    assert largest >= 536


@pytest.mark.parametrize("code", [0, 1, 2, 3, 13])
def test_g29_unreachable_about_a_live_flow_does_not_kill_it(d: Drill, established: Established, code: int) -> None:
    f = established()
    d.host(f).send(b"x")
    d.collect(f)
    inner = packets.tcp(f.remote, f.guest, f.dport, f.sport, f.iss + 1, 0, ACK, 65535)
    quoted = packets.ipv4(f.remote, f.guest, packets.TCP, inner, df=True)[:28]
    d.ip(packets.ICMP, packets.icmp(3, code, body=quoted), dst=f.remote)
    d.guest(f, ".", data=b"alive")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"alive"
    assert not d.host(f).aborted


def test_t56_a_super_frame_of_the_guest_is_taken_whole(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(offload=True)
    f = d.open() if direction == "guest-open" else d.forward()
    data = pattern(60_000)
    frame = d.segment(f, "P.", data=data, partial=True)
    d.inject(frame, packets.VNET.pack(1, 1, 54, 1460, 34, 16, 0))
    f.snd = (f.snd + len(data)) & MASK
    assert d.collect(f, within=0.05)[-1].ack == f.snd
    assert d.host(f).received == data


def test_t56_super_frames_to_the_guest_are_cut_by_its_mss(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(offload=True)
    f = d.open(mss=1000, window=1 << 20) if direction == "guest-open" else d.forward(mss=1000)
    d.guest(f, ".", window=1 << 20)
    d.host(f).send(pattern(100_000))
    d.settle()
    segments = d.collect(f)
    assert {segment.gso_size for segment in segments if len(segment.payload) > 1000} == {1000}
    assert b"".join(segment.payload for segment in segments) == pattern(100_000)
    assert max(len(segment.payload) for segment in segments) > 30_000


def test_t56_a_partial_checksum_is_honoured_only_when_the_header_says_so(drill: Callable[..., Drill]) -> None:
    d = drill(offload=True)
    f = d.open()
    d.inject(d.segment(f, "P.", data=b"bad", partial=True))  # no NEEDS_CSUM: the sum is simply wrong
    d.expect_none(0.1, f)
    assert d.host(f).received == b""
    d.guest(f, "P.", data=b"good", partial=True)
    d.collect(f, within=0.05)
    assert d.host(f).received == b"good"


def test_t57_a_bad_checksum_is_dropped_counted_and_not_acknowledged(d: Drill, established: Established) -> None:
    f = established()
    snd = f.snd
    d.guest(f, "P.", data=b"damaged", spoil=True)
    f.snd = snd
    d.expect_none(0.1, f)
    assert d.host(f).received == b""
    assert d.stack.counters.drops["tcp_checksum"] == 1
    d.guest(f, "P.", data=b"repaired")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"repaired"


@pytest.mark.parametrize("flags", ["S", "R", "F."])
def test_t57_a_bad_checksum_on_a_control_segment_is_dropped(d: Drill, established: Established, flags: str) -> None:
    f = established()
    snd = f.snd
    d.guest(f, flags, seq=snd, spoil=True)
    f.snd = snd
    d.expect_none(0.1, f)
    assert not d.host(f).eof and not d.host(f).aborted
    d.guest(f, ".", data=b"ok")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"ok"


def test_t58_f15_data_after_the_host_closed_is_answered_rst(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).close()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.guest(f, "P.", data=b"nobody reads this")
    segments = d.collect(f, within=1.0)
    assert segments[-1].flags & RST
    d.assert_clean()


def test_t13_t38_the_window_after_the_handshake_is_scaled(d: Drill) -> None:
    f = d.open(scale=7)
    d.guest(f, ".", data=b"x")
    got = d.expect(f, ".", within=0.05)
    assert d.window_of(f, got) > 65535
    assert not got.flags & FIN
