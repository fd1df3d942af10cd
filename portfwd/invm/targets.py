"""What the forwarder connects to inside the VM (spec vpnkit 7.9).

TCP: one connect; a refusal is passed on. Unix: a server that is not there yet is waited for. UDP: one connected socket per client,
which outlives refusals, so a server that comes later is reached; what does not fit is dropped, as UDP may.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from netstack.errors import ConfigError
from portfwd.carriers import Destination
from portfwd.invm.limits import Budget, Counts
from portfwd.invm.transport import connected, short_path

CONNECT_TIMEOUT_S: Final = 60.0
"""A TCP target that says nothing; the host's client waits so long. (VPNKit leaves it to the kernel: 130 s on Linux.)"""
UNIX_RETRY_S: Final = 5.0  # spec vpnkit 7.9
UNIX_PATIENCE_S: Final = 120.0  # spec vpnkit 7.9
UDP_IDLE_S: Final = 90.0
"""A client's socket without a datagram for so long is closed (spec vpnkit 7.2, the same time as on the host's side)."""
UDP_CLIENTS: Final = 1024
"""Clients of one UDP forward; the one idle for longest goes first (spec vpnkit appendix C has the same bound for flows)."""
UDP_BATCH: Final = 64
"""Datagrams read per wake-up, so that a flood leaves the loop to others."""
UDP_MAX: Final = 65507

_NOT_YET: Final = frozenset({errno.ECONNREFUSED, errno.ENOENT})

V4_MAPPED: Final = b"\0" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Times, in seconds, so that tests need not wait."""

    connect_s: float = CONNECT_TIMEOUT_S
    unix_retry_s: float = UNIX_RETRY_S
    unix_s: float = UNIX_PATIENCE_S
    udp_idle_s: float = UDP_IDLE_S


def address_of(target: Destination) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Family and socket address of a `tcp` or `udp` target. Go's programs write IPv4 addresses in their 16-octet form."""
    address = target.address
    if len(address) == 16 and address.startswith(V4_MAPPED):
        address = address[12:]
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
    return family, (socket.inet_ntop(family, address), target.port)


async def dial(target: Destination, patience: Patience, counts: Counts | None = None) -> socket.socket:
    """A connected, non-blocking stream socket to a `tcp` or `unix` target; raises `OSError` (`TimeoutError` is one)."""
    if target.protocol == "unix":
        return await _dial_unix(target.path, patience, Counts() if counts is None else counts)
    family, where = address_of(target)
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    async with asyncio.timeout(patience.connect_s):
        return await connected(sock, where)


async def _dial_unix(path: str, patience: Patience, counts: Counts) -> socket.socket:
    loop = asyncio.get_running_loop()
    give_up = loop.time() + patience.unix_s
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            return await connected(sock, short_path(path))
        except ConfigError as error:
            sock.close()
            raise OSError(errno.ENAMETOOLONG, str(error)) from None
        except OSError as error:
            if error.errno not in _NOT_YET or loop.time() + patience.unix_retry_s > give_up:
                raise
        counts["unix targets tried again"] += 1
        await asyncio.sleep(patience.unix_retry_s)


class Client(NamedTuple):
    """Who sent a datagram on the host's side, as its record says; all empty in generation 3."""

    address: bytes
    port: int
    zone: str


Answer = Callable[[Client, bytes], None]
"""Carry a datagram of the target's back to a client; may drop it. Must not raise."""


class _Leg:
    """One client's socket to the target."""

    __slots__ = ("sock", "used")

    def __init__(self, sock: socket.socket, used: float) -> None:
        self.sock = sock
        self.used = used


class UdpTarget:
    """A UDP target, and a socket for each client that talks to it. `close` ends all."""

    def __init__(
        self,
        target: Destination,
        answer: Answer,
        *,
        budget: Budget,
        counts: Counts,
        idle_s: float = UDP_IDLE_S,
        most: int = UDP_CLIENTS,
    ) -> None:
        self._family, self._where = address_of(target)
        self._answer = answer
        self._budget = budget
        self._counts = counts
        self._idle_s = idle_s
        self._most = most
        self._legs: OrderedDict[Client, _Leg] = OrderedDict()  # the one idle for longest is first
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def __len__(self) -> int:
        return len(self._legs)

    def datagram(self, client: Client, payload: bytes) -> None:
        """Send a client's datagram to the target, or drop and count it."""
        if self._closed:
            return
        leg = self._legs.get(client) or self._new(client)
        if leg is None:
            return
        leg.used = self._loop.time()
        self._legs.move_to_end(client)
        for _ in range(2):  # what an earlier datagram met is reported to, and costs, the next send
            try:
                leg.sock.send(payload)
                return
            except ConnectionRefusedError:
                continue
            except OSError:
                break
        self._counts["udp datagrams dropped"] += 1

    def _new(self, client: Client) -> _Leg | None:
        if len(self._legs) >= self._most:
            self._evict()
        if not self._budget.take():
            if not self._legs:
                self._counts["udp clients refused"] += 1
                return None
            self._evict()
            if not self._budget.take():
                return None
        sock = None
        try:
            sock = socket.socket(self._family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.connect(self._where)
        except OSError:
            if sock is not None:
                sock.close()
            self._budget.give()
            self._counts["udp clients refused"] += 1
            return None
        leg = self._legs[client] = _Leg(sock, self._loop.time())
        self._loop.add_reader(sock.fileno(), self._readable, client, leg)
        if self._timer is None:
            self._timer = self._loop.call_later(self._idle_s, self._expire)
        return leg

    def _readable(self, client: Client, leg: _Leg) -> None:
        for number in range(UDP_BATCH):
            try:
                payload = leg.sock.recv(65535)
            except ConnectionRefusedError:  # nobody listens yet
                self._watch_again(client, leg)
                continue
            except OSError:
                if not number:
                    self._watch_again(client, leg)
                return
            leg.used = self._loop.time()
            self._legs.move_to_end(client)
            self._answer(client, payload)
            if self._closed or client not in self._legs:
                return

    def _watch_again(self, client: Client, leg: _Leg) -> None:
        """libuv, and so uvloop, stops to watch a descriptor whose socket met an error, and says so by calling the reader."""
        self._loop.remove_reader(leg.sock.fileno())
        self._loop.add_reader(leg.sock.fileno(), self._readable, client, leg)

    def _evict(self) -> None:
        client = next(iter(self._legs))
        self._counts["udp clients evicted"] += 1
        self._drop(client)

    def _drop(self, client: Client) -> None:
        leg = self._legs.pop(client)
        self._loop.remove_reader(leg.sock.fileno())
        leg.sock.close()
        self._budget.give()

    def _expire(self) -> None:
        self._timer = None
        old = self._loop.time() - self._idle_s
        while self._legs and next(iter(self._legs.values())).used <= old:
            self._drop(next(iter(self._legs)))
        if self._legs:
            oldest = next(iter(self._legs.values())).used
            self._timer = self._loop.call_later(max(0.001, oldest - old), self._expire)

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for client in tuple(self._legs):
            self._drop(client)
