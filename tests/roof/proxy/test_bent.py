"""Bent requests and bent answers: whatever either side says, the other is told or let go, and nothing of ours breaks."""

from __future__ import annotations

import asyncio
import random
import socket

import pytest

from tests.roof.proxy.house import House, Make, Servers

REQUESTS = (
    b"GET http://s.test:%d/ HTTP/1.1\r\nHost: s.test\r\nConnection: keep-alive, X-A\r\nX-A: b\r\n\r\n",
    b"POST http://s.test:%d/ HTTP/1.1\r\nHost: s.test\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nA: b\r\n\r\n",
    b"PUT http://s.test:%d/ HTTP/1.1\r\nHost: s.test\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\nhello",
    b"HEAD / HTTP/1.1\r\nHost: s.test:%d\r\nTE: trailers\r\nUpgrade: x\r\nConnection: Upgrade, TE\r\n\r\n",
    b"CONNECT s.test:%d HTTP/1.1\r\nHost: s.test\r\nProxy-Authorization: Basic eA==\r\n\r\nhello",
    b"OPTIONS * HTTP/1.0\r\nHost: s.test:%d\r\n\r\n",
)
ANSWERS = (
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n5\r\nhello\r\n0\r\nA: b\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\nConnection: X\r\nX: y\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nraw",
    b"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\nContent-Length: 2\r\n\r\nno",
)
PIECES = (b"\r\n", b"\n", b"\0", b":", b" ", b"Content-Length: 7\r\n", b"Transfer-Encoding: chunked\r\n", b"\xff", b"HTTP/1.1",
          b"http://", b"[", b"]", b"@", b"%00", b"99999999999999999999", b"\t", b",", b"-1", b"Connection: close\r\n")  # fmt: skip


def bend(rng: random.Random, octets: bytes) -> bytes:
    """Cut, repeat, insert or change at a few places; now and then nothing."""
    bent = bytearray(octets)
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at = rng.randrange(len(bent) + 1)
        match rng.randrange(5):
            case 0:
                del bent[at : at + rng.randrange(1, 9)]
            case 1:
                bent[at:at] = rng.choice(PIECES)
            case 2:
                bent[at : at + 1] = bytes([rng.randrange(256)])
            case 3:
                bent[at:at] = bent[at : at + rng.randrange(1, 40)]
            case 4:
                del bent[at:]
    return bytes(bent)


@pytest.mark.parametrize("through", [False, True], ids=["straight", "through a proxy"])
@pytest.mark.parametrize("seed", range(4))
async def test_bent_requests_and_answers(house: House, proxy: Make, server: Servers, seed: int, through: bool) -> None:
    rng = random.Random(seed)

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(10_000):
            writer.write(bend(rng, rng.choice(ANSWERS)))
            await writer.drain()
            if rng.random() < 0.3:
                return

    port = await server(script)
    house.names["s.test"] = ["127.0.0.1"]
    settings = {"http": f"127.0.0.1:{port}", "https": f"127.0.0.1:{port}"} if through else {}
    one = proxy(settings)

    async def talk(number: int) -> None:
        chance = random.Random(seed * 1000 + number)
        where = [(3128, "192.168.65.1"), (3129, "192.168.65.1")]
        if through:
            where += [(80, "203.0.113.1"), (443, "203.0.113.1")]
        guest = house.connect(*chance.choice(where))
        octets = b"".join(bend(chance, chance.choice(REQUESTS).replace(b"%d", b"%d" % port)) for _ in range(3))
        try:
            for at in range(0, len(octets), 97):
                await guest.send(octets[at : at + 97])
                await asyncio.sleep(0)
            if chance.random() < 0.7:
                guest.sock.shutdown(socket.SHUT_WR)
                async with asyncio.timeout(0.2):  # a server that says half of something is waited for
                    await guest.rest()
        except OSError:
            pass
        guest.close()

    async with asyncio.timeout(60):
        for first in range(0, 200, 20):
            await asyncio.gather(*map(talk, range(first, first + 20)))
        while one.connections:  # noqa: ASYNC110  # tasks of the proxy end on their own
            await asyncio.sleep(0.01)
    assert one.counters["requests"] > 20 and not one.counters["contained"]
