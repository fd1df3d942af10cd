"""One host socket of a connection over vsock. HOT PATH.

Octets of the guest go from its memory into the socket by `sendmsg`; what the socket does not take is copied and held, as much as
the guest has credit for. Octets of the host stay in the kernel until the device reads them into the guest's buffers.

A half-close of either side becomes one of the other: end of file here is SHUTDOWN there, and the other way round. A peer that
has closed altogether shows as a hang-up, and one that takes no more as EPIPE; the guest is told both.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import Final

from vm.vsock.connection import Connection, State
from vm.vsock.packet import NO_MORE, NO_MORE_RECEIVE, NO_MORE_SEND
from vm.vsock.poller import END, HANGUP, OUT, READABLE

_PIECES: Final = 256
"""Of one `sendmsg`; the kernel's limit is 1024."""
BUFFER: Final = 1 << 20
"""Octets of the socket's buffer that we ask for; the kernel gives what an administrator allows."""
FEWEST: Final = 2
"""Buffers of the guest that a read is laid out over at first."""
MOST: Final = 64


class Stream:
    """`sock` becomes its own. The device has it watched, with `ready` told of what happens.

    `wants_turn(stream)` is called when the device should read from it, `lost(stream)` when the host has cut it off or went before
    the guest answered, `ended(stream)` when all is said and it wants to be closed.
    """

    __slots__ = (
        "_ended",
        "_held",
        "_lost",
        "_shut",
        "_wants_turn",
        "at_end",
        "connection",
        "draining",
        "ending",
        "greeting",
        "hung_up",
        "open",
        "pieces",
        "queued",
        "readable",
        "sock",
        "views",
        "writable",
    )

    def __init__(
        self,
        sock: socket.socket,
        connection: Connection,
        *,
        wants_turn: Callable[[Stream], None],
        lost: Callable[[Stream], None],
        ended: Callable[[Stream], None],
        greeting: bytes = b"",
    ) -> None:
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)
        self.sock = sock
        self.connection = connection
        self.greeting = greeting
        """What the host is told first when the guest has taken its connection."""
        self.open = True
        self.readable = False
        self.writable = True
        self.ending = False
        """The host sends no more than what is in the socket already."""
        self.at_end = False
        """All of it was read."""
        self.hung_up = False
        self.draining = False
        """The guest knows nothing of this any more; the socket is closed when it has taken the rest."""
        self.queued = False
        """Stands in the device's queue of those that want to be read."""
        self.pieces = FEWEST
        """Buffers of the guest that the next read is laid out over."""
        self.views: list[memoryview] = []
        """Octets in the guest's memory that are to be sent in this turn."""
        self._held = bytearray()
        self._shut = 0
        """Which of the guest's half-closes the socket has seen."""
        self._wants_turn = wants_turn
        self._lost = lost
        self._ended = ended

    # The socket's news.

    def ready(self, mask: int) -> None:
        """Something happened at the socket."""
        if mask & (OUT | HANGUP):
            self.writable = True
            self._send_held()
        if not mask & READABLE or not self.open:
            return
        if mask & END:
            self.ending = True
        if mask & HANGUP:
            self.hung_up = True
            if self.connection.state is State.CONNECTING:
                self._lost(self)
                return
            if self.at_end or self.connection.guest_shut & NO_MORE_RECEIVE:
                self.connection.host_shuts(NO_MORE)
        if not self.at_end:
            self.readable = True
            self._wants_turn(self)

    # Octets of the host.

    def read_into(self, buffers: list[memoryview], octets: int) -> int:
        """Read into all of `buffers`, which have `octets` octets: how many came; -1 where there are none now, and 0 at their end,
        which the connection is told."""
        try:
            count, _ancillary, flags, _address = self.sock.recvmsg_into(buffers)
        except (BlockingIOError, InterruptedError):
            self.readable = False
            return -1
        except OSError:
            self.readable = False
            self._lost(self)
            return -1
        if not count:
            self.readable = False
            self.at_end = True
            self.connection.host_shuts(NO_MORE if self.hung_up else NO_MORE_SEND)
        elif count < octets and not self.ending and not flags & socket.MSG_CTRUNC:
            # All there was; what comes next is an edge. (Descriptors that came along, and are thrown away, cut a read short.)
            self.readable = False
        return count

    # Octets of the guest.

    def flush(self) -> None:
        """Send what is in the guest's memory, and hold the rest: no view is looked at afterwards."""
        views = self.views
        if not views:
            return
        self.views = []
        at = 0
        while at < len(views) and not self._held:
            some = views[at : at + _PIECES]
            at += _PIECES
            sent = self._send(some)
            if sent < sum(map(len, some)):
                self._held += b"".join(some)[sent:]
        if at < len(views):
            self._held += b"".join(views[at:])

    def _send_held(self) -> None:
        if not self._held:
            return
        while self._held:
            with memoryview(self._held) as whole:
                sent = self._send([whole])
            if not sent:
                return
            del self._held[:sent]
        self.guest_shuts()

    def _send(self, views: list[memoryview]) -> int:
        """How much the host took, or what is as good: where it takes nothing any more, all."""
        connection = self.connection
        if not connection.host_shut & NO_MORE_RECEIVE:
            try:
                sent = self.sock.sendmsg(views)
            except (BlockingIOError, InterruptedError):
                self.writable = False
                return 0
            except OSError:
                connection.host_shuts(NO_MORE_RECEIVE)
            else:
                connection.taken(sent)
                return sent
        octets = sum(map(len, views))
        connection.taken(octets)
        return octets

    # Ends.

    def guest_shuts(self) -> None:
        """The guest sends no more, or takes no more, or both and has forgotten the connection: so does the socket, when it has
        taken what is held."""
        shut = self.connection.guest_shut & ~self._shut
        if shut & NO_MORE_RECEIVE or (self.draining and not self._shut & NO_MORE_RECEIVE):
            self._shut |= NO_MORE_RECEIVE
            self.readable = False
            self._shut_down(socket.SHUT_RD)
        if self._held:
            return
        if self.draining:
            self._ended(self)
        elif shut & NO_MORE_SEND:
            self._shut |= NO_MORE_SEND
            self._shut_down(socket.SHUT_WR)

    def _shut_down(self, how: int) -> None:
        with contextlib.suppress(OSError):  # the other end has gone
            self.sock.shutdown(how)

    def finish(self) -> None:
        """The connection is no more: close the socket as soon as it has taken what the guest sent before."""
        self.flush()
        self.draining = True
        self.guest_shuts()

    def greet(self) -> None:
        """The guest has taken the host's connection. The few octets fit into an empty buffer."""
        if self.greeting:
            with contextlib.suppress(OSError):  # gone, as the next read will say
                self.sock.send(self.greeting)
        if self.hung_up or self.readable:
            self._wants_turn(self)

    def close(self) -> None:
        """At once, whatever is held. Whoever has it watched has ended that."""
        self.open = False
        self._held.clear()
        self.views = []
        self.sock.close()
