"""What an answer came from, in words and values of JSON, for people who wonder why a name leads where it does."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any, Final

from dns import cache, codec
from dns.forwarder import Forwarder
from dns.inflight import CACHE
from dns.log import qtype_name, qtype_of, rcode_name
from dns.rules import text_name
from netstack.errors import ConfigError, Malformed

MAX_RECORDS: Final = 64
"""Shown of one answer."""

OwnAnswer = Callable[[bytes], tuple[bytes | None, int, str]]

_NAMES: Final = frozenset({2, 5, 12, 39})  # NS, CNAME, PTR, DNAME: the data is a name
_header = b"\0\0\1\0\0\1\0\0\0\0\0\0"  # RD, one question


def query(name: str, qtype: str) -> tuple[bytes, int]:
    """A query as a guest would send it, and where its question ends. Raises `ConfigError`."""
    number = qtype_of(qtype)
    if number is None:
        raise ConfigError(f"{qtype!r} is no type of records; write A, AAAA, MX, ... or TYPE65280")
    try:
        wire = codec.wire_name(name)
    except Malformed as error:
        raise ConfigError(f"{name[:80]!r} is no name ({error}); write it as in www.example.org") from None
    message = _header + wire + number.to_bytes(2, "big") + codec.IN.to_bytes(2, "big")
    return message, len(message)


async def explain(name: str, qtype: str, own_answer: OwnAnswer, forwarder: Forwarder, now: float) -> dict[str, Any]:
    """What a guest that asks for `name` gets now, and from where; a question to servers is really asked.

    `now` is on the forwarder's clock. Raises `ConfigError` for what is no name or type.
    """
    message, end = query(name, qtype)
    began = time.perf_counter()
    answer, _, by = own_answer(message)
    said: dict[str, Any] = {
        "name": text_name(message[codec.HEADER : end - 4]),
        "type": qtype_name(int.from_bytes(message[end - 4 : end - 2], "big")),
        "source": by,
        "route": None,
        "servers": [],
        "cache": None,
        "tries": [],
    }
    if answer is None:
        route = forwarder.route(message, end)
        said["source"] = route.why.partition(" ")[0]
        said["route"] = route.why
        said["servers"] = [
            {"server": state.name, "order": state.server.order, "offline": state.offline}
            for group in route.groups
            for state in group
        ]
        key = cache.key(message, end)
        held = None if key is None else forwarder.cache.look(key, now)
        if held is not None and key is not None:
            answer, by = forwarder.cache.find(key, message, end, now), CACHE
            said["cache"] = {"by": held[0], "age_s": round(held[1], 3), "left_s": round(held[2], 3)}
        if answer is None:
            answer, by, trace = await forwarder.trace(message, end)
            said["tries"] = [
                {
                    "server": state.name,
                    "result": rcode_name(reply[3] & 0x0F) if reply else what,
                    "took_ms": round(took_s * 1000, 3) if reply else None,
                }
                for state, what, reply, took_s in trace
            ]
    said["by"] = by
    said["rcode"] = rcode_name(answer[3] & 0x0F)
    said["records"] = records(answer)
    said["took_ms"] = round((time.perf_counter() - began) * 1000, 3)
    return said


def records(message: bytes) -> list[str]:
    """The answer section as lines such as `www.example.org 300 A 192.0.2.1`, at most `MAX_RECORDS`; what is broken ends it."""
    lines: list[str] = []
    try:
        count = message[6] << 8 | message[7]
        for start, owner, after in codec.records(message, codec.question_end(message)):
            if len(lines) >= min(count, MAX_RECORDS):
                break
            rtype = int.from_bytes(message[owner : owner + 2], "big")
            ttl_s = int.from_bytes(message[owner + 4 : owner + 8], "big")
            data = _data(message, rtype, owner + 10, after)
            lines.append(f"{text_name(codec.expand(message, start))} {ttl_s} {qtype_name(rtype)} {data}")
    except Malformed:
        pass
    return lines


def _data(message: bytes, rtype: int, at: int, after: int) -> str:
    data = message[at:after]
    if rtype == codec.A and len(data) == 4:
        return socket.inet_ntop(socket.AF_INET, data)
    if rtype == codec.AAAA and len(data) == 16:
        return socket.inet_ntop(socket.AF_INET6, data)
    if rtype in _NAMES:
        return text_name(codec.expand(message, at))
    if rtype == 15 and len(data) > 2:  # MX
        return f"{int.from_bytes(data[:2], 'big')} {text_name(codec.expand(message, at + 2))}"
    return rf"\# {len(data)} {data[:64].hex()}"  # RFC 3597 5
