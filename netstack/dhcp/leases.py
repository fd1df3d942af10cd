"""Who gets which address: the lease engine of one network, without I/O, clock or chance (RFC 2131 section 4.3.1).

Theory of operation. `netstack.dhcp.server` asks for an address to offer (`allot`) and makes it a lease when the client
wants it (`commit`); the vmnet link asks for one at its handshake (`reserve`), before there is any DHCP. `netstack.dhcp.table`
keeps the states of addresses and the bounds.

A client is its MAC, and the client identifier comes second: one MAC with several identifiers is one machine that boots in
stages, while one identifier with several MACs is cloned disks, and two machines must not share an address. So an
identifier only helps a new MAC to an address whose lease has ended.

`now` is seconds on any clock that never goes back; `port` is any hashable value but `None` that stands for the guest's
link. Who saves the table looks at `dirty`, and takes a `snapshot`.
"""

from __future__ import annotations

import ipaddress
import uuid
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from netstack.dhcp.records import (
    MAX_CLIENT_ID,
    MAX_IDENTITY,
    SavedLease,
    SavedReservation,
    SavedState,
    SavedStatic,
    read_state,
    write_state,
)
from netstack.dhcp.table import DECLINED_S, OFFER_S, Lease, Offer, Table, nobody
from netstack.errors import ConfigError, GuestError
from netstack.settings import Network, format_mac

_RESERVED_MAC = b"\x02\x50"  # vpnkit.md section 2.4: 02:50: and a counter in network order


MAX_STATICS = 1024
"""Static leases given while the network runs, besides those of the settings."""


class ReservationRefused(GuestError):
    """No address at the vmnet handshake; the text is the reason VPNKit sends with Disconnect (vpnkit.md section 2.2)."""


class PreferredOutOfRange(ReservationRefused):
    def __init__(self) -> None:
        super().__init__("Preferred IP address out of range.")


class PreferredInUse(ReservationRefused):
    def __init__(self, address: bytes) -> None:
        super().__init__(f"Preferred IP address {ipaddress.IPv4Address(address)} already used.")


class PoolExhausted(ReservationRefused):
    def __init__(self) -> None:
        super().__init__("No IP addresses available.")


class IdentityConflict(ReservationRefused):
    def __init__(self) -> None:
        super().__init__("UUID already assigned to a different IP than the IP requested by the client")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """Address and MAC of a vmnet client, the same for its UUID whenever it comes."""

    address: bytes
    mac: bytes


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
    """The link on which the guest was heard; `None` while it was not."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Reserved:
    reservation: Reservation
    attached: int = 0


class Leases(Table):
    """The leases and reservations of `network`; see `Table` for `in_use` and the questions that may be asked."""

    def __init__(self, network: Network, *, in_use: Callable[[bytes, bytes], bool] = nobody) -> None:
        super().__init__(network, in_use=in_use)
        self._subnet = network.network
        self._settled = frozenset(self._fixed_of)
        """MACs of the settings' static leases."""
        self._static = set(self._settled)
        """And of those given since."""
        self.on_static: Callable[[], None] = lambda: None
        """Called when a static lease was given or taken back: the table is worth saving."""
        self._reservations: dict[str, _Reserved] = {}
        self._counter = 0

    # What the DHCP server does.

    def allot(
        self, mac: bytes, *, client_id: bytes, requested: bytes | None, port: Hashable, lease_s: int, now: float
    ) -> bytes | None:
        """The address to offer to a client, held for it; `None` when its port or the pool has none left.

        In order of RFC 2131 section 4.3.1: the one fixed, leased or offered to it, the one it had, the one it asks for if
        that was never leased, the lowest that was never leased, and at last the one whose lease ended first.
        """
        self.expire(now)
        lease = self._by_mac.get(mac)
        address = self._fixed_of.get(mac)
        if address is None and lease is not None and lease.active:
            return lease.address
        if address is None:
            before = self._offers.get(mac)
            candidates = [] if before is None else [before.address]
            candidates += [] if lease is None else [lease.address]
            candidates += self._address_of_client(client_id)
            self._withdraw(mac)
            if not self._make_room(port):
                return None
            address = next((candidate for candidate in candidates if self._usable(candidate, mac)), None)
            if (
                address is None
                and requested is not None
                and self._unused(requested)
                and not self._in_use(requested, mac)
            ):
                address = requested
            if address is None:
                address = self._pick(mac) or self._reclaim()
            if address is None:
                return None
            self._offered[address] = mac
            self._held.setdefault(port, {})[address] = None
        self._offers.pop(mac, None)
        self._offers[mac] = Offer(address=address, port=port, until=now + OFFER_S, lease_s=lease_s)
        return address

    def offered_s(self, mac: bytes) -> int | None:
        """The lease time in seconds of the offer that waits for a client's REQUEST."""
        offer = self._offers.get(mac)
        return None if offer is None else offer.lease_s

    def commit(
        self,
        mac: bytes,
        address: bytes,
        *,
        client_id: bytes = b"",
        hostname: str = "",
        port: Hashable,
        lease_s: int,
        now: float,
    ) -> Lease | None:
        """Lease `address` to a client for `lease_s` seconds from `now`; `None` when it is not the client's to have.

        A client we know gets only the address that is its own. One we know nothing of may keep an address that was never
        leased: after the loss of the lease file, guests that renew keep what they have.
        """
        self.expire(now)
        lease = self._by_mac.get(mac)
        if not self._may_have(mac, address, client_id):
            return None
        if lease is None or not lease.active:
            offer = self._offers.get(mac)
            fixed = address in self._fixed
            if not fixed and (offer is None or offer.port != port) and not self._make_room(port):
                return None
            self._withdraw(mac)
            if lease is not None and lease.address != address:
                self._forget(lease)
                lease = None
            occupant = self._leases.get(address)
            if occupant is not None and occupant is not lease:
                self._forget(occupant)  # idle: `_may_have` saw to that
            if lease is None:
                lease = Lease(address=address, mac=mac, expires=now)
                self._leases[address] = self._by_mac[mac] = lease
            lease.active = True
            lease.port = None
            self._idle.pop(address, None)
        if address in self._fixed:
            lease.port = port
        elif lease.port is None and self.held(port) < self._limit:
            lease.port = port
            self._held.setdefault(port, {})[address] = None
        if client_id != lease.client_id and 0 < len(client_id) <= MAX_CLIENT_ID:
            if self._by_client.get(lease.client_id) is lease:
                del self._by_client[lease.client_id]
            lease.client_id = client_id
            self._by_client[client_id] = lease
        lease.hostname = hostname or lease.hostname
        lease.expires = now + lease_s
        self._next_expiry = min(self._next_expiry, lease.expires)
        self.dirty = True
        return lease

    def refuse(self, mac: bytes) -> None:
        """The client took another server's offer."""
        self._withdraw(mac)

    def release(self, mac: bytes, address: bytes, *, port: Hashable, now: float) -> bool:
        """The client gives its lease back; it is remembered. `False` when there is no such lease on this port."""
        lease = self._own_lease(mac, address, port)
        if lease is None:
            return False
        self._end(lease, now)
        return True

    def decline(self, mac: bytes, address: bytes, *, port: Hashable, now: float) -> bool:
        """The client found its address in use: nobody gets it for a while. `False` when it is no lease on this port.

        A fixed address is only released, since its owner can have no other.
        """
        lease = self._own_lease(mac, address, port)
        if lease is None:
            return False
        self._end(lease, now)
        if address not in self._fixed:
            self._forget(lease)
            self._declined[address] = (now + DECLINED_S, port)
            if self._make_room(port):
                self._held.setdefault(port, {})[address] = None
        return True

    def _own_lease(self, mac: bytes, address: bytes, port: Hashable) -> Lease | None:
        """Its active lease, unless another port holds it: a guest must not end another one's lease under its MAC."""
        lease = self._by_mac.get(mac)
        if lease is None or not lease.active or lease.address != address or lease.port not in (None, port):
            return None
        return lease

    # What the control API does.

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
        if not any(reserved.reservation.mac == mac for reserved in self._reservations.values()):
            self._unfix(mac)
        self.on_static()
        return True

    def records(self, now: float, link_of: Callable[[bytes, bytes], str | None]) -> list[LeaseRecord]:
        """Leases that hold at `now` and fixed addresses, by address. `link_of(address, mac)` names the link of who is there."""
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
                    link=link_of(address, mac),
                )
            )
        return found

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

    # What the vmnet handshake does.

    def reserve(self, identity: str, preferred: bytes | None, mac: bytes | None, now: float) -> Reservation:
        """Address and MAC for the vmnet client `identity` (vpnkit.md section 2.4), the same whenever it comes back.

        `identity` is its UUID; two spellings of one UUID are one identity. Without `mac` a new client gets 02:50: and a
        counter. Each call attaches it once; `detach` is the opposite. Raises the four `ReservationRefused`.
        """
        self.expire(now)
        identity = _canonical(identity)
        reserved = self._reservations.pop(identity, None)
        if reserved is None:
            reserved = _Reserved(reservation=self._new_reservation(preferred, mac, now))
        self._reservations[identity] = reserved  # last in order: used last
        if preferred not in (None, reserved.reservation.address):
            raise IdentityConflict
        reserved.attached += 1
        return reserved.reservation

    def detach(self, identity: str) -> None:
        """One connection of a vmnet client ended. Its address stays reserved until the pool has no other one left."""
        identity = _canonical(identity)
        reserved = self._reservations.pop(identity, None)
        if reserved is not None:
            reserved.attached = max(0, reserved.attached - 1)
            self._reservations[identity] = reserved

    def _new_reservation(self, preferred: bytes | None, mac: bytes | None, now: float) -> Reservation:
        self.dirty = True
        if mac is None:
            self._counter = (self._counter + 1) % 2**32  # spent even if there is no address, as in VPNKit
            mac = _RESERVED_MAC + self._counter.to_bytes(4, "big")
        address = self._fixed_of.get(mac)
        if address is not None:
            if preferred not in (None, address):
                raise IdentityConflict
            return Reservation(address=address, mac=mac)
        lease = self._by_mac.get(mac)
        if preferred is not None:
            if not self._first <= int.from_bytes(preferred, "big") <= self._last:
                raise PreferredOutOfRange
            if not self._usable(preferred, mac):
                raise PreferredInUse(preferred)
            address = preferred
        elif lease is not None and self._usable(lease.address, mac):
            address = lease.address
        else:
            address = self._pick(mac) or self._reclaim()
            if address is None:
                raise PoolExhausted
        self._withdraw(mac)
        self._fix(mac, address, now)
        return Reservation(address=address, mac=mac)

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

    def _reclaim(self) -> bytes | None:
        """Free the address of the reservation unused for longest, if any is neither attached nor leased."""
        for reserved in self._reservations.values():
            mac, address = reserved.reservation.mac, reserved.reservation.address
            lease = self._leases.get(address)
            attached = any(other.attached for other in self._reservations.values() if other.reservation.mac == mac)
            if attached or mac in self._static or (lease is not None and lease.active):
                continue
            self._reservations = {
                identity: other for identity, other in self._reservations.items() if other.reservation.mac != mac
            }
            del self._fixed[address], self._fixed_of[mac]
            if lease is not None:
                self._forget(lease)
            self._withdraw(mac)
            self._freed(address)
            return address
        return None

    # Across a restart.

    def snapshot(self, *, now: float, now_wall: float) -> dict[str, object]:
        """Leases, also ended ones, and reservations as a JSON document; `now_wall` is seconds since 1970 at `now`."""
        state = SavedState(
            counter=self._counter,
            leases=tuple(
                SavedLease(
                    address=lease.address,
                    mac=lease.mac,
                    client_id=lease.client_id,
                    hostname=lease.hostname,
                    expires=round(lease.expires - now + now_wall, 3),
                    active=lease.active,
                )
                for lease in self._leases.values()
            ),
            reservations=tuple(
                SavedReservation(identity=identity, address=item.reservation.address, mac=item.reservation.mac)
                for identity, item in self._reservations.items()
            ),
            statics=tuple(
                SavedStatic(address=self._fixed_of[mac], mac=mac) for mac in sorted(self._static - self._settled)
            ),
        )
        return write_state(state)

    def restore(self, document: object, *, now: float, now_wall: float) -> None:
        """Take over a `snapshot`, into a table that is still empty. Raises `Malformed` and then has changed nothing.

        What the settings no longer allow (another pool, an address that is now fixed to someone else) is left out. A lease
        never lasts longer than a new one would, whatever became of the wall clock.
        """
        state = read_state(document)
        self._counter = state.counter
        for static in state.statics:
            allowed = ipaddress.IPv4Address(static.address) in self._subnet and static.address not in self._own
            if allowed and static.address not in self._fixed and static.mac not in self._fixed_of:
                self._make_static(static.mac, static.address)
        for item in state.reservations:
            address = self._fixed_of.get(item.mac, item.address)
            if self._fixed_of.get(item.mac) is None:
                if not self._unused(address):
                    continue
                self._fix(item.mac, address, now)
            self._reservations[_canonical(item.identity)] = _Reserved(
                reservation=Reservation(address=address, mac=item.mac)
            )
        for saved in sorted(state.leases, key=lambda saved: saved.expires):
            fixed = self._fixed_of.get(saved.mac)
            allowed = saved.address == fixed if fixed is not None else self._unused(saved.address)
            if not allowed or saved.mac in self._by_mac or saved.address in self._leases:
                continue
            lease = Lease(
                address=saved.address,
                mac=saved.mac,
                client_id=saved.client_id,
                hostname=saved.hostname,
                expires=now + min(saved.expires - now_wall, self._lease_s),
                active=saved.active and saved.expires > now_wall,
            )
            self._leases[lease.address] = self._by_mac[lease.mac] = lease
            if lease.client_id:
                self._by_client[lease.client_id] = lease
            if lease.active:
                self._next_expiry = min(self._next_expiry, lease.expires)
            else:
                self._remember(lease)


def _canonical(identity: str) -> str:
    """One spelling for a UUID; any other identity as it is, cut to what is kept."""
    try:
        return str(uuid.UUID(identity))
    except ValueError:
        return identity[:MAX_IDENTITY]
