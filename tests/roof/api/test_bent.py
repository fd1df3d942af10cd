"""Requests bent octet by octet (threats L5, 3.5): nobody else notices, and no fault of ours comes to light.

`PYVPNKIT_API_BENT=1000000` makes it a soak.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import tempfile
from pathlib import Path

import pytest

from pyvpnkit.api import http
from tests.roof.api.conftest import LIMIT_S, Control, control_server, request

REQUESTS = int(os.environ.get("PYVPNKIT_API_BENT", "3000"))
ODD = (
    b"\r\n",
    b"\n",
    b"\0",
    b": ",
    b" ",
    b"%00",
    b"%ff",
    b"[",
    b"{",
    b'"',
    b"\xff\xfe",
    b"9" * 30,
    b"-1",
    b"chunked",
    b"/..",
    b"?",
    b"&=",
)


def whole(rng: random.Random) -> bytes:
    """A request that is right."""
    number = rng.randrange(1, 40)
    made = rng.choice(
        [
            ("GET", "/v1/status"),
            ("GET", "/v1/forwards"),
            ("GET", f"/v1/forwards/{number}"),
            ("GET", "/v1/flows?protocol=tcp&limit=5"),
            ("GET", "/v1/leases"),
            ("GET", "/metrics"),
            ("DELETE", f"/v1/forwards/{number}"),
            ("DELETE", "/v1/forwards?spec=127.0.0.1:0:80"),
            ("DELETE", "/v1/leases/02:00:00:00:00:07"),
            ("DELETE", "/v1/flows/0123456789ab"),
            ("POST", "/v1/forwards", {"spec": "0:80"}),
            ("POST", "/v1/forwards", {"port": 0, "guest_port": number, "protocol": "udp", "guest": "192.168.65.3"}),
            ("POST", "/v1/leases", {"mac": "02:00:00:00:00:07", "address": f"192.168.65.{number}"}),
        ]
    )
    method, target, *body = made
    return request(method, target, *body, Connection="close")  # type: ignore[arg-type]


def bent(rng: random.Random) -> bytes:
    """One that may be wrong in a place or two. No slash is added, so that no path of the file system comes up."""
    octets = bytearray(whole(rng))
    for _ in range(rng.choice((0, 1, 1, 2, 5))):
        at = rng.randrange(len(octets))
        match rng.randrange(4):
            case 0:
                octets[at] ^= 1 << rng.randrange(8)
            case 1:
                octets[at:at] = rng.choice(ODD)
            case 2:
                del octets[at : at + rng.randrange(1, 8)]
            case _:
                other = rng.randrange(len(octets))
                octets[at:at] = octets[other : other + rng.randrange(1, 16)]
    return bytes(octets)


@pytest.mark.parametrize("seed", range(2))
async def test_bent_requests_harm_nobody(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "_LINGER_S", 0.1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        async with control_server(Path(directory), idle_s=0.1) as control:
            control.server._guard.body_s = 0.1
            for number in range(REQUESTS // 2 // 50):
                await _volley(control, rng)
                registry = control.service.registry
                for forward in list(registry)[: max(0, len(registry) - 100)]:
                    registry.remove(forward)
                if not number % 5:
                    control.server.http.idle_s = 10.0  # a good client may be slow, on a busy machine
                    answer = await control.ask("GET", "/v1/status")
                    control.server.http.idle_s = 0.1
                    assert answer.status == 200 and answer.json["control"]["contained"] == 0
            for forward in control.service.registry:
                control.service.registry.remove(forward)
            counters = control.server.http.counters
            assert counters.malformed > 0 and counters.requests > REQUESTS / 10


async def _volley(control: Control, rng: random.Random) -> None:
    """Fifty requests at a time, each on a connection of its own: the parser gives up all of what came with a bad one."""
    answers = await asyncio.gather(*(_answer(control, bent(rng)) for _ in range(50)))
    for part in filter(None, answers):
        assert b"Traceback" not in part
        head, _, body = part.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/")
        status = int(head[9:12])
        assert 100 <= status < 500, part
        if status >= 400 and b"application/json" in head and body.count(b"\n") == 1:
            assert isinstance(json.loads(body)["message"], str)


async def _answer(control: Control, octets: bytes) -> bytes:
    reader, writer = await asyncio.open_unix_connection(control.path)
    try:
        writer.write(octets)
        async with asyncio.timeout(LIMIT_S):
            return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()
