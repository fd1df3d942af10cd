"""One flow as people and the control API see it, and the name it is asked for by.

A record is made when somebody asks, from what the proxies keep anyway; nothing is stored for it while nobody looks.
"""

from __future__ import annotations

import hashlib
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

_MAPPED: Final = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2

Protocol: TypeAlias = Literal["tcp", "udp", "icmp"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRecord:
    """One TCP connection, one UDP mapping or peer of a published UDP port, or one guest's ping.

    Endpoints are text, `address:port`; a ping has its identifier for a port.
    """

    id: str
    """12 hexadecimal digits, the same as long as the flow lives; a later flow of the same name has another one."""
    protocol: Protocol
    direction: str
    """`outbound` (the guest began) or `inbound` (a published port)."""
    guest: str
    remote: str
    """The other end as the guest addresses it; of a UDP mapping the one that came last, `*` where there is none (yet)."""
    remotes: int
    """How many there are: 1 for TCP, any number for a UDP mapping, 0 where they are not kept (ping)."""
    host_local: str
    """The host socket's own end (getsockname), a path for a unix socket; empty where there is none, or nobody asked."""
    host_remote: str
    """And its other end (getpeername; for UDP where datagrams to `remote` go)."""
    state: str
    """TCP's (RFC 9293 3.3.2), `CONNECTING` while the host dials, `RESOLVING` while the guest is looked for; for UDP and ping
    `ANSWERED` or `UNANSWERED`."""
    octets_outbound: int
    octets_inbound: int
    age_s: float
    idle_s: float | None
    """Since either side last spoke; `None` for TCP, which does not keep it."""


def flow_id(protocol: Protocol, key: bytes, opened: float) -> str:
    """The name of the flow that began with `key` at `opened` (seconds on the stack's clock)."""
    return hashlib.blake2b(struct.pack("<d", opened) + key, digest_size=6, person=protocol.encode()).hexdigest()


def local_end(sock: Any) -> str:
    """The name of a host socket as text; empty where it has none."""
    return _end(sock.getsockname)


def remote_end(sock: Any) -> str:
    """The name of its other end; empty where it is not connected (yet, or any more)."""
    return _end(sock.getpeername)


def local_address(sock: Any) -> bytes | None:
    """The address of this host that a connected socket has, 4 or 16 octets; `None` where it has none that could go away: a
    unix socket, loopback, not connected yet."""
    try:
        name = sock.getsockname()
        if not isinstance(name, tuple) or not isinstance(name[0], str):
            return None
        family = socket.AF_INET6 if ":" in name[0] else socket.AF_INET
        address = socket.inet_pton(family, name[0].partition("%")[0])
    except OSError:
        return None
    if address[:12] == _MAPPED:
        address = address[12:]
    return None if (address[0] == 127 and len(address) == 4) or not any(address[:-1]) else address


def _end(ask: Callable[[], Any]) -> str:
    try:
        name = ask()
    except OSError:
        return ""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"
    # A unix socket: its path, bytes for an abstract one, empty where it has no name.
    text = name if isinstance(name, str) else name.decode(errors="replace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)
