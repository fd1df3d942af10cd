"""Faults that must be survived (threats-and-faults.md section 2), those that show in one process.

Elsewhere: F5, F13, F14 in tests/tcp/test_handshake; F10, F15, F16 in tests/tcp/test_close and test_established; F22 there as
T55; F23 in tests/sim; F24 in test_link_and_arp.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from netstack.api import Endpoint
from tests.support import packets
from tests.support.drill import GATEWAY, GUEST, SERVER, Drill, pattern
from tests.support.fake_host import Accept, Never, Refuse
from tests.support.link import MemoryLink
from tests.support.packets import ip

# F7, F8: time.


def test_f7_a_guest_paused_for_60_s_loses_nothing(d: Drill) -> None:
    f = d.open(window=60_000)
    data = pattern(500_000)
    d.host(f).send(data)
    d.settle()
    d.collect(f)
    f.received.clear()
    f.rcv = (f.iss + 1) & packets.MASK
    before = d.emitted
    d.advance(60.0)
    assert d.emitted - before <= 200, "retransmission backs off"
    assert f.sock is not None and f.sock.buffered > 300_000, "the rest waits at the host"
    f.inbox.clear()
    assert d.transfer(f, 500_000, limit_s=200.0) == data


def test_f8_a_jump_of_8_hours_fires_each_timer_once(d: Drill) -> None:
    """The clock of a suspended laptop: idle mappings end, flows live, and there is no storm."""
    f = d.open()
    d.udp(("8.8.8.8", 53), b"question")
    d.udp(("8.8.8.8", 7), b"x", sport=1)
    d.host(f).send(b"unacknowledged")
    d.settle()
    before = d.emitted
    d.clock.now += 8 * 3600.0
    d.settle()
    assert d.emitted - before <= 3
    d.advance(1.0)
    assert len(d.io.sockets) <= 1
    f.inbox.clear()


# F19: every call of the operating system fails once.


def scenario_guest_opens(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    d.advance(0.01)
    if not f.inbox or f.inbox[0].flags & packets.RST:
        return
    d.establish(f)
    d.guest(f, "P.", data=pattern(3000))
    if f.far is not None:
        f.far.send(pattern(8000))
    d.advance(0.01)
    if list(d.stack.flows()):
        d.collect(f)
        d.guest(f, ".")
        d.guest(f, "F.")
        if f.far is not None:
            f.far.shutdown()
        d.advance(0.3)
        d.collect(f)
        d.guest(f, ".")


def scenario_slow_connect(d: Drill) -> None:
    d.io.on_connect(SERVER, Accept(after=0.5))
    f = d.flow()
    d.syn(f)
    d.advance(1.0)
    d.collect(f)
    d.guest(f, "R", seq=f.snd)


def scenario_refused(d: Drill) -> None:
    d.io.on_connect(SERVER, Refuse(after=0.1))
    f = d.flow()
    d.syn(f)
    d.advance(1.0)


def scenario_host_stalls(d: Drill) -> None:
    f = d.flow()
    d.syn(f)
    d.advance(0.01)
    if not f.inbox or f.inbox[0].flags & packets.RST or f.far is None:
        return
    d.establish(f)
    f.far.stop_reading()
    for index in range(220):
        d.guest(f, ".", data=pattern(1460, index))
        if f.inbox and f.inbox[-1].flags & packets.RST:
            return
    f.far.resume()
    d.advance(0.1)
    d.guest(f, "R", seq=f.snd)


def scenario_forward(d: Drill) -> None:
    sock, far = d.io.connected()
    d.stack.dial(Endpoint(GUEST, 80), sock)
    d.settle()
    far.send(b"hello")
    d.advance(0.1)
    if d.others:
        syn = packets.read_tcp(d.others.popleft())
        body = packets.tcp(GUEST, syn.source, 80, syn.sport, 7, syn.seq + 1, packets.SYN | packets.ACK, 60000)
        d.ip(6, body, dst=syn.source)
        d.advance(0.1)
        d.ip(6, packets.tcp(GUEST, syn.source, 80, syn.sport, 8, 0, packets.RST, 0), dst=syn.source)


def scenario_udp(d: Drill) -> None:
    for port in (1000, 1001):
        d.udp(("8.8.8.8", 7), b"x", sport=port, ttl=9)
        if d.io.datagrams:
            d.io.datagrams[-1].answer(b"y")
        d.settle()
        if d.io.datagrams:
            sent = d.io.datagrams[-1]
            sent.sock.unreachable(sent, 3, 3, errno.ECONNREFUSED, "8.8.8.8")
        d.settle()


def scenario_ping(d: Drill) -> None:
    d.ip(packets.ICMP, packets.echo(1, 1), dst=ip("8.8.8.8"))
    if d.io.datagrams:
        sent = d.io.datagrams[-1]
        sent.answer(b"\0\0" + bytes(2) + sent.data[4:])
    d.settle()
    if d.io.datagrams:
        sent.sock.unreachable(sent, 11, 0, errno.EHOSTUNREACH, "10.0.0.1")
    d.settle()


def scenario_published_udp(d: Drill) -> None:
    sock = d.io.bound()
    try:
        handle = d.stack.datagrams(Endpoint(GUEST, 9000), sock)
    except OSError:
        assert sock.closed, "refused, so its socket is closed"
        return
    sock.deliver(b"x", ("127.0.0.1", 4000))
    d.settle()
    if d.others:
        source, _port, _payload = d.take_udp()
        d.udp(source, b"back", sport=9000)
    handle.close()


SCENARIOS = [
    scenario_guest_opens,
    scenario_slow_connect,
    scenario_refused,
    scenario_host_stalls,
    scenario_forward,
    scenario_udp,
    scenario_ping,
    scenario_published_udp,
]
ERRNOS = [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM]


@pytest.mark.parametrize("peek_off", [True, False], ids=["peek", "kept"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__.removeprefix("scenario_"))
def test_f19_an_error_of_any_call_ends_at_most_its_own_flow(
    drill: Callable[..., Drill], scenario: Callable[[Drill], None], peek_off: bool
) -> None:
    """The n-th call fails, for each n: no exception, nothing left behind, and the next flow works (A0, A2)."""
    index, ran = 1, 0
    while True:
        d = Drill(peek_off=peek_off, seed=index)
        used = d.io.total_calls
        code = ERRNOS[index % len(ERRNOS)]
        d.io.fail_at(used + index, code)
        scenario(d)
        reached = d.io.total_calls >= used + index
        where = f"call {index} of {scenario.__name__} fails with {errno.errorcode[code]}"
        for flow in d.flows.values():
            flow.inbox.clear()
        d.others.clear()
        d.flows.clear()
        assert not d.io.misuse, f"{where}: {d.io.misuse}"
        d.io.on_connect(SERVER, Accept())
        d.advance(1300.0)
        d.others.clear()
        try:
            d.assert_clean()
            if reached:
                f = d.open(sport=60000)
                d.guest(f, ".", data=b"the next one")
                assert d.host(f).received == b"the next one"
        except AssertionError as error:
            raise AssertionError(f"{where}: {error}") from error
        d.close()
        ran += 1
        if not reached:
            break
        index += 1 if index < 40 else 7
        assert index < 3000
    assert ran > 3, "the scenario makes calls"


@pytest.mark.parametrize("code", ERRNOS, ids=lambda code: errno.errorcode[code])
def test_f19_r1_out_of_descriptors_the_guest_is_refused_and_service_returns(d: Drill, code: int) -> None:
    good = d.open()
    for _ in range(20):
        d.io.fail("socket", 1, code)
        f = d.flow()
        d.syn(f)
        d.expect(f, "R.", seq=0, ack=f.isn + 1)
    # UDP may let idle mappings go and try again; when nothing helps the guest is told.
    for nth in range(1, 5):
        d.io.fail("socket", nth, code)
    d.udp(("8.8.8.8", 7), b"x", sport=7)
    d.io.heal()
    d.others.clear()
    d.guest(good, ".", data=b"unharmed")
    d.collect(good, within=0.05)
    assert d.host(good).received == b"unharmed"
    d.open()


def test_f19_enobufs_of_a_datagram_send_is_a_lost_datagram(d: Drill) -> None:
    d.udp(("8.8.8.8", 7), b"first", sport=7)
    for _ in range(3):
        d.io.fail("sendto", 1, errno.ENOBUFS)
        d.udp(("8.8.8.8", 7), b"lost", sport=7)
    d.expect_none(0.1)
    d.udp(("8.8.8.8", 7), b"last", sport=7)
    assert [sent.data for sent in d.io.datagrams] == [b"first", b"last"]


def test_partial_writes_to_the_host_keep_every_octet(drill: Callable[..., Drill]) -> None:
    """The host takes 7 octets at a time, at each size of segment."""
    for peek_off in (True, False):
        d = drill(peek_off=peek_off)
        d.io.send_at_most = 7
        f = d.open()
        data = pattern(5000)
        at = 0
        for size in (1, 6, 7, 8, 100, 1460, 1460, 1460):
            d.guest(f, ".", data=data[at : at + size])
            at += size
            d.collect(f, within=0.01)
        assert d.host(f).received == data[:at]


# Links that come and go, the end of the process.


def test_f6_a_guest_whose_link_is_lost_is_reset_after_its_grace(d: Drill) -> None:
    f = d.open()
    d.link.down = "the hypervisor is gone"
    d.settle()
    assert not d.host(f).aborted, "it may come back"
    d.advance(40.0)
    assert d.host(f).aborted
    assert not d.io.sockets


def test_f3_a_guest_that_comes_back_on_another_link_goes_on(d: Drill) -> None:
    f = d.open()
    d.link.down = "reconnecting"
    d.settle()
    d.host(f).send(b"while away")
    d.advance(5.0)
    link = MemoryLink("memory:1")
    d.io.adopt(link)
    d.stack.attach(link)
    d.use(link)
    d.learn(GUEST, f.mac)
    d.advance(10.0)
    d.collect(f)
    assert f.received == b"while away"
    d.guest(f, ".", data=b"back")
    assert d.host(f).received == b"back"


def test_f18_drain_takes_no_new_flows_and_leaves_the_old_ones(d: Drill) -> None:
    f = d.open()
    d.stack.drain()
    late = d.flow()
    d.syn(late)
    d.expect(late, "R.")
    d.udp(("8.8.8.8", 7), b"x")
    assert not d.io.datagrams
    d.others.clear()
    d.guest(f, ".", data=b"goes on")
    d.collect(f, within=0.05)
    assert d.host(f).received == b"goes on"


def test_f18_close_resets_every_flow_both_ways(d: Drill) -> None:
    flows = [d.open(), d.forward()]
    half = d.open()
    d.guest(half, "F.")
    d.collect(half, within=0.05)
    d.io.on_connect(("1.2.3.4", 5), Never())
    pending = d.flow(("1.2.3.4", 5))
    d.syn(pending)
    d.udp(("8.8.8.8", 7), b"x")
    d.ip(packets.ICMP, packets.echo(1, 1), dst=ip("8.8.8.8"))
    d.stack.close()
    d._collect()
    for f in flows:
        assert d.host(f).aborted
        assert f.inbox[-1].flags & packets.RST
    assert not d.io.sockets
    assert d.link.closed


def test_a_bug_in_one_flow_is_contained_to_it(d: Drill) -> None:
    """An exception inside a flow resets that flow, is counted and told as an event; others never notice."""
    victim, other = d.open(), d.open()

    def broken(*_args: object) -> int:
        raise RuntimeError("planted")

    assert victim.sock is not None
    victim.sock.send = broken  # type: ignore[assignment,method-assign]
    victim.sock.sendmsg = broken  # type: ignore[assignment,method-assign]
    d.guest(victim, ".", data=b"x")
    d.collect(victim)
    assert d.host(victim).aborted
    assert d.stack.counters.contained == 1
    assert [event.name for event in d.events if event.name == "Contained"] == ["Contained"]
    d.guest(other, ".", data=b"fine")
    d.collect(other, within=0.05)
    assert d.host(other).received == b"fine"
    d.stack.counters.contained = 0
    d.events.clear()


def test_p7_the_same_inputs_make_the_same_frames() -> None:
    """Determinism: nothing but `clock` and `rng` decides."""

    def run() -> list[tuple[float, bytes]]:
        d = Drill(seed=7)
        f = d.open()
        d.host(f).send(pattern(20_000))
        d.transfer(f, 20_000)
        d.udp(("8.8.8.8", 7), b"x")
        d.io.datagrams[-1].answer(pattern(3000))
        d.settle()
        d.ip(packets.ICMP, packets.echo(1, 1), dst=GATEWAY)
        g = d.forward()
        d.finish(g)
        d.close()
        return d.frames

    assert run() == run()
