"""Whether a machine is ready: what `ready` of its file names is tried until it succeeds.

none           at once
lease          the guest has taken an address of its network
docker         GET /_ping is answered through docker.sock
tcp:PORT       the guest takes connections there
vsock:PORT     something there holds a connection, or answers on it
console:TEXT   a line of the console's log has it (a regular expression), since this start
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, HostError
from vm.api import Vsock
from vm.supervisor.network import Network

HOLDS_S: Final = 0.2
"""A port of vsock that nobody serves takes a connection with some hypervisors, and ends it at once (spec companions 1.2)."""
JITTER_S: Final = 0.1
"""Answers are rounded, and no machine boots so soon."""
MAX_CONSOLE: Final = 64 << 10
"""Octets that are looked at at a time."""
MAX_LINE: Final = 512
"""Of a line so many, its last: a harmless pattern takes time by the square of a line, and that of a guest may have no end."""

Probe = Callable[[], Awaitable[bool]]


async def until(probe: Probe, *, every_s: float) -> None:
    """Return when `probe` says yes."""
    while True:
        try:
            if await probe():
                return
        except HostError:
            pass  # not yet
        await asyncio.sleep(every_s)


def lease(network: Network, mac: str, before: float) -> Probe:
    """The guest has taken an address: its lease ends later than the one it had `before` it was started."""

    async def probe() -> bool:
        return (await network.lease_end(mac))[0] > before + JITTER_S

    return probe


def tcp(network: Network, mac: str, port: int) -> Probe:
    """The guest takes connections at `port`."""

    async def probe() -> bool:
        address = await network.address(mac)
        return address is not None and await network.accepts(address, port)

    return probe


def vsock(streams: Vsock, port: int) -> Probe:
    """Something serves `port` of the guest."""

    async def probe() -> bool:
        reader, writer = await streams.connect(port, limit_s=5.0)
        try:
            return bool(await asyncio.wait_for(reader.read(1), HOLDS_S))
        except TimeoutError:
            return True
        except OSError:
            return False
        finally:
            writer.close()

    return probe


class ConsoleLog:
    """Looks at what a console's log says from now on."""

    def __init__(self, path: Path, pattern: str) -> None:
        self._path = path
        self._pattern = re.compile(pattern.encode())
        self._offset = 0
        self._kept = b""

    def begin(self) -> None:
        """The machine starts: what is there already is of a start before."""
        self._kept = b""
        try:
            self._offset = self._path.stat().st_size
        except OSError:
            self._offset = 0

    async def probe(self) -> bool:
        """Whether it was said."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:
                    self._offset = 0  # a new log was begun
                file.seek(self._offset)
                octets = file.read(MAX_CONSOLE)
        except OSError:
            return False
        self._offset += len(octets)
        said = self._kept + octets
        lines = [line[-MAX_LINE:] for line in said.splitlines()]
        found = any(self._pattern.search(line) for line in lines)
        self._kept = lines[-1] if lines and not said.endswith(b"\n") else b""
        return found


def number(text: str) -> int:
    """Behind the colon of `tcp:80`."""
    word = text.partition(":")[2]
    if not word.isdigit():
        raise ConfigError(f"ready: {text!r}: write a port behind the colon")
    return int(word)
