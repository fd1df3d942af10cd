"""Asking one server over TCP or TLS: one connection for all questions, kept while it is used (RFC 7766 6.2, RFC 7858).

Questions are written as they come, each under an id that no other question on the connection has; answers are taken in any
order, by id and question. A connection is opened with the first question and closed after `idle_s` without one.

Some servers, dnsmasq is one, answer one question of a connection after the other, so that a slow name holds up those behind it.
When nothing has come for `STALL_S`, the questions behind the oldest one, and new ones, go to another connection, at most
`MAX_CONNECTIONS` of them.

A server may close at any time (RFC 7766 6.2.4): questions that were on the way are asked again over a new connection, if the old
one had answered anything since it was opened. A connection that is closed before its first answer is a server that does not
want us: `HostError`. So each repetition is paid for by an answer, and the caller limits the time.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias, cast

from dns.servers import Upstream
from dns.upstream import RandomId, accept
from netstack.errors import HostError

IDLE_S: Final = 30.0  # spec vpnkit 4.4
CONNECT_S: Final = 5.0
MAX_IN_FLIGHT: Final = 512  # spec vpnkit 4.4; threats G23
MAX_UNSENT: Final = 1 << 20
"""Octets that may wait for a server that does not read; then it is not asked more."""

STALL_S: Final = 0.5
MAX_CONNECTIONS: Final = 4

_length = struct.Struct("!H")


Connect: TypeAlias = Callable[[Upstream], Awaitable[socket.socket]]
"""A connected, non-blocking stream socket to a server. Raises `OSError` or `HostError`."""


class _Connection(asyncio.Protocol):
    """One connection, from the moment it is wanted. `why` is empty until it has ended."""

    def __init__(
        self, upstream: Upstream, context: ssl.SSLContext | None, name: str | None, idle_s: float, connect: Connect
    ) -> None:
        self._upstream = upstream
        self._connect = connect
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unsent = bytearray()
        self._received = bytearray()
        self._asked: dict[bytes, tuple[bytes, int, asyncio.Future[bytes]]] = {}
        self._used_at = self._heard_at = self._loop.time()
        self._idle: asyncio.TimerHandle | None = None
        self.answered = False
        self.renewed = False
        self.why = ""
        self._opening = self._loop.create_task(self._establish(context, name))

    async def _establish(self, context: ssl.SSLContext | None, name: str | None) -> None:
        sock: socket.socket | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                sock = await self._connect(self._upstream)
                await self._loop.create_connection(lambda: self, sock=sock, ssl=context, server_hostname=name)
        except (OSError, TimeoutError, HostError) as error:  # ssl's errors are OSErrors
            self.end("connecting took too long" if isinstance(error, TimeoutError) else str(error))
        finally:
            if sock is not None and self._transport is None:
                sock.close()

    def begin(self, query: bytes, end: int, new_id: RandomId) -> tuple[bytes, asyncio.Future[bytes]]:
        """Ask; the future has the answer, or nothing when the connection ends. Call `forget` with the id in any case."""
        if len(self._asked) >= MAX_IN_FLIGHT or self._waiting_octets() > MAX_UNSENT:
            raise HostError(f"dns: {self._upstream} is behind with its answers")
        query_id = new_id()
        while query_id in self._asked:
            query_id = new_id()
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._used_at = self._loop.time()
        if not self._asked:
            self._heard_at = self._used_at
        self._asked[query_id] = query, end, answer
        message = _length.pack(len(query)) + query_id + query[2:]
        if self._transport is None:
            self._unsent += message
        else:
            self._transport.write(message)
        return query_id, answer

    def forget(self, query_id: bytes) -> None:
        self._asked.pop(query_id, None)

    def stalled(self) -> bool:
        """Whether questions wait and nothing has come for `STALL_S`."""
        return bool(self._asked) and self._loop.time() - self._heard_at >= STALL_S

    def oldest(self, query_id: bytes) -> bool:
        return next(iter(self._asked), query_id) == query_id

    def _waiting_octets(self) -> int:
        return len(self._unsent) if self._transport is None else self._transport.get_write_buffer_size()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        if self.why:
            transport.abort()
            return
        transport.write(bytes(self._unsent))
        self._unsent.clear()
        self._idle = self._loop.call_later(self._idle_s, self._look)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self._loop.time()
        received = self._received
        received += data
        at = 0
        while len(received) - at >= 2:
            after = at + 2 + _length.unpack_from(received, at)[0]
            if len(received) < after:
                break
            self._message(bytes(received[at + 2 : after]))
            at = after
        del received[:at]

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(str(exc) if exc is not None else "it closed the connection")

    # Inside

    def _message(self, message: bytes) -> None:
        found = self._asked.get(message[:2])
        if found is None:
            return  # nobody waits for it any longer, or it is for nobody
        query, end, future = found
        answer = accept(query, end, message[:2], message)
        if answer is not None and not future.done():
            self.answered = True
            future.set_result(answer)

    def _look(self) -> None:
        """Close when nothing has been asked for `idle_s`, and nothing is awaited."""
        left_s = self._used_at + self._idle_s - self._loop.time()
        if left_s <= 0 and not self._asked:
            self._idle = None
            self.end("idle")
        else:
            self._idle = self._loop.call_later(max(left_s, self._idle_s / 2), self._look)

    def end(self, why: str) -> None:
        """It is over; whoever waits has an empty answer."""
        self.why = self.why or why
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        for _, _, future in self._asked.values():
            if not future.done():
                future.set_result(b"")
        if self._transport is not None:
            self._transport.abort()

    def close(self) -> None:
        self._opening.cancel()
        self.end("the server is not wanted any more")


class StreamAsker:
    """A `dns.servers.Asker` over TCP, or over TLS with a `context` and the `name` that the certificate must have.

    `connect` makes the connections where the host's own sockets are not to be used.
    """

    def __init__(
        self,
        upstream: Upstream,
        new_id: RandomId,
        *,
        context: ssl.SSLContext | None = None,
        name: str | None = None,
        idle_s: float = IDLE_S,
        connect: Connect | None = None,
    ) -> None:
        self._connect = connect if connect is not None else direct
        self._upstream = upstream
        self._new_id = new_id
        self._context = context
        self._name = name
        self._idle_s = idle_s
        self._open: list[_Connection] = []
        self._closed = False
        self.connections = 0
        """Opened so far."""

    async def ask(self, query: bytes, end: int) -> bytes:
        """The answer of the server, its id that of `query`. Raises `HostError`; the caller limits the time."""
        while not self._closed:
            connection = self._choose()
            query_id, future = connection.begin(query, end, self._new_id)
            try:
                while not future.done():
                    await asyncio.wait((future,), timeout=STALL_S)
                    if not future.done() and not connection.oldest(query_id) and self._held_up(connection):
                        break
            except asyncio.CancelledError:  # the time of the query is over, and perhaps a VPN that led there is gone
                if connection.stalled():
                    connection.end("it did not answer")
                raise
            finally:
                connection.forget(query_id)
            if future.done():
                if answer := future.result():
                    return answer
                if not (connection.answered or connection.renewed):
                    raise HostError(f"dns: {self._upstream}: {connection.why}")
        raise HostError(f"dns: {self._upstream} is not asked any more")

    def _choose(self) -> _Connection:
        self._open = [one for one in self._open if not one.why]
        for connection in self._open:
            if not connection.stalled():
                return connection
        if len(self._open) >= MAX_CONNECTIONS:
            return self._open[-1]
        self._open.append(_Connection(self._upstream, self._context, self._name, self._idle_s, self._connect))
        self.connections += 1
        return self._open[-1]

    def _held_up(self, connection: _Connection) -> bool:
        """Whether a question is better asked over another connection."""
        others = [one for one in self._open if one is not connection]
        return connection.stalled() and (len(others) + 1 < MAX_CONNECTIONS or any(not one.stalled() for one in others))

    def renew(self) -> None:
        """The network changed: ask again, over another connection."""
        for connection in self._open:
            connection.renewed = True
            connection.end("the network changed")

    def close(self) -> None:
        self._closed = True
        for connection in self._open:
            connection.close()


async def direct(upstream: Upstream) -> socket.socket:
    """A non-blocking TCP socket connected to `upstream`. Raises `OSError`."""
    # The loop's own sock_connect may look numeric addresses up and lose the scope of a link-local one.
    loop = asyncio.get_running_loop()
    sock = socket.socket(upstream.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect(upstream.sockaddr)
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(sock.fileno(), writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(sock.fileno())
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error)) from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock
