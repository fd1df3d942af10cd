"""DHCP messages (RFC 2131 section 2, options of RFC 2132). Not on the hot path.

`parse` reads the fixed fields and all options: those of `file` and `sname` too when option 52 says that they hold
options, and the pieces of a split option joined (RFC 3396). `emit` writes one field of options, split where an option
is longer than 255 octets, padded to the 300 octets that some clients insist on. Option 52, pad and end are matters of
encoding and never appear in `Message.options`.

Beside them the option values that are more than a number or a row of addresses: domain search (119), routes (121).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from ipaddress import IPv4Network
from typing import Final

from netstack.errors import Malformed

BOOTREQUEST: Final = 1
BOOTREPLY: Final = 2
ETHERNET: Final = 1  # htype, the hardware types of RFC 1700
BROADCAST: Final = 0x8000  # the one flag of RFC 2131 figure 2

MIN_OCTETS: Final = 300  # RFC 1542 section 2.1: a BOOTP message with its 64-octet vendor area
MAX_MESSAGE: Final = 576  # RFC 2131 section 2: an IP datagram every client can take, unless option 57 says more

_HEADER = struct.Struct("!BBBBIHH4s4s4s4s16s64s128s")  # figure 1 of RFC 2131, up to the options
_COOKIE: Final = b"\x63\x82\x53\x63"
_OPTIONS_AT: Final = _HEADER.size + len(_COOKIE)

_PAD: Final = 0
_OVERLOAD: Final = 52
_END: Final = 255
_OVERLOAD_FILE: Final = 1
_OVERLOAD_SNAME: Final = 2

_NO_ADDRESS: Final = bytes(4)
_LABEL: Final = re.compile(rb"[A-Za-z0-9_-]{1,63}")


class Type(IntEnum):
    """Values of option 53 (RFC 2132 section 9.6)."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class Option(IntEnum):
    """The option codes this project reads or writes."""

    SUBNET_MASK = 1
    ROUTER = 3
    DNS_SERVER = 6
    HOST_NAME = 12
    DOMAIN_NAME = 15
    INTERFACE_MTU = 26
    BROADCAST_ADDRESS = 28
    NTP_SERVER = 42
    REQUESTED_ADDRESS = 50
    LEASE_TIME = 51
    MESSAGE_TYPE = 53
    SERVER_ID = 54
    PARAMETER_LIST = 55
    MESSAGE = 56
    MAX_SIZE = 57
    RENEWAL_TIME = 58
    REBINDING_TIME = 59
    CLIENT_ID = 61
    CLIENT_FQDN = 81
    DOMAIN_SEARCH = 119
    CLASSLESS_ROUTES = 121


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message. Addresses are 4 octets, `chaddr` is `hlen` octets (at most 16), option values without code."""

    op: int
    xid: int
    htype: int = ETHERNET
    hops: int = 0
    secs: int = 0
    flags: int = 0
    ciaddr: bytes = _NO_ADDRESS
    yiaddr: bytes = _NO_ADDRESS
    siaddr: bytes = _NO_ADDRESS
    giaddr: bytes = _NO_ADDRESS
    chaddr: bytes = b""
    sname: bytes = b""
    """Server name up to its first NUL; empty when the field held options."""
    file: bytes = b""
    """Boot file up to its first NUL; empty when the field held options."""
    options: Mapping[int, bytes] = field(default_factory=dict)

    def option(self, code: int, octets: int) -> bytes | None:
        """Value of an option of fixed length, `None` when absent; raises `Malformed` when it has another length."""
        value = self.options.get(code)
        if value is not None and len(value) != octets:
            raise Malformed(f"dhcp: option {code} has {len(value)} octets instead of {octets}")
        return value


def parse(data: bytes | memoryview) -> Message:
    """Read one message: the payload of a UDP datagram.

    A message that ends without the end option is taken (several clients send one), one whose option reaches over the
    end of its field is not. Raises `Malformed` for it, and for a missing cookie, an `hlen` over 16, a bad option 52.
    """
    octets = bytes(data)
    if len(octets) < _OPTIONS_AT:
        raise Malformed("dhcp: truncated before the options")
    (op, htype, hlen, hops, xid, secs, flags, ciaddr, yiaddr, siaddr, giaddr, chaddr, sname, file) = (
        _HEADER.unpack_from(octets)
    )
    if octets[_HEADER.size : _OPTIONS_AT] != _COOKIE:
        raise Malformed("dhcp: no magic cookie (plain BOOTP)")
    if hlen > len(chaddr):
        raise Malformed("dhcp: hlen over 16")
    pieces: dict[int, list[bytes]] = {}
    _collect(octets[_OPTIONS_AT:], pieces)
    overload = b"".join(pieces.pop(_OVERLOAD, ())) or b"\x00"
    if len(overload) != 1 or overload[0] > _OVERLOAD_FILE | _OVERLOAD_SNAME:
        raise Malformed("dhcp: option 52 is neither 1, 2 nor 3")
    # RFC 3396 section 5: the options field, then `file`, then `sname`. An option 52 inside those means nothing.
    if overload[0] & _OVERLOAD_FILE:
        _collect(file, pieces)
        file = b""
    if overload[0] & _OVERLOAD_SNAME:
        _collect(sname, pieces)
        sname = b""
    pieces.pop(_OVERLOAD, None)
    return Message(
        op=op,
        xid=xid,
        htype=htype,
        hops=hops,
        secs=secs,
        flags=flags,
        ciaddr=ciaddr,
        yiaddr=yiaddr,
        siaddr=siaddr,
        giaddr=giaddr,
        chaddr=chaddr[:hlen],
        sname=sname.partition(b"\x00")[0],
        file=file.partition(b"\x00")[0],
        options={code: b"".join(values) for code, values in pieces.items()},
    )


def _collect(area: bytes, pieces: dict[int, list[bytes]]) -> None:
    """Add the options of one field to `pieces`, by code and in order of appearance."""
    at, end = 0, len(area)
    while at < end:
        code = area[at]
        if code == _END:
            return
        if code == _PAD:
            at += 1
            continue
        if at + 1 >= end or at + 2 + area[at + 1] > end:
            raise Malformed(f"dhcp: option {code} reaches over the end of its field")
        value_at = at + 2
        at = value_at + area[at + 1]
        pieces.setdefault(code, []).append(area[value_at:at])


def emit(message: Message) -> bytes:
    """The octets of a message, at least 300 of them. The message type comes first, then the options by ascending code.

    Raises `ValueError` for what the format cannot carry: an overlong `chaddr`, `sname` or `file`; codes 0, 52, 255.
    """
    if len(message.chaddr) > 16 or len(message.sname) > 64 or len(message.file) > 128:
        raise ValueError("dhcp: chaddr, sname or file is too long for its field")
    out = bytearray(
        _HEADER.pack(
            message.op,
            message.htype,
            len(message.chaddr),
            message.hops,
            message.xid,
            message.secs,
            message.flags,
            message.ciaddr,
            message.yiaddr,
            message.siaddr,
            message.giaddr,
            message.chaddr,
            message.sname,
            message.file,
        )
    )
    out += _COOKIE
    for code in sorted(message.options, key=lambda code: (code != Option.MESSAGE_TYPE, code)):
        if not _PAD < code < _END or code == _OVERLOAD:
            raise ValueError(f"dhcp: {code} cannot be the code of an option")
        value = message.options[code]
        for start in range(0, len(value) or 1, 255):  # RFC 3396: a long option is split into several with one code
            part = value[start : start + 255]
            out += bytes((code, len(part))) + part
    out.append(_END)
    return bytes(out.ljust(MIN_OCTETS, b"\x00"))


def option_octets(value: bytes) -> int:
    """How many octets of a message an option with this value takes."""
    return len(value) + 2 * max(1, -(-len(value) // 255))


OPTIONS_ROOM: Final = MAX_MESSAGE - 20 - 8 - _OPTIONS_AT - 1
"""Octets for options in a message that every client takes: without IP and UDP header, fixed fields and end option."""


def check_name(name: str) -> bytes:
    """The text form of a domain name as option 15 carries it; raises `ValueError` as `encode_names` does."""
    return b".".join(_labels(name))


def encode_names(names: Iterable[str]) -> bytes:
    """Value of option 119: names as in RFC 1035 section 4.1.4, compressed against each other (RFC 3397).

    Names are relative to the root with or without a last dot; other than ASCII becomes its IDNA form. Raises
    `ValueError` that shows a name which is empty or too long, or has an empty label or odd characters.
    """
    out = bytearray()
    seen: dict[tuple[bytes, ...], int] = {}
    for name in names:
        labels = _labels(name)
        for depth in range(len(labels)):
            suffix = tuple(label.lower() for label in labels[depth:])
            if suffix in seen:
                out += struct.pack("!H", 0xC000 | seen[suffix])
                break
            if len(out) < 0x4000:  # a pointer has 14 bits
                seen[suffix] = len(out)
            out.append(len(labels[depth]))
            out += labels[depth]
        else:
            out.append(0)
    return bytes(out)


def _labels(name: str) -> list[bytes]:
    try:
        labels = [
            part.encode("ascii") if part.isascii() else part.encode("idna")
            for part in name.removesuffix(".").split(".")
        ]
    except UnicodeError:
        labels = []
    if (
        not labels
        or not all(_LABEL.fullmatch(label) for label in labels)
        or sum(map(len, labels)) + len(labels) + 1 > 255
    ):
        raise ValueError(f"{name!r} is not a domain name")
    return labels


def decode_names(data: bytes) -> tuple[str, ...]:
    """Names of an option 119, without a last dot. Raises `Malformed`; pointers may only point backwards, so it ends."""
    names = []
    at = 0
    while at < len(data):
        labels, at = _decode_name(data, at)
        names.append(".".join(labels))
    return tuple(names)


def _decode_name(data: bytes, at: int) -> tuple[list[str], int]:
    """Labels of the name at `at`, and where the next one begins."""
    labels: list[str] = []
    following: int | None = None
    octets = 1
    while True:
        if at >= len(data):
            raise Malformed("dhcp: name reaches over the end of option 119")
        length = data[at]
        if length == 0:
            return labels, at + 1 if following is None else following
        if length >= 0xC0:
            if at + 2 > len(data):
                raise Malformed("dhcp: pointer cut off in option 119")
            target = struct.unpack_from("!H", data, at)[0] & 0x3FFF
            if target >= at:
                raise Malformed("dhcp: pointer in option 119 does not point backwards")
            if following is None:
                following = at + 2
            at = target
            continue
        octets += 1 + length
        if length >= 0x40 or at + 1 + length > len(data) or octets > 255:
            raise Malformed("dhcp: bad label in option 119")
        labels.append(data[at + 1 : at + 1 + length].decode("latin-1"))
        at += 1 + length


def encode_routes(routes: Iterable[tuple[IPv4Network, bytes]]) -> bytes:
    """Value of option 121 (RFC 3442): destination and the 4 octets of its router, each. A client that takes 121 ignores
    option 3, so the caller puts the default route in as well."""
    out = bytearray()
    for network, router in routes:
        out.append(network.prefixlen)
        out += network.network_address.packed[: (network.prefixlen + 7) // 8]
        out += router
    return bytes(out)
