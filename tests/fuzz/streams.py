"""Z8: what a link makes of a peer's octets does not depend on the pieces they come in."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import uuid
from collections import Counter, deque
from collections.abc import Iterator

from netstack.errors import GuestError, LinkDown
from netstack.link.stream import LARGEST_BELIEVED, QemuLink, StreamLink, VmnetLink
from netstack.link.trains import Train
from netstack.link.unixgram import HELLO, DatagramLink, PeerLink, UnixgramServer
from netstack.link.vmnet import INIT_OCTETS, VERSION, Handshake, Request, emit_command, emit_init
from netstack.observe.metrics import Counters, Drop
from tests.fuzz.bend import split, spoil
from tests.support import packets

MTU = 1500
MAC, GATEWAY_MAC = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
GUEST, REMOTE = packets.ip("192.168.65.3"), packets.ip("192.0.2.1")

LINKS: dict[type[StreamLink], struct.Struct] = {QemuLink: struct.Struct(">I"), VmnetLink: struct.Struct("<H")}
"""The links and how their lengths are written, said once more."""


class Pieces:
    """A connected stream socket from which the peer's octets come in these pieces; then the stream is over."""

    family = socket.AF_UNIX

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = deque(pieces)

    def recv_into(self, view: memoryview) -> int:
        if not self._pieces:
            return 0
        piece = self._pieces.popleft()
        if not piece:
            raise BlockingIOError(11, "nothing yet")
        octets = min(len(piece), len(view))
        view[:octets] = piece[:octets]
        if octets < len(piece):
            self._pieces.appendleft(piece[octets:])
        return octets

    def sendmsg(self, *_arguments: object) -> int:
        raise AssertionError("nothing is sent here")

    def setblocking(self, flag: bool) -> None: ...
    def setsockopt(self, *arguments: object) -> None: ...
    def shutdown(self, how: int) -> None: ...
    def close(self) -> None: ...


def frames(rng: random.Random) -> Iterator[bytes]:
    """Frames of any size, runs of segments among them, which a link may take as a train."""
    for _ in range(rng.randrange(1, 6)):
        if rng.random() < 0.4:
            size, seq = rng.choice([536, 561, 1001, 1460]), rng.getrandbits(32)
            payload = rng.randbytes(size)
            for at in range(rng.randrange(1, 20)):
                segment = packets.tcp(GUEST, REMOTE, 1, 2, (seq + at * size) & 0xFFFFFFFF, 1, packets.ACK, 512, payload)
                yield packets.ether(GATEWAY_MAC, MAC, packets.IPV4, packets.ipv4(GUEST, REMOTE, 6, segment))
        else:
            yield rng.randbytes(rng.choice([0, 1, 13, 14, 60, 1514, 1518, 1519, 9000, rng.randrange(2000)]))


def expected(stream: bytes, length: struct.Struct) -> tuple[list[bytes], Counter[str]]:
    """Frames and drops, by the plainest loop."""
    good: list[bytes] = []
    drops: Counter[str] = Counter()
    at = 0
    while at + length.size <= len(stream):
        (octets,) = length.unpack_from(stream, at)
        if octets > LARGEST_BELIEVED:
            drops[Drop.FRAME_LONG] += 1
            break
        begin, at = at + length.size, at + length.size + octets
        if at > len(stream):
            break
        if octets < 14:
            drops[Drop.FRAME_SHORT] += 1
        elif octets > MTU + 18:
            drops[Drop.FRAME_LONG] += 1
        else:
            good.append(stream[begin:at])
    return good, drops


def received(link: StreamLink, trains: bool) -> list[bytes]:
    """All frames until the link is down."""
    found: list[bytes] = []
    try:
        while True:
            for item in link.receive_trains() if trains else link.receive():
                if isinstance(item, Train):
                    view, stride, count = item.view, item.stride, item.count
                else:
                    view, stride, count = item, len(item), 1
                assert len(view) == stride * count
                found += [bytes(view[at + link.headroom : at + stride]) for at in range(0, len(view), stride)]
    except LinkDown:
        return found


def _stream(rng: random.Random) -> None:
    make = rng.choice([QemuLink, VmnetLink])
    length = LINKS[make]
    stream = b"".join(length.pack(len(frame)) + frame for frame in frames(rng))
    if rng.random() < 0.5:
        stream = spoil(rng, stream)
    good, drops = expected(stream, length)
    for _ in range(3):
        pieces = split(rng, stream)
        for _ in range(rng.randrange(3)):
            pieces.insert(rng.randrange(len(pieces) + 1), b"")
        counters = Counters()
        sock: object = Pieces(pieces)
        link = make(sock, "fuzz", MTU, counters=counters)  # type: ignore[arg-type]
        assert received(link, trains=rng.random() < 0.5) == good
        assert {drop: count for drop, count in counters.drops.items() if count} == drops


def _handshake(rng: random.Random) -> None:
    identity = uuid.UUID(int=rng.getrandbits(128)) if rng.random() < 0.8 else None
    preferred = rng.choice([None, rng.randbytes(4)])
    command = emit_command(Request(uuid=identity, preferred=preferred))
    said = emit_init(rng.choice([VERSION] * 8 + [0, 13, 1 << 31])) + command + b"\4\0abcd"
    if rng.random() < 0.6:
        said = spoil(rng, said)
    full, seed = rng.random() < 0.2, rng.getrandbits(32)

    def reserve(_identity: uuid.UUID, wanted: bytes | None) -> tuple[bytes, bytes]:
        if full:
            raise GuestError("No IP addresses available.")
        return wanted or GUEST, MAC

    def shake(pieces: list[bytes], *, exact: bool) -> tuple[bytes, object, str | None]:
        handshake = Handshake(mtu=MTU, reserve=reserve, rng=random.Random(seed))
        answers = b""
        for piece in pieces:
            while exact and piece and (wanted := handshake.wanted):
                answers, piece = answers + handshake.feed(piece[:wanted]), piece[wanted:]
            if not exact:
                answers += handshake.feed(piece)
        assert not (handshake.identity and handshake.failure)
        return answers, handshake.identity, handshake.failure

    once = shake([said], exact=False)
    assert len(once[0]) in (0, INIT_OCTETS, INIT_OCTETS + 258)
    for exact in (True, False):
        assert shake(split(rng, said), exact=exact) == once


def _datagrams(rng: random.Random) -> list[bytes]:
    return [rng.choice([HELLO, rng.randbytes(rng.choice([1, 4, 13, 14, 60, 1514]))]) for _ in range(rng.randrange(30))]


def _datagram_link(rng: random.Random) -> None:
    kind = rng.choice([socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    counters = Counters()
    link = DatagramLink(ours, "fuzz", MTU, counters=counters, max_frame=MTU + 18)
    said = _datagrams(rng)
    found: list[bytes] = []
    with theirs:
        waiting = 0
        for datagram in said:
            theirs.send(datagram)
            waiting += 1
            if waiting == 8 or rng.random() < 0.3:
                found += [bytes(frame) for frame in link.receive()]
                waiting = 0
        found += [bytes(frame) for frame in link.receive()]
    link.close()
    assert found == [datagram for datagram in said if len(datagram) >= 14]
    short = sum(len(datagram) < 14 and datagram != HELLO for datagram in said)
    assert counters.drops[Drop.FRAME_SHORT] == short


async def _unixgram_server(rng: random.Random) -> None:
    """Several peers at one socket: each one's link has its frames, in order, whoever came first and when."""

    def bound() -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sock.bind("")  # Linux finds an abstract name
        sock.setblocking(False)
        return sock

    links: dict[bytes | str, PeerLink] = {}
    found: dict[bytes | str, list[bytes]] = {}

    def appeared(link: PeerLink) -> None:
        assert link.peer not in links
        links[link.peer] = link

    def drain() -> None:
        for peer, link in links.items():
            found[peer] += [bytes(frame) for frame in link.receive()]

    async def settle() -> None:
        for _ in range(4):
            await asyncio.sleep(0)
            drain()

    sock = bound()
    name = sock.getsockname()
    server = UnixgramServer(sock, "fuzz", MTU, appeared=appeared, gone=lambda link, reason: link.close())
    peers = [bound() for _ in range(rng.randrange(1, 4))]
    said: dict[bytes | str, list[bytes]] = {peer.getsockname(): [] for peer in peers}
    found.update({peer: [] for peer in said})
    try:
        server.start()
        waiting = 0
        for datagram in _datagrams(rng):
            peer = rng.choice(peers)
            peer.sendto(datagram, name)
            said[peer.getsockname()].append(datagram)
            waiting += 1
            if waiting == 8 or rng.random() < 0.3:
                await settle()
                waiting = 0
        await settle()
        for peer_name, datagrams in said.items():
            assert found[peer_name] == [datagram for datagram in datagrams if len(datagram) >= 14]
    finally:
        server.close()
        for peer in peers:
            peer.close()


def z8_streams(rng: random.Random) -> None:
    """QEMU's and VPNKit's framing, VPNKit's handshake, datagrams with vfkit's hello."""
    _stream(rng)
    _handshake(rng)
    if rng.random() < 0.2:
        _datagram_link(rng)
    if rng.random() < 0.1:
        with asyncio.Runner() as runner:
            runner.run(_unixgram_server(rng))
