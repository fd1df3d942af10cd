"""The introspection tree, the archive and the live capture, as programs on the host read them (spec vpnkit 8.1-8.3)."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import subprocess
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import dpkt
import pytest

from netstack.observe.classic import Ring, Rings
from netstack.observe.pcap import INBOUND
from portfwd.ninep import introspect
from portfwd.ninep.client import Client, Rejected
from portfwd.ninep.diagnostics import MAX_READERS, archive, diagnostics_server, pcap_server
from portfwd.ninep.introspect import Sources, Tree, TreeFiles, network_tree
from portfwd.ninep.listen import SocketServer, tree_server
from portfwd.ninep.messages import DMDIR, OEXEC, ORDWR, OREAD, OTRUNC, OWRITE, Rread, Stat, Tattach, Topen, Tread
from tests.portfwd.ninep.site import Direct, client_of

LIMIT_S = 20.0
FRAME = bytes(range(60))


class Network:
    """What is told of it."""

    def __init__(self) -> None:
        self.connections = [
            introspect.connection_line("tcp", "1.2.3.4:443"),
            introspect.connection_line("udp", "0.0.0.0:0", "192.168.65.3:4000-8.8.8.8:53"),
        ]
        self.rings = Rings()
        self.rings.feed(FRAME, INBOUND, 1_700_000_000_000_000_000)
        sources = Sources(
            connections=lambda: "".join(self.connections),
            flows=lambda: introspect.flow_line("192.168.65.3:1", "1.2.3.4:443", is_open=True, last_active=1.5),
            endpoints=lambda: introspect.endpoint_line("1.2.3.4", "192.168.65.3", 2),
            ports=lambda: introspect.port_line("192.168.65.3", 3).encode(),
        )
        self.tree: Tree = network_tree(sources, self.rings)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture(params=["9P2000", "9P2000.u"])
def client(network: Network, request: pytest.FixtureRequest) -> Client:
    return client_of(Direct(TreeFiles(network.tree)), request.param)


def refused(call: object, *arguments: object) -> str:
    with pytest.raises(Rejected) as caught:
        call(*arguments)  # type: ignore[operator]
    return caught.value.text


def listener(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(path))
    sock.listen()
    return sock


def dial(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LIMIT_S)
    sock.connect(str(path))
    return sock


def read_all(sock: socket.socket) -> bytes:
    found = b""
    while octets := sock.recv(1 << 16):
        found += octets
    return found


def test_the_tree(client: Client) -> None:
    assert [stat.name for stat in client.list()] == ["connections", "capture", "flows", "endpoints", "ports"]
    rings = ["all", "dns", "ntp", "icmp", "http_proxy", "bad"]
    assert [stat.name for stat in client.list("capture")] == [f"{name}.pcap" for name in rings]
    kinds = {stat.name: (bool(stat.mode & DMDIR), stat.qid.kind) for stat in client.list()}
    assert kinds["capture"] == (True, 0x80) and kinds["flows"] == (False, 0)
    paths = {stat.qid.path for stat in [*client.list(), *client.list("capture"), client.stat(client.root)]}
    assert len(paths) == 12, "no two files are the same"
    assert client.stat(client.walk("capture", "..", "flows")).name == "flows"
    assert client.stat(client.walk("..")).mode & DMDIR


def test_the_files(client: Client) -> None:
    assert client.load("connections").decode() == ("tcp:1.2.3.4:443\nudp:0.0.0.0:0 udp:192.168.65.3:4000-8.8.8.8:53\n")
    assert client.load("flows") == b"TCP 192.168.65.3:1 > 1.2.3.4:443 socket = open last_active = 1.500000\n"
    assert client.load("endpoints") == b"1.2.3.4 <-> 192.168.65.3 last_active_time = 2.000000\n"
    assert client.load("ports") == b"192.168.65.3 last_active_time = 3.000000\n"
    ((_, frame),) = dpkt.pcap.Reader(io.BytesIO(client.load("capture", "all.pcap")))
    assert frame == FRAME


def test_a_file_is_as_it_was_when_it_was_opened(network: Network, client: Client) -> None:
    fid = client.walk("connections")
    client.open(fid)
    before = client.read(fid, 0, 4)
    network.connections = ["changed\n"]
    assert before + client.read(fid, 4) == b"tcp:1.2.3.4:443\nudp:0.0.0.0:0 udp:192.168.65.3:4000-8.8.8.8:53\n"
    assert client.load("connections") == b"changed\n"


def test_words_that_linux_knows(client: Client) -> None:
    assert refused(client.walk, "nothing") == "No such file or directory"
    assert refused(client.walk, "flows", "x") == "flows/x: only 1 of these were found"
    assert refused(lambda: client.walk("x", begin=client.walk("flows"))) == "Not a directory"
    for mode in (OWRITE, ORDWR, OREAD | OTRUNC):
        assert refused(client.open, client.walk("flows"), mode) == "Read-only file system"
        assert refused(client.open, client.walk("capture"), mode) == "Is a directory"
    for name in ("flows", "capture"):
        assert refused(client.create, client.walk(name), "x", 0) == "Operation not permitted"
        assert refused(client.wstat, client.walk(name), Stat(length=0)) == "Operation not permitted"
        assert refused(client.remove, client.walk(name)) == "Operation not permitted"
    fid = client.walk("flows")
    client.open(fid, OEXEC)
    assert refused(client.write, fid, b"x") == "Operation not permitted"
    directory = client.walk("capture")
    client.open(directory)
    assert refused(client.read, directory, 5) == "Illegal seek"


def test_words_about_fids(client: Client) -> None:
    fid = client.walk("flows")
    assert refused(client.call, Tread(0, 99, 0, 1), Rread) == "Unknown fid 99"
    assert refused(client.call, Tattach(0, fid, 0xFFFFFFFF, "", "", 0), Rread) == f"Fid {fid} already in use"
    assert refused(client.read, fid) == "Can't read from unopened fid"
    client.open(fid)
    assert refused(client.call, Topen(0, fid, 0), Rread) == "Already open"


def test_an_archive_has_exactly_these_files(network: Network) -> None:
    octets = archive(network.tree, 1_700_000_000.7)
    with tarfile.open(fileobj=io.BytesIO(octets)) as tar:
        members = tar.getmembers()
        assert all((one.mode, one.mtime, one.isfile()) == (0o644, 1_700_000_000, True) for one in members)
        content = {one.name: tar.extractfile(one).read() for one in members}  # type: ignore[union-attr]
    rings = ["all", "dns", "ntp", "icmp", "http_proxy", "bad"]
    assert list(content) == ["connections", *(f"capture/{name}.pcap" for name in rings), "flows", "endpoints", "ports"]
    assert content["connections"].startswith(b"tcp:1.2.3.4:443\n")
    assert content["capture/all.pcap"] == network.rings.all.file()
    assert octets.endswith(bytes(1024)) and len(octets) % 512 == 0
    assert len(octets) == 1024 + sum(512 + -(-len(one) // 512) * 512 for one in content.values()), "two blocks end it"


async def test_the_diagnostics_socket_writes_an_archive_and_closes(network: Network, tmp_path: Path) -> None:
    async with diagnostics_server(listener(tmp_path / "d"), network.tree):
        for _ in range(2):
            with dial(tmp_path / "d") as sock:
                octets = await asyncio.to_thread(read_all, sock)
            listed = await asyncio.to_thread(
                lambda octets=octets: subprocess.run(["tar", "-tv"], input=octets, capture_output=True, check=True)
            )
            lines = listed.stdout.decode().splitlines()
            assert len(lines) == 10 and all(line.startswith("-rw-r--r--") for line in lines)
            assert listed.stderr == b""


@pytest.fixture
async def pcap(network: Network, tmp_path: Path) -> AsyncIterator[SocketServer]:
    async with pcap_server(listener(tmp_path / "p"), network.rings.all) as made:
        yield made


async def until(true: object) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # type: ignore[operator]  # noqa: ASYNC110
            await asyncio.sleep(0.002)


def records(octets: bytes) -> list[bytes]:
    return [frame for _, frame in dpkt.pcap.Reader(io.BytesIO(octets))]


async def test_a_live_capture_begins_with_the_ring(network: Network, tmp_path: Path, pcap: SocketServer) -> None:
    with dial(tmp_path / "p") as sock, dial(tmp_path / "p") as other:
        assert records(await asyncio.to_thread(_take, sock, 24 + 76)) == [FRAME]
        for number in range(3):
            network.rings.feed(bytes([number]) * 20, INBOUND, time.time_ns())
            for each in (sock, *[other] * (number == 2)):
                size = 24 + 76 + 3 * 36 if each is other else 36
                got = await asyncio.to_thread(_take, each, size)
                assert got.endswith(bytes([number]) * 20)
        other.shutdown(socket.SHUT_WR)  # `nc </dev/null` does: it still reads
        network.rings.feed(b"after", INBOUND, time.time_ns())
        assert (await asyncio.to_thread(_take, other, 21)).endswith(b"after")
        assert pcap.connections == 2
        sock.close()
        await until(lambda: pcap.connections == 1)
    network.rings.feed(b"nobody reads", INBOUND, time.time_ns())
    await until(lambda: pcap.connections == 0)
    assert pcap.contained == 0
    assert network.rings.all.readers == 0, "nobody is told any more"


def _take(sock: socket.socket, octets: int) -> bytes:
    found = b""
    while len(found) < octets:
        piece = sock.recv(octets - len(found))
        assert piece, found
        found += piece
    return found


async def test_a_slow_reader_loses_packets_and_holds_up_nobody(tmp_path: Path) -> None:
    ring = Ring(64 << 10, 1500)
    async with pcap_server(listener(tmp_path / "p"), ring) as server:
        with dial(tmp_path / "p") as slow, dial(tmp_path / "p") as quick:
            await until(lambda: server.connections == 2)
            assert len(await asyncio.to_thread(_take, quick, 24)) == 24
            for number in range(3000):
                ring.add(number.to_bytes(4, "big") * 100, time.time_ns(), 400)
                taken = await asyncio.to_thread(_take, quick, 416) if number % 10 == 9 else b""
                if taken:
                    taken += await asyncio.to_thread(_take, quick, 9 * 416)
            assert taken[-4:] == (2999).to_bytes(4, "big"), "it has every packet"
            found = await asyncio.to_thread(_until_last, slow)
    numbers = [int.from_bytes(frame[:4], "big") for frame in records(found)]
    assert numbers == sorted(set(numbers)) and numbers[-1] == 2999
    assert 0 < len(numbers) < 3000, "whole packets, in order, not all of them"


def _until_last(sock: socket.socket) -> bytes:
    found = b""
    while not found.endswith((2999).to_bytes(4, "big") * 100):
        piece = sock.recv(1 << 16)
        assert piece
        found += piece
    return found


async def test_readers_are_bounded(tmp_path: Path, pcap: SocketServer) -> None:
    held = [dial(tmp_path / "p") for _ in range(MAX_READERS)]
    await until(lambda: pcap.connections == MAX_READERS)
    with dial(tmp_path / "p") as refused_one:
        assert await asyncio.to_thread(read_all, refused_one) == b""
    assert pcap.refused == 1
    for sock in held:
        sock.close()
    await until(lambda: pcap.connections == 0)


async def test_the_tree_on_a_socket(network: Network, tmp_path: Path) -> None:
    async with tree_server(listener(tmp_path / "i"), lambda: TreeFiles(network.tree)):
        client = await asyncio.to_thread(lambda: Client(dial(tmp_path / "i"), msize=8192))
        assert (await asyncio.to_thread(client.load, "flows")).startswith(b"TCP ")
        client.close()


def test_what_is_kept_for_a_file_is_let_go_however_it_is_closed() -> None:
    client = client_of(Direct(TreeFiles({"long": lambda: bytes(1 << 20)})))
    for close in (client.clunk, client.remove):
        for _ in range(20):
            fid = client.walk("long")
            client.open(fid)
            with contextlib.suppress(Rejected):  # it may not be removed
                close(fid)
    fids = [client.walk("long") for _ in range(5)]
    for fid in fids[:4]:
        client.open(fid)
    assert refused(client.open, fids[4]) == "Cannot allocate memory"
    assert client.read(fids[3], (1 << 20) - 1) == b"\0", "what is open stays so"
    client.clunk(fids[0])
    client.open(fids[4])


@pytest.mark.parametrize("octets", [20_000, 1_000_000])
def test_a_long_file_comes_in_pieces(octets: int) -> None:
    content = bytes(range(256)) * (octets // 256)
    client = client_of(Direct(TreeFiles({"long": lambda: content})))
    assert client.load("long") == content
