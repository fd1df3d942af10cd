"""A small reference TCP guest, written from the RFCs and without the project's code: the other end in simulations.

It does what a kernel in a guest does as far as the stack can tell: handshake both ways, in-order delivery with reassembly
beyond holes (SACK blocks sent and used), a receive window that a slow reader closes, delayed or immediate ACKs, RTO with
back-off, fast retransmit, zero-window probes, half-close in both orders, TIME-WAIT, RST. With `super_frames` it hands over
segments of up to 64 KiB with a virtio-net header, as a kernel does with TSO, and takes such.

`ModelGuest` is the machine (Ethernet, IPv4, demultiplexing), `ModelSocket` one connection. Time is passed in.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from tests.support import packets
from tests.support.packets import ACK, FIN, IPV4, MASK, PSH, RST, SYN, Segment, diff

MIN_RTO_S = 0.2
MAX_RTO_S = 20.0
TIME_WAIT_S = 2.0
GIVE_UP = 40


class ModelSocket:
    """One connection. `send`, `shutdown`, `abort`, `pause` and `resume` are the program's; the rest is the machine's."""

    def __init__(self, guest: ModelGuest, local: int, remote: bytes, port: int, isn: int, *, buffer: int) -> None:
        self.guest, self.local, self.remote, self.port = guest, local, remote, port
        self.state = "CLOSED"
        self.buffer = buffer
        self.received = bytearray()
        self.eof = False
        self.was_reset = False
        self.refused = False
        self.gave_up = False
        self.reading = True
        self._unread = 0
        # sending
        self.iss = isn
        self.una = self.nxt = self.top = isn
        self._data = bytearray()  # from iss + 1 on
        self._closing = False
        self.peer_window = 0
        self.peer_limit = 1 << 30
        """Most octets in flight, whatever the stack's window: a send buffer."""
        self.peer_shift: int | None = None
        self.mss = 536
        self._wl1 = 0
        self._rto = 1.0
        self._srtt = 0.0
        self._var = 0.0
        self._timed: tuple[int, float] | None = None
        self._backoff = 0
        self._deadline: float | None = None
        self._dupacks = 0
        self._sacked: list[tuple[int, int]] = []
        self._recover: int | None = None
        self._cwnd = 10 * 1460
        self._ssthresh = 1 << 30
        # receiving
        self.irs = 0
        self.rcv = 0
        self.right = 0
        self.shift = 7 if buffer > 65535 else 0
        self._pieces: dict[int, bytes] = {}
        self._fin_at: int | None = None
        self._ack_now = False
        self._ack_at: float | None = None
        self._unacked = 0
        self.delayed_acks = True

    # the program

    def send(self, data: bytes, now: float) -> None:
        assert not self._closing
        self._data += data
        self.output(now)

    def shutdown(self, now: float) -> None:
        """No more octets from the guest."""
        self._closing = True
        self.output(now)

    def abort(self) -> None:
        if self.state not in ("CLOSED", "TIME-WAIT"):
            self._emit(self.top, RST | ACK)
            self._end()

    def pause(self) -> None:
        self.reading = False

    def resume(self, now: float) -> None:
        self.reading = True
        self._unread = 0
        room = self._room()
        if room - max(diff(self.right, self.rcv), 0) >= min(self.buffer // 2, 1460) and self.state != "CLOSED":
            self._ack_now = True
            self.output(now)

    @property
    def closed(self) -> bool:
        return self.state in ("CLOSED", "TIME-WAIT")

    @property
    def acknowledged(self) -> int:
        """Octets of ours that the stack acknowledged."""
        return min(max(diff(self.una, self.iss) - 1, 0), len(self._data))

    # segments

    def connect(self, now: float) -> None:
        self.state = "SYN-SENT"
        self._syn(now)

    def _syn(self, now: float) -> None:
        options = packets.mss_option(self.guest.mtu - 40)
        if self.state == "SYN-SENT" or self.peer_shift is not None:
            options += packets.scale_option(self.shift)
        options += packets.SACK_PERMITTED
        flags = SYN if self.state == "SYN-SENT" else SYN | ACK
        self._emit(self.iss, flags, options=options)
        self.nxt = self.top = (self.iss + 1) & MASK
        self._arm(now)

    def _room(self) -> int:
        return max(self.buffer - self._unread, 0)

    def _window(self, syn: bool) -> int:
        told = max(diff(self.right, self.rcv), 0)
        room = self._room()
        if room - told < min(self.buffer // 2, 1460):
            room = told
        shift = 0 if syn or self.peer_shift is None else self.shift
        field = min((room + (1 << shift) - 1) >> shift, 65535)
        self.right = (self.rcv + (field << shift)) & MASK
        return field

    def _emit(self, seq: int, flags: int, data: bytes = b"", options: bytes = b"") -> None:
        syn = bool(flags & SYN)
        if not syn and self._pieces and flags & ACK and not flags & RST:
            options = packets.sack_option(self._blocks()[:3])
        self._ack_now, self._ack_at, self._unacked = False, None, 0
        window = 0 if flags & RST else self._window(syn)
        if flags == SYN:
            window = min(self.buffer, 65535)
            self.right = 0
        self.guest.emit(self, seq, self.rcv if flags & ACK else 0, flags, window, data, options)

    def _blocks(self) -> list[tuple[int, int]]:
        merged: list[tuple[int, int]] = []
        for seq in sorted(self._pieces, key=lambda number: diff(number, self.rcv)):
            end = (seq + len(self._pieces[seq])) & MASK
            if merged and diff(seq, merged[-1][1]) <= 0:
                if diff(end, merged[-1][1]) > 0:
                    merged[-1] = (merged[-1][0], end)
            else:
                merged.append((seq, end))
        return merged

    def arrives(self, seg: Segment, now: float) -> None:
        """RFC 9293 3.10.7."""
        if self.state == "SYN-SENT":
            if seg.flags & ACK and seg.ack != self.nxt:
                return
            if seg.flags & RST:
                if seg.flags & ACK:
                    self.refused = True
                    self._end()
                return
            if not seg.flags & SYN or not seg.flags & ACK:
                return
            self._learn_syn(seg)
            self.una = seg.ack
            self.state = "ESTABLISHED"
            self._deadline = None
            self._sample(now)
            self._ack_now = True
            self.output(now)
            return
        if self.state == "CLOSED":
            return
        length = len(seg.payload) + bool(seg.flags & FIN) + bool(seg.flags & SYN)
        room = max(diff(self.right, self.rcv), 0)
        ahead = diff(seg.seq, self.rcv)
        fits = (ahead == 0 or 0 <= ahead < room) if not length else room and (ahead < room and ahead + length > 0)
        if not fits:
            if not seg.flags & RST:
                self._ack_now = True
                if seg.flags & ACK and diff(seg.ack, self.una) > 0 and diff(self.top, seg.ack) >= 0:
                    self._acked(seg, now)
                self.output(now)
            return
        if seg.flags & RST:
            if seg.seq == self.rcv:
                self.was_reset = True
                self._end()
            else:
                self._ack_now = True
                self.output(now)
            return
        if seg.flags & SYN or not seg.flags & ACK:
            if seg.flags & SYN:
                self._ack_now = True
                self.output(now)
            return
        if self.state == "SYN-RECEIVED":
            if diff(seg.ack, self.una) <= 0 or diff(seg.ack, self.top) > 0:
                return
            self.state = "ESTABLISHED"
        if diff(seg.ack, self.top) > 0:
            self._ack_now = True
            self.output(now)
            return
        self._acked(seg, now)
        self._text(seg, now)
        self.output(now)

    def _learn_syn(self, seg: Segment) -> None:
        self.irs = seg.seq
        self.rcv = (seg.seq + 1) & MASK
        self.right = self.rcv
        self.peer_shift = seg.shift
        if seg.shift is None:
            self.shift = 0
        self.mss = min(seg.mss or 536, self.guest.mtu - 40)
        self.peer_window = seg.window
        self._wl1 = seg.seq

    def _acked(self, seg: Segment, now: float) -> None:
        advance = diff(seg.ack, self.una)
        window = seg.window << (self.peer_shift or 0) if self.peer_shift is not None else seg.window
        for begin, end in seg.sack:
            if diff(begin, self.una) > 0 and diff(end, self.top) <= 0 and (begin, end) not in self._sacked:
                self._sacked.append((begin, end))
        if advance > 0:
            if self._timed is not None and diff(seg.ack, self._timed[0]) >= 0:
                self._sample(now)
            self.una = seg.ack
            if diff(self.nxt, self.una) < 0:
                self.nxt = self.una
            self._sacked = [block for block in self._sacked if diff(block[1], self.una) > 0]
            self._dupacks = self._backoff = 0
            self._cwnd += min(advance, self._cwnd if self._cwnd < self._ssthresh else self.mss)
            if self._recover is not None:
                if diff(self.una, self._recover) >= 0:
                    self._recover = None
                else:
                    self._resend_hole(now)
            self._deadline = None
            if self.una == self.top:
                self._closed_side(now)
            else:
                self._arm(now)
        elif (
            advance == 0
            and not seg.payload
            and not seg.flags & FIN
            and window == self.peer_window
            and self.top != self.una
        ):
            self._dupacks += 1
            if self._dupacks == 3 and self._recover is None:
                self._recover = self.top
                self._ssthresh = self._cwnd = max(diff(self.top, self.una) // 2, 2 * self.mss)
                self._resend_hole(now)
        if diff(seg.seq, self._wl1) >= 0 and advance >= 0:
            if window and not self.peer_window:
                self._deadline = None
                self._backoff = 0
            self.peer_window = window
            self._wl1 = seg.seq

    def _closed_side(self, now: float) -> None:
        fin_acked = self._closing and diff(self.una, self.iss) == len(self._data) + 2
        if not fin_acked:
            return
        if self.state == "FIN-WAIT-1":
            self.state = "FIN-WAIT-2"
        elif self.state == "CLOSING":
            self._time_wait(now)
        elif self.state == "LAST-ACK":
            self._end()

    def _time_wait(self, now: float) -> None:
        self.state = "TIME-WAIT"
        self._deadline = now + TIME_WAIT_S

    def _text(self, seg: Segment, now: float) -> None:
        payload, seq = seg.payload, seg.seq
        if seg.flags & FIN and self._fin_at is None and diff(seq + len(payload), self.right) <= 0:
            self._fin_at = (seq + len(payload)) & MASK
            self._ack_now = True
        if self.state == "TIME-WAIT" or (self.eof and (payload or seg.flags & FIN)):
            self._ack_now = True
            if self.state == "TIME-WAIT":
                self._deadline = now + TIME_WAIT_S
            return
        skip = max(diff(self.rcv, seq), 0)
        payload = payload[skip : max(diff(self.right, seq), 0)]
        seq = (seq + skip) & MASK
        if payload:
            self._unacked += 1
            if seq != self.rcv or skip or self._pieces:
                self._ack_now = True
                kept = self._pieces.get(seq)
                if kept is None or len(kept) < len(payload):
                    self._pieces[seq] = payload
            else:
                self._deliver(payload)
        elif seg.payload:
            self._ack_now = True
        progress = True
        while progress:
            progress = False
            for start in sorted(self._pieces, key=lambda number: diff(number, self.rcv)):
                behind = diff(self.rcv, start)
                if behind < 0:
                    break
                piece = self._pieces.pop(start)
                if behind < len(piece):
                    self._deliver(piece[behind:])
                progress = True
                break
        if self._fin_at is not None and self.rcv == self._fin_at and not self.eof:
            self.rcv = (self.rcv + 1) & MASK
            self.eof = True
            self._ack_now = True
            if self.state == "ESTABLISHED":
                self.state = "CLOSE-WAIT"
            elif self.state == "FIN-WAIT-1":
                self.state = "CLOSING"
            elif self.state == "FIN-WAIT-2":
                self._time_wait(now)
        if self._unacked >= 2 or not self.delayed_acks:
            self._ack_now = self._ack_now or bool(self._unacked)
        elif self._unacked and self._ack_at is None:
            self._ack_at = now + 0.04

    def _deliver(self, payload: bytes) -> None:
        self.received += payload
        self.rcv = (self.rcv + len(payload)) & MASK
        if not self.reading:
            self._unread += len(payload)

    # sending

    def output(self, now: float) -> None:
        """Send what may be sent, then an ACK if one is owed."""
        if self.state in ("ESTABLISHED", "CLOSE-WAIT", "FIN-WAIT-1", "LAST-ACK", "CLOSING"):
            sent = True
            while sent:
                sent = self._one(now)
            outstanding = self.top != self.una
            waiting = diff((self.iss + 1 + len(self._data)) & MASK, self.nxt) > 0 or (
                self._closing and not self._fin_sent()
            )
            if self._deadline is None and (outstanding or (waiting and not self.peer_window)):
                self._arm(now)
        if self._ack_now and self.state not in ("CLOSED", "SYN-SENT", "SYN-RECEIVED"):
            self._emit(self.top if diff(self.nxt, self.top) >= 0 else self.nxt, ACK)

    def _fin_sent(self) -> bool:
        return diff(self.top, self.iss) == len(self._data) + 2

    def _one(self, now: float) -> bool:
        at = diff(self.nxt, self.iss) - 1
        if at > len(self._data):
            return False
        room = min(self.peer_window, self._cwnd, self.peer_limit) - diff(self.nxt, self.una)
        size = self.mss
        if self.guest.super_frames:
            size = min(self.mss * max(room // self.mss, 1), self.mss * max(64000 // self.mss, 1))
        length = min(size, len(self._data) - at, max(room, 0))
        last = at + length == len(self._data)
        fin = (
            self._closing
            and last
            and (room > length or (room >= length and self.peer_window > 0 and length < room + 1))
        )
        if not length and not fin:
            return False
        flags = ACK | (FIN if fin else 0) | (PSH if last and length else 0)
        data = bytes(self._data[at : at + length])
        if self._timed is None and self.nxt == self.top:
            self._timed = ((self.nxt + length) & MASK, now)
        self._emit(self.nxt, flags, data)
        self.nxt = (self.nxt + length + fin) & MASK
        if diff(self.nxt, self.top) > 0:
            self.top = self.nxt
        if fin:
            if self.state == "ESTABLISHED":
                self.state = "FIN-WAIT-1"
            elif self.state == "CLOSE-WAIT":
                self.state = "LAST-ACK"
        if self._deadline is None:
            self._arm(now)
        return not fin

    def _resend_hole(self, now: float) -> None:
        """The first octets the stack lacks (one MSS), then leave the rest to partial ACKs."""
        at = diff(self.una, self.iss) - 1
        end = min(
            (diff(begin, self.una) for begin, _end in self._sacked if diff(begin, self.una) > 0), default=self.mss
        )
        data = bytes(self._data[at : at + min(self.mss, end)])
        self._timed = None
        fin = self._closing and at + len(data) == len(self._data) and self._fin_sent()
        if data or fin:
            self._emit(self.una, ACK | (FIN if fin else 0), data)

    def _sample(self, now: float) -> None:
        if self._timed is not None:
            rtt = now - self._timed[1]
            if not self._srtt:
                self._srtt, self._var = rtt, rtt / 2
            else:
                self._var = 0.75 * self._var + 0.25 * abs(self._srtt - rtt)
                self._srtt = 0.875 * self._srtt + 0.125 * rtt
            self._rto = max(self._srtt + 4 * self._var, MIN_RTO_S)
        self._timed = None

    def _arm(self, now: float) -> None:
        self._deadline = now + min(self._rto * (1 << min(self._backoff, 10)), MAX_RTO_S)

    def deadline(self) -> float | None:
        times = [when for when in (self._deadline, self._ack_at) if when is not None]
        return min(times, default=None)

    def timeout(self, now: float) -> None:
        if self._ack_at is not None and now >= self._ack_at:
            self._ack_now = True
            self.output(now)
        if self._deadline is None or now < self._deadline:
            return
        self._deadline = None
        if self.state == "TIME-WAIT":
            self._end()
            return
        self._backoff += 1
        self._timed = None
        if self._backoff > GIVE_UP:
            self.gave_up = True
            self._end()
            return
        if self.state in ("SYN-SENT", "SYN-RECEIVED"):
            self._syn(now)
            return
        if self.state == "CLOSED":
            return
        if not self.peer_window:
            at = diff(self.una, self.iss) - 1
            data = bytes(self._data[at : at + 1])
            if data:  # a probe of one octet (RFC 9293 3.8.6.1)
                self._emit(self.una, ACK, data)
                if diff(self.una + 1, self.top) > 0:
                    self.top = (self.una + 1) & MASK
            else:
                self._emit((self.una - 1) & MASK, ACK)
            self._arm(now)
            return
        self._ssthresh = max(diff(self.top, self.una) // 2, 2 * self.mss)
        self._cwnd = self.mss
        self._recover = None
        self._sacked = []
        self.nxt = self.una
        self.output(now)
        if self._deadline is None and self.top != self.una:
            self._arm(now)

    def _end(self) -> None:
        self.state = "CLOSED"
        self._deadline = self._ack_at = None
        self._ack_now = False


class ModelGuest:
    """The machine. `transmit(frame, vnet header or b"")` puts a frame on its link; `input` takes one off it."""

    def __init__(
        self,
        transmit: Callable[[bytes, bytes], None],
        *,
        mac: bytes,
        address: bytes,
        gateway_mac: bytes,
        mtu: int = 1500,
        super_frames: bool = False,
    ) -> None:
        self._transmit = transmit
        self.mac, self.address, self.gateway_mac, self.mtu = mac, address, gateway_mac, mtu
        self.super_frames = super_frames
        self.sockets: dict[tuple[int, bytes, int], ModelSocket] = {}
        self.listening: dict[int, Callable[[ModelSocket], None]] = {}
        self.bad_sums = 0
        self._next_port = 50000
        self.random_isn: Callable[[], int] = lambda: 0
        self.buffer = 256 << 10

    def announce(self) -> None:
        body = packets.arp(1, self.mac, self.address, bytes(6), self.address)
        self._transmit(packets.ether(b"\xff" * 6, self.mac, packets.ARP, body), b"")

    def connect(self, remote: bytes, port: int, now: float, *, buffer: int | None = None) -> ModelSocket:
        self._next_port += 1
        sock = ModelSocket(self, self._next_port, remote, port, self.random_isn(), buffer=buffer or self.buffer)
        self.sockets[sock.local, remote, port] = sock
        sock.connect(now)
        return sock

    def emit(self, sock: ModelSocket, seq: int, ack: int, flags: int, window: int, data: bytes, options: bytes) -> None:
        partial = self.super_frames
        body = packets.tcp(
            self.address, sock.remote, sock.local, sock.port, seq, ack, flags, window, data, options, partial=partial
        )
        packet = packets.ipv4(self.address, sock.remote, packets.TCP, body, df=True)
        header = b""
        if partial:
            tcp_head = (body[12] >> 4) * 4
            big = len(data) > sock.mss
            header = packets.VNET.pack(
                1, 1 if big else 0, 34 + tcp_head if big else 0, sock.mss if big else 0, 34, 16, 0
            )
        self._transmit(packets.ether(self.gateway_mac, self.mac, IPV4, packet), header)

    def input(self, frame: bytes, now: float) -> None:
        """A frame with complete checksums; a wrong one is dropped as any kernel does."""
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\x00\x01" and frame[38:42] == self.address:
            body = packets.arp(2, self.mac, self.address, frame[22:28], frame[28:32])
            self._transmit(packets.ether(frame[6:12], self.mac, packets.ARP, body), b"")
            return
        if len(frame) < 54 or frame[:6] != self.mac:
            return
        packet = packets.read_ipv4(frame)
        if packet is None or packet.protocol != packets.TCP or packet.destination != self.address:
            return
        sums = packets.pseudo(packet.source, packet.destination, 6, len(packet.payload)) + packet.payload
        if packets.word_sum(packet.header) != 0xFFFF or packets.word_sum(sums) != 0xFFFF or len(packet.payload) < 20:
            self.bad_sums += 1
            return
        seg = packets.read_tcp(packet)
        key = (seg.dport, seg.source, seg.sport)
        sock = self.sockets.get(key)
        if sock is not None and sock.state == "CLOSED" and seg.flags & (SYN | ACK) == SYN:
            sock = None
        if sock is not None and sock.state != "CLOSED":
            sock.arrives(seg, now)
            return
        if seg.flags & RST:
            return
        if seg.flags & (SYN | ACK) == SYN and seg.dport in self.listening:
            sock = ModelSocket(self, seg.dport, seg.source, seg.sport, self.random_isn(), buffer=self.buffer)
            self.sockets[key] = sock
            sock._learn_syn(seg)
            sock.state = "SYN-RECEIVED"
            sock._syn(now)
            self.listening[seg.dport](sock)
            return
        # RFC 9293 3.10.7.1
        if seg.flags & ACK:
            seq, ack, flags = seg.ack, 0, RST
        else:
            seq, ack, flags = 0, seg.end, RST | ACK
        body = packets.tcp(self.address, seg.source, seg.dport, seg.sport, seq, ack, flags, 0)
        packet_out = packets.ipv4(self.address, seg.source, packets.TCP, body, df=True)
        self._transmit(packets.ether(self.gateway_mac, self.mac, IPV4, packet_out), b"")

    def deadline(self) -> float | None:
        times = [when for when in (sock.deadline() for sock in self.sockets.values()) if when is not None]
        return min(times, default=None)

    def timeout(self, now: float) -> None:
        for sock in list(self.sockets.values()):
            sock.timeout(now)


def is_super_frame(header: bytes) -> bool:
    """Whether a virtio-net header asks for segmentation."""
    return bool(header) and bool(struct.unpack_from("<BB", header)[1])
