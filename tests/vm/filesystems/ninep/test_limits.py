"""What clients may have, what waits for what, and a host's file system that is slow."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from netstack.errors import ConfigError
from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site
from tests.vm.filesystems.ninep.test_session import refused
from vm.filesystems.ninep import connection, listen, wire
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep.limits import Limits
from vm.filesystems.ninep.listen import FileServer
from vm.filesystems.ninep.nodes import Node
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep.share import Share

PATIENCE_S = 30.0
F_SETLEASE = 1024


@contextlib.contextmanager
def slow(*paths: Path) -> Iterator[None]:
    """Whoever opens one of these for writing waits, in the kernel, as with a dead disk: it has a lease (fcntl(2))."""
    former = signal.signal(signal.SIGIO, signal.SIG_IGN)  # that somebody wants it
    fds = []
    try:
        for path in paths:
            path.touch()
            fds.append(os.open(path, os.O_RDONLY))
            fcntl.fcntl(fds[-1], F_SETLEASE, fcntl.F_RDLCK)
        yield
    finally:
        for fd in fds:
            os.close(fd)
        signal.signal(signal.SIGIO, former)


def eventually(what: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def blocked(client: Client, export: Path, *names: str) -> None:
    """The server is in a call for each of these that does not return; tags from 100."""
    for number, name in enumerate(names):
        client.call(m.Twalk(1, 0, 500 + number, (name.encode(),)), m.Rwalk)
        client.send(m.Tlopen(100 + number, 500 + number, os.O_WRONLY))


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_slow_file_holds_up_nothing_else(export: Path, new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with site(export, new_loop=new_loop) as place:
        client = place.client()
        with slow(export / "slow"):
            blocked(client, export, "slow")
            client.store("other", b"data")
            assert client.load("other") == b"data"
            assert place.client().list() == [b"other", b"slow"]
        answer = client.receive()
        assert answer.tag == 100 and isinstance(answer, m.Rlopen)


def test_tflush_of_what_runs_is_answered_after_it(client: Client, export: Path) -> None:
    with slow(export / "slow"):
        blocked(client, export, "slow")
        client.send(m.Tflush(7, 100), m.Tflush(8, 100), m.Tflush(9, 99))
        first = client.receive()
        assert isinstance(first, m.Rflush) and first.tag == 9, "there is nothing like that"
        client.store("other", b"")
    assert [client.receive().tag for _ in range(3)] == [100, 7, 8]


def test_tflush_of_what_waits_takes_it_away(place: Site, client: Client, export: Path) -> None:
    names = [f"slow{number}" for number in range(Limits.session_running)]
    with slow(*(export / name for name in names)):
        blocked(client, export, *names)
        client.send(m.Tmkdir(50, 0, b"never", 0o755, 0), m.Tmkdir(51, 0, b"later", 0o755, 0), m.Tflush(7, 50))
        flushed = client.receive()
        assert isinstance(flushed, m.Rflush) and flushed.tag == 7
        other = place.client()
        assert other.list() == sorted(name.encode() for name in names), "threads are left for others"
        assert place.server.describe()["flushed"] == 1
    assert {client.receive().tag for _ in range(len(names) + 1)} == {51, *range(100, 100 + len(names))}
    assert not (export / "never").exists() and (export / "later").is_dir()


def test_a_tag_that_is_in_use(client: Client, export: Path) -> None:
    with slow(export / "slow"):
        blocked(client, export, "slow")
        client.send(m.Tgetattr(100, 0, 0))
        assert client.receive() == m.Rlerror(100, errno.EINVAL)
    assert isinstance(client.receive(), m.Rlopen)


def test_tversion_waits_for_what_runs(client: Client, export: Path) -> None:
    with slow(export / "slow"):
        blocked(client, export, "slow")
        client.send(m.Tversion(m.NOTAG, 8192, b"9P2000.L"), m.Tattach(3, 0, m.NOFID, b"", b"", 0))
    kinds = [type(client.receive()) for _ in range(3)]
    assert kinds == [m.Rlopen, m.Rversion, m.Rattach]


def test_a_client_that_goes_leaves_nothing_but_what_runs(place: Site, export: Path) -> None:
    client = place.client()
    with slow(export / "slow"):
        blocked(client, export, "slow")
        client.send(m.Tmkdir(50, 0, b"made", 0o755, 0))
        eventually((export / "made").exists)
        client.close()
        assert place.server.connections == 1
    eventually(lambda: place.server.connections == 0)
    assert place.server.share.opened.used == 0 and len(place.server.share.nodes) == 1


async def test_the_server_ends_though_the_disk_does_not_answer(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And when it does after all, nothing is left."""
    monkeypatch.setattr(listen, "GRACE_S", 0.2)
    ours, theirs = socket.socketpair()
    with slow(export / "slow"):
        async with FileServer(Share(export, parse_owner("passthrough"))) as server:
            serving = asyncio.create_task(server.serve(theirs))
            client = await asyncio.to_thread(Client, ours)
            await asyncio.to_thread(blocked, client, export, "slow")
            await asyncio.to_thread(eventually, lambda: server.describe()["outstanding"] == 1)
        assert server.share.opened.used == 1 and server.connections == 0
        await serving
    client.close()
    await asyncio.to_thread(eventually, lambda: server.share.opened.used == 0)
    server.share.close()


def test_more_requests_than_are_read(place: Site, client: Client, export: Path) -> None:
    """What is behind them waits in the socket, and all are answered in the end."""
    names = [f"slow{number}" for number in range(Limits.session_running)]
    with slow(*(export / name for name in names)):
        blocked(client, export, *names)
        for tag in range(1000, 1120):
            client.send(m.Tgetattr(tag, 0, 0))
        eventually(lambda: place.server.describe()["outstanding"] == Limits.session_requests)
    tags = {client.receive().tag for _ in range(120 + len(names))}
    assert tags == {*range(1000, 1120), *range(100, 100 + len(names))}


def test_a_client_that_takes_no_answers_is_closed(
    place: Site, client: Client, export: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    (export / "file").write_bytes(b"x" * (1 << 20))
    fid = client.open("file")
    for tag in range(100, 160):
        client.send(m.Tread(tag, fid, 0, 1 << 20))
    eventually(lambda: place.server.connections == 0)
    assert place.server.share.opened.used == 0


def test_a_client_that_says_no_version_is_closed(export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "HELLO_S", 0.3)
    with site(export) as place:
        served = place.client()
        silent = place.connect()
        silent.settimeout(PATIENCE_S)
        with silent:
            assert silent.recv(1) == b""
        served.store("file", b"one that has said it may be silent")


def test_each_bound_has_its_answer_and_its_counter(export: Path) -> None:
    (export / "dir").mkdir()
    for number in range(40):
        (export / "dir" / f"{number}-{'x' * 200}").touch()
    limits = Limits(descriptors=64, session_fids=100, session_octets=4096, session_locks=3)
    with site(export, limits=limits) as place:
        client, other = place.client(), place.client()
        fids = [client.walk() for _ in range(99)]
        refused(errno.EMFILE, client.walk)
        for fid in fids:
            client.clunk(fid)
        client.store("file", b"")
        opened = [client.open("file") for _ in range(16)]
        refused(errno.EMFILE, client.open, "file")
        also = [other.open("file") for _ in range(16)]
        refused(errno.EMFILE, other.open, "file")
        third = place.client()
        refused(errno.ENFILE, third.open, "file")
        client.clunk(opened.pop())
        third.clunk(third.open("file"))
        for at in range(3):
            assert client.lock(opened[0], m.WRLCK, start=2 * at, length=1) == m.LOCK_SUCCESS
        refused(errno.ENOLCK, client.lock, opened[0], m.WRLCK, start=10, length=1)
        assert client.lock(opened[0], m.WRLCK, start=0, length=3) == m.LOCK_SUCCESS, "which replaces two"
        listing = client.open("dir")
        refused(errno.ENOMEM, list, client.entries(listing))
        client.set_xattr("file", "user.x", b"x" * 4000)
        client.call(m.Txattrwalk(1, opened[0], 9999, b"user.x"), m.Rxattrwalk)
        refused(errno.ENOMEM, client.call, m.Txattrwalk(1, opened[0], 9998, b"user.x"), m.Rxattrwalk)
        assert place.server.describe()["over"] == {"opened": 1, "nodes": 0, "fids": 1, "octets": 2, "locks": 1}
        for fid in also:
            other.clunk(fid)


def test_nodes_are_bounded(export: Path) -> None:
    with site(export, limits=Limits(nodes=10)) as place:
        client = place.client()
        at = client.walk()
        for _ in range(9):
            client.mkdir("d", begin=at) if not client.list(begin=at) else None
            client.call(m.Twalk(1, at, at, (b"d",)), m.Rwalk)
        refused(errno.ENFILE, client.mkdir, "d", begin=at)
        assert client.list(begin=at) == [], "it was not made"
        client.clunk(at)
        client.store("file", b"")
        assert place.server.describe()["over"]["nodes"] == 1


def test_more_connections_than_are_served(export: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    with site(export, limits=Limits(connections=2), listeners=[listener]) as place:

        def dial() -> socket.socket:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
            return sock

        first, second = Client(dial()), Client(dial())
        with pytest.raises((EOFError, OSError)):
            Client(third := dial())
        third.close()
        first.close()
        eventually(lambda: place.server.connections == 1)
        eventually(lambda: len(place.server._acceptors[0]) == 1)
        again = Client(dial())
        again.store("file", b"")
        again.close()
        second.close()
        assert place.server.describe()["refused"] == 1


def test_descriptors_of_the_process_run_out(place: Site, client: Client, export: Path) -> None:
    client.store("file", b"data")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 9, hard))
    fids: list[int] = []
    try:
        with pytest.raises(OSError) as caught:
            fids.extend(client.open("file") for _ in range(500))
        assert caught.value.errno == errno.EMFILE and place.server.describe()["over"]["opened"] == 0
        assert fids
        for fid in fids:
            client.clunk(fid)
        assert client.load("file") == b"data"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        pytest.param({"msize": 1000}, "--msize: 1000 octets; from 4096 to 1048576", id="msize too small"),
        pytest.param({"msize": 1 << 21}, "--msize", id="msize too large"),
        pytest.param({"workers": 0}, "workers: 0; at least 1", id="no threads"),
        pytest.param({"descriptors": 31}, "descriptors: .* at least 32", id="few descriptors"),
    ],
)
def test_limits_that_cannot_be(export: Path, wrong: dict[str, int], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Share(export, parse_owner("passthrough"), limits=Limits(**wrong))


def test_a_lock_does_not_remember_names_without_end(client: Client) -> None:
    fid = client.create("file")
    ask = m.Tlock(1, fid, m.WRLCK, 0, 0, 0, 1, b"x" * 60000)
    refused(errno.EINVAL, client.call, ask, m.Rlock)


def test_a_fid_that_is_opened_while_it_walks_stays_where_it_is(
    export: Path, place: Site, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests for one fid at once, which Linux never sends: its lock would be kept for a file that it does not stand for."""
    (export / "one").mkdir()
    (export / "one" / "two").mkdir()
    fid = client.walk("one")
    session = next(iter(place.server._connections)).session
    find = place.server.share.find

    def opened_meanwhile(*words: Any) -> Node:
        assert isinstance(wire.parse(bytes(session.answer(wire.emit(m.Tlopen(5, fid, 0))))), m.Rlopen)
        assert isinstance(wire.parse(bytes(session.answer(wire.emit(m.Tlock(5, fid, 0, 0, 0, 0, 1, b""))))), m.Rlock)
        return find(*words)

    with monkeypatch.context() as patch:
        patch.setattr(place.server.share, "find", opened_meanwhile)
        refused(errno.EBUSY, client.call, m.Twalk(1, fid, fid, (b"two",)), m.Rwalk)
    client.clunk(fid)
    assert len(place.server.share.locks) == 0


def test_a_node_that_was_dropped_for_good_takes_nothing_of_others_with_it(export: Path) -> None:
    (export / "outer" / "inner").mkdir(parents=True)
    share = Share(export, parse_owner("passthrough"))
    nodes = share.nodes
    outer = share.find(nodes.root, b"outer")
    inner = share.find(outer, b"inner")
    nodes.drop(inner)
    for use in (lambda: nodes.again(inner), lambda: nodes.found(os.open(export, os.O_PATH), inner, b"name")):
        refused(errno.ESTALE, use)
    assert outer.refs == 1
    nodes.drop(outer)
    share.close()
