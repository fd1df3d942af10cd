"""Reassembly of IPv4 datagrams (RFC 791 3.2, RFC 1122 3.3.2), without I/O or clock.

The interface hands every fragment to `Reassembler.add` and gets the whole packet back with the fragment that completes it.
Datagrams are told apart by source, destination, identification and protocol. A datagram has `timeout_s` from its first
fragment on, whatever follows; so the order in which datagrams began is the order in which they expire and, when a limit
is reached, the order in which they are given up.

The pieces of a datagram are kept sorted by offset, so each new one is compared with its two neighbours only. Pieces that
overlap could show a filter in front of us one datagram and us another (teardrop, RFC 1858, RFC 5722): then the datagram is
*condemned*: its pieces are let go at once, and what remains is the key until the time is over, so that its later
fragments cannot start anew. Only an exact repetition is harmless, for networks do duplicate.

Whatever a guest sends, what is held is bounded: `max_datagrams`, and `max_octets` in which each piece counts with what
Python needs to keep it, so that 8-octet fragments do not cost twelve times what was allowed.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from netstack.observe.metrics import Counters, Drop
from netstack.wire import checksum
from netstack.wire.ipv4 import MAX_TOTAL_LENGTH, Header

PIECE_OVERHEAD: Final = 96
"""Octets that a piece costs besides its payload: a bytes object, an int, and two places in lists (CPython, 64 bit)."""


class _Datagram:
    """Pieces of one datagram: `pieces[i]` begins at `starts[i]`; they never overlap, so their lengths add up."""

    __slots__ = ("condemned", "cost", "deadline", "end", "first_header", "held", "pieces", "starts")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.starts: list[int] = []
        self.pieces: list[bytes] = []
        self.held = 0
        self.end: int | None = None
        """Length of the whole payload, known from the fragment without MF."""
        self.first_header = b""
        """The IP header that came with offset 0: the one the whole packet gets."""
        self.cost = 0
        self.condemned = False


class Reassembler:
    """Fragments in, packets out. Drops are counted per reason in `counters`.

    `timeout_s` is seconds; RFC 1122 3.3.2 asks for 60 to 120 and the same for all; Linux, and we, take 30.
    """

    def __init__(self, max_datagrams: int, max_octets: int, timeout_s: float, counters: Counters) -> None:
        self._max_datagrams = max_datagrams
        self._max_octets = max_octets
        self._timeout_s = timeout_s
        self._counters = counters
        self._datagrams: dict[bytes, _Datagram] = {}  # oldest first
        self._octets = 0

    def __len__(self) -> int:
        """Datagrams held, condemned ones included."""
        return len(self._datagrams)

    @property
    def octets(self) -> int:
        """What is held, as compared with `max_octets`."""
        return self._octets

    def add(self, header: Header, packet: memoryview, now: float) -> bytes | None:
        """Take a fragment; return the reassembled IPv4 packet once it is whole.

        `header` is the parsed header of `packet`, which may have padding behind its total length; what is kept is
        copied. The packet returned has the first fragment's header, with length, flags (DF, MF and offset 0) and checksum
        made right.
        """
        drops = self._counters.drops
        start = header.offset
        length = header.total_length - header.header_length
        end = start + length
        if (
            length <= 0
            or (header.more_fragments and length & 7)
            or header.header_length + end > MAX_TOTAL_LENGTH  # the ping of death
        ):
            drops[Drop.FRAGMENT_INVALID] += 1
            return None

        identification = header.identification.to_bytes(2, "big")
        key = header.source + header.destination + identification + bytes((header.protocol,))
        datagram = self._datagrams.get(key)
        if datagram is None:
            if len(self._datagrams) >= self._max_datagrams:
                self._give_up_oldest()
            datagram = self._datagrams[key] = _Datagram(now + self._timeout_s)
        elif datagram.condemned:
            drops[Drop.FRAGMENT_OVERLAP] += 1
            return None

        piece = bytes(packet[header.header_length : header.total_length])
        starts, pieces = datagram.starts, datagram.pieces
        at = bisect_left(starts, start)
        if at < len(starts) and starts[at] == start and pieces[at] == piece:
            last = datagram.end == end
            if last != header.more_fragments:
                return None  # an exact repetition
        if (at < len(starts) and starts[at] < end) or (at and starts[at - 1] + len(pieces[at - 1]) > start):
            self._condemn(datagram, Drop.FRAGMENT_OVERLAP)
            return None
        if header.more_fragments:
            contradicts = datagram.end is not None and end >= datagram.end
        else:
            contradicts = datagram.end is not None or at < len(starts)
        if contradicts:  # two ends, or a piece behind the end
            self._condemn(datagram, Drop.FRAGMENT_INVALID)
            return None

        cost = length + PIECE_OVERHEAD
        while self._octets + cost > self._max_octets:
            if self._give_up_oldest() is datagram:
                return None
        starts.insert(at, start)
        pieces.insert(at, piece)
        datagram.held += length
        datagram.cost += cost
        self._octets += cost
        if not start:
            datagram.first_header = bytes(packet[: header.header_length])
        if not header.more_fragments:
            datagram.end = end
        if datagram.held != datagram.end:
            return None

        self._forget(key)
        whole = _whole(datagram.first_header, pieces)
        if whole is None:
            drops[Drop.FRAGMENT_INVALID] += 1
        else:
            self._counters.fragments_reassembled += 1
        return whole

    def expire(self, now: float) -> list[bytes]:
        """Let go of the datagrams whose time is over.

        Returns the first fragments (whole IP packets) of those that held one: about these, and only these, the sender
        is told "fragment reassembly time exceeded" (RFC 792).
        """
        first_fragments = []
        while self._datagrams:
            key, datagram = next(iter(self._datagrams.items()))
            if datagram.deadline > now:
                break
            self._forget(key)
            if datagram.condemned:
                continue
            self._counters.drops[Drop.FRAGMENT_TIMEOUT] += 1
            if datagram.first_header:
                first_fragments.append(datagram.first_header + datagram.pieces[0])
        return first_fragments

    def deadline(self) -> float | None:
        """When `expire` is next wanted."""
        for datagram in self._datagrams.values():
            return datagram.deadline
        return None

    def _forget(self, key: bytes) -> _Datagram:
        datagram = self._datagrams.pop(key)
        self._octets -= datagram.cost
        return datagram

    def _give_up_oldest(self) -> _Datagram:
        datagram = self._forget(next(iter(self._datagrams)))
        if not datagram.condemned:
            self._counters.drops[Drop.FRAGMENT_LIMIT] += 1
        return datagram

    def _condemn(self, datagram: _Datagram, reason: Drop) -> None:
        self._counters.drops[reason] += 1
        self._octets -= datagram.cost
        datagram.cost = 0
        datagram.condemned = True
        datagram.starts, datagram.pieces = [], []
        datagram.first_header = b""


def _whole(first_header: bytes, pieces: list[bytes]) -> bytes | None:
    """Header and payload as one packet; `None` when the first header's options make it longer than a packet can be."""
    total_length = len(first_header) + sum(map(len, pieces))
    if total_length > MAX_TOTAL_LENGTH:
        return None
    header = bytearray(first_header)
    header[2:4] = total_length.to_bytes(2, "big")
    header[6:8] = header[10:12] = bytes(2)
    header[10:12] = checksum.internet(header).to_bytes(2, "big")
    return b"".join((header, *pieces))
