"""Connected stream sockets to the forwarder, for each kind of `Where` that connects, and listening ones for the others."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import stat
from typing import Final

from netstack.errors import ConfigError, HostError
from portfwd.mux.where import Where

CONNECT_S: Final = 10.0
"""For the whole of it, the hypervisor's answer included."""
LONGEST_ANSWER: Final = 64
"""Octets of `OK port` and its newline that are believed."""
BACKLOG: Final = 16


async def connect(where: Where, loop: asyncio.AbstractEventLoop) -> socket.socket:
    """A non-blocking socket behind which the forwarder's stream begins. Raises `HostError` that says what is in the way."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(CONNECT_S):
            await _connect(sock, where.path, loop)
            if where.kind == "hyperkit":
                # In one write: hyperkit reads once, and drops what is short (spec vpnkit 7.4).
                line = b"%08x.%08x\n" % (where.cid, where.port)
                if sock.send(line) != len(line):
                    raise HostError(f"{where}: the first line was not taken as a whole")
            elif where.kind == "connect":
                await loop.sock_sendall(sock, b"CONNECT %d\n" % where.port)
                await _answer(sock, where, loop)
    except TimeoutError:
        sock.close()
        raise HostError(f"{where}: no answer within {CONNECT_S:.0f} s") from None
    except OSError as error:
        sock.close()
        raise HostError(f"{where}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


async def _connect(sock: socket.socket, path: str, loop: asyncio.AbstractEventLoop) -> None:
    while True:
        try:
            sock.connect(path)  # of a unix socket: done at once, or its queue is full
        except BlockingIOError:
            await asyncio.sleep(0.02)  # nothing tells when the queue has room again (connect(2): EAGAIN)
        else:
            return


async def _answer(sock: socket.socket, where: Where, loop: asyncio.AbstractEventLoop) -> None:
    """Read the line, and not an octet of what follows it."""
    answer = b""
    while not answer.endswith(b"\n"):
        octet = await loop.sock_recv(sock, 1)
        answer += octet
        if not octet or len(answer) > LONGEST_ANSWER:
            raise HostError(f"{where}: the hypervisor refused the port (nobody listens there in the VM?)")
    if not answer.startswith(b"OK"):
        raise HostError(f"{where}: the hypervisor answered {answer!r}")


def listen(where: Where) -> socket.socket:
    """A non-blocking listening socket at the path; a stale socket is replaced, a file never. Raises `HostError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _remove_stale(where)
        sock.bind(where.path)
        os.chmod(where.path, 0o600)  # nobody can connect before `listen`
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise HostError(f"{where}: {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(where: Where) -> None:
    try:
        mode = os.lstat(where.path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"forwarder: {where}: {where.path} is there and no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        answer = probe.connect_ex(where.path)
    if answer in (0, errno.EAGAIN):
        raise HostError(f"{where}: somebody listens there already")
    os.unlink(where.path)


def inherited(where: Where) -> tuple[socket.socket, bool]:
    """The stream socket of `fd:N`, non-blocking, and whether it listens; the descriptor is ours. Raises `ConfigError`."""
    try:
        sock = socket.socket(fileno=where.fd)
        sock.set_inheritable(False)
    except OSError as error:
        raise ConfigError(f"forwarder: {where}: descriptor {where.fd} is no socket ({error.strerror})") from None
    try:
        if sock.type != socket.SOCK_STREAM:
            raise ConfigError(f"forwarder: {where}: descriptor {where.fd} is no stream socket")
        sock.setblocking(False)
        return sock, bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    except OSError as error:
        sock.detach()
        raise ConfigError(f"forwarder: {where}: descriptor {where.fd} cannot be used ({error.strerror})") from None
    except BaseException:
        sock.detach()  # not what was meant for us, so not ours to close
        raise
