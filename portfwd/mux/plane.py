"""The host's side of VPNKit's data plane: finds the forwarder in the VM and hands it connections and datagrams.

    generation 1   a connection of its own for each, made when it is wanted
    2 and 3        one multiplexed connection, made when the first is wanted (kinds that connect) or by the forwarder (`listen`)

Who comes while there is none waits, `MAX_WAITING` at most and `WAIT_S` each; meanwhile we try again every second, so a client
that comes while the VM boots is served. In generation 3 a connection counts when the forwarder has greeted, so what
answers without one (hyperkit accepts before it knows the port; a probe) neither harms the current connection nor takes clients.
With `listen` the newest forwarder that greets takes over: after a VM restarted, the old connection may look alive for long.
When the connection dies, all its host connections are reset; the next client makes a new one.

The VM may not open channels: a forwarder that exposes ports the other way round (spec vpnkit 7.9 [Q]) is refused.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Final

from netstack.api import Datagrams
from netstack.errors import HostError, Malformed, NetstackError
from portfwd.carriers import Destination
from portfwd.mux.channel import Channel
from portfwd.mux.datagrams import PerClient, Published, Shared
from portfwd.mux.dial import connect, inherited, listen
from portfwd.mux.engine import DEFAULT, Limits, Role
from portfwd.mux.frames import emit_destination
from portfwd.mux.raw import RawChannel
from portfwd.mux.session import Session
from portfwd.mux.splice import Splice, reset, splice
from portfwd.mux.where import Where

log = logging.getLogger("pyvpnkit.portfwd.mux")

MAX_WAITING: Final = 1024
"""Connections that wait for the forwarder; more are reset."""
WAIT_S: Final = 10.0
"""How long one waits before it is reset."""
AGAIN_S: Final = 1.0
"""Between two attempts to connect, as VPNKit's forwarder does it."""
GREET_S: Final = 10.0
"""How long a peer has for its handshake."""
LOG_S: Final = 30.0
"""Between two complaints, as VPNKit's."""
MAX_STRANGERS: Final = 8
"""Accepted connections that have not greeted yet; the oldest goes first."""
REST_S: Final = 0.25
"""Rest of the listening socket when descriptors are short."""

Use = Callable[[Channel | None], None]


@dataclass(slots=True)
class _Waiting:
    target: Destination
    use: Use
    until: float


class Plane:
    """`portfwd.carriers.DataPlane`."""

    def __init__(self, where: Where, *, limits: Limits = DEFAULT) -> None:
        self.where = where
        self._limits = limits
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._session: Session | None = None
        self._last: Session | None = None
        """The current session, or the one that was it last, for `dump`."""
        self._strangers: dict[Session, asyncio.TimerHandle] = {}
        self._waiting: deque[_Waiting] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self._dialling: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._raws: set[RawChannel] = set()
        self._splices: set[Splice] = set()
        self._published: set[Published] = set()
        self._listener: socket.socket | None = None
        self._rest: asyncio.TimerHandle | None = None
        self._quiet_until = 0.0
        self.carried = 0
        """Host connections that got a channel."""
        self.unreached = 0
        """Those reset because there was none to be had."""
        self.connections = 0
        """To the forwarder, made or accepted and greeted."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin; listens where the forwarder connects. Raises `HostError` or `ConfigError` when that cannot be."""
        self._loop = loop
        if self.where.kind == "listen":
            self._hear(listen(self.where))
        elif self.where.kind == "fd":
            sock, listens = inherited(self.where)
            if listens:
                self._hear(sock)
            else:
                self._meet(sock, Role.CONNECTOR)

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        assert self._loop is not None, "the plane was not started"
        return self._loop

    # What is carried.

    def stream(self, target: Destination, sock: socket.socket, *, preface: bytes = b"") -> None:
        """See `DataPlane`."""

        def use(channel: Channel | None) -> None:
            if channel is None:
                self.unreached += 1
                reset(sock)
                return
            self.carried += 1
            made = splice(
                channel, sock, preface=preface, on_close=lambda _why: self._splices.discard(made), loop=self.loop
            )
            if not made.done:
                self._splices.add(made)

        self._reach(target, use)

    def datagrams(self, target: Destination, sock: socket.socket) -> Datagrams:
        """See `DataPlane`."""
        kind = PerClient if self.where.generation == 3 else Shared
        made = kind(self._reach, target, sock, self.loop, self._published.discard)
        self._published.add(made)
        return made

    def dump(self) -> str:
        """The last 500 events of the multiplexer, one a line; empty in generation 1 and before the first connection."""
        return "" if self._last is None else self._last.dump()

    def status(self) -> Mapping[str, Any]:
        """Plain values."""
        session = self._session
        return {
            "where": str(self.where),
            "generation": self.where.generation,
            "connected": session is not None or bool(self._raws),
            "connections": self.connections,
            "carried": self.carried,
            "unreached": self.unreached,
            "waiting": len(self._waiting),
            "streams": len(self._splices),
            "udp_ports": len(self._published),
            "udp_dropped": sum(one.dropped for one in self._published),
            "udp_evicted": sum(one.evicted for one in self._published),
            "mux": {} if session is None else dict(session.status()),
        }

    async def close(self) -> None:
        """End every connection and task. Harmless twice."""
        self._closed = True
        for timer in (self._expiry, self._rest):
            if timer is not None:
                timer.cancel()
        for published in list(self._published):
            published.close()
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            self._give(one.use, None)
        if self._listener is not None:
            self.loop.remove_reader(self._listener.fileno())
            self._listener.close()
            if self.where.kind == "listen":
                try:
                    os.unlink(self.where.path)
                except OSError:
                    pass  # somebody was faster
        tasks = [*self._tasks, *([self._dialling] if self._dialling is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for session in [*self._strangers, *([self._session] if self._session is not None else [])]:
            session.close()
        for made in list(self._splices):
            made.abort()
        for raw in list(self._raws):
            raw.abort()

    # Channels.

    def _reach(self, target: Destination, use: Use) -> None:
        if self._session is not None:
            self._open(self._session, target, use)
        elif self._closed or len(self._waiting) + len(self._tasks) >= MAX_WAITING:
            if not self._closed:
                self._complain(f"{MAX_WAITING} connections wait for it already; one more was reset")
            self._give(use, None)
        elif self.where.generation == 1:
            self._run(self._own_connection(target, use))
        else:
            self._waiting.append(_Waiting(target, use, self.loop.time() + WAIT_S))
            if self._expiry is None:
                self._expiry = self.loop.call_later(WAIT_S, self._expire)
            self._dial_if_wanted()

    def _open(self, session: Session, target: Destination, use: Use) -> None:
        try:
            channel = session.open(target)
        except (HostError, Malformed) as error:
            self._complain(str(error))
            self._give(use, None)
        else:
            self._give(use, channel)

    def _give(self, use: Use, channel: Channel | None) -> None:
        try:
            use(channel)
        except Exception:  # one connection's failure must not end the others
            log.exception("%s: a connection could not be carried", self.where)
            if channel is not None:
                channel.close()

    def _expire(self) -> None:
        now = self.loop.time()
        late = 0
        while self._waiting and self._waiting[0].until <= now + 0.001:
            late += 1
            self._give(self._waiting.popleft().use, None)
        if late:
            self._complain(f"it was not reached within {WAIT_S:.0f} s, who waited was reset")
        self._expiry = self.loop.call_at(self._waiting[0].until, self._expire) if self._waiting else None

    def _complain(self, why: str) -> None:
        now = self.loop.time()
        if now >= self._quiet_until:
            self._quiet_until = now + LOG_S
            log.warning("forwarder %s: %s (said at most once in %.0f s)", self.where, why, LOG_S)

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _own_connection(self, target: Destination, use: Use) -> None:
        """Generation 1."""
        channel: RawChannel | None = None
        try:
            first = emit_destination(target)
            sock = await connect(self.where, self.loop)
            self.connections += 1
            channel = RawChannel(sock, target, first=first, on_end=self._raws.discard, loop=self.loop)
            self._raws.add(channel)
        except NetstackError as error:
            self._complain(str(error))
        finally:
            self._give(use, channel)

    # The connection of generations 2 and 3.

    def _dial_if_wanted(self) -> None:
        if self._dialling is None and self.where.kind not in ("listen", "fd") and not self._closed:
            self._dialling = self.loop.create_task(self._dial())
            self._dialling.add_done_callback(self._dialled)

    async def _dial(self) -> None:
        """Until a forwarder greets, or nobody waits."""
        while self._waiting and self._session is None:
            try:
                sock = await connect(self.where, self.loop)
            except HostError as error:
                self._complain(str(error))
            else:
                session = self._meet(sock, Role.CONNECTOR)
                await asyncio.shield(session.changed)
            if self._session is None and self._waiting:
                await asyncio.sleep(AGAIN_S)

    def _dialled(self, task: asyncio.Task[None]) -> None:
        self._dialling = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s: connecting failed", self.where, exc_info=error)
        elif self._waiting and self._session is None:
            self._dial_if_wanted()

    def _hear(self, listener: socket.socket) -> None:
        self._listener = listener
        self.loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            self._complain(f"no connection can be accepted: {error.strerror}")
            self.loop.remove_reader(self._listener.fileno())
            self._rest = self.loop.call_later(REST_S, self._hear, self._listener)
            return
        if len(self._strangers) >= MAX_STRANGERS:
            next(iter(self._strangers)).close()
        self._meet(sock, Role.LISTENER)

    def _meet(self, sock: socket.socket, role: Role) -> Session:
        """A session that becomes the current one when its peer greets."""
        generation = self.where.generation
        session = Session(
            sock,
            generation=generation,
            role=Role.OCAML if generation == 2 else role,
            on_ready=lambda: self._take_over(session),
            on_end=lambda reason: self._ended(session, reason),
            limits=self._limits,
            loop=self.loop,
        )
        self._strangers[session] = self.loop.call_later(GREET_S, session.close)
        return session

    def _take_over(self, session: Session) -> None:
        self._strangers.pop(session).cancel()
        old, self._session, self._last = self._session, session, session
        self.connections += 1
        log.info("forwarder %s: connected", self.where)
        if old is not None:
            log.warning("forwarder %s: a newer connection takes over", self.where)
            old.close()
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            self._open(session, one.target, one.use)

    def _ended(self, session: Session, reason: str) -> None:
        timer = self._strangers.pop(session, None)
        if timer is not None:
            timer.cancel()
            if not self._closed and (reason or self.where.kind != "listen"):
                self._complain(f"{reason or 'an end'} before it greeted (does the forwarder run in the VM?)")
        elif session is self._session:
            self._session = None
            if not self._closed:
                self._complain(reason or "it ended the connection; its clients were reset")
