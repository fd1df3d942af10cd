"""A connection of its own as a channel: generation 1, where the destination stands before the octets (spec vpnkit 7.3.1).

There are no windows: what is not consumed stops the reading of the connection, and the kernel's buffers do the rest.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable
from functools import cached_property
from typing import Final

from portfwd.carriers import Destination
from portfwd.mux.channel import Ending, Receiver
from portfwd.mux.splice import send_at_once

CHUNK: Final = 1 << 16
KEPT: Final = 1 << 18
"""Octets received and not consumed, from which on nothing more is read."""


class RawChannel:
    """`Channel` over a connected stream socket that it owns."""

    def __init__(
        self,
        sock: socket.socket,
        destination: Destination,
        *,
        first: bytes = b"",
        received: bytes = b"",
        on_end: Callable[[RawChannel], None] | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`first` is sent before all else (the destination); `received` was read from `sock` already. `on_end` is called when
        the socket was closed."""
        self._loop = loop or asyncio.get_running_loop()
        self._sock = sock
        self._destination = destination
        self._received = received
        self._pending = bytearray(first)
        """Octets for the peer that the socket did not take yet; less than `CHUNK` and `first`."""
        self._on_end = on_end
        self._receiver: Receiver | None = None
        self._kept = 0
        self._spoken = False
        self._reading = self._writing = self._wanting = False
        self._ended = self._shut = self._closing = self._over = False
        sock.setblocking(False)
        send_at_once(sock)
        if first:
            self._watch_writing()

    @property
    def destination(self) -> Destination:
        return self._destination

    @cached_property
    def scratch(self) -> memoryview:
        return memoryview(bytearray(CHUNK))

    def attach(self, receiver: Receiver) -> None:
        assert self._receiver is None
        if self._over or self._closing:
            if not self._closing:
                self._loop.call_soon(receiver.closed, Ending.LOST)
            return
        self._receiver = receiver
        self._loop.call_soon(self._catch_up)

    def _catch_up(self) -> None:
        received, self._received = self._received, b""
        if received and not self._closing and not self._over:
            self._told(memoryview(received))
        self._watch_reading()

    def sendable(self) -> int:
        if self._shut or self._closing or self._over:
            return 0
        if self._pending:
            self._wanting = True
            return 0
        return CHUNK

    def send(self, octets: memoryview) -> None:
        try:
            taken = self._sock.send(octets)
        except (BlockingIOError, InterruptedError):
            taken = 0
        except OSError:
            self._loop.call_soon(self._break)  # the caller is in the middle of something
            return
        if taken < len(octets):
            self._pending += octets[taken:]
            self._watch_writing()

    def consumed(self, octets: int) -> None:
        self._kept -= octets
        self._watch_reading()

    def shutdown(self) -> None:
        if not self._shut and not self._closing and not self._over:
            self._shut = True
            if not self._pending:
                self._shut_now()

    def close(self) -> None:
        """Octets that were sent and a shutdown still go out, while the peer reads them."""
        if self._closing or self._over:
            return
        self._closing = True
        self._watch_reading()
        if not self._pending:
            self._end()

    def abort(self) -> None:
        """The connection is given up: the receiver is told that the channel is lost."""
        self._break()

    # Events of the socket.

    def _watch_reading(self) -> None:
        wanted = not (self._closing or self._ended or self._over) and self._receiver is not None and self._kept < KEPT
        if wanted is not self._reading and self._sock.fileno() >= 0:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._sock.fileno(), self._readable)
            else:
                self._loop.remove_reader(self._sock.fileno())

    def _watch_writing(self) -> None:
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _readable(self) -> None:
        try:
            octets = self._sock.recv(CHUNK)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._break()
            return
        if octets:
            self._told(memoryview(octets))
            self._watch_reading()
            return
        self._ended = True
        self._watch_reading()
        assert self._receiver is not None
        if not self._shut and self._hung_up():
            if self._spoken:
                self._receiver.ended()
            if not self._closing and not self._over:
                self._receiver.closed(Ending.CLOSED if self._spoken else Ending.REFUSED)
        else:
            self._receiver.ended()

    def _hung_up(self) -> bool:
        """The end of file is that of both directions: who is there refused, or is gone."""
        poll = select.poll()
        poll.register(self._sock.fileno(), 0)
        return bool(poll.poll(0))

    def _told(self, octets: memoryview) -> None:
        assert self._receiver is not None
        self._spoken = True
        self._kept += len(octets)
        self._receiver.data(octets)

    def _writable(self) -> None:
        try:
            taken = self._sock.send(self._pending)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._break()
            return
        del self._pending[:taken]
        if self._pending:
            return
        self._writing = False
        self._loop.remove_writer(self._sock.fileno())
        if self._shut:
            self._shut_now()
        if self._closing:
            self._end()
        elif self._wanting and self._receiver is not None:
            self._wanting = False
            self._receiver.room()

    def _shut_now(self) -> None:
        try:
            self._sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the other side is gone; reading tells

    def _break(self) -> None:
        if not self._over:
            told = not self._closing
            self._end()
            if told and self._receiver is not None:
                self._receiver.closed(Ending.LOST)

    def _end(self) -> None:
        self._over = True
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        if self._on_end is not None:
            self._on_end(self)
