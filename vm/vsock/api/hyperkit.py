"""HyperKit's way: one socket `connect`, and one line that names a port (spec companions 1.2, vpnkit 7.4).

host -> guest   DIR/connect, then the 18 octets `%08x.%08x\\n` (CID and port); nothing is answered, and a refused port is a close
guest -> host   DIR/00000002.%08x, where the host must listen before the guest dials
"""

from __future__ import annotations

import socket
from pathlib import Path

from netstack.errors import HostError
from vm.accepting import LIMIT
from vm.api import Serve
from vm.vsock.api.common import HOST_CID, Convention, Server, dialled, listening


class HyperKitVsock(Convention):
    """`directory` is that of `virtio-sock,path=`. That a port is refused shows as an end of file, not when dialling."""

    def __init__(self, directory: Path, cid: int) -> None:
        self._directory = directory
        self._cid = cid

    async def _dial(self, port: int) -> socket.socket:
        async with dialled(self._directory / "connect", port) as sock:
            line = b"%08x.%08x\n" % (self._cid, port)
            if sock.send(line) != len(line):  # in one write: hyperkit reads once, and drops what is short
                raise HostError(f"vsock port {port}: the hypervisor did not take the line that names the port")
            return sock

    async def serve(self, port: int, serve: Serve, *, limit: int = LIMIT) -> Server:
        return await listening(self._directory / guest_dials(port), port, serve, limit)


def guest_dials(port: int) -> str:
    """The name of the socket for what the guest dials at the host's `port`."""
    return f"{HOST_CID:08x}.{port:08x}"
