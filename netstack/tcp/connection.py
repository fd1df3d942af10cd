"""One TCP connection towards the guest (RFC 9293) in numbers: sequence numbers and lengths, never an octet of payload.

Theory of operation. A `Connection` joins a `Receiver` and a `Sender` with the state table. The flow that owns it
(`netstack.host.tcp_proxy`) feeds it the headers of the guest's segments (`segment_arrives`), the octets it could pass on
(`rcv.held`), the end of the host's data (`close`) and time (`timeout`), and looks at what it asks for: `ack_now`, `reset`,
`resend`, `events`. In-order segments of an established connection never come here: the flow does their few additions
itself ("header prediction"), under the conditions that `plain` states.

Time-outs: retransmission and persist (`snd.rto_at`), user time-out (`snd.progress_at`). FIN-WAIT-2 and TIME-WAIT belong to
the flow, because they are about its resources.

Example, a guest's request: the flow connects to the host first, then `Connection.passive` with the guest's SYN; SYN-ACK
goes out; `segment_arrives` with the ACK puts `OPENED` into `events`; data runs by prediction; the guest's FIN arrives here
(`PEER_CLOSED`); the host's end of file leads to `close`, our FIN is sent by the flow and its ACK ends it (`CLOSED`).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from netstack.tcp.receiver import Receiver
from netstack.tcp.sender import Sender
from netstack.tcp.seq import HALF, MASK, distance
from netstack.tcp.state import RECEIVING, SYNCHRONISED, TRANSITIONS, Input, State
from netstack.wire.tcp import ACK, DEFAULT_MSS, FIN, RST, SYN, Options

WINDOW_SHIFT: Final = 7
"""Our window scale: 65,535 << 7 is 8 MiB."""
CHALLENGES_PER_S: Final = 5
"""Challenge ACKs of one flow (RFC 5961 section 7 wants a limit; per flow, since a common one leaks: CVE-2016-5696)."""
SYN_RETRIES: Final = 6


class Event(StrEnum):
    OPENED = "the handshake is complete"
    PEER_CLOSED = "the guest's FIN is in order: no more octets will come"
    FINISHED = "our FIN is acknowledged"
    RESET = "the guest sent an acceptable RST"
    REFUSED = "the guest refused our SYN with a RST"


class Connection:
    """See the module. `capacity` is the receive window in octets, `mss` what we announce."""

    __slots__ = (
        "_challenge_at",
        "_challenges",
        "ack_now",
        "announced_mss",
        "events",
        "plain",
        "rcv",
        "rcv_fin",
        "resend",
        "reset",
        "retries",
        "sack",
        "scaled",
        "snd",
        "state",
    )

    def __init__(self, iss: int, irs: int, capacity: int, announced_mss: int, *, scaled: bool, sack: bool) -> None:
        self.snd = Sender(iss)
        self.rcv = Receiver(irs, capacity, WINDOW_SHIFT if scaled else 0)
        self.state = State.SYN_RECEIVED
        self.announced_mss = announced_mss
        self.scaled = scaled
        self.sack = sack
        self.ack_now = False
        """An ACK is wanted at once."""
        self.reset: tuple[int, int | None] | None = None
        """A RST is to be sent: its sequence number, and its acknowledgement number if it carries one."""
        self.resend: list[tuple[int, int]] = []
        """Ranges `(seq, octets)` to send again now."""
        self.events: list[Event] = []
        self.rcv_fin: int | None = None
        """Number of the guest's FIN once seen, perhaps beyond a hole."""
        self.plain = False
        """Header prediction may be used: established, nothing missing in either direction, no FIN seen or sent."""
        self.retries = 0
        self._challenges = 0
        self._challenge_at = 0.0

    @classmethod
    def passive(
        cls, iss: int, irs: int, window: int, options: Options, capacity: int, announced_mss: int
    ) -> Connection:
        """Answer the guest's SYN (number `irs`, unscaled `window`): the state is SYN-RECEIVED."""
        scaled = options.window_shift is not None
        conn = cls(iss, irs, capacity, announced_mss, scaled=scaled, sack=options.sack_permitted)
        conn._learn_syn(options, window, irs)
        return conn

    @classmethod
    def active(cls, iss: int, capacity: int, announced_mss: int) -> Connection:
        """Open towards the guest: the state is SYN-SENT."""
        conn = cls(iss, 0, capacity, announced_mss, scaled=True, sack=True)
        conn.state = State.SYN_SENT
        return conn

    def _learn_syn(self, options: Options, window: int, seg_seq: int) -> None:
        snd = self.snd
        snd.mss = min(options.mss or DEFAULT_MSS, self.announced_mss)
        snd.shift = options.window_shift or 0
        snd.wnd = window  # RFC 7323 2.2: the window of a SYN is never scaled
        snd.wl1, snd.wl2 = seg_seq, snd.iss

    def _to(self, what: Input) -> None:
        self.state = TRANSITIONS[self.state, what]

    def update_plain(self) -> None:
        """Recompute `plain`; called after whatever may change it."""
        self.plain = (
            self.state is State.ESTABLISHED
            and self.rcv_fin is None
            and self.snd.fin_at is None
            and not self.rcv.pieces
            and self.snd.recover is None
        )

    def abort(self) -> None:
        """3.10.5 ABORT: a RST goes out at SND.NXT (none before the guest has sent anything)."""
        if self.state is not State.CLOSED:
            if self.state is State.SYN_SENT:
                self.reset = (self.snd.nxt, None)
            else:
                self.reset = (self.snd.max, self.rcv.nxt)
            self._to(Input.RESET)
            self.plain = False

    def close(self) -> None:
        """3.10.4 CLOSE: all octets of the host up to SND.MAX are known to be the last; the flow sends the FIN now."""
        if self.snd.fin_at is None:
            self.snd.fin_at = self.snd.max
            self.plain = False

    def fin_sent(self) -> None:
        """Our FIN went out for the first time."""
        if (self.state, Input.CLOSE) in TRANSITIONS:
            self._to(Input.CLOSE)

    def challenge(self, now: float) -> None:
        """A challenge ACK (RFC 5961), rate-limited per flow."""
        if now - self._challenge_at >= 1.0:
            self._challenge_at = now
            self._challenges = 0
        if self._challenges < CHALLENGES_PER_S:
            self._challenges += 1
            self.ack_now = True

    # 3.10.7 SEGMENT ARRIVES

    def segment_arrives(
        self, seg_seq: int, seg_len: int, seg_ack: int, flags: int, seg_wnd: int, options: Options, now: float
    ) -> tuple[int, int, int, bool] | None:
        """Process a segment; `seg_len` is its payload in octets.

        Returns the part of the payload to keep as `(begin, end, seq, in_order)`: octets `begin:end`, the first of them
        numbered `seq`; in order (RCV.NXT is moved over them) or to be stored by number until `rcv.fill` asks for it.
        """
        if self.state is State.SYN_SENT:
            self._syn_sent(seg_seq, seg_ack, flags, seg_wnd, options, now)
            return None
        if self.state is State.CLOSED:
            return None
        rcv, snd = self.rcv, self.snd
        if (
            self.state is State.SYN_RECEIVED
            and flags & (SYN | ACK | RST) == SYN | ACK
            and (seg_seq + 1) & MASK == rcv.nxt
        ):
            # The SYN-ACK of a simultaneous open (figure 8): its SYN is known, the rest counts.
            seg_seq = rcv.nxt
            flags &= ~SYN
        fin = flags & FIN
        # First, the sequence number (3.10.7.4).
        if not rcv.acceptable(seg_seq, seg_len + (1 if fin else 0) + (1 if flags & SYN else 0)):
            if self.state is State.SYN_RECEIVED and flags & SYN and not flags & ACK and (seg_seq + 1) & MASK == rcv.nxt:
                self.retransmit_syn()
                return None
            if not flags & RST:
                # A keep-alive or window probe, a retransmission, or junk: tell where we are. A pure ACK with an old number
                # is told too (Linux does), which is what a dead flow of a rebooted guest needs.
                if seg_len or fin or flags & SYN or distance(seg_seq, rcv.nxt) == 1:
                    self.ack_now = True
                else:
                    self.challenge(now)
                if flags & ACK and not flags & SYN and self.synchronised and self._ack_in_flight(seg_ack):
                    # RFC 9293 allows ACK processing of unacceptable segments at zero window.
                    self._process_ack(seg_seq, 0, seg_ack, seg_wnd, options, now)
            return None
        # Second, RST (RFC 5961 3.2).
        if flags & RST:
            if seg_seq == rcv.nxt:
                if self.state is not State.TIME_WAIT:  # where both have said and heard everything
                    self.events.append(Event.RESET)
                self._to(Input.RESET)
                self.plain = False
            else:
                self.challenge(now)
            return None
        # Fourth, SYN (RFC 5961 4.2).
        if flags & SYN:
            self.challenge(now)
            return None
        # Fifth, ACK.
        if not flags & ACK:
            return None
        if self.state is State.SYN_RECEIVED:
            if not (snd.una != seg_ack and (snd.max - seg_ack) & MASK < HALF and distance(snd.una, seg_ack) > 0):
                self.reset = (seg_ack, None)
                return None
            self._establish(seg_seq, seg_ack, seg_wnd, now)
            self.events.append(Event.OPENED)
        elif not self._process_ack(seg_seq, seg_len, seg_ack, seg_wnd, options, now):
            return None
        # Seventh and eighth, the text and FIN.
        accepted = self._text(seg_seq, seg_len, bool(fin)) if seg_len or fin else None
        self.update_plain()
        return accepted

    def established_by(self, seg_seq: int, seg_ack: int, seg_wnd: int, now: float) -> bool:
        """Whether an ordinary ACK ends the handshake of a passive open; the common case of `segment_arrives` in short."""
        snd, rcv = self.snd, self.rcv
        if seg_seq != rcv.nxt or seg_ack != snd.max or snd.una == snd.max or rcv.pieces or self.rcv_fin is not None:
            return False
        self._establish(seg_seq, seg_ack, seg_wnd, now)
        self.plain = True
        return True

    def _establish(self, seg_seq: int, seg_ack: int, seg_wnd: int, now: float) -> None:
        """Our SYN-ACK is acknowledged."""
        snd = self.snd
        self._to(Input.ACK_OF_SYN)
        snd.acknowledge(seg_ack, now)
        snd.wnd = seg_wnd << snd.shift
        snd.wl1, snd.wl2 = seg_seq, seg_ack
        self.retries = 0

    def host_closed(self, seg_seq: int, seg_ack: int, offset_flags: int) -> bool:
        """Whether an empty segment is what follows our FIN when nothing goes wrong: its ACK in FIN-WAIT-1, or the guest's
        FIN, itself in order, in FIN-WAIT-2."""
        if self.state is State.FIN_WAIT_1:
            awaited = 0x5000 | ACK
        elif self.state is State.FIN_WAIT_2:
            awaited = 0x5000 | ACK | FIN
        else:
            return False
        snd, rcv = self.snd, self.rcv
        return (
            offset_flags == awaited
            and seg_seq == rcv.nxt
            and seg_ack == snd.max
            and snd.nxt == snd.max
            and not rcv.pieces
            and self.rcv_fin is None
        )

    def fin_acknowledged(self) -> None:
        """FIN-WAIT-1 to FIN-WAIT-2."""
        snd = self.snd
        snd.una = snd.max
        snd.rto_at = 0.0
        self._to(Input.ACK_OF_FIN)

    def fin_arrived(self) -> None:
        """FIN-WAIT-2 to TIME-WAIT."""
        self.rcv_fin = self.rcv.nxt
        self.check_fin()

    def _ack_in_flight(self, seg_ack: int) -> bool:
        return 0 <= distance(self.snd.una, seg_ack) <= self.snd.flight()

    def _process_ack(
        self,
        seg_seq: int,
        seg_len: int,
        seg_ack: int,
        seg_wnd: int,
        options: Options,
        now: float,
    ) -> bool:
        """ACK processing of synchronised states; False when the segment is to be dropped."""
        snd = self.snd
        ahead = distance(snd.una, seg_ack)
        if ahead > snd.flight():
            self.challenge(now)  # acknowledges what was never sent (RFC 5961 5.2)
            return False
        if ahead < 0:
            return (
                distance(seg_ack, snd.una) <= 0xFFFF << snd.shift or not seg_len
            )  # an old duplicate: text still counts
        window = seg_wnd << snd.shift
        if options.sack:
            snd.learn_sack(options.sack)
        if ahead > 0:
            fin_at = snd.fin_at
            snd.acknowledge(seg_ack, now)
            if snd.recover is not None:
                self.resend += snd.holes(2)
            if fin_at is not None and seg_ack == (fin_at + 1) & MASK:
                if (self.state, Input.ACK_OF_FIN) in TRANSITIONS:
                    self._to(Input.ACK_OF_FIN)
                    self.events.append(Event.FINISHED)
        elif seg_len == 0 and window == snd.wnd and snd.max != snd.una and snd.wnd:
            snd.duplicate()
            if snd.recover is not None:
                self.resend += snd.holes(2)
            self.plain = False
        # RFC 9293 3.10.7.4 updates by WL1 and WL2; like Linux also whenever the ACK advances, since the old window counted
        # from the new SND.UNA could lie beyond what the guest offers.
        newer = distance(snd.wl1, seg_seq)
        if ahead > 0 or newer > 0 or (newer == 0 and distance(snd.wl2, seg_ack) >= 0):
            if window and not snd.wnd:
                snd.rto_at = now + snd.rtt.rto if snd.una != snd.max else 0.0
                snd.rtt.backoff = 0
            if not window:
                snd.progress_at = now  # a closed window that is told to us is a sign of life
            snd.wnd = window
            if newer >= 0:
                snd.wl1 = seg_seq
            snd.wl2 = seg_ack
        return True

    def _text(self, seg_seq: int, seg_len: int, fin: bool) -> tuple[int, int, int, bool] | None:
        rcv = self.rcv
        if self.state not in RECEIVING:
            self.ack_now = True  # a retransmitted FIN, or text after it
            return None
        skip = max(distance(seg_seq, rcv.nxt), 0)
        room = rcv.told() + distance(seg_seq, rcv.nxt)
        end = min(seg_len, max(room, 0))
        if end < seg_len:
            fin = False
        if self.rcv_fin is not None:
            end = min(end, max(distance(seg_seq, self.rcv_fin), 0))
        accepted: tuple[int, int, int, bool] | None = None
        if seg_len and skip < end:
            seq = (seg_seq + skip) & MASK
            if seq == rcv.nxt:
                rcv.nxt = (rcv.nxt + end - skip) & MASK
                accepted = (skip, end, seq, True)
                if rcv.pieces:
                    self.ack_now = True
            else:
                piece = rcv.store(seq, (seg_seq + end) & MASK)
                if piece is not None:
                    begin = distance(seg_seq, piece[0])
                    accepted = (begin, begin + distance(*piece), piece[0], False)
                self.ack_now = True
        elif seg_len:
            self.ack_now = True
        if fin and self.rcv_fin is None:
            self.rcv_fin = (seg_seq + seg_len) & MASK
            self.ack_now = True
        if not rcv.pieces:
            self.check_fin()
        return accepted

    def check_fin(self) -> None:
        """The guest's FIN counts once everything before it has arrived (3.10.7.4, eighth)."""
        if self.rcv_fin == self.rcv.nxt and self.state in RECEIVING:
            self.rcv.nxt = (self.rcv.nxt + 1) & MASK
            self._to(Input.FIN)
            self.ack_now = True
            self.plain = False
            self.events.append(Event.PEER_CLOSED)

    def _syn_sent(self, seg_seq: int, seg_ack: int, flags: int, seg_wnd: int, options: Options, now: float) -> None:
        """3.10.7.3 SYN-SENT."""
        snd = self.snd
        if flags & ACK and seg_ack != snd.max:
            if not flags & RST:
                self.reset = (seg_ack, None)
            return
        if flags & RST:
            if flags & ACK:
                self._to(Input.RESET)
                self.events.append(Event.REFUSED)
            return
        if not flags & SYN:
            return
        capacity = self.rcv.capacity
        self.scaled = options.window_shift is not None
        self.sack = options.sack_permitted
        self.rcv = Receiver(seg_seq, capacity, WINDOW_SHIFT if self.scaled else 0)
        self._learn_syn(options, seg_wnd, seg_seq)
        self.ack_now = True
        if flags & ACK:
            snd.acknowledge(seg_ack, now)
            snd.wl2 = seg_ack
            self._to(Input.ACK_OF_SYN)
            self.retries = 0
            self.events.append(Event.OPENED)
            self.update_plain()
        else:
            self._to(Input.SYN)
            self.retransmit_syn()

    def retransmit_syn(self) -> None:
        """Our SYN or SYN-ACK is to be sent (again): the flow sees `snd.nxt == snd.iss`."""
        self.snd.nxt = self.snd.iss

    # 3.10.8 timeouts

    def timeout(self, now: float, user_s: float) -> None:
        """Harmless when called early. Retransmission, persist probe (the flow sees `ack_now`), user time-out."""
        snd = self.snd
        if not snd.rto_at or now < snd.rto_at:
            return
        if self.state in (State.SYN_SENT, State.SYN_RECEIVED):
            self.retries += 1
            if self.retries > SYN_RETRIES:
                self.abort()
                return
            snd.rto_at = now + snd.backed_off()
            self.retransmit_syn()
            return
        if user_s and now - snd.progress_at >= user_s:
            self.abort()
            return
        if snd.una == snd.max or not snd.wnd:
            # Persist (RFC 9293 3.8.6.1): an empty segment one number back, which the guest must answer (Linux does so too).
            snd.rto_at = now + snd.backed_off()
            if snd.una != snd.max:
                snd.nxt = snd.una if snd.wnd else snd.nxt
            self.resend.append(((snd.una - 1) & MASK, 0))
            return
        snd.timed_out(now)
        self.update_plain()

    @property
    def synchronised(self) -> bool:
        return self.state in SYNCHRONISED
