"""ICMP messages (RFC 792; RFC 1191 for the next-hop MTU; RFC 1812 5.2.7 for the codes).

A message is type, code, checksum, four octets whose meaning depends on the type (`rest`), and a body: an echo's data,
or the packet an error is about.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from netstack.errors import Malformed
from netstack.wire import checksum
from netstack.wire.checksum import BadChecksum

ECHO_REPLY: Final = 0
UNREACHABLE: Final = 3
SOURCE_QUENCH: Final = 4
REDIRECT: Final = 5
ECHO_REQUEST: Final = 8
TIME_EXCEEDED: Final = 11
PARAMETER_PROBLEM: Final = 12

ERRORS: Final = frozenset((UNREACHABLE, SOURCE_QUENCH, REDIRECT, TIME_EXCEEDED, PARAMETER_PROBLEM))
"""RFC 1122 3.2.2: the types that are error messages, all with the offending packet as body."""

# codes of UNREACHABLE
NET_UNREACHABLE: Final = 0
HOST_UNREACHABLE: Final = 1
PROTOCOL_UNREACHABLE: Final = 2
PORT_UNREACHABLE: Final = 3
FRAGMENTATION_NEEDED: Final = 4
ADMINISTRATIVELY_PROHIBITED: Final = 13  # RFC 1812 5.2.7.1

# codes of TIME_EXCEEDED
TTL_EXCEEDED: Final = 0
REASSEMBLY_EXCEEDED: Final = 1

HEADER: Final = struct.Struct("!BBH4s")  # type, code, checksum, rest
HEADER_LENGTH: Final = 8
NO_REST: Final = bytes(4)

_ECHO_REST = struct.Struct("!HH")  # identifier, sequence number
_MTU_REST = struct.Struct("!HH")  # unused, next-hop MTU (RFC 1191 section 4)


@dataclass(slots=True)
class Message:
    """One message; `body` is a view of what was parsed."""

    type: int
    code: int
    rest: bytes
    body: memoryview

    @property
    def echo(self) -> tuple[int, int]:
        """`(identifier, sequence number)` of an echo request or reply."""
        identifier, sequence = _ECHO_REST.unpack(self.rest)
        return identifier, sequence

    @property
    def mtu(self) -> int:
        """The next-hop MTU of a "fragmentation needed" error; 0 from a router older than RFC 1191."""
        return int.from_bytes(self.rest[2:], "big")


def parse(message: memoryview) -> Message:
    """A whole ICMP message; raises `Malformed` when it is cut short and its subclass `BadChecksum`."""
    if len(message) < HEADER_LENGTH:
        raise Malformed("icmp: truncated header")
    if not checksum.verify(message):
        raise BadChecksum("icmp: checksum")
    kind, code, _checksum, rest = HEADER.unpack_from(message)
    return Message(kind, code, rest, message[HEADER_LENGTH:])


def emit(kind: int, code: int, rest: bytes, body: bytes | memoryview = b"") -> bytes:
    """The message with its checksum; `rest` is four octets."""
    total = (kind << 8 | code) + int.from_bytes(rest, "big") + checksum.partial(body)
    return HEADER.pack(kind, code, 0xFFFF ^ checksum.fold(total), rest) + body


def echo_rest(identifier: int, sequence: int) -> bytes:
    """`rest` of an echo request or reply."""
    return _ECHO_REST.pack(identifier, sequence)


def mtu_rest(mtu: int) -> bytes:
    """`rest` of a "fragmentation needed" error; a next hop beyond 65,535 octets is told as that."""
    return _MTU_REST.pack(0, min(mtu, 0xFFFF))
