"""A multiplexer over a connected stream socket, in the event loop. HOT PATH: `_readable`, `_flush`.

    readable -> one read of up to `CHUNK` octets -> Multiplexer.receive -> receivers of channels (which pass views on at once)
    send     -> header and payload in one sendmsg; what the socket does not take is copied and waits for it to be writable
    written  -> channels that wait for room are let in, one chunk each, in the order in which they came

Frames that answer what was read (Windows, above all) are written once, after the whole read. One session, one failure: what a
peer does wrong, and an end of the connection, lose all its channels and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final

from netstack.errors import HostError
from portfwd.carriers import Destination
from portfwd.mux.channel import Channel, Ending, Receiver
from portfwd.mux.engine import (
    CLOSED,
    CREDIT,
    DEFAULT,
    ENDED,
    NOTHING,
    OCTETS,
    OPENED,
    OVERRUN,
    REFUSED,
    Flow,
    Limits,
    Multiplexer,
    Role,
)
from portfwd.mux.frames import MuxError

log = logging.getLogger("pyvpnkit.portfwd.mux")

CHUNK: Final = 1 << 18
"""Octets per read, of the transport and of host sockets."""
BUFFER: Final = 1 << 20
"""Asked of the kernel for either direction of the transport, which caps it at net.core.[rw]mem_max."""
DEAF_S: Final = 1.0
"""How long what a peer said is still read when it reads nothing more itself."""
GATHER: Final = 256
"""Buffers per write; IOV_MAX is 1,024."""

OnOpen = Callable[[Destination, Channel], None]
"""The peer opened a channel. Call `attach` now or later (after dialling), or `close` to refuse. Until `attach` it sends nothing."""


class MuxChannel:
    """`Channel` of a session."""

    __slots__ = ("_early", "_ended", "_ending", "_flow", "_let_go", "_receiver", "_session")

    def __init__(self, session: Session, flow: Flow) -> None:
        self._session = session
        self._flow = flow
        self._receiver: Receiver | None = None
        self._early: list[bytes] = []
        """Octets of a peer that did not wait until it was allowed to send; bounded by `Limits.overrun`."""
        self._ended = self._let_go = False
        self._ending: Ending | None = None
        flow.user = self

    @property
    def id(self) -> int:
        return self._flow.id

    @property
    def destination(self) -> Destination:
        return self._flow.destination

    @property
    def scratch(self) -> memoryview:
        return self._session.scratch

    def attach(self, receiver: Receiver) -> None:
        assert self._receiver is None
        if self._let_go:
            return
        if self._early or self._ended or self._ending is not None:
            self._session._loop.call_soon(self._catch_up, receiver)
        else:
            self._receiver = receiver
        self._session._mux.accept(self._flow)
        self._session._said()

    def _catch_up(self, receiver: Receiver) -> None:
        """Tell what happened before somebody listened."""
        if self._let_go:
            return
        self._receiver = receiver
        early, self._early = self._early, []
        for octets in early:
            receiver.data(memoryview(octets))
        if self._ended and not self._let_go:
            receiver.ended()
        if self._ending is not None and not self._let_go:
            receiver.closed(self._ending)

    def sendable(self) -> int:
        return 0 if self._session._over else self._session._mux.sendable(self._flow)

    def send(self, octets: memoryview) -> None:
        mux = self._session._mux
        mux.send(self._flow, octets)
        self._session._flush()
        if mux.queued:
            mux.keep()

    def consumed(self, octets: int) -> None:
        self._session._mux.consumed(self._flow, octets)
        self._session._said()

    def shutdown(self) -> None:
        self._session._mux.shutdown(self._flow)
        self._session._said()

    def close(self) -> None:
        self._let_go = True
        self._early.clear()
        self._session._mux.close(self._flow)
        self._session._said()

    # Called by the session.

    def data(self, octets: memoryview) -> None:
        if self._receiver is None:
            self._early.append(bytes(octets))
        else:
            self._receiver.data(octets)

    def ended(self) -> None:
        self._ended = True
        if self._receiver is not None:
            self._receiver.ended()

    def over(self, why: Ending) -> None:
        if self._ending is None:
            self._ending = why
            if self._receiver is not None:
                self._receiver.closed(why)

    def room(self) -> None:
        if self._receiver is not None:
            self._receiver.room()


class Session:
    """Runs one connection. Owns `sock` (connected, stream; made non-blocking)."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        generation: int = 3,
        role: Role = Role.LISTENER,
        on_open: OnOpen | None = None,
        on_end: Callable[[str], None] | None = None,
        on_ready: Callable[[], None] | None = None,
        limits: Limits = DEFAULT,
        received: bytes = b"",
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        """`received`: octets that were read from `sock` already (to find the generation). `on_ready()` is called when the peer
        has greeted, at once (but not before the next turn of the loop) in generation 2. `on_end(reason)` is called once; the
        reason is empty where the peer ended the connection between frames, or before it said anything (a port probe)."""
        self._loop = loop or asyncio.get_running_loop()
        self._sock = sock
        self._on_open = on_open
        self._on_end = on_end
        self._on_ready = on_ready
        self._mux = Multiplexer(role=role, handshake=generation == 3, limits=limits)
        self._buffer = memoryview(bytearray(CHUNK))
        self.scratch = memoryview(bytearray(CHUNK))
        self._corked = False
        self._writing = False
        self._over = False
        self._deaf: asyncio.TimerHandle | None = None
        """The peer reads no more; the end of the session, if its last words do not come to an end themselves."""
        self._finished: asyncio.Future[str] = self._loop.create_future()
        self.octets_in = self.octets_out = 0
        sock.setblocking(False)
        _widen(sock)
        self._loop.add_reader(sock.fileno(), self._readable)
        self.changed: asyncio.Future[None] = self._loop.create_future()
        """Done when the peer has greeted, or the session is over."""
        self._first: asyncio.Handle | None = self._loop.call_soon(self._begin, received)

    def _begin(self, received: bytes) -> None:
        self._first = None
        self._flush()
        if not self._over:
            self._take(memoryview(received))

    @property
    def over(self) -> bool:
        return self._over

    @property
    def ready(self) -> bool:
        """The peer has greeted (or need not): a channel that is opened now will be heard of."""
        return not self._over and self._mux.greeted

    def open(self, destination: Destination) -> MuxChannel:
        """A new channel to `destination`; `attach` to it in the same turn of the loop. Raises `TooManyChannels` at the bound,
        `Malformed` for a destination that cannot be said and `HostError` when the session is over."""
        if self._over:
            raise HostError("mux: the connection to the forwarder is over")
        channel = MuxChannel(self, self._mux.open(destination))
        self._said()
        return channel

    def close(self) -> None:
        """End it: every channel is lost, the socket closed. Harmless twice; `on_end` is called with `"closed"`."""
        self._end("closed")

    async def wait_closed(self) -> str:
        """Waits for the end and returns the reason `on_end` is told."""
        return await asyncio.shield(self._finished)

    def dump(self) -> str:
        """The last 500 events, one a line."""
        return self._mux.dump()

    def status(self) -> Mapping[str, Any]:
        """Plain values: channels, octets each way, counters."""
        mux = self._mux
        return {
            "channels": len(mux.flows),
            "opened": mux.opened,
            "accepted": mux.accepted,
            "refused": mux.refused,
            "unknown_frames": mux.unknown,
            "dropped_octets": mux.dropped,
            "overran": mux.overran,
            "octets_in": self.octets_in,
            "octets_out": self.octets_out,
        }

    # In.

    def _readable(self) -> None:
        try:
            octets = self._sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._end(f"mux: the connection broke: {error.strerror}")
            return
        if not octets:
            self._end("" if self._mux.between_frames else "mux: the connection ended within a frame")
            return
        self.octets_in += octets
        self._take(self._buffer[:octets])

    def _take(self, octets: memoryview) -> None:
        mux = self._mux
        self._corked = True
        try:
            for event, flow, view in mux.receive(octets):
                if event == OPENED:
                    self._opened(flow)
                else:
                    self._tell(event, flow, view)
                if self._over:
                    return
        except MuxError as error:
            log.debug("the last frames before %s:\n%s", error, mux.dump())
            self._end(str(error))
            return
        finally:
            self._corked = False
        self._flush()
        self._let_in()
        if mux.greeted and not self.changed.done() and not self._over:
            self.changed.set_result(None)
            if self._on_ready is not None:
                self._on_ready()

    def _opened(self, flow: Flow) -> None:
        channel = MuxChannel(self, flow)
        if self._on_open is None:
            self._mux.close(flow)
            return
        try:
            self._on_open(flow.destination, channel)
        except Exception:  # one channel's failure must not end the others
            log.exception("mux: %s could not be handed on", flow.destination)
            self._mux.close(flow)

    def _tell(self, event: int, flow: Flow, view: memoryview) -> None:
        channel: MuxChannel = flow.user
        try:
            if event == OCTETS:
                channel.data(view)
            elif event == CREDIT:
                channel.room()
            elif event == ENDED:
                channel.ended()
            elif event == CLOSED:
                channel.over(Ending.REFUSED if view is REFUSED else Ending.CLOSED)
            else:
                assert event == OVERRUN
                log.warning("mux: %s was closed: the peer ignores its window", flow.destination)
                channel.over(Ending.OVERRUN)
        except Exception:  # as above
            log.exception("mux: the channel to %s failed", flow.destination)
            self._mux.close(flow)

    # Out.

    def _said(self) -> None:
        """Something was queued, maybe."""
        if not self._corked and not self._writing:
            self._flush()

    def _flush(self) -> None:
        mux = self._mux
        if self._deaf is not None:
            mux.discard()
        while mux.queued and not self._over and not self._writing:
            try:
                octets = self._sock.sendmsg(mux.gather(GATHER))
            except (BlockingIOError, InterruptedError):
                self._writing = True
                self._loop.add_writer(self._sock.fileno(), self._writable)
                return
            except OSError as error:
                self._broken(error)
                return
            self.octets_out += octets
            mux.sent(octets)

    def _broken(self, error: OSError) -> None:
        """Writing failed. What the peer said before it went may wait to be read, so the end of file ends the session."""
        self._mux.discard()
        if self._deaf is None:
            self._deaf = self._loop.call_later(DEAF_S, self._end, f"mux: the connection broke: {error.strerror}")

    def _writable(self) -> None:
        self._writing = False
        self._flush()
        self._let_in()
        if not self._writing and not self._over:
            self._loop.remove_writer(self._sock.fileno())

    def _let_in(self) -> None:
        """Channels that wait for room in the queue may send, while there is some."""
        while not self._over and (flow := self._mux.next_in_line()) is not None:
            self._tell(CREDIT, flow, NOTHING)

    # The end.

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        if self._first is not None:
            self._first.cancel()
            self._first = None
        if self._deaf is not None:
            self._deaf.cancel()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for flow in list(self._mux.flows.values()):
            if not flow.closed:
                channel: MuxChannel = flow.user
                try:
                    channel.over(Ending.LOST)
                except Exception:  # as in _tell
                    log.exception("mux: the channel to %s failed", flow.destination)
        if not self._finished.done():
            self._finished.set_result(reason)
        if not self.changed.done():
            self.changed.set_result(None)
        if self._on_end is not None:
            self._on_end(reason)


def _widen(sock: socket.socket) -> None:
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        try:
            sock.setsockopt(socket.SOL_SOCKET, option, BUFFER)
        except OSError:
            pass  # smaller buffers do
    if sock.family != socket.AF_UNIX:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            pass
