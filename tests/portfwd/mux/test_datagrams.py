"""Published UDP ports over the data plane, as clients see them (spec vpnkit 7.2, 7.3.4, 9.1 Ports)."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

import portfwd.mux.datagrams
from portfwd.carriers import Destination
from portfwd.mux.datagrams import PerClient, Shared
from portfwd.mux.plane import Plane
from portfwd.mux.records import Record
from tests.portfwd.mux.ends import until
from tests.portfwd.mux.machine import machine, plane

TARGET = Destination("udp", bytes((127, 0, 0, 1)), 53)
SIZES = [0, 1, 4, 511, 1023, 2034, 2035, 4095, 8191, 9215, 9216, 65507]


class Port:
    """A published port and its clients."""

    def __init__(self, made: Plane, target: Destination = TARGET, host: str = "127.0.0.1") -> None:
        self.family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((host, 0))
        self.address = sock.getsockname()
        self.published = made.datagrams(target, sock)
        self.clients: list[socket.socket] = []

    def client(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        sock.connect(self.address)
        sock.setblocking(False)
        self.clients.append(sock)
        return sock

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self.published.close()
        self.published.close()
        for sock in self.clients:
            sock.close()


async def echo(sock: socket.socket, payload: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(10):
        sock.send(payload)
        return await loop.sock_recv(sock, 65535)


@pytest.mark.parametrize("generation", [1, 2, 3])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_datagrams_of_all_sizes_come_back_to_who_sent_them(generation: int, host: str, tmp_path: Path) -> None:
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'},generation={generation}") as made:
        with Port(made, host=host) as port:
            clients = [port.client() for _ in range(3)]
            for size in SIZES:
                for at, client in enumerate(clients):
                    payload = bytes((at,)) + bytes(range(256)) * 256
                    assert await echo(client, payload[:size]) == payload[:size][::-1]
            assert len(vm.datagrams) == (3 if generation == 3 else 1)
            seen = {(record.address, record.port) for record in vm.records}
            if generation == 3:
                assert seen == {(b"", 0)}
            else:
                assert seen == {(socket.inet_pton(port.family, host), sock.getsockname()[1]) for sock in clients}


@pytest.mark.parametrize("generation", [1, 2])
async def test_the_shared_channel_is_opened_with_the_port_and_again_when_it_broke(
    generation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portfwd.mux.datagrams, "AGAIN_S", 0.0)
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'},generation={generation}") as made:
        with Port(made) as port:
            await until(lambda: len(vm.datagrams) == 1)
            client = port.client()
            assert await echo(client, b"one") == b"eno"
            vm.datagrams[0].close()
            assert isinstance(port.published, Shared)
            await until(lambda: port.published._lane is None)  # type: ignore[attr-defined]
            assert await echo(client, b"two") == b"owt"
            assert len(vm.datagrams) == 2


@pytest.mark.parametrize("generation", [1, 2])
async def test_the_vm_answers_only_who_was_heard(generation: int, tmp_path: Path) -> None:
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'},generation={generation}") as made:
        with Port(made) as port, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as victim:
            victim.bind(("127.0.0.1", 0))
            victim.setblocking(False)
            client = port.client()
            assert await echo(client, b"hello") == b"olleh"
            loopback = socket.inet_aton("127.0.0.1")
            vm.datagrams[0].send(Record(b"unasked", loopback, victim.getsockname()[1]))
            vm.datagrams[0].send(Record(b"to nobody"))
            vm.datagrams[0].send(Record(b"mapped", bytes(10) + b"\xff\xff" + loopback, client.getsockname()[1]))
            async with asyncio.timeout(10):
                assert await asyncio.get_running_loop().sock_recv(client, 100) == b"mapped"
            assert isinstance(port.published, Shared) and port.published.unheard == 2
            with pytest.raises(BlockingIOError):
                victim.recv(100)


async def test_idle_clients_lose_their_channel_and_get_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portfwd.mux.datagrams, "IDLE_S", 0.05)
    monkeypatch.setattr(portfwd.mux.datagrams, "LOOK_S", 0.01)
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'}") as made:
        with Port(made) as port:
            client = port.client()
            assert await echo(client, b"one") == b"eno"
            assert isinstance(port.published, PerClient)
            await until(lambda: port.published.clients == 0 and len(vm.endings) == 1)  # type: ignore[attr-defined]
            assert port.published._look is None or port.published.clients
            assert await echo(client, b"two") == b"owt"


async def test_the_least_recently_used_client_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.mux.datagrams, "MAX_CLIENTS", 2)
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'}") as made:
        with Port(made) as port:
            first, second, third = (port.client() for _ in range(3))
            for sock in (first, second, first, third, first):
                assert await echo(sock, b"ab") == b"ba"
            assert isinstance(port.published, PerClient)
            assert port.published.clients == 2 and port.published.evicted == 1
            assert len(vm.datagrams) == 3, "the first one kept its channel"
            assert made.status()["udp_evicted"] == 1


async def test_what_is_sent_before_the_forwarder_is_there_arrives_as_far_as_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portfwd.mux.plane.AGAIN_S", 0.02)
    async with machine(tmp_path / "f", up=False) as vm, plane(f"unix:{tmp_path / 'f'}") as made:
        with Port(made) as port:
            client = port.client()
            for at in range(4):
                client.send(bytes((at,)) * 50_000)
            assert isinstance(port.published, PerClient)
            await until(lambda: port.published.dropped == 2)
            await vm.start()
            await until(lambda: len(vm.records) == 2)
            assert [record.payload[0] for record in vm.records] == [0, 1]


@pytest.mark.parametrize("generation", [2, 3])
async def test_a_refused_port_costs_its_datagrams_alone(generation: int, tmp_path: Path) -> None:
    async with machine(tmp_path / "f"), plane(f"unix:{tmp_path / 'f'},generation={generation}") as made:
        with Port(made, Destination("udp", bytes((127, 0, 0, 1)), 1)) as refused, Port(made) as port:
            lost = refused.client()
            for _ in range(20):
                lost.send(b"anybody?")
                await asyncio.sleep(0.001)
            assert await echo(port.client(), b"still") == b"llits"
            status = made.status()["mux"]
            assert status["opened"] <= (22 if generation == 3 else 3), "the shared channel is tried once a second"


async def test_an_icmp_error_does_not_end_the_port(tmp_path: Path) -> None:
    async with machine(tmp_path / "f") as vm, plane(f"unix:{tmp_path / 'f'}") as made:
        with Port(made) as port:
            gone = port.client()
            assert await echo(gone, b"bye") == b"eyb"
            gone.close()
            for _ in range(3):
                vm.datagrams[0].send(Record(b"are you there?"))
                await asyncio.sleep(0.01)
            assert await echo(port.client(), b"yes") == b"sey"


async def test_without_a_forwarder_datagrams_are_lost_and_the_port_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("portfwd.mux.plane.WAIT_S", 0.05)
    monkeypatch.setattr("portfwd.mux.plane.AGAIN_S", 0.02)
    async with machine(tmp_path / "f", up=False) as vm, plane(f"unix:{tmp_path / 'f'}") as made:
        with Port(made) as port:
            client = port.client()
            client.send(b"lost")
            assert isinstance(port.published, PerClient)
            await until(lambda: port.published.dropped == 1 and port.published.clients == 0)  # type: ignore[attr-defined]
            await vm.start()
            assert await echo(client, b"now") == b"won"
