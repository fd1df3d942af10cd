"""Published ports over VPNKit's data plane, of all generations and by all ways (spec vpnkit 0.1, 7.3, 7.4)."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import stat
from pathlib import Path

import pytest

import portfwd.mux.plane
from netstack.errors import ConfigError, HostError
from portfwd.carriers import Destination
from portfwd.mux.frames import HANDSHAKE, Open
from portfwd.mux.plane import Plane
from portfwd.mux.where import Where
from tests.portfwd.mux.ends import until
from tests.portfwd.mux.machine import Server, ask, client, machine, plane, read_all
from tests.portfwd.mux.pair import said

QUESTION = bytes(range(256)) * 2000
NOBODY = Destination("tcp", bytes((127, 0, 0, 1)), 1)
CONNECTING = [(kind, generation) for kind in ("hyperkit", "connect", "unix") for generation in (1, 2, 3)]


@pytest.mark.parametrize(("kind", "generation"), CONNECTING)
async def test_a_client_reaches_a_server_behind_the_vm(kind: str, generation: int, tmp_path: Path) -> None:
    path = tmp_path / "connect"
    async with (
        machine(path, kind) as vm,
        Server() as server,
        Server(tmp_path / "s.sock") as unix,
        plane(f"{kind}:{path},generation={generation}") as made,
    ):
        for one in (server, unix):
            assert await ask(made, one.target, QUESTION) == QUESTION[::-1]
            assert await ask(made, one.target, b"first ", preface=b"PROXY ") == b" tsrif YXORP"
            assert await ask(made, one.target, b"") == b""
        with client(made, NOBODY) as refused, pytest.raises(ConnectionResetError):
            await read_all(refused)
        assert {one.generation for one in vm.accepted} == {generation}
        connections = 7 if generation == 1 else 1
        assert made.status()["connections"] == len(vm.accepted) == connections
        port = 62372 if generation == 3 else 62373
        expected = {"hyperkit": b"00000003.%08x\n" % port, "connect": b"CONNECT %d\n" % port}
        assert vm.lines == ([expected[kind]] * connections if kind in expected else [])
        assert made.status()["unreached"] == 0


@pytest.mark.parametrize("generation", [2, 3])
async def test_the_forwarder_may_connect_to_us(generation: int, tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    async with machine(tmp_path / "-", up=False) as vm, Server() as server:
        async with plane(f"listen:{path},generation={generation}") as made:
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
            waiting = asyncio.create_task(ask(made, server.target, QUESTION))
            await until(lambda: made.status()["waiting"] == 1)
            await vm.connect(path, generation)
            assert await waiting == QUESTION[::-1]
        assert not path.exists()


@pytest.mark.parametrize("listens", [False, True], ids=["connected", "listening"])
async def test_a_descriptor_may_be_inherited(listens: bool, tmp_path: Path) -> None:
    path = tmp_path / "data.sock"
    async with machine(tmp_path / "-", up=False) as vm, Server() as server:
        if listens:
            ours = socket.socket(socket.AF_UNIX)
            ours.bind(str(path))
            ours.listen()
        else:
            ours, theirs = socket.socketpair()
            vm.meet(theirs)
        async with plane(f"fd:{ours.detach()}") as made:
            if listens:
                await vm.connect(path)
            assert await ask(made, server.target, QUESTION) == QUESTION[::-1]


async def test_a_descriptor_of_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for fd in (file.fileno(), datagrams.fileno(), 999):
            with pytest.raises(ConfigError, match=f"descriptor {fd} "):
                Plane(Where(kind="fd", fd=fd)).start(asyncio.get_running_loop())
        file.write("still open")
        datagrams.getsockname()


async def test_a_thousand_clients_at_once(tmp_path: Path) -> None:
    async with machine(tmp_path / "f") as vm, Server() as server, plane(f"unix:{tmp_path / 'f'}") as made:
        answers = await asyncio.gather(*(ask(made, server.target, b"%d." % at) for at in range(1000)))
        assert answers == [(b"%d." % at)[::-1] for at in range(1000)]
        assert len(vm.accepted) == 1
        await until(lambda: made.status()["mux"]["channels"] == 0 and made.status()["streams"] == 0)


async def test_who_comes_while_the_vm_boots_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "AGAIN_S", 0.02)
    async with (
        machine(tmp_path / "f", up=False) as vm,
        Server() as server,
        plane(f"unix:{tmp_path / 'f'}") as made,
    ):
        asking = [asyncio.create_task(ask(made, server.target, b"early")) for _ in range(3)]
        await until(lambda: "No such file" in caplog.text)
        await asyncio.sleep(0.1)
        assert caplog.text.count("No such file") == 1, "several attempts, one complaint"
        await vm.start()
        assert await asyncio.gather(*asking) == [b"ylrae"] * 3


@pytest.mark.parametrize("generation", [1, 3])
async def test_who_waits_in_vain_is_reset(generation: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "WAIT_S", 0.05)
    async with plane(f"unix:{tmp_path / 'f'},generation={generation}") as made:
        with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
            await read_all(sock)
        assert made.status()["unreached"] == 1 and made.status()["waiting"] == 0


async def test_only_so_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "MAX_WAITING", 2)
    async with plane(f"listen:{tmp_path / 'f'}") as made:
        waiting = [client(made, NOBODY) for _ in range(2)]
        with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
            await read_all(sock)
        assert made.status()["waiting"] == 2
    for one in waiting:
        with one, pytest.raises(ConnectionResetError):
            await read_all(one)


@pytest.mark.parametrize("kind", ["hyperkit", "connect"])
async def test_a_port_where_nobody_listens_is_explained(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "WAIT_S", 0.2)
    async with machine(tmp_path / "f", kind, answer=b""), plane(f"{kind}:{tmp_path / 'f'}") as made:
        with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
            await read_all(sock)
    assert {"hyperkit": "before it greeted", "connect": "refused the port"}[kind] in caplog.text


async def test_a_hypervisor_that_answers_something_else_is_quoted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "WAIT_S", 0.2)
    async with machine(tmp_path / "f", "connect", answer=b"NO WAY\n"), plane(f"connect:{tmp_path / 'f'}") as made:
        with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
            await read_all(sock)
    assert "answered b'NO WAY\\n'" in caplog.text


async def test_what_follows_the_hypervisors_answer_is_not_lost(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "f"))
        listener.listen()
        listener.setblocking(False)
        async with plane(f"connect:{tmp_path / 'f'}") as made:
            with client(made, NOBODY):
                sock, _ = await asyncio.get_running_loop().sock_accept(listener)
                with sock:
                    sock.send(b"OK 1073741824\n" + HANDSHAKE)
                    await until(lambda: made.status()["connections"] == 1)


@pytest.mark.parametrize("generation", [2, 3])
async def test_when_the_forwarder_dies_its_clients_are_reset_and_the_next_one_reconnects(
    generation: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        machine(tmp_path / "f") as vm,
        Server() as server,
        plane(f"unix:{tmp_path / 'f'},generation={generation}") as made,
    ):
        with client(made, server.target) as sock:
            await until(lambda: bool(server.peers))
            vm.accepted[0].close()
            with pytest.raises(ConnectionResetError):
                await read_all(sock)
        assert "its clients were reset" in caplog.text and not made.status()["connected"]
        assert await ask(made, server.target, b"again") == b"niaga"
        assert made.status()["connections"] == 2


async def test_a_newer_forwarder_takes_over_when_it_has_greeted_and_a_probe_does_not(tmp_path: Path) -> None:
    path = tmp_path / "f"
    async with machine(tmp_path / "-", up=False) as vm, Server() as server, plane(f"listen:{path}") as made:
        first = await vm.connect(path)
        with client(made, server.target) as sock:
            await until(lambda: bool(server.peers))
            probes = [socket.socket(socket.AF_UNIX) for _ in range(12)]
            for probe in probes:
                probe.setblocking(False)
                probe.connect(str(path))
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.connect(str(path))
                stranger.send(b"GET / HTTP/1.0\r\n\r\n")
                await asyncio.sleep(0.05)
            assert len(made._strangers) <= portfwd.mux.plane.MAX_STRANGERS
            for probe in probes:
                probe.close()
            await until(lambda: not made._strangers)
            assert made.status()["connections"] == 1 and made.status()["streams"] == 1
            await vm.connect(path)
            with pytest.raises(ConnectionResetError):
                await read_all(sock)
            assert await first.wait_closed() == ""
        assert await ask(made, server.target, b"new") == b"wen"


async def test_a_forwarder_that_says_nothing_is_left_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portfwd.mux.plane, "GREET_S", 0.05)
    async with plane(f"listen:{tmp_path / 'f'}") as made:
        with socket.socket(socket.AF_UNIX) as mute:
            mute.setblocking(False)
            mute.connect(str(tmp_path / "f"))
            assert len(await read_all(mute)) == 54, "the greeting, and then the end"
        assert not made._strangers


async def test_the_vm_may_not_open_channels(tmp_path: Path) -> None:
    async with machine(tmp_path / "f") as vm, Server() as server, plane(f"unix:{tmp_path / 'f'}") as made:
        assert await ask(made, server.target, b"x") == b"x"
        session = vm.accepted[0]._session
        assert session is not None
        session._mux._push(said(Open(5, server.target)))
        session._flush()
        await until(lambda: "recv 5 Close" in session.dump())
        assert len(server.peers) == 1


def test_a_stale_socket_is_replaced_a_file_and_a_live_one_never(tmp_path: Path) -> None:
    path = tmp_path / "f"
    where = Where.parse(f"listen:{path}")
    path.write_text("precious")
    loop = asyncio.new_event_loop()
    with pytest.raises(ConfigError, match="no socket; choose another path"):
        Plane(where).start(loop)
    assert path.read_text() == "precious"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(HostError, match="somebody listens"):
            Plane(where).start(loop)
    made = Plane(where)
    made.start(loop)
    loop.run_until_complete(made.close())
    loop.close()


async def test_the_dump_and_the_status_tell_people(tmp_path: Path) -> None:
    async with machine(tmp_path / "f"), Server() as server, plane(f"unix:{tmp_path / 'f'}") as made:
        assert made.dump() == "" and made.status()["connected"] is False
        await ask(made, server.target, b"x")
        await until(lambda: "free" in made.dump())
        assert f"send 4294967295 Open {server.target}" in made.dump()
        status = made.status()
        assert status["where"] == f"unix:{tmp_path / 'f'},generation=3"
        assert status["connected"] is True and status["carried"] == 1 and status["mux"]["opened"] == 1


@pytest.mark.parametrize("generation", [1, 3])
async def test_closing_leaves_nothing(generation: int, tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    async with machine(tmp_path / "f") as vm, Server() as server:
        made = Plane(Where.parse(f"unix:{tmp_path / 'f'},generation={generation}"))
        made.start(asyncio.get_running_loop())
        socks = [client(made, server.target) for _ in range(5)]
        await until(lambda: len(server.peers) == 5)
        port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        port.bind(("127.0.0.1", 0))
        made.datagrams(Destination("udp", bytes((127, 0, 0, 1)), 9), port)
        socks[0].send(b"half")
        await made.close()
        await made.close()
        for sock in socks:
            with sock, pytest.raises(ConnectionResetError):
                await read_all(sock)
        assert not made._splices and not made._raws and not made._tasks and not made._published
        with client(made, server.target) as late, pytest.raises(ConnectionResetError):
            await read_all(late)
        await until(lambda: all(one._over for one in vm.accepted))
    assert sorted(os.listdir("/proc/self/fd")) == before


async def test_short_connections_by_the_thousand_leave_no_descriptor(tmp_path: Path) -> None:
    async with machine(tmp_path / "f"), Server() as server, plane(f"unix:{tmp_path / 'f'}") as made:
        await ask(made, server.target, b"x")
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(40):
            await asyncio.gather(*(ask(made, server.target, b"ab") for _ in range(50)))
        await until(lambda: not made.status()["streams"])
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before + 5)


async def test_complaints_are_rare(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with plane(f"unix:{tmp_path / 'f'},generation=1") as made:
        for _ in range(20):
            with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
                await read_all(sock)
        assert len(caplog.records) == 1
        monkeypatch.setattr(made, "_quiet_until", 0.0)
        with client(made, NOBODY) as sock, pytest.raises(ConnectionResetError):
            await read_all(sock)
        assert len(caplog.records) == 2
