"""Which outgoing TCP connections go to a program on the host instead: VPNKit's `--forwards` (spec vpnkit 7.7).

Rules are looked at in order with the final numeric destination, so 127.0.0.1 for what the guest addressed to the host alias.
Pure. The egress policy decides what a rule may do about a destination that it refuses (`Egress.led`).
"""

from __future__ import annotations

from collections.abc import Sequence

from netstack.api import Endpoint, TunnelRule


class Tunnels:
    """The rules of one network."""

    def __init__(self) -> None:
        self.all: tuple[TunnelRule, ...] = ()
        self._compiled: tuple[tuple[int, int, int, int, TunnelRule], ...] = ()

    def __bool__(self) -> bool:
        return bool(self._compiled)

    def replace(self, rules: Sequence[TunnelRule]) -> None:
        """Have these, in place of those before."""
        self.all = tuple(rules)
        self._compiled = tuple(
            (
                rule.prefix.max_prefixlen // 8,
                int(rule.prefix.netmask),
                int(rule.prefix.network_address),
                rule.port,
                rule,
            )
            for rule in rules
        )

    def find(self, destination: Endpoint) -> TunnelRule | None:
        """The first rule that takes `destination`. Linear: rules are few, and asked once per connection."""
        octets = len(destination.address)
        number = int.from_bytes(destination.address, "big")
        for length, mask, network, port, rule in self._compiled:
            if length == octets and number & mask == network and port in (0, destination.port):
                return rule
        return None
