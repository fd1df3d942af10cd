"""The kernel's own AF_VSOCK, behind which is QEMU's or crosvm's vhost-vsock device (spec companions 1.2; vsock(7)).

Nothing here opens such a socket unless it is asked to dial or to listen.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from vm.accepting import LIMIT, Acceptor
from vm.api import Serve
from vm.vsock.api.common import Convention, Server, check_port

ANY_CID: Final = 0xFFFFFFFF  # vsock(7): VMADDR_CID_ANY
FIRST_GUEST_CID: Final = 3  # vsock(7): 0 to 2 are the hypervisor, this machine and its host
BACKLOG: Final = 64

_WHY: Final = {
    errno.ENODEV: "this host has no vsock to its guests; load the module vhost_vsock, or choose another kind of vsock",
    errno.EAFNOSUPPORT: "this host's kernel has no vsock; choose another kind, such as vhost-user",
    errno.ECONNRESET: "the guest refused; nobody listens there in it (yet?)",
    errno.ECONNREFUSED: "the guest refused; nobody listens there in it (yet?)",
    errno.EHOSTUNREACH: "there is no machine with this CID; does it run?",
    errno.ENETUNREACH: "there is no machine with this CID; does it run?",
}


def kernel_socket() -> socket.socket:
    """A new AF_VSOCK socket. Raises `HostError` where there is no such thing."""
    family = getattr(socket, "AF_VSOCK", None)
    if family is None:
        raise HostError("this system has no AF_VSOCK; choose another kind of vsock")
    return socket.socket(family, socket.SOCK_STREAM)


class KernelVsock(Convention):
    """To the machine `cid`, and for what it dials; other machines of this host are turned away. `make` is for tests."""

    def __init__(self, cid: int, make: Callable[[], socket.socket] = kernel_socket) -> None:
        if not FIRST_GUEST_CID <= cid < ANY_CID:
            raise ConfigError(f"vsock.cid: {cid} is no guest's; guests have {FIRST_GUEST_CID} and above")
        self._cid = cid
        self._make = make

    async def _dial(self, port: int) -> socket.socket:
        sock = self._make()
        try:
            sock.setblocking(False)
            await _connect(sock, (self._cid, port))
        except BaseException as error:
            sock.close()
            if isinstance(error, OSError) and error.errno in _WHY:
                raise HostError(f"vsock port {port} of CID {self._cid}: {_WHY[error.errno]}") from None
            raise
        return sock

    async def serve(self, port: int, serve: Serve, *, limit: int = LIMIT) -> Server:
        check_port(port)
        sock = self._make()
        try:
            sock.setblocking(False)
            sock.bind((ANY_CID, port))
            sock.listen(BACKLOG)
        except OSError as error:
            sock.close()
            why = _WHY.get(error.errno or 0, error.strerror or str(error))
            raise ConfigError(f"vsock port {port}: {why}") from None
        return Server(Acceptor(sock, serve, name=f"vsock port {port}", limit=limit, admit=self._is_ours))

    def _is_ours(self, sock: socket.socket) -> bool:
        return bool(sock.getpeername()[0] == self._cid)


async def _connect(sock: socket.socket, where: Any) -> None:
    """Connect a non-blocking socket; loops' own `sock_connect` know few families, and look names up for the others."""
    number = sock.connect_ex(where)
    if number in (errno.EINPROGRESS, errno.EINTR):
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_writer(sock, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(sock)
        number = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if number:
        raise OSError(number, os.strerror(number))
