"""The socket of `--port` with real connections: programs in the VM, HTTP on the same socket, and peers that mean no good."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import resource
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import uvloop

from netstack.errors import HostError
from portfwd.ninep import listen
from portfwd.ninep.client import Client, expose
from portfwd.ninep.files import Filesystem
from portfwd.ninep.listen import MAX_CONNECTIONS, SocketServer, port_server, serve_ninep
from portfwd.ninep.messages import DMDIR, NOFID, NOTAG, Tattach, Tcreate, Topen, Tread, Tversion, Twalk
from portfwd.ninep.wire import emit
from tests.portfwd.ninep.site import Site

ANY = "tcp:127.0.0.1:0:tcp:192.168.65.3:80"
LIMIT_S = 20.0
HELLO = emit(Tversion(NOTAG, 8192, "9P2000")) + emit(Tattach(1, 0, NOFID, "", ""))
SIZES = [1, 4, 511, 1023, 2034, 2035, 4095, 8191, 9215, 9216]


class Port:
    """A `--port` socket at `path`."""

    def __init__(self, site: Site, path: Path) -> None:
        self.site = site
        self.path = str(path)
        self.http: list[socket.socket] = []
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(self.path)
        listener.listen(128)
        self.server = port_server(listener, site.table.connect, self.http.append, name="port")

    def dial(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(LIMIT_S)
        try:
            sock.connect(self.path)
        except BaseException:
            sock.close()
            raise
        return sock

    async def client(self, version: str = "9P2000") -> Client:
        return await asyncio.to_thread(lambda: Client(self.dial(), version=version))


@contextlib.asynccontextmanager
async def opened(site: Site, path: Path) -> AsyncIterator[Port]:
    made = Port(site, path)
    site.registry.start(site.guests, asyncio.get_running_loop())
    async with made.server:
        yield made
    site.close()  # its listeners are this loop's
    for sock in made.http:
        sock.close()


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    async with opened(Site(), tmp_path / "port.sock") as made:
        yield made


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.002)


async def published(port: Port) -> None:
    """A client publishes, the guest is reached, and a port is gone with its connection."""
    client = await port.client()
    exposed = await asyncio.to_thread(expose, client, ANY)
    (forward,) = port.site.registry
    with await asyncio.to_thread(socket.create_connection, ("127.0.0.1", forward.spec.port), 5) as visitor:
        await until(lambda: bool(port.site.guests.dialled))
        guest, sock = port.site.guests.dialled[0]
        assert str(guest) == "192.168.65.3:80"
        sock.send(b"welcome")
        assert await asyncio.to_thread(visitor.recv, 100) == b"welcome"
    client.close()
    await until(lambda: len(port.site.registry) == 0)
    assert exposed.request == str(forward.spec).replace(":192", ":tcp:192")


async def test_a_port_leads_to_the_guest_and_ends_with_the_connection(port: Port) -> None:
    await published(port)


def test_the_same_in_uvloop(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(Site(), tmp_path / "port.sock") as port:
            await published(port)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


async def test_ten_connections_one_after_the_other(port: Port) -> None:
    client = await port.client()
    await asyncio.to_thread(expose, client, ANY)
    (forward,) = port.site.registry
    for number in range(10):
        with await asyncio.to_thread(socket.create_connection, ("127.0.0.1", forward.spec.port), 5):
            await until(lambda: len(port.site.guests.dialled) == number + 1)  # noqa: B023
    client.close()


async def test_a_udp_port_carries_datagrams_of_all_sizes(port: Port) -> None:
    client = await port.client()
    await asyncio.to_thread(expose, client, "udp:127.0.0.1:0:udp:192.168.65.3:53")
    (forward,) = port.site.registry
    (lent,) = port.site.guests.lent
    assert str(lent.guest) == "192.168.65.3:53"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as visitor:
        visitor.settimeout(LIMIT_S)
        for size in SIZES:
            datagram = random.randbytes(size)
            visitor.sendto(datagram, ("127.0.0.1", forward.spec.port))
            octets, peer = await asyncio.to_thread(_receive, lent.sock)
            lent.sock.sendto(octets, peer)
            assert await asyncio.to_thread(visitor.recv, 65535) == datagram
    client.close()


def _receive(sock: socket.socket) -> tuple[bytes, object]:
    with sock.dup() as waiting:
        waiting.settimeout(LIMIT_S)
        return waiting.recvfrom(65535)


async def test_a_client_that_dies_takes_its_ports_along_and_no_others(port: Port) -> None:
    dying, living = await port.client(), await port.client("9P2000.u")
    for number in range(5):
        await asyncio.to_thread(expose, dying, ANY, f"dying{number}")
    await asyncio.to_thread(expose, living, ANY, "living")
    assert len(port.site.registry) == 6
    dying.close()
    await until(lambda: len(port.site.registry) == 1)
    assert [stat.name for stat in await asyncio.to_thread(living.list)] == [".", "..", "README", "living"]
    living.close()


async def test_the_end_of_the_server_ends_connections_and_ports(port: Port) -> None:
    client = await port.client()
    await asyncio.to_thread(expose, client, ANY)
    await port.server.close()
    assert len(port.site.registry) == 0
    with pytest.raises(HostError):
        await asyncio.to_thread(client.load, "README")
    client.close()
    with pytest.raises(ConnectionRefusedError):
        port.dial()


@pytest.mark.parametrize("request_line", [b"GET /forwards/list HTTP/1.1\r\n\r\n", b"PUT / HTTP/1.0\r\n", b"put /"])
async def test_a_letter_comes_first_in_http(port: Port, request_line: bytes) -> None:
    with port.dial() as asking:
        asking.send(request_line[:1])
        await until(lambda: bool(port.http))
        (taken,) = port.http
        assert not taken.getblocking()
        asking.send(request_line[1:])
        await until(lambda: len(taken.recv(100, socket.MSG_PEEK)) == len(request_line))
        assert taken.recv(100) == request_line, "nothing of it was read"
        taken.send(b"HTTP/1.1 200 OK\r\n\r\n")
        assert await asyncio.to_thread(asking.recv, 100) == b"HTTP/1.1 200 OK\r\n\r\n"
        assert port.server.connections == 0, "it is somebody else's now"


async def test_nine_p_comes_an_octet_at_a_time(port: Port) -> None:
    with port.dial() as slow:
        for octet in HELLO:
            slow.send(bytes([octet]))
            await asyncio.sleep(0)
        assert await asyncio.to_thread(_exactly, slow, 19 + 20) is not None
    assert not port.http


def _exactly(sock: socket.socket, octets: int) -> bytes:
    found = b""
    while len(found) < octets:
        piece = sock.recv(octets - len(found))
        assert piece
        found += piece
    return found


def _ended(sock: socket.socket) -> bool:
    """Whether the server has closed, after whatever it said."""
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


async def test_one_connection_too_many_is_closed_and_the_others_work(port: Port) -> None:
    with contextlib.ExitStack() as stack:
        first = await port.client()
        stack.callback(first.close)
        others = [stack.enter_context(port.dial()) for _ in range(MAX_CONNECTIONS - 1)]
        await until(lambda: port.server.connections == MAX_CONNECTIONS)
        with port.dial() as refused:
            assert await asyncio.to_thread(_ended, refused)
        assert port.server.refused == 1
        assert await asyncio.to_thread(first.load, "README")
        others[0].close()
        await until(lambda: port.server.connections == MAX_CONNECTIONS - 1)
        again = await port.client()
        again.close()


async def test_who_says_nothing_is_closed(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listen, "HELLO_S", 0.3)
    mounted = await port.client()
    assert await asyncio.to_thread(mounted.load, "README")
    with port.dial() as silent, port.dial() as half:
        half.send(HELLO[:10])
        for sock in (silent, half):
            assert await asyncio.to_thread(_ended, sock)
    assert await asyncio.to_thread(mounted.load, "README"), "who has a session may be silent"
    mounted.close()


async def test_who_does_not_read_is_closed_and_what_waits_is_bounded(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "STALL_S", 0.3)
    with port.dial() as greedy:
        greedy.sendall(HELLO + emit(Twalk(1, 0, 1, ("README",))) + emit(Topen(1, 1, 0)))
        reads = emit(Tread(1, 1, 0, 8000)) * 50

        def flood() -> bool:
            try:
                while True:
                    greedy.sendall(reads)
            except ConnectionError:
                return True

        assert await asyncio.to_thread(flood)
    await until(lambda: port.server.connections == 0)
    assert port.server.contained == 0


async def test_a_flood_leaves_the_loop_to_others(port: Port) -> None:
    """Small requests without end, whose answers are read, while a quiet client wants to be served."""
    ending = threading.Event()
    flooding = port.dial()
    flooding.sendall(HELLO)

    def flood() -> None:
        clones = emit(Twalk(1, 0, 1, ())) * 500
        with contextlib.suppress(OSError):
            while not ending.is_set():
                flooding.sendall(clones)

    def read() -> None:
        with contextlib.suppress(OSError):
            while not ending.is_set():
                flooding.recv(1 << 20)

    threads = [threading.Thread(target=each, daemon=True) for each in (flood, read)]
    for thread in threads:
        thread.start()
    client = await port.client()
    for _ in range(20):
        assert await asyncio.to_thread(client.load, "README")
    client.close()
    ending.set()
    flooding.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        await asyncio.to_thread(thread.join)
    flooding.close()


HOSTILE = [
    pytest.param(b"\xff\xff\xff\xff", id="four gigabytes are announced"),
    pytest.param(b"\0\0\0\0" * 100, id="messages of no octets"),
    pytest.param(HELLO + b"\xff" * 5000, id="nonsense after the hello"),
    pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(600), id="TLS"),
    pytest.param(HELLO[:15], id="half a message and the end"),
    pytest.param(
        HELLO + b"".join(emit(Twalk(9, 0, fid, ())) for fid in range(1, 5000)), id="fids without end, one tag"
    ),
    pytest.param(
        HELLO
        + b"".join(
            emit(Twalk(1, 0, n, ())) + emit(Tcreate(1, n, f"hostile{n}", DMDIR | 0o755, 0)) for n in range(1, 3000)
        ),
        id="directories without end",
    ),
    pytest.param(HELLO * 500, id="hellos without end"),
]


@pytest.mark.parametrize("octets", HOSTILE)
async def test_hostile_peers_harm_nobody(port: Port, octets: bytes) -> None:
    client = await port.client()
    await asyncio.to_thread(expose, client, ANY, "good")
    descriptors = len(os.listdir("/proc/self/fd"))

    def attack() -> None:
        for _ in range(5):
            with port.dial() as sock:
                with contextlib.suppress(ConnectionError):
                    sock.sendall(octets)
                    sock.shutdown(socket.SHUT_WR)
                _ended(sock)

    await asyncio.to_thread(attack)
    await until(lambda: port.server.connections == 1)
    assert port.server.contained == 0
    assert [stat.name for stat in await asyncio.to_thread(client.list)] == [".", "..", "README", "good"]
    assert len(port.site.registry) == 1
    assert len(os.listdir("/proc/self/fd")) == descriptors
    client.close()


async def test_a_bug_costs_one_connection(site: Site, tmp_path: Path) -> None:
    class Broken:
        words = site.table.connect("words").words

        def root(self) -> None:
            raise RuntimeError("a bug")

        def gone(self) -> None: ...

    filesystems: list[Filesystem] = [Broken(), site.table.connect("good")]  # type: ignore[list-item]

    async def serve(sock: socket.socket) -> None:
        await serve_ninep(sock, filesystems.pop(0))

    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen()
    async with SocketServer(listener, serve) as server:

        def dial() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(str(tmp_path / "s"))
            return sock

        with pytest.raises(HostError, match="ended"):
            await asyncio.to_thread(lambda: Client(dial()))
        assert server.contained == 1
        client = await asyncio.to_thread(lambda: Client(dial()))
        assert await asyncio.to_thread(client.load, "README")
        client.close()


async def test_without_descriptors_clients_wait(port: Port) -> None:
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.settimeout(LIMIT_S)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        await asyncio.to_thread(int)  # a thread is there before descriptors are not
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            waiting.connect(port.path)
            waiting.sendall(HELLO)
            await asyncio.sleep(0.05)
            assert port.server.accepted == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert await asyncio.to_thread(_exactly, waiting, 19)
