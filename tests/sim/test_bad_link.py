"""A bad link delays octets but never loses, repeats or reorders them (T43, T44, F23; testing.md tier 1).

Two ends in virtual time: the model guest, and the stack with a scripted host. Every emitted frame goes through the oracle.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.drill import pattern
from tests.support.fake_host import Peer
from tests.support.link import KINDS
from tests.support.model_guest import ModelSocket
from tests.support.simulation import CLEAN, Faults, Simulation

LIMIT_S = 3600.0


@st.composite
def link_faults(draw: st.DrawFn) -> Faults:
    return Faults(
        loss=draw(st.sampled_from([0.0, 0.01, 0.05, 0.2])),
        duplicate=draw(st.sampled_from([0.0, 0.02, 0.1])),
        reorder=draw(st.sampled_from([0.0, 0.05, 0.3])),
        corrupt=draw(st.sampled_from([0.0, 0.01, 0.05])),
        delay_s=draw(st.sampled_from([0.0001, 0.0005, 0.05])),
        jitter_s=draw(st.sampled_from([0.0, 0.005])),
        rate=draw(st.sampled_from([0.0, 1e6])),
        queue=draw(st.sampled_from([10, 1000])),
    )


@st.composite
def octets(draw: st.DrawFn) -> bytes:
    size = draw(st.one_of(st.integers(0, 3000), st.integers(0, 200_000)))
    return pattern(size, size)


def talk(sim: Simulation, guest: ModelSocket, host: Peer, outbound: bytes, inbound: bytes, closing: str) -> None:
    """Send both ways, close in the given order, and compare what arrived (P8)."""
    guest.send(outbound, sim.clock.now)
    host.send(inbound)
    if closing in ("guest first", "both at once"):
        guest.shutdown(sim.clock.now)
    if closing in ("host first", "both at once"):
        host.shutdown()
    if closing == "guest first":
        assert sim.run(lambda: host.eof, LIMIT_S), state(guest, host)
        host.shutdown()
    elif closing == "host first":
        assert sim.run(lambda: guest.eof, LIMIT_S), state(guest, host)
        guest.shutdown(sim.clock.now)
    assert sim.run(lambda: guest.eof and host.eof, LIMIT_S), state(guest, host)
    assert host.received == outbound
    assert guest.received == inbound
    assert not guest.was_reset and not host.aborted
    sim.assert_quiet()


def state(guest: ModelSocket, host: Peer) -> str:
    return (
        f"stuck: the host has {len(host.received)} octets, eof {host.eof}, aborted {host.aborted}; "
        f"the guest {len(guest.received)}, eof {guest.eof}, reset {guest.was_reset}, {guest.state}"
    )


@settings(max_examples=400)
@given(
    outbound=octets(),
    inbound=octets(),
    faults=link_faults(),
    seed=st.integers(0, 1 << 30),
    opened_by=st.sampled_from(["guest", "host"]),
    closing=st.sampled_from(["guest first", "host first", "both at once"]),
    link=st.sampled_from(KINDS),
    peek_off=st.booleans(),
    buffer=st.sampled_from([1500, 8000, 65_000, 262_144]),
)
def test_t43_t44_f23_a_bad_link_delays_octets_but_never_loses_or_reorders_them(
    outbound: bytes,
    inbound: bytes,
    faults: Faults,
    seed: int,
    opened_by: str,
    closing: str,
    link: str,
    peek_off: bool,
    buffer: int,
) -> None:
    sim = Simulation(seed=seed, faults=faults, link=link, peek_off=peek_off)
    guest, host = sim.connect(opened_by, buffer=buffer)
    talk(sim, guest, host, outbound, inbound, closing)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 1 << 30),
    loss=st.sampled_from([0.0, 0.05]),
    link=st.sampled_from(KINDS),
    mtu=st.sampled_from([576, 1500, 9000, 65520]),
    sent_buffer=st.sampled_from([70, 700, 5000, 256 << 10]),
)
def test_t38_t39_readers_that_pause_and_tiny_host_buffers_lose_nothing(
    seed: int, loss: float, link: str, mtu: int, sent_buffer: int
) -> None:
    """Windows close on both sides, again and again."""
    sim = Simulation(seed=seed, faults=Faults(loss=loss), link=link, mtu=mtu)
    sim.io.sent_buffer = sent_buffer
    guest, host = sim.connect(buffer=10_000)
    rng = random.Random(seed)
    outbound, inbound = pattern(40_000, 1), pattern(80_000, 2)
    guest.send(outbound, sim.clock.now)
    host.send(inbound)
    guest.shutdown(sim.clock.now)
    host.shutdown()
    for _ in range(30):
        for end in (guest, host):
            if rng.random() < 0.5:
                if isinstance(end, Peer):
                    end.stop_reading()
                else:
                    end.pause()
        sim.run(lambda: False, rng.choice([0.01, 0.5, 3.0]))
        host.resume()
        guest.resume(sim.clock.now)
        sim.run(lambda: False, rng.choice([0.001, 0.05]))
    assert sim.run(lambda: guest.eof and host.eof, LIMIT_S), state(guest, host)
    assert host.received == outbound and guest.received == inbound
    sim.assert_quiet()


@pytest.mark.parametrize("loss", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("link", KINDS)
def test_f23_32_flows_over_one_bad_link_all_arrive(loss: float, link: str) -> None:
    faults = Faults(loss=loss, duplicate=loss / 2, reorder=loss, corrupt=loss / 5, rate=12.5e6)
    sim = Simulation(seed=32, faults=faults, link=link)
    pairs = [sim.connect("guest" if index % 2 else "host") for index in range(32)]
    for index, (guest, host) in enumerate(pairs):
        guest.send(pattern(20_000, index), sim.clock.now)
        host.send(pattern(20_000, index + 100))
        guest.shutdown(sim.clock.now)
        host.shutdown()
    assert sim.run(lambda: all(guest.eof and host.eof for guest, host in pairs), LIMIT_S)
    for index, (guest, host) in enumerate(pairs):
        assert host.received == pattern(20_000, index)
        assert guest.received == pattern(20_000, index + 100)
    sim.assert_quiet()


@pytest.mark.parametrize("who", ["guest", "host"])
@pytest.mark.parametrize("link", KINDS)
def test_p8_t64_t65_a_reset_never_looks_like_an_end(who: str, link: str) -> None:
    """At any moment of a transfer: what arrived is a beginning of what was sent, and nobody sees a clean end."""
    for seed in range(40):
        check_reset(who, seed, link)


def check_reset(who: str, seed: int, link: str) -> None:
    sim = Simulation(seed=seed, faults=Faults(loss=0.02, reorder=0.05), link=link)
    guest, host = sim.connect()
    outbound, inbound = pattern(100_000, 1), pattern(100_000, 2)
    guest.send(outbound, sim.clock.now)
    host.send(inbound)
    sim.run(lambda: False, random.Random(seed).random() * 0.2)
    if who == "guest":
        guest.abort()
        # The RST may be lost; then the stack's next segment meets a guest that knows nothing, and gets another.
        sim.run(lambda: host.aborted, 120.0)
        assert not host.eof
        if host.aborted or guest.received != inbound:
            sim.run(lambda: not sim.stack.flows(), 2000.0)
            assert host.aborted
    else:
        host.reset()
        sim.run(lambda: guest.was_reset, 300.0)
        # A lost RST is only noticed by an end that has something to say.
        assert guest.was_reset or guest.acknowledged == len(outbound)
        assert not guest.eof
    assert outbound.startswith(bytes(host.received))
    assert inbound.startswith(bytes(guest.received))


def test_t43_a_blackhole_of_20_s_is_survived() -> None:
    sim = Simulation(seed=1)
    guest, host = sim.connect()
    guest.send(pattern(300_000, 1), sim.clock.now)
    host.send(pattern(300_000, 2))
    sim.run(lambda: False, 0.004)
    sim.faults = Faults(loss=1.0)
    sim.run(lambda: False, 20.0)
    sim.faults = CLEAN
    assert sim.run(lambda: len(guest.received) == 300_000 and len(host.received) == 300_000, 120.0)
    assert host.received == pattern(300_000, 1) and guest.received == pattern(300_000, 2)


def test_p5_a_clean_link_needs_no_retransmission_and_few_frames() -> None:
    sim = Simulation(seed=1, faults=Faults(rate=125e6))
    guest, host = sim.connect()
    host.send(pattern(1_000_000, 2))
    assert sim.run(lambda: len(guest.received) == 1_000_000, 60.0)
    assert sim.stack.counters.tcp_retransmitted == 0
    assert sim.emitted <= 1_000_000 / 1460 * 1.05 + 20


@pytest.mark.parametrize("link", KINDS)
def test_p7_a_run_with_the_same_seed_repeats_to_the_octet(link: str) -> None:
    def run(seed: int) -> str:
        sim = Simulation(seed=seed, faults=Faults(loss=0.05, duplicate=0.05, reorder=0.1, corrupt=0.02), link=link)
        guest, host = sim.connect()
        talk(sim, guest, host, pattern(50_000, 1), pattern(50_000, 2), "both at once")
        return sim.digest.hexdigest()

    assert run(5) == run(5)
    assert run(5) != run(6)
