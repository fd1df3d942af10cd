"""Octets both ways between two stream sockets, each way with an end of its own.

The end of file of one side is passed on as `shutdown`, and the other way goes on: a request may end long before its answer begins
(docker attach). A side that takes nothing more ends only the way towards it, so that an answer given early, with the rest of the
request unread, still arrives. A side that fails (reset) ends both. Nothing is read while the other side does not take it, so that
the kernel's buffers bound what a stalled peer makes us hold: `CHUNK` each way.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Final

CHUNK: Final = 64 * 1024


async def splice(left: socket.socket, right: socket.socket) -> tuple[int, int]:
    """Carry octets until both ways have ended; returns how many went from left to right, and from right to left.

    The sockets are connected and non-blocking, and closed in any case. Raises `OSError` when a side failed.
    """
    with contextlib.closing(left), contextlib.closing(right):
        ways = [asyncio.ensure_future(_one_way(left, right)), asyncio.ensure_future(_one_way(right, left))]
        try:
            there, back = await asyncio.gather(*ways)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)  # the loop must not watch descriptors that are closed
        return there, back


async def _one_way(source: socket.socket, sink: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    carried = 0
    while octets := await loop.sock_recv(source, CHUNK):
        try:
            await loop.sock_sendall(sink, octets)
        except (BrokenPipeError, ConnectionResetError):
            with contextlib.suppress(OSError):
                source.shutdown(socket.SHUT_RD)  # who sends into it learns of it
            return carried
        carried += len(octets)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
    return carried
