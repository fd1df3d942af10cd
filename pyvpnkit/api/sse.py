"""Events for any number of readers, as server-sent events (WHATWG HTML, section 9.2).

    EventBus --> EventHub: a ring of the last `RING`, for those who come back with `Last-Event-ID`
                    |----> Feed of each reader: at most `QUEUE` wait; of a slow reader's the oldest go, and it is told how many

Ids are `EPOCH-NUMBER`; the epoch is another one after each restart, so a reader that comes back then is told that what
happened in between is lost. The events of single flows are made only while somebody reads them.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from netstack.observe import events
from netstack.observe.events import FLOW_EVENTS, Event, EventBus, as_dict

RING: Final = 1024
QUEUE: Final = 1024
MAX_FEEDS: Final = 32

TYPES: Final = tuple(
    sorted(
        name
        for name, one in vars(events).items()
        if isinstance(one, type) and issubclass(one, Event) and one is not Event
    )
)
"""Names of all events there are."""
_FLOW_TYPES: Final = frozenset(one.__name__ for one in FLOW_EVENTS)
LAST_EVENT_ID: Final = re.compile(r"([0-9a-f]{8})-(\d{1,15})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Recorded:
    """One event, ready to send."""

    number: int
    type: str
    octets: bytes


class Feed:
    """What waits for one reader; made by `EventHub.open`."""

    def __init__(self, types: frozenset[str], wake: Callable[[], None]) -> None:
        self.types = types
        self.lost: int | None = 0
        """Events that this reader missed since `take`; `None` when nobody knows how many."""
        self._waiting: deque[Recorded] = deque()
        self._wake = wake

    def offer(self, one: Recorded) -> None:
        """An event, which is kept if it is of the types wanted."""
        if one.type not in self.types:
            return
        if len(self._waiting) >= QUEUE:
            self._waiting.popleft()
            if self.lost is not None:
                self.lost += 1
        self._waiting.append(one)
        self._wake()

    def take(self) -> Iterator[bytes]:
        """What waits, in pieces to write one by one; first of all what was lost."""
        while self.lost != 0 or self._waiting:
            if self.lost != 0:
                lost, self.lost = self.lost, 0
                yield b'event: lost\ndata: {"lost": %s}\n\n' % (b"null" if lost is None else b"%d" % lost)
            else:
                yield self._waiting.popleft().octets


class EventHub:
    """Subscribes to `bus` once for all readers; `close` ends that. `clock` is the clock of the events."""

    def __init__(self, bus: EventBus, clock: Callable[[], float]) -> None:
        self.epoch = secrets.token_hex(4)
        self.lost = 0
        """Events that readers missed, all in all."""
        self._bus = bus
        self._clock = clock
        self._number = 0
        self._ring: deque[Recorded] = deque(maxlen=RING)
        self._feeds: set[Feed] = set()
        self._closed = False
        self._unsubscribe = bus.subscribe(self._event, flows=False)

    def __len__(self) -> int:
        return len(self._feeds)

    def close(self) -> None:
        """No more events; feeds that are open stay empty."""
        self._closed = True
        self._unsubscribe()

    def open(self, types: frozenset[str], wake: Callable[[], None], last_id: str = "") -> Feed:
        """A reader of `types` (all when empty), told by `wake` that something waits; `last_id` is the last it has seen.

        A `last_id` of another epoch, or none of ours, gives all there is in the ring, after `lost: null`.
        """
        feed = Feed(types or frozenset(TYPES), wake)
        if last_id:
            self._replay(feed, last_id)
        self._feeds.add(feed)
        self._subscribe()
        return feed

    def shut(self, feed: Feed) -> None:
        """The reader is gone; harmless when repeated."""
        self._feeds.discard(feed)
        self._subscribe()

    def _replay(self, feed: Feed, last_id: str) -> None:
        match = LAST_EVENT_ID.fullmatch(last_id)
        seen = int(match[2]) if match is not None and match[1] == self.epoch else None
        if seen is None:
            feed.lost, seen = None, 0
        elif self._ring:
            feed.lost = max(0, self._ring[0].number - seen - 1)
        for one in self._ring:
            if one.number > seen:
                feed.offer(one)

    def _subscribe(self) -> None:
        if self._closed:
            return
        flows = any(feed.types & _FLOW_TYPES for feed in self._feeds)
        self._bus.subscribe(self._event, flows=flows)

    def _event(self, event: Event) -> None:
        self._number += 1
        fields = as_dict(event)
        fields["time"] = round(time.time() - self._clock() + event.time, 6)
        head = f"id: {self.epoch}-{self._number}\nevent: {event.name}\ndata: "
        one = Recorded(self._number, event.name, (head + json.dumps(fields) + "\n\n").encode())
        self._ring.append(one)
        for feed in self._feeds:
            before = feed.lost
            feed.offer(one)
            if feed.lost != before:
                self.lost += 1
