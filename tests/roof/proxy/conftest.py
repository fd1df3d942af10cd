"""A proxy in front of servers on loopback, and guests that are one end of a socket pair."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from pyvpnkit.proxy.service import HttpProxy
from tests.roof.proxy.house import House, Make, Script, Servers


@pytest_asyncio.fixture
async def house(request: pytest.FixtureRequest) -> AsyncIterator[House]:
    """Settings of the network by `@pytest.mark.parametrize("house", [{...}], indirect=True)`."""
    made = House(**getattr(request, "param", {}))
    yield made
    made.close()


@pytest_asyncio.fixture
async def proxy(house: House) -> AsyncIterator[Make]:
    """`proxy({...})` starts one with these settings."""
    made: list[HttpProxy] = []

    def make(settings: dict[str, Any] | None = None, **options: Any) -> HttpProxy:
        options = {"resolve": house.resolve, "every_s": 0.02} | options
        made.append(HttpProxy(house, house.network, settings=settings, **options))
        made[-1].start()
        house.proxy = made[-1]
        return made[-1]

    yield make
    for one in made:
        await one.close()
        assert not one.counters["contained"]
        assert one.connections == 0


@pytest_asyncio.fixture
async def server() -> AsyncIterator[Servers]:
    """`await server(script)` serves connections on a port of 127.0.0.1 by `script(reader, writer)`."""
    running: list[asyncio.Server] = []
    tasks: set[asyncio.Task[Any]] = set()

    async def start(script: Script) -> int:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            tasks.add(task)
            try:
                await script(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                tasks.discard(task)
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

        running.append(await asyncio.start_server(serve, "127.0.0.1", 0))
        return int(running[-1].sockets[0].getsockname()[1])

    yield start
    for one in running:
        one.close()
    for task in tuple(tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for one in running:
        await one.wait_closed()


@pytest.fixture
def closed_port() -> int:
    """A port of 127.0.0.1 at which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
