"""The last queries, for people. HOT PATH: `add`, once per query; what it keeps is made readable only when somebody asks."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, Final, NamedTuple

from dns import codec
from dns.rules import text_name

MAX_QUERIES: Final = 256

RCODES: Final = {
    codec.NOERROR: "NOERROR",
    codec.FORMERR: "FORMERR",
    codec.SERVFAIL: "SERVFAIL",
    codec.NXDOMAIN: "NXDOMAIN",
    codec.NOTIMP: "NOTIMP",
    codec.REFUSED: "REFUSED",
}
QTYPES: Final = {
    1: "A", 2: "NS", 5: "CNAME", 6: "SOA", 12: "PTR", 13: "HINFO", 15: "MX", 16: "TXT", 28: "AAAA", 33: "SRV", 35: "NAPTR",
    39: "DNAME", 43: "DS", 46: "RRSIG", 47: "NSEC", 48: "DNSKEY", 52: "TLSA", 64: "SVCB", 65: "HTTPS", 99: "SPF",
    251: "IXFR", 252: "AXFR", 255: "ANY", 257: "CAA",
}  # fmt: skip


def rcode_name(code: int) -> str:
    return RCODES.get(code, f"RCODE{code}")


def qtype_name(qtype: int) -> str:
    """`AAAA`; `TYPE65280` of one without a name here (RFC 3597 5)."""
    return QTYPES.get(qtype, f"TYPE{qtype}")


def qtype_of(text: str) -> int | None:
    """The inverse of `qtype_name`, in any case; `None` for what is no type."""
    text = text.upper()
    digits = text.removeprefix("TYPE")
    if digits != text and digits.isascii() and digits.isdigit() and len(digits) < 6 and int(digits) < 1 << 16:
        return int(digits)
    return next((number for number, name in QTYPES.items() if name == text), None)


class Entry(NamedTuple):
    """One answered query."""

    at: float
    """On the server's clock, when it was answered."""
    took_s: float
    guest: object
    question: bytes
    """Name, type and class as asked; empty where it could not be read."""
    stream: bool
    by: str
    """Who answered: a source of our own, `cache`, a server, or `nobody`."""
    code: int
    answers: int
    octets: int


class QueryLog:
    """The last `MAX_QUERIES` queries of one server."""

    def __init__(self, limit: int = MAX_QUERIES) -> None:
        self._entries: deque[tuple[Any, ...]] = deque(maxlen=limit)
        self.add = self._entries.append
        """Takes the fields of an `Entry` as a tuple."""

    def __len__(self) -> int:
        return len(self._entries)

    def documents(self, now: float) -> list[dict[str, Any]]:
        """The queries, the last first, as JSON's values; `now` is on the same clock."""
        wall = time.time() - now
        return [_document(Entry(*entry), wall) for entry in reversed(tuple(self._entries))]


def _document(entry: Entry, wall: float) -> dict[str, Any]:
    readable = len(entry.question) > 4
    return {
        "time": round(wall + entry.at, 6),
        "guest": str(entry.guest),
        "name": text_name(entry.question[:-4]) if readable else "",
        "type": qtype_name(int.from_bytes(entry.question[-4:-2], "big")) if readable else "",
        "over": "tcp" if entry.stream else "udp",
        "by": entry.by,
        "rcode": rcode_name(entry.code),
        "answers": entry.answers,
        "octets": entry.octets,
        "took_ms": round(entry.took_s * 1000, 3),
    }
