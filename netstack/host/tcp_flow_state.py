"""One TCP flow, its parts and its end: what `ToHost`, `ToGuest` and `TcpFlow` build on. HOT PATH: `window`, `maker`.

A flow joins a connection (`netstack.tcp`, towards the guest), a host socket, and the octets between them. Here is what both
directions use: frames without payload, the timer, letting go of octets that the guest has, and the end, which is the same for
every reason.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Endpoint
from netstack.host.octets import CEILING
from netstack.host.tcp_frames import FrameMaker
from netstack.host.timers import Entry
from netstack.iface.neighbours import Neighbour
from netstack.iface.switch import Port
from netstack.tcp.connection import WINDOW_SHIFT, Connection
from netstack.tcp.seq import MASK, distance
from netstack.tcp.state import State
from netstack.wire.tcp import ACK, RST, SYN, Options, sack_option, syn_options

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy

DIALOGUE: Final = 3
"""Answers in a row that carried an ACK, after which requests wait for one (`ToHost`)."""
FIRST_GUESS: Final = 8192
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
NO_OPTIONS: Final = Options()


class FlowState:
    """See the module. `key` is the 12 octets of the guest's segments (source, destination, ports)."""

    __slots__ = (
        "_ack_at",
        "_acked",
        "_base",
        "_bulk",
        "_careful",
        "_connect_at",
        "_dialogue",
        "_full_window",
        "_gone_at",
        "_idle_octets",
        "_iov",
        "_iov_octets",
        "_pending",
        "_proxy",
        "_read_on",
        "_said_in",
        "_shut_sent",
        "_source",
        "_spoke",
        "_stored",
        "_unacked",
        "_waiting",
        "ack_due",
        "active_at",
        "conn",
        "dirty",
        "end",
        "frames",
        "inbound",
        "key",
        "neighbour",
        "octets_in",
        "octets_out",
        "on_close",
        "opened_at",
        "port",
        "queued",
        "quoted",
        "readable",
        "sock",
        "syn",
        "timer_at",
        "timer_entry",
        "watched",
        "writable",
    )

    def __init__(
        self, proxy: TcpProxy, key: bytes, neighbour: Neighbour, sock: Any, *, inbound: bool, now: float
    ) -> None:
        self._proxy = proxy
        self.key = key
        self.neighbour = neighbour
        self.port: Port | None = neighbour.port
        self.sock = sock
        self.inbound = inbound
        """Opened from the host side (a published port)."""
        self.conn: Connection | None = None
        self.frames: FrameMaker | None = None
        self.end = ""
        """Why it ended; empty while it lives."""
        self.on_close: Any = None
        self.opened_at = now
        self.active_at = now
        self.octets_out = 0
        self.octets_in = 0
        self.readable = False
        self.writable = True
        self.dirty = False
        self.queued = False
        self.timer_at = 0.0
        self.timer_entry: Entry | None = None
        self.watched = False
        self.syn: tuple[int, int, Options] = (0, 0, NO_OPTIONS)
        """The guest's SYN: number, window, options."""
        self.quoted = b""
        """Its packet, for an ICMP error while the host is dialled."""
        self._source: Any = None
        self._read_on = False
        """A short read does not mean that nothing is left: the host has ended, or an urgent mark lies in the way."""
        self._base = 0
        """Number of the first octet still in `_source`."""
        self._iov: list[memoryview | bytes] = []
        self._iov_octets = 0
        self._pending = bytearray()
        """What the host socket did not take yet."""
        self._stored: dict[int, bytes] = {}
        self._acked = False
        self._unacked = 0
        self._ack_at = 0.0
        self.ack_due = 0.0
        """When the proxy looks at the delayed ACK; 0 when it is not among the delayed."""
        self._careful = True
        self._connect_at = 0.0
        self._bulk = FIRST_GUESS
        """So many octets the host may have for us, by what it had the last time; for so many is room made in a guest's memory."""
        self._dialogue = DIALOGUE
        self._spoke = False
        self._said_in = 0
        self._shut_sent = False
        self._waiting = False
        self._full_window = 0
        self._gone_at = 0.0
        """When a guest that keeps its half open to a host that is gone is reset; 0 while the host is there."""
        self._idle_octets = -1

    def flush(self) -> None:
        """Do what the batch asked for (`TcpFlow`)."""
        raise NotImplementedError

    def timer(self, now: float) -> None:
        """What was armed is due (`TcpFlow`)."""
        raise NotImplementedError

    def touch(self) -> None:
        """Let the stack call `flush` soon, for something rare."""
        self._careful = True
        if not self.dirty:
            self.dirty = True
            self._proxy.dirty.append(self)

    def rearm(self, when: float) -> None:
        """Call `timer` at `when`, if that is earlier than what is armed."""
        if not self.timer_at or when < self.timer_at:
            self._proxy.timers.arm(when, self)

    # Frames to the guest.

    def maker(self) -> FrameMaker | None:
        """Headers for the neighbour as it is now; `None` while its link is gone."""
        frames = self.frames
        if frames is None or frames.version != self.neighbour.version:
            return self._new_frames()
        return frames

    def _new_frames(self) -> FrameMaker | None:
        neighbour = self.neighbour
        self.port = neighbour.port
        conn = self.conn
        if neighbour.port is None or conn is None:
            self.frames = None
            return None
        self.frames = FrameMaker(neighbour.port, neighbour, self._proxy.gateway_mac, self.key, conn.snd.mss)
        return self.frames

    def window(self, conn: Connection) -> int:
        """The window field to send now."""
        rcv = conn.rcv
        budget = self._proxy.budget
        if budget.held > budget.tight:
            return rcv.window(CEILING)
        if rcv.held:
            return rcv.window()
        rcv.right = (rcv.nxt + rcv.capacity) & MASK
        return self._full_window or rcv.capacity >> rcv.shift

    def _send_ack(self, conn: Connection) -> None:
        frames = self.maker()
        if frames is None:
            return
        window = self.window(conn)
        rcv = conn.rcv
        seq = conn.snd.max
        if rcv.pieces and conn.sack:
            frame = frames.with_options(seq, rcv.nxt, ACK, window, sack_option(rcv.sack_blocks()))
        else:
            frame = frames.bare(seq, rcv.nxt, ACK, window)
        frames.port.put((frame,))
        conn.ack_now = False
        self._unacked = 0
        self._ack_at = 0.0
        if self._dialogue < DIALOGUE:
            self._dialogue = 0

    def _send_syn(self, conn: Connection) -> None:
        frames = self.maker()
        if frames is None:
            return
        snd, rcv = conn.snd, conn.rcv
        window = min(rcv.capacity, 0xFFFF)
        active = conn.state is State.SYN_SENT
        options = syn_options(conn.announced_mss, WINDOW_SHIFT if conn.scaled else None, conn.sack)
        flags = SYN if active else SYN | ACK
        frames.port.put((frames.with_options(snd.iss, 0 if active else rcv.nxt, flags, window, options),))
        if not active:
            rcv.right = (rcv.nxt + window) & MASK
        snd.sent(1, self._proxy.now)
        conn.ack_now = False
        self.rearm(snd.rto_at)

    def _send_reset(self, conn: Connection) -> None:
        if conn.reset is None:
            return
        seq, ack = conn.reset
        conn.reset = None
        frames = self.maker()
        if frames is not None:
            flags = RST if ack is None else RST | ACK
            frames.port.put((frames.bare(seq, ack or 0, flags, 0),))

    # What was acknowledged.

    def _acknowledged(self, conn: Connection) -> None:
        """A frame with the current acknowledgement left."""
        conn.ack_now = False
        if self._unacked:
            self._unacked = 0
            if self._spoke:
                self._spoke = False
                if self._dialogue < DIALOGUE:
                    self._dialogue += 1
        self._ack_at = 0.0

    def _discard(self, conn: Connection) -> None:
        """What the guest acknowledged need not be kept."""
        snd = conn.snd
        count = (snd.una - self._base) & MASK
        if snd.fin_at is not None and distance(snd.fin_at, snd.una) > 0:
            count -= 1
        if 0 < count < 1 << 31:
            try:
                self._source.discard(count)
            except BlockingIOError:
                return
            except OSError as error:
                self._host_failed(error)
                return
            self._base = (self._base + count) & MASK

    # The end.

    def socket_error(self) -> int:
        """The error that waits at the host socket, as errno; 0 for none."""
        try:
            number: int = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            return error.errno or errno.EIO
        return number

    def _host_failed(self, error: OSError) -> None:
        """The host socket broke: the guest gets RST after what it was sent (T58, T64)."""
        conn = self.conn
        if conn is not None:
            conn.abort()
            self._send_reset(conn)
        self._proxy.counters.tcp_reset += 1
        self.finish(f"host: {error.strerror or error}", reset_host=True)

    def abort(self, reason: str) -> None:
        """RST both ways."""
        conn = self.conn
        if conn is not None and not self.end:
            conn.abort()
            self._send_reset(conn)
        elif not self.end:
            self._proxy.refuse_waiting(self)
        self.finish(reason, reset_host=True)

    def finish(self, reason: str, *, reset_host: bool) -> None:
        """Let go of everything; `reset_host` makes the host's peer see RST instead of the end."""
        if self.end:
            return
        self.end = reason
        sock = self.sock
        if not reset_host and self._acked and self.conn is not None:
            self.end = ""
            self._discard(self.conn)  # a socket closed with octets unread resets its peer
            if self.end:
                return
            self.end = reason
        try:
            self._proxy.io.forget(sock.fileno())
            if reset_host:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        except OSError:
            pass  # not every socket has it (a service's socket pair), and the end comes anyway
        sock.close()
        self._iov = []
        self._proxy.budget.held -= len(self._pending) + sum(map(len, self._stored.values()))
        self._pending = bytearray()
        self._stored = {}
        if self._source is not None:
            self._source.close()
            self._source = None
        self._proxy.gone(self)

    def endpoints(self) -> tuple[Endpoint, Endpoint]:
        """(guest, remote as the guest sees it)."""
        key = self.key
        return (
            Endpoint(key[:4], int.from_bytes(key[8:10], "big")),
            Endpoint(key[4:8], int.from_bytes(key[10:12], "big")),
        )
