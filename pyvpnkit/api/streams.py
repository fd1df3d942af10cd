"""The two operations whose answer does not end: `/v1/events` and `/v1/capture`.

Each reader has a task that waits for something to write, writes it, and waits while its client does not read; what comes
meanwhile waits in a bounded queue, and beyond that is lost and counted. A stream ends with its client or with the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Final

from aiohttp import web

from netstack.errors import ConfigError
from netstack.observe.filter import Filter, compile_filter
from netstack.observe.live import Live
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.http import Connection, connection_of
from pyvpnkit.api.routing import Call
from pyvpnkit.api.sse import LAST_EVENT_ID, MAX_FEEDS, TYPES, EventHub

log = logging.getLogger("pyvpnkit.control")

HEARTBEAT_S: Final = 15.0
"""A comment is sent when nothing else was, so that both ends notice when the other is gone."""
STATISTICS_S: Final = 1.0
"""How often a reader of the capture is told at most that packets were lost (interface statistics blocks)."""
MAX_CAPTURES: Final = 16
CAPTURE_OCTETS: Final = 1 << 20
"""What may wait for one reader of the capture."""
DEFAULT_SNAPLEN: Final = 262144
PCAPNG: Final = "application/x-pcapng"


class Outlet:
    """One response that is written as things happen."""

    def __init__(self, connection: Connection) -> None:
        self._wake = asyncio.Event()
        self._connection = connection
        self.over = False
        """The client is gone, or the server ends."""
        connection.on_lost = self.end

    def wake(self) -> None:
        """Something waits to be written."""
        self._wake.set()

    def end(self) -> None:
        """No more is written."""
        self.over = True
        self._wake.set()

    async def wait(self, limit_s: float) -> bool:
        """Until `wake` or `end`; False when neither came within `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    def close(self) -> None:
        """The response is complete."""
        self._connection.on_lost = None


class Streams:
    """Both operations; `close` ends all readers."""

    def __init__(self, hub: EventHub, live: Live) -> None:
        self.heartbeat_s = HEARTBEAT_S
        self.statistics_s = STATISTICS_S
        self.capture_octets = CAPTURE_OCTETS
        self.captures = 0
        """Readers of the capture there are."""
        self.packets_lost = 0
        """Packets that readers of the capture were too slow for, all in all."""
        self._hub = hub
        self._live = live
        self._outlets: set[Outlet] = set()

    def close(self) -> None:
        """Every reader's answer ends, in order."""
        for outlet in self._outlets:
            outlet.end()

    @contextlib.asynccontextmanager
    async def _outlet(self, request: web.Request) -> AsyncIterator[Outlet]:
        outlet = Outlet(connection_of(request))
        self._outlets.add(outlet)
        try:
            yield outlet
        finally:
            self._outlets.discard(outlet)
            outlet.close()

    async def events(self, call: Call) -> web.StreamResponse:
        """`GET /v1/events`."""
        request = call.request
        types = frozenset(filter(None, call.query.get("types", "").split(",")))
        if unknown := sorted(types - set(TYPES)):
            raise ApiError(400, f"types: {unknown[0][:80]!r} is no type of event; there are {', '.join(TYPES)}")
        last_id = request.headers.get("Last-Event-ID", "")
        if last_id and not LAST_EVENT_ID.fullmatch(last_id):
            raise ApiError(400, f"Last-Event-ID {last_id[:80]!r} is no id of an event; leave it out to begin now")
        if len(self._hub) >= MAX_FEEDS:
            raise ApiError(429, f"{MAX_FEEDS} readers of events are there already; end one and try again")
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"})
        if request.method == "HEAD":
            return response
        async with self._outlet(request) as outlet:
            feed = self._hub.open(types, outlet.wake, last_id)
            outlet.wake()  # for what is replayed
            try:
                await response.prepare(request)
                await response.write(b": pyvpnkit\n\n")
                while not outlet.over:
                    for octets in feed.take():
                        await response.write(octets)
                    if not await outlet.wait(self.heartbeat_s):
                        await response.write(b": heartbeat\n\n")
                await response.write_eof()
            except ConnectionError:
                pass  # the reader has left
            finally:
                self._hub.shut(feed)
        return response

    async def capture(self, call: Call) -> web.StreamResponse:
        """`GET /v1/capture`."""
        request = call.request
        words = call.query.get("filter", "").strip()
        try:
            wanted = compile_filter(words) if words else None
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        if self.captures >= MAX_CAPTURES:
            raise ApiError(429, f"{MAX_CAPTURES} readers of the capture are there already; end one and try again")
        self.captures += 1
        try:
            return await self._capture(request, wanted, call.query.get("snaplen", DEFAULT_SNAPLEN))
        finally:
            self.captures -= 1

    async def _capture(self, request: web.Request, wanted: Filter | None, snaplen: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": PCAPNG, "Cache-Control": "no-store"})
        if request.method == "HEAD":
            return response
        async with self._outlet(request) as outlet:
            try:
                reader = self._live.open(wanted, snaplen=snaplen, limit=self.capture_octets, on_data=outlet.wake)
            except ConfigError as error:  # others read it too, by other doors
                raise ApiError(429, str(error)) from None
            told = 0
            told_at = asyncio.get_running_loop().time()
            try:
                await response.prepare(request)
                while not outlet.over:
                    if octets := reader.take():
                        await response.write(octets)
                    now = asyncio.get_running_loop().time()
                    if reader.lost != told and now - told_at >= self.statistics_s:
                        told, told_at = reader.lost, now
                        await response.write(reader.statistics())
                    await outlet.wait(self.statistics_s if reader.lost != told else self.heartbeat_s)
                # The last word, for who reads to the end.
                await response.write(reader.take() + reader.statistics())
                await response.write_eof()
            except ConnectionError:
                pass  # the reader has left
            finally:
                self.packets_lost += reader.lost
                if reader.lost:
                    who = connection_of(request).peer.text
                    log.warning("capture: %s was too slow for %d packets", who, reader.lost)
                reader.close()
        return response
