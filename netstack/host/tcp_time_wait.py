"""What is left of a closed connection: enough to answer a repeated FIN (RFC 9293 3.6.1), and nothing else.

Bound: `LIMIT` notes, oldest first out (`evicted` counts them). The wait is short, since the link is one
hop.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Final

LIMIT: Final = 8192


@dataclass(slots=True)
class Note:
    """Numbers to answer with, until when (seconds)."""

    seq: int
    ack: int
    window: int
    until: float


class TimeWait:
    """Notes by the 12 octets of the guest's segments."""

    def __init__(self) -> None:
        self._notes: OrderedDict[bytes, Note] = OrderedDict()  # a dict's front gets slow to find
        self.evicted = 0

    def get(self, key: bytes, now: float) -> Note | None:
        note = self._notes.get(key)
        return note if note is not None and now < note.until else None

    def add(self, key: bytes, note: Note) -> None:
        notes = self._notes
        notes.pop(key, None)
        if len(notes) >= LIMIT:
            notes.popitem(last=False)
            self.evicted += 1
        notes[key] = note

    def remove(self, key: bytes) -> None:
        """A new connection takes the place."""
        self._notes.pop(key, None)

    def deadline(self) -> float | None:
        """When `expire` has something to do; a second more than needed lets many go at once."""
        for note in self._notes.values():
            return note.until + 1.0
        return None

    def expire(self, now: float) -> None:
        """Let old notes go; they are in order of time."""
        notes = self._notes
        while notes:
            key, note = next(iter(notes.items()))
            if note.until > now:
                break
            del notes[key]

    def clear(self) -> None:
        self._notes.clear()
