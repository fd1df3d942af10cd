"""DNS over TCP: framing, pipelining, order, bounds (Q02, G23)."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from dns import codec
from dns import server as dns_server
from dns.server import Server
from tests.dns.support import a_reply, code_reply, framed, free_port, parse, query, read_framed, shell

ALIAS = bytes([192, 168, 65, 2])
CLOSED = f"127.0.0.1#{free_port()}"


@contextlib.asynccontextmanager
async def tcp_upstream(answer: Callable[[bytes], Awaitable[bytes]]) -> AsyncIterator[str]:
    """A resolver that speaks TCP only and closes after one answer."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(EOFError, OSError):
            reply = framed(await answer(await read_framed(reader)))
            for piece in (reply[:1], reply[1:5], reply[5:40], reply[40:]):
                writer.write(piece)
                await asyncio.sleep(0)
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1#{listener.sockets[0].getsockname()[1]}"
    finally:
        listener.close()
        await listener.wait_closed()
        await asyncio.sleep(0.01)


async def good(asked: bytes) -> bytes:
    return a_reply(asked, "10.0.0.1")


def make(*upstreams: str, idle_s: float = 30.0) -> Server:
    return Server(
        names={"host.internal": [ALIAS]}, hosts_path=None, resolv_conf=None, upstreams=upstreams, idle_s=idle_s
    )


async def every(seconds: float, server: Server) -> AsyncIterator[dict[str, int]]:
    while True:
        yield server.counters
        await asyncio.sleep(seconds)


@contextlib.asynccontextmanager
async def connected(server: Server) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    async with shell(server) as port, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            yield reader, writer
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def test_a_query_split_into_single_octets_is_answered() -> None:  # Q02
    async with tcp_upstream(good) as spec, connected(make(spec)) as (reader, writer):
        for octet in framed(query("a.example", query_id=77)):
            writer.write(bytes([octet]))
            await asyncio.sleep(0.001)
        answer = parse(await read_framed(reader))
        assert (answer.header.id, str(answer.rr[0].rdata)) == (77, "10.0.0.1")


async def test_a_thousand_pipelined_queries_have_each_their_own_answer() -> None:  # Q02; vpnkit TCP multiplexing
    async with tcp_upstream(good) as spec, connected(make(spec)) as (reader, writer):
        for n in range(1000):
            writer.write(framed(query(f"n{n}.example", query_id=n)))
        got = {}
        for _ in range(1000):
            answer = parse(await read_framed(reader))
            got[answer.header.id] = str(answer.q.qname)
        assert got == {n: f"n{n}.example." for n in range(1000)}


async def test_a_slow_name_does_not_hold_up_the_others() -> None:  # Q02
    release = asyncio.Event()

    async def answer(asked: bytes) -> bytes:
        if b"slow" in asked:
            await release.wait()
        return a_reply(asked, "10.0.0.1")

    async with tcp_upstream(answer) as spec, connected(make(spec)) as (reader, writer):
        writer.write(framed(query("slow.example", query_id=1)) + framed(query("quick.example", query_id=2)))
        writer.write(framed(query("host.internal", query_id=3)))
        first = {parse(await read_framed(reader)).header.id for _ in range(2)}
        assert first == {2, 3}
        release.set()
        assert parse(await read_framed(reader)).header.id == 1


async def test_a_guest_that_has_closed_its_side_gets_its_last_answers() -> None:
    async with tcp_upstream(good) as spec, connected(make(spec)) as (reader, writer):
        writer.write(framed(query("a.example")) + framed(query("host.internal")) + b"\0")
        writer.write_eof()
        answers = [await read_framed(reader), await read_framed(reader)]
        assert sorted(str(parse(answer).rr[0].rdata) for answer in answers) == ["10.0.0.1", "192.168.65.2"]
        assert await reader.read() == b""


async def test_answers_are_not_cut_to_a_datagram() -> None:
    async def big(asked: bytes) -> bytes:
        return a_reply(asked, *(f"10.{n >> 8}.{n & 255}.1" for n in range(1, 3500)))

    async with tcp_upstream(big) as spec, connected(make(spec)) as (reader, writer):
        writer.write(framed(query("a.example")))
        answer = parse(await read_framed(reader))
        assert (len(answer.rr), answer.header.tc) == (3499, 0)


async def test_the_next_server_answers_for_closed_silent_and_failing_ones() -> None:  # F12
    async def failing(asked: bytes) -> bytes:
        return code_reply(asked, codec.SERVFAIL)

    async def cut_off(asked: bytes) -> bytes:
        raise EOFError

    async with tcp_upstream(failing) as bad, tcp_upstream(cut_off) as rude, tcp_upstream(good) as last:
        async with connected(make(CLOSED, rude, bad, last)) as (reader, writer):
            writer.write(framed(query("a.example")))
            assert str(parse(await read_framed(reader)).rr[0].rdata) == "10.0.0.1"
        async with connected(make(CLOSED)) as (reader, writer):
            writer.write(framed(query("a.example")))
            assert parse(await read_framed(reader)).header.rcode == codec.SERVFAIL


async def test_an_answer_to_another_question_is_not_delivered() -> None:  # N1
    async def other(asked: bytes) -> bytes:
        return a_reply(asked.replace(b"bank", b"bonk"), "6.6.6.6")

    async with tcp_upstream(other) as spec, connected(make(spec)) as (reader, writer):
        writer.write(framed(query("bank.example")))
        assert parse(await read_framed(reader)).header.rcode == codec.SERVFAIL


async def test_malformed_queries_do_not_end_the_connection() -> None:  # Q05
    async with connected(make()) as (reader, writer):
        writer.write(framed(b"") + framed(b"\x12") + framed(a_reply(query("x.y"), "1.2.3.4")))
        writer.write(framed(bytes(12)) + framed(query("host.internal", query_id=5)))
        assert parse(await read_framed(reader)).header.rcode == codec.FORMERR
        answer = parse(await read_framed(reader))
        assert (answer.header.id, str(answer.rr[0].rdata)) == (5, "192.168.65.2")


async def test_no_resolver_is_servfail() -> None:
    async with connected(make()) as (reader, writer):
        writer.write(framed(query("a.example")))
        assert parse(await read_framed(reader)).header.rcode == codec.SERVFAIL


@pytest.mark.parametrize("begun", [b"", b"\0", struct.pack("!H", 65535) + b"dribble"])
async def test_a_connection_without_a_whole_query_is_closed(begun: bytes) -> None:  # G23
    async with connected(make(idle_s=0.1)) as (reader, writer):
        writer.write(begun)
        assert await reader.read() == b""


async def test_a_guest_that_reads_no_answers_is_not_read_from_for_ever() -> None:  # G23
    tail = a_reply(query("a.example"), *(f"10.{n >> 8}.{n & 255}.1" for n in range(1, 3500)))[2:]

    async def big(asked: bytes) -> bytes:
        return asked[:2] + tail

    async with tcp_upstream(big) as spec:
        server = make(spec, idle_s=0.3)
        async with shell(server) as port, asyncio.timeout(20):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            for _ in range(400):  # 22 MB of answers, more than all buffers on the way
                writer.write(framed(query("a.example")))
            async for counters in every(0.02, server):
                if counters["streams"] and not counters["open_streams"]:
                    break
            assert server.counters["queries_tcp"] < 400
            assert server.counters["in_flight"] == 0
            writer.transport.abort()


async def test_more_connections_than_allowed_are_closed_on_arrival(monkeypatch: pytest.MonkeyPatch) -> None:  # G23
    monkeypatch.setattr(dns_server, "MAX_STREAMS", 1)
    server = make()
    async with connected(server) as (reader, writer):
        writer.write(framed(query("host.internal")))
        await read_framed(reader)
        async with asyncio.timeout(5):
            port = writer.get_extra_info("peername")[1]
            second_reader, second_writer = await asyncio.open_connection("127.0.0.1", port)
            assert await second_reader.read() == b""
            second_writer.close()
        assert server.counters["streams_refused"] == 1


async def test_close_ends_open_connections() -> None:
    server = make()
    async with connected(server) as (reader, writer):
        writer.write(framed(query("host.internal")))
        await read_framed(reader)
        server.close()
        assert await reader.read() == b""
