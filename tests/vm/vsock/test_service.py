"""The whole device in a loop: a played hypervisor at its socket, programs of the host at the others."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError, HostError
from tests.support.guest_memory import GuestMemory
from tests.support.vhost_front import Disconnected, FrontEnd
from tests.support.virtio_vsock import RX, SEND, Guest, Sock
from vm.vsock import unix
from vm.vsock.__main__ import main
from vm.vsock.api.hybrid import HybridVsock
from vm.vsock.api.hyperkit import HyperKitVsock
from vm.vsock.api.paths import short_path
from vm.vsock.service import VsockService

ROOT = Path(__file__).parents[3]
PORT, SERVICE = 2376, 4098
LIMIT_S = 20.0


@pytest.fixture
def at() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vs") as made:
        yield Path(made)


class Machine:
    """A hypervisor and its guest at a control socket, served by the running loop."""

    def __init__(self, path: Path) -> None:
        self.memory = GuestMemory(spread=False)
        sock = socket.socket(socket.AF_UNIX)
        with short_path(path) as text:
            sock.connect(text)
        self.guest = Guest(FrontEnd(sock), self.memory)
        self.news = asyncio.Event()

    async def start(self) -> Machine:
        await asyncio.to_thread(self.guest.start)
        asyncio.get_running_loop().add_reader(self.guest.calls[RX], self._called)
        return self

    def _called(self) -> None:
        if self.guest.called(RX):
            self.guest.pump()
            self.news.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(LIMIT_S):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def accepted(self) -> Sock:
        await self.until(lambda: self.guest.accepted)
        return self.guest.accepted.pop()

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self.guest.calls[RX])
        self.guest.close()
        self.memory.close()


@contextlib.asynccontextmanager
async def machine(path: Path) -> AsyncIterator[Machine]:
    made = Machine(path)
    try:
        yield await made.start()
    finally:
        made.close()


@contextlib.asynccontextmanager
async def both(at: Path, **options: Any) -> AsyncIterator[tuple[VsockService, Machine]]:
    """The service in `at`, and a machine whose guest listens on `PORT`."""
    async with VsockService(vhost_user=at / "S", directory=at / "v", **options) as service, machine(at / "S") as made:
        made.guest.listen(PORT)
        yield service, made


async def dial(path: Path, line: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with short_path(path) as text:
        reader, writer = await asyncio.open_unix_connection(text)
    writer.write(line)
    return reader, writer


async def end_of(streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> bytes:
    """What is read to the end; the stream is closed then."""
    reader, writer = streams
    async with asyncio.timeout(LIMIT_S):
        try:
            found = await reader.read()
        except ConnectionResetError:
            found = b""
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return found


# Host to guest.


@pytest.mark.parametrize(
    ("name", "line", "answer"),
    [
        ("connect", b"00000003.00000948\n", b""),
        ("vsock", b"CONNECT 2376\n", b"OK "),
        ("guest.00000948", b"", b""),
        ("00000003.00000948", b"", b""),
    ],
)
async def test_each_convention_leads_to_the_guest(at: Path, name: str, line: bytes, answer: bytes) -> None:
    async with both(at, forwards=[PORT]) as (_, there):
        reader, writer = await dial(at / "v" / name, line + b"behind it")
        sock = await there.accepted()
        await there.until(lambda: sock.received == b"behind it")
        sock.send(b"back")
        sock.shutdown(SEND)
        async with asyncio.timeout(LIMIT_S):
            said = await reader.read()
        assert said.startswith(answer) and said.endswith(b"back")
        if answer:
            assert said == b"OK %d\nback" % sock.peer
        writer.close()
        await writer.wait_closed()
        await there.until(lambda: sock.state == "closed")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        pytest.param("connect", b"00000003.00000001\n", id="HyperKit's, a port that nobody listens on"),
        pytest.param("connect", b"00000004.00000948\n", id="HyperKit's, somebody else's CID"),
        pytest.param("connect", b"CONNECT 2376\n12345", id="HyperKit's, another convention's line"),
        pytest.param("vsock", b"CONNECT 1\n", id="a port that nobody listens on"),
        pytest.param("vsock", b"CONNECT 4294967295\n", id="no port"),
        pytest.param("vsock", b"GET / HTTP/1.1\r\n\r\n", id="another protocol"),
    ],
)
async def test_what_leads_nowhere_is_a_close_without_a_word(at: Path, name: str, line: bytes) -> None:
    async with both(at):
        assert await end_of(await dial(at / "v" / name, line)) == b""


@pytest.mark.parametrize("name", ["connect", "vsock"])
async def test_who_does_not_say_its_line_in_time_is_closed(
    at: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unix, "LINE_S", 0.05)
    async with both(at):
        assert await end_of(await dial(at / "v" / name, b"0000")) == b""


async def test_without_a_machine_everybody_is_turned_away(at: Path) -> None:
    async with VsockService(vhost_user=at / "S", directory=at / "v", forwards=[PORT]):
        for name, line in (("connect", b"00000003.00000948\n"), ("vsock", b"CONNECT 2376\n"), ("guest.00000948", b"")):
            assert await end_of(await dial(at / "v" / name, line)) == b""


async def test_our_own_api_speaks_both_conventions_with_it(at: Path) -> None:
    async with both(at) as (_, there):
        for api in (HyperKitVsock(at / "v", 3), HybridVsock(at / "v" / "vsock")):
            reader, writer = await api.connect(PORT, limit_s=LIMIT_S)
            writer.write(b"question")
            writer.write_eof()
            sock = await there.accepted()
            await there.until(lambda sock=sock: sock.eof)  # type: ignore[misc]
            sock.send(b"answer")
            sock.close()
            async with asyncio.timeout(LIMIT_S):
                assert (await reader.read(), sock.received) == (b"answer", b"question")
            writer.close()
            await writer.wait_closed()
        with pytest.raises(HostError, match="refused"):
            await HybridVsock(at / "v" / "vsock").connect(1, limit_s=LIMIT_S)


async def test_what_the_guest_dials_reaches_what_our_own_api_listens_for(at: Path) -> None:
    async def backwards(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write((await reader.read())[::-1])
        writer.write_eof()

    async with both(at) as (_, there):
        for api in (HyperKitVsock(at / "v", 3), HybridVsock(at / "v" / "vsock")):
            server = await api.listen(SERVICE, backwards)
            sock = there.guest.connect(SERVICE)
            await there.until(lambda sock=sock: sock.state == "open")  # type: ignore[misc]
            sock.send(b"desserts")
            sock.shutdown(SEND)
            await there.until(lambda sock=sock: sock.eof)  # type: ignore[misc]
            assert sock.received == b"stressed"
            await server.close()


# Guest to host.


async def test_the_hexadecimal_name_goes_first(at: Path) -> None:
    async with both(at) as (_, there):
        listeners = {}
        for name in ("00000002.00001002", "vsock_4098"):
            listeners[name] = socket.socket(socket.AF_UNIX)
            listeners[name].bind(str(at / "v" / name))
            listeners[name].listen()
            listeners[name].setblocking(False)
        for name in ("00000002.00001002", "vsock_4098"):
            sock = there.guest.connect(SERVICE)
            await there.until(lambda sock=sock: sock.state != "connecting")  # type: ignore[misc]
            taken, _ = listeners[name].accept()
            taken.close()
            listeners[name].close()  # nobody listens there any more, though there still is a name
        sock = there.guest.connect(SERVICE)
        await there.until(lambda: sock.state == "refused")


async def test_a_service_whose_queue_is_full_is_waited_for(at: Path) -> None:
    async with both(at) as (_, there):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(at / "v" / "vsock_4098"))
            listener.listen(0)
            socks = [there.guest.connect(SERVICE) for _ in range(4)]
            listener.setblocking(False)
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(LIMIT_S):
                taken = [(await loop.sock_accept(listener))[0] for _ in socks]
            await there.until(lambda: all(sock.state == "open" for sock in socks))
            for one in taken:
                one.close()


async def test_a_service_whose_queue_stays_full_is_refused(at: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unix, "DIAL_S", 0.1)
    async with both(at) as (_, there):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(at / "v" / "vsock_4098"))
            listener.listen(0)
            socks = [there.guest.connect(SERVICE) for _ in range(4)]
            await there.until(lambda: sum(sock.state == "refused" for sock in socks) >= 2)
            assert sum(sock.state == "open" for sock in socks) >= 1


async def test_many_calls_of_a_service_that_hangs_do_not_keep_us_busy(
    at: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0

    class Counted(unix.ShortPath):
        def __init__(self, path: Path) -> None:
            nonlocal tries
            tries += 1
            super().__init__(path)

    monkeypatch.setattr("vm.vsock.api.paths.ShortPath", Counted)
    loop = asyncio.get_running_loop()
    answers: list[socket.socket | None] = []
    async with unix.UnixSide(at, 3, lambda port, sock, greeting: False) as side:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(at / "00000002.00001002"))
            listener.listen(0)
            began = loop.time()
            for _ in range(1000):
                side.dial(SERVICE, answers.append)
            await asyncio.sleep(1.5)
            assert tries < 1100 + unix.MAX_RETRIES * 2 * (loop.time() - began)
        for answer in answers:
            assert answer is not None
            answer.close()


async def test_without_descriptors_the_guest_is_refused_and_the_rest_goes_on(at: Path) -> None:
    async with both(at) as (service, there):
        streams = await dial(at / "v" / "connect", b"00000003.00000948\n")
        open_one = await there.accepted()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(at / "v" / "vsock_4098"))
            listener.listen()
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
            try:
                sock = there.guest.connect(SERVICE)
                await there.until(lambda: sock.state == "refused")
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            again = there.guest.connect(SERVICE)
            await there.until(lambda: again.state == "open")
        open_one.send(b"octets")
        open_one.close()
        assert await end_of(streams) == b"octets" and service.contained == 0


# Sockets.


def mode(path: Path) -> int:
    return stat.S_IMODE(os.lstat(path).st_mode)


async def test_sockets_are_private_and_go_with_us(at: Path) -> None:
    (at / "v").mkdir(0o700)
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(at / "v" / "connect"))
    async with both(at, forwards=[PORT, 7]):
        names = {"connect", "vsock", "00000003.00000948", "guest.00000948", "00000003.00000007", "guest.00000007"}
        assert {path.name for path in (at / "v").iterdir()} == names
        assert os.readlink(at / "v" / "guest.00000948") == "00000003.00000948"
        assert {mode(at / "v" / name) for name in names if not name.startswith("guest")} == {0o600}
        assert mode(at / "S") == 0o600 and mode(at / "v") == 0o700
    assert list((at / "v").iterdir()) == [] and not (at / "S").exists()


async def test_a_long_directory_is_no_obstacle(at: Path) -> None:
    deep = at / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with both(deep, forwards=[PORT]) as (_, there):
        _, writer = await dial(deep / "v" / "guest.00000948")
        await there.accepted()
        with socket.socket(socket.AF_UNIX) as listener:
            with short_path(deep / "v" / "00000002.00001002") as text:
                listener.bind(text)
            listener.listen()
            sock = there.guest.connect(SERVICE)
            await there.until(lambda: sock.state == "open")
        writer.close()
        await writer.wait_closed()
        (deep / "v" / "00000002.00001002").unlink()
    assert list((deep / "v").iterdir()) == [] and not (deep / "S").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cid": 2}, "vsock cid 2: a guest's are from 3"),
        ({"cid": 1 << 32}, "vsock cid"),
        ({"forwards": [0xFFFFFFFF]}, "vsock forward 4294967295: ports are from 0"),
        ({"limit": 0}, "vsock limit 0"),
    ],
)
async def test_settings_that_cannot_be_are_named(at: Path, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        async with VsockService(vhost_user=at / "S", directory=at / "v", **options):
            pass


async def test_places_that_cannot_be_had_are_named_and_nothing_is_left(at: Path) -> None:
    async def attempt(complaint: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=complaint):
            async with VsockService(**{"vhost_user": at / "S", "directory": at / "v", **options}):
                pass

    await attempt("nowhere/S: the directory does not exist", vhost_user=at / "nowhere" / "S")
    (at / "v" / "vsock").write_text("precious")
    await attempt("v/vsock exists and is not a socket")
    (at / "v" / "vsock").unlink()
    (at / "v" / "guest.00000948").write_text("precious")
    await attempt("guest.00000948: File exists", forwards=[PORT])
    assert [path.name for path in (at / "v").iterdir()] == ["guest.00000948"]
    (at / "open").mkdir()
    (at / "open").chmod(0o777)
    await attempt("others may write to it", directory=at / "open")


# Hypervisors.


async def test_one_hypervisor_at_a_time(at: Path) -> None:
    async with VsockService(vhost_user=at / "S", directory=at / "v") as service:
        for _ in range(2):
            async with machine(at / "S"):
                second = Machine(at / "S")
                with pytest.raises(Disconnected):
                    await asyncio.to_thread(second.guest.start)
                second.guest.close()
                second.memory.close()
                assert service.describe()["running"] is True
            await service.idle()


async def test_a_fault_of_ours_ends_the_device_and_nothing_else(
    at: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with both(at) as (service, there):
        streams = await dial(at / "v" / "connect", b"00000003.00000948\n")
        sock = await there.accepted()
        assert service.device is not None

        def fail(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as broken:
            broken.setattr(service.device.engine, "arrives", fail)
            sock.send(b"octets")
            assert await end_of(streams) == b""
        assert service.contained == 1 and "a fault of ours" in caplog.text
        there.guest.listening.clear()
        await asyncio.to_thread(there.guest.reboot)
        assert service.describe()["running"] is True


# The program.


def start(at: Path, *options: str) -> subprocess.Popen[bytes]:
    """Returns when it is ready."""
    reading, writing = os.pipe()
    words = [sys.executable, "-m", "vm.vsock", "--vhost-user", str(at / "S"), "--directory", str(at / "v")]
    child = subprocess.Popen(
        [*words, "--ready-fd", str(writing), *options],
        pass_fds=[writing],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    os.close(writing)
    with open(reading, "rb") as ready:
        assert ready.read() == b"\n"
    return child


def test_the_program_has_descriptors_for_all_connections_that_may_be(at: Path) -> None:
    """What a descriptor was missing for in a message of the hypervisor's would end the device."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        child = start(at)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(child.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    child.terminate()
    child.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize("how", ["SIGTERM", "SIGINT", "stdin"])
def test_the_program_ends_cleanly(at: Path, how: str) -> None:
    child = start(at, "--forward", "2376", *(["--end-with-stdin"] if how == "stdin" else []))
    assert (at / "v" / "guest.00000948").is_socket() and (at / "S").is_socket()
    if how != "stdin":
        child.send_signal(getattr(signal, how))
        assert child.wait(LIMIT_S) == 0
    child.communicate(timeout=LIMIT_S)
    assert child.returncode == 0
    assert list((at / "v").iterdir()) == [] and not (at / "S").exists()


def test_the_program_says_its_counters(at: Path) -> None:
    child = start(at)
    child.send_signal(signal.SIGUSR1)
    assert child.stderr is not None and b'"contained": 0' in child.stderr.readline()
    child.terminate()
    child.communicate(timeout=LIMIT_S)


def test_the_program_says_what_is_wrong(at: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--vhost-user", str(at / "S"), "--directory", str(at / "v")]
    assert main([*words, "--cid", "1"]) == 1
    assert "vsock cid 1" in capsys.readouterr().err
    assert main(["--cid", "3"]) == 2
