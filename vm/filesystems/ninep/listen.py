"""The server of one folder: listening sockets, connections, threads, and their end.

    async with FileServer(Share(Path("/home/me/src"), parse_owner("mapped")), [socket]) as server:
        await server.serve(connected)       # a connection that came otherwise (`socket.socket(fileno=fd)`), until it ends

Any number of these can be in one process: each has threads of its own, so that none waits for another's disk.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, Self

from netstack.link.listening import UnixSocket
from vm.accepting import Acceptor, same_user
from vm.filesystems.ninep.connection import Connection
from vm.filesystems.ninep.pool import Pool
from vm.filesystems.ninep.share import Share

log = logging.getLogger("pyvpnkit.ninep")

GRACE_S: Final = 5.0
"""How long requests that run may go on when the server ends."""


def _admit(sock: socket.socket) -> bool:
    """Of a Unix socket, this user's programs. Who listens on anything else means whoever can reach that."""
    return sock.family != socket.AF_UNIX or same_user(sock)


class FileServer:
    """An async context manager. Owns `share` and `listeners`: bound and listening stream sockets of any family."""

    def __init__(self, share: Share, listeners: Sequence[socket.socket | UnixSocket] = ()) -> None:
        self.share = share
        self._listeners = listeners
        self._acceptors: list[Acceptor] = []
        self._connections: dict[Connection, Callable[[], None]] = {}
        """And what is to be called when one is gone."""
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._pool: Pool

    async def __aenter__(self) -> Self:
        self._pool = Pool(self.share.limits.workers, name="9p files")
        for listener in self._listeners:
            sock = listener.sock if isinstance(listener, UnixSocket) else listener
            sock.setblocking(False)
            limit = self.share.limits.connections
            self._acceptors.append(Acceptor(sock, self.serve, name="9p files", limit=limit, admit=_admit))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End every connection. Harmless when repeated."""
        for acceptor in self._acceptors:
            await acceptor.close()
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections):
            connection.close()
        try:
            async with asyncio.timeout(GRACE_S):
                await self._none_left.wait()
        except TimeoutError:
            log.warning("9p: %d connections wait for the host's file system, and are left", len(self._connections))
            for end in list(self._connections.values()):
                end()
        else:
            self.share.close()
        self._pool.close()

    @property
    def connections(self) -> int:
        """Open now, or waiting for their last requests."""
        return len(self._connections)

    async def serve(self, sock: socket.socket) -> None:
        """Serve a connected stream socket until the client is gone; then, or when cancelled, it is closed. Raises `OSError`."""
        ended = asyncio.Event()

        def end() -> None:
            ended.set()
            self._connections.pop(connection, None)
            if not self._connections:
                self._none_left.set()

        connection = Connection(self.share, self._pool, end)
        self._connections[connection] = end
        self._none_left.clear()
        try:
            sock.setblocking(False)
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
            await ended.wait()
        except OSError:
            end()
            raise
        finally:
            connection.close()
            sock.close()

    def describe(self) -> dict[str, Any]:
        """Counters, for people."""
        share = self.share
        sessions = [connection.session for connection in self._connections]
        return {
            "owner": str(share.owners),
            "read_only": share.read_only,
            "connections": self.connections,
            "accepted": sum(acceptor.counts.accepted for acceptor in self._acceptors),
            "refused": sum(acceptor.counts.over_limit + acceptor.counts.strangers for acceptor in self._acceptors),
            "requests": sum(session.requests for session in sessions),
            "errors": sum(session.errors for session in sessions),
            "outstanding": sum(connection.outstanding for connection in self._connections),
            "flushed": sum(connection.flushed for connection in self._connections),
            "threads": self._pool.threads,
            "contained": self._pool.contained,
            "fids": sum(session.fids for session in sessions),
            "opened": share.opened.used,
            "locks": len(share.locks),
            "nodes": len(share.nodes),
            "descriptors": share.nodes.descriptors,
            "evicted": share.nodes.evicted,
            "stale": share.nodes.stale,
            "over": {"opened": share.opened.refused, "nodes": share.nodes.refused}
            | {
                name: sum(getattr(session.allowances, name).refused for session in sessions)
                for name in ("fids", "octets", "locks")
            },
        }
