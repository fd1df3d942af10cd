"""What the forwarder holds and for how long, in this process and with short times: late targets, bounds, idle clients."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import portfwd.invm.data
from portfwd.carriers import Destination
from portfwd.invm.data import Data, Flows
from portfwd.invm.limits import Budget, Counts, descriptors
from portfwd.invm.targets import Client, Patience, UdpTarget, address_of, dial
from portfwd.invm.transport import Address
from tests.portfwd.invm.played import LIMIT_S
from tests.portfwd.invm.played_data import MAGIC, destination, record

LOOPBACK = socket.inet_aton("127.0.0.1")


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(path: Path, *, sockets: int = 100, connections: int = 100, **patience: float) -> AsyncIterator[Data]:
    data = Data(Flows(Budget(sockets), Patience(**patience)), most_connections=connections, redial_s=0.01)
    data.listen(Address.parse(str(path)))
    try:
        yield data
    finally:
        await data.close()
    assert data.flows.budget.held == 0, "every socket is given back"
    assert not data.connections


@asynccontextmanager
async def raw(path: Path, *first: bytes) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection of generation 1."""
    reader, writer = await asyncio.open_unix_connection(path)
    writer.write(b"".join(first))
    yield reader, writer
    writer.close()
    try:
        await writer.wait_closed()
    except (ConnectionResetError, BrokenPipeError):
        pass


@pytest.mark.parametrize("there_already", [False, True], ids=["no path yet", "nobody listens yet"])
async def test_a_unix_server_that_comes_later_is_waited_for(tmp_path: Path, there_already: bool) -> None:
    path = str(tmp_path / "late")
    with socket.socket(socket.AF_UNIX) as server:
        if there_already:
            server.bind(path)
        async with serving(tmp_path / "data", unix_retry_s=0.01) as data:
            async with raw(tmp_path / "data", destination("unix", path), b"early") as (reader, _writer):
                await until(lambda: data.flows.counts["unix targets tried again"] >= 3)
                if not there_already:
                    server.bind(path)
                server.listen()
                server.setblocking(False)
                loop = asyncio.get_running_loop()
                async with asyncio.timeout(LIMIT_S):
                    sock, _ = await loop.sock_accept(server)
                    with sock:
                        assert await loop.sock_recv(sock, 10) == b"early"
                        await loop.sock_sendall(sock, b"late")
                        assert await reader.readexactly(4) == b"late"


async def test_a_unix_server_that_never_comes_is_given_up(tmp_path: Path) -> None:
    async with serving(tmp_path / "data", unix_retry_s=0.01, unix_s=0.1) as data:
        async with raw(tmp_path / "data", destination("unix", str(tmp_path / "never"))) as (reader, _writer):
            async with asyncio.timeout(LIMIT_S):
                assert await reader.read() == b""
        assert data.flows.counts["flows refused by the target"] == 1


async def test_a_host_that_goes_ends_the_wait_for_a_target(tmp_path: Path) -> None:
    async with serving(tmp_path / "data", unix_retry_s=0.01) as data:
        _reader, writer = await asyncio.open_unix_connection(tmp_path / "data")
        target = destination("unix", str(tmp_path / "never"))
        writer.write(MAGIC + (8 + len(target)).to_bytes(2, "little") + b"\1" + bytes(4) + b"\2" + target)
        await until(lambda: data.flows.budget.held == 1)
        writer.close()
        await until(lambda: data.flows.budget.held == 0)
        await writer.wait_closed()
        assert data.flows.counts["unix targets tried again"] < 120 / 0.01, "long before its patience was at an end"


async def test_flows_beyond_the_bound_are_refused_and_counted(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        target = destination("tcp", *server.getsockname())
        async with serving(tmp_path / "data", sockets=2) as data:
            async with raw(tmp_path / "data", target), raw(tmp_path / "data", target):
                await until(lambda: data.flows.counts["flows"] == 2)
                async with raw(tmp_path / "data", target) as (reader, _writer):
                    async with asyncio.timeout(LIMIT_S):
                        assert await reader.read() == b""
                assert data.flows.counts["flows refused: too many"] == 1


async def test_data_connections_beyond_the_bound_wait_for_a_seat(tmp_path: Path) -> None:
    async with serving(tmp_path / "data", connections=1) as data:
        first_reader, first = await asyncio.open_unix_connection(tmp_path / "data")
        first.write(MAGIC)
        await first_reader.readexactly(len(MAGIC))
        reader, second = await asyncio.open_unix_connection(tmp_path / "data")
        second.write(MAGIC)
        await until(lambda: data.flows.counts["rests of a listener"])
        assert len(data.connections) == 1
        first.close()
        async with asyncio.timeout(LIMIT_S):
            assert await reader.readexactly(len(MAGIC)) == MAGIC
        second.close()
        await first.wait_closed()
        await second.wait_closed()


async def test_who_says_nothing_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.invm.data, "SPEAK_S", 0.05)
    async with serving(tmp_path / "data") as data:
        async with raw(tmp_path / "data") as (reader, _), raw(tmp_path / "data", MAGIC) as (spoken, _writer):
            async with asyncio.timeout(LIMIT_S):
                assert await reader.read() == b""
                assert await spoken.readexactly(len(MAGIC)) == MAGIC
            assert data.flows.counts["data connections that said nothing"] == 1
            assert len(data.connections) == 1


async def test_a_data_connection_is_dialled_until_it_is_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Data(Flows(Budget(10)), most_connections=10, redial_s=0.01)
    dialling = asyncio.create_task(data.keep_connected(Address.parse(str(tmp_path / "host"))))
    await until(lambda: "cannot connect" in caplog.text)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "host"))
    server.listen()
    server.setblocking(False)
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(LIMIT_S):
        for _ in range(5):
            sock, _peer = await loop.sock_accept(server)
            with sock:
                assert await loop.sock_recv(sock, 100) == MAGIC, "the side that connects greets as well"
    server.close()
    dialling.cancel()
    await asyncio.wait([dialling])
    await data.close()
    assert caplog.text.count("cannot connect") <= 2


def test_addresses_of_both_lengths() -> None:
    assert address_of(Destination("tcp", LOOPBACK, 80)) == (socket.AF_INET, ("127.0.0.1", 80))
    mapped = bytes(10) + b"\xff\xff" + LOOPBACK
    assert address_of(Destination("tcp", mapped, 80)) == (socket.AF_INET, ("127.0.0.1", 80))
    assert address_of(Destination("udp", bytes(15) + b"\1", 53)) == (socket.AF_INET6, ("::1", 53))


async def test_a_target_that_says_nothing_is_given_up() -> None:
    with socket.socket() as full:  # a queue of one, taken: the next SYN is not answered
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        held = []
        target = Destination("tcp", LOOPBACK, full.getsockname()[1])
        with pytest.raises(TimeoutError):
            while True:
                held.append(await dial(target, Patience(connect_s=0.1)))
        for sock in held:
            sock.close()


@asynccontextmanager
async def udp(
    answers: list[tuple[Client, bytes]], **more: float
) -> AsyncIterator[tuple[UdpTarget, socket.socket, Budget]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.setblocking(False)
        target = Destination("udp", LOOPBACK, server.getsockname()[1])
        budget = Budget(int(more.pop("sockets", 100)))
        made = UdpTarget(
            target,
            lambda client, payload: answers.append((client, payload)),
            budget=budget,
            counts=Counts(),
            idle_s=more.get("idle_s", 90.0),
            most=int(more.get("most", 1024)),
        )
        yield made, server, budget
        made.close()
        assert budget.held == 0


def client(number: int) -> Client:
    return Client(b"\xc0\0\2\1", number, "")


async def received(server: socket.socket) -> tuple[bytes, tuple[str, int]]:
    await until(lambda: _readable(server))
    octets, peer = server.recvfrom(65535)
    return octets, peer


def _readable(server: socket.socket) -> bool:
    try:
        server.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    return True


async def test_the_client_that_was_idle_for_longest_makes_room(tmp_path: Path) -> None:
    answers: list[tuple[Client, bytes]] = []
    async with udp(answers, most=2) as (target, server, budget):
        peers = {}
        for number in (1, 2):
            target.datagram(client(number), b"%d" % number)
            _, peers[number] = await received(server)
        server.sendto(b"answer", peers[1])  # 1 was used last
        await until(lambda: answers == [(client(1), b"answer")])
        target.datagram(client(3), b"3")
        await received(server)
        assert len(target) == budget.held == 2
        target.datagram(client(1), b"again")
        assert await received(server) == (b"again", peers[1]), "1 kept its socket, 2 went"


async def test_idle_clients_are_forgotten() -> None:
    async with udp([], idle_s=0.05) as (target, server, budget):
        for number in range(3):
            target.datagram(client(number), b"x")
        assert budget.held == 3
        await until(lambda: not len(target))
        assert budget.held == 0
        target.datagram(client(1), b"back")
        assert [(await received(server))[0] for _ in range(4)] == [b"x", b"x", b"x", b"back"]


async def test_without_sockets_datagrams_are_dropped_or_take_turns() -> None:
    async with udp([], sockets=1) as (target, server, _budget):
        for number in range(3):
            target.datagram(client(number), b"%d" % number)
        assert [(await received(server))[0] for _ in range(3)] == [b"0", b"1", b"2"]
        assert len(target) == 1
    async with udp([], sockets=0) as (target, _server, _none):
        target.datagram(client(1), b"dropped")
        assert len(target) == 0


async def test_two_thousand_flows_of_each_kind_leave_nothing_in_this_process(tmp_path: Path) -> None:
    async with serving(tmp_path / "data") as data:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))
            datagrams = destination("udp", *server.getsockname())
            before = len(os.listdir("/proc/self/fd"))
            for number in range(2000):
                async with raw(tmp_path / "data", datagrams, record(b"x", "192.0.2.1", number)):
                    pass
            await until(lambda: not data.connections)
            assert data.flows.budget.held == 0
            assert data.flows.counts["udp flows"] == 2000
            gc.collect()
            assert len(os.listdir("/proc/self/fd")) <= before


def test_the_bound_follows_the_limit_of_descriptors() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        found = descriptors()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert hard == before[1] and soft >= 256, "raised as far as it goes"
        assert found == min(8192, (soft - 64) // 2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
