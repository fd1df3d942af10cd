"""Taking the socket away from an HTTP server: gvproxy's `/connect` and `/tunnel` begin as a request and go on as raw octets.

Theory of operation. Such clients may speak before anybody answers (gvforwarder never reads a response), and an HTTP parser that
has once seen those octets takes them for the next request. So they are never shown to it: a `Door` stands between the
connection and aiohttp's handler. Before each read it looks at what waits (MSG_PEEK), and lends the loop a buffer that holds
just what may be read.

    octets wait -> path known? --no, any other path--> aiohttp has the connection, the door is out of the way
                               --yes-----------------> exactly the head is read and given to aiohttp, so that middleware and
                                                       routes see it; the handler calls `hijack(request)`, or answers
                                                       as usual, and then the connection is closed

What follows the head is still in the kernel when the handler gets the socket, as if nobody had been there. Only the first request
of a connection can be taken so; a later one is told to come on a connection of its own.

Bounds: a head of at most `MAX_HEAD` octets, within `HEAD_S`.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable, Container
from os import dup
from typing import Any, Final, TypeAlias, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

MAX_HEAD: Final = 16384
HEAD_S: Final = 10.0
"""As gvproxy's server, which waits so long for a request."""
_LINE: Final = 1024
"""Octets within which a method and one of our paths are found."""

_TARGET: Final = re.compile(rb"[\r\n]*[A-Za-z]{1,16} +(?:http://[^/ ]*)?(/[^ ?#]*)[ ?#]", re.ASCII)
_BODY: Final = re.compile(
    rb"\r\n(?:transfer-encoding[ \t]*:|content-length[ \t]*:(?![ \t]*0+[ \t]*\r\n))", re.IGNORECASE
)

Factory: TypeAlias = Callable[[], asyncio.BaseProtocol]


class NotTaken(Exception):
    """The socket of a request cannot be had; the text says what the client should do."""


class Between(asyncio.Protocol):
    """A protocol in front of another one, which it tells everything."""

    def __init__(self, inner: asyncio.BaseProtocol) -> None:
        self.inner = cast(asyncio.Protocol, inner)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self.inner.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.inner.connection_lost(exc)

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()


class Doorway:
    """The protocol factory of a listener whose requests for `paths` may be hijacked; `server` is `web.AppRunner.server`.

    For `loop.create_unix_server`, `create_server` and `connect_accepted_socket`.
    """

    def __init__(self, server: Factory, paths: Container[str]) -> None:
        self._server = server
        self._paths = paths

    def __call__(self) -> asyncio.BaseProtocol:
        return Door(self._server(), self._paths)


class Door(asyncio.BufferedProtocol):
    """See the module."""

    def __init__(self, inner: asyncio.BaseProtocol, paths: Container[str]) -> None:
        self.inner = cast(asyncio.Protocol, inner)
        self._paths = paths
        self._transport: asyncio.Transport | None = None
        self._sock: socket.socket | None = None
        """The same connection under a number of our own, to look at it and to hand it over."""
        self._held = b""
        self._buffer = bytearray(1)
        self._whole = False
        """The next octets read complete the head of a request for one of our paths."""
        self._open = False
        """The next octets read, and all after them, are aiohttp's."""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.inner.connection_made(transport)
        if self._transport.is_closing():
            return
        try:
            self._sock = socket.socket(fileno=dup(transport.get_extra_info("socket").fileno()))
        except OSError:  # no descriptor left: then there is no hijacking, and all the rest goes on
            self._open = True
        self._timer = asyncio.get_running_loop().call_later(HEAD_S, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        self.inner.connection_lost(exc)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def eof_received(self) -> bool | None:
        return self.inner.eof_received()

    def pause_writing(self) -> None:
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        self.inner.resume_writing()

    def get_buffer(self, sizehint: int) -> bytearray:
        self._buffer = bytearray(max(1, self._may_read()))
        return self._buffer

    def _may_read(self) -> int:
        """How many of the octets that wait may be read now, and what becomes of them."""
        if self._sock is None:
            return MAX_HEAD
        try:
            waiting = self._sock.recv(MAX_HEAD, socket.MSG_PEEK)
        except OSError:  # whatever it is, the read that follows finds it too
            return 1
        seen = self._held + waiting
        found = _TARGET.match(seen)
        if found is None:
            self._open = len(seen) > _LINE
        elif found[1].decode("latin-1") not in self._paths:
            self._open = True
        elif (end := seen.find(b"\r\n\r\n")) < 0:
            self._open = len(seen) > MAX_HEAD
        elif _BODY.search(seen, 0, end + 2):
            self._open = True
        else:
            self._whole = True
            return end + 4 - len(self._held)
        return len(waiting)

    def buffer_updated(self, nbytes: int) -> None:
        self._held += self._buffer[:nbytes]
        if self._open:
            self._let_through()
        elif self._whole and self._held.endswith(b"\r\n\r\n"):
            assert self._transport is not None
            self._transport.pause_reading()
            if self._timer is not None:
                self._timer.cancel()
            head, self._held = self._held, b""
            # Whatever is answered in place of a hijack, no other request follows on this connection.
            self.inner.data_received(head[:-2] + b"Connection: close\r\n\r\n")

    def _let_through(self) -> None:
        """An ordinary connection from now on; this object is forgotten."""
        self._forget()
        assert self._transport is not None
        self._transport.set_protocol(self.inner)
        held, self._held = self._held, b""
        self.inner.data_received(held)

    def hand_over(self) -> socket.socket:
        """The connection, non-blocking; what follows the request's head is unread. Raises `NotTaken` when it is gone already."""
        sock, self._sock = self._sock, None
        if sock is None:
            raise NotTaken("this connection is taken already")
        sock.setblocking(False)
        return sock


def hijack(request: web.Request) -> socket.socket:
    """The socket of `request`, which is the caller's from now on; the handler then returns `Taken()`. Raises `NotTaken`."""
    transport = request.transport
    door: Any = None if transport is None else transport.get_protocol()
    if not isinstance(door, Door):
        raise NotTaken(
            f"{request.path} takes the connection over: send it as the first request of a connection, and without a body"
        )
    return door.hand_over()


class Taken(web.Response):
    """What a handler returns after `hijack`: nothing is written, and the server lets go of the connection."""

    def __init__(self) -> None:
        super().__init__()
        self.force_close()

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None
