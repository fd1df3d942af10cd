"""Host sockets of the proxy, connected: the only place of this package that opens any. May be asked for what the policy allows."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Any, Final, Protocol

from netstack.api import Endpoint
from netstack.errors import HostError
from netstack.host.handshake import LOOK, Exchange
from netstack.host.io import first_source_port
from netstack.host.tunnels import Question
from netstack.policy.egress import Tunnel

_RETRY_S: Final = 0.02
_SOURCE_PORTS: Final = first_source_port()


class Sockets(Protocol):
    """Where sockets come from (`netstack.host.io.HostIO`): guests may not use up all descriptors."""

    def socket(self, family: int, kind: int, protocol: int = 0) -> Any: ...


def _open(sockets: Sockets, family: int) -> socket.socket:
    sock = socket.socket(fileno=sockets.socket(family, socket.SOCK_STREAM).detach())
    sock.setblocking(False)
    return sock


def is_here(address: bytes) -> bool:
    """Whether this host has the address."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.bind((socket.inet_ntop(family, address), 0))
    except OSError:
        return False
    return True


async def connect(sockets: Sockets, to: Endpoint) -> socket.socket:
    """A TCP connection. Raises `OSError`."""
    sock = _open(sockets, socket.AF_INET if len(to.address) == 4 else socket.AF_INET6)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        where = to.text, to.port
        await asyncio.get_running_loop().sock_connect(sock, where)
        if to.port >= _SOURCE_PORTS and sock.getsockname()[:2] == where:
            raise OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))  # nobody listens: it has met itself
    except BaseException:
        sock.close()
        raise
    return sock


async def through_program(sockets: Sockets, tunnel: Tunnel) -> socket.socket:
    """A connection that a program on the host carries (spec vpnkit 7.7). Raises `OSError` and `HostError`."""
    sock = _open(sockets, socket.AF_UNIX)
    try:
        # There is no event for a unix listener whose queue was full.
        while (number := sock.connect_ex(tunnel.path)) == errno.EAGAIN:  # noqa: ASYNC110  # see above
            await asyncio.sleep(_RETRY_S)
        if number:
            raise OSError(number, os.strerror(number))
    except BaseException:
        sock.close()
        raise
    return await agree(sock, Question(tunnel))


async def agree(sock: socket.socket, exchange: Exchange) -> socket.socket:
    """Say and hear what goes before the octets of a connection; what comes right behind it stays in the socket.

    Raises `OSError` and `HostError`, and has closed `sock` then.
    """
    loop = asyncio.get_running_loop()
    try:
        while True:
            said = exchange.say()
            if said:
                await loop.sock_sendall(sock, said)
            if exchange.done:
                return sock
            octets = await _look(loop, sock)
            if not octets:
                raise HostError("it closed the connection without an answer")
            sock.recv(exchange.hear(octets))
    except BaseException:
        sock.close()
        raise


async def _look(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> bytes:
    """What has come, left where it is."""
    while True:
        try:
            return sock.recv(LOOK, socket.MSG_PEEK)
        except BlockingIOError:
            pass
        ready: asyncio.Future[None] = loop.create_future()
        loop.add_reader(sock, _wake, ready)
        try:
            await ready
        finally:
            loop.remove_reader(sock)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)
