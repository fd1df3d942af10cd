"""Taking the connections of a listening socket, in a loop.

Each wake-up accepts a batch and hands every connected, non-blocking socket on; nothing of a connection stays here. When descriptors
run out the acceptor rests a quarter of a second instead of being woken for ever by the connection it cannot accept; those who
wait stay in the kernel's queue and are served when descriptors come back.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Any, Final

log = logging.getLogger("pyvpnkit.portfwd")

ACCEPT_BATCH: Final = 64
"""Connections taken per wake-up, so that a flood on one port leaves the loop to others."""
PAUSE_S: Final = 0.25
"""Rest of an acceptor that ran out of descriptors or memory."""

_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


class Acceptor:
    """`take(connection, client)` owns each connection; `client` is what accept(2) says of its other end. It should not raise: what
    it raises is logged, and that connection closed. The listening socket stays its owner's, and is non-blocking."""

    def __init__(self, sock: socket.socket, take: Callable[[socket.socket, Any], None], name: object) -> None:
        self._sock = sock
        self._take = take
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pause: asyncio.TimerHandle | None = None
        self.accepted = 0
        self.pauses = 0
        """Times it rested because descriptors or memory were short."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        loop.add_reader(self._sock.fileno(), self._accept)

    def stop(self) -> None:
        """Take no more; before the socket is closed. Harmless when repeated."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        elif self._loop is not None and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        self._loop = None

    def _accept(self) -> None:
        for _ in range(ACCEPT_BATCH):
            try:
                connection, client = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno in _SCARCE:
                    self._rest(error)
                    return
                continue  # ECONNABORTED and its kin: that client gave up (accept(2): treat like EAGAIN)
            self.accepted += 1
            connection.setblocking(False)
            try:
                self._take(connection, client)
            except Exception:  # one connection's failure must not end the port
                log.exception("%s: a connection could not be handed on", self._name)
                connection.close()

    def _rest(self, error: OSError) -> None:
        assert self._loop is not None
        if not self.pauses:
            log.warning("%s: %s; clients wait in the queue until descriptors are free", self._name, error.strerror)
        self.pauses += 1
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        self._pause = None
        if self._loop is not None:
            self._loop.add_reader(self._sock.fileno(), self._accept)
