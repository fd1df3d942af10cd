"""Which addresses an answer gives a name: for rules about connections that know only addresses (`netstack.policy.names`)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from dns import codec
from netstack.errors import Malformed

MAX_ADDRESSES: Final = 64
"""Of one answer."""
_WANTED: Final = {codec.A: 4, codec.AAAA: 16}
_fixed = struct.Struct("!HHIH")  # type, class, time to live, length of the data

Learn: TypeAlias = Callable[[str, bytes, float], None]
"""`learn(name, address, ttl)`: a guest was told that `name` is at `address` (4 or 16 octets) for `ttl` seconds."""


def told(query: bytes, end: int, answer: bytes) -> Iterator[tuple[str, bytes, float]]:
    """What `answer` says of the name asked for by `query`, whose question ends at `end`: `(name, address, ttl)`, also where the
    address is at the end of a chain of aliases. Nothing for what is no good answer."""
    if codec.rcode(answer) != codec.NOERROR or not answer[6] | answer[7]:
        return
    name = _text(query, end)
    count = answer[6] << 8 | answer[7]
    try:
        at = codec.question_end(answer)
        for number, (_start, owner, after) in enumerate(codec.records(answer, at)):
            if number >= min(count, MAX_ADDRESSES):
                return
            kind, _class, ttl, length = _fixed.unpack_from(answer, owner)
            if _WANTED.get(kind) == length:
                yield name, answer[after - length : after], float(ttl)
    except Malformed:
        return


def _text(query: bytes, end: int) -> str:
    labels = []
    at = codec.HEADER
    while (length := query[at]) and at < end:
        labels.append(query[at + 1 : at + 1 + length].decode("latin-1"))
        at += length + 1
    return ".".join(labels)
