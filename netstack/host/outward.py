"""The ways out of one network as its owner holds them: rules from settings, names of proxies, connections of our own services.

Theory of operation. `start` hands the rules to the stack before any guest can open a connection. A proxy given by name is
resolved by the host (`getaddrinfo`, in a thread for each, for it may hang), at the start and at `refresh`, again when it
could not be connected to, and every `RETRY_S` while it has no address; until then its guests wait, and get no other way
unless told so (`fail: open`). An answer that fails leaves the addresses known before.

`connect` is for services of ours that connect in place of a guest (DNS over TCP, the HTTP proxy): the same rules, the same
exchange, a socket in the end.

Bounds: one thread and one timer for each proxy that a rule names.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

from netstack.api import Endpoint, Way, WayOutRule
from netstack.errors import ConfigError, HostError
from netstack.host.handshake import LOOK
from netstack.host.tcp_forwards import prepare
from netstack.host.ways_out import ATTEMPT_S, CONNECTED, IN_PROGRESS, Upstream, Upstreams, Where, exchange, numeric
from netstack.policy.names import NamesOf
from netstack.policy.ways_out import MAX_RULES, Outward, Ways, parse

log = logging.getLogger("pyvpnkit")

RETRY_S: Final = 5.0
"""A proxy's name that could not be resolved is asked for again after this."""
PAUSE_S: Final = 1.0
"""Between two questions for one name, however many connections fail meanwhile."""
TELL_S: Final = 60.0
"""Between two lines in the log about one proxy that is down."""
FAIL: Final = ("closed", "open")
DATAGRAMS: Final = ("auto", "refuse", "direct")


class Exits(Protocol):
    """What of a stack is needed here."""

    @property
    def ways_out(self) -> Ways: ...

    @property
    def upstreams(self) -> Upstreams: ...

    def go_out(self, rules: Sequence[WayOutRule], *, fail_open: bool = False, datagrams: bool = False) -> None: ...


Resolve = Callable[[str], Sequence[str]]
"""The numeric addresses of a host's name, the best first. May block; raises `OSError`."""


def resolve(host: str) -> Sequence[str]:
    """By the host's own resolver."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return [str(address[0]) for _, _, _, _, address in found]


class WaysOut:
    """See the module. `rules` as `netstack.policy.ways_out.parse` has them; `fail` and `datagrams` are one of `FAIL`, `DATAGRAMS`.

    Datagrams and pings where a rule names a proxy: `auto` refuses them where `fail` is `closed`. Raises `ConfigError`. From the
    event loop's thread.
    """

    def __init__(
        self,
        stack: Exits,
        rules: Sequence[str] = (),
        *,
        fail: str = "closed",
        datagrams: str = "auto",
        names: NamesOf | None = None,
        connect_s: float = 127.0,
        resolve: Resolve = resolve,
    ) -> None:
        self._stack = stack
        self._rules = compiled(rules, fail, datagrams)
        self._fail = fail
        self._datagrams = datagrams
        self._connect_s = connect_s
        self._resolve = resolve
        self._loop: asyncio.AbstractEventLoop | None = None
        self._asked_at: dict[Upstream, float] = {}
        self._retries: dict[Upstream, asyncio.TimerHandle] = {}
        self._told_at: dict[Upstream, float] = {}
        self._stale: set[Upstream] = set()
        """Their look-up began before the host's network changed."""
        self._looked = asyncio.Event()
        """Set, and replaced, each time a look-up has ended."""
        if names is not None:
            stack.ways_out.names = names

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on the rules hold."""
        self._loop = loop
        self._stack.upstreams.on_unreachable = self._unreachable
        self._install()

    def replace(self, rules: Sequence[str], *, fail: str = "closed", datagrams: str = "auto") -> None:
        """Have these rules for new connections; those that exist go on. Raises `ConfigError`, and those before hold on."""
        self._rules = compiled(rules, fail, datagrams)
        self._fail = fail
        self._datagrams = datagrams
        if self._loop is not None:
            self._install()

    def refresh(self) -> None:
        """The host's network has changed: the names of proxies may have moved."""
        self._asked_at.clear()
        for upstream in self._stack.upstreams.all():
            if upstream.resolving:
                self._stale.add(upstream)
            self._ask(upstream)

    def close(self) -> None:
        """Ask no more; the rules hold on, so that nothing goes around them while the network ends."""
        self._loop = None
        self._stack.upstreams.on_unreachable = lambda upstream: None
        for handle in self._retries.values():
            handle.cancel()
        self._retries.clear()
        self._wake()

    def status(self) -> dict[str, Any]:
        """For people and the control API; without credentials."""
        return {
            "fail": self._fail,
            "datagrams": self._datagrams,
            "rules": [str(rule) for rule in self._rules],
            "proxies": [
                {
                    "proxy": str(upstream.proxy),
                    "addresses": [where[0] for _family, where in upstream.addresses],
                    "resolving": upstream.resolving,
                    "carried": upstream.carried,
                    "refused": upstream.refused,
                    "failed": upstream.failed,
                    "last_error": upstream.last_error,
                }
                for upstream in self._stack.upstreams.all()
            ],
        }

    def _install(self) -> None:
        datagrams = self._datagrams == "direct" or (self._datagrams == "auto" and self._fail == "open")
        self._stack.go_out(self._rules, fail_open=self._fail == "open", datagrams=datagrams)
        current = self._stack.upstreams.all()
        for gone in self._retries.keys() - set(current):
            self._retries.pop(gone).cancel()
        for table in (self._asked_at, self._told_at):
            for gone in table.keys() - set(current):
                del table[gone]
        self._stale.intersection_update(current)
        for upstream in current:
            if not upstream.addresses:
                self._ask(upstream)

    def _unreachable(self, upstream: Upstream) -> None:
        """No address of a proxy took a connection, or it has none."""
        now = time.monotonic()
        if now - self._told_at.get(upstream, -TELL_S) >= TELL_S:
            self._told_at[upstream] = now
            then = "connections go directly" if self._fail == "open" else "connections fail"
            log.warning("way out %s: %s; %s", upstream.proxy, upstream.last_error or "it does not answer", then)
        self._ask(upstream)

    # Names of proxies.

    def _ask(self, upstream: Upstream) -> None:
        """Ask for the addresses of a proxy's name, unless that was done a moment ago."""
        loop = self._loop
        now = time.monotonic()
        if loop is None or upstream.resolving or numeric(upstream.proxy.host):
            return
        if now - self._asked_at.get(upstream, -PAUSE_S) < PAUSE_S:
            return
        self._asked_at[upstream] = now
        if upstream in self._retries:
            self._retries.pop(upstream).cancel()
        upstream.resolving = True
        threading.Thread(target=self._look_up, args=(loop, upstream), name="way-out-name", daemon=True).start()

    def _look_up(self, loop: asyncio.AbstractEventLoop, upstream: Upstream) -> None:
        """In a thread of its own."""
        found: Sequence[str] = ()
        words = ""
        try:
            found = self._resolve(upstream.proxy.host)
        except (OSError, UnicodeError) as error:
            words = (error.strerror if isinstance(error, OSError) else None) or str(error)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._looked_up, upstream, found, words)

    def _looked_up(self, upstream: Upstream, found: Sequence[str], words: str) -> None:
        upstream.resolving = False
        if found:
            upstream.use(found)
        self._wake()
        if upstream in self._stale:
            self._stale.discard(upstream)
            self._asked_at.pop(upstream, None)
            self._ask(upstream)
            return
        if found:
            return
        upstream.last_error = f"its name is not resolved: {words or 'no address'}"
        if self._loop is not None and not upstream.addresses and upstream in self._stack.upstreams.all():
            self._retries[upstream] = self._loop.call_later(RETRY_S, self._again, upstream)

    def _wake(self) -> None:
        self._looked.set()
        self._looked = asyncio.Event()

    def _again(self, upstream: Upstream) -> None:
        self._retries.pop(upstream, None)
        self._ask(upstream)

    # Connections of our own.

    async def connect(self, endpoint: Endpoint, name: str | None = None) -> socket.socket:
        """A connected, non-blocking socket to `endpoint` by the way that guests have; `name` is what the asker knows it by.

        What the other end says first waits in the socket. Raises `HostError`, for a refusal and for the time that all may take.
        """
        way = self._stack.ways_out.find(endpoint, name or "")
        if way is Way.REFUSE:
            raise HostError(f"{endpoint}: a way-out rule refuses it")
        try:
            async with asyncio.timeout(self._connect_s):
                if isinstance(way, Way):
                    return await _connect(_where(endpoint))
                return await self._outward(way)
        except TimeoutError:
            raise HostError(f"{endpoint}: no connection within {self._connect_s:g} s") from None
        except OSError as error:
            raise HostError(f"{endpoint}: {error.strerror or error}") from None

    async def _outward(self, outward: Outward) -> socket.socket:
        upstream = self._stack.upstreams.of(outward.proxy)
        fail_open = self._stack.ways_out.fail_open
        words = "its name is not resolved"
        for where in await self._addresses(upstream):
            try:
                async with asyncio.timeout(ATTEMPT_S if fail_open or len(upstream.addresses) > 1 else None):
                    sock = await _connect(where)
            except (OSError, TimeoutError) as error:
                words = "it cannot be connected to" if isinstance(error, TimeoutError) else error.strerror or str(error)
                continue
            try:
                await _converse(sock, outward)
            except BaseException as error:
                sock.close()
                upstream.failed += 1
                if isinstance(error, HostError | OSError):
                    upstream.last_error = error.strerror or str(error) if isinstance(error, OSError) else str(error)
                    raise HostError(f"way out {upstream.proxy}: {upstream.last_error}") from None
                raise
            upstream.carried += 1
            return sock
        upstream.failed += 1
        upstream.last_error = words
        self._unreachable(upstream)
        if fail_open:
            return await _connect(_where(outward.endpoint))
        raise HostError(f"way out {upstream.proxy}: {words}")

    async def _addresses(self, upstream: Upstream) -> Sequence[Where]:
        if not upstream.addresses:
            self._ask(upstream)
        while self._loop is not None and upstream.resolving and not upstream.addresses:
            await self._looked.wait()
        return upstream.addresses


def compiled(rules: Sequence[str], fail: str, datagrams: str) -> tuple[WayOutRule, ...]:
    """The rules, all settings checked. Raises `ConfigError`."""
    if fail not in FAIL:
        raise ConfigError(f"way_out_fail: {fail!r}; write closed or open")
    if datagrams not in DATAGRAMS:
        raise ConfigError(f"way_out_udp: {datagrams!r}; write auto, refuse or direct")
    if len(rules) > MAX_RULES:
        raise ConfigError(f"way_out: {len(rules)} rules; at most {MAX_RULES}")
    return tuple(map(parse, rules))


def _where(endpoint: Endpoint) -> Where:
    family = socket.AF_INET if len(endpoint.address) == 4 else socket.AF_INET6
    return family, (endpoint.text, endpoint.port)


async def _wait(sock: socket.socket, *, write: bool) -> None:
    """Until the socket is ready."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    add, remove = (loop.add_writer, loop.remove_writer) if write else (loop.add_reader, loop.remove_reader)
    add(sock.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        remove(sock.fileno())


async def _connect(where: Where) -> socket.socket:
    """Raises `OSError`."""
    family, address = where
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        prepare(sock)
        number = sock.connect_ex(address)
        if number in IN_PROGRESS:
            await _wait(sock, write=True)
            number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number not in CONNECTED:
            raise OSError(number, os.strerror(number))
        if sock.getsockname()[:2] == sock.getpeername()[:2]:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))  # it has met itself
    except BaseException:
        sock.close()
        raise
    return sock


async def _converse(sock: socket.socket, outward: Outward) -> None:
    """Have the proxy carry the connection. Raises `HostError`, `OSError`."""
    told = exchange(outward)
    loop = asyncio.get_running_loop()
    while not told.done:
        await loop.sock_sendall(sock, told.say())
        try:
            octets = sock.recv(LOOK, socket.MSG_PEEK)
        except BlockingIOError:
            await _wait(sock, write=False)
            continue
        if not octets:
            raise HostError("it closed the connection without an answer")
        taken = told.hear(octets)
        while taken:
            taken -= len(sock.recv(taken))
