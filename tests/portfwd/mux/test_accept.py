"""The side that is spoken to, as the forwarder in the VM uses it: all generations by their first octets."""

from __future__ import annotations

import asyncio
import socket

import pytest

from portfwd.carriers import Destination
from portfwd.mux.accept import Accepted
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.frames import HANDSHAKE, Data, Open, emit_destination
from tests.portfwd.mux.ends import TARGET, until
from tests.portfwd.mux.pair import said

BEGINNINGS = {
    1: emit_destination(TARGET) + b"hello",
    2: said(Open(0x7FFFFFFF, TARGET), Data(0x7FFFFFFF, 5), b"hello"),
    3: HANDSHAKE + said(Open(0xFFFFFFFF, TARGET), Data(0xFFFFFFFF, 5), b"hello"),
}


class Ear:
    def __init__(self) -> None:
        self.heard = b""
        self.ends: list[Ending | None] = []

    def data(self, octets: memoryview) -> None:
        self.heard += octets

    def ended(self) -> None:
        self.ends.append(None)

    def closed(self, why: Ending) -> None:
        self.ends.append(why)

    def room(self) -> None: ...


class Vm:
    def __init__(self) -> None:
        ours, self.peer = socket.socketpair()
        self.opened: list[tuple[Destination, Channel]] = []
        self.reasons: list[str] = []
        self.accepted = Accepted(ours, lambda *one: self.opened.append(one), on_end=self.reasons.append)


@pytest.mark.parametrize("generation", BEGINNINGS)
@pytest.mark.parametrize("piece", [1, 2, 5, 1000])
async def test_the_generation_is_found_in_any_pieces(generation: int, piece: int) -> None:
    vm, ear = Vm(), Ear()
    octets = BEGINNINGS[generation]
    with vm.peer:
        for at in range(0, len(octets), piece):
            vm.peer.send(octets[at : at + piece])
            await asyncio.sleep(0)
        await until(lambda: bool(vm.opened))
        destination, channel = vm.opened[0]
        assert destination == TARGET and vm.accepted.generation == generation
        channel.attach(ear)
        await until(lambda: ear.heard == b"hello")
        vm.accepted.close()
        vm.accepted.close()
        assert ear.ends == [Ending.LOST]
        assert await vm.accepted.wait_closed() == vm.reasons[0] and len(vm.reasons) == 1


async def test_a_probe_is_no_fault() -> None:
    vm = Vm()
    vm.peer.close()
    assert await vm.accepted.wait_closed() == "" and vm.reasons == [""]


@pytest.mark.parametrize(
    ("octets", "why"),
    [
        (b"GET /", "no generation"),
        (b"\1\4", "first octets"),
        (b"\3\xff\xff", "no generation"),
        (b"\1\4\0ab", "first octets"),
    ],
)
async def test_strangers_are_turned_away(octets: bytes, why: str) -> None:
    vm = Vm()
    with vm.peer:
        vm.peer.send(octets)
        vm.peer.shutdown(socket.SHUT_WR)
        assert why in await vm.accepted.wait_closed()
        assert vm.opened == []
        assert vm.peer.recv(1) == b""


async def test_who_attaches_to_a_connection_of_its_own_that_was_given_up_is_told() -> None:
    vm, ear = Vm(), Ear()
    with vm.peer:
        vm.peer.send(BEGINNINGS[1])
        await until(lambda: bool(vm.opened))
        vm.accepted.close()
        vm.opened[0][1].attach(ear)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert ear.ends == [Ending.LOST] and ear.heard == b""


async def test_a_handler_that_fails_closes_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    def fail(_destination: Destination, _channel: Channel) -> None:
        raise RuntimeError("no such thing")

    ours, theirs = socket.socketpair()
    with theirs:
        accepted = Accepted(ours, fail)
        theirs.send(BEGINNINGS[1])
        assert await accepted.wait_closed() == ""
    assert "no such thing" in caplog.text


async def test_a_connection_of_its_own_stops_reading_what_is_not_consumed() -> None:
    vm, ear = Vm(), Ear()
    with vm.peer:
        vm.peer.send(BEGINNINGS[1])
        await until(lambda: bool(vm.opened))
        channel = vm.opened[0][1]
        channel.attach(ear)
        vm.peer.setblocking(False)
        sent = 5
        for _ in range(200):
            try:
                sent += vm.peer.send(bytes(1 << 16))
            except BlockingIOError:
                await asyncio.sleep(0.001)
        assert len(ear.heard) < 1 << 19 < sent + (1 << 20)
        kept = len(ear.heard)
        channel.consumed(kept)
        await until(lambda: len(ear.heard) > kept)
        channel.close()
        assert await vm.accepted.wait_closed() == ""
