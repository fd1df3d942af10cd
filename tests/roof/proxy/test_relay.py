"""Tunnels: octets both ways, ends that cross one by one, faults that end both, slow ends that stop their sender."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import Iterator

import pytest

from pyvpnkit.proxy import http1, relay
from pyvpnkit.proxy.relay import BUFFER, Relay
from tests.roof.proxy.house import Client, House, Make, Servers

Ends = tuple[Client, Client, socket.socket, socket.socket]


@pytest.fixture(params=["unix", "tcp"])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """What two clients hold, and the relay's ends of their connections; the second is the outside."""
    one = socket.socketpair()
    if request.param == "unix":
        two = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            client = socket.create_connection(listener.getsockname())
            two = client, listener.accept()[0]
    for sock in (*one, *two):
        sock.setblocking(False)
    yield Client(one[0]), Client(two[0]), one[1], two[1]
    for sock in (*one, *two):
        sock.close()


async def test_octets_and_ends_cross(ends: Ends) -> None:
    guest, outside, mine, other = ends
    task = asyncio.create_task(Relay(mine, other, to_one=b"to guest.", to_other=b"to server.").run())
    data = random.Random(1).randbytes(3_000_000)
    sending = [asyncio.create_task(guest.send(data)), asyncio.create_task(outside.send(data[::-1]))]
    assert await outside.exactly(10 + len(data)) == b"to server." + data
    assert await guest.exactly(9 + len(data)) == b"to guest." + data[::-1]
    await asyncio.gather(*sending)
    guest.sock.shutdown(socket.SHUT_WR)
    assert await outside.rest() == b""
    await outside.send(b"still")
    outside.sock.shutdown(socket.SHUT_WR)
    assert await guest.rest() == b"still"
    async with asyncio.timeout(20):
        await task
    assert mine.fileno() == other.fileno() == -1


async def test_who_does_not_read_stops_the_other_and_nothing_is_lost(ends: Ends) -> None:
    guest, outside, mine, other = ends
    for sock in (mine, other, outside.sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    carrying = Relay(mine, other)
    task = asyncio.create_task(carrying.run())
    data = random.Random(2).randbytes(20 * BUFFER)
    sending = asyncio.create_task(outside.send(data))
    carried = -1
    while carried != carrying.octets[1]:
        carried = carrying.octets[1]
        await asyncio.sleep(0.05)
    assert carried < len(data) and not sending.done()
    assert await guest.exactly(len(data)) == data
    await sending
    assert carrying.octets == (0, len(data))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert mine.fileno() == other.fileno() == -1


async def test_an_end_that_comes_before_slow_octets_does_not_overtake_them(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ends have finished; the guest reads late, and looks are frequent."""
    monkeypatch.setattr(relay, "_LOOK_S", 0.005)
    guest, outside, mine, other = ends
    mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
    task = asyncio.create_task(Relay(mine, other).run())
    data = random.Random(3).randbytes(150_000)
    guest.sock.shutdown(socket.SHUT_WR)
    await outside.send(data)
    outside.sock.shutdown(socket.SHUT_WR)
    await asyncio.sleep(0.1)
    assert not task.done()
    assert await guest.rest() == data
    async with asyncio.timeout(20):
        await task


@pytest.mark.parametrize("half", [False, True], ids=["at once", "after its own end"])
async def test_a_guest_that_is_gone_frees_the_server(ends: Ends, half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_LOOK_S", 0.01)
    guest, outside, mine, other = ends
    task = asyncio.create_task(Relay(mine, other).run())
    if half:
        guest.sock.shutdown(socket.SHUT_WR)
        assert await outside.rest() == b""
        await asyncio.sleep(0.05)
        assert not task.done()
    guest.close()
    async with asyncio.timeout(20):
        await task


async def test_a_reset_ends_both(ends: Ends) -> None:
    guest, outside, mine, other = ends
    task = asyncio.create_task(Relay(mine, other).run())
    outside.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    outside.close()
    assert await guest.rest() == b""
    guest.close()
    async with asyncio.timeout(20):
        await task


async def test_who_leaves_after_the_last_word_frees_a_server_that_thinks(
    house: House, proxy: Make, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http1, "_LOOK_S", 0.01)
    asked, freed = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        freed.set()

    port = await server(script)
    house.names["a.test"] = ["127.0.0.1"]
    proxy({})
    guest = house.connect()
    await guest.send(f"GET http://a.test:{port}/ HTTP/1.1\r\nHost: a\r\n\r\n")
    guest.sock.shutdown(socket.SHUT_WR)
    await asked.wait()
    await asyncio.sleep(0.05)
    assert not freed.is_set(), "it waits for the answer"
    guest.close()
    async with asyncio.timeout(20):
        await freed.wait()


async def test_who_leaves_while_another_proxy_thinks_about_connect_frees_it(
    house: House, proxy: Make, server: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "GONE_S", 0.01)
    asked, freed = asyncio.Event(), asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()
        freed.set()

    proxy({"https": f"127.0.0.1:{await server(script)}"})
    for address, port, words in (
        ("203.0.113.1", 443, b"client hello"),
        ("192.168.65.1", 3129, b"CONNECT a.test:443 HTTP/1.1\r\nHost: a\r\n\r\n"),
    ):
        guest = house.connect(port, address)
        await guest.send(words)
        await asked.wait()
        guest.close()
        async with asyncio.timeout(20):
            await freed.wait()
        asked.clear()
        freed.clear()
