"""What is said on a flow's own host socket before the flow begins: to the program of a tunnel, to a proxy on the way out.

What both sides say is an `Exchange`, without I/O; how the socket comes to be connected is for who builds on `Handshake`. The
guest's SYN waits meanwhile as it does for a connect, with the same limit (`tcp_connect_s`) and the same ends: the flow is in
the table already and owns the socket, so a RST of the guest, the limit and the end of the stack close it. `Handshake` is what
the socket calls until then; afterwards it is the flow's alone.

What comes is looked at (`MSG_PEEK`) and only what belongs to the exchange is taken out, so that what the other side says right
behind it waits in the socket for the flow.

Bounds: one handshake per flow; the exchange bounds what it keeps.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final, Protocol

from netstack.errors import HostError
from netstack.host.tcp_flow import TcpFlow
from netstack.host.timers import Entry

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy

LOOK: Final = 4096
"""Octets that are looked at together; an exchange may be longer."""


class Refused(HostError):
    """The other side does not take the connection. `number` is the errno of a direct connect that failed so, 0 where none fits."""

    def __init__(self, words: str, number: int = 0) -> None:
        super().__init__(words)
        self.number = number


class Exchange(Protocol):
    """What both sides say before the octets of the connection; without I/O."""

    done: bool
    """The other side has accepted, and nothing of the exchange is left to hear."""

    def say(self) -> bytes:
        """What is to be said now; each octet once, nothing while the other side is to speak."""
        ...

    def hear(self, octets: bytes) -> int:
        """What has come: how many of the octets belong to the exchange (at least one until it is done). Raises `HostError`."""
        ...


class Handshake:
    """See the module. `TcpProxy.begun(flow)` or `_failed` is called in the end, unless the flow ends before."""

    def __init__(self, proxy: TcpProxy, flow: TcpFlow, exchange: Exchange) -> None:
        self.timer_at = 0.0
        self.timer_entry: Entry | None = None
        self._proxy = proxy
        self._flow = flow
        self._sock: Any = flow.sock
        self._exchange = exchange
        self._to_say = b""
        self._to_take = 0
        """So many octets were heard and are still in the socket."""

    def start(self, now: float) -> None:
        """Have the socket connected, then `_converse`."""
        raise NotImplementedError

    def _failed(self, error: Exception) -> None:
        """It did not come to a connection (`OSError`, `HostError`)."""
        raise NotImplementedError

    def timer(self, now: float) -> None:
        """What was armed is due."""
        if not self._flow.end:
            self.start(now)

    def abort(self, reason: str) -> None:
        """A bug of ours: the flow ends."""
        self._flow.abort(reason)

    def ready(self, mask: int) -> None:
        """The socket's edge-triggered event."""
        if self._flow.end:
            return
        try:
            self._converse()
        except (OSError, HostError) as error:
            self._failed(error)

    def _converse(self) -> None:
        """Say what is left, hear what came; the flow begins when all is said."""
        exchange = self._exchange
        self._say()
        while not exchange.done and self._hear():
            self._say()
        if exchange.done and not self._to_say:
            self._begun()

    def _begun(self) -> None:
        """All is said: the socket is the flow's."""
        self._unwatch()
        self._proxy.begun(self._flow)

    def _watch(self, *, write: bool) -> None:
        self._proxy.io.watch(self._sock.fileno(), self.ready, write=write)
        self._flow.watched = True

    def _unwatch(self) -> None:
        if self._flow.watched:
            self._proxy.io.unwatch(self._sock.fileno())
            self._flow.watched = False

    def _say(self) -> None:
        self._to_say += self._exchange.say()
        try:
            while self._to_say:
                self._to_say = self._to_say[self._sock.send(self._to_say) :]
        except BlockingIOError:
            if self._flow.watched:
                self._proxy.io.watch_write(self._sock.fileno())

    def _hear(self) -> bool:
        """Whether anything came."""
        try:
            if not self._to_take:
                octets = self._sock.recv(LOOK, socket.MSG_PEEK)
                if not octets:
                    raise HostError("it closed the connection without an answer")
                self._to_take = self._exchange.hear(octets)
            while self._to_take:
                self._to_take -= len(self._sock.recv(self._to_take))
        except BlockingIOError:
            return False
        return True
