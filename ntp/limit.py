"""How often one guest is answered: a bucket per address, as many as `MAX_GUESTS`; who asked longest ago goes first.

An evicted guest starts with a full bucket, so whoever makes up more addresses than that is not limited; what an answer costs, a
frame to anywhere else costs too.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

RATE_PER_S: Final = 100.0
"""Answers per second and address in the long run: chrony's shortest interval in a LAN is 1/64 s."""
BURST: Final = 200
"""Answers at once: a hundred containers behind one guest's address that all start."""
KISS_S: Final = 1.0
"""Seconds from one kiss-o'-death to the next for the same address."""
MAX_GUESTS: Final = 1024


class Verdict(enum.Enum):
    ANSWER = enum.auto()
    KISS = enum.auto()
    """Tell it to ask less often (RFC 5905 7.4)."""
    DROP = enum.auto()


@dataclass(slots=True)
class _Guest:
    answers: float
    """That it may have at once, as of `at`."""
    at: float
    kiss_at: float
    """No kiss before."""


class RateLimit:
    """Without I/O and clock; `now` is seconds on a clock that never goes back."""

    def __init__(self, *, max_guests: int = MAX_GUESTS) -> None:
        self._max_guests = max_guests
        self._guests: OrderedDict[bytes, _Guest] = OrderedDict()
        self.forgotten = 0
        """Guests that gave way to others."""

    def __len__(self) -> int:
        return len(self._guests)

    def asked(self, address: bytes, now: float) -> Verdict:
        """A guest asks."""
        guest = self._guests.get(address)
        if guest is None:
            if len(self._guests) >= self._max_guests:
                self._guests.popitem(last=False)
                self.forgotten += 1
            guest = self._guests[address] = _Guest(BURST, now, now)
        else:
            self._guests.move_to_end(address)
        guest.answers = min(guest.answers + (now - guest.at) * RATE_PER_S, BURST)
        guest.at = now
        if guest.answers >= 1:
            guest.answers -= 1
            return Verdict.ANSWER
        if now < guest.kiss_at:
            return Verdict.DROP
        guest.kiss_at = now + KISS_S
        return Verdict.KISS
