"""A connection of a client: octets to requests, requests to threads, answers back in any order.

    read --> waiting (at most `session_requests`) --> running (at most `session_running`) --> answered

What waits is bounded in octets too; beyond that the socket is not read. Tflush (flush(5)) takes a request that waits away,
unanswered, and is answered at once; one that runs is answered first. Tversion is begun when all before it are answered, and what
comes behind it when it is. A client that does not take its answers has nothing begun for it, and is closed after `STALL_S`; so is
one that does not say its version within `HELLO_S`. After that it may be silent for ever, as a mount is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from errno import EINVAL
from typing import Final, cast

from netstack.errors import Malformed
from portfwd.ninep.wire import Decoder, Octets, tag_of
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep import wire
from vm.filesystems.ninep.pool import Pool
from vm.filesystems.ninep.session import Session
from vm.filesystems.ninep.share import Share

log = logging.getLogger("pyvpnkit.ninep")

BUFFER: Final = 1 << 16
"""Octets that are read at once. A longer message is received in its own memory, from which a file is written."""
HELLO_S: Final = 30.0
STALL_S: Final = 60.0


class Connection(asyncio.BufferedProtocol):
    """`ended` is called when the client is gone and nothing is left of it."""

    def __init__(self, share: Share, pool: Pool, ended: Callable[[], None]) -> None:
        self.session = Session(share)
        self._pool = pool
        self._ended = ended
        self._limits = share.limits
        self._decoder = Decoder(share.limits.msize)
        self._buffer = memoryview(bytearray(BUFFER))
        self._large: bytearray | None = None
        """A message that is longer than that, on its way: it is received where it stays ..."""
        self._large_at = 0
        """... and so much of it is there."""
        self._transport: asyncio.Transport | None = None
        self._waiting: dict[int, Octets] = {}
        """By tag, in the order in which they came."""
        self._octets = 0
        """Of those."""
        self._running: set[int] = set()
        self._flushes: dict[int, list[int]] = defaultdict(list)
        """Tags of Tflush, by those of what runs."""
        self._version: Octets | None = None
        """A Tversion, for which all others are awaited ..."""
        self._version_runs = False
        """... or not any more."""
        self._stalled = False
        self._reading = True
        self._timer: asyncio.TimerHandle | None = None
        self.flushed = 0
        """Requests that were taken away."""
        self.stalls = 0
        """How often reading was put off, for there was too much."""

    @property
    def outstanding(self) -> int:
        """Requests that were read and not answered."""
        return len(self._waiting) + len(self._running) + sum(map(len, self._flushes.values()))

    def close(self) -> None:
        """As if the client had gone."""
        if self._transport is not None:
            self._transport.abort()

    # asyncio's protocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)  # uvloop's are none by type
        self._transport = transport
        transport.set_write_buffer_limits(high=self._limits.msize)
        self._close_in(HELLO_S, "said no version")

    def _close_in(self, seconds: float, why: str) -> None:
        self._keep_open()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._lost_patience, why)

    def _keep_open(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _lost_patience(self, why: str) -> None:
        log.info("a client of 9P is closed: it %s", why)
        self.close()

    def get_buffer(self, _sizehint: int) -> memoryview:
        return self._buffer if self._large is None else memoryview(self._large)[self._large_at :]

    def buffer_updated(self, octets: int) -> None:
        if self._large is None:
            self._decoder.feed(self._buffer[:octets])
        else:
            self._large_at += octets
        self._pump()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self._stalled = True
        self._close_in(STALL_S, "does not take its answers")

    def resume_writing(self) -> None:
        self._stalled = False
        self._keep_open()
        if not self.session.msize:
            self._close_in(HELLO_S, "said no version")
        self._pump()

    def connection_lost(self, _error: Exception | None) -> None:
        self._keep_open()
        self._transport = None
        self._waiting.clear()
        self._version = None
        self._flushes.clear()
        self._end()

    def _end(self) -> None:
        if not self._running:
            self._pool.submit(self.session.close, lambda _: self._ended())  # a file may block when it is closed

    # Requests.

    @property
    def _full(self) -> bool:
        return (
            self._version is not None
            or self._stalled
            or self.outstanding >= self._limits.session_requests
            or self._octets >= 2 * self._limits.msize
        )

    def _pump(self) -> None:
        """Begin what can be begun, and read on when there is room."""
        transport = self._transport
        if transport is None:
            return
        self._begin()
        while not self._full:
            try:
                message = self._next()
            except Malformed as error:
                log.warning("a client of 9P is closed: %s", error)
                transport.abort()
                return
            if message is None:
                break
            self._take(message)
        reading = not self._full
        if reading != self._reading:
            self._reading = reading
            self.stalls += not reading
            (transport.resume_reading if reading else transport.pause_reading)()

    def _next(self) -> Octets | None:
        """The next whole message. Raises `Malformed`."""
        if self._large is None:
            message = self._decoder.next()
            if message is not None or (size := self._decoder.size()) <= BUFFER:
                return message
            begun = self._decoder.take()
            self._large, self._large_at = bytearray(size), len(begun)
            self._large[: len(begun)] = begun
        if self._large_at < len(self._large):
            return None
        large, self._large = self._large, None
        return memoryview(large)

    def _take(self, message: Octets) -> None:
        kind, tag = wire.type_of(message), tag_of(message)
        if kind == wire.TVERSION:
            self._version = message
        elif kind == wire.TFLUSH:
            self._flush(message)
            return
        elif tag in self._waiting or tag in self._running:
            self._send(wire.emit(m.Rlerror(tag, EINVAL)))
            return
        else:
            self._waiting[tag] = message
            self._octets += len(message)
        self._begin()

    def _flush(self, message: Octets) -> None:
        try:
            request = wire.parse(message)
        except Malformed:
            self._send(wire.emit(m.Rlerror(tag_of(message), EINVAL)))
            return
        assert isinstance(request, m.Tflush)
        if request.oldtag in self._running:
            self._flushes[request.oldtag].append(request.tag)
            return
        taken = self._waiting.pop(request.oldtag, None)
        if taken is not None:
            self._octets -= len(taken)
            self.flushed += 1
        self._send(wire.emit(m.Rflush(request.tag)))

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self._limits.session_running and not self._stalled:
            tag = next(iter(self._waiting))
            message = self._waiting.pop(tag)
            self._octets -= len(message)
            self._run(tag, message)
        if self._version is not None and not self._version_runs and not self._running and not self._waiting:
            self._version_runs = True
            self._run(tag_of(self._version), self._version)

    def _run(self, tag: int, message: Octets) -> None:
        self._running.add(tag)
        session, view = self.session, memoryview(message)
        self._pool.submit(lambda: session.answer(view), lambda answer: self._answered(tag, answer))

    def _answered(self, tag: int, answer: Octets | None) -> None:
        self._running.discard(tag)
        if self._transport is None:
            self._end()
            return
        if answer is None:  # a bug of ours: who knows what is left of the connection
            self.close()
            return
        self._send(answer)
        for flush in self._flushes.pop(tag, ()):
            self._send(wire.emit(m.Rflush(flush)))
        if self._version_runs:
            self._version, self._version_runs = None, False
            if self.session.msize:
                self._decoder.limit = self.session.msize
                self._keep_open()
        self._pump()

    def _send(self, octets: Octets) -> None:
        if self._transport is not None:
            self._transport.write(octets)
