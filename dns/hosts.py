"""The host's `/etc/hosts`, for its guests (spec vpnkit 4.6): `address name...` per line, `#` begins a comment.

Names are compared without regard to case. All addresses that lines give a name are its answer, in the order of the file;
a line with a bad address is skipped, and so is a name that cannot be one. Tables are keyed by names in wire form.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from dns import codec
from dns.watch import WatchedFile
from netstack.api import Clock
from netstack.errors import Malformed

MAX_ADDRESSES: Final = 64
"""Of one name and family; more would not fit an answer that anyone uses."""


@dataclass(slots=True)
class Hosts:
    """One reading of the file. Addresses are 4 or 16 octets in network order."""

    addresses: dict[bytes, list[bytes]] = field(default_factory=dict)
    """Wire name in lower case -> addresses of both families."""
    names: dict[bytes, bytes] = field(default_factory=dict)
    """Address -> wire name of the first line that has it."""


def packed(text: str) -> bytes | None:
    """4 or 16 octets of a numeric address (a scope after `%` is dropped), `None` when it is none."""
    text = text.partition("%")[0]
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in text else socket.AF_INET, text)
    except (OSError, ValueError):
        return None


def parse(text: str) -> Hosts:
    """Read a hosts file. Never raises: what cannot be understood is left out."""
    hosts = Hosts()
    for line in text.splitlines():
        address_text, *names = line.partition("#")[0].split() or ("",)
        address = packed(address_text) if names else None
        if address is None:
            continue
        for name in names:
            try:
                wire = codec.wire_name(name)
            except Malformed:
                continue
            known = hosts.addresses.setdefault(wire, [])
            if address not in known and sum(len(other) == len(address) for other in known) < MAX_ADDRESSES:
                known.append(address)
            hosts.names.setdefault(address, wire)
    return hosts


def watch(path: str | None, clock: Clock) -> WatchedFile[Hosts]:
    """The hosts file at `path`, followed; `None` for no hosts at all."""
    return WatchedFile(path, parse, clock)


def reverse_name(address: bytes) -> bytes:
    """Wire name under which the PTR record of `address` is asked for (RFC 1035 3.5, RFC 3596 2.5)."""
    if len(address) == 4:
        return codec.wire_name(".".join(str(octet) for octet in reversed(address)) + ".in-addr.arpa")
    return codec.wire_name(".".join(reversed(address.hex())) + ".ip6.arpa")


_SUFFIXES: Final[Mapping[int, bytes]] = {
    4: codec.wire_name("in-addr.arpa"),
    16: codec.wire_name("ip6.arpa"),
}


def address_of_reverse(wire: bytes) -> bytes | None:
    """The address a wire name in lower case asks the name of; `None` when it is no complete reverse name."""
    for octets, suffix in _SUFFIXES.items():
        if not wire.endswith(suffix):
            continue
        labels: list[str] = []
        at, stop = 0, len(wire) - len(suffix)
        while at < stop:
            after = at + 1 + wire[at]
            labels.append(wire[at + 1 : after].decode("latin-1"))
            at = after
        labels.reverse()
        if at != stop or len(labels) != (4 if octets == 4 else 32):
            return None
        if octets == 4:
            return packed(".".join(labels))
        text = "".join(labels)
        return bytes.fromhex(text) if len(text) == 32 and text.isalnum() and _is_hex(text) else None
    return None


def _is_hex(text: str) -> bool:
    return all(digit in "0123456789abcdef" for digit in text)
