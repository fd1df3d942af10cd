"""One TCP flow: the guest's connection on one side, a host socket on the other. HOT PATH: `segment`, `flush`, `pump`.

Theory of operation. The interface calls `segment` for each of the guest's segments. The common ones are dealt with by a few
additions ("header prediction") and only remembered; at the end of the batch the stack calls `flush` once: everything the
batch brought leaves in one `sendmsg` from the receive buffer itself, one ACK answers it, and what the guest acknowledged is
discarded at the host socket. Octets the host socket does not take are kept here (bounded by the window that was told) and
narrow the window. When the host socket has something, `pump` reads it straight into the place the frame leaves from.

States beside the connection's: CONNECTING (the host is being dialled, the guest's SYN waits), OPEN, and the end. The guest
sees SYN-ACK only after the host connected, RST when it was refused.

Acknowledgements: at once for whole segments. Less than one is taken for a request, and its ACK waits up to `DELAYED_ACK_S`
for the answer to carry it (RFC 1122 4.2.3.2), which saves a frame per request. Once an ACK has waited in vain the flow is no
dialogue: ACKs go at once until `_DIALOGUE` answers in a row would have carried them.

Time-outs: the connection's, the delayed ACK, the dialling limit and, if asked for, idleness; one entry in the stack's heap.
"""

from __future__ import annotations

import errno
import socket
import struct
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Endpoint
from netstack.host.io import ERROR, HANGUP, READ, READ_CLOSED, URGENT, WRITE
from netstack.host.octets import CEILING
from netstack.host.tcp_frames import SMALL, FrameMaker
from netstack.iface.neighbours import Neighbour
from netstack.iface.switch import Port
from netstack.tcp.connection import WINDOW_SHIFT, Connection, Event
from netstack.tcp.seq import MASK, distance
from netstack.tcp.state import State
from netstack.wire.tcp import ACK, FIN, PSH, RST, SYN, Options, parse_options, sack_option, syn_options

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy

DELAYED_ACK_S: Final = 0.004  # RFC 1122 4.2.3.2 allows 0.5 s; a guest with Nagle waits this long, once
_DIALOGUE: Final = 3
ACK_OCTETS: Final = 128 << 10
"""Unacknowledged octets that are acknowledged before the turn is over; fewer wait for its end, and more may join them."""
BURSTS: Final = 8
"""Super-frames (or bursts) a flow may send before the others have their turn."""
_IOV_MAX: Final = 1000
_RESET: Final = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close sends RST
_TIME_WAIT: Final = State.TIME_WAIT
_CLOSED: Final = State.CLOSED
_NO_OPTIONS: Final = Options()
_ACK_PSH: Final = ACK | PSH
_NOT_WRITE: Final = ~WRITE


class TcpFlow:
    """See the module. `key` is the 12 octets of the guest's segments (source, destination, ports)."""

    __slots__ = (
        "_ack_at",
        "_acked",
        "_base",
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
        self.watched = False
        self.syn: tuple[int, int, Options] = (0, 0, _NO_OPTIONS)
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
        self._dialogue = _DIALOGUE
        self._spoke = False
        self._said_in = 0
        self._shut_sent = False
        self._waiting = False
        self._full_window = 0
        self._gone_at = 0.0
        """When a guest that keeps its half open to a host that is gone is reset; 0 while the host is there."""
        self._idle_octets = -1

    # From the guest.

    def segment(self, frame: memoryview, at: int, end: int, seq: int, ack: int, offset_flags: int, window: int) -> None:
        """One segment: payload `frame[at:end]`, header fields as they came. Checksums are good.

        What is less than a whole segment is taken for a request and goes to the host here and now, the first of a batch at
        least; all else is for `flush`.
        """
        conn = self.conn
        if conn is None or not conn.plain or offset_flags & 0xFFF7 != 0x5010:
            self._slow_segment(frame, at, end, seq, ack, offset_flags, window)
            return
        rcv = conn.rcv
        snd = conn.snd
        length = end - at
        if seq != rcv.nxt or length > (rcv.right - seq) & MASK:
            self._slow_segment(frame, at, end, seq, ack, offset_flags, window)
            return
        wide = window << snd.shift
        later = self.dirty
        if ack != snd.una:
            if (ack - snd.una) & MASK > (snd.max - snd.una) & MASK:
                self._slow_segment(frame, at, end, seq, ack, offset_flags, window)
                return
            proxy = self._proxy
            snd.acknowledge(ack, proxy.now)
            snd.wnd = wide
            if later or ack != snd.max or self.readable:
                self._acked = later = True
            else:
                self._discard(conn)
                if self.end:
                    return
        elif wide != snd.wnd or not window or (not length and snd.max != ack):
            self._slow_segment(frame, at, end, seq, ack, offset_flags, window)
            return
        if length:
            rcv.nxt = (seq + length) & MASK
            if not later and length < snd.mss and self.writable and self._said_in != self._proxy.batch:
                self._say(conn, frame[at:end], length)
                return
            later = True
            self._iov.append(frame[at:end])
            self._iov_octets += length
        if later and not self.dirty:
            self.dirty = True
            self._proxy.dirty.append(self)

    def _say(self, conn: Connection, octets: memoryview, length: int) -> None:
        """A request goes to the host."""
        proxy = self._proxy
        self._said_in = proxy.batch
        self.octets_out += length
        self._unacked += length
        self._spoke = True
        snd = conn.snd
        snd.wl1 = conn.rcv.nxt
        snd.wl2 = snd.una
        try:
            sent = self.sock.send(octets)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._host_failed(error)
            return
        if sent < length:
            self._full()
            self._keep(conn, [octets], length - sent, sent)
            self.touch()
        elif self._dialogue >= _DIALOGUE and self._unacked < snd.mss:
            if not self._ack_at:
                self._ack_at = proxy.now + DELAYED_ACK_S
                if not self.ack_due:
                    self.ack_due = self._ack_at
                    proxy.delayed.append(self)
        else:
            proxy.unacknowledged.append(self)

    def train(
        self, view: memoryview, stride: int, count: int, at: int, length: int, seq: int, ack: int, window: int
    ) -> bool:
        """`count` segments of `length` octets each, one after another; False when they must be looked at one by one."""
        conn = self.conn
        if conn is None or not conn.plain:
            return False
        rcv, snd = conn.rcv, conn.snd
        octets = length * count
        if seq != rcv.nxt or octets > (rcv.right - seq) & MASK:
            return False
        window <<= snd.shift
        advance = (ack - snd.una) & MASK
        if advance:
            if advance > (snd.max - snd.una) & MASK:
                return False
            snd.acknowledge(ack, self._proxy.now)
            self._acked = True
            snd.wnd = window
        elif window != snd.wnd:
            return False
        rcv.nxt = (seq + octets) & MASK
        end = stride * count
        self._iov += [view[start : start + length] for start in range(at, end, stride)]
        self._iov_octets += octets
        if not self.dirty:
            self.dirty = True
            self._proxy.dirty.append(self)
        return True

    def _slow_segment(
        self, frame: memoryview, at: int, end: int, seq: int, ack: int, offset_flags: int, window: int
    ) -> None:
        conn = self.conn
        flags = offset_flags & 0x1FF
        if conn is None:
            self._while_connecting(seq, flags)
            return
        options = _NO_OPTIONS
        if offset_flags >> 12 > 5:
            options = parse_options(frame[at - (offset_flags >> 10 & 0x3C) + 20 : at])
        if flags & (SYN | FIN) == SYN | FIN or flags & (SYN | RST) == SYN | RST:
            return
        self.touch()
        una = conn.snd.una
        accepted = conn.segment_arrives(seq, end - at, ack, flags, window, options, self._proxy.now)
        if conn.snd.una != una:
            self._acked = True
        elif conn.snd.wnd and (self.readable or conn.snd.nxt != conn.snd.max):
            self._acked = True  # the window may have opened: let `flush` pump
        if accepted is not None:
            begin, stop, number, in_order = accepted
            if in_order:
                self._iov.append(frame[at + begin : at + stop])
                self._iov_octets += stop - begin
                if conn.rcv.pieces:
                    self._fill(conn)
            else:
                self._stored[number] = bytes(frame[at + begin : at + stop])
                if not self._proxy.hold(stop - begin):
                    self.abort("too much is held beyond holes")

    def _fill(self, conn: Connection) -> None:
        """The hole is closed: what was stored behind it follows."""
        for number, skip, length in conn.rcv.fill():
            stored = self._stored.pop(number)
            self._proxy.budget.held -= len(stored)
            if length:
                self._iov.append(memoryview(stored)[skip : skip + length])
                self._iov_octets += length
        if not conn.rcv.pieces:
            conn.check_fin()
        conn.update_plain()

    def _while_connecting(self, seq: int, flags: int) -> None:
        """The host is being dialled: a repeated SYN is absorbed, RST or FIN give up (T02, T05)."""
        if flags & RST or (flags & FIN and not flags & SYN):
            self.finish("guest gave up while connecting", reset_host=True)

    # The batch is over.

    def flush(self) -> None:
        """Do what the batch asked for. In the common case: octets to the host, octets to the guest, perhaps an ACK."""
        self.dirty = False
        conn = self.conn
        if conn is None or self.end:
            return
        if self._careful or not conn.plain:
            self._careful = False
            self._flush_all(conn)
            return
        received = self._iov_octets
        if received:
            self._to_host(conn)
            if self.end:
                return
        snd = conn.snd
        if self._acked:
            self._guest_acknowledged(conn)
            if self.end:
                return
        if received:
            snd.wl1 = conn.rcv.nxt
            snd.wl2 = snd.una
            if self._unacked:
                self._owe_ack(conn)
        if conn.ack_now:
            self._send_ack(conn)
        when = snd.rto_at
        if when and (not self.timer_at or when < self.timer_at):
            self._arm(when)

    def _guest_acknowledged(self, conn: Connection) -> None:
        """Let go of what the guest has, at once (a single octet left of a large buffer would keep it all, and so close the
        sender's window), and send what the window now has room for."""
        snd = conn.snd
        self._acked = False
        self._discard(conn)
        if self.end:
            return
        if self.readable or snd.nxt != snd.max or snd.fin_at is not None:
            self.pump()

    def _owe_ack(self, conn: Connection) -> None:
        """What came is to be acknowledged: with the answer, at once, or when the turn is over."""
        if self._dialogue >= _DIALOGUE and self._unacked < conn.snd.mss and not conn.ack_now:
            if not self._ack_at:
                self._ack_at = self._proxy.now + DELAYED_ACK_S
                if not self.ack_due:
                    self.ack_due = self._ack_at
                    self._proxy.delayed.append(self)
        elif self._unacked >= ACK_OCTETS:
            conn.ack_now = True
        else:
            self._proxy.unacknowledged.append(self)

    def _flush_all(self, conn: Connection) -> None:
        """The same with all that is rare: events, FIN, RST, SYN, what must be sent again, the end."""
        proxy = self._proxy
        if conn.reset is not None:
            self._send_reset(conn)
            if conn.state is State.CLOSED:
                self.finish("protocol error", reset_host=True)
                return
        if conn.events:
            self._events(conn)
            if self.end:
                return
        snd = conn.snd
        received = self._iov_octets
        if received:
            self._to_host(conn)
            if self.end:
                return
        if conn.rcv_fin is not None:
            self._shut_down_host(conn)
            if self.end:
                return
        if conn.snd.nxt == conn.snd.iss and not conn.synchronised:
            self._send_syn(conn)
            return
        if conn.resend:
            self._resend(conn)
            if self.end:
                return
        if self._acked:
            self._guest_acknowledged(conn)
            if self.end:
                return
        if conn.state is _TIME_WAIT or conn.state is _CLOSED:
            if conn.ack_now:
                self._send_ack(conn)
            if not self._pending:  # what a slow host has not taken yet is still owed to it
                proxy.retire(self, conn)
            return
        if received:
            snd.wl1 = conn.rcv.nxt
            snd.wl2 = snd.una
            if self._unacked:
                self._owe_ack(conn)
        if conn.ack_now:
            self._send_ack(conn)
        if snd.rto_at:
            self.rearm(snd.rto_at)

    def _events(self, conn: Connection) -> None:
        events, conn.events = conn.events, []
        for event in events:
            if event is Event.OPENED:
                self._opened(conn)
            elif event is Event.RESET:
                self.finish("reset by guest", reset_host=True)
            elif event is Event.REFUSED:
                self.finish("refused by guest", reset_host=True)

    def _opened(self, conn: Connection) -> None:
        conn.update_plain()
        self._connect_at = 0.0
        if self.inbound:
            self.frames = None  # the guest's MSS is known only now
        snd = conn.snd
        self._base = (snd.iss + 1) & MASK
        self._full_window = conn.rcv.capacity >> conn.rcv.shift
        if self.inbound:
            self._proxy.opened(self)
        self._acked = True  # makes `flush` pump what the host said already

    # Octets to the host.

    def _to_host(self, conn: Connection) -> None:
        """Everything in order goes to the host socket; what it does not take is kept and narrows the window."""
        iov = self._iov
        total = self._iov_octets
        self.octets_out += total
        self._unacked += total
        self._spoke = True
        self._iov = []
        self._iov_octets = 0
        if self._shut_sent:
            return
        if self._pending or not self.writable:
            self._keep(conn, iov, total)
            return
        try:
            if len(iov) == 1:
                sent = self.sock.send(iov[0])
            elif len(iov) <= _IOV_MAX:
                sent = self.sock.sendmsg(iov)
            else:
                sent = 0
                for at in range(0, len(iov), _IOV_MAX):
                    part = iov[at : at + _IOV_MAX]
                    sent += self.sock.sendmsg(part)
                    if sent < sum(map(len, iov[: at + _IOV_MAX])):
                        break
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._host_failed(error)
            return
        if sent < total:
            self._full()
            self._keep(conn, iov, total - sent, sent)

    def _full(self) -> None:
        """The host socket takes no more; it will tell when it does."""
        self.writable = False
        self._proxy.io.watch_write(self.sock.fileno())

    def _keep(self, conn: Connection, iov: list[memoryview | bytes], octets: int, skip: int = 0) -> None:
        """Copy what must wait: the views die with the batch."""
        pending = self._pending
        for view in iov:
            length = len(view)
            if skip >= length:
                skip -= length
                continue
            pending += view[skip:]
            skip = 0
        conn.rcv.held = len(pending)
        self._unacked = max(self._unacked, 1)
        conn.ack_now = True
        if not self._proxy.hold(octets):
            self.abort("too much is held for hosts that do not read")

    def _host_writable(self) -> None:
        """The host socket has room again."""
        self.writable = True
        conn = self.conn
        pending = self._pending
        if conn is None or not pending:
            return
        try:
            sent = self.sock.send(pending)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._host_failed(error)
            return
        del pending[:sent]
        self._proxy.budget.held -= sent
        if pending:
            self._full()
        rcv = conn.rcv
        before = rcv.told()
        rcv.held = len(pending)
        room = rcv.capacity - rcv.held
        if room - before >= min(rcv.capacity >> 1, 2 * conn.announced_mss) or not before:
            conn.ack_now = True
        self.touch()

    def _shut_down_host(self, conn: Connection) -> None:
        """All the guest said is passed on and its FIN is in order: end our side of the host socket (half-close, T60)."""
        if self._shut_sent or self._pending or conn.rcv_fin is None:
            return
        if conn.state in (State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2):
            return  # the FIN lies beyond a hole
        self._shut_sent = True
        if conn.state is _TIME_WAIT or conn.state is _CLOSED:
            return  # both directions are over: closing the socket says the same
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                self._host_failed(error)

    # From the host.

    def ready(self, mask: int) -> None:
        """The host socket's edge-triggered event."""
        if self.end:
            return
        conn = self.conn
        if mask & _NOT_WRITE == READ and conn is not None and conn.plain and self.writable:
            snd = conn.snd
            if snd.una == snd.max and snd.wnd >= SMALL and snd.cwnd >= SMALL and snd.mss >= SMALL:
                frames = self.frames
                port = self.port
                if (
                    frames is not None
                    and port is not None
                    and not port.congested
                    and frames.version == self.neighbour.version
                ):
                    self._answer(conn, frames, port)
                    return
        if mask & (READ_CLOSED | HANGUP | ERROR | URGENT):
            self._read_on = True
        if self.conn is None:
            if not self.inbound:
                self._proxy.connected(self, mask)
            elif mask & (ERROR | HANGUP):
                self.finish("the client gave up", reset_host=False)
            elif mask & (READ | READ_CLOSED | URGENT):
                self.readable = True  # told once only, and the guest is still looked for
            return
        if mask & WRITE and not self.writable:
            self._host_writable()
            if self.end:
                return
        if mask & (READ | READ_CLOSED | HANGUP | ERROR | URGENT):
            self.readable = True
            if mask & ERROR and self.conn.snd.fin_at is not None:
                # Nothing more will be read, so nobody else will meet the error soon.
                number = self.socket_error()
                if number:
                    self._host_failed(OSError(number, "host socket"))
                    return
            if mask & HANGUP and not self._shut_sent and not self._gone_at:
                self._gone_at = self._proxy.now + self._proxy.timeouts.tcp_fin_wait_s
                self._arm(self._gone_at)
            self.pump()
            when = self.conn.snd.rto_at
            if when and (not self.timer_at or when < self.timer_at) and not self.end:
                self._arm(when)

    def _answer(self, conn: Connection, frames: FrameMaker, port: Port) -> None:
        """Something came from the host while nothing was outstanding: what is small leaves here and now."""
        scratch, whole, _payload, small = frames.scratch
        try:
            count = self._source.take(small)
        except OSError as error:
            self._host_failed(error)
            return
        if count is None:
            return
        if 0 < count < SMALL:
            proxy = self._proxy
            now = proxy.now
            snd, rcv = conn.snd, conn.rcv
            nxt = snd.nxt
            end = frames.finish(scratch, count, nxt, rcv.nxt, _ACK_PSH, self.window(conn))
            self.octets_in += count
            port.send_one(whole[:end])
            if self._unacked or conn.ack_now:
                self._acknowledged(conn)
            snd.sent(count, now)
            when = snd.rto_at
            if not self.timer_at or when < self.timer_at:
                proxy.arm(when, self)
            return
        self.readable = True  # more than that, or the end
        self.pump()
        when = conn.snd.rto_at
        if when and not self.end:
            self.rearm(when)

    def socket_error(self) -> int:
        """The error that waits at the host socket, as errno; 0 for none."""
        try:
            number: int = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        except OSError as error:
            return error.errno or errno.EIO
        return number

    def resume(self) -> None:
        """The link has room again."""
        self._waiting = False
        if not self.end:
            self.pump()
            conn = self.conn
            if conn is not None and conn.snd.rto_at and not self.end:
                self.rearm(conn.snd.rto_at)

    def pump(self) -> None:
        """Read from the host socket into frames and send them, as far as window, link and budget allow."""
        conn = self.conn
        if conn is None or not (conn.plain or conn.synchronised):
            return
        port = self.port
        if port is None:
            return
        if port.congested:
            if not self._waiting:
                self._waiting = True
                port.waiting.append(self)
            return
        snd = conn.snd
        frames = self.frames
        if frames is None or frames.version != self.neighbour.version:
            frames = self._new_frames()
            if frames is None:
                return
        proxy = self._proxy
        source = self._source
        mss = snd.mss
        largest = port.tso // mss * mss if port.tso > mss else 0
        scratch, whole, payload, _small = frames.scratch
        budget = BURSTS
        while True:
            offset = (snd.nxt - self._base) & MASK
            resending = snd.nxt != snd.max
            room = limit = (snd.wnd if snd.wnd < snd.cwnd else snd.cwnd) - ((snd.nxt - snd.una) & MASK)
            if snd.fin_at is not None:
                left = distance(snd.nxt, snd.fin_at)
                if left <= 0:
                    if left == 0 and room >= 0:
                        self._send_fin(conn, frames)
                    return
                limit = min(limit, left)
            elif not self.readable and not resending:
                return
            if limit <= 0 or (limit < mss and limit < snd.flight() and snd.fin_at is None):
                # Sender's silly window avoidance (RFC 9293 3.8.6.2.1): wait for room for a whole segment.
                if snd.wnd == 0 and not snd.rto_at:
                    snd.rto_at = proxy.now + snd.rtt.current()
                return
            if not budget:
                proxy.again(self)
                return
            budget -= 1
            if resending:
                limit = min(limit, (snd.max - snd.nxt) & MASK)
            if largest:
                want = min(limit, largest)
            elif limit >= 2 * mss and not resending and not frames.partial:
                # A burst of ordinary frames, headers and checksums computed together.
                try:
                    got = proxy.burst(frames.headroom, mss).send(
                        frames, source, offset, limit, snd.nxt, conn.rcv.nxt, self.window(conn)
                    )
                except OSError as error:
                    self._host_failed(error)
                    return
                if got is None or got[0] == 0:
                    self.readable = source.full
                    if got is not None:
                        self._host_ended(conn, frames)
                    return
                count, full = got
                self.octets_in += count
                snd.sent(count, proxy.now)
                self._acknowledged(conn)
                if port.congested:
                    if not self._waiting:
                        self._waiting = True
                        port.waiting.append(self)
                    return
                if not full and not self._read_on:
                    self.readable = source.full
                continue
            else:
                want = min(limit, mss)
            try:
                count = source.read(offset, payload[:want])
            except OSError as error:
                self._host_failed(error)
                return
            if count is None:
                self.readable = source.full
                return
            if count == 0:
                if resending:
                    return
                self.readable = False
                self._host_ended(conn, frames)
                return
            flags = _ACK_PSH
            failed: OSError | None = None
            if count < want and not resending:
                if self._read_on:
                    # The end is near: if this was all, the FIN rides along. A reset comes after what was read.
                    try:
                        if source.read(offset + count, payload[count : count + 1]) == 0:
                            self.readable = False
                            conn.snd.fin_at = (snd.nxt + count) & MASK
                            conn.plain = False
                            flags |= FIN
                    except OSError as error:
                        failed = error
                else:
                    self.readable = source.full
            window = self.window(conn)
            end = frames.finish(scratch, count, snd.nxt, conn.rcv.nxt, flags, window)
            if resending:
                proxy.counters.tcp_retransmitted += 1
            else:
                self.octets_in += count
            port.send_one(whole[:end])
            self._acknowledged(conn)
            if flags & FIN:
                snd.sent(count + 1, proxy.now)
                conn.fin_sent()
                return
            snd.sent(count, proxy.now)
            if failed is not None:
                self._host_failed(failed)
                return
            if not self.readable and not resending:
                return

    def _acknowledged(self, conn: Connection) -> None:
        """A frame with the current acknowledgement left."""
        conn.ack_now = False
        if self._unacked:
            self._unacked = 0
            if self._spoke:
                self._spoke = False
                if self._dialogue < _DIALOGUE:
                    self._dialogue += 1
        self._ack_at = 0.0

    def _host_ended(self, conn: Connection, frames: FrameMaker) -> None:
        """End of file at the host: our FIN follows the last octet (T61)."""
        if conn.snd.fin_at is None:
            conn.close()
            if conn.snd.nxt == conn.snd.max:
                self._send_fin(conn, frames)

    def _send_fin(self, conn: Connection, frames: FrameMaker) -> None:
        snd = conn.snd
        if snd.fin_at is None or snd.nxt != snd.fin_at:
            return
        port = self.port
        if port is not None:
            port.put((frames.bare(snd.nxt, conn.rcv.nxt, FIN | ACK, self.window(conn)),))
        snd.sent(1, self._proxy.now)
        self._acknowledged(conn)
        conn.fin_sent()

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

    def _host_failed(self, error: OSError) -> None:
        """The host socket broke: the guest gets RST after what it was sent (T58, T64)."""
        conn = self.conn
        if conn is not None:
            conn.abort()
            self._send_reset(conn)
        self._proxy.counters.tcp_reset += 1
        self.finish(f"host: {error.strerror or error}", reset_host=True)

    # Frames to the guest.

    def _new_frames(self) -> FrameMaker | None:
        neighbour = self.neighbour
        self.port = neighbour.port
        conn = self.conn
        if neighbour.port is None or conn is None:
            self.frames = None
            return None
        self.frames = FrameMaker(neighbour.port, neighbour, self._proxy.gateway_mac, self.key, conn.snd.mss)
        return self.frames

    def maker(self) -> FrameMaker | None:
        """Headers for the neighbour as it is now; `None` while its link is gone."""
        frames = self.frames
        if frames is None or frames.version != self.neighbour.version:
            return self._new_frames()
        return frames

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
        if self._dialogue < _DIALOGUE:
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
        self._arm(snd.rto_at)

    def _send_reset(self, conn: Connection) -> None:
        if conn.reset is None:
            return
        seq, ack = conn.reset
        conn.reset = None
        frames = self.maker()
        if frames is not None:
            flags = RST if ack is None else RST | ACK
            frames.port.put((frames.bare(seq, ack or 0, flags, 0),))

    def _resend(self, conn: Connection) -> None:
        """Send ranges again (fast recovery), or a probe of length 0."""
        ranges, conn.resend = conn.resend, []
        frames = self.maker()
        if frames is None:
            return
        scratch, whole, payload, _small = frames.scratch
        snd = conn.snd
        for seq, length in ranges:
            if not length:
                frames.port.put((frames.bare(seq, conn.rcv.nxt, ACK, self.window(conn)),))
                continue
            if snd.fin_at is not None:
                length = min(length, distance(seq, snd.fin_at))
                if length <= 0:
                    if seq == snd.fin_at:
                        frames.port.put((frames.bare(seq, conn.rcv.nxt, FIN | ACK, self.window(conn)),))
                    continue
            try:
                count = self._source.read((seq - self._base) & MASK, payload[:length])
            except OSError as error:
                self._host_failed(error)
                return
            if count:
                self._proxy.counters.tcp_retransmitted += 1
                end = frames.finish(scratch, count, seq, conn.rcv.nxt, ACK, self.window(conn))
                frames.port.send_one(whole[:end])

    # Time.

    def _arm(self, when: float) -> None:
        if not self.timer_at or when < self.timer_at:
            self._proxy.arm(when, self)

    def timer(self, now: float) -> None:
        """The heap's entry is due; which of the time-outs, if any, is looked up."""
        self.timer_at = 0.0
        if self.end:
            return
        conn = self.conn
        if self._connect_at and now >= self._connect_at and conn is None:
            self._proxy.connect_failed(self, errno.ETIMEDOUT)
            return
        if conn is not None:
            timeouts = self._proxy.timeouts
            resend_due = conn.snd.rto_at and now >= conn.snd.rto_at
            if resend_due:
                conn.timeout(now, timeouts.tcp_user_s)
                if conn.reset is not None and conn.state is State.CLOSED:
                    self._send_reset(conn)
                    self._proxy.counters.tcp_reset += 1
                    self.finish("guest does not answer", reset_host=True)
                    return
                self._acked = True
            if self._gone_at and now >= self._gone_at:
                if conn.state is State.FIN_WAIT_2:
                    conn.abort()
                    self._send_reset(conn)
                    self.finish("the host is gone, and the guest does not close", reset_host=True)
                    return
                self._gone_at = now + timeouts.tcp_fin_wait_s  # the guest has not taken everything yet
            idle = timeouts.tcp_idle_s
            if idle and now - self.active_at >= idle:
                octets = self.octets_in + self.octets_out
                if octets == self._idle_octets:
                    conn.abort()
                    self._send_reset(conn)
                    self.finish("idle", reset_host=True)
                    return
                self._idle_octets = octets
                self.active_at = now
            self._careful = True
            self.flush()
            if self.end:
                return
        deadlines = [when for when in (self._connect_at, self._gone_at, conn.snd.rto_at if conn else 0.0) if when]
        if conn is not None and self._proxy.timeouts.tcp_idle_s:
            deadlines.append(self.active_at + self._proxy.timeouts.tcp_idle_s)
        if deadlines:
            self._arm(min(deadlines))

    def rearm(self, when: float) -> None:
        """The connection wants to be called at `when`, if that is earlier than what is armed."""
        if not self.timer_at or when < self.timer_at:
            self._arm(when)

    def touch(self) -> None:
        """Let the stack call `flush` soon, for something rare."""
        self._careful = True
        if not self.dirty:
            self.dirty = True
            self._proxy.dirty.append(self)

    def acknowledge(self) -> None:
        """The turn is over: what came is acknowledged, unless a frame has carried it."""
        conn = self.conn
        if self._unacked and conn is not None and not self.end:
            self._send_ack(conn)

    def answer_late(self, now: float) -> bool:
        """The delay of an ACK is over; True when a later one waits by now (and this one was carried by an answer)."""
        conn = self.conn
        if self._ack_at > now:
            self.ack_due = self._ack_at
            return True
        self.ack_due = 0.0
        if self._ack_at and conn is not None and not self.end:
            self._ack_at = 0.0
            self._dialogue = 0
            self._send_ack(conn)
        return False

    def probe(self) -> None:
        """Ask the guest whether it still knows the connection (RFC 1122 4.2.3.6): RST tells of a reboot."""
        conn = self.conn
        if conn is not None and conn.synchronised:
            conn.resend.append(((conn.snd.una - 1) & MASK, 0))
            self.touch()

    # Beginning and end.

    def dialling(self, until: float) -> None:
        self._connect_at = until
        self._arm(until)

    def begin(self, conn: Connection) -> None:
        """The host is connected (or its socket was accepted): speak to the guest."""
        self._connect_at = 0.0
        self.conn = conn
        self._source = self._proxy.octets_of(self.sock)
        self.touch()

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
