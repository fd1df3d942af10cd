"""Ports of the gateway that lead elsewhere: VPNKit's gateway forwards (spec vpnkit 7.6).

A guest that addresses gateway:port reaches an endpoint as the host sees it. The host's operator named that endpoint, so no
egress rule is asked about it, and a forward goes before a service of ours at the same port. Pure: a table and its look-up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from netstack.api import Endpoint, GatewayForward

_NUMBERS: Final = {"tcp": 6, "udp": 17}


class GatewayForwards:
    """The table of one network."""

    def __init__(self) -> None:
        self.all: tuple[GatewayForward, ...] = ()
        """In order, those included that an earlier one hides."""
        self._table: dict[tuple[int, int], Endpoint] = {}

    def replace(self, forwards: Sequence[GatewayForward]) -> None:
        """Have these, in place of those before; of two for one port the first counts."""
        self.all = tuple(forwards)
        table: dict[tuple[int, int], Endpoint] = {}
        for forward in forwards:
            table.setdefault((_NUMBERS[forward.protocol], forward.port), forward.to)
        self._table = table

    def find(self, protocol: int, port: int) -> Endpoint | None:
        """Where the gateway's `port` leads; `protocol` is the IP protocol number."""
        return self._table.get((protocol, port))
