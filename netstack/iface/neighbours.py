"""Who is where: a guest's address, its MAC, and the port it is behind.

Learnt from what guests send (ARP and IPv4 sources), never asked for unless a packet must go to an address not seen yet. The
first to use an address keeps it while its port lives, so one guest cannot take another's; the table is bounded.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

from netstack.iface.switch import Port
from netstack.observe.metrics import Drop

ASK_AGAIN_S: Final = 1.0
ASK_TIMES: Final = 3
WAITING_PACKETS: Final = 16
"""Packets kept per unresolved address."""


class Neighbour:
    """One guest address. `version` moves on whenever MAC or port change: cached headers compare it."""

    __slots__ = ("ip", "mac", "port", "version")

    def __init__(self, ip: bytes, mac: bytes, port: Port | None) -> None:
        self.ip = ip
        self.mac = mac
        self.port = port
        self.version = 0


class Neighbours:
    """The table; `limit` addresses at most."""

    def __init__(self, limit: int, drops: Counter[str]) -> None:
        self._limit = limit
        self._drops = drops
        self._table: dict[bytes, Neighbour] = {}

    def get(self, ip: bytes) -> Neighbour | None:
        return self._table.get(ip)

    def all(self) -> list[Neighbour]:
        return list(self._table.values())

    def learn(self, ip: bytes, mac: bytes, port: Port) -> Neighbour | None:
        """The neighbour that `ip` is, now known to be `mac` behind `port`; `None` when it may not be."""
        known = self._table.get(ip)
        if known is not None:
            if known.port is port and known.mac == mac:
                return known
            if known.port is not None and known.port is not port and not known.port.same_guest(port):
                self._drops[Drop.FRAME_SOURCE] += 1
                return None
            known.mac, known.port = mac, port
            known.version += 1
            return known
        if len(self._table) >= self._limit and not self._forget_one():
            self._drops[Drop.NEIGHBOUR_LIMIT] += 1
            return None
        known = self._table[ip] = Neighbour(ip, mac, port)
        return known

    def _forget_one(self) -> bool:
        for ip, neighbour in self._table.items():
            if neighbour.port is None:
                del self._table[ip]
                return True
        return False

    def port_lost(self, port: Port) -> list[Neighbour]:
        """`port` is gone: its neighbours stay known without a port, so that they find their flows when they return."""
        lost = [neighbour for neighbour in self._table.values() if neighbour.port is port]
        for neighbour in lost:
            neighbour.port = None
            neighbour.version += 1
        return lost
