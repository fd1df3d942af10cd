"""A bad wire around a good link, for tests: loss, duplicates, delay, reordering and flipped bits (threats F23).

Decisions come from the `rng` that is handed in and time from `clock`, so a run is repeated by its seed and lasts no longer
than its arithmetic. Frames that are late wait here; `deadline` says when the next is due, then `receive` and `flush` pass it
on. Use it on links with complete checksums: where the checksum is left to the peer, a flipped bit is nobody's to find.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Sequence
from dataclasses import dataclass

from netstack.api import Clock, Frame, Link
from netstack.link.common import Wrapper


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Probabilities from 0 to 1 for each frame, and seconds."""

    loss: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    """Held back `reorder_s` longer than its neighbours."""
    corrupt: float = 0.0
    """One bit flipped, anywhere in the Ethernet frame."""
    delay_s: float = 0.0
    jitter_s: float = 0.0
    """Up to so much more delay, which by itself reorders nothing."""
    reorder_s: float = 0.01


class _Wire:
    """One direction: what is on its way."""

    def __init__(self, faults: Faults, rng: random.Random, headroom: int) -> None:
        self._faults = faults
        self._rng = rng
        self._headroom = headroom
        self._late: list[tuple[float, int, bytes]] = []
        self._count = 0
        self._last_due = 0.0

    def put(self, frame: bytes, now: float) -> None:
        faults, chance = self._faults, self._rng.random
        if chance() < faults.loss:
            return
        for _ in range(2 if chance() < faults.duplicate else 1):
            octets = self._flip(frame) if chance() < faults.corrupt else frame
            due = now + faults.delay_s + faults.jitter_s * chance()
            if chance() < faults.reorder:
                due += faults.reorder_s
            else:
                due = self._last_due = max(due, self._last_due)
            self._count += 1
            heapq.heappush(self._late, (due, self._count, octets))

    def _flip(self, frame: bytes) -> bytes:
        damaged = bytearray(frame)
        damaged[self._rng.randrange(self._headroom, len(frame))] ^= 1 << self._rng.randrange(8)
        return bytes(damaged)

    def take(self, now: float) -> list[bytes]:
        frames: list[bytes] = []
        while self._late and self._late[0][0] <= now:
            frames.append(heapq.heappop(self._late)[2])
        return frames

    def give_back(self, frames: list[bytes], now: float) -> None:
        """The peer did not take these: they are due at once, before all others of the same time."""
        for place, frame in enumerate(frames):
            heapq.heappush(self._late, (min(now, self._last_due), place - len(frames) - self._count, frame))

    @property
    def due(self) -> float | None:
        return self._late[0][0] if self._late else None


class FaultyLink(Wrapper):
    """`Link` with `outbound` faults for what the guest sends and `inbound` ones for what it is sent."""

    def __init__(self, inner: Link, *, outbound: Faults, inbound: Faults, rng: random.Random, clock: Clock) -> None:
        super().__init__(inner)
        self._clock = clock
        self._from_guest = _Wire(outbound, rng, inner.headroom)
        self._to_guest = _Wire(inbound, rng, inner.headroom)

    def deadline(self) -> float | None:
        """When `receive` and `flush` are next wanted although nothing is readable; seconds on `clock`."""
        times = [time for time in (self._from_guest.due, self._to_guest.due) if time is not None]
        return min(times, default=None)

    def receive(self) -> Sequence[memoryview]:
        """As the inner link's, without the frames that were lost and with those whose delay is over."""
        now = self._clock()
        for frame in self.inner.receive():
            self._from_guest.put(bytes(frame), now)
        return [memoryview(frame) for frame in self._from_guest.take(now)]

    def send(self, frames: Sequence[Frame]) -> int:
        """Takes all frames; what the peer does not take waits here."""
        now = self._clock()
        for frame in frames:
            self._to_guest.put(b"".join(frame), now)
        self.flush()
        return len(frames)

    def flush(self) -> bool:
        """Pass on what is due; False while the peer does not take it."""
        if not self.inner.flush():
            return False
        now = self._clock()
        due = self._to_guest.take(now)
        taken = self.inner.send([(frame,) for frame in due]) if due else 0
        if taken < len(due):
            self._to_guest.give_back(due[taken:], now)
            return False
        return True
