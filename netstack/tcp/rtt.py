"""Round-trip time and retransmission time-out (RFC 6298)."""

from __future__ import annotations

from typing import Final

INITIAL_RTO_S: Final = 1.0  # RFC 6298 (2.1)
MIN_RTO_S: Final = 0.2  # RFC 6298 (2.4) says 1 s; Linux uses 200 ms, and the guest is one hop away
SAMPLE_S: Final = 0.01
MAX_RTO_S: Final = 60.0  # RFC 6298 (2.5) "at least 60 seconds"


class Rtt:
    """SRTT, RTTVAR and RTO in seconds; `backoff` doublings since the last good sample."""

    __slots__ = ("again_at", "backoff", "rto", "rttvar", "srtt")

    def __init__(self) -> None:
        self.srtt = 0.0
        self.rttvar = 0.0
        self.rto = INITIAL_RTO_S
        self.backoff = 0
        self.again_at = 0.0
        """When the next measurement may begin: many per round trip say no more than one (RFC 6298 section 3)."""

    def sample(self, rtt_s: float, now: float) -> None:
        """A measurement of a segment sent once only (Karn)."""
        self.again_at = now + SAMPLE_S
        if self.srtt == 0.0:
            self.srtt = rtt_s
            self.rttvar = rtt_s / 2
        else:
            self.rttvar = 0.75 * self.rttvar + 0.25 * abs(self.srtt - rtt_s)
            self.srtt = 0.875 * self.srtt + 0.125 * rtt_s
        self.rto = min(max(self.srtt + 4 * self.rttvar, MIN_RTO_S), MAX_RTO_S)
        self.backoff = 0

    def expired(self) -> float:
        """Double the time-out (RFC 6298 5.5) and return it."""
        self.backoff += 1
        return self.current()

    def current(self) -> float:
        """RTO with the back-off applied."""
        return float(min(self.rto * (1 << min(self.backoff, 10)), MAX_RTO_S))
