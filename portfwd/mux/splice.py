"""A channel and a connected host socket, joined."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from portfwd.mux.channel import Channel


def splice(
    channel: Channel,
    sock: socket.socket,
    *,
    on_close: Callable[[str], None] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> Splice:
    """Carry octets both ways between `channel` and the connected, stream `sock` (TCP or unix), which it owns from here on.

    Attaches to the channel. Half-close crosses both ways; what one side does not take stops the other. A channel that is
    refused or lost resets the socket (SO_LINGER 0), one that is closed closes it after the last octet. `on_close(reason)` is
    called once, at the end.
    """
    return Splice(channel, sock, on_close, loop)


class Splice:
    def __init__(
        self,
        channel: Channel,
        sock: socket.socket,
        on_close: Callable[[str], None] | None,
        loop: asyncio.AbstractEventLoop | None,
    ) -> None:
        raise NotImplementedError

    def abort(self) -> None:
        """Reset the socket and close the channel, now. Harmless twice."""
        raise NotImplementedError
