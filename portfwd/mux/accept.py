"""The side that is spoken to: finds the generation by the first octets and hands on channels, whatever carries them."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from portfwd.mux.engine import DEFAULT, Limits, Role
from portfwd.mux.session import OnOpen


class Accepted:
    """One data connection of a host, in the VM: `generation` is known once it spoke."""

    def __init__(
        self,
        sock: socket.socket,
        on_open: OnOpen,
        *,
        role: Role = Role.LISTENER,
        generation: int | None = None,
        on_end: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Owns `sock` (connected). `generation=None`: found by the first octets; a `CONNECTOR` (`-data-connect`) of
        generation 3 must say 3, as both sides wait to be greeted. `on_open(destination, channel)`: see `session.OnOpen`;
        a connection of generation 1 is one channel, and `on_end` is called when it was handed over and is over.
        UDP: `destination.protocol == "udp"`, and the channel carries records (`records.RecordChannel`): with the client's
        address in generations 1 and 2, one channel per client and no address in 3."""
        raise NotImplementedError

    generation: int | None

    def close(self) -> None:
        """End it: every channel is lost. Harmless twice."""
        raise NotImplementedError

    async def wait_closed(self) -> str:
        """Waits for the end and returns the reason `on_end` is told."""
        raise NotImplementedError

    def dump(self) -> str:
        """The multiplexer's last 500 events, one a line."""
        raise NotImplementedError
