"""Length-prefixed frames: any chunking gives the same frames, a lie ends the connection, a cut frame is completed."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import LinkDown
from netstack.link.stream import LARGEST_BELIEVED, READ_OCTETS, QemuLink, StreamLink, VmnetLink
from netstack.observe.metrics import Counters, Drop

from .conftest import frame

PREFIX = {QemuLink: struct.Struct(">I"), VmnetLink: struct.Struct("<H")}


def framed(make: type[StreamLink], *frames: bytes) -> bytes:
    return b"".join(PREFIX[make].pack(len(octets)) + octets for octets in frames)


def bodies(link: StreamLink) -> list[bytes]:
    return [bytes(view[link.headroom :]) for view in link.receive()]


class Pair:
    def __init__(self, make: type[StreamLink], mtu: int = 1500, **options: int) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.theirs.settimeout(2)
        self.counters = Counters()
        self.link = make(self.ours, "test", mtu, counters=self.counters, **options)  # type: ignore[arg-type]

    def close(self) -> None:
        self.link.close()
        self.theirs.close()


@pytest.fixture(params=[QemuLink, VmnetLink])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    made = Pair(request.param)
    yield made
    made.close()


def test_the_wire_is_what_each_protocol_says() -> None:
    qemu, vmnet = Pair(QemuLink), Pair(VmnetLink)
    octets = frame(1, 42)
    for pair in (qemu, vmnet):
        assert pair.link.send([(pair.link.prefix(len(octets)), octets)]) == 1
    assert qemu.theirs.recv(100) == b"\0\0\0\x2a" + octets
    assert vmnet.theirs.recv(100) == b"\x2a\0" + octets  # vpnkit.md Appendix E
    qemu.close()
    vmnet.close()


def test_a_split_at_every_octet_gives_the_same_frames(pair: Pair) -> None:  # Z8
    frames = [frame(1, 14), frame(2, 60), frame(3, 90)]
    stream = framed(type(pair.link), *frames)
    for cut in range(len(stream) + 1):
        got: list[bytes] = []
        for part in (stream[:cut], stream[cut:]):
            if part:
                pair.theirs.sendall(part)
                got += bodies(pair.link)
        assert got == frames, cut


def test_a_dribble_of_single_octets_gives_the_frames(pair: Pair) -> None:  # G10
    frames = [frame(1, 61), frame(2, 1514)]
    got: list[bytes] = []
    for octet in framed(type(pair.link), *frames):
        pair.theirs.send(bytes((octet,)))
        got += bodies(pair.link)
    assert got == frames


@given(
    sizes=st.lists(st.integers(0, 1600), max_size=30),
    cuts=st.lists(st.integers(0, 50_000), max_size=12),
    make=st.sampled_from([QemuLink, VmnetLink]),
)
def test_any_sizes_and_any_splits_give_the_good_frames(
    sizes: list[int], cuts: list[int], make: type[StreamLink]
) -> None:
    """Z8: what is too short or too long is counted, everything else arrives in order."""
    pair = Pair(make)
    frames = [frame(number, octets) for number, octets in enumerate(sizes)]
    stream = framed(make, *frames)
    edges = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    got: list[bytes] = []
    for begin, end in pairwise(edges):
        pair.theirs.sendall(stream[begin:end])
        got += bodies(pair.link)
    assert got == [octets for octets in frames if 14 <= len(octets) <= 1518]
    assert pair.counters.drops[Drop.FRAME_SHORT] == sum(octets < 14 for octets in sizes)
    assert pair.counters.drops[Drop.FRAME_LONG] == sum(octets > 1518 for octets in sizes)
    pair.close()


@given(garbage=st.binary(max_size=3000), make=st.sampled_from([QemuLink, VmnetLink]))
def test_any_octets_are_survived(garbage: bytes, make: type[StreamLink]) -> None:
    pair = Pair(make)
    pair.theirs.sendall(garbage)
    pair.theirs.close()
    with pytest.raises(LinkDown):
        for _ in range(1000):
            for view in pair.link.receive():
                assert 14 <= len(view) - pair.link.headroom <= 1518
    pair.close()


@pytest.mark.parametrize("length", [LARGEST_BELIEVED + 1, 131072, 2**31, 2**32 - 1])
def test_a_length_that_cannot_be_believed_ends_the_connection(length: int) -> None:  # G10
    """The frames before it still arrive, and the peer is told at once by the closed connection."""
    pair = Pair(QemuLink)
    pair.theirs.sendall(framed(QemuLink, frame(1), frame(2)) + struct.pack(">I", length) + bytes(100))
    assert bodies(pair.link) == [frame(1), frame(2)]
    assert pair.theirs.recv(1) == b""
    with pytest.raises(LinkDown, match=f"{length} octets"):
        pair.link.receive()
    pair.close()


def test_a_lie_alone_ends_the_connection_at_once() -> None:
    pair = Pair(QemuLink)
    pair.theirs.sendall(b"GET / HTTP/1.1\r\n")
    with pytest.raises(LinkDown):
        pair.link.receive()
    pair.close()


def test_an_over_long_frame_inside_one_read_is_skipped_and_not_believed_beyond_the_limit() -> None:
    pair = Pair(QemuLink, 65520)
    stream = framed(QemuLink, frame(1), bytes(LARGEST_BELIEVED), frame(2), bytes(LARGEST_BELIEVED + 1), frame(3))
    got: list[bytes] = []
    pair.theirs.setblocking(False)
    with pytest.raises(LinkDown):
        while True:
            if stream:
                try:
                    stream = stream[pair.theirs.send(stream) :]
                except BlockingIOError:
                    pass
            got += bodies(pair.link)
    assert got == [frame(1), frame(2)]
    assert pair.counters.drops[Drop.FRAME_LONG] == 2
    pair.close()


def test_a_frame_begun_and_never_finished_holds_bounded_memory_and_says_so_at_the_end(pair: Pair) -> None:  # G10
    pair.theirs.sendall(framed(type(pair.link), frame(1)) + framed(type(pair.link), frame(2, 1000))[:500])
    assert bodies(pair.link) == [frame(1)]
    assert bodies(pair.link) == []
    pair.theirs.close()
    with pytest.raises(LinkDown, match="inside a frame"):
        pair.link.receive()
    assert len(pair.link._buffer) < READ_OCTETS + LARGEST_BELIEVED + 100


def test_views_stay_what_they_are_until_the_next_receive(pair: Pair) -> None:
    stream = framed(type(pair.link), frame(1, 100), frame(2, 100))
    pair.theirs.sendall(stream + stream[:50])
    views = pair.link.receive()
    pair.theirs.sendall(stream[50:])
    assert [bytes(view[pair.link.headroom :]) for view in views] == [frame(1, 100), frame(2, 100)]
    assert bodies(pair.link) == [frame(1, 100), frame(2, 100)]


def test_a_frame_cut_by_a_full_socket_is_completed_before_the_next(pair: Pair) -> None:
    """Every way the socket can cut the batch: the peer reads odd amounts, and the stream stays in step."""
    total, size = 3000, 1500
    pair.ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    queue = [(pair.link.prefix(size), frame(number, size)[:14], frame(number, size)[14:]) for number in range(total)]
    want = framed(type(pair.link), *(frame(number, size) for number in range(total)))
    received = bytearray()
    position = turns = 0
    while len(received) < len(want):
        if pair.link.flush():
            position += pair.link.send(queue[position : position + 500])
        turns += 1
        received += pair.theirs.recv(7919 * turns % 5000 + 1)
    assert position == total
    assert bytes(received) == want


def test_a_batch_beyond_the_kernels_scatter_limit_goes_out_whole(pair: Pair) -> None:
    count = 1000
    pieces = [(pair.link.prefix(60), *(frame(number)[i : i + 20] for i in (0, 20, 40))) for number in range(count)]
    position = 0
    got = bytearray()
    want = framed(type(pair.link), *(frame(number) for number in range(count)))
    while len(got) < len(want):
        position += pair.link.send(pieces[position:])
        got += pair.theirs.recv(1 << 20)
        pair.link.flush()
    assert got == want
    assert position == count


def test_buffers_of_a_cut_frame_may_be_reused_at_once(pair: Pair) -> None:
    header, payload = bytearray(pair.link.prefix(1500)), bytearray(frame(1, 1500))
    sent = 0
    while pair.link.send([(header, payload)] * 16) == 16:
        sent += 16
    payload[:] = bytes(1500)
    size = pair.link.headroom + 1500
    stream = bytearray()
    pair.theirs.setblocking(False)
    while not pair.link.flush() or not stream:
        stream += pair.theirs.recv(1 << 20)
    try:
        while True:
            stream += pair.theirs.recv(1 << 20)
    except BlockingIOError:
        pass
    whole = bytes(header) + frame(1, 1500)
    assert len(stream) % size == 0
    assert stream == whole * (len(stream) // size)
    assert len(stream) // size >= sent


def test_a_reset_by_the_peer_ends_the_link_when_sending(pair: Pair) -> None:
    pair.theirs.close()
    with pytest.raises(LinkDown):
        pair.link.send([(pair.link.prefix(60), frame(1))])


def test_the_kernel_out_of_buffers_is_no_end(pair: Pair) -> None:  # F19
    """ENOBUFS and its like mean "not now", both ways."""
    real = pair.link._sendmsg, pair.link._recv_into

    def short(*_arguments: object) -> int:
        raise OSError(105, "No buffer space available")

    pair.link._sendmsg = pair.link._recv_into = short  # type: ignore[assignment]
    assert pair.link.send([(pair.link.prefix(60), frame(1))]) == 0
    assert pair.link.receive() == []
    pair.link._sendmsg, pair.link._recv_into = real
    assert pair.link.send([(pair.link.prefix(60), frame(1))]) == 1
