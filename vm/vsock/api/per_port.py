"""vfkit's way: a socket for each port, all named when the machine starts (spec companions 1.2).

    host -> guest   virtio-vsock,port=P,socketURL=S,connect: vfkit listens at S
    guest -> host   virtio-vsock,port=P,socketURL=S,listen:  vfkit connects to S, where the host must listen

There are no headers. The driver says on its command line the very paths that `host_dials` and `guest_dials` name.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from netstack.errors import ConfigError
from vm.accepting import LIMIT
from vm.api import Serve, VsockSpec
from vm.vsock.api.common import Convention, Server, dialled, listening
from vm.vsock.api.hyperkit import guest_dials


class PerPortVsock(Convention):
    """`dialled` and `served` are the sockets of ports that the host dials, and of those that it serves."""

    def __init__(self, dialled: Mapping[int, Path], served: Mapping[int, Path]) -> None:
        self._dialled = dict(dialled)
        self._served = dict(served)

    @classmethod
    def of(cls, spec: VsockSpec) -> PerPortVsock:
        """With the paths that `host_dials` and `guest_dials` name, in the directory of `spec`."""
        return cls(
            {port: spec.directory / host_dials(spec.cid, port) for port in spec.ports.values()},
            {port: spec.directory / guest_dials(port) for port in spec.served.values()},
        )

    async def _dial(self, port: int) -> socket.socket:
        async with dialled(_known(self._dialled, port, "ports"), port) as sock:
            return sock

    async def serve(self, port: int, serve: Serve, *, limit: int = LIMIT) -> Server:
        return await listening(_known(self._served, port, "served"), port, serve, limit)


def host_dials(cid: int, port: int) -> str:
    """The name of the socket by which the host gets to the guest's `port`; HyperKit's for its forwards."""
    return f"{cid:08x}.{port:08x}"


def _known(table: Mapping[int, Path], port: int, setting: str) -> Path:
    path = table.get(port)
    if path is None:
        known = ", ".join(map(str, sorted(table))) or "none"
        raise ConfigError(
            f"vsock port {port}: this hypervisor has a socket for each port that was named when it started, and those are {known}; "
            f"add the port to vsock.{setting}"
        )
    return path
