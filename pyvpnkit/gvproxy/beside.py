"""What gvproxy does besides: its zones, MACs by UUID, sockets through the machine's sshd, and notifications (spec gvproxy 1.4).

A notification is one JSON object and a newline on a connection of its own to a Unix socket, so that whoever started us need not
ask again and again. At most `MAX_WAITING` wait for a listener that is slow; further ones are dropped, and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Final

from netstack.errors import HostError
from netstack.settings import format_mac
from portfwd.gvproxy_forwards import Proxy, Refused
from pyvpnkit.gvproxy.translate import Extra
from pyvpnkit.service import Service

log = logging.getLogger("pyvpnkit")

MAX_WAITING: Final = 100
SEND_S: Final = 5.0
PAUSE_S: Final = 0.01
"""Between two: a guest that makes up hardware addresses does not keep their listener busy."""


class Notifier:
    """Tells who listens at the Unix socket `path`. An async context manager; nothing is sent before it is entered."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.dropped = 0

    def say(self, kind: str, mac: bytes | None = None) -> None:
        """Add a notification of this kind."""
        if len(self._waiting) >= MAX_WAITING:
            self.dropped += 1
            return
        document = {"notification_type": kind, **({"mac_address": format_mac(mac)} if mac is not None else {})}
        self._waiting.append(json.dumps(document).encode() + b"\n")
        self._wake.set()

    async def __aenter__(self) -> Notifier:
        self._task = asyncio.create_task(self._send_all())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _send_all(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting:
                octets = self._waiting.popleft()
                try:
                    async with asyncio.timeout(SEND_S):
                        await self._send(octets)
                except OSError as error:  # and so is TimeoutError
                    log.warning("notification %s: %s", self._path, error.strerror or "nobody takes it")
                await asyncio.sleep(PAUSE_S)

    async def _send(self, octets: bytes) -> None:
        _, writer = await asyncio.open_unix_connection(self._path)
        try:
            writer.write(octets)
            await writer.drain()
        finally:
            writer.close()
            await writer.wait_closed()


def beside(extra: Extra, service: Service) -> contextlib.AbstractAsyncContextManager[None]:
    """`pyvpnkit.daemon.Beside`. Raises `ConfigError`, and `HostError` when entered."""
    for zone in extra.zones:
        service.zones.add(zone)
    leases = service.stack.leases
    for known, mac in extra.macs.items():
        leases.reserve(str(known), None, mac, time.monotonic())
        leases.detach(str(known))  # it is not there yet, but its address is kept
    return _running(extra, service)


@contextlib.asynccontextmanager
async def _running(extra: Extra, service: Service) -> AsyncIterator[None]:
    assert service.doors is not None
    forwards = service.doors.gvproxy_forwards()
    for path, remote in extra.tunnels:
        try:
            forwards.expose(Proxy(path, "unix", remote))
        except Refused as error:
            raise HostError(f"forward-sock {path}: {error}") from None
    if not extra.notification:
        yield
        return
    async with Notifier(extra.notification) as notifier:
        switch = service.stack.switch
        for mac in switch.table():
            notifier.say("connection_established", mac)
        switch.on_learnt = lambda mac: notifier.say("connection_established", mac)
        switch.on_forgotten = lambda mac: notifier.say("connection_closed", mac)
        notifier.say("ready")
        yield
