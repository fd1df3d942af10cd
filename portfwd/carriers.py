"""How what arrives on the host side of a forward gets into the guest.

    a listener --connected socket--> Carrier --+--> our own TCP and UDP (`netstack.api.Dialer`): addresses of guests
                                               +--> a `DataPlane`: VPNKit's forwarder in the VM, for what only the VM reaches
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from netstack.api import Datagrams


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a forwarder in the VM is to go (spec vpnkit 7.3.1): `tcp` and `udp` with address and port, `unix` with a path."""

    protocol: str
    """`tcp`, `udp` or `unix`."""
    address: bytes = b""
    """4 or 16 octets in network order; empty for `unix`."""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.protocol == "unix":
            return f"unix:{self.path}"
        family = socket.AF_INET if len(self.address) == 4 else socket.AF_INET6
        text = socket.inet_ntop(family, self.address)
        return f"{self.protocol}:[{text}]:{self.port}" if ":" in text else f"{self.protocol}:{text}:{self.port}"


class DataPlane(Protocol):
    """The way to VPNKit's forwarder (`portfwd.mux.plane`)."""

    def stream(self, target: Destination, sock: socket.socket) -> None:
        """Own a connected, non-blocking stream socket of the host and carry its octets to `target` and back.

        Half-close crosses both ways. When the forwarder refuses, or cannot be reached, the socket is reset. Never raises.
        """
        ...

    def datagrams(self, target: Destination, sock: socket.socket) -> Datagrams:
        """Carry what arrives at the bound, non-blocking UDP socket to `target`, and answers back to each peer.

        Owns `sock`; `close` of what is returned ends it.
        """
        ...

    def dump(self) -> str:
        """The last events of the multiplexer, one a line, for people."""
        ...

    def status(self) -> Mapping[str, Any]:
        """Plain values: how it is reached, whether it is connected, channels, counters."""
        ...

    async def close(self) -> None:
        """End every connection and task."""
        ...
