"""`/connect` and `/tunnel`: the socket behind a request, with no octet lost (spec gvproxy 1.3, 1.4, 10)."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web

import portfwd.hijack
from portfwd.hijack import MAX_HEAD, Door, Doorway, NotTaken, Taken, hijack
from tests.roof.guest import BROADCAST, GATEWAY, GATEWAY_MAC
from tests.support import packets
from tests.support.gvproxy_world import GvForwarder, World, framed, world
from tests.support.http_house import LIMIT_S, call, read_answer, request, serving, until

PLAIN = "POST /take HTTP/1.1\r\nHost: unix\r\nContent-Length: 0\r\n\r\n"


class Taker:
    """Routes that take connections over, and keep them."""

    def __init__(self) -> None:
        self.taken: list[socket.socket] = []
        self.slow: asyncio.Event | None = None
        self.waiting = 0

    def routes(self) -> list[web.RouteDef]:
        async def take(req: web.Request) -> web.StreamResponse:
            if self.slow is not None:
                self.waiting += 1
                await self.slow.wait()
            if "no" in req.query:
                return web.Response(status=409, text="not now")
            try:
                self.taken.append(hijack(req))
            except NotTaken as error:
                return web.Response(status=400, text=str(error))
            return Taken()

        async def hello(req: web.Request) -> web.Response:
            return web.Response(text=f"hello {(await req.text())[:10]}")

        return [web.route("*", "/take", take), web.route("*", "/hello", hello), web.route("*", "/also/take", take)]

    def close(self) -> None:
        for sock in self.taken:
            sock.close()


@pytest.fixture
async def taker(tmp_path: Path) -> AsyncIterator[Taker]:
    made = Taker()
    async with serving(tmp_path / "s", made.routes(), frozenset({"/take"})):
        yield made
    made.close()


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.settimeout(LIMIT_S)
    return client


async def _speaks_early(directory: Path) -> None:
    """Every cut of head and early octets into two pieces gives the server the same socket."""
    taker = Taker()
    early = b"GET / HTTP/1.1\r\n\r\n\0\xff raw"
    stream = PLAIN.encode() + early
    async with serving(directory / "s", taker.routes(), frozenset({"/take"})):
        for cut in range(1, len(stream), 3):
            with connect(directory / "s") as client:
                client.sendall(stream[:cut])
                if cut % 2:
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                client.sendall(stream[cut:])
                await until(lambda: bool(taker.taken))
                sock = taker.taken.pop()
                assert not sock.getblocking()
                # Nobody else reads or writes: both directions, and the end of each, are ours.
                client.sendall(b"more")
                client.shutdown(socket.SHUT_WR)
                sock.setblocking(True)
                sock.settimeout(LIMIT_S)
                heard = b""
                while some := await asyncio.to_thread(sock.recv, 1000):
                    heard += some
                assert heard == early + b"more", cut
                sock.sendall(b"answer")
                sock.close()
                received = b""
                while some := client.recv(1000):
                    received += some
                assert received == b"answer"


LOOPS = pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])


@LOOPS
def test_what_a_client_says_early_is_kept(factory: Callable[[], Any], tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_speaks_early(tmp_path))


async def _ordinary(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    updated = Door.buffer_updated
    monkeypatch.setattr(Door, "buffer_updated", lambda door, octets: reads.append(octets) or updated(door, octets))
    async with serving(directory / "s", Taker().routes(), frozenset({"/take"})):
        answer = await call(directory / "s", "POST", "/hello", b"you")
        assert answer.body == b"hello you"
        assert (await call(directory / "s", "POST", "/hello", b"x" * 300_000)).body == b"hello xxxxxxxxxx"
        reader, writer = await asyncio.open_unix_connection(str(directory / "s"))
        for octet in request("POST", "/hello", b"1"):  # in dribbles, and then pipelined
            writer.write(bytes((octet,)))
            await writer.drain()
            await asyncio.sleep(0)
        writer.write(request("POST", "/hello", b"2") + request("POST", "/hello", b"3"))
        assert [(await read_answer(reader)).body for _ in range(3)] == [b"hello 1", b"hello 2", b"hello 3"]
        assert reads
        reads.clear()
        writer.write(request("POST", "/hello", b"4") + request("POST", "/hello", b"5"))
        assert [(await read_answer(reader)).body for _ in range(2)] == [b"hello 4", b"hello 5"]
        assert not reads  # the door is out of the way
        writer.close()
        await writer.wait_closed()


@LOOPS
def test_other_paths_are_served_as_ever(
    factory: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(_ordinary(tmp_path, monkeypatch))


async def test_over_tcp(taker: Taker, tmp_path: Path) -> None:
    async with serving(tmp_path / "other", taker.routes()) as runner:
        assert runner.server is not None
        loop = asyncio.get_running_loop()
        listener = await loop.create_server(Doorway(runner.server, {"/take"}), "127.0.0.1", 0)
        with socket.create_connection(listener.sockets[0].getsockname()) as client:
            client.sendall(PLAIN.encode() + b"early")
            await until(lambda: bool(taker.taken))
            assert await loop.sock_recv(taker.taken[0], 100) == b"early"
            assert taker.taken[0].getpeername() == client.getsockname()
        listener.close()
        await listener.wait_closed()


@pytest.mark.parametrize("target", ["/take?x=1", "http://unix/take", "/take#x"])
async def test_forms_of_the_target(taker: Taker, tmp_path: Path, target: str) -> None:
    with connect(tmp_path / "s") as client:
        client.sendall(f"GET {target} HTTP/1.1\r\nHost: unix\r\n\r\n".encode())
        await until(lambda: bool(taker.taken))


async def test_an_answer_in_place_of_a_hijack_closes_the_connection(taker: Taker, tmp_path: Path) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.write(request("POST", "/take?no") + b"raw octets")
    answer = await read_answer(reader)
    assert (answer.status, answer.body, answer.headers["connection"]) == (409, b"not now", "close")
    with pytest.raises((asyncio.IncompleteReadError, ConnectionResetError)):
        await reader.readexactly(1)
    writer.close()


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(request("POST", "/take"), id="not the first request"),
        pytest.param(None, id="with a body"),
        pytest.param(request("POST", "/also/take"), id="no path of the door's"),
    ],
)
async def test_who_cannot_have_the_connection_is_told(taker: Taker, tmp_path: Path, second: bytes | None) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    if second is None:
        writer.write(request("POST", "/take", b"body"))
    else:
        writer.write(request("POST", "/hello", b"x"))
        await read_answer(reader)
        writer.write(second)
    async with asyncio.timeout(LIMIT_S):
        answer = await read_answer(reader)
    assert answer.status == 400 and b"first request of a connection" in answer.body
    assert not taker.taken
    writer.close()
    await writer.wait_closed()


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"\x16\x03\x01" * 1000, id="TLS"),
        pytest.param(b"\r\n" * 2000, id="only line ends"),
        pytest.param(b"POST /take HTTP/1.1\r\n" + b"X: " + b"y" * 2 * MAX_HEAD, id="a head without end"),
        pytest.param(b"POST /take NONSENSE\r\n\r\n", id="no HTTP"),
    ],
)
async def test_what_is_no_request_is_answered_or_closed(taker: Taker, tmp_path: Path, octets: bytes) -> None:
    reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
    writer.write(octets)
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        try:
            said = await reader.read()
        except ConnectionResetError:
            said = b""
    assert said == b"" or said.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert not taker.taken
    writer.close()
    assert (await call(tmp_path / "s", "POST", "/hello", b"you")).body == b"hello you"


async def test_a_head_that_does_not_come_ends_the_connection(
    taker: Taker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portfwd.hijack, "HEAD_S", 0.2)
    for octets in (b"", b"POST /ta", b"POST /take HTTP/1.1\r\nHost:"):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "s"))
        writer.write(octets)
        async with asyncio.timeout(LIMIT_S):
            assert await reader.read() == b""
        writer.close()


async def test_a_client_that_leaves_before_it_is_served_leaves_nothing(taker: Taker, tmp_path: Path) -> None:
    taker.slow = asyncio.Event()
    with connect(tmp_path / "s") as client:
        client.sendall(PLAIN.encode() + b"x")
        await until(lambda: taker.waiting == 1)
    taker.slow.set()
    await until(lambda: bool(taker.taken))
    loop = asyncio.get_running_loop()
    assert [await loop.sock_recv(taker.taken[0], 10) for _ in range(2)] == [b"x", b""]


# gvproxy's two.


@pytest.fixture
async def net(tmp_path: Path) -> AsyncIterator[World]:
    async with world(tmp_path) as made:
        yield made


async def test_gvforwarder_gets_a_lease_and_pings_the_gateway(net: World) -> None:
    guest = await net.gvforwarder()
    assert guest.address == packets.ip("192.168.65.3")
    reply = await asyncio.to_thread(guest.ping)
    assert reply[:2] == b"\0\0" and reply[4:8] == struct.pack("!HH", 7, 1)
    assert [link.name for link in net.attachments.links] == ["connect#1"]
    leases = (await call(net.path, "GET", "/leases")).json
    assert leases["192.168.65.3"] == "5a:94:ef:e4:0c:ee" and "192.168.65.1" in leases
    cam = (await call(net.path, "GET", "/cam")).json
    assert cam["5a:94:ef:e4:0c:ee"] == 1


async def test_frames_that_come_with_the_request_are_no_less_frames(net: World) -> None:
    """gvforwarder's interface speaks at once; here an ARP question is in the segment of the request."""
    mac = b"\x5a\x94\xef\xe4\x0c\xee"
    question = packets.arp(1, mac, packets.ip("192.168.65.77"), bytes(6), GATEWAY)
    guest = GvForwarder(str(net.path), mac, early=framed(packets.ether(BROADCAST, mac, packets.ARP, question)))
    net.guests.append(guest)
    reply = await asyncio.to_thread(lambda: next(guest.frames()))
    assert reply[12:14] == b"\x08\x06" and reply[20:22] == b"\0\2" and reply[22:28] == GATEWAY_MAC


async def test_several_at_once_and_one_after_another(net: World) -> None:
    first = await net.gvforwarder(b"\x02\0\0\0\0\x01")
    second = await net.gvforwarder(b"\x02\0\0\0\0\x02")
    assert first.address != second.address
    for guest in (first, second):
        assert await asyncio.to_thread(guest.ping)
    first.close()
    await until(lambda: len(net.attachments.links) == 1)
    again = await net.gvforwarder(b"\x02\0\0\0\0\x01")
    assert again.address == first.address


@pytest.mark.parametrize(("query", "longest"), [("", 1514), ("?mtu=1000", 1014)])
async def test_no_frame_is_longer_than_gvforwarder_takes(net: World, query: str, longest: int) -> None:
    guest = await net.gvforwarder(query=query)
    reply = await asyncio.to_thread(guest.ping, 900)
    assert len(reply) == 908
    guest.received.clear()

    def flood() -> None:
        payload = packets.echo(7, 1, bytes(4000))  # its echo comes back in fragments
        whole = packets.ipv4(guest.address, GATEWAY, packets.ICMP, payload)
        for piece in packets.fragments(whole, 904):
            guest.send(packets.ether(GATEWAY_MAC, guest.mac, packets.IPV4, piece))
        got = 0
        for frame in guest.frames():
            packet = packets.read_ipv4(frame)
            if packet is not None and packet.protocol == packets.ICMP:
                got += len(packet.payload)
            if got >= len(payload):
                return

    await asyncio.to_thread(flood)
    lengths = [len(frame) for frame in guest.received]
    assert longest - 8 <= max(lengths) <= longest


async def test_frames_as_long_as_gvforwarders_interface_makes_them_are_taken(net: World) -> None:
    """Until it has heard our MTU its interface has 4000."""
    guest = await net.gvforwarder()
    assert len(await asyncio.to_thread(guest.ping, 3900)) >= 1400


async def test_a_link_that_the_network_does_not_take_is_closed(net: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("netstack.link.attach.MAX_LINKS", 0)
    with connect(net.path) as client:
        client.sendall(b"POST /connect HTTP/1.1\r\nHost: unix\r\n\r\n")
        assert await asyncio.to_thread(client.recv, 100) == b""


@pytest.mark.parametrize("mtu", ["100", "70000", "x", "-1", ""])
async def test_an_mtu_that_cannot_be(net: World, mtu: str) -> None:
    answer = await call(net.path, "POST", f"/connect?mtu={mtu}")
    assert answer.status == 400 and answer.body.startswith(b"mtu: ")


def serve_once(guest: GvForwarder, port: int, act: Callable[[Any], None]) -> Coroutine[Any, Any, None]:
    """The guest accepts one connection and does `act` with it."""

    def run() -> None:
        act(guest.listen(port))

    return asyncio.to_thread(run)


async def test_tunnel_says_ok_and_is_the_stream(net: World) -> None:
    guest = await net.gvforwarder()

    def act(connection: Any) -> None:
        segment = next(segment for segment in connection.segments() if segment.payload)
        assert segment.payload == b"ping"
        connection.ack = segment.end
        connection.send(packets.ACK | packets.PSH, b"pong")
        assert connection.ended_by() == "FIN"
        # The client has closed its direction; ours still carries.
        connection.send(packets.ACK | packets.PSH, b" and more")
        connection.send(packets.ACK | packets.FIN)

    serving_ = asyncio.create_task(serve_once(guest, 22, act))
    reader, writer = await asyncio.open_unix_connection(str(net.path))
    writer.write(b"POST /tunnel?ip=192.168.65.3&port=22 HTTP/1.1\r\nHost: unix\r\nContent-Length: 0\r\n\r\n")
    assert await reader.readexactly(2) == b"OK"  # and no status line
    writer.write(b"ping")
    assert await reader.readexactly(4) == b"pong"
    writer.write_eof()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b" and more"
        await serving_
    writer.close()


async def test_a_tunnels_early_octets_reach_the_guest(net: World) -> None:
    guest = await net.gvforwarder()
    heard: list[bytes] = []

    def act(connection: Any) -> None:
        for segment in connection.segments():
            if segment.payload:
                heard.append(segment.payload)
                connection.ack = segment.end
                connection.send(packets.ACK)
                return

    serving_ = asyncio.create_task(serve_once(guest, 22, act))
    reader, writer = await asyncio.open_unix_connection(str(net.path))
    writer.write(b"GET /tunnel?ip=192.168.65.3&port=22 HTTP/1.1\r\nHost: unix\r\n\r\nSSH-2.0-early\r\n")
    assert await reader.readexactly(2) == b"OK"
    async with asyncio.timeout(LIMIT_S):
        await serving_
    assert heard == [b"SSH-2.0-early\r\n"]
    writer.close()


async def test_a_tunnel_to_a_closed_port_says_ok_and_ends(net: World) -> None:
    guest = await net.gvforwarder()

    def refuse() -> None:
        for packet in guest.packets(packets.TCP):
            segment = packets.read_tcp(packet)
            back = packets.tcp(
                guest.address, segment.source, segment.dport, segment.sport, 0, segment.end, packets.RST | packets.ACK
            )
            guest.send_ip(segment.source, packets.TCP, back)
            return

    refusing = asyncio.create_task(asyncio.to_thread(refuse))
    reader, writer = await asyncio.open_unix_connection(str(net.path))
    writer.write(b"POST /tunnel?ip=192.168.65.3&port=22 HTTP/1.1\r\nHost: unix\r\n\r\n")
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b"OK"
        await refusing
    writer.close()


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "ip is mandatory"),
        ("?port=22", "ip is mandatory"),
        ("?ip=192.168.65.3", "port is mandatory"),
        ("?ip=192.168.65.3&port=x", "port: 'x' is no whole number from 1 to 65535"),
        ("?ip=192.168.65.3&port=65536", "port: '65536' is no whole number from 1 to 65535"),
        ("?ip=fd00::1&port=22", "ip: 'fd00::1' is no IPv4 address"),
    ],
)
async def test_a_tunnel_to_nowhere_is_an_error_of_http(net: World, query: str, words: str) -> None:
    answer = await call(net.path, "POST", f"/tunnel{query}")
    assert (answer.status, answer.body.decode()) == (500, words + "\n")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"


async def test_a_service_that_fails_costs_the_guest_its_connection(net: World) -> None:
    """`Stack.serve_sockets`."""
    given: list[socket.socket] = []

    def broken(sock: socket.socket, source: Any) -> None:
        given.append(sock)
        assert str(source).startswith("192.168.65.3:") and not sock.getblocking()
        raise RuntimeError("a bug")

    net.stack.serve_sockets(GATEWAY, 8080, broken)
    guest = await net.gvforwarder()
    connection = await asyncio.to_thread(guest.connect, GATEWAY, 8080)
    assert connection is None or await asyncio.to_thread(connection.ended_by) in ("FIN", "RST")
    assert [sock.fileno() for sock in given] == [-1]
    assert net.stack.counters.contained == 1
    net.stack.counters.contained = 0
    assert await asyncio.to_thread(guest.ping)
