"""SND.*: what the guest was sent, what it acknowledged, and what it must be sent again. HOT PATH.

Numbers only: the octets stay where they came from (in the host socket, or in a bounded buffer) until the guest has
acknowledged them, so "send [seq, seq+n) again" costs nothing to keep possible.

The guest is one hop away and the host kernel does congestion control towards the world, so there is no congestion window
until something is lost. A loss (three duplicate ACKs, or SACK blocks worth as much) halves the flight and resends the holes
(RFC 5681, RFC 6675 in short); a time-out goes back to SND.UNA and starts slowly. Growth afterwards doubles per round trip
until the window of the guest is the only limit again.
"""

from __future__ import annotations

from typing import Final

from netstack.tcp.rtt import Rtt
from netstack.tcp.seq import HALF, MASK, distance

NO_LIMIT: Final = 1 << 30
DUPLICATES: Final = 3  # RFC 5681 3.2
MAX_SACKED: Final = 64
"""Ranges remembered of the guest's SACK blocks."""


class Sender:
    """The sending half. `mss` is the guest's, `shift` its window scale; `now` in seconds."""

    __slots__ = (
        "cwnd",
        "dupacks",
        "fin_at",
        "iss",
        "max",
        "mss",
        "nxt",
        "progress_at",
        "recover",
        "resend_from",
        "rto_at",
        "rtt",
        "sacked",
        "shift",
        "simple",
        "ssthresh",
        "timed_at",
        "timed_seq",
        "una",
        "wl1",
        "wl2",
        "wnd",
    )

    def __init__(self, iss: int) -> None:
        self.iss = iss
        self.una = iss
        self.nxt = iss
        self.max = iss
        """SND.MAX: one beyond the highest number ever sent; `nxt` goes back behind it after a time-out."""
        self.wnd = 0
        self.shift = 0
        self.wl1 = 0
        self.wl2 = 0
        self.mss = 536
        self.cwnd = NO_LIMIT
        self.ssthresh = NO_LIMIT
        self.dupacks = 0
        self.simple = True
        """Nothing was lost, doubled or timed out since the last ACK: one of everything needs no bookkeeping."""
        self.recover: int | None = None
        """In fast recovery: SND.MAX when it began (RFC 6582)."""
        self.resend_from = iss
        """In recovery: holes before this were sent again already."""
        self.sacked: list[tuple[int, int]] = []
        self.fin_at: int | None = None
        """Number of our FIN, once the end of the data is known."""
        self.rtt = Rtt()
        self.timed_seq = 0
        self.timed_at = 0.0
        self.rto_at = 0.0
        """When the retransmission or persist timer fires; 0 when it is off."""
        self.progress_at = 0.0
        """When the guest last acknowledged something new, or data went out with none outstanding."""

    def flight(self) -> int:
        """Sequence numbers outstanding."""
        return (self.max - self.una) & MASK

    def sent(self, length: int, now: float) -> None:
        """`length` sequence numbers from `nxt` on were sent."""
        nxt = self.nxt = (self.nxt + length) & MASK
        if (nxt - self.max) & MASK < HALF and nxt != self.max:
            if not self.timed_at and now >= self.rtt.again_at:
                self.timed_at = now
                self.timed_seq = nxt
            self.max = nxt
        if not self.rto_at:
            rtt = self.rtt
            self.rto_at = now + (rtt.current() if rtt.backoff else rtt.rto)
            self.progress_at = now

    def acknowledge(self, ack: int, now: float) -> int:
        """A new `ack` in (SND.UNA, SND.MAX]; returns how many sequence numbers it covers."""
        acked = (ack - self.una) & MASK
        self.una = ack
        if (self.nxt - ack) & MASK >= HALF:
            self.nxt = ack
        self.dupacks = 0
        self.progress_at = now
        rtt = self.rtt
        if self.timed_at and (ack - self.timed_seq) & MASK < HALF:
            rtt.sample(now - self.timed_at, now)
            self.timed_at = 0.0
        rtt.backoff = 0
        self.rto_at = now + rtt.rto if ack != self.max else 0.0
        if self.sacked:
            self.sacked = [block for block in self.sacked if distance(ack, block[1]) > 0]
        if self.recover is not None:
            if distance(self.recover, ack) >= 0:
                self.recover = None
                self.cwnd = max(self.ssthresh, self.mss)
            elif distance(self.resend_from, ack) > 0:
                self.resend_from = ack
        elif self.cwnd < NO_LIMIT:
            self.cwnd += acked
            if self.cwnd > self.wnd * 2 and self.cwnd > 1 << 20:
                self.cwnd = NO_LIMIT
        self.simple = self.cwnd == NO_LIMIT and not self.sacked
        return acked

    def duplicate(self) -> bool:
        """A duplicate ACK (RFC 5681 section 2); True when it starts fast recovery."""
        self.dupacks += 1
        self.simple = False
        if self.recover is None and (self.dupacks >= DUPLICATES or self._sacked_octets() >= DUPLICATES * self.mss):
            flight = self.flight()
            self.ssthresh = max(flight >> 1, 4 * self.mss)
            self.cwnd = self.ssthresh + DUPLICATES * self.mss
            self.recover = self.max
            self.resend_from = self.una
            self.timed_at = 0.0
            return True
        if self.recover is not None:
            self.cwnd += self.mss
        return False

    def learn_sack(self, blocks: tuple[tuple[int, int], ...]) -> None:
        """Merge the guest's SACK blocks; ones outside (SND.UNA, SND.MAX] are lies and ignored."""
        una, flight = self.una, self.flight()
        self.simple = False
        for begin, end in blocks:
            start, stop = distance(una, begin), distance(una, end)
            if not 0 < start < stop <= flight:
                continue
            merged: list[tuple[int, int]] = []
            for old_begin, old_end in self.sacked:
                old_start, old_stop = distance(una, old_begin), distance(una, old_end)
                if old_stop < start or stop < old_start:
                    merged.append((old_begin, old_end))
                else:
                    start, stop = min(start, old_start), max(stop, old_stop)
            merged.append(((una + start) & MASK, (una + stop) & MASK))
            merged.sort(key=lambda block: distance(una, block[0]))
            self.sacked = merged[:MAX_SACKED]

    def _sacked_octets(self) -> int:
        return sum(distance(begin, end) for begin, end in self.sacked)

    def holes(self, count: int) -> list[tuple[int, int]]:
        """In recovery: up to `count` ranges `(seq, length <= mss)` to send again now, marked as sent again."""
        ranges: list[tuple[int, int]] = []
        una = self.una
        at = max(distance(una, self.resend_from), 0)
        blocks = [(distance(una, begin), distance(una, end)) for begin, end in self.sacked]
        limit = blocks[-1][0] if blocks else min(self.mss, self.flight())
        while len(ranges) < count and at < limit:
            for start, stop in blocks:
                if start <= at < stop:
                    at = stop
                    break
            else:
                following = min((start for start, _stop in blocks if start > at), default=limit)
                length = min(self.mss, following - at, limit - at)
                if length <= 0:
                    break
                ranges.append(((una + at) & MASK, length))
                at += length
        self.resend_from = (una + at) & MASK
        return ranges

    def backed_off(self) -> float:
        """A timer fired: double the time-out, and return it in seconds."""
        self.simple = False
        return self.rtt.expired()

    def timed_out(self, now: float) -> None:
        """The retransmission timer fired: go back to SND.UNA (RFC 6298 5.4 to 5.6, RFC 5681 3.1)."""
        self.ssthresh = max(self.flight() >> 1, 2 * self.mss)
        self.cwnd = self.mss
        self.nxt = self.una
        self.recover = None
        self.sacked = []
        self.dupacks = 0
        self.timed_at = 0.0
        self.rto_at = now + self.backed_off()
