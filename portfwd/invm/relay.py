"""Octets from one connected stream socket to another and back: generation 1's flows, and `expose-port`'s local listener.

End of file crosses as `shutdown`, each way by itself; an error of either socket ends both.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Final

CHUNK: Final = 64 * 1024
"""Octets moved at once; what the other side does not take stays in the kernel."""


async def relay(left: socket.socket, right: socket.socket, *, first: bytes = b"") -> None:
    """Carry octets both ways until both have ended, or one failed; `first` was read from `left` already. Closes both."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(one_way(left, right, first))
            tasks.create_task(one_way(right, left, b""))
    except* OSError:
        pass  # reset or gone: that flow is over, whoever sees it first
    finally:
        left.close()
        right.close()


async def one_way(source: socket.socket, sink: socket.socket, first: bytes) -> None:
    """Until the end of file of `source`, which is passed on; raises `OSError`."""
    loop = asyncio.get_running_loop()
    octets = first
    while True:
        if octets:
            await loop.sock_sendall(sink, octets)
        octets = await loop.sock_recv(source, CHUNK)
        if not octets:
            sink.shutdown(socket.SHUT_WR)
            return
