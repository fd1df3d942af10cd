"""Octets both ways between two sockets, until both directions have ended: what CONNECT and 101 become.

Each direction has one buffer, and is read only while that is empty, so a slow end stops its own sender and holds `BUFFER` octets
at most. The end of one direction crosses (`shutdown`) and the other goes on (TCP half-close). A fault of either end ends both.

A socket whose other end is gone altogether does not tell while nothing is read from it or written to it; so after the first
end of a direction both are looked at now and then.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Callable, Iterator
from typing import Final

BUFFER: Final = 64 << 10
_TURNS: Final = 4
"""Reads of one direction before the loop has its turn."""
_LOOK_S: Final = 5.0
GONE_S: Final = 1.0


def hung_up(sock: socket.socket) -> bool:
    """Whether neither direction of it works any more."""
    poll = select.poll()
    poll.register(sock.fileno(), 0)
    return bool(poll.poll(0))


@contextlib.contextmanager
def unless_gone(sock: socket.socket, gone: Callable[[], object]) -> Iterator[None]:
    """Meanwhile look at `sock` now and then without reading from it, and call `gone` once when its other end is gone."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer
        if hung_up(sock):
            gone()
        else:
            timer = loop.call_later(GONE_S, look)

    timer = loop.call_later(GONE_S, look)
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


class _Way:
    """One direction. `over(error)` is called once."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        source: socket.socket,
        sink: socket.socket,
        first: bytes,
        over: Callable[[BaseException | None], None],
    ) -> None:
        self.octets = 0
        self.ended = False
        self._loop = loop
        self.source = source
        self._sink = sink
        self._over = over
        self._room = bytearray(0)
        self._left = memoryview(first)

    def start(self) -> None:
        if self._left:
            self._loop.add_writer(self._sink, self._writable)
        else:
            self._loop.add_reader(self.source, self._readable)

    def stop(self) -> None:
        self.ended = True
        self._loop.remove_reader(self.source)
        self._loop.remove_writer(self._sink)

    def _readable(self) -> None:
        if not self._room:
            self._room = bytearray(BUFFER)
        room = memoryview(self._room)
        try:
            for _ in range(_TURNS):
                count = self.source.recv_into(room)
                if not count:
                    self._finish()
                    return
                sent = self._send(room[:count])
                if sent < count:
                    self._wait(room[sent:count])
                    return
                if count < BUFFER:
                    return
        except BlockingIOError:
            pass
        except OSError as error:
            self._over(error)

    def _send(self, octets: memoryview) -> int:
        try:
            sent = self._sink.send(octets)
        except BlockingIOError:
            return 0
        self.octets += sent
        return sent

    def _wait(self, left: memoryview) -> None:
        """The sink is full."""
        self._left = left
        self._loop.remove_reader(self.source)
        self._loop.add_writer(self._sink, self._writable)

    def _writable(self) -> None:
        try:
            self._left = self._left[self._send(self._left) :]
        except OSError as error:
            self._over(error)
            return
        if not self._left:
            self._loop.remove_writer(self._sink)
            self._loop.add_reader(self.source, self._readable)

    def _finish(self) -> None:
        """The source has ended."""
        self.stop()
        with contextlib.suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self._over(None)


class Relay:
    """See the module. The sockets are non-blocking and nobody else's; they are closed in the end.

    `to_one` and `to_other` are octets that were read already and go first.
    """

    def __init__(self, one: socket.socket, other: socket.socket, *, to_one: bytes = b"", to_other: bytes = b"") -> None:
        self._loop = asyncio.get_running_loop()
        self._sockets = one, other
        self._ways = (
            _Way(self._loop, one, other, to_other, self._over),
            _Way(self._loop, other, one, to_one, self._over),
        )
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def octets(self) -> tuple[int, int]:
        """From the first to the other, and back."""
        return self._ways[0].octets, self._ways[1].octets

    async def run(self) -> None:
        """Until it is over, whatever ended it."""
        try:
            for way in self._ways:
                way.start()
            await self._done
        finally:
            if self._timer is not None:
                self._timer.cancel()
            for way in self._ways:
                way.stop()
            for sock in self._sockets:
                sock.close()

    def _over(self, error: BaseException | None) -> None:
        if self._done.done():
            return
        if error is not None or all(way.ended for way in self._ways):
            self._done.set_result(None)
        elif self._timer is None:
            self._look()

    def _look(self) -> None:
        # Only where its end was read: what a socket still holds is not to be lost.
        if any(way.ended and hung_up(way.source) for way in self._ways):
            self._over(ConnectionResetError())
        else:
            self._timer = self._loop.call_later(_LOOK_S, self._look)
