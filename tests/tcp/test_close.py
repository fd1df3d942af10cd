"""How TCP connections end (conformance.md section 6): half-closes, resets, and nothing left behind."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest

from netstack.settings import Timeouts
from tests.support.drill import Drill, Flow, pattern
from tests.support.fake_host import Accept, Never
from tests.support.packets import ACK, FIN, MASK, RST

Established = Callable[..., Flow]


def test_t60_f16_the_guests_fin_reaches_the_host_after_the_last_octet_and_the_other_way_goes_on(
    d: Drill, established: Established
) -> None:
    f = established()
    far = d.host(f)
    far.stop_reading()
    assert f.sock is not None
    f.sock.sent_buffer = 1000
    data = pattern(20_000)
    for at in range(0, 20_000, 1000):
        d.guest(f, "F." if at == 19_000 else ".", data=data[at : at + 1000])
    d.collect(f, within=0.1)
    assert not far.eof
    f.sock.sent_buffer = 256 << 10
    far.resume()
    d.settle()
    assert far.received == data and far.eof
    d.collect(f, within=0.1)
    far.send(pattern(300_000, 5))
    d.settle()
    assert d.transfer(f, 300_000) == pattern(300_000, 5)
    far.shutdown()
    got = d.collect(f)[-1]
    assert got.flags & FIN
    d.guest(f, ".")
    d.advance(30.0)
    d.assert_clean()


def test_t60_octets_a_slow_host_has_not_taken_survive_the_close_of_both_ends(
    d: Drill, established: Established
) -> None:
    """Both FINs are acknowledged while the stack still holds what the host did not read: it goes out first."""
    f = established()
    far = d.host(f)
    far.stop_reading()
    far.shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    data = pattern(400_000)
    at = 0
    while at < len(data):
        part = data[at : at + 1460]
        at += len(part)
        d.guest(f, "F." if at == len(data) else ".", data=part)
    d.collect(f, within=1.0)
    d.advance(5.0)
    far.resume()
    d.advance(1.0)
    assert far.received == data
    assert far.eof and not far.aborted
    d.expect_none(0.0, f)  # a window is of no use to who has said everything, and it may answer RST
    d.advance(30.0)
    d.assert_clean()


def test_t60_a_guest_that_has_forgotten_us_takes_nothing_from_a_slow_host(d: Drill, established: Established) -> None:
    """RFC 9293 3.10.7.4: in TIME-WAIT a RST signals no reset; what the guest said before is still owed."""
    f = established()
    far = d.host(f)
    far.stop_reading()
    far.shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    data = pattern(400_000)
    for at in range(0, len(data), 1460):
        d.guest(f, "F." if at + 1460 >= len(data) else ".", data=data[at : at + 1460])
    d.collect(f, within=1.0)
    d.guest(f, "R")
    d.advance(1.0)
    assert not far.aborted
    far.resume()
    d.advance(1.0)
    assert far.received == data
    assert far.eof and not far.aborted
    d.advance(30.0)
    d.assert_clean()


def test_t61_f16_the_hosts_end_is_a_fin_after_the_last_octet_and_the_other_way_goes_on(
    d: Drill, established: Established
) -> None:
    f = established(window=10_000)
    far = d.host(f)
    data = pattern(50_000)
    far.send(data)
    far.shutdown()
    d.settle()
    first = d.collect(f)
    assert not any(segment.flags & FIN for segment in first), "the window holds the FIN back"
    f.received.clear()
    f.rcv = (f.iss + 1) & MASK
    for segment in first:
        f.received += segment.payload
        f.rcv = segment.end
    d.guest(f, ".")
    while len(f.received) < 50_000:
        for _segment in d.collect(f, within=0.01):
            pass
        d.guest(f, ".")
    d.collect(f, within=0.3)
    assert bytes(f.received) == data
    assert f.rcv == (f.iss + 1 + 50_000 + 1) & MASK, "the FIN was counted"
    d.guest(f, ".")
    for index in range(20):
        d.guest(f, ".", data=pattern(1000, index))
    d.collect(f, within=0.05)
    assert far.received == b"".join(pattern(1000, index) for index in range(20))
    d.guest(f, "F.")
    assert far.eof
    d.collect(f, within=0.05)
    d.advance(30.0)
    d.assert_clean()


def test_t62_a_lost_fin_is_sent_again(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(b"last words")
    d.host(f).shutdown()
    d.settle()
    d.collect(f)
    fin_at = (f.iss + 1 + 10) & MASK
    f.rcv = fin_at
    d.guest(f, ".", ack=fin_at)
    again = d.expect(f, "F.", seq=fin_at, within=2.0)
    assert not again.payload
    d.guest(f, ".")
    d.expect_none(10.0, f)


def test_t62_data_and_fin_lost_together_are_sent_again_together_or_in_order(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(b"last words")
    d.host(f).shutdown()
    d.settle()
    d.collect(f)
    f.rcv = (f.iss + 1) & MASK
    f.received.clear()
    for _ in range(4):
        d.collect(f, within=2.0)
        d.guest(f, ".")
        if f.rcv == (f.iss + 1 + 11) & MASK:
            break
    assert f.received == b"last words"
    assert f.rcv == (f.iss + 1 + 11) & MASK


def test_t62_a_fin_beyond_a_hole_waits_for_it(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "F.", seq=f.snd + 1000, data=b"end")
    d.expect(f, ".", ack=f.snd)
    assert not d.host(f).eof
    d.guest(f, ".", data=pattern(1000))
    f.snd = (f.isn + 1 + 1000 + 3 + 1) & MASK
    assert d.collect(f, within=0.05)[-1].ack == f.snd
    assert d.host(f).received == pattern(1000) + b"end"
    assert d.host(f).eof


def test_t62_a_bare_fin_beyond_a_hole_waits_for_it(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "F.", seq=f.snd + 1000)
    d.expect(f, ".", ack=f.snd)
    assert not d.host(f).eof
    d.guest(f, ".", data=pattern(1000))
    f.snd = (f.isn + 1 + 1000 + 1) & MASK
    assert d.collect(f, within=0.05)[-1].ack == f.snd
    assert d.host(f).eof


def test_t62_a_retransmitted_fin_is_acknowledged_again(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "F.")
    d.collect(f, within=0.05)
    d.guest(f, "F.", seq=f.snd - 1)
    d.expect(f, ".", ack=f.snd)


def test_t62_data_beyond_the_guests_fin_is_not_delivered(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "F.", data=b"end")
    d.guest(f, ".", seq=f.snd, data=b"after the end")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"end"


def test_t63_simultaneous_close_ends_cleanly(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).shutdown()
    ours = d.expect(f, "F.")
    # The guest's FIN crossed ours: it does not acknowledge it.
    d.guest(f, "F.", ack=ours.seq)
    d.expect(f, ".", ack=f.snd)
    assert d.host(f).eof
    d.guest(f, ".")
    d.expect_none(30.0, f)
    d.assert_clean()


def test_t63_simultaneous_close_with_one_combined_fin_ack(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.guest(f, "F.")
    d.expect(f, ".", ack=f.snd)
    assert d.host(f).eof
    d.advance(30.0)
    d.assert_clean()


def test_t63_simultaneous_close_raced_with_data_delivers_it(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(b"from the host")
    d.host(f).shutdown()
    d.settle()
    before = (f.iss + 1) & MASK
    d.guest(f, "F.", data=b"from the guest", ack=before)
    segments = d.collect(f, within=0.05)
    assert d.host(f).received == b"from the guest" and d.host(f).eof
    assert bytes(f.received) == b"from the host"
    assert segments[-1].ack == f.snd
    d.guest(f, ".")
    d.advance(30.0)
    d.assert_clean()


def test_t64_f15_a_reset_of_the_host_is_a_rst_to_the_guest_never_a_fin(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(b"some")
    d.expect(f, ".")
    d.guest(f, ".")
    d.host(f).reset()
    d.expect(f, "R.", seq=f.rcv, ack=f.snd)
    d.expect_none(10.0, f)
    d.assert_clean()


def test_t64_f15_octets_before_the_reset_are_delivered_or_followed_by_rst_not_fin(
    d: Drill, established: Established
) -> None:
    f = established(window=3000)
    d.host(f).send(pattern(10_000))
    d.settle()
    d.collect(f)
    d.host(f).reset()
    d.settle()
    for _ in range(20):
        segments = d.collect(f, within=0.3)
        assert not any(segment.flags & FIN for segment in segments)
        if any(segment.flags & RST for segment in segments):
            break
        d.guest(f, ".")
    else:
        pytest.fail("no RST")
    assert f.received == pattern(10_000)[: len(f.received)]
    d.assert_clean()


@pytest.mark.parametrize("code", [errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EPIPE])
def test_t64_f10_a_host_connection_that_breaks_resets_the_guest(d: Drill, established: Established, code: int) -> None:
    f = established()
    d.host(f).reset(code)
    segments = d.collect(f, within=0.1)
    assert segments[-1].flags & RST
    d.assert_clean()


def test_t64_a_reset_after_the_hosts_end_of_file_resets_too(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.host(f).reset()
    d.settle()
    d.guest(f, ".", data=b"x")
    assert d.collect(f, within=0.1)[-1].flags & RST
    d.assert_clean()


def test_t65_rst_with_data_in_flight_resets_the_host(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).send(pattern(50_000))
    d.settle()
    d.collect(f)
    d.guest(f, ".", data=b"unsent", queue=True)
    d.guest(f, "R", seq=f.snd)
    assert d.host(f).aborted
    d.expect_none(60.0, f)
    d.assert_clean()


@pytest.mark.parametrize("closing", ["guest first", "host first"])
def test_t65_rst_in_a_half_closed_flow_resets_the_host(d: Drill, established: Established, closing: str) -> None:
    f = established()
    if closing == "guest first":
        d.guest(f, "F.")
    else:
        d.host(f).shutdown()
        d.settle()
    d.collect(f, within=0.05)
    d.guest(f, "R", seq=f.snd)
    assert d.host(f).aborted or d.host(f).eof
    d.assert_clean()


def test_t66_a_guest_that_never_closes_its_half_is_let_go(drill: Callable[..., Drill], direction: str) -> None:
    """FIN-WAIT-2 with a host that is gone: nobody can use what the guest may still send."""
    d = drill(timeouts=Timeouts(tcp_fin_wait_s=60.0))
    f = d.open() if direction == "guest-open" else d.forward()
    d.host(f).vanish()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.expect_none(59.0, f)
    d.expect(f, "R.", within=1.1)
    d.assert_clean()


def test_t66_what_the_guest_has_not_taken_yet_is_not_cut_off(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(timeouts=Timeouts(tcp_fin_wait_s=10.0))
    f = d.open(window=128) if direction == "guest-open" else d.forward(window=128)
    d.host(f).send(bytes(150))
    d.host(f).vanish()
    d.collect(f)
    assert len(f.received) == 128
    d.guest(f, ".", window=0)
    d.advance(15.0)
    d.collect(f)
    d.guest(f, ".", window=1000)
    d.collect(f, within=0.05)
    assert len(f.received) == 150
    d.reset(f)


def test_t66_a_host_that_resets_ends_the_guests_half(drill: Callable[..., Drill], direction: str) -> None:
    d = drill()
    f = d.open() if direction == "guest-open" else d.forward()
    d.host(f).close()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.host(f).reset()
    d.expect(f, "R.", within=0.05)
    d.assert_clean()


def test_t66_a_half_closed_flow_in_use_is_not_cut_off(d: Drill, established: Established) -> None:
    f = established()
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    for _ in range(10):
        d.advance(600.0)
        d.guest(f, ".", data=b"tick")
        d.collect(f)
    assert d.host(f).received == b"tick" * 10


def test_t66_last_ack_is_given_up_when_the_guest_is_gone(drill: Callable[..., Drill], direction: str) -> None:
    d = drill(timeouts=Timeouts(tcp_user_s=100.0))
    f = d.open() if direction == "guest-open" else d.forward()
    d.guest(f, "F.")
    d.collect(f, within=0.05)
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.advance(400.0)  # our FIN is never acknowledged
    f.inbox.clear()
    d.assert_clean()


def time_wait(d: Drill, f: Flow) -> None:
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.guest(f, "F.")
    d.expect(f, ".", ack=f.snd)


def test_t67_time_wait_acknowledges_a_repeated_fin(d: Drill, established: Established) -> None:
    f = established()
    time_wait(d, f)
    d.advance(1.0)
    d.guest(f, "F.", seq=f.snd - 1)
    d.expect(f, ".", ack=f.snd, seq=f.rcv)


def test_t67_time_wait_ignores_rst(d: Drill, established: Established) -> None:
    """RFC 1337: a RST does not end TIME-WAIT early."""
    f = established()
    time_wait(d, f)
    d.guest(f, "R", seq=f.snd)
    d.expect_none(0.1, f)
    d.guest(f, "F.", seq=f.snd - 1)
    d.expect(f, ".", ack=f.snd)


def test_t67_time_wait_is_over_after_10_s(d: Drill, established: Established) -> None:
    f = established()
    time_wait(d, f)
    d.assert_clean()
    d.advance(11.0)
    d.guest(f, "F.", seq=f.snd - 1)
    d.expect(f, "R")


def test_t68_last_ack_ends_only_with_the_ack_of_the_fin(d: Drill, established: Established) -> None:
    f = established()
    d.guest(f, "F.")
    d.collect(f, within=0.05)
    d.host(f).shutdown()
    d.expect(f, "F.")
    ours = (f.rcv - 1) & MASK
    d.guest(f, ".", ack=ours)  # not of the FIN
    d.guest(f, ".", ack=ours)  # and again
    assert list(d.stack.flows())
    d.guest(f, ".", ack=f.rcv + 1)  # never sent
    assert list(d.stack.flows())
    d.collect(f)
    d.guest(f, ".", ack=f.rcv)
    d.settle()
    d.assert_clean()


def test_t69_flows_that_end_early_leave_nothing(d: Drill) -> None:
    """2,000 connections that end in every early way: nothing is left of them."""
    d.check = False
    for index in range(2000):
        way = index % 6
        d.io.default = Never() if way == 0 else Accept()
        f = d.flow(sport=1024 + index)
        d.syn(f)
        far = d.io.connects[-1].peer
        if way == 0:
            d.guest(f, "R", seq=f.snd, ack=0)
        else:
            synack = d.expect(f, "S.")
            f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
        if way == 1:
            d.guest(f, "R", seq=f.snd)
        elif way == 2:
            d.guest(f, "F.")
            d.guest(f, "R", seq=f.snd)
        elif way == 3:
            far.reset()  # nobody tells the guest before its ACK; here that never comes
            d.settle()
        elif way == 4:
            d.guest(f, ".")
            far.send(b"x")
            d.settle()
            d.guest(f, "R", seq=f.snd)
        elif way == 5:
            d.guest(f, "F.")
            far.shutdown()
            d.settle()
            d.guest(f, ".", ack=f.iss + 2)
        del d.flows[f.key]
        d.others.clear()
    d.advance(200.0)
    d.assert_clean()


@pytest.mark.parametrize("order", list(itertools.permutations(["guest fin", "host fin", "guest data", "host data"])))
def test_p8_half_closes_and_data_in_any_order_deliver_everything(d: Drill, order: tuple[str, ...]) -> None:
    f = d.open()
    far = d.host(f)
    wanted_by_host, wanted_by_guest = b"", b""
    guest_open, host_open = True, True
    for step in order:
        if step == "guest fin":
            d.guest(f, "F.")
            guest_open = False
        elif step == "host fin":
            far.shutdown()
            host_open = False
        elif step == "guest data" and guest_open:
            d.guest(f, ".", data=b"guest")
            wanted_by_host = b"guest"
        elif step == "host data" and host_open:
            far.send(b"host")
            wanted_by_guest = b"host"
        d.collect(f, within=0.05)
        d.guest(f, ".")
    assert far.received == wanted_by_host and far.eof
    assert f.received == wanted_by_guest
    d.advance(60.0)
    d.assert_clean()


def test_an_ordinary_exchange_takes_the_frames_it_should(d: Drill) -> None:
    """SYN-ACK, data, FIN: no frame more than needed (P5)."""
    f = d.open()
    d.guest(f, "P.", data=b"GET / HTTP/1.0\r\n\r\n")
    d.host(f).send(b"HTTP/1.0 200 OK\r\n\r\nhello")
    d.host(f).shutdown()
    d.collect(f, within=0.001)
    d.guest(f, "F.")
    d.collect(f, within=0.1)
    assert d.emitted <= 6
    assert d.host(f).eof
    d.advance(30.0)
    d.assert_clean()
    assert not any(segment.flags & ACK == 0 for segment in f.inbox)
