"""An aiohttp application served on connections that somebody else accepted, with bounds that a client cannot lift.

    a listener, a port socket that sniffs HTTP, a guest's connection --accept(sock, peer)--> HttpServer --> application

A connection is *idle* from its beginning, and from each answer on, until the head of the next request has come; an idle one is
closed after `IDLE_S`, so a client that dribbles a head, or does not read an answer, is not kept (threats 3.5). Bodies have
`BODY_S` and `MAX_BODY` octets. There are at most `max_connections` at once; who comes then is told so and not served.

Clients that vanish are told to whoever asks (`Connection.on_lost`), because a handler that waits for something to send would
not notice otherwise. Handlers are never cancelled by a client that leaves: what a request began is done or not done (F21).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from typing import Any, Final

from aiohttp import web

log = logging.getLogger("pyvpnkit.control")

IDLE_S: Final = 10.0
"""For the head of a request (threats 3.5), and between two requests."""
BODY_S: Final = 10.0
"""For the body of a request."""
MAX_BODY: Final = 64 << 10
"""Octets of a body (threats L5)."""
MAX_CONNECTIONS: Final = 256
SHUTDOWN_S: Final = 1.0
"""For requests that are being answered when the server ends."""
_LINGER_S: Final = 2.0
"""How long the rest of a body that nobody wants is read, so that the answer is not lost in a reset."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection."""

    door: str
    """`unix`, `tcp` or `guest`: decides what is asked of a request."""
    text: str
    """For the log: `uid 1000 (pid 77)`, `127.0.0.1:4711`."""


@dataclass(slots=True)
class HttpCounters:
    """What an HTTP server counted since its start."""

    connections: int = 0
    requests: int = 0
    strangers: int = 0
    """Connections of users that may not come in."""
    too_many: int = 0
    """Connections beyond the bound."""
    timeouts: int = 0
    """Connections and bodies that took too long."""
    malformed: int = 0
    """Requests that are not HTTP, or whose body is not what it should be."""
    unauthorised: int = 0
    """Requests on TCP without the right token, `Host`, or from a browser."""
    contained: int = 0
    """Bugs of ours that ended one request; anything but 0 deserves a report."""


def json_answer(status: int, value: object, **headers: str) -> web.Response:
    """A JSON response, with a line end for people who use curl."""
    text = json.dumps(value) + "\n"
    return web.Response(status=status, text=text, content_type="application/json", headers=headers)


def complaint(status: int, message: str, **more: Any) -> web.Response:
    """An error: `{"message": ...}`."""
    return json_answer(status, {"message": message, **more})


class Connection(web.RequestHandler):
    """One client's connection."""

    def __init__(self, server: HttpServer, manager: web.Server, peer: Peer, slot: object) -> None:
        super().__init__(
            manager,
            loop=server.loop,
            keepalive_timeout=2 * server.idle_s,  # ours, which says why, is first
            access_log=None,  # type: ignore[arg-type]  # as aiohttp's own runner gives it for none
            logger=log,
            lingering_time=_LINGER_S,
            auto_decompress=False,
        )
        self.peer = peer
        self.on_lost: Callable[[], None] | None = None
        """Called when the client is gone."""
        self.audit = ""
        """What the log should say of the request that is being answered."""
        self._server = server
        self._slot = slot
        self._idle: asyncio.TimerHandle | None = None
        self._heard = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._server.connections.add(self)
        self.idle()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.busy()
        self._server.connections.discard(self)
        self._server.leave(self._slot)
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def data_received(self, data: bytes) -> None:
        self._heard = True
        super().data_received(data)

    def busy(self) -> None:
        """A request has come and is being answered."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def idle(self) -> None:
        """The next request may come, within `IDLE_S`."""
        self.busy()
        self._heard = False
        if self.transport is not None:
            self._idle = self._server.loop.call_later(self._server.idle_s, self._too_slow)

    def _too_slow(self) -> None:
        self._idle = None
        transport = self.transport
        if transport is None:
            return
        self._server.counters.timeouts += 1
        if transport.get_write_buffer_size():
            transport.abort()
            return
        if self._heard:
            words = f"the head of the request did not come within {self._server.idle_s:g} s"
            transport.write(_raw("408 Request Timeout", words))
        self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP never comes to the application; it is answered here."""
        if status >= 500:
            self._server.contain(exc)
            words = "a fault of pyvpnkit's, see its log"
        else:
            self._server.counters.malformed += 1
            words = f"not HTTP/1.1: {' '.join((message or 'unreadable').split())[:200]}"
        answer = complaint(status, words)
        answer.force_close()
        return answer


class HttpServer:
    """Serves `app`, which has not started yet; an async context manager. Leaving ends every connection.

    `hijacked` are paths whose requests may take their connection over (`portfwd.hijack`).
    """

    def __init__(
        self,
        app: web.Application,
        *,
        hijacked: Collection[str] = (),
        max_connections: int = MAX_CONNECTIONS,
        idle_s: float = IDLE_S,
    ) -> None:
        self.counters = HttpCounters()
        self.connections: set[Connection] = set()
        self.idle_s = idle_s
        self.loop: asyncio.AbstractEventLoop
        self._app = app
        app.middlewares.insert(0, self._timing())
        self._hijacked = frozenset(hijacked)
        self._max = max_connections
        self._runner: web.AppRunner | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._slots: set[object] = set()
        """One for each connection that there is or that is being set up."""
        self._told: set[str] = set()

    async def __aenter__(self) -> HttpServer:
        self.loop = asyncio.get_running_loop()
        # `handler_cancellation` stays off: see the module.
        self._runner = web.AppRunner(self._app, access_log=None, shutdown_timeout=SHUTDOWN_S)
        await self._runner.setup()
        return self

    async def __aexit__(self, *_error: object) -> None:
        runner, self._runner = self._runner, None
        for task in tuple(self._starting):
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        if runner is not None:
            await runner.cleanup()
        for connection in tuple(self.connections):
            if connection.transport is not None:
                connection.transport.abort()

    def accept(self, sock: socket.socket, peer: Peer) -> None:
        """Serve a connected stream socket, and own it from here on. Never raises."""
        runner = self._runner
        if runner is None or runner.server is None:
            sock.close()
            return
        self.counters.connections += 1
        if len(self._slots) >= self._max:
            self.counters.too_many += 1
            words = f"{self._max} connections are open already; close some and try again"
            with contextlib.suppress(OSError):
                sock.setblocking(False)
                sock.send(_raw("429 Too Many Requests", words))
            sock.close()
            return
        slot = object()
        self._slots.add(slot)
        task = self.loop.create_task(self._start(sock, peer, runner.server, slot))
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)

    def _timing(self) -> Any:
        """A middleware that tells connections when they are idle."""

        @web.middleware
        async def timing(
            request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
        ) -> web.StreamResponse:
            connection = connection_of(request)
            connection.busy()
            connection.audit = ""
            self.counters.requests += 1
            try:
                return await handler(request)
            finally:
                connection.idle()

        return timing

    def leave(self, slot: object) -> None:
        """A connection has ended, or did not come about; harmless when repeated."""
        self._slots.discard(slot)

    async def _start(self, sock: socket.socket, peer: Peer, manager: web.Server, slot: object) -> None:
        try:
            sock.setblocking(False)
            await self.loop.connect_accepted_socket(self._protocol(manager, peer, slot), sock)
        except (OSError, ValueError):  # gone again
            self.leave(slot)
            sock.close()
        except asyncio.CancelledError:
            self.leave(slot)
            sock.close()
            raise

    def _protocol(self, manager: web.Server, peer: Peer, slot: object) -> Callable[[], asyncio.BaseProtocol]:
        def make() -> Connection:
            return Connection(self, manager, peer, slot)

        if not self._hijacked:
            return make
        from portfwd.hijack import Doorway

        return Doorway(make, self._hijacked)

    def contain(self, error: BaseException | None) -> None:
        """A bug of ours ended one request: counted, and told once for each kind."""
        self.counters.contained += 1
        kind = repr(error)
        if kind not in self._told and len(self._told) < 64:
            self._told.add(kind)
            log.error("control: contained to one request: %s", kind, exc_info=error)


def connection_of(request: web.Request) -> Connection:
    """The connection a request came on."""
    protocol = request.protocol
    assert isinstance(protocol, Connection)
    return protocol


def _raw(status: str, message: str) -> bytes:
    """A whole answer, where there is no request to answer."""
    body = json.dumps({"message": message}) + "\n"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()
