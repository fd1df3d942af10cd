"""A hypervisor's HTTP API on a Unix socket (Cloud Hypervisor, Firecracker, vfkit)."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, Final

import aiohttp

from netstack.errors import HostError
from vm.api import RestCall
from vm.hypervisors.process import Process, until

MAX_ANSWER: Final = 1 << 20
MAX_WORDS: Final = 1000
"""Characters of a refusal that are passed on."""
LIMIT_S: Final = 10.0


class Rest:
    """One hypervisor's API. Each call is a connection of its own: they are few, and the hypervisor may go at any time."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self.name = name

    async def there(self, process: Process, limit_s: float = LIMIT_S) -> None:
        """Until it takes connections. Raises `HostError` with what the hypervisor said when it ends instead, or takes longer."""
        await until(lambda: listens(self.path), process, limit_s, f"API at {self.path}")

    async def call(self, call: RestCall, limit_s: float = LIMIT_S) -> Any:
        """The answer's JSON, `None` where it is empty. Raises `HostError`: not there, refused (its words), or slow."""
        what = f"{self.name}: {call.method} {call.path}"
        session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(self.path), force_close=True),
            timeout=aiohttp.ClientTimeout(total=limit_s),
        )
        try:
            async with session, session.request(call.method, f"http://localhost{call.path}", json=call.body) as answer:
                text = await _text(answer)
                if answer.status >= 300:
                    raise HostError(f"{what}: {answer.status} {text.strip() or answer.reason}"[:MAX_WORDS])
                return json.loads(text) if text.strip() else None
        except TimeoutError:
            raise HostError(f"{what}: no answer within {limit_s:.0f} s") from None
        except (aiohttp.ClientError, OSError, ValueError, RecursionError) as error:
            raise HostError(f"{what}: {error or type(error).__name__}") from None


async def _text(answer: aiohttp.ClientResponse) -> str:
    octets = bytearray()
    async for chunk in answer.content.iter_chunked(65536):
        octets += chunk
        if len(octets) > MAX_ANSWER:
            raise ValueError(f"an answer of more than {MAX_ANSWER} octets")
    return octets.decode(errors="replace")


def listens(path: Path) -> bool:
    """Whether somebody takes connections at a Unix stream socket."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.setblocking(False)  # a full backlog is an answer too
        try:
            sock.connect(str(path))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return True
