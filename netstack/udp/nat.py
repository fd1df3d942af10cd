"""Who spoke when: the table of UDP mappings (RFC 4787), of the peers of a published port, and of pings. No I/O, no clock.

An entry is opened for a key the caller chooses (a guest's source address and port: endpoint-independent mapping, RFC 4787
REQ-1) and belongs to a group (the guest) whose size is bounded. The caller writes `sent` and `heard` as packets pass; both
directions keep the entry alive (REQ-6). Nothing else happens per packet: the table holds one heap position per entry, made
for the earliest time the entry could be over, and looks at the entry only then. If it was used since, it gets a new
position; so an entry costs O(log n) once per idle time, and the stack needs one timer.

Idle times: `idle_s` (VPNKit 60 s, RFC 4787 REQ-5 at least 120 s, we 90 s as gvproxy). An entry that only ever spoke to
`brief_ports` (DNS, NTP: one question, one answer) is over `short_s` after the answer; gvproxy without that rule ran out of
descriptors (its issue 622).

Full: opening one more in a full group first evicts those of that group idle longest, a sixteenth at once, so that a port
scan pays one search per batch and not per packet; a mapping in use survives as long as idler ones exist.

Example: the guest asks 1.1.1.1:53 from port 4000 (`open`, `spoke`), is answered at once (`heard = now`), and 5 s later
`expire` hands the entry back for its socket to be closed. Had it spoken to 8.8.8.8:3478 as well, that would be 90 s.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Final, Generic, TypeVar

Owner = TypeVar("Owner")

BRIEF_PORTS: Final = frozenset((53, 123))


class Entry(Generic[Owner]):
    """One mapping. `sent` and `heard` are when the guest and the other side last spoke (`heard` before `sent`: no answer
    yet); the caller writes them and the octet counts.
    """

    __slots__ = (
        "brief",
        "closed",
        "group",
        "heard",
        "idle_s",
        "key",
        "octets_inbound",
        "octets_outbound",
        "opened",
        "owner",
        "sent",
        "short_s",
    )

    def __init__(self, key: bytes, group: Hashable, owner: Owner, now: float, idle_s: float, short_s: float) -> None:
        self.key = key
        self.group = group
        self.owner = owner
        self.opened = now
        self.sent = now
        self.heard = float("-inf")
        self.idle_s = idle_s
        self.short_s = short_s
        self.brief = short_s < idle_s
        self.closed = False
        self.octets_outbound = 0
        self.octets_inbound = 0

    @property
    def used(self) -> float:
        """When either side last spoke."""
        return self.sent if self.sent > self.heard else self.heard

    @property
    def answered(self) -> bool:
        """Whether the other side ever spoke."""
        return self.heard != float("-inf")

    def expires(self) -> float:
        """When the entry is over unless somebody speaks before."""
        if self.brief and self.heard >= self.sent:
            return self.heard + self.short_s
        return self.used + self.idle_s


class Table(Generic[Owner]):
    """Entries by key, bounded per group, with lazy expiry."""

    BATCH: Final = 16
    """One in so many of a full group goes at once (64 of 1024; VPNKit: 256)."""

    def __init__(
        self,
        *,
        limit: int,
        idle_s: float,
        short_s: float | None = None,
        brief_ports: frozenset[int] = BRIEF_PORTS,
    ) -> None:
        """At most `limit` entries per group. `short_s=None`: no entry is brief."""
        self.limit = limit
        self.idle_s = idle_s
        self.short_s = idle_s if short_s is None else min(short_s, idle_s)
        self.brief_ports = brief_ports
        self.opened = 0
        self.evicted = 0
        self.expired = 0
        self._entries: dict[bytes, Entry[Owner]] = {}
        self._groups: dict[Hashable, dict[bytes, Entry[Owner]]] = {}
        self._heap: list[tuple[float, int, Entry[Owner]]] = []
        self._order = 0
        self.get = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry[Owner]]:
        return iter(tuple(self._entries.values()))

    def group(self, group: Hashable) -> list[Entry[Owner]]:
        """The entries of one group, oldest first."""
        return list(self._groups.get(group, {}).values())

    def make_room(self, group: Hashable) -> list[Entry[Owner]]:
        """Evict from `group` if it is full; the evicted entries, idle longest first. Call before `open`."""
        if len(self._groups.get(group, ())) < self.limit:
            return []
        return self.evict(group, max(1, self.limit // self.BATCH))

    def evict(self, group: Hashable | None, count: int) -> list[Entry[Owner]]:
        """Take out the `count` entries of `group` (None: of all) idle longest and return them."""
        candidates = self._entries if group is None else self._groups.get(group, {})
        gone = heapq.nsmallest(count, candidates.values(), key=lambda entry: entry.used)
        for entry in gone:
            self.close(entry)
        self.evicted += len(gone)
        return gone

    def open(self, key: bytes, group: Hashable, owner: Owner, now: float) -> Entry[Owner]:
        """A new entry for `key`, which must not have one."""
        entry = Entry(key, group, owner, now, self.idle_s, self.short_s)
        self._entries[key] = entry
        self._groups.setdefault(group, {})[key] = entry
        self.opened += 1
        self._push(entry, now + (self.short_s if entry.brief else self.idle_s))
        return entry

    def spoke(self, entry: Entry[Owner], port: int) -> None:
        """The guest begins to speak to a remote `port` through `entry`."""
        if port not in self.brief_ports:
            entry.brief = False

    def close(self, entry: Entry[Owner]) -> None:
        """Take `entry` out; harmless when it is out already."""
        if entry.closed:
            return
        entry.closed = True
        del self._entries[entry.key]
        group = self._groups[entry.group]
        del group[entry.key]
        if not group:
            del self._groups[entry.group]

    def expire(self, now: float) -> list[Entry[Owner]]:
        """Take out and return the entries that are over at `now`; harmless when called early."""
        over: list[Entry[Owner]] = []
        heap = self._heap
        while heap and heap[0][0] <= now:
            entry = heapq.heappop(heap)[2]
            if entry.closed:
                continue
            when = entry.expires()
            if when <= now:
                self.close(entry)
                over.append(entry)
            else:
                # An answer makes a brief entry end sooner than now seems, so it is looked at every `short_s`.
                self._push(entry, min(when, now + entry.short_s) if entry.brief else when)
        self.expired += len(over)
        return over

    def deadline(self) -> float | None:
        """When `expire` is next wanted (it may then find nothing); None when there is no entry."""
        heap = self._heap
        while heap and heap[0][2].closed:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def _push(self, entry: Entry[Owner], when: float) -> None:
        heap = self._heap
        if len(heap) > 2 * len(self._entries) + 64:  # left behind by closed entries; rare enough to cost nothing
            heap[:] = [position for position in heap if not position[2].closed]
            heapq.heapify(heap)
        self._order += 1
        heapq.heappush(heap, (when, self._order, entry))
