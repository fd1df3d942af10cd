"""Streams through the multiplexer as clients and servers see them (spec vpnkit 9.1 Mux, 9.3 mux; threats L3)."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
import time

import pytest

from portfwd.carriers import Destination
from portfwd.mux.channel import Channel, Ending
from portfwd.mux.engine import HIGH_WATER, Limits
from portfwd.mux.frames import HANDSHAKE, Close, Data, Decoder, Open, Shutdown, Window
from portfwd.mux.session import Session
from tests.portfwd.mux.ends import TARGET, Near, near, sessions, until
from tests.portfwd.mux.pair import said

CORNERS = [0, 1, 4, 4095, 4096, 4097, 4098, 4099, 5000, 5001, 5002, 1048575, 1048576, 1048577]
PATTERN = random.Random(7).randbytes(1048577)


async def say(one: Near, octets: bytes) -> None:
    await one.send(octets)
    one.shut()


@pytest.mark.parametrize("generation", [2, 3])
async def test_all_pairs_of_sizes_with_half_close(generation: int) -> None:
    """14 x 14 pairs of lengths, each way, one way ended before the other is."""
    async with sessions(generation) as ends:
        for there in CORNERS:
            for back in CORNERS:
                client, server = await ends.both()
                question, answer = PATTERN[:there], PATTERN[-back:] if back else b""
                _, received = await asyncio.gather(say(client, question), server.all())
                assert received == question
                _, received = await asyncio.gather(say(server, answer), client.all())
                assert received == answer
                await until(lambda: not ends.channels)
                assert client.ends == server.ends == ["closed"]
                client.sock.close()
                server.sock.close()


async def test_two_thousand_channels_ten_rounds_each() -> None:
    """Random octets, at most 8 KiB, each way and round; lengths and SHA-256 of all compared."""
    async with sessions() as ends:
        rng = random.Random(3)
        pairs = [(ends.client(), ends.last) for _ in range(2000)]
        await until(lambda: len(ends.served) == 2000)
        said_up = [hashlib.sha256() for _ in pairs]
        heard_up = [hashlib.sha256() for _ in pairs]
        said_down = [hashlib.sha256() for _ in pairs]
        heard_down = [hashlib.sha256() for _ in pairs]
        for _ in range(10):
            up = [PATTERN[(at := rng.randrange(1_000_000)) : at + rng.randrange(8193)] for _ in pairs]
            down = [PATTERN[(at := rng.randrange(1_000_000)) : at + rng.randrange(8193)] for _ in pairs]
            for (client, id), question, answer in zip(pairs, up, down, strict=True):
                client.sock.send(question) if question else None
                server = ends.served[id]
                server.sock.send(answer) if answer else None
            for at, (client, id) in enumerate(pairs):
                said_up[at].update(up[at])
                said_down[at].update(down[at])
                heard_up[at].update(await ends.served[id].some(len(up[at])))
                heard_down[at].update(await client.some(len(down[at])))
        for client, id in pairs:
            client.shut()
            ends.served[id].shut()
        await until(lambda: not ends.channels)
        for said_, heard in ((said_up, heard_up), (said_down, heard_down)):
            assert [one.digest() for one in said_] == [one.digest() for one in heard]


async def test_five_hundred_channels_of_128_kib_at_once() -> None:
    async with sessions(limits=Limits(window=65535)) as ends:
        clients = [(ends.client(), ends.last, random.Random(at).randbytes(1 << 17)) for at in range(500)]
        await until(lambda: len(ends.served) == 500)

        async def check(client: Near, id: int, octets: bytes) -> None:
            _, there = await asyncio.gather(say(client, octets), ends.served[id].all())
            _, back = await asyncio.gather(say(ends.served[id], octets[::-1]), client.all())
            expected = hashlib.sha256(octets).digest(), hashlib.sha256(octets[::-1]).digest()
            assert (hashlib.sha256(there).digest(), hashlib.sha256(back).digest()) == expected

        await asyncio.gather(*(check(*one) for one in clients))
        await until(lambda: not ends.channels)


async def test_both_sides_open_twenty_at_once() -> None:
    async with sessions() as ends:
        opened = [(ends.client(side), ends.last) for _ in range(20) for side in (ends.host, ends.vm)]
        await until(lambda: len(ends.served) == 40)

        async def check(client: Near, id: int) -> None:
            await say(client, b"%d" % id)
            assert await ends.served[id].all() == b"%d" % id

        await asyncio.gather(*(check(client, id) for client, id in opened))


async def test_a_client_that_does_not_read_stops_its_server_and_nobody_else() -> None:
    async with sessions() as ends:
        (slow, flood), (client, server) = await ends.both(), await ends.both()
        sent = 0

        for _ in range(10_000):
            try:
                sent += flood.sock.send(PATTERN)
            except BlockingIOError:
                before = sent
                await asyncio.sleep(0.02)
                try:
                    sent += flood.sock.send(PATTERN)
                except BlockingIOError:
                    break
                assert sent > before
        else:
            pytest.fail("a server that nobody reads was never stopped")
        assert sent < 8 << 20, "the window and the kernel's buffers"
        _, received = await asyncio.gather(say(server, PATTERN), client.all())
        assert received == PATTERN
        flood.shut()
        assert len(await slow.all()) == sent


async def test_a_refused_channel_resets_its_client_and_no_other() -> None:
    async with sessions(tcp=True, serve=False) as ends:
        refused, kept = ends.client(), ends.client()
        await until(lambda: len(ends.asked) == 2)
        ends.asked[0][1].close()
        with pytest.raises(ConnectionResetError):
            await refused.all()
        assert refused.ends == ["refused"] and kept.ends == []
        server = near(ends.asked[1][1])
        ends.nears.append(server)
        await say(server, b"welcome")
        assert await kept.all() == b"welcome"


async def test_a_server_that_closes_at_once_is_no_refusal() -> None:
    async with sessions(tcp=True) as ends:
        client, server = await ends.both()
        server.shut()
        assert await client.all() == b""
        client.shut()
        await until(lambda: client.ends == ["closed"])


class Mute:
    """Who says something and keeps what it hears."""

    def __init__(self) -> None:
        self.heard = b""
        self.told: list[str] = []

    def data(self, octets: memoryview) -> None:
        self.heard += octets

    def ended(self) -> None:
        self.told.append("ended")

    def closed(self, why: Ending) -> None:
        self.told.append(why.value)

    def room(self) -> None: ...


@pytest.mark.parametrize(
    ("frames", "heard", "told"),
    [
        (said(Data(1, 2), b"ab", Shutdown(1)), b"ab", ["ended"]),
        (said(Data(1, 2), b"ab", Close(1)), b"ab", ["ended", "closed"]),
        (said(Close(1)), b"", ["refused"]),
        (said(Data(1, 200), bytes(200)), b"", ["overrun"]),
        (said(Data(1, 2), b"ab") + b"\7\0\x63\0\0\0\0", b"ab", ["lost"]),
    ],
    ids=["shutdown", "close", "refused", "overrun", "lost"],
)
async def test_who_attaches_late_is_told_what_happened(frames: bytes, heard: bytes, told: list[str]) -> None:
    ours, theirs = socket.socketpair()
    opened: list[Channel] = []
    session = Session(ours, generation=2, on_open=lambda _, channel: opened.append(channel), limits=Limits(overrun=100))
    with theirs:
        theirs.send(said(Open(1, TARGET)) + frames)
        await until(lambda: bool(opened))
        await asyncio.sleep(0.01)
        mute = Mute()
        opened[0].attach(mute)
        assert mute.told == []
        await asyncio.sleep(0.01)
        assert (mute.heard, mute.told) == (heard, told)
        session.close()


@pytest.mark.parametrize("dies", [False, True], ids=["", "the connection dies"])
async def test_what_was_sent_before_a_close_arrives_however_slowly_it_is_read(dies: bool) -> None:
    async with sessions(serve=False) as ends:
        client = ends.client()
        await until(lambda: bool(ends.asked))
        channel = ends.asked[0][1]
        channel.attach(Mute())
        sent = 0
        while not client.splice._pending:
            if limit := channel.sendable():
                channel.send(memoryview(PATTERN)[sent : sent + min(limit, 4096)])
                sent += min(limit, 4096)
            await asyncio.sleep(0)
        channel.close()
        await until(lambda: client.splice._channel_over)
        assert client.ends == []
        if dies:
            ends.vm.close()
            await ends.host.wait_closed()
        assert await client.all() == PATTERN[:sent]
        await until(lambda: client.ends == ["closed"] and (dies or not ends.channels))


async def test_a_client_that_resets_ends_the_channel() -> None:
    async with sessions(tcp=True) as ends:
        client, server = await ends.both()
        await client.send(b"half a quest")
        assert await server.some(12) == b"half a quest"
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.sock.close()
        assert await server.all() == b""
        await until(lambda: not ends.channels)
        assert client.ends == ["reset"]


async def test_writing_while_the_other_side_closes_harms_nobody() -> None:
    async with sessions() as ends:
        client, server = await ends.both()
        await client.send(PATTERN[:200_000])
        server.sock.close()
        with pytest.raises(ConnectionError):
            while True:
                await client.send(PATTERN[:10_000])
        await until(lambda: not ends.channels)
        other, there = await ends.both()
        await say(other, b"alive")
        assert await there.all() == b"alive"


@pytest.mark.parametrize("how", ["close", "nonsense"])
async def test_when_the_connection_dies_all_clients_are_reset(how: str) -> None:
    async with sessions(tcp=True) as ends:
        clients = [(await ends.both())[0] for _ in range(5)]
        await clients[0].send(b"never answered")
        if how == "close":
            ends.vm.close()
        else:
            ends.vm._mux._push(b"\7\0\x63\0\0\0\0")
            ends.vm._flush()
        for client in clients:
            with pytest.raises(ConnectionResetError):
                await client.all()
            assert client.ends == ["lost"]
        reason = await ends.host.wait_closed()
        assert reason == ("" if how == "close" else "mux: unknown command 99")


async def test_a_probe_that_connects_and_leaves_is_no_event() -> None:
    ours, theirs = socket.socketpair()
    ends: list[str] = []
    session = Session(ours, on_end=ends.append)
    theirs.close()
    assert await session.wait_closed() == "" and ends == [""]


@pytest.mark.parametrize(
    ("octets", "reason"),
    [
        (HANDSHAKE[:20], "mux: the connection ended within a frame"),
        (HANDSHAKE + b"\7\0", "mux: the connection ended within a frame"),
        (HANDSHAKE + said(Data(1, 5)), "mux: the connection ended within a frame"),
        (
            b"GET / HTTP/1.0\r\n\r\n",
            "mux: the peer does not greet as generation 3; set generation=1 or 2 for older ones",
        ),
    ],
    ids=["handshake", "header", "payload", "http"],
)
async def test_an_end_in_the_middle_says_so(octets: bytes, reason: str) -> None:
    ours, theirs = socket.socketpair()
    session = Session(ours)
    with theirs:
        theirs.send(octets)
        theirs.shutdown(socket.SHUT_WR)
        assert await session.wait_closed() == reason


async def test_who_serves_nothing_refuses_every_open() -> None:
    ours, theirs = socket.socketpair()
    session = Session(ours, generation=2)
    with theirs:
        theirs.setblocking(False)
        theirs.send(said(Open(1, TARGET), Window(1, 65536)))
        assert await asyncio.get_running_loop().sock_recv(theirs, 100) == said(Close(1))
        session.close()


async def test_a_handler_that_fails_ends_its_channel_alone(caplog: pytest.LogCaptureFixture) -> None:
    def opened(destination: Destination, _channel: object) -> None:
        if destination.port == 1:
            raise RuntimeError("no such thing")

    ours, theirs = socket.socketpair()
    session = Session(ours, generation=2, on_open=opened)
    with theirs:
        theirs.setblocking(False)
        theirs.send(said(Open(1, Destination("tcp", b"abcd", 1)), Open(2, TARGET)))
        assert await asyncio.get_running_loop().sock_recv(theirs, 100) == said(Close(1))
        assert session.status()["channels"] == 2, "one waits for the peer's Close"
        session.close()
    assert "no such thing" in caplog.text


@pytest.mark.parametrize("high", [HIGH_WATER, 1 << 20])
async def test_data_for_a_peer_that_does_not_read_stays_in_the_host_sockets(
    high: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is queued is bounded; when the peer reads again all of it arrives, each octet in its channel."""
    monkeypatch.setattr("portfwd.mux.engine.HIGH_WATER", high)
    ours, theirs = socket.socketpair()
    session = Session(ours, generation=2)
    with theirs:
        theirs.setblocking(False)
        clients = [near(session.open(TARGET)) for _ in range(50)]
        await until(lambda: session.octets_out > 0)
        ids = list(session._mux.flows)
        theirs.send(said(*(Window(id, 1 << 40) for id in ids)))
        sent = [client.sock.send(PATTERN[at * 1000 :]) for at, client in enumerate(clients)]
        begin = time.monotonic()
        while time.monotonic() < begin + 0.2:
            await asyncio.sleep(0.01)
            assert session._mux.queued < high + 400_000
        received = {id: bytearray() for id in ids}
        decoder = Decoder()
        while sum(map(len, received.values())) < sum(sent):
            async with asyncio.timeout(10):
                part = await asyncio.get_running_loop().sock_recv(theirs, 1 << 16)
            for _, id, _, more in decoder.feed(memoryview(part)):
                if isinstance(more, memoryview):
                    received[id] += more
        for at, id in enumerate(ids):
            assert received[id] == PATTERN[at * 1000 : at * 1000 + sent[at]]
        session.close()
        for client in clients:
            client.sock.close()


async def test_a_preface_goes_first_even_in_a_narrow_window() -> None:
    async with sessions(limits=Limits(window=10)) as ends:
        client = ends.client(preface=b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n")
        id = ends.last
        await until(lambda: id in ends.served)
        assert await ends.served[id].some(33) == b"PROXY TCP4 1.2.3.4 5.6.7.8 9 10\r\n"
        await say(client, b"then this")
        assert await ends.served[id].all() == b"then this"
