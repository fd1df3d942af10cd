"""PROXY protocol headers (haproxy.org, "The PROXY protocol", versions 1 and 2): what a server is told of the client in front.

The header comes before the client's first octet. A server must expect it, or it takes it for the client's words.
"""

from __future__ import annotations

import ipaddress
import struct
from typing import Any, Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
_LOCAL, _PROXY = 0x20, 0x21
_TCP4, _TCP6 = 0x11, 0x21
_UNKNOWN: Final = b"PROXY UNKNOWN\r\n"


def header(version: int, client: Any, listener: Any) -> bytes:
    """The header for a connection from `client` to `listener`, as `getpeername` and `getsockname` give them.

    What has no IP address (a Unix socket's client) is UNKNOWN in version 1 and LOCAL in version 2. A client at an IPv4
    address mapped into IPv6 is told as IPv4 when both ends are.
    """
    ends = _ends(client, listener)
    if version == 1:
        if ends is None:
            return _UNKNOWN
        source, destination, source_port, port = ends
        return f"PROXY TCP{source.version} {source} {destination} {source_port} {port}\r\n".encode()
    if ends is None:
        return SIGNATURE + struct.pack("!BBH", _LOCAL, 0, 0)
    source, destination, source_port, port = ends
    body = source.packed + destination.packed + struct.pack("!HH", source_port, port)
    return SIGNATURE + struct.pack("!BBH", _PROXY, _TCP4 if source.version == 4 else _TCP6, len(body)) + body


_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _ends(client: Any, listener: Any) -> tuple[_Address, _Address, int, int] | None:
    if not (isinstance(client, tuple) and isinstance(listener, tuple)):
        return None
    source, destination = _address(client[0]), _address(listener[0])
    mapped = source.ipv4_mapped if isinstance(source, ipaddress.IPv6Address) else None
    mapped_to = destination.ipv4_mapped if isinstance(destination, ipaddress.IPv6Address) else None
    if mapped is not None and mapped_to is not None:
        source, destination = mapped, mapped_to
    return source, destination, client[1], listener[1]


def _address(text: str) -> _Address:
    return ipaddress.ip_address(text.partition("%")[0])
