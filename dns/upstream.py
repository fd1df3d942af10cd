"""Asking one resolver one question: the sockets, and what counts as its answer.

Off-path forgery (threats N1, RFC 5452): every query has a socket of its own, so the kernel draws a fresh ephemeral port, and a
fresh 16-bit id from the system's random source. The socket is connected, so datagrams of anyone but that server's address
and port never reach it. What does is an answer only if id, opcode and the question are ours, octet by octet: a resolver
repeats the question as it was asked, so the case of letters counts too (which lets a guest's 0x20 bits protect it as well). A
socket per query costs about 10 microseconds here; sharing a few would be cheaper and easier to guess.

Nothing here resolves names or uses threads: addresses are numeric.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final

from dns import codec
from dns.system import Upstream
from netstack.errors import HostError

RandomId = Callable[[], bytes]
"""Two octets nobody can guess."""

_HEADER_ONLY_CODES: Final = frozenset({codec.FORMERR, codec.SERVFAIL, codec.NOTIMP, codec.REFUSED})

_length = struct.Struct("!H")


def open_udp(server: Upstream) -> socket.socket:
    """A non-blocking UDP socket on a fresh port, connected to `server`. Raises `OSError`."""
    sock = socket.socket(server.family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.connect(server.sockaddr)
    except OSError:
        sock.close()
        raise
    return sock


def accept(query: bytes, end: int, query_id: bytes, reply: bytes) -> bytes | None:
    """What to give the asker of `query` if `reply`, from the server it was sent to under `query_id`, is the answer to it.

    Only the id is put back; all else is as the server wrote it. `None` for anything that is not the answer. Some servers
    send a bare header when they cannot parse EDNS: that answers with its code, and can at worst deny, never mislead.
    """
    if len(reply) < codec.HEADER or reply[:2] != query_id or (reply[2] ^ query[2]) & 0xF8 != 0x80:
        return None
    if reply[codec.HEADER : end] == query[codec.HEADER : end] and reply[4:6] == b"\0\1":
        return query[:2] + reply[2:]
    if len(reply) == codec.HEADER and reply[4:] == bytes(8) and codec.rcode(reply) in _HEADER_ONLY_CODES:
        return codec.failure(query, codec.rcode(reply), end)
    return None


def better_asked_elsewhere(reply: bytes) -> bool:
    """SERVFAIL and REFUSED are about the server; NXDOMAIN and an empty answer are about the name."""
    return codec.rcode(reply) in (codec.SERVFAIL, codec.REFUSED)


async def _connect(server: Upstream) -> socket.socket:
    # The loop's own sock_connect may look numeric addresses up and lose the scope of a link-local one.
    loop = asyncio.get_running_loop()
    sock = socket.socket(server.family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        try:
            sock.connect(server.sockaddr)
        except BlockingIOError:
            writable = asyncio.Event()
            loop.add_writer(sock.fileno(), writable.set)
            try:
                await writable.wait()
            finally:
                loop.remove_writer(sock.fileno())
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, "connect") from None
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except BaseException:
        sock.close()
        raise
    return sock


async def ask_tcp(server: Upstream, query: bytes, end: int, random_id: RandomId) -> bytes:
    """The answer of `server` to `query` over a TCP connection of its own. Raises `HostError`; the caller limits the time."""
    query_id = random_id()
    try:
        sock = await _connect(server)
    except OSError as error:
        raise HostError(f"dns: {server}: {error}") from None
    try:
        reader, writer = await asyncio.open_connection(sock=sock)
    except BaseException:
        sock.close()
        raise
    try:
        writer.write(_length.pack(len(query)) + query_id + query[2:])
        while True:
            (octets,) = _length.unpack(await reader.readexactly(2))
            reply = accept(query, end, query_id, await reader.readexactly(octets))
            if reply is not None:
                return reply
    except (OSError, EOFError) as error:
        raise HostError(f"dns: {server}: {error}") from None
    finally:
        writer.transport.abort()
