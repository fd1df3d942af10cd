"""VPNKit's ethernet handshake, server's side: VMN3T (spec: vpnkit 2.2 and Appendix E). Bytes in, bytes out; no I/O.

    client                              server
    Init 49 ------------------------->          magic, version, commit
           <-------------------------- Init 49  always, whatever the client's version
    Command 41 ---------------------->          Ethernet(uuid) or Preferred_ipv4(uuid, address)
           <------------------- Response 258    Vif(mtu, max_packet_size, mac) or Disconnect(reason)
    frames, u16 little-endian length <------->

A client with another version is answered and closed, one whose command or UUID makes no sense is closed in silence. The
magic is not looked at, as VPNKit does not. Read no more than the `wanted` octets from a client: what follows are frames.
"""

from __future__ import annotations

import random
import re
import struct
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias

from netstack.errors import GuestError, Malformed

VERSION: Final = 22
MAGIC: Final = b"VMN3T"
COMMIT: Final = b"0123456789" * 4
INIT_OCTETS: Final = 49
COMMAND_OCTETS: Final = 41
RESPONSE_OCTETS: Final = 258
PACKET_EXTRA: Final = 50
"""`max_packet_size` is the MTU and so much more: VPNKit's number, clients size their buffers by it."""

_INIT = struct.Struct("<5sI40s")
_COMMAND = struct.Struct("<B36s4s")
_VIF = struct.Struct("<BHH6s")
_UUID = re.compile(rb"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")


class Command(Enum):
    ETHERNET = 1
    PREFERRED_IPV4 = 8


Reserve: TypeAlias = Callable[[uuid.UUID, bytes | None], tuple[bytes, bytes]]
"""`reserve(uuid, preferred) -> (ip, mac)`: 4 and 6 octets, the same for one UUID ever after.

Raises `GuestError`, whose text the client is told: VPNKit has "No IP addresses available." and three more, which
`netstack.dhcp.leases` says.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a client asks for."""

    uuid: uuid.UUID | None
    """None when it left the choice to the server."""
    preferred: bytes | None
    """The IPv4 address it wants, in network order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who a client turned out to be."""

    uuid: uuid.UUID
    ip: bytes
    mac: bytes


def parse_init(message: bytes) -> int:
    """The version of a 49-octet Init."""
    _magic, version, _commit = _INIT.unpack(message)
    return int(version)


def emit_init(version: int = VERSION) -> bytes:
    """The 49 octets either side begins with."""
    return _INIT.pack(MAGIC, version, COMMIT)


def parse_command(message: bytes) -> Request:
    """The 41 octets of a command. Raises `Malformed` for an unknown command or a UUID that is none.

    An address of 0.0.0.0 counts as no preference, which is how gvproxy's clients leave it out.
    """
    kind, text, reversed_address = _COMMAND.unpack(message)
    try:
        command = Command(kind)
    except ValueError:
        raise Malformed(f"vmnet: unknown command {kind}") from None
    if not text.strip(b"\0"):
        identity = None
    elif _UUID.fullmatch(text):
        identity = uuid.UUID(text.decode("ascii"))
    else:
        raise Malformed("vmnet: the UUID is not 8-4-4-4-12 hexadecimal digits")
    preferred = reversed_address[::-1] if command is Command.PREFERRED_IPV4 and any(reversed_address) else None
    return Request(uuid=identity, preferred=preferred)


def emit_command(request: Request) -> bytes:
    """The 41 octets a client sends."""
    command = Command.ETHERNET if request.preferred is None else Command.PREFERRED_IPV4
    text = b"" if request.uuid is None else str(request.uuid).encode("ascii")
    return _COMMAND.pack(command.value, text, (request.preferred or b"")[::-1])


def emit_vif(mtu: int, mac: bytes) -> bytes:
    """The 258 octets that grant an interface; `mtu` in octets of an IP datagram."""
    return _VIF.pack(1, mtu, min(mtu + PACKET_EXTRA, 0xFFFF), mac).ljust(RESPONSE_OCTETS, b"\0")


def emit_disconnect(reason: str) -> bytes:
    """The 258 octets that refuse; a reason beyond 255 octets is cut."""
    text = reason.encode("ascii", "replace")[: RESPONSE_OCTETS - 3]
    return (bytes((2, len(text))) + text).ljust(RESPONSE_OCTETS, b"\0")


class Handshake:
    """One client's handshake.

    `feed` returns what to send. Then: `identity` is set when frames follow; `failure` is set when the connection must be
    closed (after what `feed` returned was sent), with the reason for the log.
    """

    def __init__(self, *, mtu: int, reserve: Reserve, rng: random.Random) -> None:
        self._mtu = mtu
        self._reserve = reserve
        self._rng = rng
        self._received = b""
        self._greeted = False
        self.identity: Identity | None = None
        self.failure: str | None = None

    @property
    def wanted(self) -> int:
        """Octets that complete the next message; 0 when the handshake is over."""
        if self.identity is not None or self.failure is not None:
            return 0
        return (COMMAND_OCTETS if self._greeted else INIT_OCTETS) - len(self._received)

    def feed(self, data: bytes) -> bytes:
        """Octets of the client, any number; returns octets for the client. Never raises."""
        self._received += data
        answer = b""
        if not self._greeted and self.failure is None and len(self._received) >= INIT_OCTETS:
            answer += self._init(self._take(INIT_OCTETS))
        if self._greeted and not self.identity and not self.failure and len(self._received) >= COMMAND_OCTETS:
            answer += self._command(self._take(COMMAND_OCTETS))
        return answer

    def _take(self, octets: int) -> bytes:
        message, self._received = self._received[:octets], self._received[octets:]
        return message

    def _init(self, message: bytes) -> bytes:
        version = parse_init(message)
        if version == VERSION:
            self._greeted = True
        else:
            self.failure = f"the client speaks version {version} of the protocol, not {VERSION}"
        return emit_init()

    def _command(self, message: bytes) -> bytes:
        try:
            request = parse_command(message)
        except Malformed as error:
            self.failure = str(error)
            return b""
        identity = request.uuid or uuid.UUID(int=self._rng.getrandbits(128), version=4)
        try:
            ip, mac = self._reserve(identity, request.preferred)
        except GuestError as error:
            self.failure = str(error)
            return emit_disconnect(str(error))
        self.identity = Identity(uuid=identity, ip=ip, mac=mac)
        return emit_vif(self._mtu, mac)
