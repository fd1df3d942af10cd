"""A channel and a connected host socket, joined. HOT PATH: `data` and `_readable`, once per chunk.

    socket -> read into the connection's scratch (no more than the channel takes) -> channel
    channel -> the socket, from the view; what it does not take is copied, and counts as consumed when it went

So what a socket does not take stops the peer by its window, and what the peer does not take stops the reading of the socket.
The flags `_read_over` (end of file from the socket) and `_peer_over` (none follow from the channel) are the halves; the splice
ends when both are set and everything went out, when the channel is over, or when the socket fails.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Final

from portfwd.mux.channel import Channel, Ending

_GATHER: Final = 64
_RESET: Final = struct.pack("ii", 1, 0)
"""SO_LINGER: close at once, and tell the peer by RST."""


def splice(
    channel: Channel,
    sock: socket.socket,
    *,
    preface: bytes = b"",
    on_close: Callable[[str], None] | None = None,
    loop: asyncio.AbstractEventLoop | None = None,
) -> Splice:
    """Carry octets both ways between `channel` and the connected, stream `sock` (TCP or unix), which it owns from here on.

    Attaches to the channel. `preface` goes into it before what the socket says. Half-close crosses both ways; what one side does
    not take stops the other. A channel that is refused or lost resets the socket (SO_LINGER 0), one that is closed closes it
    after the last octet. `on_close(reason)` is called once, at the end: a value of `Ending`, `reset` (the socket failed) or
    `aborted`.
    """
    return Splice(channel, sock, preface, on_close, loop or asyncio.get_running_loop())


def send_at_once(sock: socket.socket) -> None:
    """Switch Nagle's algorithm off where there is one."""
    if sock.family != socket.AF_UNIX:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass  # it is gone already, and will say so


def reset(sock: socket.socket) -> None:
    """Close so that the other side sees that something was wrong, not an end of file."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    except OSError:
        pass  # it is gone already
    sock.close()


class Splice:
    """See `splice`; a `Receiver`."""

    def __init__(
        self,
        channel: Channel,
        sock: socket.socket,
        preface: bytes,
        on_close: Callable[[str], None] | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._channel = channel
        self._sock = sock
        self._preface = memoryview(preface)
        self._on_close = on_close
        self._loop = loop
        self._scratch = channel.scratch
        self._pending: deque[bytes | memoryview] = deque()
        """Octets from the channel that the socket did not take yet."""
        self._reading = self._writing = False
        self._read_over = self._peer_over = self._channel_over = self._done = False
        self.octets_in = self.octets_out = 0
        """From the channel to the socket, and from the socket to the channel."""
        sock.setblocking(False)
        send_at_once(sock)
        channel.attach(self)
        if not self._done and not self._channel_over:
            self.room()

    @property
    def done(self) -> bool:
        return self._done

    # From the socket to the channel.

    def room(self) -> None:
        if not self._read_over and not self._reading:
            self._readable()

    def _readable(self) -> None:
        limit = self._channel.sendable()
        if not limit:
            self._watch_reading(False)
            return
        if self._preface:
            first, self._preface = self._preface[:limit], self._preface[limit:]
            self._channel.send(first)
            self._readable()
            return
        scratch = self._scratch
        try:
            octets = self._sock.recv_into(scratch, min(limit, len(scratch)))
        except (BlockingIOError, InterruptedError):
            self._watch_reading(True)
            return
        except OSError:
            self._fail()
            return
        if octets:
            self.octets_out += octets
            self._channel.send(scratch[:octets])
            self._watch_reading(True)
            return
        self._read_over = True
        self._watch_reading(False)
        self._channel.shutdown()
        self._finish_if_over()

    def _watch_reading(self, wanted: bool) -> None:
        if wanted is not self._reading and not self._done:
            self._reading = wanted
            if wanted:
                self._loop.add_reader(self._sock.fileno(), self._readable)
            else:
                self._loop.remove_reader(self._sock.fileno())

    # From the channel to the socket.

    def data(self, octets: memoryview) -> None:
        if self._done:
            return
        if not self._pending:
            try:
                taken = self._sock.send(octets)
            except (BlockingIOError, InterruptedError):
                taken = 0
            except OSError:
                self._fail()
                return
            if taken:
                self.octets_in += taken
                self._channel.consumed(taken)
                if taken == len(octets):
                    return
                octets = octets[taken:]
        self._pending.append(bytes(octets))
        if not self._writing:
            self._writing = True
            self._loop.add_writer(self._sock.fileno(), self._writable)

    def _writable(self) -> None:
        pending = self._pending
        try:
            taken = left = self._sock.sendmsg(list(islice(pending, _GATHER)))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._fail()
            return
        while left:
            size = len(pending[0])
            if size > left:
                pending[0] = memoryview(pending[0])[left:]
                break
            left -= size
            pending.popleft()
        if not pending:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())
        self.octets_in += taken
        self._channel.consumed(taken)
        if not pending:
            self._delivered()

    def _delivered(self) -> None:
        """Everything received went out."""
        if self._channel_over:
            self._close(Ending.CLOSED.value)
        elif self._peer_over:
            try:
                self._sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the socket's other side is gone; reading tells
            self._finish_if_over()

    def ended(self) -> None:
        if not self._peer_over:
            self._peer_over = True
            if not self._pending and not self._done:
                self._delivered()

    # The end.

    def closed(self, why: Ending) -> None:
        if self._done:
            return
        self._channel_over = True
        if why is not Ending.CLOSED:
            self._close(why.value, with_reset=True)
            return
        self._read_over = True
        self._watch_reading(False)
        if not self._pending:
            self._close(why.value)

    def abort(self) -> None:
        """Reset the socket and close the channel, now. Harmless twice."""
        self._close("aborted", with_reset=True)

    def _finish_if_over(self) -> None:
        if self._read_over and self._peer_over and not self._pending:
            self._close(Ending.CLOSED.value)

    def _fail(self) -> None:
        """The socket broke: its other side reset it, or does not read any more."""
        self._close("reset", with_reset=True)

    def _close(self, reason: str, *, with_reset: bool = False) -> None:
        if self._done:
            return
        self._watch_reading(False)
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock.fileno())
        self._done = True
        self._pending.clear()
        if with_reset:
            reset(self._sock)
        else:
            self._sock.close()
        self._channel.close()
        if self._on_close is not None:
            self._on_close(reason)
