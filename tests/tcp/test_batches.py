"""Batches: however segments lie together in one read of a link, the outcome is that of one after another.

On a stream link runs of equal segments are taken as one ("trains", `netstack.link.trains`); elsewhere a batch is flushed at
its end. Both must be no more than faster.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.support import packets
from tests.support.drill import Drill, Flow, pattern
from tests.support.link import KINDS
from tests.support.packets import FIN, MASK, PSH, RST, URG


def segments(f: Flow, d: Drill, seed: int) -> list[bytes]:
    """A run of full segments in which something may be wrong or out of the ordinary."""
    rng = random.Random(seed)
    size = rng.choice([546, 600, 1000, 1447, 1448, 1460])
    data = pattern(60 * 1460)
    made: list[bytes] = []
    at = 0
    while len(made) < 40:
        flags, ack, window, spoil, options = packets.ACK, f.rcv, f.window, False, b""
        length = size
        odd = rng.random()
        if odd < 0.02:
            flags |= PSH
        elif odd < 0.03:
            ack -= 1
        elif odd < 0.04:
            window -= 1280
        elif odd < 0.05:
            spoil = True
        elif odd < 0.06:
            length = rng.randrange(1, size)
        elif odd < 0.07:
            options = packets.sack_option([(f.rcv, f.rcv + 1)])
        elif odd < 0.08:
            flags |= URG
        elif odd < 0.09:
            at += size  # a hole
        elif odd < 0.10 and at:
            at -= size  # a repetition
        frame = d.segment(
            f,
            packets.letters_of(flags),
            seq=f.snd + at,
            ack=ack,
            window=window,
            data=data[at : at + length],
            spoil=spoil,
            options=options,
        )
        if rng.random() < 0.01:
            frame = frame[:22] + b"\x3f" + frame[23:]  # TTL without its checksum
        made.append(frame)
        at += length
    if rng.random() < 0.3:
        made.append(d.segment(f, "F.", seq=f.snd + at, data=b""))
    return made


def outcome(link: str, seed: int, *, together: bool) -> tuple[bytes, bool, int, int]:
    """Octets at the host, end of file, last ACK, and frames dropped for their checksum."""
    d = Drill(link=link)
    f = d.open()
    for frame in segments(f, d, seed):
        if together:
            d.queue(frame)
        else:
            d.inject(frame)
    d.settle()
    d.advance(0.1)
    acks = [segment.ack for segment in f.inbox]
    far = d.host(f)
    drops = d.stack.counters.drops
    found = bytes(far.received), far.eof, (acks[-1] - f.isn) & MASK, drops["tcp_checksum"] + drops["ipv4_checksum"]
    d.close()
    return found


@pytest.mark.parametrize("link", KINDS)
def test_t32_t33_t57_a_batch_comes_out_as_its_segments_one_by_one(link: str) -> None:
    for seed in range(60):
        assert outcome(link, seed, together=True) == outcome("plain", seed, together=False), f"seed {seed}"


@pytest.mark.parametrize("link", KINDS)
@pytest.mark.parametrize("size", [546, 999, 1460])
def test_t30_t35_a_run_of_segments_is_delivered_and_acknowledged_once(
    drill: Callable[..., Drill], link: str, size: int
) -> None:
    d = drill(link=link)
    f = d.open()
    d.host(f).send(b"from the host")
    d.expect(f, data=b"from the host")
    data = pattern(40 * size)
    for at in range(0, len(data), size):
        d.guest(f, ".", data=data[at : at + size], queue=True)
    d.settle()
    answers = d.collect(f, within=0.05)
    assert d.host(f).received == data
    assert answers[-1].ack == f.snd and len(answers) <= 5
    d.expect_none(3.0, f)


@pytest.mark.parametrize("link", KINDS)
def test_t38_a_run_beyond_the_window_is_cut_at_its_edge(drill: Callable[..., Drill], link: str) -> None:
    d = drill(link=link)
    f = d.open(scale=None)
    far = d.host(f)
    far.stop_reading()
    assert f.sock is not None
    f.sock.sent_buffer = 0
    data = pattern(80 * 1460)
    for at in range(0, len(data), 1460):
        d.queue(d.segment(f, ".", seq=f.snd + at, data=data[at : at + 1460]))
    d.settle()
    last = d.collect(f, within=0.05)[-1]
    taken = (last.ack - f.isn - 1) & MASK
    assert 40_000 <= taken <= 65_535 and last.window << 0 <= 65_535 - taken
    f.sock.sent_buffer = 1 << 20
    far.resume()
    f.sock.wake()
    d.settle()
    assert far.received == data[:taken]


@pytest.mark.parametrize("link", KINDS)
@pytest.mark.parametrize("last", ["R", "F.", "S"])
def test_a_batch_that_ends_the_flow_is_handled_to_its_end(drill: Callable[..., Drill], link: str, last: str) -> None:
    """Data, then the end, in one read (T60, T65): the octets come first."""
    d = drill(link=link)
    f = d.open()
    data = pattern(20 * 1460)
    for at in range(0, len(data), 1460):
        d.guest(f, ".", data=data[at : at + 1460], queue=True)
    d.guest(f, last, seq=f.snd, queue=True)
    d.settle()
    far = d.host(f)
    if last == "R":
        assert far.aborted and data.startswith(bytes(far.received))
    else:
        assert far.received == data
        assert far.eof == (last == "F.")
    assert not any(segment.flags & (FIN | RST) for segment in f.inbox)


@pytest.mark.parametrize("link", KINDS)
def test_flows_in_one_batch_do_not_mix(drill: Callable[..., Drill], link: str) -> None:
    d = drill(link=link)
    flows = [d.open() for _ in range(5)]
    rng = random.Random(1)
    sent = {id(f): bytearray(b"open") for f in flows}
    for f in flows:
        d.guest(f, ".", data=b"open")  # the answer tells the whole window
    d.advance(0.05)
    for _ in range(10):
        for _ in range(60):
            f = rng.choice(flows)
            for _ in range(rng.choice([1, 1, 8])):
                part = rng.randbytes(1460)
                sent[id(f)] += part
                d.guest(f, ".", data=part, queue=True)
        d.settle()
    for f in flows:
        assert d.host(f).received == sent[id(f)]
