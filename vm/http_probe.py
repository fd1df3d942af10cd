"""Whether something in the guest answers over HTTP; Docker, say."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Final

import h11

from netstack.errors import HostError

ANSWER_S: Final = 5.0
MAX_HEAD: Final = 16384


async def answers(
    dial: Callable[[], Awaitable[socket.socket]], path: str, *, server: str = "", limit_s: float = ANSWER_S
) -> bool:
    """Whether `GET path` is answered with a status below 400, by a `Server` that begins with `server`.

    Raises `HostError` that says what came instead, where something did: what dialling raised, another status, no HTTP, or nothing.
    """
    try:
        async with asyncio.timeout(limit_s):
            with contextlib.closing(await dial()) as sock:
                response = await _get(sock, path)
    except TimeoutError:
        raise HostError(f"GET {path}: no answer within {limit_s:g} s") from None
    except OSError as error:
        raise HostError(f"GET {path}: {error.strerror or error}") from None
    except h11.RemoteProtocolError as error:
        raise HostError(f"GET {path}: this is no HTTP: {error}") from None
    if response is None:
        return False
    if response.status_code >= 400:
        raise HostError(f"GET {path}: answered with {response.status_code}")
    name = dict(response.headers).get(b"server", b"").decode("latin-1")
    if not name.startswith(server):
        raise HostError(f"GET {path}: answered by {name or 'a nameless server'!r}, and {server} was expected")
    return True


async def _get(sock: socket.socket, path: str) -> h11.Response | None:
    loop = asyncio.get_running_loop()
    client = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEAD)
    request = h11.Request(method="GET", target=path, headers=[("Host", "docker"), ("Connection", "close")])
    await loop.sock_sendall(sock, (client.send(request) or b"") + (client.send(h11.EndOfMessage()) or b""))
    while True:
        event = client.next_event()
        if event is h11.NEED_DATA:
            octets = await loop.sock_recv(sock, MAX_HEAD)
            if not octets:
                return None  # refused: with some hypervisors this is how
            client.receive_data(octets)
        elif isinstance(event, h11.Response):
            return event
        elif not isinstance(event, h11.InformationalResponse):
            return None
