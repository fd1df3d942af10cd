"""`docker.sock` as a Docker client of the host finds it, and `/var/run/docker.sock` as its owner does."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError
from vm.docker_socket import DOCKER, PING, DockerSocket, dial_tcp, link_docker_sock, unlink_docker_sock
from vm.http_probe import answers
from vm.vsock.api.hybrid import HybridVsock

LIMIT_S = 30.0
Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="dk") as made:
        yield Path(made)


@asynccontextmanager
async def guest(state: Path, talk: Talk) -> AsyncIterator[HybridVsock]:
    """A guest whose port 2376 is `talk`, behind a hypervisor with one socket."""
    talking: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if await reader.readline() == b"CONNECT 2376\n":
            writer.write(b"OK 1\n")
            try:
                await talk(reader, writer)
            except ConnectionError:
                pass
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass

    def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.add(asyncio.create_task(one(reader, writer)))

    async with await asyncio.start_unix_server(come, state / "vsock"):
        yield HybridVsock(state / "vsock")
    await asyncio.wait_for(asyncio.gather(*talking), LIMIT_S)


async def echo_after_the_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    writer.write_eof()


async def done(writer: asyncio.StreamWriter) -> None:
    writer.close()
    try:
        await writer.wait_closed()
    except ConnectionError:
        pass


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # of connections that set no event
            await asyncio.sleep(0.001)


def to(vsock: HybridVsock, port: int = 2376) -> Callable[[], Awaitable[socket.socket]]:
    return lambda: vsock.dial(port)


async def test_what_goes_in_comes_back_after_half_close(state: Path) -> None:
    sent = os.urandom(2 << 20)
    async with guest(state, echo_after_the_end) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock))
        assert stat.S_IMODE((state / "docker.sock").stat().st_mode) == 0o600
        reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(LIMIT_S):
            assert await reader.read() == sent
        await done(writer)
        await until(lambda: not len(docker))
        assert (docker.carried.to_guest, docker.carried.to_client) == (len(sent), len(sent))
        await docker.close()
        assert not (state / "docker.sock").exists()


async def test_the_guest_may_end_first_and_still_hear(state: Path) -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"output ended")
        writer.write_eof()
        heard.append(await reader.read())

    async with guest(state, talk) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock))
        reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b"output ended"
        writer.write(b"input goes on")
        writer.write_eof()
        await done(writer)
    assert heard == [b"input goes on"]
    await docker.close()


async def test_an_answer_given_before_the_request_is_over_arrives(state: Path) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.write(b"413 too large")  # and closed, with the rest of the request unread

    async with guest(state, talk) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock))
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as client:
            client.setblocking(False)
            await loop.sock_connect(client, str(state / "docker.sock"))
            async with asyncio.timeout(LIMIT_S):
                with pytest.raises(ConnectionError):
                    while True:
                        await loop.sock_sendall(client, b"x" * 65536)
                answer = b""
                while more := await loop.sock_recv(client, 100):
                    answer += more
            assert answer == b"413 too large"
        await docker.close()


async def test_a_client_that_does_not_read_stops_the_guest(state: Path) -> None:
    written = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        while True:
            writer.write(b"x" * 65536)
            written += 65536
            await writer.drain()

    async with guest(state, talk) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(state / "docker.sock"))
            before = -1
            while before != written or not written:  # until it stands still
                before = written
                await asyncio.sleep(0.1)
            assert written < 4 << 20
        await docker.close()


async def test_a_port_that_nobody_serves_in_the_guest_closes_the_client_at_once(state: Path) -> None:
    async with guest(state, echo_after_the_end) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock, 1))
        reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        assert docker.carried.refused == 1
        await done(writer)
        await docker.close()


async def test_a_client_before_the_guest_is_ready_waits_for_it(state: Path) -> None:
    async with guest(state, echo_after_the_end) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock), ready=False)
        reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
        writer.write(b"early")
        writer.write_eof()
        await until(lambda: len(docker) > 0)
        docker.ready()
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b"early"
        await done(writer)
        await docker.close()


async def test_a_client_that_waited_in_vain_is_told_so_in_dockers_words(state: Path) -> None:
    async def never() -> socket.socket:
        raise AssertionError

    docker = DockerSocket(state / "docker.sock", never, ready=False, wait_s=0.01)
    reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
    writer.write(b"GET /_ping HTTP/1.1\r\nHost: docker\r\n\r\n")
    said = await asyncio.wait_for(reader.read(), LIMIT_S)
    assert said.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert said.endswith(
        b'{"message": "the virtual machine is not ready yet; try again in a moment, or see `pyvpnkit vm status`"}'
    )
    assert docker.carried.not_ready == 1
    await done(writer)
    await docker.close()


async def test_too_many_clients_are_closed_and_the_others_served(state: Path) -> None:
    async with guest(state, echo_after_the_end) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock), limit=2)
        held = [await asyncio.open_unix_connection(state / "docker.sock") for _ in range(3)]
        assert await asyncio.wait_for(held[2][0].read(), LIMIT_S) == b""
        assert docker.counts.over_limit == 1
        for reader, writer in held[:2]:
            writer.write(b"fine")
            writer.write_eof()
            assert await asyncio.wait_for(reader.read(), LIMIT_S) == b"fine"
        for _, writer in held:
            await done(writer)
        await docker.close()


async def test_the_end_of_the_socket_is_the_end_of_its_connections(state: Path) -> None:
    async with guest(state, echo_after_the_end) as vsock:
        docker = DockerSocket(state / "docker.sock", to(vsock))
        reader, writer = await asyncio.open_unix_connection(state / "docker.sock")
        await until(lambda: len(docker) > 0)
        await docker.close()
        assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        await done(writer)
        await docker.close()


async def test_a_guest_reached_by_tcp(state: Path) -> None:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    (await dial_tcp("127.0.0.1", port)).close()
    server.close()
    await server.wait_closed()
    with pytest.raises(HostError, match=f"127.0.0.1 port {port}: "):
        await dial_tcp("127.0.0.1", port)


OK = b"HTTP/1.1 200 OK\r\nServer: Docker/25.0 (linux)\r\nContent-Length: 2\r\n\r\nOK"


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        pytest.param(OK, "", id="Docker"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nServer: nginx\r\nContent-Length: 0\r\n\r\n", "answered by 'nginx'", id="another"
        ),
        pytest.param(b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n", "answered with 503", id="a bad status"),
        pytest.param(b"SSH-2.0-OpenSSH_9\r\n\r\n", "no HTTP", id="no HTTP"),
        pytest.param(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40000, "no HTTP", id="a head without end"),
    ],
)
async def test_readiness_is_that_docker_answers(state: Path, says: bytes, complaint: str) -> None:
    asked: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(says)
        await writer.drain()
        await reader.read()

    async with guest(state, talk) as vsock:
        if complaint:
            with pytest.raises(HostError, match=complaint):
                await answers(to(vsock), PING, server=DOCKER)
        else:
            assert await answers(to(vsock), PING, server=DOCKER)
    assert asked[0].startswith(b"GET /_ping HTTP/1.1\r\n")


async def test_a_guest_that_does_not_serve_yet_is_not_ready(state: Path) -> None:
    async def closes(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")

    async def hangs(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with guest(state, closes) as vsock:
        assert not await answers(to(vsock), PING)
        with pytest.raises(HostError, match="the guest refused"):
            await answers(to(vsock, 1), PING)
    async with guest(state, hangs) as vsock:
        with pytest.raises(HostError, match="no answer within"):
            await answers(to(vsock), PING, limit_s=0.05)


def listening_at(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen()
    return made


def test_the_link_for_everybody_is_made_and_removed(state: Path) -> None:
    at = state / "run.sock"
    with listening_at(state / "docker.sock"):
        assert link_docker_sock(state / "docker.sock", at)
        assert not link_docker_sock(state / "docker.sock", at)
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(at))
        assert unlink_docker_sock(state / "docker.sock", at)
        assert not unlink_docker_sock(state / "docker.sock", at)
    assert not os.path.lexists(at)


@pytest.mark.parametrize("by_link", [False, True], ids=["a socket", "a link to one"])
def test_anothers_live_socket_is_not_replaced(state: Path, by_link: bool) -> None:
    at = state / "run.sock"
    with listening_at(state / "other.sock" if by_link else at):
        if by_link:
            at.symlink_to(state / "other.sock")
        before = at.lstat()
        with pytest.raises(ConfigError, match="another program serves there"):
            link_docker_sock(state / "docker.sock", at)
        assert not unlink_docker_sock(state / "docker.sock", at)
        assert at.lstat() == before


def test_a_dead_socket_and_a_dangling_link_are_replaced(state: Path) -> None:
    at = state / "run.sock"
    listening_at(at).close()
    assert link_docker_sock(state / "docker.sock", at)
    at.unlink()
    at.symlink_to(state / "gone")
    assert link_docker_sock(state / "docker.sock", at)
    assert Path(os.readlink(at)) == state / "docker.sock"
    assert os.listdir(state) == ["run.sock"]


def test_a_file_is_not_replaced(state: Path) -> None:
    (state / "run.sock").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="is no socket"):
        link_docker_sock(state / "docker.sock", state / "run.sock")
    assert (state / "run.sock").read_bytes() == b"precious"


def test_who_may_not_is_told_what_it_takes(state: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("expected: only root can become another user to see it")
    at = state / "run.sock"
    code = "import sys; from pathlib import Path; from vm.docker_socket import *; "
    code += "link_docker_sock(Path('/x'), Path(sys.argv[1]), hint='sudo this')"
    os.chmod(state, 0o755)
    tried = subprocess.run(
        [sys.executable, "-c", code, at], user=65534, group=65534, capture_output=True, text=True, check=False
    )
    assert "Permission denied; it takes root to change it: sudo this" in tried.stderr
    with pytest.raises(HostError, match=r"No such file or directory$"):
        link_docker_sock(state / "docker.sock", state / "nowhere" / "run.sock")
