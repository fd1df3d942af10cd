"""Runs of segments found at once are the same frames as those found one by one, whatever stands between them."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import LinkDown
from netstack.link.stream import LARGEST_BELIEVED, QemuLink, StreamLink, VmnetLink
from netstack.link.trains import Train
from tests.support import packets

from .conftest import frame
from .test_stream import framed

GUEST, SERVER = packets.ip("192.168.65.3"), packets.ip("192.0.2.1")
DAMAGED = ("payload", "header", "prefix")


def segment(seq: int, size: int, *, port: int = 4000) -> bytes:
    payload = bytes((seq + at) & 0xFF for at in range(size))
    packet = packets.tcp(GUEST, SERVER, port, 80, seq & 0xFFFFFFFF, 1, packets.flags_of("A"), 512, payload)
    return packets.ether(b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", 0x0800, packets.ipv4(GUEST, SERVER, 6, packet))


def flat(link: StreamLink, items: list[memoryview | Train]) -> list[bytes]:
    frames: list[bytes] = []
    for item in items:
        if isinstance(item, Train):
            octets = bytes(item.view)
            assert len(octets) == item.stride * item.count
            rows = [octets[at : at + item.stride] for at in range(0, len(octets), item.stride)]
        else:
            rows = [bytes(item)]
        frames += [row[link.headroom :] for row in rows]
    return frames


run = st.tuples(st.integers(1, 30), st.sampled_from([100, 600, 1001, 1460]), st.integers(0, 2**32 - 1))


@given(
    runs=st.lists(run, min_size=1, max_size=4),
    damage=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 1500)), max_size=3),
    cut=st.integers(0, 60_000),
    make=st.sampled_from([QemuLink, VmnetLink]),
)
def test_trains_are_the_frames_and_every_one_in_a_train_is_sound(
    runs: list[tuple[int, int, int]], damage: list[tuple[int, int]], cut: int, make: type[StreamLink]
) -> None:
    good = [segment(seq + at * size, size) for count, size, seq in runs for at in range(count)]
    sent = list(good)
    for which, where in damage:
        if which < len(sent):
            broken = bytearray(sent[which])
            broken[where % len(broken)] ^= 1
            sent[which] = bytes(broken)
    stream = framed(make, *sent)
    ours, theirs = socket.socketpair()
    link = make(ours, "test", 1500)
    got: list[bytes] = []
    with ours, theirs:
        theirs.setblocking(False)
        for part in (stream[:cut], stream[cut:]):
            while part:
                part = part[theirs.send(part) :]
                items = link.receive_trains()
                got += flat(link, items)
                for item in items:
                    if isinstance(item, Train):
                        assert set(flat(link, [item])) <= set(good), "a damaged frame was called sound"
    assert got == sent


def test_bulk_data_is_one_train() -> None:
    ours, theirs = socket.socketpair()
    link = QemuLink(ours, "test", 1500)
    with ours, theirs:
        theirs.sendall(framed(QemuLink, frame(1), *(segment(at * 1460, 1460) for at in range(40)), frame(2)))
        items = link.receive_trains()
    assert sum(isinstance(item, Train) for item in items) == 1
    assert len(items) < 20


@pytest.mark.parametrize("receive", ["receive", "receive_trains"])
def test_frames_before_a_lie_are_delivered_either_way(receive: str) -> None:  # G10
    ours, theirs = socket.socketpair()
    link = QemuLink(ours, "test", 1500)
    sent = [segment(at * 1460, 1460) for at in range(12)]
    with ours, theirs:
        theirs.sendall(framed(QemuLink, *sent) + (LARGEST_BELIEVED + 1).to_bytes(4, "big") + bytes(9000))
        assert flat(link, getattr(link, receive)()) == sent
        with pytest.raises(LinkDown):
            getattr(link, receive)()
