"""Who gets which address: the lease engine of one network, without I/O, clock or chance (RFC 2131 section 4.3.1).

Theory of operation. `netstack.dhcp.server` asks for an address to offer (`allot`) and makes it a lease when the client
wants it (`commit`); the vmnet link asks for one at its handshake (`reserve`), before there is any DHCP. `netstack.dhcp.table`
keeps the states of addresses and the bounds, `netstack.dhcp.statics` what is fixed by hand.

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
from netstack.dhcp.statics import LeaseRecord as LeaseRecord  # where others look for it
from netstack.dhcp.statics import Statics
from netstack.dhcp.table import DECLINED_S, OFFER_S, Lease, Offer, nobody
from netstack.errors import GuestError
from netstack.settings import Network

_RESERVED_MAC = b"\x02\x50"  # vpnkit.md section 2.4: 02:50: and a counter in network order


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


@dataclass(slots=True, eq=False, kw_only=True)
class _Reserved:
    reservation: Reservation
    attached: int = 0


class Leases(Statics):
    """The leases and reservations of `network`; see `Table` for `in_use` and the questions that may be asked."""

    def __init__(self, network: Network, *, in_use: Callable[[bytes, bytes], bool] = nobody) -> None:
        super().__init__(network, in_use=in_use)
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

    def _reserved_too(self, mac: bytes) -> bool:
        return any(reserved.reservation.mac == mac for reserved in self._reservations.values())

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
