"""CONNECT to an upstream proxy: for a guest that asked for it, and for intercepted TLS, which did not (spec vpnkit 6.3)."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import TYPE_CHECKING, Final

import h11

from netstack.api import Endpoint
from pyvpnkit.proxy.config import Upstream
from pyvpnkit.proxy.errors import Refusal
from pyvpnkit.proxy.http1 import Headers, Place, Wire
from pyvpnkit.proxy.relay import Relay, unless_gone

if TYPE_CHECKING:
    from pyvpnkit.proxy.service import HttpProxy

log = logging.getLogger("pyvpnkit.proxy")

ANSWER_S: Final = 60.0
"""For a proxy's answer."""
FAULTS: Final = (OSError, h11.RemoteProtocolError)
"""What a server or a proxy can do to us."""


async def ask_tunnel(server: Wire, place: Place, upstream: Upstream, headers: Headers) -> h11.Response:
    """A proxy's answer to CONNECT. Raises `Refusal` 502."""
    full = place.full.encode()
    said: Headers = [(b"Host", full)]
    if upstream.authorization is not None:
        said.append((b"Proxy-Authorization", upstream.authorization))
    try:
        async with asyncio.timeout(ANSWER_S):
            await server.send(h11.Request(method=b"CONNECT", target=full, headers=said + headers))
            await server.send(h11.EndOfMessage())
            while True:
                event = await server.next()
                if isinstance(event, h11.Response):
                    return event
                if not isinstance(event, h11.InformationalResponse):
                    raise h11.RemoteProtocolError("it closed the connection")
    except (*FAULTS, TimeoutError) as error:
        raise Refusal(502, f"HTTP proxy {upstream} did not answer: {error or 'too late'}") from None


async def pass_through(house: HttpProxy, sock: socket.socket, destination: Endpoint, upstream: Upstream) -> None:
    """An intercepted TLS connection: through the proxy to where it was to go, or closed (spec vpnkit 6.3).

    Nothing of the guest's is read before: what waits in its socket makes the end a reset.
    """
    server: Wire | None = None
    try:
        place = Place(destination.text, destination.port)
        task = asyncio.current_task()
        assert task is not None
        with unless_gone(sock, task.cancel):
            server = Wire(await house.outside.proxy(upstream), h11.CLIENT)
            answer = await ask_tunnel(server, place, upstream, [])
        if not 200 <= answer.status_code < 300:
            raise Refusal(answer.status_code, f"HTTP proxy {upstream} refuses {place.full}: {answer.status_code}")
        relay = Relay(sock, server.sock, to_one=server.h11.trailing_data[0])
        server = None
    except Refusal as refusal:
        house.counters["tunnels_failed"] += 1
        log.info("proxy: %s", refusal)
        sock.close()
        return
    finally:
        if server is not None:
            server.close()
    house.counters["tunnels"] += 1
    await house.relay(relay)
