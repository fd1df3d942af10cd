"""`expose-port` and `list-ports` against the host's own doors: VPNKit's HTTP API and its 9P tree, over one registry."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from netstack.errors import HostError
from portfwd.invm.control import MountedControl
from portfwd.invm.ports import Port
from portfwd.ninep.listen import port_server
from portfwd.ninep.ports import PortTable
from portfwd.registry import Registry
from portfwd.vpnkit_api import routes
from tests.portfwd.invm.played import LIMIT_S, Tool

Start = Callable[..., Tool]


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(lambda: socket.inet_aton("192.168.65.3"))
    yield made
    made.close()


@asynccontextmanager
async def http_door(registry: Registry, path: Path, via: str = "stack") -> AsyncIterator[str]:
    app = web.Application()
    app.add_routes(routes(registry, via=lambda *_: via, dump=lambda: "recv 1 Close\n"))
    runner = web.AppRunner(app)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    yield str(path)
    await runner.cleanup()


@asynccontextmanager
async def ninep_door(registry: Registry, path: Path, via: str = "stack") -> AsyncIterator[str]:
    listener = socket.socket(socket.AF_UNIX)
    with suppress(FileNotFoundError):
        os.unlink(path)
    listener.bind(str(path))
    listener.listen()
    async with port_server(listener, PortTable(registry, via=via).connect, lambda sock: sock.close()):
        yield f"9p:{path}"


@pytest.fixture(params=[http_door, ninep_door], ids=["http", "9p"])
async def door(request: pytest.FixtureRequest, registry: Registry, tmp_path: Path) -> AsyncIterator[str]:
    make: Any = request.param
    async with make(registry, tmp_path / "door.sock") as where:
        yield where


async def until(true: Callable[[], object]) -> None:
    for _ in range(int(LIMIT_S / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


def flags(proto: str = "tcp", port: int = 0) -> list[str]:
    return [
        *("-proto", proto, "-host-ip", "127.0.0.1", "-host-port", str(port)),
        *("-container-ip", "172.17.0.2", "-container-port", "80", "-local-bind", "never"),
    ]


@pytest.mark.parametrize("proto", ["tcp", "udp"])
async def test_a_port_is_published_until_the_signal(start: Start, registry: Registry, door: str, proto: str) -> None:
    tool = start("expose_port", *flags(proto), "-control", door, "-i")
    assert tool.process.stdout is not None
    line = await asyncio.to_thread(tool.process.stdout.readline)
    (forward,) = registry
    assert (forward.spec.protocol, forward.spec.guest, forward.spec.guest_port) == (proto, "172.17.0.2", 80)
    assert line.decode() == f"{proto} forward from 127.0.0.1:{forward.spec.port} to 172.17.0.2:80\n"
    assert (await asyncio.to_thread(tool.end))[0] == 0
    await until(lambda: not len(registry))


async def test_dockerd_hears_that_the_port_is_taken(start: Start, door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tool = start("expose_port", *flags(port=port), "-control", door, parent=True)
        heard = (await asyncio.to_thread(tool.heard)).decode()
        assert heard.startswith("1\n") and f"127.0.0.1:{port}" in heard and "already" in heard
        assert (await asyncio.to_thread(tool.result))[0] == 1


async def test_a_program_that_is_killed_loses_its_port_on_the_9p_way(
    start: Start, registry: Registry, tmp_path: Path
) -> None:
    async with ninep_door(registry, tmp_path / "port.sock") as where:
        tool = start("expose_port", *flags(), "-control", where, parent=True)
        assert await asyncio.to_thread(tool.heard) == b"0\n"
        assert len(registry) == 1
        await asyncio.to_thread(tool.end, signal.SIGKILL)
        await until(lambda: not len(registry))


async def test_a_port_is_asked_for_again_when_the_9p_server_was_restarted(
    start: Start, registry: Registry, tmp_path: Path
) -> None:
    async with ninep_door(registry, tmp_path / "port.sock") as where:
        tool = start("expose_port", *flags(), "-control", where, parent=True)
        assert await asyncio.to_thread(tool.heard) == b"0\n"
    await until(lambda: not len(registry))
    await asyncio.to_thread(tool.stderr_until, "asking for it again")
    async with ninep_door(registry, tmp_path / "port.sock"):
        await until(lambda: len(registry) == 1)
        assert (await asyncio.to_thread(tool.end))[0] == 0
        await until(lambda: not len(registry))


async def test_a_9p_server_that_says_nothing_is_given_up_at_a_signal(start: Start, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        tool = start("expose_port", *flags(), "-control", "9p:s", parent=True)
        client, _ = await asyncio.to_thread(listener.accept)
        with client:
            await asyncio.to_thread(client.recv, 100)
            assert (await asyncio.to_thread(tool.end))[0] == 0


async def test_list_ports_shows_what_others_published(start: Start, registry: Registry, tmp_path: Path) -> None:
    async with http_door(registry, tmp_path / "c.sock") as where, ninep_door(registry, tmp_path / "p.sock") as tree:
        tool = start("expose_port", *flags(), "-control", tree, parent=True)
        assert await asyncio.to_thread(tool.heard) == b"0\n"
        (forward,) = registry
        status, out, err = await asyncio.to_thread(start("list_ports", "-control", where, "-debug").result)
        assert out == f"tcp forward from 127.0.0.1:{forward.spec.port} to 172.17.0.2:80\n"
        assert (status, err) == (0, "recv 1 Close\n")
        await asyncio.to_thread(tool.end)


class PlayedMount:
    """What a mounted 9P tree does with the calls of `expose-port`: a `ctl` comes with each directory, and answers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
        self.written: list[bytes] = []
        self.descriptor = -1
        mkdir, write = os.mkdir, os.write

        def make(path: str) -> None:
            mkdir(path)
            Path(path, "ctl").touch()

        def answered(descriptor: int, octets: bytes) -> int:
            if not os.readlink(f"/proc/self/fd/{descriptor}").endswith("/ctl"):
                return write(descriptor, octets)
            self.descriptor = descriptor
            self.written.append(octets)
            return write(descriptor, answer.encode())

        monkeypatch.setattr(os, "mkdir", make)
        monkeypatch.setattr(os, "write", answered)


async def test_a_mounted_tree_is_written_to_read_and_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = PlayedMount(monkeypatch, "OK tcp:0.0.0.0:4321:tcp:172.17.0.2:80\n")
    control = MountedControl(str(tmp_path))
    asked = Port(proto="tcp", out_ip="0.0.0.0", out_port=0, in_ip="172.17.0.2", in_port=80)
    granted = await control.expose(asked)
    assert granted.out_port == 4321
    assert mount.written == [b"tcp:0.0.0.0:0:tcp:172.17.0.2:80"]
    assert os.listdir(tmp_path) == ["tcp:0.0.0.0:0:tcp:172.17.0.2:80"]
    os.fstat(mount.descriptor)
    await control.unexpose()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mount.descriptor)


async def test_a_mounted_trees_refusal_is_told_and_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount = PlayedMount(monkeypatch, "ERROR Bind for 0.0.0.0:80 failed: port is already allocated\n")
    control = MountedControl(str(tmp_path))
    with pytest.raises(HostError, match=r"^Bind for 0.0.0.0:80 failed: port is already allocated$"):
        await control.expose(Port(proto="unix", out_path="/h", in_path="/c"))
    assert mount.written == [b"unix:L2g=:unix:L2M="]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(mount.descriptor)


def test_a_directory_that_is_no_such_tree_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "port").mkdir()
    tool = start("expose_port", *flags(), "-control", "port", parent=True)
    assert b"1\nport: No such file or directory; is the 9P tree of the host mounted there?" == tool.heard()
    tool.result()
