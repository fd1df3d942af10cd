"""Addresses fixed for a MAC by hand, in the settings or while the network runs, and the table of leases for people.

One that is given while the network runs is saved with the leases (`netstack.dhcp.records`); those of the settings are not, and
are not taken back here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from netstack.dhcp.table import Table, nobody
from netstack.errors import ConfigError
from netstack.settings import Network, format_mac

MAX_STATICS = 1024
"""Static leases given while the network runs, besides those of the settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Who has an address, for listings."""

    address: str
    mac: str
    hostname: str
    """As the guest calls itself; empty where it does not, or has not asked for the address yet."""
    static: bool
    """The address is the MAC's by the settings or by `add_static`."""
    expires_in_s: float | None
    """`None` for an address that is fixed and not leased now."""
    link: str | None
    """The link on which the guest was heard or has its lease; `None` while that is not known."""


class Statics(Table):
    """What `Leases` is on top of: a `Table` in which addresses are fixed and set free."""

    def __init__(self, network: Network, *, in_use: Callable[[bytes, bytes], bool] = nobody) -> None:
        super().__init__(network, in_use=in_use)
        self._subnet = network.network
        self._settled = frozenset(self._fixed_of)
        """MACs of the settings' static leases."""
        self._static = set(self._settled)
        """And of those given since."""
        self.on_static: Callable[[], None] = lambda: None
        """Called when a static lease was given or taken back: the table is worth saving."""

    def add_static(self, mac: bytes, address: bytes) -> None:
        """Keep an address for a MAC from now on, as the setting `static_leases` does; harmless when it is kept already.

        A guest that has another address loses it, which it hears when it renews, and is then given this one. Raises
        `ConfigError` for an address that cannot be anyone's or is somebody else's, and says whose.
        """
        text = f"static lease {format_mac(mac)} -> {ipaddress.IPv4Address(address)}"
        if len(mac) != 6 or mac[0] & 1 or not any(mac):
            raise ConfigError(f"{text}: no guest has that MAC; give the hardware address of its interface")
        if ipaddress.IPv4Address(address) not in self._subnet:
            raise ConfigError(f"{text}: the address is not in {self._subnet}; choose one of that network")
        if address in self._own:
            raise ConfigError(
                f"{text}: that is the network's own (gateway, host alias, network or broadcast); choose another"
            )
        owner = self._fixed.get(address, mac)
        if owner != mac:
            how = "a static lease" if owner in self._static else "its UUID (vmnet)"
            raise ConfigError(
                f"{text}: {format_mac(owner)} has the address by {how}; choose another, or remove that first"
            )
        if self._fixed_of.get(mac, address) != address:
            other = ipaddress.IPv4Address(self._fixed_of[mac])
            how = "a static lease" if mac in self._static else "its UUID (vmnet)"
            raise ConfigError(f"{text}: the MAC has {other} by {how}; remove that first")
        lease = self._leases.get(address)
        if lease is not None and lease.active and lease.mac != mac:
            name = f" ({lease.hostname})" if lease.hostname else ""
            raise ConfigError(
                f"{text}: leased to {format_mac(lease.mac)}{name}; choose another, or wait until that one is gone"
            )
        if mac in self._static:
            return
        if len(self._static) - len(self._settled) >= MAX_STATICS:
            raise ConfigError(f"{text}: there are {MAX_STATICS} already; remove one, or write them in the settings")
        self._make_static(mac, address)
        self.dirty = True
        self.on_static()

    def remove_static(self, mac: bytes) -> bool:
        """Take a static lease back that was given by `add_static`; False when there is none. What is leased stays so until it
        ends, but for an address outside of the pool, which the guest loses when it renews.

        Raises `ConfigError` for one of the settings.
        """
        if mac not in self._static:
            return False
        if mac in self._settled:
            raise ConfigError(
                f"static lease of {format_mac(mac)}: it is in the settings (static_leases); remove it there"
            )
        self._static.discard(mac)
        self.dirty = True
        if not self._reserved_too(mac):
            self._unfix(mac)
        self.on_static()
        return True

    def records(self, now: float, link_of: Callable[[bytes, bytes, Hashable | None], str | None]) -> list[LeaseRecord]:
        """Leases that hold at `now` and fixed addresses, by address. `link_of(address, mac, port)` names the link of who is
        there; `port` is that of the lease."""
        owners = dict(self._fixed) | {lease.address: lease.mac for lease in self.active(now)}
        found = []
        for address, mac in sorted(owners.items()):
            lease = self.at(address, now)
            found.append(
                LeaseRecord(
                    address=str(ipaddress.IPv4Address(address)),
                    mac=format_mac(mac),
                    hostname="" if lease is None else lease.hostname,
                    static=mac in self._static and self._fixed_of.get(mac) == address,
                    expires_in_s=None if lease is None else lease.expires - now,
                    link=link_of(address, mac, None if lease is None else lease.port),
                )
            )
        return found

    # How.

    def _reserved_too(self, mac: bytes) -> bool:
        """Whether the address of `mac` is fixed by a reservation as well."""
        raise NotImplementedError

    def _make_static(self, mac: bytes, address: bytes) -> None:
        """`address` is free for `mac`: nobody else has it leased or fixed."""
        self._static.add(mac)
        promised = self._offered.get(address)
        if promised is not None and promised != mac:
            self._withdraw(promised)
        self._withdraw(mac)
        set_aside = self._declined.pop(address, None)
        if set_aside is not None:
            self._let_go(set_aside[1], address)
        self._fix(mac, address, float("inf"))

    def _unfix(self, mac: bytes) -> None:
        """The address of `mac` is like any other from now on."""
        address = self._fixed_of.pop(mac)
        del self._fixed[address]
        lease = self._leases.get(address)
        if lease is None:
            self._freed(address)
        elif not self._in_pool(address):
            if lease.active:
                self._end(lease, lease.expires)
            self._forget(lease)
        elif not lease.active:
            self._remember(lease)
        elif lease.port is not None:
            self._held.setdefault(lease.port, {})[address] = None

    def _fix(self, mac: bytes, address: bytes, now: float) -> None:
        """Make an address that `mac` may have its own for good."""
        for lease in (self._leases.get(address), self._by_mac.get(mac)):
            if lease is not None and (lease.address, lease.mac) != (address, mac):
                if lease.active:  # the same MAC under another address, which ends with this
                    self._end(lease, now)
                self._forget(lease)
        self._fixed[address] = mac
        self._fixed_of[mac] = address
        self._idle.pop(address, None)
        lease = self._leases.get(address)
        if lease is not None:
            self._let_go(lease.port, address)
