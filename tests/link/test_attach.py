"""Links come, go and come back through one path, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import socket
import stat
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop

from netstack.api import Link
from netstack.errors import ConfigError, LinkDown
from netstack.link import attach as attach_module
from netstack.link import listening
from netstack.link.attach import MAX_HANDSHAKES, Attachments
from netstack.link.capture import CaptureLink
from netstack.link.namespace import process_handle
from netstack.link.spec import LinkSpec
from netstack.link.vmnet import Request, emit_command, emit_init
from netstack.observe.events import Event, EventBus, LinkLost, LinkUp
from netstack.observe.metrics import Counters, Drop
from netstack.observe.pcap import PcapWriter

from .conftest import frame

UUID = uuid.UUID("d1d9cd61-d0dc-4715-9bc3-4c11dad7ada5")


class Network:
    """The stack's part: links are watched in the event loop, what they bring is kept, `LinkDown` is reported."""

    def __init__(self) -> None:
        self.ports: dict[int, Link] = {}
        self.identities: list[str | None] = []
        self.frames: list[bytes] = []
        self.reports: list[str] = []
        self.events: list[Event] = []
        self.counters = Counters()
        self.attachments: Attachments
        self._count = 0
        self._reserved: dict[uuid.UUID, tuple[bytes, bytes]] = {}
        self.released: list[uuid.UUID] = []

    def attach(self, link: Link, identity: str | None, /) -> int:
        self._count += 1
        number = self._count
        self.ports[number] = link
        self.identities.append(identity)
        asyncio.get_running_loop().add_reader(link.fileno(), self._readable, number)
        return number

    def detach(self, port: int, reason: str) -> None:
        link = self.ports.pop(port, None)
        if link is not None:
            asyncio.get_running_loop().remove_reader(link.fileno())
            self.reports.append(reason)
            self.attachments.detached(link, reason)

    def _readable(self, number: int) -> None:
        link = self.ports[number]
        try:
            self.frames += [bytes(view[link.headroom :]) for view in link.receive()]
        except LinkDown as error:
            self.detach(number, str(error))

    def reserve(self, identity: uuid.UUID, preferred: bytes | None) -> tuple[bytes, bytes]:
        number = len(self._reserved) + 1
        return self._reserved.setdefault(
            identity, (preferred or bytes((192, 168, 65, 2 + number)), b"\x02\x50" + struct.pack(">I", number))
        )

    def make(self, *urls: str, **options: Any) -> Attachments:
        bus = EventBus()
        bus.subscribe(self.events.append)
        self.attachments = Attachments(
            [LinkSpec.parse(url) for url in urls],
            mtu=1500,
            attach=self.attach,
            detach=self.detach,
            reserve=self.reserve,
            release=self.released.append,
            counters=self.counters,
            events=bus,
            rng=random.Random(1),
            **options,
        )
        return self.attachments

    @property
    def names(self) -> list[str]:
        return sorted(link.name for link in self.ports.values())


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


async def until(condition: Callable[[], Any], limit_s: float = 3.0) -> None:
    """Let the loop turn until `condition` holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        await asyncio.sleep(0.002)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture(scope="module")
def libuv_is_warm() -> None:
    """libuv keeps two descriptors of the process from its first loop on."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def no_descriptor_is_left(libuv_is_warm: None) -> Iterator[None]:
    """A2: whatever happened, everything that was opened is closed."""
    before = set(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else set()
    yield
    assert not before or len(os.listdir("/proc/self/fd")) <= len(before)


class Client:
    """A hypervisor's end of a stream."""

    def __init__(self, path: Path | str) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(2)
        self.sock.connect(str(path))
        self.sock.setblocking(False)

    async def exactly(self, octets: int) -> bytes:
        loop = asyncio.get_running_loop()
        received = b""
        async with asyncio.timeout(3):
            while len(received) < octets:
                some = await loop.sock_recv(self.sock, octets - len(received))
                if not some:
                    raise EOFError(received)
                received += some
        return received

    def qemu(self, octets: bytes) -> None:
        self.sock.send(struct.pack(">I", len(octets)) + octets)

    async def closed(self) -> bool:
        try:
            await self.exactly(1)
        except (EOFError, ConnectionError):
            return True
        return False

    def close(self) -> None:
        self.sock.close()


async def test_a_guest_connects_goes_and_comes_back(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path}"):
        for turn in range(1, 4):
            client = Client(path)
            client.qemu(frame(turn))
            await until(lambda turn=turn: len(network.frames) == turn)
            assert network.names == [f"qemu:{path}"]
            client.close()
            await until(lambda: not network.ports)
    assert network.frames == [frame(1), frame(2), frame(3)]
    assert [type(event) for event in network.events] == [LinkUp, LinkLost] * 3
    assert not path.exists()


async def test_several_guests_share_one_socket(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path},name=vm"):
        clients = [Client(path) for _ in range(3)]
        await until(lambda: len(network.ports) == 3)
        assert network.names == ["vm", "vm#2", "vm#3"]
        clients[1].close()
        await until(lambda: len(network.ports) == 2)
        clients[1] = Client(path)
        await until(lambda: len(network.ports) == 3)
        assert network.names == ["vm", "vm#2", "vm#3"]
        for client in clients:
            client.close()
        await until(lambda: not network.ports)


async def test_the_socket_is_private_from_its_first_moment(network: Network, tmp_path: Path) -> None:  # L1
    path, datagrams = tmp_path / "net.sock", tmp_path / "vfkit.sock"
    mask = os.umask(0)
    try:
        async with network.make(f"qemu:{path}", f"unixgram:{datagrams}"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(datagrams.stat().st_mode) == 0o600
            assert os.umask(0) == 0
    finally:
        os.umask(mask)


async def test_a_stale_socket_is_replaced(network: Network, tmp_path: Path) -> None:  # L2, F1
    for kind, scheme in ((socket.SOCK_STREAM, "qemu"), (socket.SOCK_DGRAM, "unixgram")):
        path = tmp_path / scheme
        for stale in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(socket.AF_UNIX, stale) as dead:
                dead.bind(str(path))
            async with network.make(f"{scheme}:{path}"):
                with socket.socket(socket.AF_UNIX, kind) as probe:
                    probe.connect(str(path))
            assert not path.exists()


async def test_a_socket_somebody_answers_is_left_alone(network: Network, tmp_path: Path) -> None:  # L2
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        path = tmp_path / f"live-{kind}"
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(str(path))
            if kind == socket.SOCK_STREAM:
                other.listen()
            for scheme in ("qemu", "unixgram"):
                with pytest.raises(ConfigError, match="another program listens"):
                    async with network.make(f"{scheme}:{path}"):
                        pass
            assert path.is_socket()


async def test_what_is_no_socket_is_never_removed(network: Network, tmp_path: Path) -> None:  # L2
    file, symlink, fifo, directory = (tmp_path / name for name in ("file", "symlink", "fifo", "directory"))
    file.write_text("precious")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "dead"))
    symlink.symlink_to(tmp_path / "dead")
    os.mkfifo(fifo)
    directory.mkdir()
    for path in (file, symlink, fifo, directory):
        with pytest.raises(ConfigError, match="not a socket"):
            async with network.make(f"vmnet:{path}"):
                pass
        assert path.name in names(tmp_path)
    assert file.read_text() == "precious"


async def test_a_stale_socket_in_a_directory_of_everybody_is_left(network: Network, tmp_path: Path) -> None:  # L2
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(shared / "net.sock"))
    with pytest.raises(ConfigError, match="open to other users"):
        async with network.make(f"qemu:{shared / 'net.sock'}"):
            pass
    shared.chmod(0o1777)
    async with network.make(f"qemu:{shared / 'net.sock'}"):
        pass


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("qemu:{}/missing/net.sock", "the directory does not exist"),
        ("qemu:{}/" + "x" * 120, "at most 107 octets"),
        ("fd:999", "leave the descriptor open"),
        ("tap:pid=4194300", "a process that runs"),
        ("tap:netns=nope", "no network namespace 'nope'; `ip netns list` shows"),
        ("packet:fd=999", "descriptor 999 is not open"),
    ],
)
async def test_a_link_that_cannot_be_had_is_said_at_start(
    network: Network, tmp_path: Path, url: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        async with network.make(f"qemu:{tmp_path / 'good.sock'}", url.format(tmp_path)):
            pass
    assert not (tmp_path / "good.sock").exists(), "what was already open is cleaned up"


async def test_a_socket_that_is_no_longer_ours_is_not_removed(network: Network, tmp_path: Path) -> None:
    """Another daemon took the path over: it keeps it."""
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path}"):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.is_socket()


async def test_other_users_are_refused(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.sock"
    uid = os.geteuid() + 4711
    monkeypatch.setattr(attach_module, "peer_uid", lambda sock: uid)
    async with network.make(f"qemu:{path}"):
        client = Client(path)
        assert await client.closed()
        client.close()
        assert not network.ports
    async with network.make(f"qemu:{path}", allowed_uids=frozenset({uid})):
        client = Client(path)
        await until(lambda: network.ports)
        client.close()
        await until(lambda: not network.ports)


async def test_the_peers_user_is_known(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert listening.peer_uid(ours) == os.geteuid()


# VMN3T over the socket.


async def shake(path: Path, request: Request) -> tuple[Client, bytes]:
    client = Client(path)
    client.sock.send(emit_init())
    assert await client.exactly(49) == emit_init()
    client.sock.send(emit_command(request))
    return client, await client.exactly(258)


async def test_a_vmnet_client_gets_interface_and_frames(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "eth.sock"
    async with network.make(f"vmnet:{path}"):
        client = Client(path)
        # Everything in one write: no frame behind the command is lost.
        body = frame(1)
        client.sock.send(emit_init() + emit_command(Request(uuid=UUID, preferred=None)) + b"\x3c\0" + body)
        assert (await client.exactly(49))[:5] == b"VMN3T"
        assert (await client.exactly(258))[:11] == bytes.fromhex("01dc050e06025000000001")
        await until(lambda: network.frames == [body])
        assert network.identities == [str(UUID)]
        client.close()
        await until(lambda: network.released == [UUID])


async def test_one_uuid_twice_at_once_is_one_guest(network: Network, tmp_path: Path) -> None:
    """rootlesskit attaches twice with one UUID; both get the same MAC and both pass frames."""
    path = tmp_path / "eth.sock"
    async with network.make(f"vmnet:{path}"):
        one, first = await shake(path, Request(uuid=UUID, preferred=None))
        two, second = await shake(path, Request(uuid=UUID, preferred=None))
        assert first == second
        await until(lambda: len(network.ports) == 2)
        assert network.identities == [str(UUID)] * 2
        one.sock.send(b"\x3c\0" + frame(1))
        two.sock.send(b"\x3c\0" + frame(2))
        await until(lambda: sorted(network.frames) == [frame(1), frame(2)])
        one.close()
        await until(lambda: len(network.ports) == 1)
        two.close()
        await until(lambda: not network.ports)
        again, third = await shake(path, Request(uuid=UUID, preferred=None))
        assert third == first
        again.close()
        await until(lambda: not network.ports and len(network.released) == 3)


async def test_a_refused_client_is_told_why(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "eth.sock"
    attachments = network.make(f"vmnet:{path}")
    attachments._reserve = attach_module._refuse
    async with attachments:
        client, answer = await shake(path, Request(uuid=UUID, preferred=None))
        assert answer[:2] == b"\x02\x1a"
        assert answer[2:28] == b"No IP addresses available."
        assert await client.closed()
        client.close()
        assert not network.ports


async def test_a_hundred_half_handshakes_keep_nobody_out(network: Network, tmp_path: Path) -> None:  # G12
    path = tmp_path / "eth.sock"
    async with network.make(f"vmnet:{path}", handshake_s=0.5) as attachments:
        idlers: list[Client] = []
        for number in range(100):
            idlers.append(Client(path))
            idlers[-1].sock.send(emit_init()[: number % 50])
            await asyncio.sleep(0)
        await until(lambda: len(attachments._handshakes) == MAX_HANDSHAKES)
        client, answer = await shake(path, Request(uuid=UUID, preferred=None))
        assert answer[0] == 1
        await until(lambda: len(network.ports) == 1)
        await until(lambda: not attachments._handshakes)
        for idler in idlers:
            with contextlib.suppress(EOFError, ConnectionError):
                while True:
                    await idler.exactly(1)
            idler.close()
        assert len(network.ports) == 1
        client.close()
        await until(lambda: not network.ports)


async def test_a_fault_of_ours_in_one_handshake_leaves_the_others(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "eth.sock"
    attachments = network.make(f"vmnet:{path}")
    attachments._reserve = lambda identity, preferred: {}["nothing"]  # type: ignore[assignment]
    async with attachments:
        with caplog.at_level(logging.CRITICAL, "pyvpnkit.link"):
            client = Client(path)
            client.sock.send(emit_init() + emit_command(Request(uuid=UUID, preferred=None)))
            await client.exactly(49)
            assert await client.closed()
            client.close()
        assert network.counters.contained == 1
        attachments._reserve = network.reserve
        client, answer = await shake(path, Request(uuid=UUID, preferred=None))
        assert answer[0] == 1
        client.close()
        await until(lambda: not network.ports)


# Datagrams.


async def test_a_datagram_guest_comes_goes_and_comes_back(network: Network, tmp_path: Path) -> None:  # F3
    path = tmp_path / "vfkit.sock"
    async with network.make(f"unixgram:{path}"):
        for turn in range(1, 4):
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as guest:
                guest.bind(str(tmp_path / f"guest-{turn}"))
                guest.sendto(frame(turn), str(path))
                await until(lambda turn=turn: len(network.frames) == turn)
                assert len(network.ports) == 1
                (link,) = network.ports.values()
                assert link.send([(frame(10 + turn),)]) == 1
                assert guest.recv(2000) == frame(10 + turn)
        # The socket of the last one is gone, which nobody noticed; the next guest's coming shows it.
    assert network.frames == [frame(1), frame(2), frame(3)]
    assert sum("gone" in reason for reason in network.reports) == 2
    assert not path.exists()


# Dialling.


async def test_a_dialled_peer_may_come_late_and_come_back(network: Network, tmp_path: Path) -> None:  # F2
    path = tmp_path / "qemu.sock"
    loop = asyncio.get_running_loop()
    async with network.make(f"qemu:connect:{path}"):
        for turn in (1, 2):
            with socket.socket(socket.AF_UNIX) as door:
                door.bind(str(path))
                door.listen()
                door.setblocking(False)
                async with asyncio.timeout(3):
                    peer, _ = await loop.sock_accept(door)
                peer.send(struct.pack(">I", 60) + frame(turn))
                await until(lambda turn=turn: len(network.frames) == turn)
                peer.close()
            path.unlink()
            await until(lambda: not network.ports)
    assert network.frames == [frame(1), frame(2)]


async def test_dialling_nobody_costs_next_to_nothing(network: Network, tmp_path: Path) -> None:  # F2
    connects = 0
    real = attach_module._connect

    async def counted(spec: LinkSpec) -> socket.socket:
        nonlocal connects
        connects += 1
        return await real(spec)

    attach_module._connect = counted
    try:
        async with network.make(f"qemu:connect:{tmp_path / 'nobody'}"):
            await asyncio.sleep(0.8)
    finally:
        attach_module._connect = real
    assert 2 <= connects <= 4  # after 0, 0.1, 0.3 and 0.7 s


# TCP and inherited descriptors.


async def test_a_guest_connects_over_tcp(network: Network) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    async with network.make(f"qemu:tcp:127.0.0.1:{port}"):
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(struct.pack(">I", 60) + frame(1))
            await until(lambda: network.frames == [frame(1)])
            with pytest.raises(ConfigError, match="give a free port"):
                async with Network().make(f"qemu:tcp:127.0.0.1:{port}"):
                    pass
        await until(lambda: not network.ports)


async def test_an_inherited_connection_is_a_link_until_it_is_lost(network: Network) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with network.make(f"fd:{ours.detach()}") as attachments:
            theirs.send(struct.pack(">I", 60) + frame(1))
            await until(lambda: network.frames == [frame(1)])
            assert not attachments.over.is_set()
            theirs.close()
            async with asyncio.timeout(2):
                await attachments.over.wait()


async def test_an_inherited_listening_socket_speaks_vmnet(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "inherited.sock"
    door = socket.socket(socket.AF_UNIX)
    door.bind(str(path))
    door.listen()
    async with network.make(f"fd:{door.detach()}"):
        client, answer = await shake(path, Request(uuid=UUID, preferred=None))
        assert answer[0] == 1
        client.close()
        await until(lambda: network.identities and not network.ports)
    assert path.exists(), "the parent's path is the parent's to remove"


async def test_an_inherited_datagram_pair_and_a_bound_one(network: Network, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(tmp_path / "bound"))
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as guest:
        guest.bind(str(tmp_path / "guest"))
        async with network.make(f"fd:{ours.detach()}", f"unixgram:fd:{bound.detach()}"):
            theirs.send(frame(1))
            await until(lambda: network.frames == [frame(1)])
            guest.sendto(frame(2), str(tmp_path / "bound"))
            await until(lambda: network.frames == [frame(1), frame(2)])


async def test_a_descriptor_of_the_wrong_kind_is_refused(network: Network) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ConfigError, match="looks like qemu"):
        async with network.make(f"fd:{ours.fileno()},kind=unixgram"):
            pass


async def test_a_seqpacket_guest(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "bess.sock"
    async with network.make(f"bess:{path}"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as guest:
            guest.connect(str(path))
            guest.send(frame(1))
            await until(lambda: network.frames == [frame(1)])
        await until(lambda: not network.ports)


async def test_a_link_for_one_guest_is_over_with_it(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path},once=on") as links:
        guest = socket.socket(socket.AF_UNIX)
        with guest:
            guest.connect(str(path))
            await until(lambda: len(network.ports) == 1)
            await until(lambda: links.listening == [])
            with socket.socket(socket.AF_UNIX) as second, pytest.raises(ConnectionRefusedError):
                second.connect(str(path))
            assert not links.over.is_set()
        async with asyncio.timeout(5):
            await links.over.wait()
    assert not path.exists()


# Limits and ends.


async def test_no_descriptors_left_is_waited_out_without_spinning(
    network: Network, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:  # N5, R1
    import resource

    path = tmp_path / "net.sock"
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with network.make(f"qemu:{path}"):
        client = Client(path)
        await until(lambda: len(network.ports) == 1)
        waiting = Client(path)
        hoard: list[int] = []
        second = socket.socket(socket.AF_UNIX)
        await until(lambda: len(network.ports) == 2)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 4, limits[1]))
        try:
            with contextlib.suppress(OSError):
                while True:
                    hoard.append(os.dup(0))
            second.connect(str(path))
            cpu = time.process_time()
            await asyncio.sleep(0.3)
            assert time.process_time() - cpu < 0.1
            assert network.counters.drops[Drop.DESCRIPTORS] == 1
            assert len(network.ports) == 2
            client.qemu(frame(1))
            await until(lambda: network.frames == [frame(1)])
        finally:
            for fd in hoard:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        await until(lambda: len(network.ports) == 3)
        for sock in (client.sock, waiting.sock, second):
            sock.close()
        await until(lambda: not network.ports)
    assert len([record for record in caplog.records if "accept again" in record.message]) == 1


async def test_links_are_limited(network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_module, "MAX_LINKS", 2)
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path}"):
        clients = [Client(path) for _ in range(3)]
        await until(lambda: len(network.ports) == 2)
        assert await clients[2].closed()
        for client in clients:
            client.close()
        await until(lambda: not network.ports)


async def test_after_stop_accepting_guests_stay_and_no_new_one_comes(network: Network, tmp_path: Path) -> None:  # F18
    path = tmp_path / "net.sock"
    async with network.make(f"qemu:{path}") as attachments:
        client = Client(path)
        await until(lambda: len(network.ports) == 1)
        attachments.stop_accepting()
        await asyncio.sleep(0)
        late = Client(path)
        client.qemu(frame(1))
        await until(lambda: network.frames == [frame(1)])
        assert len(network.ports) == 1
        late.close()
    assert await client.closed()
    client.close()
    assert network.reports == ["shutting down"]
    assert not path.exists()


async def test_leaving_ends_every_kind_at_any_stage(network: Network, tmp_path: Path) -> None:
    urls = [
        f"qemu:{tmp_path / 'q'}",
        f"vmnet:{tmp_path / 'v'}",
        f"unixgram:{tmp_path / 'u'}",
        f"bess:{tmp_path / 'b'}",
        f"qemu:connect:{tmp_path / 'nobody'}",
    ]
    tasks = asyncio.all_tasks()
    async with network.make(*urls):
        clients = [Client(tmp_path / "q"), Client(tmp_path / "v")]
        guest = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        guest.bind(str(tmp_path / "guest"))
        guest.sendto(frame(1), str(tmp_path / "u"))
        await until(lambda: len(network.ports) == 2)
    for client in clients:
        client.close()
    guest.close()
    assert asyncio.all_tasks() == tasks
    assert names(tmp_path) == ["guest"]


async def test_links_can_be_wrapped_and_are_known_by_what_is_inside(network: Network, tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    writer = PcapWriter(str(tmp_path / "all.pcapng"))
    async with network.make(f"qemu:{path}", wrap=lambda link: CaptureLink(link, writer)) as attachments:
        client = Client(path)
        client.qemu(frame(1))
        await until(lambda: network.frames)
        ((number, link),) = network.ports.items()
        assert isinstance(link, CaptureLink)
        network.ports[number] = link.inner  # the capture ends while the guest goes on
        client.qemu(frame(2))
        await until(lambda: len(network.frames) == 2)
        client.close()
        await until(lambda: not network.ports)
        assert attachments.links == []
    writer.close()
    assert writer.frames == 1


@pytest.mark.parametrize(
    "scenario",
    [
        test_a_guest_connects_goes_and_comes_back,
        test_several_guests_share_one_socket,
        test_a_vmnet_client_gets_interface_and_frames,
        test_a_hundred_half_handshakes_keep_nobody_out,
        test_a_datagram_guest_comes_goes_and_comes_back,
        test_a_dialled_peer_may_come_late_and_come_back,
        test_leaving_ends_every_kind_at_any_stage,
    ],
)
def test_the_same_holds_in_uvloop(scenario: Callable[..., Coroutine[Any, Any, None]], tmp_path: Path) -> None:
    """The daemon's loop, where the others run in asyncio's own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(Network(), tmp_path))


def test_a_process_can_be_watched_only_where_there_are_pidfds(monkeypatch: pytest.MonkeyPatch) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        try:
            handle = process_handle(process.pid)
            if handle is not None:  # Linux 5.3
                os.close(handle)
            monkeypatch.delattr(os, "pidfd_open", raising=False)
            assert process_handle(process.pid) is None
        finally:
            process.kill()
    monkeypatch.undo()
    assert process_handle(process.pid) is None, "it has ended"
