"""What became of datagrams sent earlier: the error queue of Linux datagram sockets (ip(7) IP_RECVERR), and errno in ICMP.

With `IP_RECVERR` an ICMP error about any datagram of an unconnected socket is queued with the destination it was about, the
router that sent it, and the octets it quoted, which is all a NAT needs to pass it on. Besides, the socket's next call fails
once with the same errno; nothing was sent or received by that call and it is to be repeated. Elsewhere the queue is absent
and the errno of a call is all there is.
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Any, Final

from netstack.wire import icmp

LINUX: Final = sys.platform == "linux"

IP_RECVERR: Final = 11  # linux/in.h; Python's socket module has neither these nor the next
IP_MTU_DISCOVER: Final = 10
PMTUDISC_DONT: Final = 0
PMTUDISC_DO: Final = 2
_MSG_ERRQUEUE: Final = 0x2000

_EXTENDED: Final = struct.Struct(
    "=IBBBxII"
)  # linux/errqueue.h sock_extended_err: errno, origin, type, code, info, data
_OFFENDER: Final = struct.Struct("=H2x4s")  # then a sockaddr_in
_ORIGIN_LOCAL: Final = 1
_ORIGIN_ICMP: Final = 2
_ANCILLARY: Final = 512
_QUOTE: Final = 1024
_BATCH: Final = 32
_DEFAULT_MTU: Final = 576  # RFC 1191 5: a router that names no MTU; RFC 791: what every host can take

_CODES: Final = {
    errno.ENETUNREACH: icmp.NET_UNREACHABLE,
    errno.ENETDOWN: icmp.NET_UNREACHABLE,
    errno.EHOSTUNREACH: icmp.HOST_UNREACHABLE,
    errno.EHOSTDOWN: icmp.HOST_UNREACHABLE,
    errno.ECONNREFUSED: icmp.PORT_UNREACHABLE,
    errno.EACCES: icmp.ADMINISTRATIVELY_PROHIBITED,
    errno.EPERM: icmp.ADMINISTRATIVELY_PROHIBITED,
}

EXHAUSTED: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))
"""The host has no more descriptors or memory."""
NO_ROOM: Final = frozenset((errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM))
"""A datagram found the host's queue full: lost, as on any full queue."""


@dataclass(frozen=True, slots=True)
class QueuedError:
    """One entry: what was reported, by whom, about which datagram."""

    kind: int
    code: int
    mtu: int
    """Next-hop MTU of a "fragmentation needed"."""
    offender: bytes | None
    """Address of the router or host that sent the ICMP error; None when not known."""
    local: bool
    """The host itself refused: a `sendto` failed with EMSGSIZE, and this says what would have fit."""
    destination: Any
    """Address the datagram was sent to, as `sendto` took it; where `local`, the port is 0."""
    quoted: bytes
    """What the error quoted behind the UDP header, or from the ICMP header on."""


def unreachable_code(number: int) -> int | None:
    """The code of "destination unreachable" (RFC 792) that tells a guest of the errno `number`; None: nothing fits."""
    return _CODES.get(number)


def enable(sock: Any) -> None:
    """Ask for the queue where there is one."""
    if LINUX:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)


def drain(sock: Any) -> list[QueuedError]:
    """Take what is queued (at most one batch) and the pending errno with it, so that the next call is honest."""
    found: list[QueuedError] = []
    if LINUX:
        for _ in range(_BATCH):
            try:
                data, ancillary, _flags, destination = sock.recvmsg(_QUOTE, _ANCILLARY, _MSG_ERRQUEUE)
            except OSError:
                break
            error = _parse(data, ancillary, destination)
            if error is not None:
                found.append(error)
    try:
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError:
        pass
    return found


def fitting_mtu(errors: list[QueuedError], host: str) -> int:
    """What the host said would have fit towards `host`, octets with IP header; 0: it did not say."""
    return next((error.mtu for error in reversed(errors) if error.local and error.destination[0] == host), 0)


def _parse(data: bytes, ancillary: list[tuple[int, int, bytes]], destination: Any) -> QueuedError | None:
    for level, kind, value in ancillary:
        if level != socket.IPPROTO_IP or kind != IP_RECVERR or len(value) < _EXTENDED.size:
            continue
        number, origin, icmp_type, icmp_code, value_info, _data = _EXTENDED.unpack_from(value)
        if origin == _ORIGIN_LOCAL and number == errno.EMSGSIZE:
            return QueuedError(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, value_info, None, True, destination, data)
        if origin != _ORIGIN_ICMP or icmp_type not in (icmp.UNREACHABLE, icmp.TIME_EXCEEDED):
            return None
        offender = None
        if len(value) >= _EXTENDED.size + _OFFENDER.size:
            family, address = _OFFENDER.unpack_from(value, _EXTENDED.size)
            if family == socket.AF_INET and address != bytes(4):
                offender = address
        mtu = 0
        if (icmp_type, icmp_code) == (icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED):
            mtu = value_info or _DEFAULT_MTU
        return QueuedError(icmp_type, icmp_code, mtu, offender, False, destination, data)
    return None
