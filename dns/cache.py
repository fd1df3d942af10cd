"""Answers of the host's resolvers, for as long as they allow (RFC 1035 7.4, RFC 2181 5.2, RFC 2308). HOT PATH: once per query.

An entry is a whole message as it came, under the question and all that makes another answer: RD, AD, CD, and of EDNS the version
and DO. A query with EDNS options (cookies, client subnet) or with records of its own is for its server alone and has no key.
So a message is found with one `dict` access, and leaves with the id of the query, its question in the asker's letters, times to
live that have gone down, and AA cleared: what is remembered is not authoritative.

Kept are answers with records, as long as their shortest time to live, and denials (no such name, no such records) with an SOA
record, as long as that and its minimum say (RFC 2308 5). Nothing else: no truncated message, no failure, nothing that cannot
be read. Most answers are never asked for again, so an answer is looked into when somebody does, and may turn out not to hold.
At most `MAX_QUESTIONS` (spec vpnkit 4.4) and `MAX_OCTETS`; what was not used for longest goes first.

No I/O and no clock: the caller says what time it is, and empties the cache whenever another server may answer for a name.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Final, TypeAlias

from dns import codec
from netstack.errors import Malformed

MAX_QUESTIONS: Final = 1024
MAX_OCTETS: Final = 4 << 20
MAX_TTL_S: Final = 3600
"""Longer promises are cut: the resolvers behind are asked again once an hour, which costs nothing."""
MAX_NEGATIVE_S: Final = 300  # RFC 2308 5 wants a limit; names of a VPN come to be, so a shorter one than its hours
SOA: Final = 6

_OVERHEAD: Final = 400
"""About what an entry costs besides its octets."""
_ttl = struct.Struct("!I")
_rr = struct.Struct("!HHIH")
_KEPT: Final = (codec.NOERROR, codec.NXDOMAIN)
_PLAIN: Final = bytes(6)
_EDNS: Final = b"\0\0\0\0\0\1"


def key(query: bytes, end: int) -> bytes | None:
    """Under what an answer to `query`, whose question ends at `end`, is kept; `None` when for nobody else."""
    records = query[6:12]
    if records == _PLAIN and len(query) == end:
        more = b""
    elif records == _EDNS and len(query) == end + 11 and query[end : end + 3] == b"\0\0\x29" and query[-2:] == b"\0\0":
        more = query[end + 5 : end + 9]  # extended code, version, flags
    else:
        return None
    # RD; AD and CD; the name in lower case; type and class.
    return bytes((query[2] & 1, query[3] & 0x30)) + query[codec.HEADER : end - 4].lower() + query[end - 4 : end] + more


def patched(query: bytes, end: int, answer: bytes) -> bytes:
    """`answer` to a query that differs in its id and in the case of letters alone, as one to `query`."""
    return query[:2] + answer[2 : codec.HEADER] + query[codec.HEADER : end] + answer[end:]


class _Entry:
    """An answer that was looked into, because somebody asked for it again."""

    __slots__ = ("by", "head", "kept_at", "octets", "patched_s", "tail", "ttls", "until")

    def __init__(self, answer: bytes, end: int, kept_at: float, by: str) -> None:
        self.by = by
        self.kept_at = kept_at
        self.head = bytes((answer[2] & 0xFB,)) + answer[3 : codec.HEADER]  # flags without AA, and counts
        self.tail = answer[end:]  # what follows the question
        self.patched_s = 0
        self.octets = len(answer)
        denial = answer[3] & 0x0F == codec.NXDOMAIN or not (answer[6] or answer[7])
        try:
            self.ttls, life_s = _times(answer, end, denial)
        except Malformed:
            self.ttls, life_s = [], 0
        self.until = kept_at + life_s


_Raw: TypeAlias = tuple[bytes, int, float, str]
"""An answer as it came, the end of its question, when, and from whom: most are never asked for again, and are not looked into."""


class Cache:
    """The answers of one forwarder. `now` is seconds on any clock that never goes back."""

    def __init__(self, max_questions: int = MAX_QUESTIONS, max_octets: int = MAX_OCTETS) -> None:
        self._max_questions = max_questions
        self._max_octets = max_octets
        self._entries: OrderedDict[bytes, _Raw | _Entry] = OrderedDict()
        self.octets = 0
        self.evicted = 0
        self.flushes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def flush(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.octets = 0
        self.flushes += 1

    def _entry(self, key: bytes, now: float) -> _Entry | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        if not isinstance(entry, _Entry):
            entry = self._entries[key] = _Entry(*entry)
        if now >= entry.until:
            self.octets -= entry.octets + _OVERHEAD
            del self._entries[key]
            return None
        return entry

    def find(self, key: bytes, query: bytes, end: int, now: float) -> bytes | None:
        """The answer to `query` if there is one that still holds."""
        if key not in self._entries or (entry := self._entry(key, now)) is None:
            return None
        self._entries.move_to_end(key)
        age_s = int(now - entry.kept_at)
        if age_s != entry.patched_s:
            tail = bytearray(entry.tail)
            for at, ttl_s in entry.ttls:
                _ttl.pack_into(tail, at, max(0, ttl_s - age_s))
            entry.tail = bytes(tail)
            entry.patched_s = age_s
        return query[:2] + entry.head + query[codec.HEADER : end] + entry.tail

    def look(self, key: bytes, now: float) -> tuple[str, float, float] | None:
        """Who gave the answer under `key`, its age and the seconds it has left; without using it."""
        entry = self._entry(key, now)
        return None if entry is None else (entry.by, now - entry.kept_at, entry.until - now)

    def keep(self, key: bytes, end: int, answer: bytes, now: float, by: str) -> None:
        """Take in `answer`, whose question ends at `end`, if it may be kept; `by` is who gave it."""
        if answer[2] & codec.TC or answer[3] & 0x0F not in _KEPT:
            return
        entries = self._entries
        if key in entries:
            self._remove(key)
        entries[key] = answer, end, now, by
        self.octets += len(answer) + _OVERHEAD
        while len(entries) > self._max_questions or self.octets > self._max_octets:
            self._remove(next(iter(entries)))
            self.evicted += 1

    def _remove(self, key: bytes) -> None:
        entry = self._entries.pop(key)
        self.octets -= (entry.octets if isinstance(entry, _Entry) else len(entry[0])) + _OVERHEAD


def _times(answer: bytes, end: int, denial: bool) -> tuple[list[tuple[int, int]], int]:
    """Where times to live are, counted from `end`, with their values; and how many seconds the message may be kept."""
    ttls: list[tuple[int, int]] = []
    life_s = MAX_NEGATIVE_S if denial else MAX_TTL_S
    may = not denial
    after = end
    for _start, owner, after in codec.records(answer, end):
        rtype, _class, ttl_s, rdlength = _rr.unpack_from(answer, owner)
        if rtype == codec.OPT:
            if answer[owner + 4]:  # an extended code such as BADVERS
                return [], 0
            continue
        if ttl_s >= 1 << 31:  # RFC 2181 8
            ttl_s = 0
        ttls.append((owner + 4 - end, ttl_s))
        if denial and rtype == SOA and rdlength >= 20:
            may = True
            life_s = min(life_s, _ttl.unpack_from(answer, after - 4)[0])
        life_s = min(life_s, ttl_s)
    return (ttls, life_s) if may and after == len(answer) else ([], 0)
