"""What Linux says of its network (rtnetlink(7)): messages taken apart, a socket that hears of changes, one that asks.

The formats needed are four fixed headers and a list of attributes, so they are read here with `struct`: pyroute2 0.9 takes
0.1 s to import and 22 MiB to keep (measured), a third of what a whole daemon may have, for the same dozen fields.

All numbers are in the host's byte order, addresses in network order. Whatever the octets, parsing gives values or raises
`Malformed`; it never reads beyond a message.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from netstack.errors import HostError, Malformed

_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # rtattr: length, type
_ADDRESS: Final = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, interface
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # rtmsg: family, to/from prefix, tos, table, protocol, scope, type, flags
_LINK: Final = struct.Struct("=BxHiII")  # ifinfomsg: family, type, interface, flags, change
_HOP: Final = struct.Struct("=HBBi")  # rtnexthop: length, flags, hops, interface
_NUMBER: Final = struct.Struct("=I")
_ERROR: Final = struct.Struct("=i")

_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
RTM_NEWLINK: Final = 16
RTM_NEWADDR: Final = 20
RTM_DELADDR: Final = 21
RTM_NEWROUTE: Final = 24
_RTM_GETLINK: Final = 18
_RTM_GETADDR: Final = 22
_RTM_GETROUTE: Final = 26
_NLM_F_REQUEST: Final = 1
_NLM_F_DUMP: Final = 0x300
_NLM_F_DUMP_INTR: Final = 0x10
"""The list changed while it was told."""
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x100 | 0x400
"""RTMGRP_LINK, IPV4_IFADDR, IPV4_ROUTE, IPV6_IFADDR, IPV6_ROUTE."""
_RTM_F_CLONED: Final = 0x200
_RTAX_MTU: Final = 2

UNICAST: Final = 1
BLACKHOLE, UNREACHABLE, PROHIBIT = 6, 7, 8
TABLE_LOCAL: Final = 255

_BUFFER: Final = 1 << 16
"""More than the kernel puts into one datagram (32 KiB)."""
MAX_ENTRIES: Final = 10_000
"""Of one list. A host with more routes is a router of the Internet; the rest is not looked at."""
_TRIES: Final = 3
_LIMIT_S: Final = 2.0
_HEARD_AT_ONCE: Final = 64


class Address(NamedTuple):
    """An address of this host, 4 or 16 octets, and the number of the interface that has it."""

    octets: bytes
    prefix: int
    interface: int


class RouteEntry(NamedTuple):
    """A route as the kernel has it, or the answer to "which way to X"."""

    family: int
    destination: bytes
    """4 or 16 octets; of the default route zeros."""
    prefix: int
    interface: int
    """0 for none: a route that refuses."""
    gateway: bytes
    source: bytes
    """The source address it prefers; empty for none."""
    metric: int
    mtu: int
    """Of the path, where the kernel knows or was told; 0 otherwise."""
    table: int
    kind: int
    cloned: bool


class Interface(NamedTuple):
    """A network interface."""

    number: int
    name: str
    mtu: int
    up: bool


def messages(data: memoryview) -> Iterator[tuple[int, int, int, memoryview]]:
    """`(type, flags, sequence, body)` of each message in a datagram. Raises `Malformed` when one does not fit."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEADER.size:
            raise Malformed("netlink: truncated header")
        length, kind, flags, sequence, _port = _HEADER.unpack_from(data, at)
        if not _HEADER.size <= length <= len(data) - at:
            raise Malformed("netlink: length field outside the datagram")
        yield kind, flags, sequence, data[at + _HEADER.size : at + length]
        at += (length + 3) & ~3


def attributes(data: memoryview) -> dict[int, bytes]:
    """Type -> value; of one that comes twice the last. Raises `Malformed`."""
    found: dict[int, bytes] = {}
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if not _ATTRIBUTE.size <= length <= len(data) - at:
            raise Malformed("netlink: attribute outside its message")
        found[kind & 0x3FFF] = bytes(data[at + _ATTRIBUTE.size : at + length])  # less the flags NESTED and BYTEORDER
        at += (length + 3) & ~3
    return found


def _number(values: dict[int, bytes], kind: int, default: int = 0) -> int:
    value = values.get(kind)
    if value is None:
        return default
    if len(value) != 4:
        raise Malformed("netlink: a number that has not 4 octets")
    return int(_NUMBER.unpack(value)[0])


def _octets_of(family: int) -> int:
    if family not in (socket.AF_INET, socket.AF_INET6):
        raise Malformed("netlink: neither IPv4 nor IPv6")
    return 4 if family == socket.AF_INET else 16


def _checked(value: bytes, octets: int) -> bytes:
    if value and len(value) != octets:
        raise Malformed("netlink: an address of the wrong length")
    return value


def parse_address(body: memoryview) -> Address:
    """Of RTM_NEWADDR and RTM_DELADDR. Raises `Malformed`."""
    if len(body) < _ADDRESS.size:
        raise Malformed("netlink: truncated address")
    family, prefix, _flags, _scope, interface = _ADDRESS.unpack_from(body)
    values = attributes(body[_ADDRESS.size :])
    octets = _octets_of(family)
    # IFA_LOCAL is ours; on a point-to-point link IFA_ADDRESS is the peer's (rtnetlink(7)).
    own = _checked(values.get(2) or values.get(1) or b"", octets)
    if not own or prefix > octets * 8:
        raise Malformed("netlink: no address")
    return Address(octets=own, prefix=prefix, interface=interface)


def parse_route(body: memoryview) -> RouteEntry:
    """Of RTM_NEWROUTE and RTM_DELROUTE. Raises `Malformed`."""
    if len(body) < _ROUTE.size:
        raise Malformed("netlink: truncated route")
    family, prefix, _from, _tos, table, _protocol, _scope, kind, flags = _ROUTE.unpack_from(body)
    values = attributes(body[_ROUTE.size :])
    octets = _octets_of(family)
    if prefix > octets * 8:
        raise Malformed("netlink: a prefix longer than an address")
    interface = _number(values, 4)
    gateway = _checked(values.get(5, b""), octets)
    hops = values.get(9, b"")  # RTA_MULTIPATH: the first way stands for all
    if not interface and len(hops) >= _HOP.size:
        interface = _HOP.unpack_from(hops)[3]
        if interface < 0:
            raise Malformed("netlink: a negative interface")
    return RouteEntry(
        family=family,
        destination=_checked(values.get(1, b""), octets) or bytes(octets),
        prefix=prefix,
        interface=interface,
        gateway=gateway,
        source=_checked(values.get(7, b""), octets),
        metric=_number(values, 6),
        mtu=_number(attributes(memoryview(values.get(8, b""))), _RTAX_MTU),
        table=_number(values, 15, table),
        kind=kind,
        cloned=bool(flags & _RTM_F_CLONED),
    )


def parse_link(body: memoryview) -> Interface:
    """Of RTM_NEWLINK and RTM_DELLINK. Raises `Malformed`."""
    if len(body) < _LINK.size:
        raise Malformed("netlink: truncated link")
    _family, _type, number, flags, _change = _LINK.unpack_from(body)
    values = attributes(body[_LINK.size :])
    name = values.get(3, b"").rstrip(b"\0").decode("utf-8", "replace")
    return Interface(number=number, name=name or f"interface {number}", mtu=_number(values, 4), up=bool(flags & 1))


class Listener:
    """Hears of every change. `heard` is to be called when `fileno` is readable."""

    def __init__(self) -> None:
        """Raises `OSError` where the kernel does not tell us."""
        self._sock = _socket()
        try:
            self._sock.bind((0, _GROUPS))
        except BaseException:
            self._sock.close()
            raise
        self._sock.setblocking(False)
        self.lost = 0
        """How often there was more to hear than fits; everything is to be read again then, as after any change."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def heard(self) -> bool:
        """Take what waits; whether there was anything. The caller reads the whole state again, so the news themselves are not
        kept. Raises `OSError` when nothing more will come."""
        anything = False
        for _ in range(_HEARD_AT_ONCE):
            try:
                _octets, _ancillary, _flags, sender = self._sock.recvmsg(_BUFFER)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.lost += 1
                anything = True
                continue
            anything = anything or sender[0] == 0  # 0 is the kernel; another process has no say
        return anything

    def close(self) -> None:
        self._sock.close()


class Asker:
    """Asks the kernel; it answers at once, from within the call. All methods raise `HostError` when it does not."""

    def __init__(self) -> None:
        try:
            self._sock = _socket()
        except OSError as error:
            raise HostError(f"netlink: {error.strerror}; the host's routes cannot be read") from None
        self._sock.settimeout(_LIMIT_S)
        self._sequence = 0

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_error: object) -> None:
        self._sock.close()

    def addresses(self) -> list[Address]:
        """All of them, those of loopback too."""
        return [parse_address(body) for body in self._list(_RTM_GETADDR, RTM_NEWADDR, _ADDRESS.pack(0, 0, 0, 0, 0))]

    def routes(self) -> list[RouteEntry]:
        """All tables of both families."""
        return [
            parse_route(body)
            for family in (socket.AF_INET, socket.AF_INET6)
            for body in self._list(_RTM_GETROUTE, RTM_NEWROUTE, _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
        ]

    def links(self) -> list[Interface]:
        """All interfaces."""
        return [parse_link(body) for body in self._list(_RTM_GETLINK, RTM_NEWLINK, _LINK.pack(0, 0, 0, 0, 0))]

    def way_to(self, destination: bytes) -> RouteEntry | None:
        """The route a packet to `destination` (4 or 16 octets) takes now; `None` when there is none."""
        family = socket.AF_INET if len(destination) == 4 else socket.AF_INET6
        request = _ROUTE.pack(family, len(destination) * 8, 0, 0, 0, 0, 0, 0, 0)
        request += _ATTRIBUTE.pack(_ATTRIBUTE.size + len(destination), 1) + destination
        try:
            for kind, _flags, body in self._ask(_RTM_GETROUTE, 0, request):
                if kind == RTM_NEWROUTE:
                    found = parse_route(body)
                    return found if found.kind == UNICAST else None
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.EAFNOSUPPORT):
                return None  # no route, or one that refuses: unreachable, prohibit, blackhole
            raise HostError(f"netlink: {error.strerror}") from None
        return None

    def _list(self, request: int, answer: int, body: bytes) -> list[memoryview]:
        try:
            for _ in range(_TRIES):
                found: list[memoryview] = []
                torn = False
                for kind, flags, part in self._ask(request, _NLM_F_DUMP, body):
                    torn = torn or bool(flags & _NLM_F_DUMP_INTR)
                    if kind == answer and len(found) < MAX_ENTRIES:
                        found.append(part)
                if not torn:
                    break
            return found  # torn each time: who changes it that often is heard of again
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):  # a kernel without IPv6
                return []
            raise HostError(f"netlink: {error.strerror or error}") from None

    def _ask(self, request: int, flags: int, body: bytes) -> Iterator[tuple[int, int, memoryview]]:
        self._sequence += 1
        octets = _HEADER.pack(_HEADER.size + len(body), request, _NLM_F_REQUEST | flags, self._sequence, 0) + body
        self._sock.sendto(octets, (0, 0))
        while True:
            data, sender = self._sock.recvfrom(_BUFFER)
            if sender[0] != 0:
                continue
            for kind, said, sequence, part in messages(memoryview(data)):
                if sequence != self._sequence:
                    continue  # the rest of an earlier answer that was given up
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -_ERROR.unpack_from(part)[0] if len(part) >= _ERROR.size else errno.EIO
                    if number:
                        raise OSError(number, os.strerror(number))
                    return
                yield kind, said, part
                if not flags & _NLM_F_DUMP:
                    return


def _socket() -> socket.socket:
    family: int = getattr(socket, "AF_NETLINK", -1)
    if family < 0:
        raise OSError(errno.EAFNOSUPPORT, "this system has no netlink")
    return socket.socket(family, socket.SOCK_RAW, 0)  # NETLINK_ROUTE
