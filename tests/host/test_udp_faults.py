"""Every system call may fail, any octets may come: nothing escapes, and what comes next works (threats F19, R1; Z1)."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from netstack.api import Endpoint
from tests.support.clock import VirtualClock
from tests.support.fake_host import FakeHostIO
from tests.udp.support import ALIAS, GATEWAY, GUEST, World, echo, raw_packet

OUTSIDE = bytes((198, 51, 100, 7))
REMOTE = ("198.51.100.7", 9)


class PlayedIO(FakeHostIO):
    """The played host, with the set of watched descriptors under the name `World` asks for."""

    @property
    def open(self) -> set[int]:
        return set(self.watched)


def played() -> tuple[World, PlayedIO]:
    io = PlayedIO(VirtualClock())
    played_io: Any = io
    return World(io=played_io), io


def exchange(world: World, io: PlayedIO) -> None:
    """A bit of everything: answered, refused, too long, pinged, published, expired."""

    def publish() -> Any:
        try:
            sock: Any = io.bound()
            return world.proxy.publish(Endpoint(GUEST, 53), sock)
        except OSError:
            return None

    publication = publish()
    for sport in (4000, 4001):
        for ttl in (64, 3):
            world.send(sport, OUTSIDE, 9, b"question", ttl=ttl)
    for datagram in list(io.datagrams):
        datagram.answer(b"answer")
        datagram.answer(b"answer from elsewhere", ("203.0.113.9", 53))
        datagram.sock.unreachable(datagram, 3, 3, errno.ECONNREFUSED, "198.51.100.7")
    world.turn(wait=False)
    world.send(4000, OUTSIDE, 9, b"after an error")
    world.ping(OUTSIDE, 1, 1, b"ping")
    for datagram in list(io.datagrams):
        if datagram.data[0] == 8:
            datagram.answer(echo(0, int.from_bytes(datagram.data[4:6], "big"), 1, b"ping"))
            datagram.sock.unreachable(datagram, 11, 0, errno.EHOSTUNREACH, "203.0.113.1")
    if publication is not None:
        publication.sock.deliver(b"hello", REMOTE)
    world.turn(wait=False)
    world.send(53, GATEWAY, REMOTE[1] + 1024, b"to nobody")
    world.now += 200
    world.proxy.expire(world.now)
    world.icmp.expire(world.now)
    if publication is not None:
        publication.close()


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENOBUFS, errno.ENOMEM, errno.EPERM, errno.EINTR, errno.EIO])
def test_a_failure_of_any_single_call_is_survived(code: int) -> None:  # F19
    world, io = played()
    exchange(world, io)
    calls = io.total_calls
    assert calls > 40
    world.close()
    for index in range(1, calls + 1):
        world, io = played()
        io.fail_at(index, code)
        exchange(world, io)
        world.now += 200  # beyond the minute that a refusal of pings is believed
        io.datagrams.clear()
        world.link.sent.clear()
        world.output.sent.clear()
        world.send(5000, OUTSIDE, 9, b"question")
        (datagram,) = io.datagrams
        datagram.answer(b"answer")
        world.turn(wait=False)
        assert [item.payload for item in world.received()] == [b"answer"], f"call {index} failed with {code}"
        world.close()
        assert io.sockets == [], f"call {index} failed with {code}: a descriptor leaked"
        assert io.misuse == []


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([1, 17]),
            st.one_of(st.sampled_from([GATEWAY, ALIAS, OUTSIDE]), st.binary(min_size=4, max_size=4)),
            st.binary(max_size=80),
            st.booleans(),
        ),
        max_size=6,
    )
)
def test_any_octets_of_a_guest_are_survived(packets: list[tuple[int, bytes, bytes, bool]]) -> None:  # Z1
    world, _io = played()
    world.icmp.guest_errors[17] = world.proxy.guest_error
    for protocol, destination, payload, trusted in packets:
        packet: Any = raw_packet(world.port, GUEST, destination, protocol, payload, checksum_ok=trusted)
        packet.neighbour = world.neighbour
        (world.proxy if protocol == 17 else world.icmp).input(packet, world.now)
        world.turn(wait=False)
    world.close()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=120), st.integers(0, 255), st.integers(0, 255))
def test_any_reply_or_error_of_the_host_is_survived(data: bytes, kind: int, code: int) -> None:  # Z1
    world, io = played()
    world.ping(OUTSIDE, 1, 1)
    world.send(4000, OUTSIDE, 9, b"x")
    for datagram in io.datagrams:
        datagram.answer(data)
        datagram.sock.unreachable(datagram, kind, code, errno.EHOSTUNREACH, "203.0.113.1")
        datagram.sock.errors.append((data, [(0, 11, data)], ("198.51.100.7", 0)))
    world.turn(wait=False)
    world.close()
