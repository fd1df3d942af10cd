"""The supervisor's API: what it answers, and to what it says no."""

from __future__ import annotations

import asyncio
import contextlib
import json
import stat
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from tests.support.vm_house import FAST, House, house
from vm.supervisor import journal as journals
from vm.supervisor.control import serving
from vm.supervisor.journal import Journal
from vm.supervisor.lifecycle import State

ALONE = "network: none\n" + FAST


class Api:
    def __init__(self, made: House, session: aiohttp.ClientSession) -> None:
        self.house = made
        self.session = session

    async def __call__(self, method: str, path: str, body: str | bytes | None = None) -> tuple[int, Any]:
        async with self.session.request(method, f"http://vm{path}", data=body) as answer:
            return answer.status, json.loads(await answer.read())


@contextlib.asynccontextmanager
async def api(text: str = ALONE, *words: str) -> AsyncIterator[Api]:
    async with (
        house(text, *words) as made,
        serving(made.supervisor),
        aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(made.home.state.control))) as session,
    ):
        await made.ready()
        yield Api(made, session)


async def test_the_status_has_everything_at_a_glance() -> None:
    shares = "shares: [{tag: src, source: ., target: /mnt, kind: 9p-local}]\n"
    async with api(ALONE + shares) as ask:
        status, found = await ask("GET", "/v1/status")
        assert status == 200
        assert (found["name"], found["driver"], found["state"], found["restarts"]) == ("house", "fake", "ready", 0)
        assert found["pid"] == ask.house.supervisor.pid
        assert found["shares"][0]["target"] == "/mnt"
        assert found["mounts"] == ["mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 src /mnt"]
        assert found["console"] == str(ask.house.home.state.console)
        assert stat.S_IMODE(ask.house.home.state.control.stat().st_mode) == 0o600


async def test_it_is_taken_down_by_the_api() -> None:
    async with api() as ask:
        assert await ask("POST", "/v1/down", b'{"kill": true}') == (202, {"state": "ready"})
        assert await ask.house.over() is State.STOPPED
        assert "killing the machine" in ask.house.said


async def test_it_is_paused_and_goes_on() -> None:
    async with api() as ask:
        assert await ask("POST", "/v1/pause") == (200, {"paused": True})
        assert (await ask("GET", "/v1/status"))[1]["paused"] is True
        assert await ask("POST", "/v1/resume") == (200, {"paused": False})
        assert (await ask("GET", "/v1/status"))[1]["paused"] is False


async def test_events_are_a_line_each_and_end_with_the_machine() -> None:
    async with api() as ask:
        async with ask.session.get("http://vm/v1/events") as stream:
            first = json.loads(await stream.content.readline())
            assert first == ask.house.entries[0]
            ask.house.supervisor.down()
            rest = [json.loads(line) async for line in stream.content]
        assert [entry["id"] for entry in (first, *rest)] == list(range(1, len(rest) + 2))
        assert rest[-1]["state"] == "stopped"
        async with ask.session.get(f"http://vm/v1/events?after={rest[-2]['id']}") as stream:
            assert [json.loads(line) async for line in stream.content] == [rest[-1]]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("POST", "/v1/down", b"[]", 400, "no JSON object"),
        ("POST", "/v1/down", b"{", 400, "no JSON object"),
        ("POST", "/v1/down", b"[" * 50_000, 400, "no JSON object"),
        ("POST", "/v1/down", b'{"kill": 1}', 400, "neither true nor false"),
        ("POST", "/v1/down", b"x" * (65 << 10), 413, "/v1/down"),
        ("GET", "/v1/events?after=x", None, 400, "no id of an event"),
        ("GET", "/v1/nothing", None, 404, "there are /v1/status"),
        ("GET", "/v1/down", None, 405, "there are /v1/status"),
    ],
)
async def test_what_is_asked_wrong_is_told(method: str, path: str, body: bytes | None, status: int, words: str) -> None:
    async with api() as ask:
        found, answer = await ask(method, path, body)
        assert found == status
        assert words in answer["message"]
        assert ask.house.supervisor.state is State.READY


async def test_what_cannot_be_done_now_is_refused() -> None:
    async with house(ALONE + "ready: 'console:never said'\n") as made, serving(made.supervisor):
        await made.until(lambda: made.supervisor.state is State.CREATED or made.supervisor.state is State.RUNNING)
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(made.home.state.control))) as session:
            made.supervisor.down()
            await made.over()
            async with session.post("http://vm/v1/pause") as answer:
                assert answer.status == 409
                assert "house is stopped, not up" in (await answer.json())["message"]


async def test_a_reader_that_does_not_keep_up_is_let_go_and_nobody_waits_for_it() -> None:
    journal = Journal(clock=lambda: 1.0)
    slow = journal.read()
    journal.add("x", "first")
    assert (await anext(slow))["text"] == "first"
    for number in range(journals.KEPT + 2):
        journal.add("x", str(number))
    left = [entry["text"] async for entry in slow]
    assert len(left) < journals.KEPT + 2
    assert journal.last == journals.KEPT + 3


async def test_so_many_readers_and_no_more() -> None:
    async with api() as ask:
        made = ask.house.supervisor.journal
        tasks = [asyncio.create_task(anext(made.read(after=10**9))) for _ in range(journals.MAX_READERS)]
        await asyncio.sleep(0)
        status, answer = await ask("GET", "/v1/events")
        assert status == 503
        assert "too many readers" in answer["message"]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
