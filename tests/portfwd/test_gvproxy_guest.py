"""gvproxy's API as a guest has it at port 80 of the gateway: what it makes is its own, and all of it is bounded."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from netstack.api import Endpoint
from portfwd.gvproxy_forwards import Forwards, as_asked
from portfwd.gvproxy_guest import MAX_BODY, GuestDoor
from portfwd.owners import GVPROXY, Owner
from portfwd.spec import PublishSpec
from tests.support.http_house import LIMIT_S, Answer, House, free_port, house, read_answer, request, until

ONE, TWO = Endpoint.of("192.168.65.3", 40000), Endpoint.of("192.168.65.4", 40000)


@dataclass
class Gateway:
    """The door, and guests that connect to it."""

    house: House
    forwards: Forwards
    door: GuestDoor
    writers: list[asyncio.StreamWriter] = field(default_factory=list)

    async def connect(self, guest: Endpoint = ONE) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        theirs, ours = socket.socketpair()
        ours.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=theirs)
        self.writers.append(writer)
        self.door.serve(ours, guest)
        return reader, writer

    async def ask(self, guest: Endpoint, method: str, target: str, body: Any = None) -> Answer:
        reader, writer = await self.connect(guest)
        octets = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        writer.write(request(method, target, octets))
        async with asyncio.timeout(LIMIT_S):
            answer = await read_answer(reader, method)
        writer.close()
        await until(lambda: self.door.connections == 0)
        return answer

    async def expose(self, guest: Endpoint, local: str, remote: str, protocol: str = "tcp") -> Answer:
        body = {"local": local, "remote": remote, "protocol": protocol}
        return await self.ask(guest, "POST", "/services/forwarder/expose", body)

    async def unexpose(self, guest: Endpoint, local: str) -> Answer:
        return await self.ask(guest, "POST", "/services/forwarder/unexpose", {"local": local})

    async def all(self, guest: Endpoint) -> Any:
        return (await self.ask(guest, "GET", "/services/forwarder/all")).json


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with house() as made:
        forwards = Forwards(made.registry, max_per_guest=2)
        door = GuestDoor(forwards, max_connections=5, max_per_guest=3)
        await door.start()
        it = Gateway(made, forwards, door)
        yield it
        await door.close()
        for writer in it.writers:
            writer.close()
        await until(lambda: door.connections == 0)
        await asyncio.sleep(0)


async def test_a_guest_exposes_itself_and_takes_it_back(gateway: Gateway) -> None:
    """podman's request: `:PORT` is the caller's own."""
    port = free_port()
    answer = await gateway.expose(ONE, f":{port}", ":8080")
    assert (answer.status, answer.body) == (200, b"")
    assert await gateway.all(ONE) == [{"local": f":{port}", "remote": "192.168.65.3:8080", "protocol": "tcp"}]
    (forward,) = gateway.house.registry
    assert (forward.owner, forward.spec.bind) == (Owner("guest", "192.168.65.3"), "127.0.0.1")
    with socket.create_connection(("127.0.0.1", port)):
        await until(lambda: bool(gateway.house.guests.dialled))
        assert gateway.house.guests.dialled[0][0] == "192.168.65.3:8080"
    assert (await gateway.unexpose(ONE, f":{port}")).status == 200
    assert await gateway.all(ONE) == []


async def test_a_guest_sees_and_removes_what_it_made_only(gateway: Gateway) -> None:
    port = free_port()
    gateway.house.registry.add(PublishSpec.parse("127.0.0.1:0:192.168.65.3:80"), GVPROXY)
    await gateway.expose(ONE, f"127.0.0.1:{port}", ":80")
    assert await gateway.all(TWO) == []
    removed = await gateway.unexpose(TWO, f"127.0.0.1:{port}")
    assert (removed.status, removed.body) == (500, b"proxy not found\n")
    taken = await gateway.expose(TWO, f"127.0.0.1:{port}", ":80")
    assert taken.body.decode() == f"listen tcp 127.0.0.1:{port}: bind: address already in use\n"
    again = await gateway.expose(ONE, f"127.0.0.1:{port}", ":80")
    assert again.body.decode() == f"proxy already running for tcp on 127.0.0.1:{port}\n"
    assert len(await gateway.all(ONE)) == 1
    assert len(gateway.forwards.all()) == 2  # a user of the host sees both


@pytest.mark.parametrize(
    ("local", "remote", "protocol", "words"),
    [
        ("127.0.0.1:8080", "192.168.65.4:80", "tcp", "itself only"),
        ("192.0.2.1:8080", ":80", "tcp", "loopback only"),
        ("127.0.0.1:80", ":80", "tcp", "below 1024"),
        (":1023", ":80", "udp", "below 1024"),
        ("/tmp/x.sock", "tcp://192.168.65.3:80", "unix", "may not make files"),
    ],
)
async def test_what_a_guest_may_not_have(gateway: Gateway, local: str, remote: str, protocol: str, words: str) -> None:
    answer = await gateway.expose(ONE, local, remote, protocol)
    assert answer.status == 500 and words in answer.body.decode()
    assert not len(gateway.house.registry)
    assert gateway.forwards.refused == 1


async def test_a_policy_may_grant_more(gateway: Gateway) -> None:
    forwards = Forwards(gateway.house.registry, policy=as_asked)
    door = GuestDoor(forwards)
    await door.start()
    gateway.door = door
    answer = await gateway.expose(ONE, ":0", "192.168.65.3:80")
    assert answer.status == 200
    assert next(iter(gateway.house.registry)).spec.bind == "0.0.0.0"
    await door.close()


async def test_the_forwards_of_a_guest_are_bounded_each_guests_own(gateway: Gateway) -> None:
    answers = [await gateway.expose(ONE, f"127.0.0.{number}:0", ":80") for number in (1, 2, 3)]
    assert [answer.status for answer in answers] == [200, 200, 500]
    assert b"unexpose some first" in answers[2].body
    assert (await gateway.expose(TWO, "127.0.0.1:0", ":80")).status == 200


@pytest.mark.parametrize(
    "target", ["/", "/services/dns/add", "/services/dns/all", "/leases", "/tunnel", "/connect", "/stats", "/v1/status"]
)
async def test_there_is_nothing_else(gateway: Gateway, target: str) -> None:
    answer = await gateway.ask(ONE, "POST", target, {})
    assert (answer.status, answer.body) == (404, b"404 page not found\n")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"local":[]}', b"\xff"])
async def test_bad_json(gateway: Gateway, body: bytes) -> None:
    answer = await gateway.ask(ONE, "POST", "/services/forwarder/expose", body)
    assert answer.status == 400 and answer.body.count(b"\n") == 1


async def test_an_oversized_body(gateway: Gateway) -> None:
    answer = await gateway.ask(ONE, "POST", "/services/forwarder/expose", b" " * (MAX_BODY + 1))
    assert answer.status == 413


async def test_the_connections_of_a_guest_are_bounded_and_leave_room_for_others(gateway: Gateway) -> None:
    held = [await gateway.connect(ONE) for _ in range(3)]
    reader, _ = await gateway.connect(ONE)
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b""
    assert (gateway.door.refused, gateway.door.connections) == (1, 3)
    more = [await gateway.connect(TWO) for _ in range(2)]
    reader, _ = await gateway.connect(Endpoint.of("192.168.65.5", 1))  # five in all
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b""
    for reader, writer in (*held, *more):  # those there are go on
        writer.write(request("GET", "/services/forwarder/all"))
        assert (await read_answer(reader)).body == b"[]\n"
    held[0][1].close()
    await until(lambda: gateway.door.connections == 4)
    reader, writer = await gateway.connect(ONE)
    writer.write(request("GET", "/services/forwarder/all"))
    assert (await read_answer(reader)).status == 200


async def test_a_guest_that_says_nothing_or_dribbles_is_not_waited_for(gateway: Gateway) -> None:
    gateway.door.idle_s = 0.2
    for octets in (b"", b"GET / HT", request("POST", "/services/forwarder/expose", b"12345")[:-2]):
        reader, writer = await gateway.connect()
        writer.write(octets)
        async with asyncio.timeout(LIMIT_S):
            assert not await reader.read()
    await until(lambda: gateway.door.connections == 0)


async def test_a_connection_may_be_used_again(gateway: Gateway) -> None:
    reader, writer = await gateway.connect()
    for _ in range(3):
        writer.write(request("GET", "/services/forwarder/all"))
        assert (await read_answer(reader)).body == b"[]\n"


async def test_a_guest_that_sends_no_http_is_closed(gateway: Gateway) -> None:
    reader, writer = await gateway.connect()
    writer.write(b"\x16\x03\x01" + bytes(100))
    async with asyncio.timeout(LIMIT_S):
        said = await reader.read()
    assert said.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400"))
    await until(lambda: gateway.door.connections == 0)


async def test_closing_the_door_ends_every_connection(gateway: Gateway) -> None:
    reader, _ = await gateway.connect()
    await asyncio.sleep(0)
    await gateway.door.close()
    async with asyncio.timeout(LIMIT_S):
        assert await reader.read() == b""
    late, _ = await gateway.connect()
    assert await late.read() == b""
