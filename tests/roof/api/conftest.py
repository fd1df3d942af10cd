"""A real network with its control server, and clients of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pyvpnkit import loader
from pyvpnkit.api.server import ControlServer
from pyvpnkit.service import Service
from tests.roof.guest import StreamGuest

LIMIT_S = 20.0


@dataclass
class Reply:
    """What a server answered."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["message"])


@dataclass
class Client:
    """HTTP by hand over a connection of its own, so that bad requests can be sent too."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, octets: bytes) -> None:
        self.writer.write(octets)
        await self.writer.drain()

    async def reply(self) -> Reply:
        """The next answer, whole."""
        async with asyncio.timeout(LIMIT_S):
            found = await self.head()
            if (length := found.headers.get("content-length")) is not None:
                found.body = await self.reader.readexactly(int(length))
            elif found.headers.get("transfer-encoding") == "chunked":
                found.body = b"".join([chunk async for chunk in self.chunks()])
            return found

    async def head(self) -> Reply:
        """Status and headers of the next answer."""
        async with asyncio.timeout(LIMIT_S):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:] if line)
        }
        return Reply(int(lines[0].split()[1]), headers, b"")

    async def chunks(self) -> AsyncIterator[bytes]:
        """The chunks of a streamed body, as they come."""
        while True:
            async with asyncio.timeout(LIMIT_S):
                size = int(await self.reader.readline(), 16)
                chunk = await self.reader.readexactly(size + 2)
            if not size:
                return
            yield chunk[:-2]

    def close(self) -> None:
        self.writer.close()

    async def closed(self) -> bytes:
        """Wait until the server has closed; what it still said."""
        async with asyncio.timeout(LIMIT_S):
            try:
                return await self.reader.read()
            except ConnectionResetError:
                return b""


def request(method: str, target: str, body: object = None, raw: bytes | None = None, **headers: str) -> bytes:
    """The octets of a request; `body` goes as JSON, `raw` as it is."""
    octets = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
    fields = {"Host": "localhost", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if octets:
        fields.setdefault("Content-Type", "application/json")
        fields.setdefault("Content-Length", str(len(octets)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + octets


@dataclass
class Control:
    """A network, its control server, and the ways to it."""

    service: Service
    server: ControlServer
    path: str
    link: str
    _clients: list[Client] = field(default_factory=list)

    async def connect(self, address: str | None = None) -> Client:
        """By the Unix socket, or by a `tcp:IP:PORT` of the server."""
        if address is None:
            client = Client(*await asyncio.open_unix_connection(self.path))
        else:
            host, _, port = address.removeprefix("tcp:").rpartition(":")
            client = Client(*await asyncio.open_connection(host.strip("[]"), int(port)))
        self._clients.append(client)
        return client

    async def ask(self, method: str, target: str, body: object = None, **more: Any) -> Reply:
        """One request on a connection of its own."""
        client = await self.connect(more.pop("address", None))
        await client.send(request(method, target, body, **more))
        found = await client.reply()
        client.close()
        return found

    async def close(self) -> None:
        for client in self._clients:
            client.close()
            with contextlib.suppress(OSError):
                await client.writer.wait_closed()


@contextlib.asynccontextmanager
async def control_server(directory: Path, **options: Any) -> AsyncIterator[Control]:
    """A service with one `qemu` link, and its control server with `options`."""
    link, path = directory / "net.sock", directory / "control.sock"
    faults: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: faults.append(context))
    settings = loader.load(None, {"links": [f"qemu:{link}"], "dns.hosts_file": ["off"], "control.socket": ["off"]})
    options.setdefault("path", str(path))
    network = Service(settings)
    network.state_directory = options.pop("state_directory", None)
    async with network as service:
        made = None
        try:
            async with ControlServer(service, **options) as server:
                made = Control(service, server, str(path), str(link))
                yield made
        finally:
            # After the server, so that it has to end the connections itself.
            if made is not None:
                await made.close()
    assert not faults, faults
    assert server.http.counters.contained == 0
    assert not server.http.connections


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    async with control_server(tmp_path) as made:
        yield made


@pytest.fixture
async def guest(control: Control) -> AsyncIterator[StreamGuest]:
    """One of its network's, that has leased its address."""
    made = await asyncio.to_thread(StreamGuest, control.link)
    await asyncio.to_thread(made.lease)
    yield made
    made.close()


async def until(true: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait for what another process or the kernel does."""
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def free_port(count: int = 1) -> int:
    """The first of so many consecutive ports that nobody has, below those that kernels hand out by themselves."""
    while True:
        first = random.SystemRandom().randrange(15000, 32000)
        with contextlib.ExitStack() as bound:
            try:
                for port in range(first, first + count):
                    bound.enter_context(socket.socket()).bind(("0.0.0.0", port))
            except OSError:
                continue
            return first
