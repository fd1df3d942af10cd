"""DNS messages (RFC 1035 4.1), only as far as a relay must know them. HOT PATH: once per query.

A relayed message is never taken apart: header fields are read in place, the question is walked once to find its end, and all
that follows stays as it came, so unknown types, EDNS, DNSSEC bits and the case of names survive. Names are kept in wire form;
`key` folds case, so that a look-up is one `dict` access. What we answer ourselves is written here too: the question as asked
and records whose owner is a pointer to it.

Shapes: `message` is the octets of one DNS message without TCP's length prefix; offsets count from its first octet.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final, NamedTuple

from netstack.errors import Malformed

HEADER: Final = 12
MAX_NAME: Final = 255  # RFC 1035 3.1, wire form with the root's octet
MIN_UDP: Final = 512  # RFC 1035 4.2.1; RFC 6891 6.2.3 "values lower than 512 MUST be treated as equal to 512"
OUR_UDP: Final = 1232  # what we advertise in our own answers: fits every MTU that carries IPv6

QUERY: Final = 0
NOERROR: Final = 0
FORMERR: Final = 1
SERVFAIL: Final = 2
NXDOMAIN: Final = 3
NOTIMP: Final = 4
REFUSED: Final = 5

A: Final = 1
PTR: Final = 12
AAAA: Final = 28
OPT: Final = 41
SVCB: Final = 64
HTTPS: Final = 65
IXFR: Final = 251
AXFR: Final = 252
ANY: Final = 255
IN: Final = 1

TC: Final = 0x02
"""Truncation bit within the third octet of a message."""

_header = struct.Struct("!HHHHHH")  # id, flags, and the four counts
_pair = struct.Struct("!HH")  # type and class of a question
_record = struct.Struct("!HHIH")  # type, class, ttl, rdlength after an owner name
_owned = struct.Struct("!HHHIH")  # a compressed owner name and the same
_u16 = struct.Struct("!H")

_QUESTION_NAME: Final = 0xC000 | HEADER
"""A pointer to the name in the question."""


class Record(NamedTuple):
    """A record we answer with; its owner is the name that was asked."""

    rtype: int
    ttl_s: int
    rdata: bytes


class Edns(NamedTuple):
    """The OPT pseudo-record of a query (RFC 6891 6.1)."""

    udp_octets: int
    """Largest UDP answer the sender takes, as it says."""
    version: int
    flags: int
    """0x8000 is DO (RFC 3225)."""


def is_response(message: bytes) -> bool:
    """QR; the message has at least three octets."""
    return message[2] >= 0x80


def opcode(message: bytes) -> int:
    return message[2] >> 3 & 0x0F


def rcode(message: bytes) -> int:
    """The low four bits, in the header."""
    return message[3] & 0x0F


def question_end(message: bytes) -> int:
    """Offset after the one question of a message of at least `HEADER` octets.

    Raises `Malformed` unless QDCOUNT is 1 (RFC 9619) and the name is sound. The first name of a message can refer to
    nothing before it but the header, so a compression pointer here, to itself, forward or into the header, is never right.
    """
    if message[4] or message[5] != 1:
        raise Malformed("dns: not exactly one question")
    at = HEADER
    try:
        while length := message[at]:
            if length > 63:
                raise Malformed("dns: compressed or unknown label in the question")
            at += length + 1
    except IndexError:
        raise Malformed("dns: question cut short") from None
    at += 5  # the root's octet, type and class
    if at > len(message):
        raise Malformed("dns: question cut short")
    if at - 4 - HEADER > MAX_NAME:
        raise Malformed("dns: name longer than 255 octets")
    return at


def question(message: bytes, end: int) -> tuple[int, int]:
    """`(qtype, qclass)` of the question that ends at `end`."""
    qtype, qclass = _pair.unpack_from(message, end - 4)
    return qtype, qclass


def key(message: bytes, end: int) -> bytes:
    """The name asked for, in wire form and lower case (length octets are below the letters and stay as they are)."""
    return message[HEADER : end - 4].lower()


def wire_name(text: str) -> bytes:
    """`b"\\x04host\\x08internal\\x00"` of `host.internal`, lower case; non-ASCII labels become IDNA.

    Raises `Malformed` for an empty or overlong label and an overlong name; `.` and the empty text are the root.
    """
    text = text.rstrip(".").lower()
    wire = bytearray()
    for label in text.split(".") if text else ():
        try:
            octets = label.encode("ascii") if label.isascii() else label.encode("idna")
        except UnicodeError:
            raise Malformed(f"dns: {label!r} cannot be a label") from None
        if not 1 <= len(octets) <= 63:
            raise Malformed(f"dns: a label of {text!r} has {len(octets)} octets; 1 to 63 are allowed")
        wire.append(len(octets))
        wire += octets
    wire.append(0)
    if len(wire) > MAX_NAME:
        raise Malformed(f"dns: {text[:40]!r}... is longer than 255 octets")
    return bytes(wire)


def expand(message: bytes, at: int) -> bytes:
    """The name at `at` without compression, in the case it has. Each pointer must lead further back than where its chain
    began, so none leads in a circle. Raises `Malformed`.
    """
    name = bytearray()
    limit = at
    try:
        while length := message[at]:
            if length >= 0xC0:
                at = (length & 0x3F) << 8 | message[at + 1]
                if not HEADER <= at < limit:
                    raise Malformed("dns: a compression pointer does not lead back")
                limit = at
                continue
            if length > 63:
                raise Malformed("dns: unknown label type")
            name += message[at : at + 1 + length]
            at += 1 + length
            if at > len(message) or len(name) >= MAX_NAME:
                raise Malformed("dns: name cut short or longer than 255 octets")
    except IndexError:
        raise Malformed("dns: name cut short") from None
    return bytes(name) + b"\0"


def _skip_name(message: bytes, at: int) -> int:
    while length := message[at]:
        if length >= 0xC0:
            return at + 2
        if length > 63:
            raise Malformed("dns: unknown label type")
        at += length + 1
    return at + 1


def records(message: bytes, at: int) -> Iterable[tuple[int, int, int]]:
    """`(start, end of owner, end)` of each record the header counts, in order. Raises `Malformed` where one is cut short."""
    counts = _header.unpack_from(message)
    for _ in range(counts[3] + counts[4] + counts[5]):
        start = at
        try:
            owner = _skip_name(message, at)
            at = owner + 10 + _u16.unpack_from(message, owner + 8)[0]
        except (IndexError, struct.error):
            raise Malformed("dns: record cut short") from None
        if at > len(message):
            raise Malformed("dns: record cut short")
        yield start, owner, at


def _opt(message: bytes, end: int) -> tuple[int, int] | None:
    """Start and end of the OPT record, `None` when there is none (or nothing readable)."""
    if not (message[10] or message[11]):
        return None
    try:
        for start, owner, after in records(message, end):
            if owner == start + 1 and message[owner] == 0 and message[owner + 1] == OPT:
                return start, after
    except Malformed:
        pass  # whoever made it has to live with the 512 octets of a message without EDNS
    return None


def edns(message: bytes, end: int) -> Edns | None:
    """What the OPT record says in a message whose question ends at `end`; `None` without one."""
    found = _opt(message, end)
    if found is None:
        return None
    _rtype, udp_octets, ttl, _rdlength = _record.unpack_from(message, found[0] + 1)
    return Edns(udp_octets, ttl >> 16 & 0xFF, ttl & 0xFFFF)


def udp_limit(query: bytes, end: int) -> int:
    """Octets of the largest UDP answer to `query`: 512, or what its OPT record says if that is more."""
    said = edns(query, end)
    return MIN_UDP if said is None else max(MIN_UDP, said.udp_octets)


def failure(query: bytes, code: int, end: int = HEADER) -> bytes:
    """An answer without records. With `end` the question is repeated (and EDNS answered), without it the header stands alone."""
    return answer(query, end, (), code=code, authoritative=False)


def answer(
    query: bytes, end: int, records: Iterable[Record], *, code: int = NOERROR, authoritative: bool = True
) -> bytes:
    """An answer of our own to `query`, whose question ends at `end`: same id, opcode, RD, CD and question; RA set.

    A query with EDNS gets an OPT record back, with its DO bit (RFC 6891 6.1.1, RFC 3225 3).
    """
    octets = bytearray(HEADER)
    octets += query[HEADER:end]
    count = 0
    for rtype, ttl_s, rdata in records:
        octets += _owned.pack(_QUESTION_NAME, rtype, IN, ttl_s, len(rdata))
        octets += rdata
        count += 1
    said = edns(query, end) if end > HEADER else None
    if said is not None:
        octets += b"\0" + _record.pack(OPT, OUR_UDP, said.flags & 0x8000, 0)
    flags = 0x8080 | (query[2] << 8 & 0x7900) | (query[3] & 0x10) | code | (0x0400 if authoritative else 0)
    _header.pack_into(octets, 0, query[0] << 8 | query[1], flags, int(end > HEADER), count, 0, int(said is not None))
    return bytes(octets)


def fit(message: bytes, limit: int) -> bytes:
    """`message` if it has at most `limit` octets, else its leading answers that fit, OPT kept and TC set (RFC 2181 9).

    Pointers only lead back, so a message may be cut after any record. Authority and additional records go first of all:
    what is left tells the asker to come back over TCP.
    """
    if len(message) <= limit:
        return message
    try:
        end = question_end(message)
        opt = _opt(message, end)
        tail = b"" if opt is None or end + opt[1] - opt[0] > limit else message[opt[0] : opt[1]]
        answers = (message[6] << 8) | message[7]
        kept, at = 0, end
        for _start, _owner, after in records(message, end) if answers else ():
            if kept == answers or after + len(tail) > limit:
                break
            kept, at = kept + 1, after
    except Malformed:
        kept, at, tail = 0, HEADER, b""
    octets = bytearray(message[:at])
    octets += tail
    octets[2] |= TC
    struct.pack_into("!HHHH", octets, 4, int(at > HEADER), kept, 0, int(bool(tail)))
    return bytes(octets)
