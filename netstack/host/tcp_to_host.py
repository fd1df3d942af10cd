"""A flow's octets from the guest to the host, and their acknowledgement. HOT PATH: `_say`, `_to_host`.

What the host socket does not take is kept (bounded by the window that was told, and for all flows by the budget) and narrows
the window.

Acknowledgements: at once for whole segments. Less than one is taken for a request, and its ACK waits up to `DELAYED_ACK_S`
for the answer to carry it (RFC 1122 4.2.3.2), which saves a frame per request. Once an ACK has waited in vain the flow is no
dialogue: ACKs go at once until `DIALOGUE` answers in a row would have carried them.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from netstack.host.tcp_flow_state import DIALOGUE, FlowState
from netstack.tcp.connection import Connection
from netstack.tcp.state import State

DELAYED_ACK_S: Final = 0.004  # RFC 1122 4.2.3.2 allows 0.5 s; a guest with Nagle waits this long, once
ACK_OCTETS: Final = 128 << 10
"""Unacknowledged octets that are acknowledged before the turn is over; fewer wait for its end, and more may join them."""
_IOV_MAX: Final = 1000
_OVER: Final = (State.TIME_WAIT, State.CLOSED)
_OPEN: Final = (State.ESTABLISHED, State.FIN_WAIT_1, State.FIN_WAIT_2)


class ToHost(FlowState):
    """See the module."""

    __slots__ = ()

    def _say(self, conn: Connection, octets: memoryview, length: int) -> None:
        """A request goes to the host."""
        self._said_in = self._proxy.batch
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
        else:
            self._owe_ack(conn)

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
        if conn.rcv_fin is None and (room - before >= min(rcv.capacity >> 1, 2 * conn.announced_mss) or not before):
            conn.ack_now = True  # room is of no use to a guest that has said everything, and may have forgotten us
        self.touch()

    def _shut_down_host(self, conn: Connection) -> None:
        """All the guest said is passed on and its FIN is in order: end our side of the host socket (half-close, T60)."""
        if self._shut_sent or self._pending or conn.rcv_fin is None:
            return
        if conn.state in _OPEN:
            return  # the FIN lies beyond a hole
        self._shut_sent = True
        if conn.state in _OVER:
            return  # both directions are over: closing the socket says the same
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                self._host_failed(error)

    # Acknowledgements.

    def _owe_ack(self, conn: Connection) -> None:
        """What came is to be acknowledged: with the answer, at once, or when the turn is over."""
        if self._dialogue >= DIALOGUE and self._unacked < conn.snd.mss and not conn.ack_now:
            if not self._ack_at:
                self._ack_at = self._proxy.now + DELAYED_ACK_S
                if not self.ack_due:
                    self.ack_due = self._ack_at
                    self._proxy.delayed.append(self)
        elif self._unacked >= ACK_OCTETS:
            conn.ack_now = True
        else:
            self._proxy.unacknowledged.append(self)

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
