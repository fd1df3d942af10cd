"""The host sockets of forwards.

A stream listener (TCP or Unix) hands every connection it accepts (`portfwd.acceptor`) to `Carriers.stream`; nothing of a connection
stays with it. A UDP port is one bound socket lent to `Carriers.datagrams`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Protocol

from netstack.api import Datagrams
from netstack.errors import ConfigError
from netstack.link.listening import UnixSocket
from portfwd.acceptor import Acceptor
from portfwd.carriers import Carriers, Way
from portfwd.errors import BindFailed
from portfwd.holders import explain
from portfwd.spec import PublishSpec

log = logging.getLogger("pyvpnkit.portfwd")

BACKLOG: Final = 4096
"""Asked of the kernel, which caps it at net.core.somaxconn."""

Inherit = Callable[[PublishSpec], socket.socket | None]
"""A bound socket for a spec that somebody with more rights prepared (`portfwd.inherited`), or `None`."""


class Listener(Protocol):
    """One bound port or path."""

    spec: PublishSpec
    """As asked for, with the host port that was really bound."""
    accepted: int
    """Connections taken so far."""

    def start(self, loop: asyncio.AbstractEventLoop) -> None: ...

    def retarget(self) -> None:
        """The default guest may have changed."""
        ...

    def close(self) -> None: ...


def open_listener(
    spec: PublishSpec, carriers: Carriers, inherit: Inherit = lambda spec: None, way: Way | None = None
) -> Listener:
    """Bind what `spec` (a single port or path) says; raises `BindFailed` that says what is in the way.

    Connections go to `way`, which is for streams only, else to `carriers`.
    """
    if spec.protocol == "unix":
        path = _unix_socket(spec)
        return StreamListener(spec, path.sock, way or carriers, path.close)
    sock = inherit(spec) or _bound_socket(spec)
    actual = replace(spec, port=sock.getsockname()[1])
    if spec.protocol == "tcp":
        return StreamListener(actual, sock, way or carriers, sock.close)
    return UdpListener(actual, sock, carriers)


def _unix_socket(spec: PublishSpec) -> UnixSocket:
    """A dead socket at the path is replaced, anything else refused; directories on the way are made."""
    try:
        os.makedirs(os.path.dirname(spec.path), mode=0o755, exist_ok=True)
        return UnixSocket(spec.path, socket.SOCK_STREAM, setting="unix", backlog=BACKLOG)
    except ConfigError as error:
        raise BindFailed(spec, str(error).removeprefix("unix: "), errno.EADDRINUSE) from None
    except OSError as error:
        why = f"{error.filename}: {error.strerror}; choose another path"
        raise BindFailed(spec, why, error.errno or errno.EIO) from None


def _bound_socket(spec: PublishSpec) -> socket.socket:
    """A non-blocking socket bound (and listening, for TCP) as `spec` says."""
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
        why = explain(error, spec.protocol, spec.bind, spec.port)
        raise BindFailed(spec, why, error.errno or errno.EIO) from None
    return sock


class StreamListener(Acceptor):
    """A published TCP port or Unix socket. `release` frees it."""

    def __init__(
        self, spec: PublishSpec, sock: socket.socket, carriers: Carriers | Way, release: Callable[[], None]
    ) -> None:
        super().__init__(sock, self._carry, spec)
        self.spec = spec
        self._carriers = carriers
        self._release = release

    def _carry(self, connection: socket.socket, client: Any) -> None:
        self._carriers.stream(self.spec, connection, client)

    def retarget(self) -> None:
        """Nothing to do: each connection asks for the guest anew."""

    def close(self) -> None:
        """Free the port; connections that were handed on live on."""
        self.stop()
        self._release()


class UdpListener:
    """A published UDP port."""

    accepted = 0

    def __init__(self, spec: PublishSpec, sock: socket.socket, carriers: Carriers) -> None:
        self.spec = spec
        self._sock = sock
        self._carriers = carriers
        self._started = False
        self._target = b""
        self._datagrams: Datagrams | None = None

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._started = True
        self.retarget()

    def retarget(self) -> None:
        target = b"forwarder" if self.spec.via == "forwarder" else self._carriers.guest(self.spec)
        if not self._started or target == self._target:
            return
        if self._datagrams is not None:
            self._datagrams.close()
        self._target = target
        # A duplicate, because who carries closes what it was lent, and the port must stay ours for the next guest.
        self._datagrams = self._carriers.datagrams(self.spec, self._sock.dup())

    def close(self) -> None:
        if self._datagrams is not None:
            self._datagrams.close()
            self._datagrams = None
        self._sock.close()
