"""Live captures of guests on shared rings: put around a link under traffic and taken off, with the ways past it back in place."""

from __future__ import annotations

import gc
import io
from collections.abc import Iterator

import dpkt
import pytest

from netstack.link.capture import CaptureLink
from netstack.observe.filter import compile_filter
from tests.support.drill import pattern
from tests.support.vhost_bench import count_descriptors
from tests.support.vhost_world import World
from tests.support.virtio_net import FULL


@pytest.fixture(params=[False, True], ids=["played-host", "real-host"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    gc.collect()
    before = count_descriptors()
    made = World(real=request.param)
    yield made
    made.close()
    gc.collect()
    assert count_descriptors() <= before


def payload(stream: bytes, source: bytes) -> int:
    """Octets of TCP payload from `source` in a stream."""
    seen = [octets for _, octets in dpkt.pcapng.Reader(io.BytesIO(stream)) if octets[6:12] == source]
    return sum(int.from_bytes(one[16:18], "big") - 20 - (one[46] >> 4) * 4 for one in seen)


def test_a_transfer_goes_on_while_readers_come_and_go() -> None:
    w = World()
    guest = w.plug(FULL)
    port = guest.port
    assert port is not None and port.has_room
    plain = port.link
    ways = [port._link_send, port._link_send_one, port._link_room, port.publish]
    sock, far = w.connect(guest)
    mac = guest.model.mac
    data = pattern(1_200_000, 1)
    for step in range(6):
        reader = w.stack.live.open(compile_filter("tcp"), limit=16 << 20) if step & 1 else None
        if reader is not None:
            assert type(port.link) is CaptureLink and not port.has_room
        part = data[step * 200_000 : (step + 1) * 200_000]
        far.send(part)
        sock.send(part, w.now)
        end = (step + 1) * 200_000
        assert w.run(lambda end=end: len(sock.received) == len(far.received) == end, 120.0)  # type: ignore[misc]
        if reader is not None:
            reader.close()
            stream = reader.take()
            gateway = w.stack.network.gateway_mac_bytes
            assert (payload(stream, mac), payload(stream, gateway), reader.lost) == (200_000, 200_000, 0)
            assert port.link is plain
            assert [port._link_send, port._link_send_one, port._link_room, port.publish] == ways
    assert bytes(sock.received) == bytes(far.received) == data
    w.assert_sane()
    w.close()


def test_a_guest_that_ends_under_a_reader_is_let_go_of_as_it_came(world: World) -> None:
    guest = world.plug(FULL)
    reader = world.stack.live.open()
    guest.nic.front.close()
    guest.peer.readable()
    world.settle()
    assert not guest.links, "the link that was attached is the one that was given back"
    assert not world.stack.switch.ports
    reader.close()
    again = world.plug(FULL)
    assert again.port is not None and again.port.has_room


def test_a_guest_that_breaks_its_rings_under_a_reader_goes_down_alone(world: World) -> None:
    guest = world.plug(FULL)
    bystander = world.plug(FULL)
    reader = world.stack.live.open()
    guest.links[0].fail("broken for a test")
    world.settle()
    assert not guest.links and "broken for a test" in " ".join(guest.reasons)
    assert bystander.port is not None and type(bystander.port.link) is CaptureLink
    reader.close()
    assert bystander.port.has_room
