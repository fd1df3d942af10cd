"""What every link does, whatever it is made of."""

from __future__ import annotations

import asyncio
import socket

import pytest

from netstack.api import Link
from netstack.errors import LinkDown
from netstack.link.unixgram import DatagramLink
from netstack.observe.metrics import Drop

from .conftest import Bench, frame, sockets_only


def drops(bench: Bench) -> int:
    return bench.counters.drops[Drop.FRAME_SHORT] + bench.counters.drops[Drop.FRAME_LONG]


def test_link_is_what_the_stack_expects(bench: Bench) -> None:
    assert isinstance(bench.link, Link)
    assert len(bench.link.prefix(60)) == bench.link.headroom


async def test_frames_of_the_guest_arrive_whole_and_in_order(bench: Bench) -> None:
    sent = [frame(number, 60 + 97 * number % 1400) for number in range(8)]
    for octets in sent:
        bench.peer.send(octets)
    assert await bench.arrived(len(sent)) == sent


async def test_frames_to_the_guest_arrive_whole_and_in_order(bench: Bench) -> None:
    sent = [frame(number, 60 + 131 * number % 1400) for number in range(8)]
    assert bench.link.send([bench.pieces(octets) for octets in sent]) == len(sent)
    assert [bench.peer.receive() for _ in sent] == sent


def test_nothing_to_read_is_an_empty_batch(bench: Bench) -> None:
    assert [view for view in bench.link.receive() if view[bench.link.headroom :][12:14] == b"\x88\xb5"] == []


def test_nothing_to_send_takes_nothing(bench: Bench) -> None:
    assert bench.link.send([]) == 0
    assert bench.link.flush()


async def test_largest_ordinary_frame_goes_both_ways(bench: Bench) -> None:
    largest = frame(1, bench.link.mtu + 14)
    bench.peer.send(largest)
    assert await bench.arrived(1) == [largest]
    assert bench.link.send([bench.pieces(largest)]) == 1
    assert bench.peer.receive() == largest


@sockets_only
async def test_a_frame_over_the_mtu_is_never_sent_but_counted(bench: Bench) -> None:
    fitting = [frame(number, bench.link.mtu + 14) for number in range(4)]
    over = frame(9, bench.link.mtu + 15)
    batch = [over, fitting[0], over, fitting[1], fitting[2], over, fitting[3], over]
    assert bench.link.send([bench.pieces(octets) for octets in batch]) == len(batch)
    assert [bench.peer.receive() for _ in fitting] == fitting
    assert bench.counters.drops[Drop.FRAME_LONG] == 4


@sockets_only
async def test_short_and_long_frames_cost_only_themselves(bench: Bench) -> None:  # G10, G11
    wanted = [frame(0, 14), frame(1), frame(2, bench.link.max_frame), frame(3)]
    odd = [frame(7, 1), frame(7, 13), frame(8, bench.link.max_frame + 1)]
    for octets in (wanted[0], odd[0], wanted[1], odd[1], wanted[2], odd[2], wanted[3]):
        bench.peer.send(octets)
        if octets in wanted:
            assert await bench.arrived(1) == [octets]
        else:
            assert await bench.nothing()
    assert drops(bench) == len(odd)


@sockets_only
async def test_a_peer_that_stops_reading_loses_nothing(bench: Bench) -> None:
    """What is not taken is offered again; when the peer reads, everything comes once and in order."""
    total = 4000
    queue = [bench.pieces(frame(number, 1000)) for number in range(total)]
    position = 0
    while True:
        taken = bench.link.send(queue[position : position + 64])
        position += taken
        if taken < 64:
            break
        assert position < total, "the peer's buffers never filled"
    received = 0
    while received < total:
        assert bench.peer.receive() == frame(received, 1000)
        received += 1
        if bench.link.flush() and position < total:
            position += bench.link.send(queue[position : position + 64])
    assert position == total
    assert drops(bench) == 0


@sockets_only
async def test_a_peer_that_is_gone_ends_the_link(bench: Bench) -> None:
    bench.peer.send(frame(1))
    assert await bench.arrived(1) == [frame(1)]
    bench.peer.close()
    with pytest.raises(LinkDown):
        for _ in range(1000):
            if bench.kind.notices_close:
                bench.link.receive()
            else:
                bench.link.send([bench.pieces(frame(2))])
            await asyncio.sleep(0)


@sockets_only
async def test_frames_before_the_end_are_still_delivered(bench: Bench) -> None:
    sent = [frame(number) for number in range(5)]
    for octets in sent:
        bench.peer.send(octets)
    bench.peer.close()
    assert await bench.arrived(len(sent)) == sent


@sockets_only
async def test_one_batch_is_bounded(bench: Bench) -> None:
    """One call takes a bounded share, so that other links and the host's sockets get their turn (R6)."""
    bench.peer.sock.settimeout(0.01)
    count = 0
    try:
        while count < 3000:
            bench.peer.send(frame(count, 1514))
            count += 1
    except (TimeoutError, BlockingIOError):
        pass
    for _ in range(64):
        await asyncio.sleep(0)
    batch = bench.link.receive()
    bound = 32 if isinstance(bench.link, DatagramLink) else (256 * 1024) // 1514 + 1
    assert 0 < len(batch) <= bound


def test_closing_twice_is_harmless(bench: Bench) -> None:
    bench.link.close()
    bench.link.close()


def test_a_tcp_link_sends_small_frames_at_once() -> None:
    from netstack.link.stream import QemuLink

    with socket.create_server(("127.0.0.1", 0)) as door, socket.create_connection(door.getsockname()) as ours:
        QemuLink(ours, "qemu:tcp", 1500)
        assert ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
