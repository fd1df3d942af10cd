"""Rings whose available index goes back (threats G3)."""

from __future__ import annotations

import pytest

from tests.support.virtio_net import FULL, PLAIN
from tests.support.virtqueue import Piece

from .conftest import MRG, MakeBench


@pytest.mark.parametrize("way", ["in pieces", "in one", "by room", "from a socket"])
@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("features", [PLAIN, FULL], ids=["nothing", "everything"])
def test_g3_an_index_that_goes_back_between_two_frames_stops_the_device(
    bench: MakeBench, features: int, size: int, way: str
) -> None:
    """To a place that the device has passed, but has not shown as used yet."""
    b = bench(features, buffers=size, size=size, spread=False)
    pair, link = b.nic.pairs[0], b.link
    assert link is not None
    for _ in range(3):
        assert link.send_one(memoryview(link.prefix(60) + bytes(60)))
    pair.rx.next_available = (pair.rx.used_index + 1) & 0xFFFF
    pair.rx.publish()
    for _ in range(4 * size):
        if b.link is None:
            break
        if way in ("by room", "from a socket"):
            b.give_by_room(bytes(1000), native=way != "by room", publish=False)
        else:
            b.give(bytes(60), one=way == "in one", publish=False)
    if b.link is not None:
        b.link.publish()
        b.take()
    b.nic.reboot()
    b.nic.send(bytes(60))
    assert b.take() == [bytes(60)]


def test_g3_an_index_lowered_over_empty_buffers_ends(bench: MakeBench) -> None:
    b = bench(PLAIN | MRG, buffers=0, size=64)
    rx = b.nic.pairs[0].rx
    for _ in range(10):
        rx.add([Piece(b.memory.allocate(16), 0, True)], [])
    rx.publish()
    assert b.give(bytes(60)) == 0
    rx.next_available = (rx.next_available - 7) & 0xFFFF
    rx.publish()
    for number in range(4):
        if b.link is not None:
            b.give(bytes(60), one=bool(number & 1))
    b.nic.reboot()
    assert b.link is not None
