"""A hypervisor's HTTP API as its drivers call it, with a server of the test's behind the socket."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from netstack.errors import HostError
from vm.api import RestCall
from vm.hypervisors.process import spawn
from vm.hypervisors.rest import MAX_ANSWER, Rest, listens


@pytest.fixture
def path() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="rest"))
    yield directory / "monitor.sock"
    shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def serving(path: Path) -> AsyncIterator[None]:
    async def answer(request: web.Request) -> web.Response:
        match request.path:
            case "/echo":
                return web.json_response({"method": request.method, "body": await request.json()})
            case "/nothing":
                return web.Response(status=204)
            case "/refused":
                return web.Response(status=400, text='{"fault_message": "the device is busy"}\n')
            case "/slow":
                await asyncio.sleep(60)
            case "/long":
                return web.Response(body=b"x" * (MAX_ANSWER + 1))
            case "/nested":
                return web.Response(text="[" * 100_000)
        return web.Response(text="no JSON")

    app = web.Application()
    app.router.add_route("*", "/{any:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    yield
    await runner.cleanup()


async def test_orders_are_carried_and_answers_are_values(path: Path) -> None:
    async with serving(path):
        rest = Rest(path, "vfkit")
        body = {"state": "Pause"}
        assert await rest.call(RestCall(method="PUT", path="/echo", body=body)) == {"method": "PUT", "body": body}
        assert await rest.call(RestCall(method="GET", path="/nothing")) is None


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("/refused", r'vfkit: GET /refused: 400 \{"fault_message": "the device is busy"\}'),
        ("/slow", "vfkit: GET /slow: no answer within 0 s"),
        ("/long", "an answer of more than"),
        ("/nested", "vfkit: GET /nested: "),
        ("/other", "vfkit: GET /other: "),
    ],
)
async def test_a_call_that_fails_says_what_was_asked_and_what_was_said(path: Path, where: str, why: str) -> None:
    async with serving(path):
        with pytest.raises(HostError, match=why):
            await Rest(path, "vfkit").call(RestCall(method="GET", path=where), limit_s=0.2 if where == "/slow" else 20)


async def test_nobody_is_there(path: Path) -> None:
    with pytest.raises(HostError, match="vfkit: GET /: "):
        await Rest(path, "vfkit").call(RestCall(method="GET", path="/"))
    assert not listens(path)


async def test_waiting_for_an_api_that_comes_late(path: Path) -> None:
    made = await spawn(["sleep", "100"], log=path.with_name("log"))
    waiting = asyncio.create_task(Rest(path, "x").there(made, 20))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))  # bound, and nobody listens yet
        await asyncio.sleep(0.05)
        assert not waiting.done()
        server.listen()
        await waiting
    await made.close()


async def test_an_api_that_never_comes(path: Path) -> None:
    made = await spawn(["sh", "-c", "echo no such option; exit 1"], log=path.with_name("log"))
    with pytest.raises(HostError, match=r"(?s)sh ended with status 1:\nno such option"):
        await Rest(path, "x").there(made, 20)
    await made.close()
