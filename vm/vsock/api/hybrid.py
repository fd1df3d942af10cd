"""The way of Firecracker, Cloud Hypervisor and vhost-device-vsock: one socket and a line that is answered (spec companions 1.2).

host -> guest   S, then `CONNECT <port>\\n`; the answer is `OK <host port>\\n`, and a refused port is a close
guest -> host   S_<port>, where the host must listen before the guest dials
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Final

from netstack.errors import HostError
from vm.accepting import LIMIT
from vm.api import Serve
from vm.vsock.api.common import Convention, Server, dialled, listening

LONGEST_ANSWER: Final = 32
"""`OK 4294967295` has 13 octets."""


class HybridVsock(Convention):
    """`path` is S. A guest's port that is refused is a `HostError` already when dialling."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def _dial(self, port: int) -> socket.socket:
        async with dialled(self._path, port) as sock:
            await asyncio.get_running_loop().sock_sendall(sock, b"CONNECT %d\n" % port)
            await _answer(sock, port)
            return sock

    async def serve(self, port: int, serve: Serve, *, limit: int = LIMIT) -> Server:
        return await listening(self._path.with_name(f"{self._path.name}_{port}"), port, serve, limit)


async def _answer(sock: socket.socket, port: int) -> None:
    """Read the line, octet by octet: what follows it is the guest's, and stays where it is."""
    answer = bytearray()
    loop = asyncio.get_running_loop()
    while not answer.endswith(b"\n") and len(answer) < LONGEST_ANSWER:
        try:
            octet = await loop.sock_recv(sock, 1)
        except ConnectionResetError:
            octet = b""
        if not octet:
            raise HostError(f"vsock port {port}: the guest refused; nobody listens there in it (yet?)")
        answer += octet
    word, _, number = bytes(answer).rstrip(b"\n").partition(b" ")
    if word != b"OK" or not number.isdigit() or not answer.endswith(b"\n"):
        raise HostError(f"vsock port {port}: the hypervisor answered {bytes(answer)!r} in place of OK and a number")
