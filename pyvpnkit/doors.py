"""The doors of a running network: who may look in and change things, and by which protocol.

control.sock, control.listen    /v1, VPNKit's /forwards, gvproxy's /services     (pyvpnkit.api)
vpnkit.port                     VPNKit's 9P port control, HTTP on the same socket (portfwd.ninep)
vpnkit.introspection, ...       VPNKit's debug tree, tar of it, live pcap
port 80 of the gateway          gvproxy's forwarder API for guests, if switched on
vpnkit.*forwards                ports of the gateway and tunnels that lead elsewhere (portfwd.outgoing)
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyvpnkit.service import Service


class Doors:
    """Opens what the settings of `service` ask for; an async context manager. Raises `ConfigError` and `HostError`."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._open = contextlib.AsyncExitStack()

    async def __aenter__(self) -> Doors:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._open.aclose()
