"""The control server: HTTP on `control.sock`, and on TCP where the settings say so.

    control.sock (0600) --SO_PEERCRED--+
    tcp:127.0.0.1:PORT  --token, Host--+--> HttpServer --> Guard --> /v1, /metrics; what others mount: /forwards, /services
    accept(sock)                     --+

Who may come in: on the Unix socket the daemon's own user, root, and `allowed_uids`; on TCP whoever has the token, and without a
token whoever can reach the loopback interface. A listener beyond loopback without a token does not start.

Guests do not come in (threats G27). They reach the host's loopback by the host alias, so where there is no token each TCP
connection is compared with those that the network itself has made for its guests.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from aiohttp import web

from netstack.errors import ConfigError
from netstack.flow.records import local_end, remote_end
from netstack.link.listening import UnixSocket, peer_pid, peer_uid
from portfwd.acceptor import Acceptor
from pyvpnkit.api.guard import Guard
from pyvpnkit.api.http import IDLE_S, MAX_BODY, MAX_CONNECTIONS, HttpServer, Peer
from pyvpnkit.api.sse import EventHub
from pyvpnkit.api.streams import Streams
from pyvpnkit.api.v1 import Api
from pyvpnkit.api.world import World

log = logging.getLogger("pyvpnkit.control")

Mount = Callable[[web.Application], None]
"""Adds routes to the application, before it starts."""

MIN_TOKEN: Final = 32
"""Characters of a token: 256 bits are 43 in base64 and 64 in hexadecimal; this is the least that is no password."""
BACKLOG: Final = 1024
TELL_S: Final = 1.0
"""One line about strangers in so many seconds (threats A3)."""


class ControlServer:
    """See the module. `path` is the Unix socket, `listen` are TCP listeners as `tcp:IP:PORT`, `mounts` add further routes,
    of which `hijacked` are paths that may take their connection over (`portfwd.hijack`). `began` is when the network started
    (`time.monotonic`), for a server that is made later.

    Raises `ConfigError` at construction for what makes no sense, and from `bind` for what cannot be had.
    """

    def __init__(
        self,
        world: World,
        *,
        path: str | None = None,
        listen: Sequence[str] = (),
        token: str | None = None,
        allowed_uids: Collection[int] = (),
        mounts: Iterable[Mount] = (),
        hijacked: Collection[str] = (),
        began: float | None = None,
        max_connections: int = MAX_CONNECTIONS,
        idle_s: float = IDLE_S,
    ) -> None:
        self._world = world
        self._path = path
        self._listen = [parse_listen(text) for text in listen]
        _check_token(token, self._listen)
        self._token = token is not None
        self._allowed = frozenset(allowed_uids)
        self._hub = EventHub(world.events, world.stack.clock)
        self.streams = Streams(self._hub, world.stack.live)
        self.api = Api(world, self.streams, self.counts, time.monotonic() if began is None else began)
        self._guard = Guard(_own, token=token)
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard.middleware], logger=log)
        app.add_routes(self.api.routes())
        for mount in mounts:
            mount(app)
        self.http = self._guard.server = HttpServer(
            app, hijacked=hijacked, max_connections=max_connections, idle_s=idle_s
        )
        self._listeners: list[_Listener] = []
        self._undo = contextlib.AsyncExitStack()
        self._told_at = float("-inf")

    @property
    def addresses(self) -> list[str]:
        """Where it listens: paths, and `tcp:IP:PORT` with the real port."""
        return [listener.name for listener in self._listeners]

    def counts(self) -> Mapping[str, int]:
        """Counters, and gauges whose names begin with `open_`."""
        counters = self.http.counters
        return {
            **{name: getattr(counters, name) for name in counters.__slots__},
            "events_lost": self._hub.lost,
            "packets_lost": self.streams.packets_lost,
            "pauses": sum(listener.pauses for listener in self._listeners),
            "open_connections": len(self.http.connections),
            "open_event_streams": len(self._hub),
            "open_captures": self.streams.captures,
        }

    def bind(self) -> None:
        """Bind the sockets, if that was not done before; entering does it otherwise. Raises `ConfigError`."""
        if self._listeners:
            return
        try:
            if self._path is not None:
                unix = UnixSocket(self._path, socket.SOCK_STREAM, setting="control.socket", backlog=BACKLOG)
                self._listeners.append(_Listener(self._path, unix.sock, unix.close, self.accept))
            for address, port in self._listen:
                sock = _bound(address, port)
                name = _name(address, sock.getsockname()[1])
                self._listeners.append(_Listener(name, sock, sock.close, self.accept))
        except BaseException:
            self._close_listeners()
            raise

    async def __aenter__(self) -> ControlServer:
        self.bind()
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(self._hub.close)
            undo.callback(self._close_listeners)
            await undo.enter_async_context(self.http)
            undo.callback(self.streams.close)
            undo.callback(self.stop_accepting)
            for listener in self._listeners:
                listener.start(self.http.loop)
            self._undo = undo.pop_all()
        if self._listen and not self._token:
            doors = ", ".join(name for name in self.addresses if name != self._path)
            log.warning("control: every user of this host can use %s; set control.token_file", doors)
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._undo.aclose()

    def stop_accepting(self) -> None:
        """No new clients; those there are go on. The path stays until the end."""
        for listener in self._listeners:
            listener.stop()

    def _close_listeners(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()

    def accept(self, sock: socket.socket) -> None:
        """Serve HTTP on a stream socket that was accepted, here or by whoever found HTTP on it; owns it. Never raises.

        What comes through a Unix socket has to be a process of a user who may come in.
        """
        try:
            peer = self._peer(sock)
        except OSError:  # gone again
            peer = None
        if peer is None:
            sock.close()
        else:
            self.http.accept(sock, peer)

    def _peer(self, sock: socket.socket) -> Peer | None:
        if sock.family != socket.AF_UNIX:
            who = remote_end(sock)
            if self._token or not self._of_a_guest(sock):
                return Peer("tcp", who)
            who = f"a guest, by way of {who}"
        else:
            uid = peer_uid(sock)
            who = "an unknown user" if uid is None else f"uid {uid}{_process(sock)}"
            if uid is not None and (uid in (os.geteuid(), 0) or uid in self._allowed):
                return Peer("unix", who)
        self.http.counters.strangers += 1
        now = self.http.loop.time()
        if now - self._told_at >= TELL_S:
            self._told_at = now
            log.warning("control: %s may not come in (%d so far)", who, self.http.counters.strangers)
        return None

    def _of_a_guest(self, sock: socket.socket) -> bool:
        """Whether the other end is a socket of a flow of ours."""
        peer, port = remote_end(sock), struct.pack("!H", sock.getsockname()[1])
        # Few flows go to that port, and only those are asked for their names: a guest may have thousands of others.
        return any(
            key[-2:] == port and local_end(flow.sock) == peer for key, flow in self._world.stack.tcp.flows.items()
        )


class _Listener(Acceptor):
    """One bound socket, whose connections go to `accept`."""

    def __init__(
        self, name: str, sock: socket.socket, release: Callable[[], None], accept: Callable[[socket.socket], None]
    ) -> None:
        super().__init__(sock, lambda connection, _client: accept(connection), name)
        self.name = name
        self._release = release

    def close(self) -> None:
        self.stop()
        self._release()


def parse_listen(text: str) -> tuple[str, int]:
    """Address and port of `tcp:IP:PORT`; raises `ConfigError`."""
    scheme, _, rest = text.partition(":")
    host, colon, port = rest.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if scheme != "tcp" or not colon or not (port.isascii() and port.isdecimal()) or int(port) > 65535:
            raise ValueError
        address = ipaddress.ip_address(bare)
        if address.version == 6 and bare == host:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"control.listen: {text!r} is not of the form tcp:IP:PORT, such as tcp:127.0.0.1:8090 or tcp:[::1]:8090"
        ) from None
    return str(address), int(port)


def _check_token(token: str | None, listen: Sequence[tuple[str, int]]) -> None:
    if token is not None:
        if len(token) < MIN_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
            raise ConfigError(
                f"control.token_file: the token has to be at least {MIN_TOKEN} printable ASCII characters without blanks; "
                "make one with `openssl rand -hex 32`"
            )
        return
    for address, port in listen:
        if not ipaddress.ip_address(address).is_loopback:
            raise ConfigError(
                f"control.listen: {_name(address, port)} can be reached from other hosts, and there is no token; "
                "set control.token_file, or listen on 127.0.0.1"
            )


def _bound(address: str, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        from portfwd.holders import explain

        raise ConfigError(f"control.listen: {explain(error, 'tcp', address, port)}") from None
    return sock


def _name(address: str, port: int) -> str:
    return f"tcp:[{address}]:{port}" if ":" in address else f"tcp:{address}:{port}"


def _process(sock: socket.socket) -> str:
    pid = peer_pid(sock)
    return "" if pid is None else f" (pid {pid})"


def _own(path: str) -> bool:
    """Whether a path is one of ours, and not mounted."""
    return path.startswith("/v1/") or path in ("/v1", "/metrics")


def mount_routes(routes: Iterable[web.AbstractRouteDef]) -> Mount:
    """The mount of a list of routes."""
    held: list[Any] = list(routes)

    def mount(app: web.Application) -> None:
        app.add_routes(held)

    return mount
