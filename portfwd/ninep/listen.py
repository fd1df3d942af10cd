"""Listening sockets for the protocols of VPNKit that are served one task per connection: 9P, live captures, archives.

`SocketServer` accepts, bounds how many there are at once (one more is closed at once, and counted), and contains what goes wrong
to its connection. `serve_ninep` speaks 9P on one of them. `port_server` is for the socket of `--port`: linuxkit sends HTTP there
where VPNKit serves 9P (spec vpnkit 13), so the first octet decides. It is a letter in every HTTP request, and in 9P the low
octet of the length of a Tversion, 19 or 21.

A peer that does not say what it wants within `HELLO_S`, or does not take an answer within `STALL_S`, is closed; one that has
a session may be silent for ever, as a mount is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, Self, TypeAlias

from netstack.errors import Malformed
from portfwd.ninep.files import Filesystem
from portfwd.ninep.server import MAX_MSIZE, Session

log = logging.getLogger("pyvpnkit.ninep")

MAX_CONNECTIONS: Final = 64
HELLO_S: Final = 30.0
STALL_S: Final = 60.0
PAUSE_S: Final = 0.25
"""Rest of a listener that cannot accept, as when descriptors have run out."""
TURN: Final = 32
"""Requests answered before others in the loop have their turn."""

Serve: TypeAlias = Callable[[socket.socket], Awaitable[bool | None]]
"""Serves one non-blocking connection. The server closes it afterwards, unless what is returned is True: it was handed on."""


class SocketServer:
    """An async context manager around a bound, listening stream socket, which it owns; what it serves ends with it."""

    def __init__(
        self, listener: socket.socket, serve: Serve, *, name: str = "9p", max_connections: int = MAX_CONNECTIONS
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._serve = serve
        self._max = max_connections
        self._task: asyncio.Task[None] | None = None
        self.name = name
        self.connections = 0
        """Open now."""
        self.accepted = 0
        self.refused = 0
        """Closed at once, for there were too many."""
        self.contained = 0
        """Bugs of ours that cost one connection."""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"{self.name} server")
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection. Harmless when repeated."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        self._listener.close()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as connections:
            while True:
                try:
                    sock, _ = await loop.sock_accept(self._listener)
                except OSError as error:
                    log.warning("%s: accept: %s; clients wait", self.name, error.strerror)
                    await asyncio.sleep(PAUSE_S)
                    continue
                if self.connections >= self._max:
                    self.refused += 1
                    sock.close()
                    continue
                sock.setblocking(False)
                self.connections += 1
                self.accepted += 1
                connections.create_task(self._connection(sock))

    async def _connection(self, sock: socket.socket) -> None:
        handed_on: bool | None = False
        try:
            handed_on = await self._serve(sock)
        except (OSError, TimeoutError) as error:
            log.debug("%s: a connection ended: %r", self.name, error)
        except Exception:  # one connection's failure must not end the others
            self.contained += 1
            log.exception("%s: a connection could not be served", self.name)
        finally:
            self.connections -= 1
            if not handed_on:
                sock.close()


async def serve_ninep(sock: socket.socket, files: Filesystem, *, max_msize: int = MAX_MSIZE) -> None:
    """Answer 9P on `sock`, non-blocking, until the peer ends it or breaks its framing; then every fid is clunked.

    Closes nothing. Raises `OSError`, and `TimeoutError` when the peer says nothing at first or does not read.
    """
    loop = asyncio.get_running_loop()
    session = Session(files, max_msize=max_msize)
    try:
        while True:
            async with asyncio.timeout(None if session.msize else HELLO_S):
                octets = await loop.sock_recv(sock, max_msize)
            if not octets:
                return
            session.feed(octets)
            for count in itertools.count(1):
                try:
                    answer = session.next()
                except Malformed as error:
                    log.warning("a connection is closed: %s", error)
                    return
                if answer is None:
                    break
                async with asyncio.timeout(STALL_S):
                    await loop.sock_sendall(sock, answer)
                if count % TURN == 0:
                    await asyncio.sleep(0)  # neither of the above waits where it need not
            await asyncio.sleep(0)
    finally:
        session.close()


async def first_octet(sock: socket.socket) -> int | None:
    """What the peer's first octet is, left where it is; `None` when there will be none. Raises `OSError`, `TimeoutError`."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(HELLO_S):
        while True:
            try:
                octets = sock.recv(1, socket.MSG_PEEK)
            except (BlockingIOError, InterruptedError):
                readable = asyncio.Event()
                loop.add_reader(sock.fileno(), readable.set)
                try:
                    await readable.wait()
                finally:
                    loop.remove_reader(sock.fileno())
            else:
                return octets[0] if octets else None


def port_server(
    listener: socket.socket,
    connect: Callable[[str], Filesystem],
    http: Callable[[socket.socket], None],
    *,
    name: str = "port",
    max_connections: int = MAX_CONNECTIONS,
) -> SocketServer:
    """The server of a `--port` socket: 9P with the tree that `connect(NAME#NUMBER)` returns, or HTTP.

    `http(sock)` owns the accepted, non-blocking socket, of which nothing has been read; its connections are not counted here.
    """
    numbers = itertools.count(1)

    async def serve(sock: socket.socket) -> bool:
        first = await first_octet(sock)
        if first is None:
            return False
        if chr(first).isascii() and chr(first).isalpha():
            http(sock)
            return True
        await serve_ninep(sock, connect(f"{name}#{next(numbers)}"))
        return False

    return SocketServer(listener, serve, name=name, max_connections=max_connections)


def tree_server(
    listener: socket.socket,
    connect: Callable[[], Filesystem],
    *,
    name: str = "introspection",
    max_connections: int = 16,
) -> SocketServer:
    """The server of an `--introspection` socket."""

    async def serve(sock: socket.socket) -> None:
        await serve_ninep(sock, connect())

    return SocketServer(listener, serve, name=name, max_connections=max_connections)
