"""Vsock's ports as a program of the host finds them, over each hypervisor's sockets (spec companions 1.2)."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import resource
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError, HostError
from vm.api import Vsock, VsockSpec
from vm.vsock.api.hybrid import HybridVsock
from vm.vsock.api.hyperkit import HyperKitVsock
from vm.vsock.api.kernel import KernelVsock
from vm.vsock.api.kinds import vsock_for
from vm.vsock.api.per_port import PerPortVsock

OPEN = 2376
CLOSED = 1
SERVED = 4098
LIMIT_S = 20.0

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vs") as made:
        yield Path(made)


async def backwards(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The guest's service: answers only when its caller has said all, so that half-close has to cross."""
    writer.write((await reader.read())[::-1])
    await writer.drain()
    writer.write_eof()


async def hyperkit_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    line = await reader.readexactly(18)
    if line == b"00000003.%08x\n" % OPEN:
        await backwards(reader, writer)


async def hybrid_lines(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    line = await reader.readline()
    if line == b"CONNECT %d\n" % OPEN:
        writer.write(b"OK 1073741824\n")
        await backwards(reader, writer)


@asynccontextmanager
async def listening(path: Path, talk: Talk) -> AsyncIterator[None]:
    talking: set[asyncio.Task[None]] = set()

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(reader, writer)
        writer.close()
        await writer.wait_closed()

    def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        talking.add(asyncio.create_task(one(reader, writer)))

    async with await asyncio.start_unix_server(come, path):
        yield
    await asyncio.wait_for(asyncio.gather(*talking, return_exceptions=True), LIMIT_S)


class Kernel(socket.socket):
    """An AF_VSOCK socket that is none: an address (CID, port) is a Unix path."""

    directory: Path
    caller = 3
    """The CID that an accepted peer has."""

    def _path(self, where: tuple[int, int]) -> str:
        cid, port = where
        return str(self.directory / f"{cid:x}.{port}")

    def connect_ex(self, where: Any) -> int:
        return super().connect_ex(self._path(where)) or errno.EINPROGRESS

    def bind(self, where: Any) -> None:
        super().bind(self._path(where))

    def accept(self) -> tuple[socket.socket, Any]:
        fd, address = self._accept()  # type: ignore[attr-defined]
        made = type(self)(self.family, self.type, fileno=fd)
        made.setblocking(False)
        return made, address

    def getpeername(self) -> Any:
        return (self.caller, 1024)


def kernel(directory: Path) -> tuple[KernelVsock, type[Kernel]]:
    here = type("KernelHere", (Kernel,), {"directory": directory})
    return KernelVsock(3, lambda: here(socket.AF_UNIX, socket.SOCK_STREAM)), here


def _hyperkit(directory: Path) -> tuple[Vsock, Path, Talk, Path]:
    return HyperKitVsock(directory, 3), directory / "connect", hyperkit_lines, directory / f"00000002.{SERVED:08x}"


def _hybrid(directory: Path) -> tuple[Vsock, Path, Talk, Path]:
    return HybridVsock(directory / "v.sock"), directory / "v.sock", hybrid_lines, directory / f"v.sock_{SERVED}"


def _device(directory: Path) -> tuple[Vsock, Path, Talk, Path]:
    made = vsock_for("vhost-user", VsockSpec(directory=directory))
    return made, directory / "vsock", hybrid_lines, directory / f"vsock_{SERVED}"


def _per_port(directory: Path) -> tuple[Vsock, Path, Talk, Path]:
    made = vsock_for("per-port", VsockSpec(directory=directory, ports={"docker": OPEN}, served={"control": SERVED}))
    return made, directory / f"00000003.{OPEN:08x}", backwards, directory / f"00000002.{SERVED:08x}"


def _kernel(directory: Path) -> tuple[Vsock, Path, Talk, Path]:
    return kernel(directory)[0], directory / f"3.{OPEN}", backwards, directory / f"ffffffff.{SERVED}"


WAYS = [pytest.param(way, id=way.__name__.strip("_")) for way in (_hyperkit, _hybrid, _device, _per_port, _kernel)]
each_way = pytest.mark.parametrize("way", WAYS)
Way = Callable[[Path], tuple[Vsock, Path, Talk, Path]]


@each_way
async def test_a_port_of_the_guest_answers_after_the_host_has_said_all(directory: Path, way: Way) -> None:
    vsock, at, talk, _ = way(directory)
    sent = os.urandom(300_000)
    async with listening(at, talk):
        reader, writer = await vsock.connect(OPEN)
        writer.write(sent)
        writer.write_eof()
        async with asyncio.timeout(LIMIT_S):
            assert await reader.read() == sent[::-1]
        writer.close()
        await writer.wait_closed()


@each_way
async def test_the_guest_dials_and_the_host_answers_after_it_has_said_all(directory: Path, way: Way) -> None:
    vsock, _, _, at = way(directory)
    server = await vsock.listen(SERVED, backwards)
    sent = os.urandom(300_000)
    reader, writer = await asyncio.open_unix_connection(at)
    writer.write(sent)
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == sent[::-1]
    writer.close()
    await writer.wait_closed()
    await server.close()


@each_way
async def test_a_machine_that_does_not_run_is_an_error_that_names_the_port(directory: Path, way: Way) -> None:
    vsock, _, _, _ = way(directory)
    with pytest.raises(HostError, match=f"vsock port {OPEN}"):
        await vsock.connect(OPEN)


@each_way
async def test_a_machine_that_ended_is_an_error_that_names_the_port(directory: Path, way: Way) -> None:
    vsock, at, _, _ = way(directory)
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(at))
    with pytest.raises(HostError, match=f"vsock port {OPEN}"):
        await vsock.connect(OPEN)


@pytest.mark.parametrize("way", WAYS[:4])
async def test_what_the_host_listens_at_is_private_and_gone_afterwards(directory: Path, way: Way) -> None:
    vsock, _, _, at = way(directory)
    server = await vsock.listen(SERVED, backwards)
    assert stat.S_IMODE(at.stat().st_mode) == 0o600
    with pytest.raises(ConfigError, match=f"{SERVED}.*another program listens"):
        await vsock.listen(SERVED, backwards)
    await server.close()
    assert not at.exists()


async def test_a_refused_port_is_an_error_when_dialling_where_the_hypervisor_tells(directory: Path) -> None:
    async with listening(directory / "v.sock", hybrid_lines):
        with pytest.raises(HostError, match="port 1: the guest refused"):
            await HybridVsock(directory / "v.sock").connect(CLOSED)


async def test_a_refused_port_is_an_end_of_file_where_the_hypervisor_says_nothing(directory: Path) -> None:
    async with listening(directory / "connect", hyperkit_lines):
        reader, writer = await HyperKitVsock(directory, 3).connect(CLOSED)
        async with asyncio.timeout(LIMIT_S):
            assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()


async def test_a_port_outside_vfkits_table_is_an_error_that_says_where_to_name_it(directory: Path) -> None:
    vsock = PerPortVsock({OPEN: directory / "a"}, {})
    with pytest.raises(ConfigError, match=r"port 7: .* those are 2376; add the port to vsock\.ports"):
        await vsock.connect(7)
    with pytest.raises(ConfigError, match=r"those are none; add the port to vsock\.served"):
        await vsock.listen(7, backwards)


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"NO\n", id="another word"),
        pytest.param(b"OK x\n", id="no number"),
        pytest.param(b"OK " + b"1" * 4096, id="no end"),
    ],
)
async def test_a_strange_answer_of_the_hypervisor_is_shown(directory: Path, answer: bytes) -> None:
    async def strange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(answer)
        await reader.read()

    async with listening(directory / "v.sock", strange):
        with pytest.raises(HostError, match="the hypervisor answered"):
            await HybridVsock(directory / "v.sock").connect(OPEN)


async def test_what_follows_the_hypervisors_line_is_the_guests(directory: Path) -> None:
    async def hasty(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(b"OK 5\nOK 6\nhello")

    async with listening(directory / "v.sock", hasty):
        reader, writer = await HybridVsock(directory / "v.sock").connect(OPEN)
        assert await reader.read() == b"OK 6\nhello"
        writer.close()
        await writer.wait_closed()


async def test_a_hypervisor_that_never_answers_is_given_up(directory: Path) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with listening(directory / "v.sock", silent):
        with pytest.raises(HostError, match=r"no answer within 0\.05 s"):
            await HybridVsock(directory / "v.sock").connect(OPEN, limit_s=0.05)


async def test_a_full_queue_is_waited_for(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as busy, socket.socket(socket.AF_UNIX) as first:
        busy.bind(str(directory / "connect"))
        busy.listen(0)
        first.connect(str(directory / "connect"))
        dialling = asyncio.create_task(HyperKitVsock(directory, 3).dial(OPEN))
        await asyncio.sleep(0)
        busy.accept()[0].close()
        (await asyncio.wait_for(dialling, LIMIT_S)).close()
        accepted, _ = busy.accept()
        assert accepted.recv(64) == b"00000003.00000948\n"
        accepted.close()


async def test_a_directory_too_deep_for_a_socket_serves_all_the_same(directory: Path) -> None:
    deep = directory / ("d" * 120)
    deep.mkdir()
    vsock = HyperKitVsock(deep, 3)
    server = await vsock.listen(SERVED, backwards)
    name = deep / f"00000002.{SERVED:08x}"
    assert stat.S_IMODE(name.stat().st_mode) == 0o600
    os.link(name, deep / "connect")
    reader, writer = await vsock.connect(OPEN)  # its line comes back, for that is our own service
    writer.write_eof()
    assert await reader.read() == b"\n84900000.30000000"
    writer.close()
    await writer.wait_closed()
    with pytest.raises(ConfigError, match=r"another program listens on .*d{120}"):
        await vsock.listen(SERVED, backwards)
    await server.close()
    assert not name.exists()


async def test_a_failing_service_harms_nobody_else(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def fragile(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if (await reader.read()) == b"break":
            raise RuntimeError("a bug")
        writer.write(b"well")

    async def said(octets: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(at)
        writer.write(octets)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
        await writer.wait_closed()
        return answer

    at = directory / f"00000002.{SERVED:08x}"
    server = await HyperKitVsock(directory, 3).listen(SERVED, fragile)
    assert [await said(b"break"), await said(b"break"), await said(b"fine")] == [b"", b"", b"well"]
    assert server.counts.contained == 2
    assert sum("a connection failed" in record.message for record in caplog.records) == 1
    await server.close()


async def test_a_guest_that_dials_without_end_is_closed_beyond_the_limit(directory: Path) -> None:
    async def patient(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"in")
        await reader.read()

    at = directory / f"00000002.{SERVED:08x}"
    server = await HyperKitVsock(directory, 3).listen(SERVED, patient, limit=2)
    held = [await asyncio.open_unix_connection(at) for _ in range(3)]
    assert [await reader.read(2) for reader, _ in held] == [b"in", b"in", b""]
    assert (len(server), server.counts.over_limit) == (2, 1)
    held[0][1].write_eof()
    assert await held[0][0].read() == b""
    held.append(await asyncio.open_unix_connection(at))
    assert await held[3][0].read(2) == b"in"
    await server.close()  # with connections there: they end too
    for reader, writer in held:
        await reader.read()
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("turns", range(8))
async def test_a_connection_that_comes_as_the_end_does_is_closed(directory: Path, turns: int) -> None:
    server = await HyperKitVsock(directory, 3).listen(SERVED, backwards)
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(str(directory / f"00000002.{SERVED:08x}"))
        for _ in range(turns):
            await asyncio.sleep(0)
        await server.close()
        await server.close()
        guest.settimeout(LIMIT_S)
        with contextlib.suppress(ConnectionResetError):
            assert guest.recv(1) == b""
    gc.collect()  # a socket that was lost would be complained of here


async def test_no_descriptor_left_is_waited_for(directory: Path) -> None:
    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"in")

    server = await HyperKitVsock(directory, 3).listen(SERVED, welcome)
    with socket.socket(socket.AF_UNIX) as guest:
        guest.setblocking(False)
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (guest.fileno() + 1, before[1]))
        try:
            guest.connect(str(directory / f"00000002.{SERVED:08x}"))
            for _ in range(5):
                await asyncio.sleep(0)
            assert (server.counts.accepted, server.counts.rests) == (0, 1)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(guest, 2), LIMIT_S) == b"in"
    await server.close()


async def test_other_machines_of_the_host_are_turned_away(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    vsock, fake = kernel(directory)
    server = await vsock.listen(SERVED, backwards)
    fake.caller = 4
    for _ in range(3):
        reader, writer = await asyncio.open_unix_connection(directory / f"ffffffff.{SERVED}")
        assert await reader.read() == b""
        writer.close()
        await writer.wait_closed()
    assert (server.counts.strangers, server.counts.accepted) == (3, 0)
    assert len(caplog.records) == 1
    await server.close()


async def test_a_machine_that_has_gone_before_it_is_looked_at_harms_nobody(directory: Path) -> None:
    vsock, fake = kernel(directory)
    server = await vsock.listen(SERVED, backwards)

    def gone(_: socket.socket) -> int:
        raise OSError(errno.ENOTCONN, "gone")

    fake.getpeername = gone  # type: ignore[method-assign]
    reader, writer = await asyncio.open_unix_connection(directory / f"ffffffff.{SERVED}")
    assert await reader.read() == b""
    fake.getpeername = Kernel.getpeername  # type: ignore[method-assign]
    writer.close()
    await writer.wait_closed()
    reader, writer = await asyncio.open_unix_connection(directory / f"ffffffff.{SERVED}")
    writer.write(b"here")
    writer.write_eof()
    assert await reader.read() == b"ereh"
    writer.close()
    await writer.wait_closed()
    await server.close()


@pytest.mark.parametrize("port", [-1, 0xFFFFFFFF, 1 << 40])
async def test_what_is_no_port_is_refused(directory: Path, port: int) -> None:
    with pytest.raises(ConfigError, match="ports are from 0"):
        await HyperKitVsock(directory, 3).connect(port)
    with pytest.raises(ConfigError, match="ports are from 0"):
        await HyperKitVsock(directory, 3).listen(port, backwards)


@pytest.mark.parametrize("cid", [0, 1, 2, 0xFFFFFFFF])
def test_a_cid_that_is_no_guests_is_refused(cid: int) -> None:
    with pytest.raises(ConfigError, match=r"vsock\.cid"):
        KernelVsock(cid)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("hyperkit", HyperKitVsock), ("hybrid", HybridVsock), ("vhost-user", HybridVsock), ("kernel", KernelVsock)],
)
def test_each_kind_has_its_way(directory: Path, kind: Any, expected: type) -> None:
    assert isinstance(vsock_for(kind, VsockSpec(directory=directory)), expected)
