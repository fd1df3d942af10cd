"""Asking one server one question over UDP: the sockets, and what counts as its answer.

Off-path forgery (threats N1, RFC 5452): every query has a socket of its own, so the kernel draws a fresh ephemeral port, and a
fresh 16-bit id from the system's random source. The socket is connected, so datagrams of anyone but that server's address
and port never reach it. What does is an answer only if id, opcode and the question are ours, octet by octet: a resolver
repeats the question as it was asked, so the case of letters counts too (which lets a guest's 0x20 bits protect it as well). A
socket per query costs about 10 microseconds here; sharing a few would be cheaper and easier to guess.

Nothing here resolves names or uses threads: addresses are numeric.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Final

from dns import codec
from dns.servers import Upstream

RandomId = Callable[[], bytes]
"""Two octets nobody can guess."""

_NONBLOCK: Final[int] = getattr(socket, "SOCK_NONBLOCK", 0)  # not in macOS
_UDP: Final = int(socket.SOCK_DGRAM) | _NONBLOCK
_FETCHED: Final = 512
_HEADER_ONLY_CODES: Final = frozenset({codec.FORMERR, codec.SERVFAIL, codec.NOTIMP, codec.REFUSED})


def open_udp(server: Upstream) -> socket.SocketType:
    """A non-blocking UDP socket on a fresh port, connected to `server`. Raises `OSError`. HOT PATH: no wrapper, no second call."""
    address = server.sockaddr
    family = socket.AF_INET if len(address) == 2 else socket.AF_INET6
    sock = socket.SocketType(family, _UDP)
    try:
        if not _NONBLOCK:
            sock.setblocking(False)
        sock.connect(address)
    except OSError:
        sock.close()
        raise
    return sock


def random_ids() -> RandomId:
    """Ids of the system's random source, fetched many at a time."""
    unused = b""
    at = 0

    def new_id() -> bytes:
        nonlocal unused, at
        if at == len(unused):
            unused, at = os.urandom(_FETCHED), 0
        at += 2
        return unused[at - 2 : at]

    return new_id


def accept(query: bytes, end: int, query_id: bytes, reply: bytes) -> bytes | None:
    """What to give the asker of `query` if `reply`, from the server it was sent to under `query_id`, is the answer to it.

    Only the id is put back; all else is as the server wrote it. `None` for anything that is not the answer. Some servers
    send a bare header when they cannot parse EDNS: that answers with its code, and can at worst deny, never mislead.
    """
    if len(reply) < codec.HEADER or reply[:2] != query_id or (reply[2] ^ query[2]) & 0xF8 != 0x80:
        return None
    if reply[codec.HEADER : end] == query[codec.HEADER : end] and reply[4:6] == b"\0\1":
        return query[:2] + reply[2:]
    if len(reply) == codec.HEADER and reply[4:] == bytes(8) and codec.rcode(reply) in _HEADER_ONLY_CODES:
        return codec.failure(query, codec.rcode(reply), end)
    return None


def worth(answer: bytes) -> int:
    """How much an answer says about the name: the more, the better it is as the answer of several servers.

    4: records, or that they are to be fetched over TCP. 3: the name has no such records. 2: there is no such name. 1: what the
    server makes of the query (FORMERR, NOTIMP). 0: SERVFAIL and REFUSED are about the server, and another may know.
    """
    code = answer[3] & 0x0F
    if code == codec.NOERROR:
        return 4 if answer[7] or answer[6] or answer[2] & codec.TC else 3
    if code == codec.NXDOMAIN:
        return 2
    return 0 if code in (codec.SERVFAIL, codec.REFUSED) else 1
