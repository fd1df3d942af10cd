"""Who is where: a guest's address, its MAC, and the port it is behind.

Learnt from what guests send (ARP and IPv4 sources), never asked for unless a packet must go to an address not seen yet.

An address belongs to whom it is leased: nobody else's claim holds against that. Of addresses nobody leased the first to use
one keeps it while its port lives, so one guest cannot take another's. Nor can it take all that are free: a port has at most
`CLAIMS_PER_PORT`, then its own oldest that no flow uses goes, and a full table takes from the port that has most
(threats-and-faults G16).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Final, Protocol

from netstack.iface.switch import Port
from netstack.observe.metrics import Drop

ASK_AGAIN_S: Final = 1.0
ASK_TIMES: Final = 3
WAITING_PACKETS: Final = 16
"""Packets kept per unresolved address."""
CLAIMS_PER_PORT: Final = 64
"""Addresses of one port; one guest has few, a guest that routes for others (`routed`) more."""


class Lease(Protocol):
    """Whose an address is."""

    @property
    def mac(self) -> bytes: ...
    @property
    def port(self) -> Hashable | None:
        """The port it was taken on; `None` while that is not known."""
        ...


class Neighbour:
    """One guest address. `version` moves on whenever MAC or port change: cached headers compare it."""

    __slots__ = ("__weakref__", "ip", "mac", "port", "version")

    def __init__(self, ip: bytes, mac: bytes, port: Port | None) -> None:
        self.ip = ip
        self.mac = mac
        self.port = port
        self.version = 0


class Neighbours:
    """The table; `limit` addresses at most. `lease` tells whose an address is now."""

    def __init__(self, limit: int, drops: Counter[str], lease: Callable[[bytes], Lease | None]) -> None:
        self._limit = limit
        self._drops = drops
        self._lease = lease
        self._table: dict[bytes, Neighbour] = {}
        """Oldest claims first."""

    def get(self, ip: bytes) -> Neighbour | None:
        return self._table.get(ip)

    def all(self) -> list[Neighbour]:
        return list(self._table.values())

    def learn(self, ip: bytes, mac: bytes, port: Port) -> Neighbour | None:
        """The neighbour that `ip` is, now known to be `mac` behind `port`; `None` when it may not be."""
        known = self._table.get(ip)
        if known is not None and known.port is port and known.mac == mac:
            return known
        if not self._may_claim(known, self._lease(ip), mac, port):
            self._drops[Drop.FRAME_SOURCE] += 1
            return None
        if (known is None or known.port is not port) and not self._room_for(port, new=known is None):
            self._drops[Drop.NEIGHBOUR_LIMIT] += 1
            return None
        if known is not None:
            known.mac, known.port = mac, port
            known.version += 1
        else:
            known = self._table[ip] = Neighbour(ip, mac, port)
        return known

    @staticmethod
    def _may_claim(known: Neighbour | None, lease: Lease | None, mac: bytes, port: Port) -> bool:
        if lease is not None and lease.port is not None:
            return _same_guest(lease.port, port)
        if known is None or known.port is None or _same_guest(known.port, port):
            return True
        return lease is not None and lease.mac == mac

    def _room_for(self, port: Port, *, new: bool) -> bool:
        """Whether `port` may have one address more; what must go for it is forgotten."""
        held: Counter[Port | None] = Counter(neighbour.port for neighbour in self._table.values())
        if held[port] >= CLAIMS_PER_PORT:
            return self._forget_one(port)
        if not new or len(self._table) < self._limit:
            return True
        if held[None] and self._forget_one(None):
            return True
        del held[None]
        return bool(held) and self._forget_one(held.most_common(1)[0][0])

    def _forget_one(self, port: Port | None) -> bool:
        """Forget the oldest claim of `port` that nobody uses: a flow holds its neighbour, which then outlives its place here."""
        for ip in [ip for ip, neighbour in self._table.items() if neighbour.port is port]:
            place = weakref.ref(self._table.pop(ip))
            used = place()
            if used is None:
                return True
            self._table[ip] = used
        return False

    def port_lost(self, port: Port) -> list[Neighbour]:
        """`port` is gone: its neighbours stay known without a port, so that they find their flows when they return."""
        lost = [neighbour for neighbour in self._table.values() if neighbour.port is port]
        for neighbour in lost:
            neighbour.port = None
            neighbour.version += 1
        return lost


def _same_guest(holder: object, port: Port) -> bool:
    return holder is port or (isinstance(holder, Port) and holder.same_guest(port))
