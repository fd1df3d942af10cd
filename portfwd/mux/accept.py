"""The side that is spoken to: finds the generation by the first octets and hands on channels, whatever carries them."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Final

from netstack.errors import Malformed
from portfwd.mux.engine import DEFAULT, Limits, Role
from portfwd.mux.frames import MAX_PATH, MuxError, destination_size, detect, parse_destination
from portfwd.mux.raw import RawChannel
from portfwd.mux.session import OnOpen, Session

log = logging.getLogger("pyvpnkit.portfwd.mux")

_ENOUGH: Final = 3 + MAX_PATH
"""The longest beginning that is needed: a destination of generation 1."""


class Accepted:
    """One data connection of a host, in the VM: `generation` is known once it spoke."""

    def __init__(
        self,
        sock: socket.socket,
        on_open: OnOpen,
        *,
        role: Role = Role.LISTENER,
        generation: int | None = None,
        on_end: Callable[[str], None] | None = None,
        limits: Limits = DEFAULT,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """Owns `sock` (connected). `generation=None`: found by the first octets; a `CONNECTOR` (`-data-connect`) of
        generation 3 must say 3, as both sides wait to be greeted. `on_open(destination, channel)`: see `session.OnOpen`;
        a connection of generation 1 is one channel. `on_end(reason)` is called once, when the connection is over; the reason
        is empty for an orderly end. UDP: `destination.protocol == "udp"`, and the channel carries records
        (`records.RecordChannel`): with the client's address in generations 1 and 2, one channel per client and no address
        in 3."""
        self.generation = generation
        self._loop = loop or asyncio.get_running_loop()
        self._sock = sock
        self._on_open = on_open
        self._on_end = on_end
        self._role = role
        self._limits = limits
        self._first = bytearray()
        self._session: Session | None = None
        self._raw: RawChannel | None = None
        self._over = False
        self._finished: asyncio.Future[str] = self._loop.create_future()
        sock.setblocking(False)
        if generation in (2, 3):
            self._begin(generation)
        else:
            self._loop.add_reader(sock.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            octets = self._sock.recv(_ENOUGH)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"mux: the connection broke: {error.strerror}")
            return
        if not octets:
            self._end("mux: the connection ended within its first octets" if self._first else "")
            return
        self._first += octets
        try:
            if self.generation is None:
                self.generation = detect(bytes(self._first[:3]))
            if self.generation in (2, 3):
                self._loop.remove_reader(self._sock.fileno())
                self._begin(self.generation)
            elif self.generation == 1:
                size = destination_size(self._first)
                if size is not None and len(self._first) >= size:
                    self._loop.remove_reader(self._sock.fileno())
                    self._begin_raw(size)
        except (MuxError, Malformed) as error:
            self._end(str(error))

    def _begin(self, generation: int) -> None:
        self._session = Session(
            self._sock,
            generation=generation,
            role=self._role,
            on_open=self._on_open,
            on_end=self._ended,
            limits=self._limits,
            received=bytes(self._first),
            loop=self._loop,
        )

    def _begin_raw(self, size: int) -> None:
        destination = parse_destination(bytes(self._first[:size]))
        self._raw = RawChannel(
            self._sock,
            destination,
            received=bytes(self._first[size:]),
            on_end=lambda _raw: self._ended(""),
            loop=self._loop,
        )
        try:
            self._on_open(destination, self._raw)
        except Exception:  # as in Session: the caller's failure ends this channel
            log.exception("mux: %s could not be handed on", destination)
            self._raw.close()

    def close(self) -> None:
        """End it: every channel is lost. Harmless twice."""
        if self._session is not None:
            self._session.close()
        elif self._raw is not None:
            self._raw.abort()
        else:
            self._end("closed")

    async def wait_closed(self) -> str:
        """Waits for the end and returns the reason `on_end` is told."""
        return await asyncio.shield(self._finished)

    def dump(self) -> str:
        """The multiplexer's last 500 events, one a line."""
        return "" if self._session is None else self._session.dump()

    def _end(self, reason: str) -> None:
        """Before anything was handed on."""
        if not self._over:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._ended(reason)

    def _ended(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        if not self._finished.done():
            self._finished.set_result(reason)
        if self._on_end is not None:
            self._on_end(reason)
