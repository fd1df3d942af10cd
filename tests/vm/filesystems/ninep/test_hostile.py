"""Clients that send what no client should: every message is answered, or ends that connection, and nobody else's."""

from __future__ import annotations

import errno
import os
import random
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from portfwd.ninep.wire import Qid
from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site
from tests.vm.filesystems.ninep.test_limits import eventually
from tests.vm.filesystems.ninep.test_session import refused
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep import wire
from vm.filesystems.ninep.limits import Limits

OWNERS = ("passthrough", "mapped", "requester")


@pytest.fixture(scope="module", params=OWNERS)
def attacked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Outside it is a file that stays as it is."""
    directory = tmp_path_factory.mktemp("attacked")
    (directory / "secret").write_bytes(b"untouched")
    (directory / "export").mkdir()
    with site(directory / "export", request.param) as made:
        bystander = made.client()
        yield made
        bystander.store("last", b"served")
        assert bystander.load("last") == b"served"
    assert (directory / "secret").read_bytes() == b"untouched"
    assert sorted(path.name for path in directory.iterdir()) == ["export", "secret"]
    shutil.rmtree(directory / "export")


def exchange(place: Site, octets: bytes) -> bytes:
    """What is answered to all of it, until the server has no more to say."""
    sock = place.connect()
    sock.settimeout(30)
    with sock:
        sock.sendall(octets)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while True:
            try:
                piece = sock.recv(1 << 16)
            except ConnectionResetError:
                return answer
            if not piece:
                return answer
            answer += piece


HELLO = wire.emit(m.Tversion(m.NOTAG, 8192, b"9P2000.L")) + wire.emit(m.Tattach(0, 0, m.NOFID, b"", b"", 0))


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_octets(attacked: Site, octets: bytes) -> None:
    exchange(attacked, octets)
    exchange(attacked, HELLO + octets)


FIDS = st.sampled_from([0, 1, 2, 3, 4, m.NOFID])
NAMES = st.sampled_from(
    [b"a", b"b", b"c", b"..", b".", b"", b"../secret", b"/", b"x" * 300, b"user.x", b"\xff", b"a\0"]
)
NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 7, 0o777, 0o100644, 0o40755, 0o10600, 0o20600, 0x200, 0x241, 1 << 31, (1 << 32) - 1]
)
LARGE = NUMBERS | st.sampled_from([1 << 62, 1 << 63, (1 << 64) - 1])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "1": st.integers(0, 3) | st.just(255),
    "2": st.integers(0, 5),
    "4": NUMBERS,
    "8": LARGE,
    "b": NAMES,
    "B": st.lists(NAMES, max_size=4).map(tuple),
    "q": st.just(Qid(0, 0, 0)),
    "Q": st.just(()),
    "d": st.binary(max_size=20),
    "o": st.integers(0, 1),
}


def requests() -> st.SearchStrategy[m.Message]:
    """Of every kind, about few fids and few names, so that they meet."""

    def build(number: int) -> st.SearchStrategy[m.Message]:
        kind, layout = wire.LAYOUTS[number]
        names = [name for name in kind.__dataclass_fields__ if name != "tag"]
        values = [FIDS if "fid" in name else FIELDS[field] for name, field in zip(names, layout, strict=True)]
        return st.builds(kind, st.integers(1, 6), *values)

    usual = [number for number, (kind, _) in wire.LAYOUTS.items() if kind.__name__.startswith("T") and number != 100]
    return st.sampled_from([*usual, *usual, *sorted(wire.LAYOUTS)]).flatmap(build)


@given(st.lists(requests(), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_requests(attacked: Site, sent: list[m.Message]) -> None:
    """One after the other on one connection: there is one answer for each, of its kind or an error."""
    client = attacked.client(msize=8192)
    with client.sock:
        for request in sent:
            client.send(request)
            reply = client.receive()
            assert reply.tag == request.tag
            expected = "R" + type(request).__name__[1:]
            assert type(reply).__name__ in (expected, "Rlerror")
            if isinstance(reply, m.Rlerror):
                assert reply.errno in errno.errorcode
            if isinstance(reply, m.Rversion):
                break


def some_request(rng: random.Random, tag: int) -> m.Message:
    """About few fids and few names, so that they meet."""
    fid, new = rng.randrange(1, 16), rng.randrange(1, 16)
    name, other = rng.choice(b"abcdefgh").to_bytes(), rng.choice(b"abcdefgh").to_bytes()
    return rng.choice(
        (
            m.Twalk(tag, 0, new, (name,)),
            m.Twalk(tag, 0, new, ()),
            m.Twalk(tag, fid, fid, (name,)),
            m.Twalk(tag, fid, new, (name,)),
            m.Tmkdir(tag, fid, name, 0o755, 0),
            m.Trenameat(tag, fid, name, new, other),
            m.Tlopen(tag, fid, rng.choice((0, 2, 0x200))),
            m.Tlcreate(tag, fid, name, 2, 0o600, 0),
            m.Tclunk(tag, fid),
            m.Twrite(tag, fid, rng.randrange(100), b"x" * 100),
            m.Tread(tag, fid, 0, 8192),
            m.Treaddir(tag, fid, 0, 8192),
            m.Tgetattr(tag, fid, 0x7FF),
            m.Tunlinkat(tag, 0, name, rng.choice((0, 0x200))),
            m.Trenameat(tag, 0, name, 0, other),
            m.Tmkdir(tag, 0, name, 0o755, 0),
            m.Tsymlink(tag, 0, name, b"../secret", 0),
            m.Tremove(tag, fid),
            m.Txattrwalk(tag, fid, new, b""),
            m.Tlock(tag, fid, rng.randrange(3), 0, 0, rng.randrange(3), 1, b"x"),
            m.Trename(tag, fid, 0, name),
            m.Tlink(tag, 0, fid, name),
            m.Treadlink(tag, fid),
        )
    )


def heap(client: Client, rng: random.Random, count: int) -> None:
    """Dozens of requests at once: each is answered, or taken away by a Tflush, whose answer comes last."""
    unanswered: set[int] = set()
    for _ in range(count):
        tag = rng.choice([tag for tag in range(100, 160) if tag not in unanswered])
        client.send(some_request(rng, tag))
        unanswered.add(tag)
        if rng.random() < 0.1:
            client.send(m.Tflush(1, old := rng.choice(sorted(unanswered))))
            while not isinstance(reply := client.receive(), m.Rflush):
                unanswered.remove(reply.tag)
            unanswered.discard(old)
        while len(unanswered) > 40:
            unanswered.remove(client.receive().tag)
    while unanswered:
        unanswered.remove(client.receive().tag)


@pytest.mark.parametrize("seed", range(4))
def test_requests_in_a_heap(attacked: Site, seed: int) -> None:
    client = attacked.client(msize=8192)
    heap(client, random.Random(seed), 2000)
    client.close()


@pytest.mark.parametrize("owner", OWNERS)
def test_clients_in_a_heap_with_few_descriptors(export: Path, owner: str) -> None:
    """Files lose their descriptors and names all the time, under the hands of others; in the end nothing is held for anybody."""
    with site(export, owner, limits=Limits(descriptors=32)) as place, ThreadPoolExecutor(3) as pool:
        share = place.server.share
        share.nodes._max_held = 3
        clients = [place.client(uid, msize=8192) for uid in range(3)]
        list(pool.map(lambda number: heap(clients[number], random.Random(number), 1500), range(3)))
        assert share.nodes.evicted > 100
        for client in clients:
            client.close()
        eventually(lambda: place.server.connections == 0)
        assert (share.opened.used, len(share.locks), len(share.nodes), share.nodes.descriptors) == (0, 0, 1, 1)
    opened = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(export))]


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"\0\0\0\0", id="no octets at all"),
        pytest.param(b"\x06\0\0\0dAB", id="shorter than a header"),
        pytest.param(b"\xff\xff\xff\xffdAB", id="4 GiB"),
        pytest.param(b"GET / HTTP/1.0\r\n\r\n", id="another protocol"),
    ],
)
def test_a_size_that_cannot_be_believed_ends_the_connection(attacked: Site, octets: bytes) -> None:
    assert exchange(attacked, octets) == b""


def test_before_a_version_nothing_is_served(attacked: Site) -> None:
    client = attacked.client(attach=False)
    refused(errno.EPROTO, client.attach, 0, 0)
    refused(errno.EINVAL, client.call, m.Tversion(m.NOTAG, 4095, b"9P2000.L"), m.Rversion)
    for version in (b"9P2000", b"9P2000.u", b"", b"9P2000.L "):
        assert client.call(m.Tversion(m.NOTAG, 8192, version), m.Rversion).version == b"unknown"
        refused(errno.EPROTO, client.attach, 0, 0)
    assert client.call(m.Tversion(m.NOTAG, 1 << 31, b"9P2000.L"), m.Rversion).msize == 512 << 10
    client.attach(0, 0)


def test_who_must_not_attach(attacked: Site) -> None:
    client = attacked.client()
    refused(errno.EOPNOTSUPP, client.call, m.Tauth(1, 5, b"", b"", 0), m.Done)
    refused(errno.EOPNOTSUPP, client.call, m.Tattach(1, 5, 0, b"", b"", 0), m.Rattach)
    refused(errno.EBADF, client.attach, 0, 0)


def test_a_message_longer_than_was_agreed_on(attacked: Site) -> None:
    client = attacked.client(msize=4096)
    fid = client.create("long")
    assert len(client.read(fid, 0, 1 << 20)) == 0
    client.write(fid, b"x" * (4096 - 23))
    client.write(fid, b"x" * 100, 4000)
    assert len(client.read(fid, 0, 1 << 20)) == 4096 - 11
    client.send(m.Twrite(1, fid, 0, b"x" * (4096 - 22)))
    with pytest.raises((EOFError, ConnectionResetError)):
        client.receive()


def test_tversion_again_forgets_everything(attacked: Site) -> None:
    client = attacked.client()
    client.create("again")
    assert client.call(m.Tversion(m.NOTAG, 8192, b"9P2000.L"), m.Rversion).msize == 8192
    refused(errno.EBADF, client.getattr, 0)
    assert attacked.server.share.opened.used == 0
    client.attach(0, 0)
    assert client.load("again") == b""
    assert Path(attacked.export / "again").exists() and os.listdir(attacked.export)


def test_a_deep_tree(attacked: Site) -> None:
    client = attacked.client()
    at = client.walk()
    for _ in range(50):
        client.mkdir("deep", begin=at)
        client.call(m.Twalk(1, at, at, (b"deep",)), m.Rwalk)
    client.store("bottom", b"here", begin=at)
    assert client.load(*["deep"] * 50, "bottom") == b"here"
