"""What the conventions share: dialling with a limit of time and clear errors, listening with bounds."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, HostError
from netstack.link.listening import UnixSocket
from vm.accepting import LIMIT, Accepted, Acceptor
from vm.api import Handler, Serve
from vm.vsock.api.paths import ShortPath, short_path

HOST_CID: Final = 2  # vsock(7): VMADDR_CID_HOST
MAX_PORT: Final = 0xFFFFFFFE
"""The one above is VMADDR_PORT_ANY (vsock(7))."""
FULL_QUEUE_RETRY_S: Final = 0.02
"""Nothing tells when a Unix listener's queue has room again (connect(2): EAGAIN); it is asked again so often."""


class Server:
    """What `listen` returns: listens until `close`, which also ends the connections and removes the path."""

    def __init__(self, acceptor: Acceptor, *owned: UnixSocket | ShortPath) -> None:
        self._acceptor = acceptor
        self._owned = owned

    @property
    def counts(self) -> Accepted:
        return self._acceptor.counts

    def __len__(self) -> int:
        """Connections there are now."""
        return len(self._acceptor)

    async def close(self) -> None:
        await self._acceptor.close()
        for one in self._owned:
            one.close()


class Convention(ABC):
    """A `vm.api.Vsock` without the one step in which conventions differ."""

    async def connect(self, port: int, *, limit_s: float = 10.0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await streams(await self.dial(port, limit_s=limit_s))

    async def dial(self, port: int, *, limit_s: float = 10.0) -> socket.socket:
        check_port(port)
        try:
            async with asyncio.timeout(limit_s):
                return await self._dial(port)
        except TimeoutError:
            raise HostError(f"vsock port {port}: no answer within {limit_s:g} s; does the machine hang?") from None
        except OSError as error:
            raise HostError(f"vsock port {port}: {error.strerror or error}") from None

    @abstractmethod
    async def _dial(self, port: int) -> socket.socket:
        """A socket behind which the stream begins. Raises `HostError`, `OSError`; leaves nothing open then."""

    async def listen(self, port: int, handler: Handler, *, limit: int = LIMIT) -> Server:
        return await self.serve(port, serving(handler), limit=limit)

    @abstractmethod
    async def serve(self, port: int, serve: Serve, *, limit: int = LIMIT) -> Server:
        """As `vm.api.Vsock.serve`; more than `limit` connections at once are closed as they come, and counted."""


def check_port(port: int) -> None:
    """Raise `ConfigError` for what is no vsock port."""
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"vsock port {port}: ports are from 0 to {MAX_PORT}")


@contextlib.asynccontextmanager
async def dialled(path: Path, port: int) -> AsyncIterator[socket.socket]:
    """A socket connected to `path`, which is closed when the body fails. Raises `HostError`, `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            with short_path(path) as text:
                while True:
                    try:
                        sock.connect(text)  # of a Unix socket: done at once, or its queue is full
                        break
                    except BlockingIOError:
                        await asyncio.sleep(FULL_QUEUE_RETRY_S)
        except FileNotFoundError:
            raise HostError(f"vsock port {port}: there is no {path}; does the machine run?") from None
        except OSError as error:
            if error.errno != errno.ECONNREFUSED:
                raise
            raise HostError(f"vsock port {port}: nobody listens at {path} any more; does the machine run?") from None
        yield sock
    except BaseException:
        sock.close()
        raise


async def listening(path: Path, port: int, serve: Serve, limit: int) -> Server:
    """Serve what a hypervisor connects to `path` for `port`. Raises `ConfigError`."""
    check_port(port)
    try:
        short = ShortPath(path)
    except OSError as error:
        raise ConfigError(f"vsock port {port}: {path.parent}: {error.strerror}") from None
    try:
        bound = UnixSocket(short.text, socket.SOCK_STREAM, setting=f"vsock port {port}")
    except ConfigError as error:
        short.close()
        raise ConfigError(str(error).replace(short.text, os.fspath(path))) from None
    return Server(Acceptor(bound.sock, serve, name=f"vsock port {port}", limit=limit), bound, short)


def serving(handler: Handler) -> Serve:
    """A handler of streams as one of sockets."""

    async def serve(sock: socket.socket) -> None:
        reader, writer = await streams(sock)
        try:
            await handler(reader, writer)
            writer.close()
            await writer.wait_closed()
        except BaseException:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()
            raise

    return serve


async def streams(sock: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Streams over a connected socket, which they take over."""
    try:
        if sock.family == socket.AF_UNIX:
            return await asyncio.open_unix_connection(sock=sock)
        return await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
