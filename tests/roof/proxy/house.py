"""A proxy in front of servers on loopback, and guests that are one end of a socket pair."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from netstack.api import Endpoint, Intercept, SocketHandler
from netstack.host.io import native_io
from netstack.policy.egress import Deny, Egress
from netstack.settings import Network
from pyvpnkit.proxy.service import HttpProxy

GUEST = Endpoint.of("192.168.65.3", 40000)
GATEWAY = "192.168.65.1"
LIMIT_S = 20.0

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Client:
    """A guest's end of a connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = bytearray()

    async def send(self, octets: bytes | str) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, octets.encode() if isinstance(octets, str) else octets)

    async def _more(self) -> bool:
        async with asyncio.timeout(LIMIT_S):
            octets = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
        self._received += octets
        return bool(octets)

    async def until(self, mark: bytes) -> bytes:
        while mark not in self._received:
            assert await self._more(), f"the end came before {mark!r}: {bytes(self._received)!r}"
        return self._take(self._received.index(mark) + len(mark))

    def _take(self, octets: int) -> bytes:
        found = bytes(self._received[:octets])
        del self._received[:octets]
        return found

    async def exactly(self, octets: int) -> bytes:
        while len(self._received) < octets:
            assert await self._more(), (
                f"the end came after {len(self._received)} of {octets}: {bytes(self._received[:200])!r}"
            )
        return self._take(octets)

    async def rest(self) -> bytes:
        """All until the end."""
        while await self._more():
            pass
        return self._take(len(self._received))

    async def answer(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer, whose end must be marked."""
        head = (await self.until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        status = int(head[0].split()[1])
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:] if line)}
        body = b""
        if method == "HEAD" or status in (204, 304) or status < 200:
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while size := int(await self.until(b"\r\n"), 16):
                body += await self.exactly(size)
                await self.until(b"\r\n")
            await self.until(b"\r\n")
        elif "content-length" in headers:
            body = await self.exactly(int(headers["content-length"]))
        return status, headers, body

    async def ask(self, *lines: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)
        return await self.answer(lines[0].split()[0])

    def close(self) -> None:
        self.sock.close()


class House:
    """Stands where the stack will: real policy and sockets, and connections of a guest that a test makes."""

    def __init__(self, **settings: Any) -> None:
        self.network = Network(**({"allow": ("127.0.0.0/8",)} | settings))
        self.egress = Egress(self.network)
        self.io = native_io(0)
        self.services: dict[tuple[bytes, int], SocketHandler] = {}
        self.names: dict[str, Sequence[str]] = {}
        """What the host's resolver knows."""
        self.asked: list[str] = []
        self.port = 0
        """Of a server on the host that guests must not get to."""
        self.proxy: HttpProxy
        self._intercept: Intercept | None = None
        self._clients: list[Client] = []

    def serve_sockets(self, address: bytes, port: int, handler: SocketHandler) -> None:
        self.services[address, port] = handler

    def stop_serving(self, address: bytes, port: int) -> None:
        self.services.pop((address, port), None)

    def intercept(self, ask: Intercept | None) -> None:
        self._intercept = ask

    async def resolve(self, name: str) -> Sequence[bytes]:
        self.asked.append(name)
        if name not in self.names:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return [Endpoint.of(text, 0).address for text in self.names[name]]

    def handler(self, address: str, port: int) -> SocketHandler | None:
        """Who serves a guest's connection there; `None`: it goes its own way, or is refused."""
        where = Endpoint.of(address, port)
        service = self.services.get((where.address, port))
        if service is not None or self._intercept is None:
            return service
        if isinstance(self.egress.decide(6, where.address, port), Deny):
            return None
        return self._intercept(where)

    def connect(self, port: int = 3128, address: str = GATEWAY, guest: Endpoint = GUEST) -> Client:
        handler = self.handler(address, port)
        assert handler is not None, f"nobody serves {address}:{port}"
        mine, other = socket.socketpair()
        for sock in (mine, other):
            sock.setblocking(False)
        handler(other, guest)
        self._clients.append(Client(mine))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.close()
        self.io.close()


Servers = Callable[[Script], Awaitable[int]]
Make = Callable[..., HttpProxy]


def echo(seen: list[bytes], *more: bytes) -> Script:
    """A server that keeps each head it reads in `seen` and answers with the body it got."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            seen.append(head)
            body = b""
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    body = await reader.readexactly(int(line.split(b":")[1]))
            lines: Iterable[bytes] = (b"HTTP/1.1 200 OK", b"Content-Length: %d" % len(body), *more, b"", b"")
            writer.write(b"\r\n".join(lines) + (b"" if head.startswith(b"HEAD") else body))
            await writer.drain()

    return script


def head_of(octets: bytes) -> tuple[str, dict[str, list[str]]]:
    """The first line, and the headers by their names in lower case."""
    first, *lines = octets.decode("latin-1").rstrip("\r\n").split("\r\n")
    found: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        found.setdefault(name.lower(), []).append(value.strip())
    return first, found
