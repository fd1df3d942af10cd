"""`ssh-tunnel://` forwards with an SSH server that does what a test wants (spec gvproxy 1.3, 1.4)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncssh
import pytest

import portfwd.ssh_target
import portfwd.ssh_tunnel
from netstack.api import Endpoint
from netstack.errors import ConfigError
from portfwd.carriers import Carriers
from portfwd.gvproxy_forwards import Forwards, Proxy, Refused
from portfwd.registry import Forward, Registry
from portfwd.ssh_target import Target, is_tunnel, masked
from portfwd.ssh_tunnel import Tunnel
from tests.support.http_house import GUEST, LIMIT_S, until

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize(
    ("remote", "guest", "path", "key", "passphrase"),
    [
        ("ssh-tunnel://core@192.168.65.3/run/p.sock?key=/k", "192.168.65.3:22", "/run/p.sock", "/k", None),
        ("ssh-tunnel://core@192.168.65.3:2222/a?key=/k&key=/b", "192.168.65.3:2222", "/a", "/k", None),
        ("SSH-tunnel://core@192.168.65.3/a%20b?x=1&key=/k%3Fl", "192.168.65.3:22", "/a b", "/k?l", None),
        ("ssh-tunnel://core@192.168.65.3/a?passphrase=a+b%26c&key=/k", "192.168.65.3:22", "/a", "/k", "a b&c"),
        ("ssh-tunnel://core@192.168.65.3/a?passphrase=&key=/k", "192.168.65.3:22", "/a", "/k", None),
    ],
)
def test_what_a_remote_means(remote: str, guest: str, path: str, key: str, passphrase: str | None) -> None:
    assert is_tunnel(remote)
    target = Target.parse(remote)
    assert (str(target.guest), target.path, target.key, target.passphrase) == (guest, path, key, passphrase)
    assert str(target) == f"ssh-tunnel://core@{guest}{path}"


@pytest.mark.parametrize(
    ("remote", "words"),
    [
        ("ssh-tunnel://192.168.65.3/a?key=/k", "a user in the guest is needed"),
        ("ssh-tunnel://core:secret@192.168.65.3/a?key=/k", "without a password"),
        ("ssh-tunnel://core@guest/a?key=/k", "'guest' is no IPv4 address"),
        ("ssh-tunnel://core@[fd00::1]/a?key=/k", "'fd00::1' is no IPv4 address"),
        ("ssh-tunnel://core@[::1/a?key=/k", "Invalid IPv6 URL"),
        ("ssh-tunnel://core@192.168.65.3:0/a?key=/k", "there is no port 0"),
        ("ssh-tunnel://core@192.168.65.3:99999/a?key=/k", "Port out of range"),
        ("ssh-tunnel://core@192.168.65.3?key=/k", "a path in the guest is needed"),
        ("ssh-tunnel://core@192.168.65.3/?key=/k", "a path in the guest is needed"),
        ("ssh-tunnel://core@192.168.65.3/" + "é" * 60 + "?key=/k", "of at most 107 octets"),
        ("ssh-tunnel://core@192.168.65.3/a%00b?key=/k", "a path in the guest is needed"),
        ("ssh-tunnel://core@192.168.65.3/a", "key= with the absolute path"),
        ("ssh-tunnel://core@192.168.65.3/a?key=k", "key= with the absolute path"),
        ("ssh-tunnel://core@192.168.65.3/a?key=/k&passphrase=secret#1", "# and control characters"),
        ("ssh-tunnel://core@192.168.65.3/a?key=/k&passphrase=\ud800secret", "# and control characters"),
        ("ssh-tunnel://core@192.168.65.3/a?passphrase=secret" + "&x=1" * 20, "too many options"),
        ("ssh-tunnel:x", "a user in the guest is needed"),
    ],
)
def test_a_remote_that_means_nothing_says_why_and_keeps_the_passphrase(remote: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Target.parse(remote)
    said = str(caught.value)
    assert words in said and "write ssh-tunnel://USER@ADDRESS" in said
    assert "=secret" not in said and "\ud800" not in said


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("ssh-tunnel://u@1.2.3.4/a?key=/k", "ssh-tunnel://u@1.2.3.4/a?key=/k"),
        ("ssh-tunnel://u@1.2.3.4/a?passphrase=s&key=/k", "ssh-tunnel://u@1.2.3.4/a?passphrase=***&key=/k"),
        ("ssh-tunnel://u@1.2.3.4/a?key=/k&pass%70hrase=s?&x", "ssh-tunnel://u@1.2.3.4/a?key=/k&passphrase=***&x"),
    ],
)
def test_a_passphrase_is_not_shown(remote: str, shown: str) -> None:
    assert masked(remote) == shown
    assert "'s" not in repr(Target.parse(remote))


class Server(asyncssh.SSHServer):
    """Lets in who has the key, and asks the guest about each channel."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._conn = conn
        self._guest.connections.append(conn)

    def begin_auth(self, username: str) -> bool:
        return True

    def public_key_auth_supported(self) -> bool:
        return True

    def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        return username == "core" and key == self._guest.known

    def unix_connection_requested(self, dest_path: str) -> Any:
        self._guest.asked.append(dest_path)
        return self._guest.answer(self._conn)


@dataclass
class Guest:
    """Stands where the stack is: each dialled socket gets the SSH server, or what a test puts in its place."""

    known: asyncssh.SSHKey
    answer: Callable[[asyncssh.SSHServerConnection], Any] = lambda conn: True
    meet: Callable[[socket.socket], Awaitable[None]] | None = None
    dialled: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    connections: list[asyncssh.SSHServerConnection] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def dial(self, guest: Any, sock: socket.socket, *, on_close: Any = None, **_: Any) -> None:
        self.dialled.append(str(guest))
        sock.setblocking(False)
        if self.meet is None:
            task = asyncio.get_running_loop().create_task(self._ssh(sock))
        else:
            task = asyncio.get_running_loop().create_task(self._own(self.meet, sock, on_close))
        self._tasks.add(task)

    async def _own(self, meet: Any, sock: socket.socket, on_close: Any) -> None:
        with sock:
            await meet(sock)
        on_close("refused")

    async def _ssh(self, sock: socket.socket) -> None:
        key = asyncssh.generate_private_key("ssh-ed25519")
        with contextlib.suppress(asyncssh.Error, OSError):
            await asyncssh.run_server(sock, server_factory=lambda: Server(self), server_host_keys=[key])

    def datagrams(self, guest: Any, sock: Any, *, show_client: bool = False) -> Any:
        raise AssertionError

    async def close(self) -> None:
        for conn in self.connections:
            conn.abort()
            await conn.wait_closed()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while octets := await reader.read(65536):
        writer.write(octets)
        await writer.drain()


@dataclass
class Place:
    """A registry with a tunnel in it, and the guest where it leads."""

    directory: Path
    guest: Guest
    forwards: Forwards
    registry: Registry
    servers: list[asyncio.Server] = field(default_factory=list)

    def proxy(self, more: str = "", key: str = "key") -> Proxy:
        remote = f"ssh-tunnel://core@192.168.65.3{self.directory}/guest.sock?key={self.directory}/{key}{more}"
        return Proxy(str(self.directory / "host.sock"), "unix", remote)

    def expose(self, **what: Any) -> Forward:
        return self.forwards.expose(self.proxy(**what))

    @property
    def tunnel(self) -> Tunnel:
        (forward,) = self.registry
        assert isinstance(forward.way, Tunnel)
        return forward.way

    async def serve(self, handle: Serve = echo) -> None:
        """At the path in the guest."""

        async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await handle(reader, writer)
            except ConnectionError:
                pass
            finally:
                writer.close()

        self.servers.append(await asyncio.start_unix_server(run, str(self.directory / "guest.sock")))

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_unix_connection(str(self.directory / "host.sock"))
        try:
            async with asyncio.timeout(LIMIT_S):
                yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def is_reset(self) -> None:
        """What a client sees that is turned away."""
        async with self.client() as (reader, writer):
            writer.write(b"hello")
            with pytest.raises(ConnectionResetError):
                await reader.read(100)


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(tmp_path / "key")
    asyncssh.generate_private_key("ssh-ed25519").write_private_key(tmp_path / "stranger")
    (tmp_path / "no-key").write_text("hello\n")
    guest = Guest(key.convert_to_public())
    registry = Registry(carriers=Carriers(lambda: GUEST))
    registry.start(guest, asyncio.get_running_loop())
    made = Place(tmp_path, guest, Forwards(registry), registry)
    yield made
    tunnels = [forward.way for forward in registry if isinstance(forward.way, Tunnel)]
    registry.close()
    await guest.close()
    for server in made.servers:
        server.close()
    await until(lambda: not any(tunnel._clients or tunnel._connecting for tunnel in tunnels))
    await asyncio.sleep(0)  # transports close in the loop's next turn


@pytest.mark.parametrize("kind", ["none", "directory", "pipe", "long"])
def test_a_key_that_cannot_be_read_is_said_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "long":
        path.write_bytes(bytes(portfwd.ssh_target.MAX_KEY + 1))
    registry = Registry(lambda: GUEST)
    remote = f"ssh-tunnel://core@192.168.65.3/a?key={path}"
    with pytest.raises(Refused, match=f"ssh-tunnel: key {path}: ") as caught:
        Forwards(registry).expose(Proxy(str(tmp_path / "x.sock"), "unix", remote))
    assert caught.value.status == 500
    assert len(registry) == 0


def test_without_the_library_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    registry = Registry(lambda: GUEST)
    with pytest.raises(Refused, match=r"pip install 'pyvpnkit\[ssh\]'"):
        remote = "ssh-tunnel://core@192.168.65.3/a?key=/k"
        Forwards(registry).expose(Proxy(str(tmp_path / "x.sock"), "unix", remote))


def test_a_guest_may_not_and_learns_nothing_about_files_of_the_host(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("x")
    registry = Registry(lambda: GUEST)
    said = set()
    for name in ("there", "not-there"):
        proxy = Proxy("/tmp/x.sock", "unix", f"ssh-tunnel://core@192.168.65.3/a?key={tmp_path}/{name}")
        with pytest.raises(Refused) as caught:
            Forwards(registry).expose(proxy, Endpoint(GUEST, 5000))
        said.add(str(caught.value))
    (only,) = said
    assert "a guest may not make files on the host" in only


async def test_the_passphrase_is_in_no_list(place: Place) -> None:
    forward = place.expose(more="&passphrase=secret")
    (listed,) = place.forwards.all()
    assert listed == place.proxy(more="&passphrase=***")
    assert "secret" not in f"{forward} {forward!r}"
    assert "by ssh to" in str(forward)


# What is carried.


async def test_clients_share_one_connection_that_the_first_of_them_makes(place: Place) -> None:
    await place.serve()
    place.expose()
    assert not place.guest.dialled
    async with place.client() as (one, one_out), place.client() as (two, two_out):
        for number, (reader, writer) in enumerate([(one, one_out), (two, two_out)] * 3):
            writer.write(b"%d" % number)
            assert await reader.read(100) == b"%d" % number
    assert place.guest.dialled == ["192.168.65.3:22"]
    assert place.guest.asked == [f"{place.directory}/guest.sock"] * 2
    assert (place.tunnel.carried, place.tunnel.connections) == (2, 1)


async def test_an_answer_arrives_from_a_server_that_reads_no_more(place: Place) -> None:
    """As HTTP servers that refuse an upload before it is over."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"413" * 1000)
        await writer.drain()

    await place.serve(refuse)
    place.expose()
    async with place.client() as (reader, writer):
        writer.write(bytes(4_000_000))
        assert await reader.readexactly(3000) == b"413" * 1000
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""


async def test_what_the_guest_sent_before_it_closed_is_not_lost_to_a_client_that_still_sends(place: Place) -> None:
    async def leave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(bytes(600_000))  # more than sockets hold, less than the window
        await writer.drain()

    await place.serve(leave)
    place.expose()
    client = socket.socket(socket.AF_UNIX)
    with client:
        client.connect(str(place.directory / "host.sock"))
        client.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(client, b"x")
        await until(lambda: bool(place.guest.connections) and place.tunnel.carried == 1)
        upload = loop.create_task(loop.sock_sendall(client, bytes(4_000_000)))
        await until(lambda: not place.guest.connections[0]._channels)
        got = 0
        async with asyncio.timeout(LIMIT_S):
            with contextlib.suppress(ConnectionResetError):
                while octets := await loop.sock_recv(client, 65536):
                    got += len(octets)
        assert got == 600_000
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)


async def test_a_channel_that_sshd_closed_holds_no_place(place: Place) -> None:
    await place.serve()
    place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        (channel,) = place.guest.connections[0]._channels.values()
        channel.close()
        assert await reader.read(1) == b""
        await until(lambda: not place.tunnel._clients)


async def test_a_client_that_leaves_is_an_end_in_the_guest(place: Place) -> None:
    over = asyncio.Event()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x")
        assert await reader.read(100) == b""
        over.set()

    await place.serve(wait)
    place.expose()
    async with place.client() as (reader, _):
        assert await reader.read(1) == b"x"
    async with asyncio.timeout(LIMIT_S):
        await over.wait()
    await until(lambda: not place.tunnel._clients)


async def test_a_client_that_reads_nothing_stops_the_guest_and_nobody_else(place: Place) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        if await reader.read(1) == b"e":
            writer.write(b"e")
            return
        while True:
            writer.write(bytes(65536))
            sent += 65536
            await writer.drain()

    await place.serve(flood)
    place.expose()
    idle = socket.socket(socket.AF_UNIX)
    with idle:
        idle.connect(str(place.directory / "host.sock"))
        idle.sendall(b"f")
        before = -1
        async with asyncio.timeout(LIMIT_S):
            while sent != before or not sent:
                before = sent
                await asyncio.sleep(0.3)
        assert sent < 8_000_000, "windows and buffers bound it"
        async with place.client() as (reader, writer):
            writer.write(b"e")
            assert await reader.read(1) == b"e"


async def test_one_client_too_many_is_reset_and_counted(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.ssh_tunnel, "MAX_CLIENTS", 2)
    await place.serve()
    place.expose()
    async with place.client() as (_, first), place.client() as (reader, second):
        for writer in (first, second):
            writer.write(b"x")
        assert await reader.read(1) == b"x"
        async with place.client() as (third, _):
            assert await third.read(1) == b""
        assert place.tunnel.refused == 1
    await until(lambda: not place.tunnel._clients)
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"


# What cannot be had.


async def test_a_wrong_key_is_tried_once_for_all_who_wait(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    await place.serve()
    place.expose(key="stranger")
    await asyncio.gather(*(place.is_reset() for _ in range(5)))
    assert len(place.guest.dialled) == 1
    assert place.tunnel.unreached == 5
    assert f"sshd does not let core in with the key {place.directory}/stranger" in caplog.text


async def test_a_file_that_is_no_key_is_said_in_the_log(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    place.expose(key="no-key", more="&passphrase=secret")
    await place.is_reset()
    assert not place.guest.dialled
    assert f"key {place.directory}/no-key: Invalid private key" in caplog.text
    assert "secret" not in caplog.text


async def test_no_sshd_is_waited_for_as_long_as_promised(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse(sock: socket.socket) -> None:
        pass

    monkeypatch.setattr(portfwd.ssh_tunnel, "CONNECT_S", 1.5)
    monkeypatch.setattr(portfwd.ssh_tunnel, "REST_S", 3600.0)
    place.guest.meet = refuse
    place.expose()
    await place.is_reset()
    tried = len(place.guest.dialled)
    assert 2 <= tried <= 4  # at 0, 0.1, 0.3 and 0.7 s
    assert "no sshd in 2 s: 192.168.65.3:22: " in caplog.text and "(refused)" in caplog.text
    await place.is_reset()
    assert len(place.guest.dialled) == tried, "a failure holds for a while"


async def test_a_guest_that_says_nothing_is_dialled_anew(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    over = asyncio.Event()

    async def silence(sock: socket.socket) -> None:
        place.guest.meet = None
        await over.wait()

    monkeypatch.setattr(portfwd.ssh_tunnel, "ATTEMPT_S", 3.0)
    place.guest.meet = silence
    await place.serve()
    place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    assert len(place.guest.dialled) == 2
    over.set()


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-1.5-old\r\n", "Unsupported SSH version"),
        (b"SSH-2.0-x\r\n" + b"\xff" * 4096, "no SSH with"),
    ],
)
async def test_what_is_no_sshd_is_not_asked_again(
    place: Place, caplog: pytest.LogCaptureFixture, greeting: bytes, words: str
) -> None:
    async def speak(sock: socket.socket) -> None:
        await asyncio.get_running_loop().sock_sendall(sock, greeting)
        while await asyncio.get_running_loop().sock_recv(sock, 65536):
            pass

    place.guest.meet = speak
    place.expose()
    await place.is_reset()
    assert len(place.guest.dialled) == 1
    assert words in caplog.text and "no SSH with 192.168.65.3:22" in caplog.text


async def test_a_path_that_sshd_does_not_open_costs_its_client_only(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    place.expose()
    await place.is_reset()
    assert f"sshd did not connect to {place.directory}/guest.sock" in caplog.text
    await place.serve()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    assert len(place.guest.dialled) == 1


async def test_connections_that_end_at_every_channel_are_given_up(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    def hang_up(conn: asyncssh.SSHServerConnection) -> bool:
        conn.abort()
        return False

    place.guest.answer = hang_up
    place.expose()
    await place.is_reset()
    assert len(place.guest.dialled) == portfwd.ssh_tunnel.CONNECTIONS
    assert "3 connections to sshd were lost" in caplog.text


async def test_a_lost_connection_ends_its_clients_and_the_next_has_a_new_one(place: Place) -> None:
    await place.serve()
    place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        place.guest.connections[0].abort()
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""
    async with place.client() as (reader, writer):
        writer.write(b"y")
        assert await reader.read(1) == b"y"
    assert place.tunnel.connections == 2


async def test_a_guest_that_is_gone_without_a_word_is_found_out(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.ssh_tunnel, "KEEPALIVE_S", 0.2)
    await place.serve()
    place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        place.guest.connections[0]._transport.pause_reading()  # the rest of the world stands still
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read(1) == b""


async def test_removal_resets_who_still_waits(place: Place) -> None:
    over = asyncio.Event()

    async def silence(sock: socket.socket) -> None:
        await over.wait()

    place.guest.meet = silence
    forward = place.expose()
    tunnel = place.tunnel
    async with place.client() as (reader, writer):
        writer.write(b"x")
        await until(lambda: bool(place.guest.dialled))
        place.registry.remove(forward)
        with pytest.raises(ConnectionResetError):
            await reader.read(1)
    await until(lambda: not tunnel._clients and tunnel._connecting is None)
    over.set()


async def test_after_removal_clients_go_on_and_the_connection_ends_with_the_last(place: Place) -> None:
    await place.serve()
    forward = place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
        place.registry.remove(forward)
        with pytest.raises(FileNotFoundError):
            await asyncio.open_unix_connection(str(place.directory / "host.sock"))
        writer.write(b"y")
        assert await reader.read(1) == b"y"
    async with asyncio.timeout(LIMIT_S):
        await place.guest.connections[0].wait_closed()


async def test_removal_of_an_unused_tunnel_ends_its_connection(place: Place) -> None:
    await place.serve()
    forward = place.expose()
    async with place.client() as (reader, writer):
        writer.write(b"x")
        assert await reader.read(1) == b"x"
    tunnel = place.tunnel
    await until(lambda: not tunnel._clients)
    place.registry.remove(forward)
    async with asyncio.timeout(LIMIT_S):
        await place.guest.connections[0].wait_closed()
