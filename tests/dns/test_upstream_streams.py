"""Asking servers over TCP: one connection for many questions, and what happens when it ends (Q02; RFC 7766; spec vpnkit 4.4)."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from dns import codec, stream_asker
from dns.server import Server
from dns.servers import Resolvers, Upstream
from dns.servers import Server as Known
from dns.stream_asker import StreamAsker
from dns.upstream import random_ids
from netstack.errors import HostError
from tests.dns.support import a_reply, framed, free_port, parse, query, read_framed


class Resolver:
    """A resolver that speaks TCP only."""

    def __init__(self) -> None:
        self.connections = 0
        self.asked: list[bytes] = []
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.upstream = Upstream("127.0.0.1")


Converse = Callable[[Resolver, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def resolver(converse: Converse) -> AsyncIterator[Resolver]:
    made = Resolver()
    tasks: list[asyncio.Task[None]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        made.begun.set()
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        try:
            with contextlib.suppress(EOFError, OSError, asyncio.CancelledError):
                await converse(made, reader, writer)
        finally:
            made.ended.set()
            writer.transport.abort() if task.cancelling() else writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    made.upstream = Upstream("127.0.0.1", listener.sockets[0].getsockname()[1])
    try:
        yield made
    finally:
        listener.close()
        await listener.wait_closed()
        await asyncio.sleep(0.01)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # transports close in the loop's next turn


async def one_after_the_other(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """As dnsmasq; a name with `slow` in it takes long."""
    while True:
        message = await read_framed(reader)
        made.asked.append(message)
        if b"slow" in message:
            await asyncio.sleep(3)
        writer.write(framed(a_reply(message, "10.0.0.1")))


async def backwards(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answers fifty questions in the opposite order."""
    while True:
        messages = [await read_framed(reader) for _ in range(50)]
        made.asked += messages
        for message in reversed(messages):
            writer.write(framed(a_reply(message, "10.0.0.1")))


async def look_up(asker: StreamAsker, name: str, query_id: int = 7) -> bytes:
    message = query(name, query_id=query_id)
    async with asyncio.timeout(10):
        return await asker.ask(message, codec.question_end(message))


async def test_five_times_a_thousand_questions_have_each_their_own_answer() -> None:  # vpnkit TCP multiplexing
    async with resolver(one_after_the_other) as made:
        asker = StreamAsker(made.upstream, random_ids())

        async def ask(thread: int) -> None:
            for n in range(1000):
                answer = parse(await look_up(asker, f"n{n}.t{thread}.example", query_id=n))
                assert (answer.header.id, str(answer.q.qname)) == (n, f"n{n}.t{thread}.example.")

        await asyncio.gather(*map(ask, range(5)))
        assert (made.connections, asker.connections) == (1, 1)
        assert len({message[:2] for message in made.asked}) > 1000, "ids that nobody can guess"
        asker.close()


async def test_answers_may_come_in_any_order() -> None:
    async with resolver(backwards) as made:
        asker = StreamAsker(made.upstream, random_ids())
        answers = await asyncio.gather(*(look_up(asker, f"n{n}.example", n) for n in range(100)))
        assert [str(parse(answer).q.qname) for answer in answers] == [f"n{n}.example." for n in range(100)]
        assert made.connections == 1
        asker.close()


async def test_a_guests_queries_over_tcp_share_one_connection() -> None:
    async with resolver(one_after_the_other) as made:
        resolvers = Resolvers(servers=(Known(made.upstream),))
        server = Server(hosts_path=None, source=lambda: resolvers)
        for n in range(20):
            message = query(f"n{n}.example")
            answer, by = await server._forwarder.ask_stream(message, codec.question_end(message))
            assert parse(answer).rr and by == str(made.upstream)
        assert made.connections == 1
        server.close()
        async with asyncio.timeout(5):
            await made.ended.wait()


async def test_an_idle_connection_is_closed_and_another_one_made() -> None:
    async with resolver(one_after_the_other) as made:
        asker = StreamAsker(made.upstream, random_ids(), idle_s=0.1)
        await look_up(asker, "a.example")
        async with asyncio.timeout(5):
            await made.ended.wait()
        await look_up(asker, "b.example")
        assert made.connections == 2
        asker.close()


async def test_a_server_that_closes_after_each_answer_is_asked_again() -> None:
    async def once(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(framed(a_reply(await read_framed(reader), "10.0.0.1")))

    async with resolver(once) as made:
        asker = StreamAsker(made.upstream, random_ids())
        answers = await asyncio.gather(*(look_up(asker, f"n{n}.example", n) for n in range(20)))
        assert [str(parse(answer).q.qname) for answer in answers] == [f"n{n}.example." for n in range(20)]
        assert made.connections >= 20
        asker.close()


async def test_a_server_that_closed_while_nothing_was_asked_is_asked_again() -> None:
    async with resolver(one_after_the_other) as made:
        asker = StreamAsker(made.upstream, random_ids())
        await look_up(asker, "a.example")
        asker._open[0]._transport.abort()  # type: ignore[union-attr]
        assert parse(await look_up(asker, "b.example")).rr
        assert made.connections == 2
        asker.close()


async def test_a_server_that_hangs_up_without_an_answer_is_an_error() -> None:
    async def rude(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_framed(reader)

    async with resolver(rude) as made:
        asker = StreamAsker(made.upstream, random_ids())
        with pytest.raises(HostError, match="closed"):
            await look_up(asker, "a.example")
        assert made.connections == 1
        asker.close()


async def test_a_closed_port_is_an_error() -> None:
    asker = StreamAsker(Upstream("127.0.0.1", free_port()), random_ids())
    with pytest.raises(HostError, match="refused"):
        await look_up(asker, "a.example")
    asker.close()


async def test_a_slow_name_does_not_hold_up_those_behind_it_at_a_server_that_takes_turns() -> None:
    async with resolver(one_after_the_other) as made:
        asker = StreamAsker(made.upstream, random_ids())
        slow = asyncio.ensure_future(look_up(asker, "slow.example"))
        await asyncio.sleep(0)
        quick = [asyncio.ensure_future(look_up(asker, f"quick{n}.example")) for n in range(10)]
        await asyncio.gather(*quick)
        assert not slow.done()
        assert made.connections == 2
        assert parse(await slow).rr
        asker.close()


async def test_slow_names_open_no_more_connections_than_allowed() -> None:
    async with resolver(one_after_the_other) as made:
        asker = StreamAsker(made.upstream, random_ids())
        slow = [asyncio.ensure_future(look_up(asker, f"slow{n}.example")) for n in range(12)]
        await asyncio.sleep(2.5)
        assert made.connections == stream_asker.MAX_CONNECTIONS
        asker.close()
        ended = await asyncio.gather(*slow, return_exceptions=True)
        assert all(isinstance(one, HostError) for one in ended)


@pytest.mark.parametrize(
    "forge",
    [
        lambda good: bytes([good[0] ^ 0x55]) + good[1:],
        lambda good: good.replace(b"bank", b"bonk"),
        lambda good: good[:2] + bytes([good[2] & 0x7F]) + good[3:],
        lambda good: good[:11],
        lambda good: b"",
    ],
    ids=["id", "question", "query", "short", "empty"],
)
async def test_what_is_no_answer_to_the_question_is_passed_over(forge: Callable[[bytes], bytes]) -> None:  # N1
    async def lying(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        good = a_reply(await read_framed(reader), "6.6.6.6")
        writer.write(framed(forge(good)) + framed(a_reply(good, "10.0.0.1")))
        await reader.read()

    async with resolver(lying) as made:
        asker = StreamAsker(made.upstream, random_ids())
        assert str(parse(await look_up(asker, "bank.example")).rr[0].rdata) == "10.0.0.1"
        asker.close()


async def test_a_server_that_reads_nothing_is_not_asked_without_end(monkeypatch: pytest.MonkeyPatch) -> None:  # N2
    monkeypatch.setattr(stream_asker, "STALL_S", 60.0)  # else the last ones may go to a second connection

    async def deaf(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await made.ended.wait()

    async with resolver(deaf) as made:
        asker = StreamAsker(made.upstream, random_ids())
        waiting = [asyncio.ensure_future(look_up(asker, f"n{n}.example")) for n in range(stream_asker.MAX_IN_FLIGHT)]
        await made.begun.wait()
        with pytest.raises(HostError, match="behind"):
            await look_up(asker, "one.more.example")
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        asker.close()
        made.ended.set()


async def test_a_connection_that_leads_nowhere_any_more_is_left_with_the_first_question_that_times_out() -> None:
    dead = asyncio.Event()

    async def goes_silent(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = made.connections == 1
        while True:
            message = await read_framed(reader)
            if not (first and dead.is_set()):
                writer.write(framed(a_reply(message, "10.0.0.1")))

    async with resolver(goes_silent) as made:
        asker = StreamAsker(made.upstream, random_ids())
        await look_up(asker, "a.example")
        dead.set()
        message = query("b.example")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asker.ask(message, codec.question_end(message))
        assert parse(await look_up(asker, "c.example")).rr
        assert made.connections == 2
        asker.close()


async def test_a_change_of_the_network_asks_again_over_another_connection() -> None:  # F11
    async def mute_at_first(made: Resolver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = made.connections == 1
        while True:
            message = await read_framed(reader)
            made.asked.append(message)
            made.begun.set()
            if not first:
                writer.write(framed(a_reply(message, "10.0.0.1")))

    async with resolver(mute_at_first) as made:
        resolvers = Resolvers(servers=(Known(made.upstream),))
        server = Server(hosts_path=None, source=lambda: resolvers)
        message = query("a.example")
        answer = asyncio.ensure_future(server._forwarder.ask_stream(message, codec.question_end(message)))
        await made.begun.wait()
        server.network_changed()
        async with asyncio.timeout(3):
            assert parse((await answer)[0]).rr
        assert made.connections == 2
        server.close()


async def test_close_while_connecting_and_asking_leaves_nothing_behind() -> None:
    async with resolver(one_after_the_other) as made:
        first = StreamAsker(made.upstream, random_ids())
        await look_up(first, "a.example")  # a loop has descriptors of its own from then on
        first.close()
        await asyncio.sleep(0.05)
        before = len(os.listdir("/dev/fd"))
        for _ in range(5):
            asker = StreamAsker(made.upstream, random_ids())
            waiting = [asyncio.ensure_future(look_up(asker, f"n{n}.example")) for n in range(5)]
            await asyncio.sleep(0)
            asker.close()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(one, HostError) for one in ended)
        for _ in range(100):
            if len(os.listdir("/dev/fd")) <= before:
                break
            await asyncio.sleep(0.05)
        assert len(os.listdir("/dev/fd")) <= before


UVLOOP = [
    test_five_times_a_thousand_questions_have_each_their_own_answer,
    test_a_server_that_closes_after_each_answer_is_asked_again,
    test_a_server_that_closed_while_nothing_was_asked_is_asked_again,
    test_a_server_that_hangs_up_without_an_answer_is_an_error,
    test_a_closed_port_is_an_error,
    test_an_idle_connection_is_closed_and_another_one_made,
    test_close_while_connecting_and_asking_leaves_nothing_behind,
]


@pytest.mark.parametrize("scenario", UVLOOP, ids=lambda scenario: scenario.__name__)
def test_the_same_holds_in_uvloop(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """It differs in what it makes of sockets and transports, and it is what the daemon runs in."""
    uvloop = pytest.importorskip("uvloop", reason="expected: no uvloop on this system")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())
