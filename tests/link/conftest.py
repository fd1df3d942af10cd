"""Every kind of link behind one pair of hands: `Kind.make` gives a link and the peer at its other end.

A new kind is one `Kind` here; `test_conformance.py` then runs against it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from netstack.api import Link
from netstack.link.capture import CaptureLink
from netstack.link.stream import QemuLink, VmnetLink
from netstack.link.unixgram import DatagramLink, PeerLink, UnixgramServer
from netstack.observe.metrics import Counters
from netstack.observe.pcap import PcapWriter

MTU = 1500
ETHERTYPE = b"\x88\xb5"  # for local experiments (IEEE 802), so nothing in a kernel answers


def frame(number: int, octets: int = 60) -> bytes:
    """A frame of `octets` that can be told from others by `number`."""
    head = b"\x02\0\0\0\0\x02\x02\0\0\0\0\x01" + ETHERTYPE + struct.pack(">I", number)
    return (head + bytes(i & 0xFF for i in range(number, number + octets)))[:octets]


class Peer:
    """The far end: whole frames in and out, waiting at most two seconds."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(2.0)

    def send(self, octets: bytes) -> None:
        self.sock.send(octets)

    def receive(self) -> bytes:
        return self.sock.recv(1 << 17)

    def close(self) -> None:
        self.sock.close()


class StreamPeer(Peer):
    def __init__(self, sock: socket.socket, length: struct.Struct) -> None:
        super().__init__(sock)
        self._length = length

    def send(self, octets: bytes) -> None:
        self.sock.sendall(self._length.pack(len(octets)) + octets)

    def receive(self) -> bytes:
        (octets,) = self._length.unpack(self._exactly(self._length.size))
        return self._exactly(octets)

    def _exactly(self, octets: int) -> bytes:
        received = b""
        while len(received) < octets:
            some = self.sock.recv(octets - len(received))
            if not some:
                raise EOFError
            received += some
        return received


class DevicePeer(Peer):
    """A packet socket on the guest's side of a device; only frames of the experiment are seen."""


class BoundPeer(Peer):
    """A datagram socket with a path of its own, not connected, as QEMU's `dgram`."""

    def __init__(self, path: Path, server: str) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind(str(path))
        super().__init__(sock)
        self.server = server
        self.path = path

    def send(self, octets: bytes) -> None:
        self.sock.sendto(octets, self.server)

    def close(self) -> None:
        super().close()
        self.path.unlink(missing_ok=True)


Make = Callable[["World"], Awaitable[tuple[Link, Peer]]]


@dataclass(frozen=True)
class Kind:
    name: str
    make: Make
    notices_close: bool = True
    """`receive` tells that the peer is gone; otherwise `send` does."""
    device: bool = False
    """The kernel is the peer: it sends ordinary frames only, never goes away, and drops what its queue does not hold."""


@dataclass
class World:
    """What one test has made, to be closed after it."""

    tmp_path: Path
    counters: Counters = field(default_factory=Counters)
    stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


def _pair(kind: int = socket.SOCK_STREAM) -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, kind)


async def make_qemu(world: World) -> tuple[Link, Peer]:
    ours, theirs = _pair()
    return QemuLink(ours, "qemu:test", MTU, counters=world.counters), StreamPeer(theirs, struct.Struct(">I"))


async def make_qemu_tcp(world: World) -> tuple[Link, Peer]:
    with socket.create_server(("127.0.0.1", 0)) as door:
        theirs = socket.create_connection(door.getsockname())
        ours, _ = door.accept()
    return QemuLink(ours, "qemu:tcp:test", MTU, counters=world.counters), StreamPeer(theirs, struct.Struct(">I"))


async def make_vmnet(world: World) -> tuple[Link, Peer]:
    ours, theirs = _pair()
    return VmnetLink(ours, "vmnet:test", MTU, counters=world.counters), StreamPeer(theirs, struct.Struct("<H"))


async def make_datagrams(world: World) -> tuple[Link, Peer]:
    ours, theirs = _pair(socket.SOCK_DGRAM)
    return DatagramLink(ours, "fd:test", MTU, counters=world.counters), Peer(theirs)


async def make_bess(world: World) -> tuple[Link, Peer]:
    ours, theirs = _pair(socket.SOCK_SEQPACKET)
    return DatagramLink(ours, "bess:test", MTU, counters=world.counters), Peer(theirs)


def serve_datagrams(world: World) -> tuple[UnixgramServer, asyncio.Queue[PeerLink]]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(world.tmp_path / "server"))
    links: asyncio.Queue[PeerLink] = asyncio.Queue()
    server = UnixgramServer(
        sock,
        "unixgram:test",
        MTU,
        appeared=links.put_nowait,
        gone=lambda link, reason: link.close(),
        counters=world.counters,
    )
    server.start()
    world.stack.callback(server.close)
    return server, links


async def make_unixgram(world: World) -> tuple[Link, Peer]:
    _server, links = serve_datagrams(world)
    peer = BoundPeer(world.tmp_path / "peer", str(world.tmp_path / "server"))
    peer.send(b"VFKT")
    return await links.get(), peer


async def make_second_unixgram(world: World) -> tuple[Link, Peer]:
    """The second peer of a server, whose datagrams the first one's link passes on."""
    _server, links = serve_datagrams(world)
    first = BoundPeer(world.tmp_path / "first", str(world.tmp_path / "server"))
    world.stack.callback(first.close)
    first.send(frame(0))
    reader = await links.get()
    peer = BoundPeer(world.tmp_path / "second", str(world.tmp_path / "server"))
    peer.send(b"VFKT")
    loop = asyncio.get_running_loop()
    reader.receive()
    loop.add_reader(reader.fileno(), reader.receive)
    world.stack.callback(loop.remove_reader, reader.fileno())
    return await links.get(), peer


async def make_captured(world: World) -> tuple[Link, Peer]:
    link, peer = await make_qemu(world)
    writer = PcapWriter(str(world.tmp_path / "capture.pcapng"))
    world.stack.callback(writer.close)
    return CaptureLink(link, writer), peer


def _guest_namespace(world: World) -> int:
    """A process in a user and network namespace of its own, as an ordinary user may make them; its process id."""
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", "echo up; exec sleep 60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def end() -> None:
        holder.kill()
        holder.communicate()

    world.stack.callback(end)
    assert holder.stdout is not None and holder.stderr is not None
    if holder.stdout.readline() != "up\n":
        pytest.skip(f"no user namespace here: {holder.stderr.read().strip()}")
    return holder.pid


def _packet_socket() -> int:
    protocol = int.from_bytes(ETHERTYPE, "big")
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, protocol)
    sock.bind(("guest0", protocol))
    return sock.detach()


def _device(scheme: str, *, offload: bool) -> Make:
    async def make(world: World) -> tuple[Link, Peer]:
        if sys.platform != "linux":
            pytest.skip("expected: network devices are Linux's")
        if scheme == "tap" and not os.access("/dev/net/tun", os.R_OK | os.W_OK):
            pytest.skip("/dev/net/tun may not be opened")
        from netstack.link.devices import open_device
        from netstack.link.namespace import namespace_paths, open_inside
        from netstack.link.spec import LinkSpec

        pid = _guest_namespace(world)
        spec = LinkSpec.parse(f"{scheme}:pid={pid},ifname=guest0,offload={'on' if offload else 'off'}")
        link = open_device(spec, MTU)
        world.stack.callback(link.close)
        fd = open_inside(namespace_paths("pid", str(pid)), _packet_socket)
        return link, DevicePeer(socket.socket(fileno=fd))

    return make


KINDS = [
    Kind("qemu", make_qemu),
    Kind("qemu-tcp", make_qemu_tcp),
    Kind("vmnet", make_vmnet),
    Kind("captured", make_captured),
    Kind("datagrams", make_datagrams, notices_close=False),
    Kind("bess", make_bess),
    Kind("unixgram", make_unixgram, notices_close=False),
    Kind("unixgram-second", make_second_unixgram, notices_close=False),
    Kind("tap", _device("tap", offload=True), device=True),
    Kind("tap-plain", _device("tap", offload=False), device=True),
    Kind("packet", _device("packet", offload=True), device=True),
    Kind("packet-plain", _device("packet", offload=False), device=True),
]


@dataclass
class Bench:
    """One link on the bench."""

    kind: Kind
    link: Link
    peer: Peer
    counters: Counters

    async def arrived(self, count: int) -> list[bytes]:
        """`count` frames of the peer (without headroom), as the stack would get them."""
        frames: list[bytes] = []
        deadline = time.monotonic() + 2.0
        while len(frames) < count and time.monotonic() < deadline:
            await asyncio.sleep(0)  # another link may have to pass datagrams on
            if select.select([self.link.fileno()], [], [], 0.01)[0]:
                for view in self.link.receive():
                    octets = bytes(view[self.link.headroom :])
                    if octets[12:14] == ETHERTYPE:  # a kernel has things of its own to say
                        frames.append(octets)
        return frames

    async def nothing(self) -> bool:
        """What was sent is read, and is no frame for the stack."""
        for _ in range(8):
            await asyncio.sleep(0)
            if self.link.receive():
                return False
        return True

    def pieces(self, octets: bytes) -> tuple[bytes, ...]:
        """A frame as the stack sends it: prefix and header, then the payload as a view."""
        return self.link.prefix(len(octets)) + octets[:14], memoryview(octets)[14:]  # type: ignore[return-value]


sockets_only = pytest.mark.parametrize(
    "bench", [kind for kind in KINDS if not kind.device], indirect=True, ids=lambda kind: kind.name
)


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
async def bench(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bench]:
    world = World(tmp_path)
    with world.stack:
        link, peer = await request.param.make(world)
        try:
            yield Bench(request.param, link, peer, world.counters)
        finally:
            link.close()
            peer.close()
