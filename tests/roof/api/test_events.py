"""`/v1/events`: what readers are told, in order, and what slow ones are told they missed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import pytest

from netstack.observe.events import Contained, FlowOpened
from pyvpnkit.api import sse, streams
from tests.roof.api.conftest import Client, Control, request, until


@dataclass
class Told:
    """One server-sent event."""

    type: str
    data: dict[str, Any]
    id: str


async def listen(control: Control, target: str = "/v1/events", **headers: str) -> Client:
    client = await control.connect()
    await client.send(request("GET", target, **headers))
    head = await client.head()
    assert (head.status, head.headers["content-type"]) == (200, "text/event-stream")
    assert await anext(client.chunks()) == b": pyvpnkit\n\n"
    return client


async def events(client: Client) -> AsyncIterator[Told]:
    waiting = b""
    async for chunk in client.chunks():
        waiting += chunk
        while b"\n\n" in waiting:
            block, _, waiting = waiting.partition(b"\n\n")
            lines = dict(line.split(": ", 1) for line in block.decode().split("\n") if not line.startswith(":"))
            if lines:
                yield Told(lines["event"], json.loads(lines["data"]), lines.get("id", ""))


def emit(control: Control, where: str) -> None:
    control.service.events.emit(Contained(time=control.service.stack.clock(), where=where, error="e"))


async def take(client: Client, count: int) -> list[Told]:
    found = events(client)
    return [await anext(found) for _ in range(count)]


async def test_every_reader_hears_what_happens_with_the_time_of_day(control: Control) -> None:
    import time

    readers = [await listen(control) for _ in range(3)]
    made = (await control.ask("POST", "/v1/forwards", {"spec": "0:80"})).json
    for reader in readers:
        (told,) = await take(reader, 1)
        assert told.type == told.data["event"] == "ForwardAdded"
        assert (told.data["forward"], told.data["owner"]) == (made["spec"], "hand")
        assert abs(told.data["time"] - time.time()) < 20


async def test_a_reader_hears_the_types_it_asked_for_and_flows_only_then(control: Control) -> None:
    bus = control.service.events
    before = bus.wanted
    reader = await listen(control, "/v1/events?types=Contained,LinkUp")
    assert bus.wanted is before
    flows = await listen(control, "/v1/events?types=FlowOpened")
    assert bus.wanted
    await control.ask("POST", "/v1/forwards", {"spec": "0:80"})
    emit(control, "here")
    bus.emit(FlowOpened(time=0, protocol="tcp", guest="g", remote="r", direction="outbound"))
    assert [told.type for told in await take(reader, 1)] == ["Contained"]
    assert [told.type for told in await take(flows, 1)] == ["FlowOpened"]
    flows.close()
    await until(lambda: bus.wanted is before)


async def test_who_comes_back_hears_what_happened_since(control: Control) -> None:
    first = await listen(control)
    for number in range(5):
        emit(control, str(number))
    seen = await take(first, 3)
    first.close()
    emit(control, "5")
    again = await listen(control, Last_Event_ID=seen[-1].id)
    assert [told.data["where"] for told in await take(again, 3)] == ["3", "4", "5"]


async def test_who_comes_back_after_a_restart_or_too_late_is_told(
    control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = control.server._hub
    for number in range(sse.RING + 10):
        emit(control, str(number))
    reader = await listen(control, Last_Event_ID="01234567-3")
    lost, first = await take(reader, 2)
    assert (lost.type, lost.data) == ("lost", {"lost": None})
    assert first.data["where"] == "10"
    reader = await listen(control, Last_Event_ID=f"{hub.epoch}-4")
    lost, first = await take(reader, 2)
    assert lost.data == {"lost": 6}
    assert first.data["where"] == "10"


@pytest.mark.parametrize(
    ("target", "headers", "words"),
    [
        pytest.param("/v1/events?types=Nope", {}, "LeaseGiven", id="type"),
        pytest.param("/v1/events", {"Last_Event_ID": "x"}, "no id of an event", id="id"),
        pytest.param("/v1/events?filter=x", {}, "types", id="parameter"),
    ],
)
async def test_a_wrong_wish_is_told_what_there_is(
    control: Control, target: str, headers: dict[str, str], words: str
) -> None:
    reply = await control.ask("GET", target, **headers)
    assert (reply.status, words in reply.message) == (400, True)


async def test_a_slow_reader_misses_events_and_is_told_how_many_and_others_miss_none(control: Control) -> None:
    slow = await listen(control)
    fast = await listen(control)
    slow.writer.transport.pause_reading()
    heard: list[Told] = []
    total = 20_000

    async def read() -> None:
        async for told in events(fast):
            heard.append(told)
            if len(heard) == total:
                return

    reading = asyncio.create_task(read())
    for number in range(total):
        emit(control, f"{number} {'x' * 100}")
        if not number % 100:
            await until(lambda sent=number: len(heard) >= sent)  # type: ignore[misc]
    async with asyncio.timeout(30):
        await reading
    assert [int(told.data["where"].split()[0]) for told in heard] == list(range(total))
    slow.writer.transport.resume_reading()
    numbers, lost = [], 0
    async with asyncio.timeout(30):
        async for told in events(slow):
            if told.type == "lost":
                assert told.data["lost"] > 0
                lost += told.data["lost"]
            else:
                numbers.append(int(told.data["where"].split()[0]))
            if numbers and numbers[-1] == total - 1:
                break
    assert lost > 0
    assert lost + len(numbers) == total
    assert numbers == sorted(numbers)
    assert control.server.counts()["events_lost"] == lost


async def test_a_quiet_stream_has_a_heartbeat_and_a_reader_that_left_is_forgotten(control: Control) -> None:
    control.server.streams.heartbeat_s = 0.05
    reader = await listen(control)
    assert await anext(reader.chunks()) == b": heartbeat\n\n"
    assert control.server.counts()["open_event_streams"] == 1
    reader.close()
    await until(lambda: control.server.counts()["open_event_streams"] == 0)


async def test_readers_are_bounded(control: Control, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MAX_FEEDS", 2)
    kept = [await listen(control) for _ in range(2)]
    assert (await control.ask("GET", "/v1/events")).status == 429
    kept[0].close()
    await until(lambda: control.server.counts()["open_event_streams"] == 1)
    await listen(control)


@pytest.mark.parametrize("target", ["/v1/events", "/v1/capture"])
async def test_the_head_alone_of_a_stream_has_an_end(control: Control, target: str) -> None:
    client = await control.connect()
    for _ in range(2):
        await client.send(request("HEAD", target))
        assert (await client.head()).status == 200
    await client.send(request("GET", "/v1/forwards"))
    assert (await client.reply()).json["forwards"] == []
