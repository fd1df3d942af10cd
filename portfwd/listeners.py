"""The host sockets of published ports.

A TCP listener is a raw non-blocking socket with a reader in the loop: each wake-up accepts a batch and hands every connected
socket to `Dialer.dial`, which carries it into the guest; nothing of a connection stays here. When descriptors run out
the listener sleeps a quarter of a second instead of being woken for ever by the connection it cannot accept; those who wait
stay in the kernel's queue and are served when descriptors come back. A UDP port is one bound socket lent to
`Dialer.datagrams`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final, Protocol

from netstack.api import Datagrams, Dialer, Endpoint
from netstack.errors import HostError
from portfwd.holders import explain
from portfwd.spec import PublishSpec

log = logging.getLogger("pyvpnkit.portfwd")

BACKLOG: Final = 4096
"""Asked of the kernel, which caps it at net.core.somaxconn."""
ACCEPT_BATCH: Final = 64
"""Connections taken per wake-up, so that a flood on one port leaves the loop to others."""
PAUSE_S: Final = 0.25
"""Rest of a listener that ran out of descriptors or memory."""

_SCARCE: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})

FindGuest = Callable[[], bytes]
"""The address of the guest meant by a spec without GUESTIP, in network order."""


class Listener(Protocol):
    """One bound port."""

    spec: PublishSpec
    """As asked for, with the host port that was really bound."""

    def start(self, dialer: Dialer, loop: asyncio.AbstractEventLoop) -> None: ...

    def retarget(self) -> None:
        """The default guest may have changed."""
        ...

    def close(self) -> None: ...


def bound_socket(spec: PublishSpec) -> socket.socket:
    """A non-blocking socket bound (and listening, for TCP) as `spec` says; raises `HostError` that says what is in the way."""
    family = socket.AF_INET6 if ":" in spec.bind else socket.AF_INET
    kind = socket.SOCK_STREAM if spec.protocol == "tcp" else socket.SOCK_DGRAM
    sock = None
    try:
        sock = socket.socket(family, kind)
        sock.setblocking(False)
        if family == socket.AF_INET6:
            # Else [::] would take the IPv4 port as well, and collide with a listener that names 0.0.0.0.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if kind == socket.SOCK_STREAM:
            # So that a restart need not wait for the TIME_WAIT of its last connections; a second listener is still refused.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((spec.bind, spec.port))
        if kind == socket.SOCK_STREAM:
            sock.listen(BACKLOG)
    except OSError as error:
        if sock is not None:
            sock.close()
        raise HostError(f"cannot publish {spec}: {explain(error, spec.protocol, spec.bind, spec.port)}") from None
    return sock


class TcpListener:
    """A published TCP port."""

    def __init__(self, spec: PublishSpec, sock: socket.socket, find_guest: FindGuest) -> None:
        self.spec = spec
        self._sock = sock
        self._find_guest = find_guest
        self._fixed = None if spec.guest is None else socket.inet_aton(spec.guest)
        self._dialer: Dialer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._pause: asyncio.TimerHandle | None = None
        self.accepted = 0
        self.pauses = 0
        """Times this listener rested because descriptors or memory were short."""

    def start(self, dialer: Dialer, loop: asyncio.AbstractEventLoop) -> None:
        self._dialer, self._loop = dialer, loop
        loop.add_reader(self._sock.fileno(), self._accept)

    def _accept(self) -> None:
        assert self._dialer is not None
        for _ in range(ACCEPT_BATCH):
            try:
                connection, _peer = self._sock.accept()
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
                self._dialer.dial(Endpoint(self._fixed or self._find_guest(), self.spec.guest_port), connection)
            except Exception:  # one connection's failure must not end the port
                log.exception("%s: a connection could not be handed on", self.spec)
                connection.close()

    def _rest(self, error: OSError) -> None:
        assert self._loop is not None
        if not self.pauses:
            log.warning("%s: %s; clients wait in the queue until descriptors are free", self.spec, error.strerror)
        self.pauses += 1
        self._loop.remove_reader(self._sock.fileno())
        self._pause = self._loop.call_later(PAUSE_S, self._resume)

    def _resume(self) -> None:
        assert self._loop is not None
        self._pause = None
        self._loop.add_reader(self._sock.fileno(), self._accept)

    def retarget(self) -> None:
        """Nothing to do: each connection asks for the guest anew."""

    def close(self) -> None:
        """Free the port; connections that were handed on live on."""
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        elif self._loop is not None and self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        self._sock.close()


class UdpListener:
    """A published UDP port."""

    def __init__(self, spec: PublishSpec, sock: socket.socket, find_guest: FindGuest) -> None:
        self.spec = spec
        self._sock = sock
        self._find_guest = find_guest
        self._fixed = None if spec.guest is None else socket.inet_aton(spec.guest)
        self._dialer: Dialer | None = None
        self._guest = b""
        self._datagrams: Datagrams | None = None

    def start(self, dialer: Dialer, loop: asyncio.AbstractEventLoop) -> None:
        self._dialer = dialer
        self.retarget()

    def retarget(self) -> None:
        guest = self._fixed or self._find_guest()
        if self._dialer is None or guest == self._guest:
            return
        if self._datagrams is not None:
            self._datagrams.close()
        self._guest = guest
        # A duplicate, because the stack closes what it was lent and the port must stay ours for the next guest.
        self._datagrams = self._dialer.datagrams(Endpoint(guest, self.spec.guest_port), self._sock.dup())

    def close(self) -> None:
        if self._datagrams is not None:
            self._datagrams.close()
            self._datagrams = None
        self._sock.close()
