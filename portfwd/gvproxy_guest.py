"""What a guest may ask of the gateway over HTTP: gvproxy's `/services/forwarder/{all,expose,unexpose}` and nothing else.

podman in a machine depends on it (`http://gateway.containers.internal/services/forwarder/expose`). There is no authentication
but the address of the guest, so a request is its guest's by the connection it came on (`netstack.api.Services.serve_sockets`).

Bounds: `MAX_CONNECTIONS` in all and `MAX_PER_GUEST` of one guest, of which a new one takes the place of nobody: it is closed on
arrival; a connection on which nothing comes for `IDLE_S` is closed; bodies of at most `MAX_BODY` octets.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from typing import Any, Final

from aiohttp import web

from netstack.api import Endpoint
from portfwd.bodies import BadBody
from portfwd.gvproxy_api import forwarder_routes, not_found
from portfwd.gvproxy_forwards import Forwards
from portfwd.hijack import Between, Factory

log = logging.getLogger("pyvpnkit.portfwd")

MAX_CONNECTIONS: Final = 128
MAX_PER_GUEST: Final = 8
MAX_BODY: Final = 16 * 1024
IDLE_S: Final = 10.0
"""As gvproxy's server."""


class _Connection(Between):
    """One connection of a guest: remembers whose it is, and ends when nothing comes."""

    def __init__(self, door: GuestDoor, server: Factory, source: Endpoint) -> None:
        super().__init__(server())
        self.source = source
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._transport: Any = None
        self._heard = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._door.made(self)
        super().connection_made(transport)
        self._timer = self._loop.call_later(self._door.idle_s, self._look)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._door.lost(self)
        super().connection_lost(exc)

    def _look(self) -> None:
        left = self._heard + self._door.idle_s - self._loop.time()
        if left <= 0:
            self._transport.abort()
        else:
            self._timer = self._loop.call_later(left, self._look)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


class GuestDoor:
    """The server behind gateway:80. `serve` is a `netstack.api.SocketHandler`; used from one event loop, `start`ed first."""

    def __init__(
        self,
        forwards: Forwards,
        *,
        max_connections: int = MAX_CONNECTIONS,
        max_per_guest: int = MAX_PER_GUEST,
        idle_s: float = IDLE_S,
    ) -> None:
        self.idle_s = idle_s
        self.refused = 0
        """Connections closed on arrival because there were too many."""
        self._max = max_connections
        self._max_per_guest = max_per_guest
        app = web.Application(client_max_size=MAX_BODY)
        app.add_routes(forwarder_routes(forwards, _asking, MAX_BODY))
        app.router.add_route("*", "/{rest:.*}", not_found)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        self._server: Factory | None = None
        self._open: Counter[bytes] = Counter()
        """Connections by guest, those on their way into the loop too."""
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._runner.setup()
        self._server = self._runner.server

    async def close(self) -> None:
        """End every connection."""
        self._server = None
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for connection in tuple(self._connections):
            connection.abort()
        await self._runner.cleanup()

    @property
    def connections(self) -> int:
        """Open at this moment."""
        return self._open.total()

    def serve(self, sock: socket.socket, source: Endpoint) -> None:
        """Own a guest's connection; `source` is its end."""
        guest = source.address
        if self._server is None or self._open[guest] >= self._max_per_guest or self._open.total() >= self._max:
            self.refused += 1
            sock.close()
            return
        self._open[guest] += 1
        task = asyncio.get_running_loop().create_task(self._take(sock, source, self._server))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _take(self, sock: socket.socket, source: Endpoint, server: Factory) -> None:
        made: list[_Connection] = []

        def factory() -> _Connection:
            made.append(_Connection(self, server, source))
            return made[0]

        try:
            await asyncio.get_running_loop().connect_accepted_socket(factory, sock)
        except (OSError, asyncio.CancelledError) as error:
            if not made or made[0] not in self._connections:
                self._less(source.address)
                sock.close()
            if isinstance(error, asyncio.CancelledError):
                raise
            log.debug("gateway: a connection of %s could not be served: %s", source, error)

    def made(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def lost(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.discard(connection)
            self._less(connection.source.address)

    def _less(self, guest: bytes) -> None:
        self._open[guest] -= 1
        if self._open[guest] <= 0:
            del self._open[guest]  # or the table would grow with every address that ever asked


def _asking(request: web.Request) -> Endpoint:
    transport = request.transport
    connection: Any = None if transport is None else transport.get_protocol()
    if not isinstance(connection, _Connection):  # it went away while its body was read
        raise BadBody("the connection is gone")
    return connection.source
