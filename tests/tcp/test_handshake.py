"""The TCP handshake towards the guest (conformance.md section 4), frame by frame in virtual time."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest

from netstack.api import Endpoint
from tests.support import packets
from tests.support.drill import GUEST, GUEST_MAC, SERVER, Drill, Flow, pattern
from tests.support.fake_host import Accept, Never, Peer, Refuse
from tests.support.packets import ACK, MASK, RST, SYN

# The guest opens.


def test_t01_syn_ack_comes_only_after_the_host_connected(d: Drill) -> None:
    d.io.on_connect(SERVER, Accept(after=0.05))
    f = d.flow()
    d.syn(f)
    d.expect_none(0.049)
    synack = d.expect(f, "S.", ack=f.isn + 1, within=0.002)
    assert d.io.connects[0].remote == SERVER
    assert len(synack.payload) == 0


def test_t01_a_connect_that_succeeds_at_once_is_answered_at_once(d: Drill) -> None:
    f = d.open()
    assert d.clock.now == pytest.approx(1000.0, abs=0.01)
    d.reset(f)
    d.assert_clean()


def test_t02_repeated_syns_during_a_slow_connect_make_one_connect_and_one_syn_ack(d: Drill) -> None:
    d.io.on_connect(SERVER, Accept(after=8.0))
    f = d.flow()
    d.syn(f)
    for wait in (1.0, 2.0, 4.0):
        d.expect_none(wait)
        d.syn(f)
    d.expect(f, "S.", ack=f.isn + 1, within=1.5)
    d.expect_none(0.1, f)
    assert len(d.io.connects) == 1


def test_t03_refused_is_told_by_rst_at_once(d: Drill) -> None:
    d.io.on_connect(SERVER, Refuse())
    f = d.flow()
    d.syn(f)
    d.expect(f, "R.", seq=0, ack=f.isn + 1, within=0.0)
    d.assert_clean()


def test_t03_refused_later_is_told_within_10_ms(d: Drill) -> None:
    d.io.on_connect(SERVER, Refuse(after=0.3))
    f = d.flow()
    d.syn(f)
    d.expect_none(0.299)
    d.expect(f, "R.", seq=0, ack=f.isn + 1, within=0.011)
    d.assert_clean()


@pytest.mark.parametrize(
    ("number", "codes"),
    [
        pytest.param(errno.EHOSTUNREACH, (1,), id="EHOSTUNREACH"),
        pytest.param(errno.ENETUNREACH, (0,), id="ENETUNREACH"),
    ],
)
@pytest.mark.parametrize("at_once", [True, False], ids=["no route", "told later"])
def test_t04_unreachable_is_told_by_icmp_that_quotes_the_syn(
    d: Drill, number: int, codes: tuple[int, ...], at_once: bool
) -> None:
    d.io.on_connect(SERVER, Refuse(after=0 if at_once else 0.2, code=number, at_once=at_once))
    f = d.flow()
    d.syn(f)
    error = d.take(packets.ICMP, within=0.3)
    assert error.payload[0] == 3 and error.payload[1] in codes
    quoted = error.payload[8:]
    assert quoted[12:20] == f.guest + f.remote
    assert int.from_bytes(quoted[24:28], "big") == f.isn, "the guest's kernel matches the sequence number"
    d.assert_clean()


def test_f14_prohibited_by_the_host_is_icmp_prohibited(d: Drill) -> None:
    d.io.on_connect(SERVER, Refuse(code=errno.EACCES, at_once=True))
    f = d.flow()
    d.syn(f)
    d.take_icmp(3, 13)
    d.assert_clean()


def test_f14_no_local_address_is_rst(d: Drill) -> None:
    d.io.on_connect(SERVER, Refuse(code=errno.EADDRNOTAVAIL, at_once=True))
    f = d.flow()
    d.syn(f)
    d.expect(f, "R.", ack=f.isn + 1)
    d.assert_clean()


def test_t05_f13_a_connect_that_never_answers_is_given_up_within_127_s(d: Drill) -> None:
    d.io.on_connect(SERVER, Never())
    f = d.flow()
    d.syn(f)
    for wait in (1.0, 2.0, 4.0, 8.0, 16.0):
        d.expect_none(wait)
        d.syn(f)
    d.advance(127.5 - 31.0)
    assert f.inbox or d.others, "the guest is told"
    assert len(d.io.connects) == 1
    assert d.io.connects[0].closed
    d.assert_clean()


@pytest.mark.parametrize("flags", ["R", "F."])
def test_t05_the_guest_giving_up_cancels_the_host_connect(d: Drill, flags: str) -> None:
    d.io.on_connect(SERVER, Accept(after=10.0))
    f = d.flow()
    d.syn(f)
    d.guest(f, flags, seq=f.isn + 1, ack=0)
    d.advance(11.0)
    assert not [segment for segment in f.inbox if segment.flags & SYN], "no SYN-ACK for a connection nobody wants"
    assert d.io.connects[0].closed
    d.assert_clean()


def test_t06_a_lost_syn_ack_is_sent_again_with_backoff_then_given_up(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    first = d.expect(f, "S.", ack=f.isn + 1)
    gaps, last = [], d.clock.now
    for _ in range(7):
        d._wait(lambda: bool(f.inbox), 130)
        if not f.inbox or f.inbox[0].flags & RST:
            break
        again = d.expect(f, "S.", seq=first.seq, ack=f.isn + 1)
        gaps.append(again.time - last)
        last = again.time
    assert 3 <= len(gaps) <= 6, gaps
    assert 0.8 <= gaps[0] <= 3.0
    assert all(1.7 <= b / a <= 2.3 for a, b in itertools.pairwise(gaps)), gaps
    d.advance(130.0)
    d.assert_clean()


def test_t06_a_repeated_syn_gets_the_same_syn_ack(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    first = d.expect(f, "S.", ack=f.isn + 1)
    d.syn(f)
    again = d.expect(f, "S.", ack=f.isn + 1, within=1.1)
    assert again.seq == first.seq
    assert len(d.io.connects) == 1
    f.iss, f.rcv = first.seq, (first.seq + 1) & MASK
    f.synack = first
    d.guest(f, ".")
    d.guest(f, ".", data=b"hello")
    d.expect(f, ".", ack=f.snd, within=0.04)
    assert d.host(f).received == b"hello"


def test_t06_the_handshake_completes_when_only_the_second_syn_ack_arrives(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    d.expect(f, "S.")
    d.establish(f, within=3.1)
    d.host(f).send(b"banner")
    d.expect(f, ".", data=b"banner")


def test_t07_g18_rst_in_syn_received_frees_the_host_socket_and_is_not_answered(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    d.expect(f, "S.")
    d.guest(f, "R", seq=f.isn + 1)
    d.expect_none(0.0)
    assert d.io.connects[0].closed
    d.expect_none(130.0)
    d.assert_clean()


@pytest.mark.parametrize("distance", [-1, 1, 100_000], ids=["too low", "one too high", "far too high"])
def test_t08_a_wrong_ack_in_syn_received_is_answered_rst_and_the_right_one_still_works(d: Drill, distance: int) -> None:
    f = d.flow()
    d.syn(f)
    synack = d.expect(f, "S.")
    wrong = (synack.seq + 1 + distance) & MASK
    d.guest(f, ".", ack=wrong)
    d.expect(f, "R", seq=wrong)
    f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
    d.guest(f, ".")
    d.guest(f, ".", data=b"still here")
    d.expect(f, ".", ack=f.snd, within=0.04)
    assert d.host(f).received == b"still here"


def test_t08_an_unacceptable_segment_with_the_right_ack_does_not_stop_the_handshake(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    synack = d.expect(f, "S.")
    d.guest(f, ".", seq=f.snd + (1 << 30), ack=synack.seq + 1)  # out of the window
    d.collect(f)
    again = d.expect(f, "S.", within=2.0)
    assert again.seq == synack.seq, "the SYN-ACK is still being sent again"
    f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
    d.guest(f, ".")
    d.guest(f, ".", data=b"open")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"open"


def test_t09_data_in_the_ack_of_the_handshake_is_delivered(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    synack = d.expect(f, "S.")
    f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
    d.guest(f, "P.", data=b"GET /")
    d.expect(f, ".", ack=f.snd, within=0.05)
    assert d.host(f).received == b"GET /"


@pytest.mark.parametrize("data", [b"", b"bye"], ids=["FIN", "data and FIN"])
def test_t09_fin_in_syn_received_is_accepted(d: Drill, data: bytes) -> None:
    f = d.flow()
    d.syn(f)
    synack = d.expect(f, "S.")
    f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
    d.guest(f, "F.", data=data)
    d.expect(f, ".", ack=f.snd, within=0.05)
    assert d.host(f).received == data
    assert d.host(f).eof
    d.host(f).send(b"answer")
    d.expect(f, ".", data=b"answer")
    d.host(f).shutdown()
    d.expect(f, "F.", seq=f.rcv)
    d.guest(f, ".")
    d.advance(60.0)
    d.assert_clean()


def test_t10_data_on_a_syn_is_not_acknowledged(d: Drill) -> None:
    f = d.flow()
    cookie = bytes((34, 2, 1, 1))  # TCP fast open without cookie
    d.syn(f, data=b"early", options=packets.mss_option(1460) + cookie)
    f.snd = (f.isn + 1) & MASK
    d.establish(f)
    d.guest(f, ".", data=b"early")
    d.expect(f, ".", ack=f.isn + 6, within=0.04)
    assert d.host(f).received == b"early"


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        pytest.param(b"", 536, id="no MSS"),
        pytest.param(packets.mss_option(0), 536, id="MSS 0 is ignored"),
        pytest.param(packets.mss_option(1), 88, id="MSS 1 is clamped"),
        pytest.param(packets.mss_option(1000), 1000, id="MSS 1000"),
        pytest.param(packets.mss_option(9000), 1460, id="MSS beyond our MTU"),
        pytest.param(b"\1\1\1\0" + packets.mss_option(1000), 536, id="end of options before the MSS"),
        pytest.param(b"\2\0\1\1", 536, id="length 0"),
        pytest.param(b"\2\1\1\1", 536, id="length 1"),
        pytest.param(b"\2\x28\5\xb4", 536, id="length beyond the header"),
        pytest.param(b"\xfd\4ab" + packets.mss_option(1000), 1000, id="unknown kind"),
        pytest.param(b"\2\3\7\1" + packets.mss_option(1000), 1000, id="MSS of a wrong length is skipped"),
        pytest.param(b"\1\1\1\2", 536, id="kind without length"),
    ],
)
def test_t11_options_of_the_syn_are_read_safely(d: Drill, options: bytes, largest: int) -> None:
    f = d.open(options=options, scale=None)
    d.host(f).send(pattern(4000))
    d.settle()
    sizes = [len(segment.payload) for segment in d.collect(f)]
    assert max(sizes) == largest
    assert sum(sizes) == 4000


@pytest.mark.parametrize("mtu", [576, 1280, 1500, 9000, 65520])
@pytest.mark.parametrize("mss", [1460, None], ids=["with MSS", "without MSS"])
def test_t12_our_mss_is_the_mtu_less_40(drill: Callable[..., Drill], mtu: int, mss: int | None) -> None:
    d = drill(mtu=mtu)
    f = d.open(mss=mss)
    assert f.synack is not None and f.synack.mss == mtu - 40
    g = d.dial()
    assert g.synack is not None and g.synack.mss == mtu - 40


def test_t13_window_scale_only_if_the_guest_offered_it(d: Drill) -> None:
    f = d.open(scale=None)
    assert f.synack is not None and f.synack.shift is None
    d.host(f).send(pattern(200_000))
    d.settle()
    assert sum(len(segment.payload) for segment in d.collect(f)) <= 65535, "the window is not scaled"
    g = d.open(scale=0)
    assert g.synack is not None and g.synack.shift is not None


def test_t13_a_shift_above_14_counts_as_14(d: Drill) -> None:
    f = d.open(scale=15, window=65535)
    f.scale = 14
    d.guest(f, ".", window=1 << 14)
    d.host(f).send(pattern(200_000))
    d.settle()
    assert 0 < sum(len(segment.payload) for segment in d.collect(f)) <= (1 << 14) + 65535


def test_t13_the_window_of_a_syn_is_not_scaled(d: Drill) -> None:
    f = d.flow()
    d.syn(f, window=1000, scale=7)
    synack = d.expect(f, "S.")
    assert synack.window > 0
    f.iss, f.rcv, f.synack = synack.seq, (synack.seq + 1) & MASK, synack
    d.host(f).send(pattern(5000))
    f.window = 1000
    d.guest(f, ".", window=896)  # 7 << 7
    d.settle()
    assert sum(len(segment.payload) for segment in d.collect(f)) <= 1000


def test_t14_sack_only_if_the_guest_offered_it(d: Drill) -> None:
    f = d.open(sack=False)
    assert f.synack is not None and 4 not in f.synack.options
    d.guest(f, ".", seq=f.snd + 100, data=b"beyond a hole")
    assert not d.expect(f, ".", ack=f.snd).sack
    g = d.open(sack=True)
    assert g.synack is not None and 4 in g.synack.options


def test_t14_timestamps_are_not_used_unless_offered(d: Drill) -> None:
    f = d.open()
    assert f.synack is not None and 8 not in f.synack.options
    g = d.open(options=packets.mss_option(1460) + packets.timestamp_option(1, 0))
    d.guest(g, ".", data=b"x", options=packets.timestamp_option(2, 0))
    d.expect(g, ".", ack=g.snd, within=0.04)
    assert d.host(g).received == b"x"


@pytest.mark.parametrize("flags", ["SF", "SR", "-", "FPU", "SF.", "SR."], ids=lambda flags: f"flags {flags}")
def test_t15_impossible_flags_are_dropped(d: Drill, flags: str) -> None:
    f = d.flow()
    d.guest(f, flags, seq=1000, ack=0)
    d.expect_none(5.0)
    assert not d.io.connects
    d.assert_clean()


@pytest.mark.parametrize("flags", ["SF", "SR", "-", "FPU"], ids=lambda flags: f"flags {flags}")
def test_t15_impossible_flags_do_not_harm_a_flow(d: Drill, established: Callable[..., object], flags: str) -> None:
    f = established()
    d.guest(f, flags, seq=f.snd, data=b"junk", ack=0)
    f.snd = (f.isn + 1) & MASK
    d.collect(f)
    d.guest(f, ".", data=b"data")
    d.collect(f)
    assert d.host(f).received == b"data"


def test_t16_a_stray_segment_is_answered_rst_with_its_ack_as_number(d: Drill) -> None:
    f = d.flow()
    d.guest(f, ".", seq=1000, ack=777, data=b"x")
    reply = d.expect(f, "R")
    assert reply.seq == 777


def test_t16_a_stray_syn_ack_is_answered_rst(d: Drill) -> None:
    f = d.flow()
    d.guest(f, "S.", seq=1000, ack=777)
    assert d.expect(f, "R").seq == 777


def test_t16_a_stray_fin_without_ack_is_answered_rst_that_acknowledges_it(d: Drill) -> None:
    f = d.flow()
    d.guest(f, "F", seq=1000, data=b"abc", ack=0)
    got = f.inbox[0] if f.inbox else None
    assert got is None or (got.flags & RST and got.flags & ACK and got.ack == 1004 and got.seq == 0)
    f.inbox.clear()


def test_t16_a_stray_rst_is_met_with_silence(d: Drill) -> None:
    f = d.flow()
    d.guest(f, "R", seq=1000)
    d.guest(f, "R.", seq=1000, ack=5)
    d.expect_none(1.0)


def test_t17_a_new_syn_on_a_time_wait_tuple_is_a_new_connection(d: Drill) -> None:
    f = d.open(sport=41000, isn=1000)
    d.host(f).shutdown()
    d.expect(f, "F.")
    d.guest(f, ".")
    d.guest(f, "F.")
    d.expect(f, ".", ack=f.snd)
    again = d.open(sport=41000, isn=f.snd + 10_000)
    d.guest(again, ".", data=b"new")
    d.expect(again, ".", ack=again.snd, within=0.04)
    assert d.host(again).received == b"new"
    assert d.host(again) is not d.host(f)


def test_t18_f5_a_rebooted_guest_that_reuses_a_port_gets_through(d: Drill) -> None:
    f = d.open(sport=41000)
    d.guest(f, ".", data=b"before the reboot")
    d.expect(f, ".", within=0.04)
    old, f_rcv, f_snd = d.host(f), f.rcv, f.snd
    g = d.flow(sport=41000, isn=f.snd + 20)  # inside the old window
    d.syn(g)
    challenge = d.expect(g, ".", ack=f_snd)
    assert challenge.seq == f_rcv
    # The guest's kernel knows nothing of that number: RST.
    d.guest(g, "R", seq=challenge.ack)
    d.settle()
    assert old.aborted
    d.advance(1.0)
    d.syn(g)
    g.sock = d.io.connects[-1]
    g.far = g.sock.peer
    d.establish(g)
    d.guest(g, ".", data=b"after")
    d.collect(g)
    assert d.host(g).received == b"after"


def test_t18_a_syn_outside_the_old_window_is_challenged_too(d: Drill) -> None:
    f = d.open(sport=41000, isn=5000)
    g = d.flow(sport=41000, isn=5000 - (1 << 30))
    d.syn(g)
    challenge = d.expect(g, ".")
    assert challenge.ack == f.snd
    d.guest(g, "R", seq=challenge.ack)
    assert d.host(f).aborted


def test_t19_ecn_setup_is_accepted_and_declined(d: Drill) -> None:
    f = d.flow()
    d.syn(f, flags="SEW")
    d.establish(f)


# The host side opens.


def test_t20_our_syn_is_sent_again_when_the_guest_is_slow(d: Drill) -> None:
    f = d.dial()
    first = f.synack
    assert first is not None
    again = d.expect(f, "S", seq=first.seq, within=3.1)
    assert again.time - first.time >= 0.8
    options = packets.mss_option(1460) + packets.scale_option(7)
    d.guest(f, "S.", seq=f.isn, ack=f.rcv, options=options, scaled=False)
    f.snd = (f.isn + 1) & MASK
    d.expect(f, ".", ack=f.snd)


def test_t20_x03_a_refusing_guest_resets_the_host_client(d: Drill) -> None:
    ends: list[str] = []
    f = d.dial(on_close=ends.append)
    d.guest(f, "R.", seq=0, ack=f.rcv)
    assert d.host(f).aborted
    assert len(ends) == 1
    d.expect_none(10.0)
    d.assert_clean()


def test_t20_a_guest_that_never_answers_resets_the_host_client_in_the_end(d: Drill) -> None:
    f = d.dial()
    d.advance(200.0)
    assert d.host(f).aborted
    syns = [segment for segment in f.inbox if segment.flags & SYN]
    assert 3 <= len(syns) <= 7
    d.assert_clean()


def test_t20_icmp_unreachable_from_the_guest_closes_the_forward(d: Drill) -> None:
    f = d.dial()
    assert f.synack is not None
    syn = packets.tcp(f.remote, f.guest, f.dport, f.sport, f.synack.seq, 0, SYN, 65535)
    quoted = packets.ipv4(f.remote, f.guest, packets.TCP, syn, df=True)[:28]
    d.ip(packets.ICMP, packets.icmp(3, 3, body=quoted), dst=f.remote)
    assert d.host(f).aborted
    d.assert_clean()


def test_t21_simultaneous_open_makes_one_connection(d: Drill) -> None:
    f = d.dial()
    d.guest(f, "S", seq=f.isn, ack=0, options=packets.mss_option(1460), scaled=False)
    f.snd = (f.isn + 1) & MASK
    f.scale = 0
    synack = d.expect(f, "S.", ack=f.snd)
    assert f.synack is not None and synack.seq == f.synack.seq
    d.guest(f, "S.", seq=f.isn, ack=f.rcv, options=packets.mss_option(1460), scaled=False)
    d.collect(f)
    d.guest(f, ".")
    d.guest(f, ".", data=b"met")
    d.collect(f)
    assert d.host(f).received == b"met"
    assert len(list(d.stack.flows())) == 1


@pytest.mark.parametrize("flags", [".", "S."])
def test_t22_a_bad_ack_in_syn_sent_is_answered_rst_and_the_right_one_still_works(d: Drill, flags: str) -> None:
    f = d.dial()
    d.guest(f, flags, seq=f.isn, ack=f.rcv + 5, scaled=False)
    d.expect(f, "R", seq=f.rcv + 5)
    options = packets.mss_option(1460)
    f.scale = 0
    d.guest(f, "S.", seq=f.isn, ack=f.rcv, options=options, scaled=False)
    f.snd = (f.isn + 1) & MASK
    d.expect(f, ".", ack=f.snd)


def test_t22_a_rst_with_a_bad_ack_in_syn_sent_is_ignored(d: Drill) -> None:
    f = d.dial()
    d.guest(f, "R.", seq=0, ack=f.rcv + 5)
    d.guest(f, "R", seq=f.rcv, ack=None)
    assert not d.host(f).aborted
    d.expect_none(0.5, f)


def test_t23_g17_g21_syns_beyond_the_cap_are_refused_and_nothing_is_left(drill: Callable[..., Drill]) -> None:
    from netstack.settings import Limits

    d = drill(limits=Limits(max_flows=50))
    d.io.default = Never()
    for port in range(200):
        f = d.flow(("198.51.100.1", 1000 + port))
        d.syn(f)
    assert len(d.io.sockets) <= 50
    refused = [f for f in d.flows.values() if f.inbox]
    assert len(refused) >= 150
    assert all(segment.flags & RST for f in refused for segment in f.inbox)
    for f in d.flows.values():
        f.inbox.clear()
    d.advance(200.0)
    d.assert_clean()
    d.io.default = Accept()
    d.reset(d.open())
    d.assert_clean()


def test_t23_g18_a_scan_of_2000_ports_leaves_nothing_behind(d: Drill) -> None:
    d.check = False
    for port in range(1, 2001):
        f = d.flow(("198.51.100.1", port), sport=50000)
        d.syn(f)
        d.expect(f, "S.")
        d.guest(f, "R", seq=f.snd)
        del d.flows[f.key]
    d.assert_clean()
    assert len(d.io.connects) == 2000


def test_isn_differs_between_connections_and_is_not_a_counter(d: Drill) -> None:
    """N6: initial sequence numbers of neighbouring ports do not reveal each other."""
    numbers = [d.open().iss for _ in range(50)]
    steps = {(b - a) & MASK for a, b in itertools.pairwise(numbers)}
    assert len(steps) == 49
    assert max(steps) > 1 << 24


def _dial_an_unknown_guest(d: Drill) -> Peer:
    sock, far = d.io.connected()
    d.oracle.macs.add(GUEST_MAC)
    d.stack.dial(Endpoint(GUEST, 80), sock)
    assert d.take(-1).destination == GUEST
    return far


def _arp_reply(d: Drill) -> None:
    reply = packets.arp(2, GUEST_MAC, GUEST, packets.ip("192.168.65.1"), packets.ip("192.168.65.1"))
    d.inject(packets.ether(bytes.fromhex("f61636bcf9c6"), GUEST_MAC, packets.ARP, reply))


def test_l06_a_forward_to_a_guest_not_seen_yet_asks_for_it_first(drill: Callable[..., Drill]) -> None:
    d = drill(resolve=False)
    far = _dial_an_unknown_guest(d)
    _arp_reply(d)
    syn = packets.read_tcp(d.take(packets.TCP))
    assert syn.flags == SYN and syn.dport == 80
    assert not far.aborted


def test_l06_what_a_client_says_while_the_guest_is_looked_for_reaches_it(drill: Callable[..., Drill]) -> None:
    """The socket tells of its octets once only, and there is no connection yet that could want them."""
    d = drill(resolve=False)
    far = _dial_an_unknown_guest(d)
    far.send(b"GET /")
    far.shutdown()
    d.settle()
    _arp_reply(d)
    syn = packets.read_tcp(d.take(packets.TCP))
    assert syn.flags == SYN
    f = Flow(GUEST, syn.source, 80, syn.sport, 1000)
    f.iss, f.rcv, f.far = syn.seq, (syn.seq + 1) & MASK, far
    d.flows[f.key] = f
    d.guest(f, "S.", seq=f.isn, ack=f.rcv, options=packets.mss_option(1460), window=65535, scaled=False)
    f.snd = (f.isn + 1) & MASK
    f.window = 65535
    assert d.expect(f, "P.", seq=f.rcv, ack=f.snd).payload == b"GET /"
    d.expect(f, "F.", seq=f.rcv, ack=f.snd)


def test_l06_a_client_that_gives_up_while_the_guest_is_looked_for_is_let_go(drill: Callable[..., Drill]) -> None:
    d = drill(resolve=False)
    _dial_an_unknown_guest(d).reset()
    d.settle()
    _arp_reply(d)
    d.expect_none(0.5)
    assert not d.stack.tcp.flows


@pytest.mark.parametrize("link_mtu", [1000, 9000])
def test_t12_the_mss_is_that_of_the_guests_own_link(drill: Callable[..., Drill], link_mtu: int, direction: str) -> None:
    """Two links of one network may differ in MTU."""
    d = drill(mtu=1500, link_mtu=link_mtu)
    f = d.open(mss=8960) if direction == "guest-open" else d.forward(mss=8960)
    assert f.synack is not None and f.synack.mss == link_mtu - 40
    d.host(f).send(bytes(20000))
    assert max(len(segment.payload) for segment in d.collect(f, within=0.05)) <= link_mtu - 40


def test_g21_a_service_gets_no_connection_when_only_reserved_descriptors_are_left(d: Drill) -> None:
    """Connections to the gateway's own services take two descriptors each."""
    d.stack.tcp.services[packets.ip("192.168.65.1"), 53] = lambda sock, source: pytest.fail("no descriptor was free")
    d.io.fail("admit", 1, errno.EMFILE)
    f = d.flow(("192.168.65.1", 53))
    d.syn(f)
    d.expect(f, "R.", seq=0, ack=f.isn + 1)
    assert d.stack.counters.drops["descriptors"] == 1
    d.assert_clean()


def test_g21_a_client_of_a_published_port_is_reset_when_only_reserved_descriptors_are_left(d: Drill) -> None:
    d.io.fail("admit", 1, errno.EMFILE)
    sock, _far = d.io.connected()
    told: list[str] = []
    d.stack.dial(Endpoint(GUEST, 80), sock, on_close=told.append)
    d.expect_none(0.1)
    assert sock.closed and told and d.stack.counters.drops["descriptors"] == 1
