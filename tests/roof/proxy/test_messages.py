"""Requests and answers as they pass through: bodies, interim answers, switching, connections that are kept (RFC 9110, 9112)."""

from __future__ import annotations

import asyncio
import io
import socket

import aiohttp
import pytest
from aiohttp import web

from netstack.api import Endpoint
from pyvpnkit.proxy.service import HttpProxy
from tests.roof.proxy.house import House, Make, Script, Servers, echo, head_of

MB = 1 << 20


@pytest.fixture
def named(house: House) -> House:
    """`s.test` is the server's name."""
    house.names["s.test"] = ["127.0.0.1"]
    return house


def scripted(*answers: bytes, seen: list[bytes] | None = None) -> Script:
    """Answers each head in turn, on one connection after another, and ends the connection after `b""`."""
    left = list(answers)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left:
            head = await reader.readuntil(b"\r\n\r\n")
            if seen is not None:
                seen.append(head)
            answer = left.pop(0)
            if not answer:
                return
            writer.write(answer)
            await writer.drain()
        await reader.read()

    return script


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def test_a_chunked_request_and_its_trailers(named: House, proxy: Make, server: Servers) -> None:
    got: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.append(await reader.readuntil(b"0\r\nX-Sum: 7\r\n\r\n"))
        writer.write(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-End\r\n\r\n2\r\nok\r\n0\r\nX-End: 1\r\n\r\n"
        )
        await writer.drain()

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(
        f"POST http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\nTransfer-Encoding: chunked\r\nTE: trailers\r\nConnection: TE\r\n\r\n"
        "5;ext=1\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 7\r\n\r\n"
    )
    answer = await guest.until(b"X-End: 1\r\n\r\n")
    assert b"Trailer: X-End\r\n" in answer
    head, _, body = got[0].partition(b"\r\n\r\n")
    assert head_of(head)[1]["te"] == ["trailers"] and head_of(head)[1]["connection"] == ["TE"]
    assert body == b"5\r\nhello\r\n1\r\n!\r\n0\r\nX-Sum: 7\r\n\r\n"


async def test_a_chunked_answer_for_a_client_of_1_0(named: House, proxy: Make, server: Servers) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-End: 1\r\n\r\n"
    port = await server(scripted(answer))
    proxy({})
    guest = named.connect()
    await guest.send(f"GET http://s.test:{port}/ HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    head, _, body = (await guest.rest()).partition(b"\r\n\r\n")
    assert body == b"ok" and b"chunked" not in head and b"close" in head


async def test_100_continue_crosses_and_the_body_waits_for_it(named: House, proxy: Make, server: Servers) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert b"Expect: 100-continue" in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
        assert await reader.readexactly(4) == b"body"
        writer.write(OK)

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(
        f"PUT http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
    )
    assert (await guest.answer())[0] == 102
    assert (await guest.answer())[0] == 100
    await guest.send("body")
    assert (await guest.answer())[::2] == (200, b"ok")


async def test_an_answer_before_the_body_has_ended(named: House, proxy: Make, server: Servers) -> None:
    refusal = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\nno"
    port = await server(scripted(refusal))
    proxy({})
    guest = named.connect()
    await guest.send(f"PUT http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\nContent-Length: {100 * MB}\r\n\r\nabc")
    status, _, body = await guest.answer()
    assert (status, body) == (413, b"no")
    assert await guest.rest() == b"", "the rest of that body cannot be told from another request"


async def test_answers_without_bodies(named: House, proxy: Make, server: Servers) -> None:
    answers = [
        b"HTTP/1.1 204 No Content\r\n\r\n",
        b"HTTP/1.1 304 Not Modified\r\nContent-Length: 999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK,
    ]
    port = await server(scripted(*answers))
    proxy({})
    guest = named.connect()
    for method, expected in (("GET", 204), ("GET", 304), ("HEAD", 200), ("GET", 200)):
        assert (await guest.ask(f"{method} http://s.test:{port}/ HTTP/1.1", "Host: s"))[0] == expected


async def test_headers_of_one_hop_stay_on_it_and_the_rest_goes_on(named: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    hop = b"Connection: X-Mine, close\r\nX-Mine: 1\r\nKeep-Alive: 5\r\nProxy-Authenticate: Basic\r\nX-End: kept\r\n"
    port = await server(scripted(b"HTTP/1.1 200 OK\r\n" + hop + b"Content-Length: 0\r\n\r\n", seen=seen))
    proxy({})
    guest = named.connect()
    _, headers, _ = await guest.ask(
        f"GET http://s.test:{port}/ HTTP/1.1",
        "Host: s",
        "connection: keep-alive, x-hop, Host",
        "X-Hop: 1",
        "Proxy-Connection: keep-alive",
        "Keep-Alive: 9",
        "X-CaSe: kept",
        "Cookie: a",
        "Cookie: b",
    )
    assert headers == {"x-end": "kept", "content-length": "0"}
    assert (
        seen[0] == f"GET / HTTP/1.1\r\nHost: s.test:{port}\r\nX-CaSe: kept\r\nCookie: a\r\nCookie: b\r\n\r\n".encode()
    )
    assert (await guest.ask("GET / HTTP/1.1", "Host: nobody.test"))[0] == 503, "the guest's own connection goes on"


# Connections


async def test_a_connection_is_kept_for_the_next_request_to_the_same_server(
    named: House, proxy: Make, server: Servers
) -> None:
    seen: list[bytes] = []
    connections = 0
    answer = echo(seen)

    async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await answer(reader, writer)

    port, other = await server(counting), await server(counting)
    proxy({})
    guest = named.connect()
    for to in (port, port, port, other, port):
        assert (await guest.ask(f"GET http://s.test:{to}/ HTTP/1.1", "Host: s"))[0] == 200
    assert (len(seen), connections) == (5, 3)
    assert (await named.connect().ask(f"GET http://s.test:{port}/ HTTP/1.1", "Host: s"))[0] == 200
    assert connections == 4, "no guest connection has another's"


async def test_pipelined_requests_are_answered_in_order(named: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    port = await server(echo(seen))
    proxy({})
    guest = named.connect()
    await guest.send(
        "".join(
            f"POST http://s.test:{port}/{number} HTTP/1.1\r\nHost: s\r\nContent-Length: 1\r\n\r\n{number}"
            for number in range(9)
        )
    )
    assert [(await guest.answer())[2] for _ in range(9)] == [b"%d" % number for number in range(9)]


async def test_a_kept_connection_that_has_ended_is_replaced(named: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []
    port = await server(scripted(OK, b"", OK, b"", b"", OK, seen=seen))
    proxy({})
    guest = named.connect()
    line = f"GET http://s.test:{port}/ HTTP/1.1"
    assert (await guest.ask(line, "Host: s"))[0] == 200
    assert (await guest.ask(line, "Host: s"))[0] == 200, "sent again on a new one"
    assert (await guest.ask(line.replace("GET", "POST"), "Host: s"))[0] == 502, "may have been done already"


async def test_a_server_that_says_nothing_or_nonsense_is_a_502(named: House, proxy: Make, server: Servers) -> None:
    nonsense = [b"", b"SSH-2.0-x\r\n", b"HTTP/1.1 2x0 OK\r\n\r\n", b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
                b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 18)]  # fmt: skip
    proxy({})
    for answer in nonsense:

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: bytes = answer) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)

        port = await server(script)
        status, _, body = await named.connect().ask(f"GET http://s.test:{port}/ HTTP/1.1", "Host: s")
        assert status == 502 and f"s.test:{port} did not answer".encode() in body, answer[:40]


async def test_an_answer_that_breaks_off_is_seen_to_break_off(named: House, proxy: Make, server: Servers) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(f"GET http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\n\r\n")
    assert (await guest.rest()).endswith(b"\r\n\r\n5\r\nhello\r\n")


async def test_who_leaves_while_a_server_thinks_frees_it(named: House, proxy: Make, server: Servers) -> None:
    asked, freed = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        freed.set()

    port = await server(script)
    proxy({})
    for body in ("", "Content-Length: 3\r\n"):
        guest = named.connect()
        await guest.send(f"POST http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\n{body}\r\n{'abc' if body else ''}")
        await asked.wait()
        guest.close()
        async with asyncio.timeout(20):
            await freed.wait()
        asked.clear()
        freed.clear()


async def test_who_has_said_all_still_hears_the_answer(named: House, proxy: Make, server: Servers) -> None:
    closed = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await closed.wait()
        writer.write(OK)

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(f"GET http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\n\r\n")
    guest.sock.shutdown(socket.SHUT_WR)
    closed.set()
    assert (await guest.rest()).endswith(b"\r\n\r\nok")


# Size


async def test_bodies_pass_in_pieces_and_wait_for_whoever_reads(named: House, proxy: Make, server: Servers) -> None:
    """A guest that does not read stops the server; nothing of 64 MiB is kept here."""
    sent = 0

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MB))
        for _ in range(64):
            writer.write(bytes(MB))
            await writer.drain()
            sent += 1

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(f"GET http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\n\r\n")
    await guest.until(b"\r\n\r\n")
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.05)
    assert sent < 32, "what the kernel holds, and no more"
    assert await guest.exactly(64 * MB) == bytes(64 * MB)


async def test_an_upload_waits_for_the_server(named: House, proxy: Make, server: Servers) -> None:
    read = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await read.wait()
        left = 64 * MB
        while left:
            left -= len(await reader.read(min(left, MB)))
        writer.write(OK)

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(f"PUT http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\nContent-Length: {64 * MB}\r\n\r\n")
    guest.sock.setblocking(False)
    taken = before = 0
    while True:
        try:
            taken += guest.sock.send(bytes(MB))
        except BlockingIOError:
            if taken == before:
                break
            before = taken
            await asyncio.sleep(0.05)
    assert taken < 32 * MB
    read.set()
    await guest.send(bytes(64 * MB - taken))
    assert (await guest.answer())[0] == 200


# Switching


async def test_an_upgrade_becomes_a_tunnel(named: House, proxy: Make, server: Servers) -> None:
    seen: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: toy\r\nConnection: Upgrade\r\nX-A: 1\r\n\r\nfirst")
        writer.write((await reader.readexactly(5)).upper())
        writer.write(b"." + await reader.read())

    port = await server(script)
    proxy({})
    guest = named.connect()
    await guest.send(
        f"GET http://s.test:{port}/ HTTP/1.1\r\nHost: s\r\nConnection: Upgrade\r\nUpgrade: toy\r\n\r\nearly"
    )
    assert (await guest.answer())[:2] == (101, {"upgrade": "toy", "connection": "Upgrade", "x-a": "1"})
    assert await guest.exactly(10) == b"firstEARLY"
    await guest.send(b"late")
    guest.sock.shutdown(socket.SHUT_WR)
    assert await guest.rest() == b".late"
    assert head_of(seen[0])[1]["upgrade"] == ["toy"]


async def test_an_upgrade_that_is_not_wanted_is_an_answer_as_any(named: House, proxy: Make, server: Servers) -> None:
    port = await server(scripted(OK, OK))
    proxy({})
    guest = named.connect()
    lines = [f"GET http://s.test:{port}/ HTTP/1.1", "Host: s", "Connection: Upgrade", "Upgrade: toy"]
    assert (await guest.ask(*lines))[0] == 200
    assert (await guest.ask(*lines))[0] == 200


async def test_aiohttp_with_a_websocket_through_two_proxies(house: House, proxy: Make) -> None:
    """A real server and a real client; the second proxy is ours too."""

    async def socket_of(request: web.Request) -> web.StreamResponse:
        answer = web.WebSocketResponse()
        await answer.prepare(request)
        async for message in answer:
            await answer.send_str(message.data[::-1])
        return answer

    async def post(request: web.Request) -> web.Response:
        return web.Response(body=(await request.read())[::-1])

    app = web.Application(client_max_size=64 * MB)
    app.add_routes([web.get("/ws", socket_of), web.post("/", post)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]

    second = House()
    second.names["s.test"] = ["127.0.0.1"]
    behind = HttpProxy(second, second.network, settings={}, resolve=second.resolve)
    behind.start()
    handler = second.handler("192.168.65.1", 3128)
    assert handler is not None
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    loop = asyncio.get_running_loop()

    def accept() -> None:
        sock, _ = listener.accept()
        sock.setblocking(False)
        handler(sock, Endpoint.of("192.168.65.9", 1))

    loop.add_reader(listener, accept)
    proxy({"http": f"127.0.0.1:{listener.getsockname()[1]}"})
    first = socket.create_server(("127.0.0.1", 0))
    first.setblocking(False)
    intercepted = house.handler("203.0.113.1", 80)
    assert intercepted is not None

    def accept_guest() -> None:
        sock, _ = first.accept()
        sock.setblocking(False)
        intercepted(sock, Endpoint.of("192.168.65.3", 1))

    loop.add_reader(first, accept_guest)

    class ToProxy(aiohttp.abc.AbstractResolver):
        async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[aiohttp.abc.ResolveResult]:
            return [{"hostname": host, "host": "127.0.0.1", "port": first.getsockname()[1], "family": socket.AF_INET,
                     "proto": 0, "flags": 0}]  # type: ignore[typeddict-item]  # fmt: skip

        async def close(self) -> None: ...

    try:
        connector = aiohttp.TCPConnector(resolver=ToProxy())
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.ws_connect(f"http://s.test:{port}/ws") as websocket:
                for word in ("hello", "x" * 100_000):
                    await websocket.send_str(word)
                    assert await websocket.receive_str() == word[::-1]
            for body in (b"", b"abc", bytes(range(256)) * 40_000):
                async with session.post(f"http://s.test:{port}/", data=io.BytesIO(body)) as answer:
                    assert await answer.read() == body[::-1]
    finally:
        for one in (listener, first):
            loop.remove_reader(one)
            one.close()
        await behind.close()
        second.close()
        await runner.cleanup()
