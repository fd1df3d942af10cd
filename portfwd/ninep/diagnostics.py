"""Sockets that are read and never written: an archive of what is known (`--diagnostics`), and live packets (`--pcap`).

Both are for `SocketServer`, one connection at a time; spec vpnkit 8.1 and 8.3.
"""

from __future__ import annotations

import asyncio
import io
import select
import socket
import tarfile
import time
from collections.abc import Iterator, Mapping
from typing import Final

from netstack.observe.classic import Ring, file_header
from portfwd.ninep.introspect import Tree, octets_of
from portfwd.ninep.listen import STALL_S, Serve, SocketServer

MAX_READERS: Final = 16
_PIECE: Final = 1 << 16


def archive(tree: Tree, now: float) -> bytes:
    """A tar with a file of mode 0644 for each of `tree`, changed `now` (seconds since 1970); two blocks of NULs end it."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, octets in _files(tree):
            header = tarfile.TarInfo(name)
            header.size, header.mode, header.mtime = len(octets), 0o644, int(now)
            tar.addfile(header, io.BytesIO(octets))
        end = tar.offset
    return made.getvalue()[:end] + bytes(2 * tarfile.BLOCKSIZE)  # tarfile goes on to a record of a tape


def _files(tree: Tree, above: str = "") -> Iterator[tuple[str, bytes]]:
    for name, found in tree.items():
        if isinstance(found, Mapping):
            yield from _files(found, f"{above}{name}/")
        else:
            yield above + name, octets_of(found)


async def _send(sock: socket.socket, octets: bytes) -> None:
    """Raises `TimeoutError` when the peer takes nothing for `STALL_S`."""
    loop = asyncio.get_running_loop()
    view = memoryview(octets)
    for at in range(0, len(view), _PIECE):
        async with asyncio.timeout(STALL_S):
            await loop.sock_sendall(sock, view[at : at + _PIECE])


def diagnostics_server(listener: socket.socket, tree: Tree) -> SocketServer:
    """The server of a `--diagnostics` socket."""

    async def serve(sock: socket.socket) -> None:
        await _send(sock, archive(tree, time.time()))

    return SocketServer(listener, serve, name="diagnostics", max_connections=MAX_READERS)


def follow(ring: Ring) -> Serve:
    """What serves one reader: the file's header, what is in the ring, then packets as they come, until the reader leaves.

    A reader may be as slow as it likes; it misses what has left the ring by the time it reads on.
    """

    async def serve(sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        reader = ring.follow(news.set)
        loop.add_reader(sock.fileno(), news.set)  # the peer has nothing to say, but may leave
        try:
            await loop.sock_sendall(sock, file_header(ring.snaplen))
            while True:
                if _ended(sock):
                    if _left(sock):
                        return
                    loop.remove_reader(sock.fileno())  # a half-close: it still reads
                octets = reader.take()
                if octets:
                    await loop.sock_sendall(sock, octets)
                    await asyncio.sleep(0)
                else:
                    await news.wait()
                    news.clear()
        finally:
            loop.remove_reader(sock.fileno())
            ring.leave(reader)

    return serve


def _ended(sock: socket.socket) -> bool:
    """Whether the peer will say nothing more. What it says is thrown away."""
    try:
        return not sock.recv(_PIECE)
    except (BlockingIOError, InterruptedError):
        return False


def _left(sock: socket.socket) -> bool:
    """Whether the peer has closed its socket, and not only its own direction."""
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def pcap_server(listener: socket.socket, ring: Ring) -> SocketServer:
    """The server of a `--pcap` socket."""
    return SocketServer(listener, follow(ring), name="pcap", max_connections=MAX_READERS)
