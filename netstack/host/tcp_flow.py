"""One TCP flow: the guest's connection on one side, a host socket on the other. HOT PATH: `segment`, `flush`, `ready`.

Theory of operation. The interface calls `segment` for each of the guest's segments. The common ones are dealt with by a few
additions ("header prediction"): a request goes to the host here and now, all else is only remembered, and at the end of the
batch the stack calls `flush` once: everything the batch brought leaves in one `sendmsg` from the receive buffer itself, one
ACK answers it, and what the guest acknowledged is discarded. `ready` is called when the host socket has something.

The layers, each a module: `FlowState` (parts, frames without payload, the end), `ToHost` and `ToGuest` (the octets of one
direction each), and here what happens when.

States beside the connection's: CONNECTING (the host is being dialled, the guest's SYN waits), OPEN, and the end. The guest
sees SYN-ACK only after the host connected, RST when it was refused.

Time-outs: the connection's, the delayed ACK, the dialling limit, a host that is gone and, if asked for, idleness; one entry in
the stack's heap.
"""

from __future__ import annotations

import errno
from typing import Final

from netstack.host.io import ERROR, HANGUP, READ, READ_CLOSED, URGENT, WRITE
from netstack.host.tcp_flow_state import NO_OPTIONS
from netstack.host.tcp_frames import SMALL
from netstack.host.tcp_to_guest import ToGuest
from netstack.tcp.connection import Connection, Event
from netstack.tcp.seq import MASK
from netstack.tcp.state import State
from netstack.wire.tcp import FIN, RST, SYN, parse_options

_TIME_WAIT: Final = State.TIME_WAIT
_CLOSED: Final = State.CLOSED
_FIN_WAIT_1: Final = State.FIN_WAIT_1
_SYN_RECEIVED: Final = State.SYN_RECEIVED
_NOT_WRITE: Final = ~WRITE
_READ_TO_END: Final = READ | READ_CLOSED


class TcpFlow(ToGuest):
    """See the module."""

    __slots__ = ()

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
            if ack == snd.max and not later and not self.readable and snd.simple and not snd.timed_at:
                # The answer is acknowledged, as most are, and that is all.
                snd.una = snd.nxt = ack
                snd.rto_at = 0.0
                snd.wnd = wide
                self._discard(conn)
                if self.end:
                    return
            else:
                snd.acknowledge(ack, self._proxy.now)
                snd.wnd = wide
                self._acked = later = True
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

    def train(
        self, view: memoryview, stride: int, count: int, at: int, length: int, seq: int, ack: int, window: int
    ) -> bool:
        """`count` segments of `length` octets each, one after another; False when they must be looked at one by one."""
        octets = length * count
        if not self._in_order(octets, seq, ack, window):
            return False
        end = stride * count
        self._iov += [view[start : start + length] for start in range(at, end, stride)]
        return True

    def pieces(self, pieces: list[memoryview], octets: int, seq: int, ack: int, window: int) -> bool:
        """One segment of `octets` octets in pieces; False when it must be looked at in one."""
        if not self._in_order(octets, seq, ack, window):
            return False
        self._iov += pieces
        return True

    def _in_order(self, octets: int, seq: int, ack: int, window: int) -> bool:
        """The numbers of octets that come next, if they do; the octets themselves are to be added by whoever asked."""
        conn = self.conn
        if conn is None or not conn.plain:
            return False
        rcv, snd = conn.rcv, conn.snd
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
        if (
            conn.state is _SYN_RECEIVED
            and offset_flags & 0xFFF7 == 0x5010
            and conn.established_by(seq, ack, window, self._proxy.now)
        ):
            self._opened(conn)
            if self.readable:
                self.touch()
            self.segment(frame, at, end, seq, ack, offset_flags, window)
            return
        if at == end and not self.dirty and self._closes(conn, seq, ack, offset_flags):
            return
        options = NO_OPTIONS
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

    def _closes(self, conn: Connection, seq: int, ack: int, offset_flags: int) -> bool:
        """The usual end of a connection that the host closed first, in short: the guest's ACK of our FIN, then its FIN."""
        if not conn.host_closed(seq, ack, offset_flags) or self._pending:
            return False
        if conn.state is _FIN_WAIT_1:
            conn.fin_acknowledged()
            self._discard(conn)
            return True
        conn.fin_arrived()
        self._send_ack(conn)
        self._proxy.retire(self, conn)
        return True

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
        if snd.rto_at:
            self.rearm(snd.rto_at)

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

    # From the host.

    def ready(self, mask: int) -> None:
        """The host socket's edge-triggered event."""
        if self.end:
            return
        conn = self.conn
        quick = mask & _NOT_WRITE
        if (
            (quick == READ or quick == _READ_TO_END)
            and conn is not None
            and conn.plain
            and self.writable
            and not self._read_on
        ):
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
                    self._read_on = quick != READ
                    self._answer(conn, frames, port, self._read_on)
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
                self.rearm(self._gone_at)
            self.pump()
            when = self.conn.snd.rto_at
            if when and not self.end:
                self.rearm(when)

    # Time.

    def timer(self, now: float) -> None:
        """The heap's entry is due; which of the time-outs, if any, is looked up."""
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
            self.rearm(min(deadlines))

    def probe(self) -> None:
        """Ask the guest whether it still knows the connection (RFC 1122 4.2.3.6): RST tells of a reboot."""
        conn = self.conn
        if conn is not None and conn.synchronised:
            conn.resend.append(((conn.snd.una - 1) & MASK, 0))
            self.touch()

    # Beginning.

    def dialling(self, until: float) -> None:
        self._connect_at = until
        self.rearm(until)

    def begin(self, conn: Connection, preface: bytes = b"") -> None:
        """The host is connected (or its socket was accepted): speak to the guest, with `preface` first."""
        self._connect_at = 0.0
        self.conn = conn
        self._source = self._proxy.octets_of(self.sock)
        if preface:
            self._source.begin_with(preface)
            self.readable = True
        self.touch()  # SYN or SYN-ACK leaves after the batch, so that nothing in it can acknowledge one not sent yet
