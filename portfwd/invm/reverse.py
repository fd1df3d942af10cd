"""`-control-listen`: ports of this VM that lead to the host, by the data connection that is there (spec vpnkit 7.9 [Q]).

VPNKit's forwarder has the control server of the host in it. Who asks it gets a port here, whose connections are opened as channels
towards the host: it needs a host that accepts channels, and a multiplexer, so generation 2 or 3. `in` of a port is what
the host is to dial, then. This loads aiohttp and the registry; without the flag nothing of it is imported.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from aiohttp import web

from netstack.api import Datagrams, Endpoint
from netstack.errors import ConfigError, NetstackError
from portfwd.carriers import Carriers, Destination
from portfwd.invm.data import Data
from portfwd.invm.transport import Address
from portfwd.mux.channel import Channel
from portfwd.mux.datagrams import PerClient, Published, Shared
from portfwd.mux.session import Session
from portfwd.mux.splice import Splice, reset, splice
from portfwd.registry import Registry
from portfwd.vpnkit_api import routes

WAIT_S: Final = 10.0
"""How long a connection waits for a host that opened no data connection yet."""
LOOK_S: Final = 0.1
MAX_WAITING: Final = 256
"""Connections that wait so; more are reset."""
SHUTDOWN_S: Final = 1.0
SOCKET_MODE: Final = 0o600
"""Of the control socket: who reaches it opens ports that lead to the host."""

Use = Callable[[Channel | None], None]


class ReversePlane:
    """`portfwd.carriers.DataPlane` from the VM to the host. `session()` is the multiplexer to use, `None` while there is none."""

    def __init__(self, session: Callable[[], tuple[Session, int] | None], dump: Callable[[], str]) -> None:
        self._session = session
        self._loop = asyncio.get_running_loop()
        self._dump = dump
        self._waiting: deque[tuple[float, Destination, Use]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._splices: set[Splice] = set()
        self._published: set[Published] = set()
        self.carried = 0
        self.unreached = 0

    def stream(self, target: Destination, sock: socket.socket, *, preface: bytes = b"") -> None:
        """See `DataPlane`."""

        def use(channel: Channel | None) -> None:
            if channel is None:
                self.unreached += 1
                reset(sock)
                return
            self.carried += 1
            made = splice(channel, sock, preface=preface, on_close=lambda _why: self._splices.discard(made))
            if not made.done:
                self._splices.add(made)

        self._reach(target, use)

    def datagrams(self, target: Destination, sock: socket.socket) -> Datagrams:
        """See `DataPlane`. How clients are told apart is that of the generation there is now; 3 while there is none."""
        found = self._session()
        kind = Shared if found is not None and found[1] == 2 else PerClient
        made = kind(self._reach, target, sock, self._loop, self._published.discard)
        self._published.add(made)
        return made

    def _reach(self, target: Destination, use: Use) -> None:
        found = self._session()
        if found is None and len(self._waiting) < MAX_WAITING:
            self._waiting.append((self._loop.time() + WAIT_S, target, use))
            if self._timer is None:
                self._timer = self._loop.call_later(LOOK_S, self._look)
            return
        self._open(found, target, use)

    def _open(self, found: tuple[Session, int] | None, target: Destination, use: Use) -> None:
        channel = None
        if found is not None:
            try:
                channel = found[0].open(target)
            except NetstackError:
                pass  # too many, or over by now: the client is reset
        use(channel)

    def _look(self) -> None:
        """Those who wait are served, or have waited for too long."""
        found, now = self._session(), self._loop.time()
        while self._waiting and (found is not None or self._waiting[0][0] <= now):
            _until, target, use = self._waiting.popleft()
            self._open(found, target, use)
        self._timer = self._loop.call_later(LOOK_S, self._look) if self._waiting else None

    def dump(self) -> str:
        return self._dump()

    def status(self) -> Mapping[str, Any]:
        return {"carried": self.carried, "unreached": self.unreached, "waiting": len(self._waiting)}

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for _until, _target, use in self._waiting:
            use(None)
        self._waiting.clear()
        for one in tuple(self._published):
            one.close()
        for made in tuple(self._splices):
            made.abort()


class _NoStack:
    """In the place of the stack, which is on the host: everything here goes by the plane."""

    def dial(self, guest: Endpoint, sock: socket.socket, **_more: Any) -> None:
        reset(sock)

    def datagrams(self, guest: Endpoint, sock: socket.socket, **_more: Any) -> Datagrams:
        sock.close()
        raise ConfigError(f"{guest} is on no network of this VM's forwarder")


@asynccontextmanager
async def control_server(address: Address, data: Data) -> AsyncIterator[Registry]:
    """Serve `/forwards/...` at `address`; raises `HostError`. Every port ends with it."""
    listening = address.listener(mode=SOCKET_MODE)
    plane = ReversePlane(data.session, data.mux_dump)
    registry = Registry(carriers=Carriers(lambda: bytes(4), plane=plane))
    registry.start(_NoStack(), asyncio.get_running_loop())
    app = web.Application()
    app.add_routes(routes(registry, via=lambda _address: "forwarder", dump=lambda: data.mux_dump() or None))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    try:
        await runner.setup()
        await web.SockSite(runner, listening.sock).start()
        yield registry
    finally:
        await runner.cleanup()
        listening.close()
        registry.close()
        await plane.close()
