"""The HTTP proxy of one network: what it is told, and which guests' connections it takes (spec vpnkit 6).

    a file, followed ----+                       gateway:3128   explicit, by the `http` upstream
    POST /http_proxy.json+--> Config  --------->  gateway:3129   explicit, by the `https` upstream
    settings, environment+      |  none: nobody   port 80 ...    intercepted if `http` is set
                                |  listens        port 443 ...   intercepted if `https` is set

What a file says goes before the settings, and those before the environment; what is posted holds until the file changes or is
read again. A file that is not there, cannot be read, or is no JSON says nothing (as VPNKit's), and the log says why; one whose
fields are wrong changes nothing. Requests that are on their way go on as they began.

Bounds: `max_connections` of guests in all and `max_per_guest` of one; who is too many is closed on arrival and counted. Each
holds two buffers of 64 KiB and a head of 32 KiB at most, and one connection to the outside.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, Protocol

from netstack.api import Endpoint, Intercept, SocketHandler
from netstack.errors import ConfigError
from netstack.policy.egress import Egress
from netstack.settings import Network
from portfwd.watch import EVERY_S, Content, FileWatch
from pyvpnkit.proxy.config import Config, NotJson, Upstream
from pyvpnkit.proxy.connect import Sockets
from pyvpnkit.proxy.conversation import IDLE_S, Conversation
from pyvpnkit.proxy.origin import Outside, Resolve
from pyvpnkit.proxy.relay import Relay
from pyvpnkit.proxy.through import pass_through

log = logging.getLogger("pyvpnkit.proxy")

HTTP_PROXY_PORT: Final = 3128
HTTPS_PROXY_PORT: Final = 3129
MAX_CONNECTIONS: Final = 2048
MAX_PER_GUEST: Final = 512


class ProxiedStack(Protocol):
    """What of a stack (`netstack.stack.Stack`) is used."""

    @property
    def egress(self) -> Egress: ...

    @property
    def io(self) -> Sockets: ...

    def serve_sockets(self, address: bytes, port: int, handler: SocketHandler) -> None: ...

    def stop_serving(self, address: bytes, port: int) -> None: ...

    def intercept(self, ask: Intercept | None) -> None: ...


class HttpProxy:
    """See the module. From one event loop: `start`, `reload`, `post`, `close`.

    `path` is the file; `settings` a document in the form of the file, as the settings have it; `environment` variables of the
    host, where they are wanted. Raises `ConfigError` at construction for settings that make no sense.
    """

    def __init__(
        self,
        stack: ProxiedStack,
        network: Network,
        *,
        path: str | None = None,
        settings: Mapping[str, Any] | None = None,
        environment: Mapping[str, str] | None = None,
        resolve: Resolve | None = None,
        every_s: float = EVERY_S,
        idle_s: float = IDLE_S,
        max_connections: int = MAX_CONNECTIONS,
        max_per_guest: int = MAX_PER_GUEST,
    ) -> None:
        self.outside = Outside(network, stack.egress, stack.io, resolve=resolve)
        self.idle_s = idle_s
        self.counters: Counter[str] = Counter()
        """Requests, tunnels, refusals by status, connections turned away."""
        self.problem = ""
        """Why the file is not what holds now; nothing when it is."""
        self._stack = stack
        self._gateway = network.gateway_bytes
        self._max = max_connections
        self._max_per_guest = max_per_guest
        self._base = self._from_settings(settings, environment)
        self._config: Config | None = None
        self._path = path or ""
        self._every_s = every_s
        self._watch: FileWatch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._open: Counter[bytes] = Counter()
        """Connections by guest."""
        self._told: set[str] = set()

    @staticmethod
    def _from_settings(settings: Mapping[str, Any] | None, environment: Mapping[str, str] | None) -> Config | None:
        found = None
        try:
            if environment is not None:
                found = Config.from_environment(environment)
        except ConfigError as error:
            raise ConfigError(f"proxy variables of the environment: {error}") from None
        if settings is not None:
            merged = {} if found is None else found.document()
            found = Config.of(merged | {name: value for name, value in settings.items() if value is not None})
        return found

    def start(self) -> None:
        """What the settings and the file say holds when this returns."""
        self._use(self._base)
        self._follow()

    def _follow(self) -> None:
        if self._path:
            self._watch = FileWatch(self._path, self._changed, every_s=self._every_s)
            self._watch.start(asyncio.get_running_loop())

    def reload(self, settings: Mapping[str, Any] | None = None, environment: Mapping[str, str] | None = None) -> None:
        """Have these settings, and read the file again: what was posted holds no longer. `ConfigError` changes nothing."""
        self._base = self._from_settings(settings, environment)
        if self._watch is not None:
            self._watch.close()
        self._use(self._base)
        self._follow()

    async def close(self) -> None:
        """Take no more connections and end those there are."""
        if self._watch is not None:
            self._watch.close()
        self._use(None)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for `_over` of each

    # What it is told.

    @property
    def config(self) -> Config | None:
        """What holds now; `None`: there is no proxy."""
        return self._config

    def document(self) -> dict[str, object] | None:
        """What holds now as VPNKit's document, credentials and all: for the host's own users."""
        return None if self._config is None else self._config.document()

    def post(self, body: bytes) -> None:
        """Have what this document says, until the file changes. Raises `ConfigError` and changes nothing."""
        self._use(Config.decode(body))

    def _changed(self, content: Content) -> None:
        self.problem = ""
        if content is None:
            self._use(self._base)
            return
        try:
            if isinstance(content, OSError):
                raise NotJson(f"cannot be read: {content.strerror or content}")
            self._use(Config.decode(content))
        except NotJson as error:
            self.problem = str(error)
            log.error("http proxy: %s: %s; it says nothing", self._path, error)
            self._use(self._base)
        except ConfigError as error:
            self.problem = str(error)
            log.error("http proxy: %s: %s; what held before holds on", self._path, error)

    def _use(self, config: Config | None) -> None:
        before, self._config = self._config, config
        if config == before:
            return
        log.info("http proxy: %s", config if config is not None else "off")
        stack, gateway = self._stack, self._gateway
        if config is None:
            stack.stop_serving(gateway, HTTP_PROXY_PORT)
            stack.stop_serving(gateway, HTTPS_PROXY_PORT)
        elif before is None:
            stack.serve_sockets(gateway, HTTP_PROXY_PORT, self._explicit("http"))
            stack.serve_sockets(gateway, HTTPS_PROXY_PORT, self._explicit("https"))
        wanted = config is not None and (config.http is not None or config.https is not None)
        stack.intercept(self._intercept if wanted else None)

    # Guests' connections.

    def _explicit(self, scheme: str) -> SocketHandler:
        return lambda sock, source: self._serve(sock, source, lambda: Conversation(self, sock, None, scheme).run())

    def _intercept(self, destination: Endpoint) -> SocketHandler | None:
        """Who serves a guest's connection to `destination`, if it is not to go its own way."""
        config = self._config
        if config is None:
            return None
        port = destination.port
        if config.http is not None and port in config.http_ports:
            # Where names are to be allowed or not, a request is looked at wherever it goes.
            if not config.allow_enabled and config.exclude.matches(destination.text, port):
                return None
            return lambda sock, source: self._serve(
                sock, source, lambda: Conversation(self, sock, destination, "http").run()
            )
        upstream = config.https
        if upstream is None or port not in config.https_ports or config.exclude.matches(destination.text, port):
            return None
        return self._through(destination, upstream)

    def _through(self, destination: Endpoint, upstream: Upstream) -> SocketHandler:
        return lambda sock, source: self._serve(sock, source, lambda: pass_through(self, sock, destination, upstream))

    @property
    def connections(self) -> int:
        """Of guests, at this moment."""
        return self._open.total()

    def _serve(self, sock: socket.socket, source: Endpoint, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Own a guest's connection."""
        guest = source.address
        if self._open[guest] >= self._max_per_guest or self._open.total() >= self._max:
            self.counters["turned_away"] += 1
            if not self._open[guest]:
                del self._open[guest]
            sock.close()
            return
        self._open[guest] += 1
        task = asyncio.get_running_loop().create_task(self._run(work))
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._over(task, sock, guest))

    def _over(self, task: asyncio.Task[None], sock: socket.socket, guest: bytes) -> None:
        """A connection has ended, perhaps before its task ever ran."""
        self._tasks.discard(task)
        sock.close()
        self._open[guest] -= 1
        if self._open[guest] <= 0:
            del self._open[guest]  # or the table would grow with every address that ever asked

    async def _run(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await work()
        except Exception as error:  # contained: this connection
            self.counters["contained"] += 1
            name = f"{type(error).__name__}: {error}"
            if name not in self._told and len(self._told) < 64:
                self._told.add(name)
                log.error("contained: http proxy: %s", name, exc_info=error)

    async def relay(self, relay: Relay) -> None:
        """Run it, and count what it carried."""
        try:
            await relay.run()
        finally:
            outbound, inbound = relay.octets
            self.counters["tunnel_octets_outbound"] += outbound
            self.counters["tunnel_octets_inbound"] += inbound
