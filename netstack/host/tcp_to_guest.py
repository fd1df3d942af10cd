"""A flow's octets from the host to the guest: read straight into the place the frame leaves from. HOT PATH: `pump`, `_answer`.

`pump` reads as far as window, link and budget allow: super-frames on links that segment, bursts of ordinary frames on the
others. Something small with nothing outstanding takes the short way (`_answer`): one read, one frame. What the guest has not
acknowledged stays readable (`netstack.host.octets`), so sending again is reading again.
"""

from __future__ import annotations

from typing import Final

from netstack.host.tcp_flow_state import FIRST_GUESS
from netstack.host.tcp_frames import HEADERS, SMALL, FrameMaker
from netstack.host.tcp_to_host import ToHost
from netstack.iface.switch import Port
from netstack.tcp.connection import Connection
from netstack.tcp.seq import MASK, distance
from netstack.wire.tcp import ACK, FIN, PSH

BURSTS: Final = 8
"""Super-frames (or bursts) a flow may send before the others have their turn."""
_ACK_PSH: Final = ACK | PSH


class ToGuest(ToHost):
    """See the module."""

    __slots__ = ()

    def _answer(self, conn: Connection, frames: FrameMaker, port: Port, closing: bool) -> None:
        """Something came from the host while nothing was outstanding: what is small leaves here and now, with our FIN when
        the host is `closing` and that was all."""
        scratch, whole, _payload, small = frames.scratch
        source = self._source
        try:
            count = source.take(small)
        except OSError as error:
            self._host_failed(error)
            return
        if count is None:
            return
        if 0 < count < SMALL:
            snd = conn.snd
            flags, length = _ACK_PSH, count
            failed: OSError | None = None
            if closing:
                self.readable = True
                try:
                    if source.ended():
                        flags, length = _ACK_PSH | FIN, count + 1
                        snd.fin_at = (snd.nxt + count) & MASK
                        conn.plain = self.readable = False
                except OSError as error:
                    failed = error  # a reset comes after what was read
            end = frames.finish_small(scratch, count, snd.nxt, conn.rcv.nxt, flags, self.window(conn))
            self.octets_in += count
            port.send_one(whole[:end])
            if self._unacked or conn.ack_now:
                self._acknowledged(conn)
            snd.sent(length, self._proxy.now)
            self.rearm(snd.rto_at)
            if length > count:
                conn.fin_sent()
            elif failed is not None:
                self._host_failed(failed)
            if not self.readable or self.end:
                return
        self.readable = True  # more than that, or the end
        self.pump()
        when = conn.snd.rto_at
        if when and not self.end:
            self.rearm(when)

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
        in_place = port.has_room and frames.partial
        lead = frames.headroom + HEADERS
        budget = BURSTS
        count: int | None
        while True:
            offset = (snd.nxt - self._base) & MASK
            resending = snd.nxt != snd.max
            ahead = limit = (snd.wnd if snd.wnd < snd.cwnd else snd.cwnd) - ((snd.nxt - snd.una) & MASK)
            if snd.fin_at is not None:
                left = distance(snd.nxt, snd.fin_at)
                if left <= 0:
                    if left == 0 and ahead >= 0:
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
            room = None
            if largest:
                want = min(limit, largest)
                if in_place and want > SMALL and not resending:
                    guess = self._bulk
                    if want > guess:
                        want = guess // mss * mss or guess
                    room = port.room(lead + want, lead, self.key, source.native(offset))
                    if room is None:
                        if port.alive and not self._waiting:
                            self._waiting = True
                            port.waiting.append(self)
                        return
                    want = room.octets - lead
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
                if room is None:
                    count = source.read(offset, payload[:want])
                else:
                    count = room.read(source, offset)
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
            if resending:
                proxy.counters.tcp_retransmitted += 1
            else:
                self.octets_in += count
            if room is None:
                port.send_one(whole[: frames.finish(scratch, count, snd.nxt, conn.rcv.nxt, flags, window)])
            else:
                self._bulk = max(2 * count, FIRST_GUESS)
                if room.buffer is not None:
                    frames.finish(room.buffer, count, snd.nxt, conn.rcv.nxt, flags, window, room.at)
                else:
                    frames.finish(scratch, count, snd.nxt, conn.rcv.nxt, flags, window)
                    room.write(whole[:lead])
                port.sent(room, lead + count)
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

    def resume(self) -> None:
        """The link has room again."""
        self._waiting = False
        if not self.end:
            self.pump()
            conn = self.conn
            if conn is not None and conn.snd.rto_at and not self.end:
                self.rearm(conn.snd.rto_at)

    # What the guest has, and what it has not.

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
