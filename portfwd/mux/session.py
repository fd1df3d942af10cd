"""A multiplexer over a connected stream socket, in the event loop."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any

from portfwd.carriers import Destination
from portfwd.mux.channel import Channel
from portfwd.mux.engine import DEFAULT, Limits, Role

OnOpen = Callable[[Destination, Channel], None]
"""The peer opened a channel. Call `attach` now or later (after dialling), or `close` to refuse. Until `attach` it sends nothing."""


class Session:
    """Runs one connection. Owns `sock` (connected, stream; made non-blocking)."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        generation: int = 3,
        role: Role = Role.LISTENER,
        on_open: OnOpen | None = None,
        on_end: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
        received: bytes = b"",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`received`: octets that were read from `sock` already (to find the generation). `on_end(reason)` is called once;
        the reason is empty where the peer ended the connection, orderly or before it said anything (a port probe)."""
        raise NotImplementedError

    def open(self, destination: Destination) -> Channel:
        """A new channel to `destination`. Raises `TooManyChannels` at the bound and `HostError` when the session is over."""
        raise NotImplementedError

    def close(self) -> None:
        """End it: every channel is lost, the socket closed. Harmless twice; `on_end` is called with `"closed"`."""
        raise NotImplementedError

    async def wait_closed(self) -> str:
        """Waits for the end and returns the reason `on_end` is told."""
        raise NotImplementedError

    def dump(self) -> str:
        """The last 500 events, one a line."""
        raise NotImplementedError

    def status(self) -> Mapping[str, Any]:
        """Plain values: channels, octets each way, counters."""
        raise NotImplementedError
