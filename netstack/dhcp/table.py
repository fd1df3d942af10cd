"""Which state each address of a network is in: the tables under `netstack.dhcp.leases`, which decides who gets one.

Four tables hold an address, and it is in at most one state of them for anyone else:

* fixed: static leases of the settings and reservations, address and MAC for good. Never given to another MAC.
* leases: one for each MAC, *active* until it expires or is released, then *idle*: remembered, so that the same MAC gets
  the same address while nobody else needed it.
* offers: promises of 30 s. They hold the address back but change nothing else, so a flood of DISCOVERs undoes no lease.
* declined: addresses a client found in use, set aside for 600 s.

Bounds (threats-and-faults.md G24). A port holds at most `limits.max_leases_per_port` of leases, offers and declined
addresses together; at the limit its own oldest offer goes, else the newcomer gets nothing. An active lease is never taken
away. Idle leases are reused oldest first, and only when no address is left that was never leased; at most `MAX_IDLE` are
remembered. Fixed addresses do not count.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass

from netstack.errors import ConfigError
from netstack.settings import Network, format_mac, parse_ipv4, parse_mac

OFFER_S = 30.0
"""How long an offered address is held back for the client."""
DECLINED_S = 600.0
"""How long an address that a client found in use is set aside."""
MAX_IDLE = 4096
"""Ended leases remembered; beyond it the one that ended first is forgotten."""


@dataclass(slots=True, eq=False, kw_only=True)
class Lease:
    """An address and whose it is. Others read it; only `Leases` changes it."""

    address: bytes
    mac: bytes
    client_id: bytes = b""
    """Option 61, empty when the client sent none."""
    hostname: str = ""
    """Letters, digits and hyphens, at most 63, as the client calls itself; may be empty."""
    expires: float
    """When it ends, or for an idle lease when it ended."""
    active: bool = True
    port: Hashable | None = None
    """The link it was taken on; `None` after a restart or when the link is gone, until the guest is heard again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An address promised to a client on `port` for `lease_s` seconds, held back until `until`."""

    address: bytes
    port: Hashable
    until: float
    lease_s: int


def nobody(_address: bytes, _mac: bytes) -> bool:
    """The `in_use` of a network that watches no neighbours."""
    return False


class Table:
    """The addresses of `network`. Raises `ConfigError` for static leases that cannot hold.

    `in_use(address, mac)` may tell that another MAC than `mac` was seen with an address without having leased it; such an
    address is then given out last.
    """

    def __init__(self, network: Network, *, in_use: Callable[[bytes, bytes], bool] = nobody) -> None:
        first, last = network.pool
        self._first, self._last = int(first), int(last)
        self._cursor = self._first
        """No address below it is free and never leased."""
        self._limit = network.limits.max_leases_per_port
        self._lease_s = network.lease_s
        self._in_use = in_use
        self._own = {network.network.network_address.packed, network.network.broadcast_address.packed}
        self._own |= network.own_addresses
        self._fixed: dict[bytes, bytes] = {}
        self._fixed_of: dict[bytes, bytes] = {}
        for mac_text, address_text in network.static_leases.items():
            self._fix_static(parse_mac(mac_text), parse_ipv4(address_text, "static_leases"))
        self._leases: dict[bytes, Lease] = {}
        self._by_mac: dict[bytes, Lease] = {}
        self._by_client: dict[bytes, Lease] = {}
        self._idle: dict[bytes, None] = {}
        self._offers: dict[bytes, Offer] = {}
        self._offered: dict[bytes, bytes] = {}
        self._declined: dict[bytes, tuple[float, Hashable]] = {}
        self._held: dict[Hashable, dict[bytes, None]] = {}
        self._next_expiry = float("inf")
        self._ended: list[Lease] = []
        self.dirty = False
        """Something worth saving changed; whoever saves clears it."""

    def _fix_static(self, mac: bytes, address: bytes) -> None:
        text = f"static_leases: {format_mac(mac)} -> {ipaddress.IPv4Address(address)}"
        if address in self._own:
            raise ConfigError(
                f"{text} is the network's own (gateway, host alias, network or broadcast); choose another"
            )
        if self._fixed.get(address, mac) != mac or self._fixed_of.get(mac, address) != address:
            raise ConfigError(f"{text} contradicts another one; give each MAC one address and each address one MAC")
        self._fixed[address] = mac
        self._fixed_of[mac] = address

    # What others ask.

    def active(self, now: float) -> Iterator[Lease]:
        """The leases that hold at `now`, in the order in which they were first given."""
        return (lease for lease in self._leases.values() if lease.active and lease.expires > now)

    def at(self, address: bytes, now: float) -> Lease | None:
        """The lease that holds on an address."""
        lease = self._leases.get(address)
        return lease if lease is not None and lease.active and lease.expires > now else None

    def named(self, hostname: str, now: float) -> Lease | None:
        """The lease of the guest that calls itself so (case does not count); of two, the one that was there first."""
        wanted = hostname.casefold()
        named = (lease for lease in self.active(now) if lease.hostname and lease.hostname.casefold() == wanted)
        return next(named, None)

    def reserved(self, mac: bytes) -> bytes | None:
        """The address fixed for a MAC by the settings or by a reservation."""
        return self._fixed_of.get(mac)

    def held(self, port: Hashable) -> int:
        """How many addresses count against a port: leases, offers and declined ones."""
        return len(self._held.get(port, ()))

    def ended(self) -> list[Lease]:
        """Leases that were released, declined or expired since the last call."""
        ended, self._ended = self._ended, []
        return ended

    # Time.

    def deadline(self) -> float | None:
        """When `expire` is next wanted; `None` when nothing will end."""
        times = [self._next_expiry]
        for offer in self._offers.values():  # all are held equally long, so the first one made ends first
            times.append(offer.until)
            break
        for until, _port in self._declined.values():
            times.append(until)
            break
        earliest = min(times)
        return None if earliest == float("inf") else earliest

    def expire(self, now: float) -> None:
        """End what is over at `now`; the leases among it are in `ended()`."""
        while self._offers:
            mac, offer = next(iter(self._offers.items()))
            if offer.until > now:
                break
            self._withdraw(mac)
        while self._declined:
            address, (until, port) = next(iter(self._declined.items()))
            if until > now:
                break
            del self._declined[address]
            self._let_go(port, address)
            self._freed(address)
        if now >= self._next_expiry:
            for lease in [lease for lease in self._by_mac.values() if lease.active and lease.expires <= now]:
                self._end(lease, now)
            self._next_expiry = min(
                (lease.expires for lease in self._by_mac.values() if lease.active), default=float("inf")
            )

    def forget_port(self, port: Hashable) -> None:
        """A link is gone: its offers are withdrawn; its leases stay and belong to the link where the guest is next heard."""
        for address in self._held.pop(port, {}):
            if address in self._offered:
                self._withdraw(self._offered[address])
        for lease in self._by_mac.values():
            if lease.port == port:
                lease.port = None

    # Addresses and the states they are in.

    def _in_pool(self, address: bytes) -> bool:
        return self._first <= int.from_bytes(address, "big") <= self._last and address not in self._own

    def _unused(self, address: bytes) -> bool:
        """In the pool, and in no table."""
        return self._in_pool(address) and not (
            address in self._fixed or address in self._leases or address in self._offered or address in self._declined
        )

    def _usable(self, address: bytes, mac: bytes) -> bool:
        """Whether `mac` may have an address: its own or free, be it that an ended lease of someone is remembered."""
        if address in self._fixed:
            return self._fixed[address] == mac
        lease = self._leases.get(address)
        return (
            self._in_pool(address)
            and address not in self._declined
            and self._offered.get(address, mac) == mac
            and (lease is None or not lease.active or lease.mac == mac)
        )

    def _may_have(self, mac: bytes, address: bytes, client_id: bytes) -> bool:
        fixed = self._fixed_of.get(mac)
        if fixed is not None:
            return address == fixed
        lease = self._by_mac.get(mac)
        if lease is not None and lease.active:
            return address == lease.address
        offer = self._offers.get(mac)
        if offer is not None:
            return address == offer.address and self._usable(address, mac)
        had = [lease.address] if lease is not None else self._address_of_client(client_id)
        return (address in had and self._usable(address, mac)) or (not had and self._unused(address))

    def _address_of_client(self, client_id: bytes) -> list[bytes]:
        """The address of an ended lease with this client identifier, if there is one."""
        lease = self._by_client.get(client_id)
        return [] if lease is None or lease.active else [lease.address]

    def _pick(self, mac: bytes) -> bytes | None:
        """An address for a client without any."""
        last_resort = None
        for number in range(self._cursor, self._last + 1):
            address = number.to_bytes(4, "big")
            if not self._unused(address):
                if number == self._cursor:
                    self._cursor += 1
            elif not self._in_use(address, mac):
                return address
            elif last_resort is None:
                last_resort = address
        idle = next((address for address in self._idle if address not in self._offered), None)
        return idle or last_resort

    def _make_room(self, port: Hashable) -> bool:
        """Whether a port may hold one address more, if need be after its oldest offer is withdrawn."""
        held = self._held.get(port, {})
        if len(held) < self._limit:
            return True
        for address in held:
            if address in self._offered:
                self._withdraw(self._offered[address])
                return True
        return False

    def _withdraw(self, mac: bytes) -> None:
        offer = self._offers.pop(mac, None)
        if offer is not None and self._offered.pop(offer.address, None) is not None:
            self._let_go(offer.port, offer.address)
            self._freed(offer.address)

    def _let_go(self, port: Hashable | None, address: bytes) -> None:
        """An address no longer counts against a port."""
        held = self._held.get(port)
        if held is not None:
            held.pop(address, None)
            if not held:
                del self._held[port]

    def _freed(self, address: bytes) -> None:
        number = int.from_bytes(address, "big")
        if self._first <= number < self._cursor:
            self._cursor = number

    def _end(self, lease: Lease, now: float) -> None:
        """An active lease becomes a remembered one."""
        self._let_go(lease.port, lease.address)
        lease.active = False
        lease.port = None
        lease.expires = min(lease.expires, now)
        self._ended.append(lease)
        self._remember(lease)
        self.dirty = True

    def _remember(self, lease: Lease) -> None:
        if lease.address in self._fixed:
            return
        self._idle[lease.address] = None
        if len(self._idle) > MAX_IDLE:
            self._forget(self._leases[next(iter(self._idle))])

    def _forget(self, lease: Lease) -> None:
        """Remove every trace of a lease."""
        self._let_go(lease.port, lease.address)
        if self._leases.get(lease.address) is lease:
            del self._leases[lease.address]
        if self._by_mac.get(lease.mac) is lease:
            del self._by_mac[lease.mac]
        if self._by_client.get(lease.client_id) is lease:
            del self._by_client[lease.client_id]
        self._idle.pop(lease.address, None)
        self._freed(lease.address)
        self.dirty = True
