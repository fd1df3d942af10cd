"""aiohttp's server on a Unix socket, as the control server runs it, and a client that sees every octet of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
from collections.abc import AsyncIterator, Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from netstack.api import Datagrams
from portfwd.carriers import Carriers, Destination
from portfwd.hijack import Doorway
from portfwd.registry import Registry

LIMIT_S = 20.0
GUEST = bytes((192, 168, 65, 3))
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Answer:
    status: int
    reason: str
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


async def read_answer(reader: asyncio.StreamReader, method: str = "GET") -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, status, reason = head[0].split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
    length = int(headers.get("content-length", "0"))
    body = await reader.readexactly(length if method != "HEAD" else 0)
    return Answer(int(status), reason, headers, body)


async def call(
    path: Path | str,
    method: str,
    target: str,
    body: bytes | str | Mapping[str, Any] | list[Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own; a mapping or list is sent as JSON with its content type."""
    async with asyncio.timeout(LIMIT_S):
        reader, writer = await asyncio.open_unix_connection(str(path))
        try:
            writer.write(request(method, target, body, headers))
            return await read_answer(reader, method)
        finally:
            writer.close()
            await writer.wait_closed()


def request(
    method: str,
    target: str,
    body: bytes | str | Mapping[str, Any] | list[Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> bytes:
    said = {"Host": "unix", **(headers or {})}
    if isinstance(body, Mapping | list):
        said = {**JSON, **said}
        body = json.dumps(body)
    octets = body.encode() if isinstance(body, str) else body or b""
    if body is not None and "Transfer-Encoding" not in said:
        said.setdefault("Content-Length", str(len(octets)))
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    return "\r\n".join([*lines, "", ""]).encode() + octets


@contextlib.asynccontextmanager
async def serving(
    path: Path, routes: Iterable[web.RouteDef], hijacked: Container[str] = frozenset()
) -> AsyncIterator[web.AppRunner]:
    """The routes on a Unix socket."""
    app = web.Application()
    app.add_routes(routes)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None
    listener = await asyncio.get_running_loop().create_unix_server(Doorway(runner.server, hijacked), str(path))
    try:
        yield runner
    finally:
        listener.close()
        await runner.cleanup()
        await asyncio.sleep(0)  # transports close in the loop's next turn


@dataclass
class Plane:
    """Stands where the way to VPNKit's forwarder is."""

    streams: list[tuple[Destination, Any]] = field(default_factory=list)

    def stream(self, target: Destination, sock: Any, *, preface: bytes = b"") -> None:
        self.streams.append((target, sock))

    def datagrams(self, target: Destination, sock: Any) -> Datagrams:
        self.streams.append((target, sock))
        lent: Datagrams = sock
        return lent

    def dump(self) -> str:
        return ""

    def status(self) -> Mapping[str, Any]:
        return {}

    async def close(self) -> None:
        for _, sock in self.streams:
            sock.close()


@dataclass
class Guests:
    """Stands where the stack is."""

    dialled: list[tuple[str, Any]] = field(default_factory=list)

    def dial(self, guest: Any, sock: Any, *, source: Any = None, on_close: Any = None, preface: bytes = b"") -> None:
        self.dialled.append((str(guest), sock))

    def datagrams(self, guest: Any, sock: Any, *, show_client: bool = False) -> Any:
        self.dialled.append((str(guest), sock))
        return sock

    def close(self) -> None:
        for _, sock in self.dialled:
            sock.close()


@dataclass
class House:
    """A registry and the two ways out of it."""

    registry: Registry
    plane: Plane
    guests: Guests


@contextlib.asynccontextmanager
async def house(**options: Any) -> AsyncIterator[House]:
    plane, guests = Plane(), Guests()
    registry = Registry(carriers=Carriers(lambda: GUEST, plane=plane), **options)
    registry.start(guests, asyncio.get_running_loop())
    try:
        yield House(registry, plane, guests)
    finally:
        registry.close()
        await plane.close()
        guests.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.002)


def free_port(count: int = 1) -> int:
    """The first of so many consecutive ports that nobody has, below those that kernels hand out by themselves."""
    rng = random.SystemRandom()
    while True:
        first = rng.randrange(15000, 32000)
        with contextlib.ExitStack() as bound:
            try:
                for port in range(first, first + count):
                    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                        bound.enter_context(socket.socket(socket.AF_INET, kind)).bind(("0.0.0.0", port))
            except OSError:
                continue
            return first
