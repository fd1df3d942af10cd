"""A published UDP port: datagrams from anywhere on the host's side to one guest endpoint, and its answers back.

Each peer that writes to the bound host socket appears to the guest as the gateway with a port of its own: its own port where
that is free, else the next free one. The guest answers to that port, an association leads back to the peer (conformance
X02). The peer's real address is shown only where that was asked for, and never the host's own loopback or an address of the
virtual network: a host program at 127.0.0.1 could not be answered there, and a guest must not take a remote for itself
(threats N7).

Peers end as mappings do: 90 s after the last datagram, or when newer ones of the same port evict them. A socket of a
published port is its owner's, so TTL and DF of the guest's answers are not carried on.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Endpoint
from netstack.host.udp_socket import Address, Association, GuestSocket, Route

if TYPE_CHECKING:
    from netstack.host.udp_proxy import UdpProxy

_FIRST_PORT: Final = 1024  # services and what guests trust live below
_PORTS: Final = 65536 - _FIRST_PORT


class Publication(GuestSocket):
    """See the module; a `netstack.api.Datagrams`."""

    def __init__(self, proxy: UdpProxy, sock: Any, guest: Endpoint, show_client: bool) -> None:
        sock.setblocking(False)
        super().__init__(proxy.wiring, sock, guest)
        self.proxy = proxy
        self._show_client = show_client and sock.family == socket.AF_INET
        self._next_port = 0

    def seen_as(self, remote: Address, now: float) -> Route | None:
        """A peer: known, or from now on."""
        known = self.associations.get(remote)
        if known is not None:
            return Route(known.destination, known.entry)
        proxy = self.proxy
        for entry in proxy.peers.make_room(self):
            proxy.wiring.counters.udp_evicted += 1
            self._end(entry.owner)
        destination = self._destination(remote)
        if destination is None:
            return None
        key = self._key(destination)
        neighbour = proxy.wiring.output.neighbour(self.guest.address)
        association = Association(key, self, remote, destination, None if neighbour is None else neighbour.port)
        association.entry = proxy.peers.open(key, self, association, now)
        proxy.associations[key] = association
        self.associations[remote] = association
        return Route(destination, association.entry)

    def set_mode(self, ttl: int, dont_fragment: bool) -> None:
        self.ttl, self.dont_fragment = ttl, dont_fragment

    def dropped(self, association: Association) -> None:
        super().dropped(association)
        self.proxy.peers.close(association.entry)

    def close(self) -> None:
        """End the published port and its socket; harmless when repeated."""
        if not self.closed:
            for association in tuple(self.associations.values()):
                self._end(association)
            if self in self.proxy.publications:
                self.proxy.publications.remove(self)
        super().close()

    def _end(self, association: Association) -> None:
        self.proxy.associations.pop(association.key, None)
        self.dropped(association)

    def _key(self, destination: Endpoint) -> bytes:
        guest = self.guest
        ports = guest.port.to_bytes(2, "big") + destination.port.to_bytes(2, "big")
        return guest.address + destination.address + ports

    def _destination(self, remote: Address) -> Endpoint | None:
        """What the guest is to answer to and means nothing to its endpoint yet: the peer itself, or a port of the gateway."""
        proxy = self.proxy
        if self._show_client and not remote[0].startswith("127."):
            seen = proxy.remote_seen_as(remote)
            if seen is not None and self._key(seen) not in proxy.associations:
                return seen
        gateway = proxy.wiring.network.gateway_bytes
        wanted = remote[1]
        for _ in range(_PORTS):
            found = Endpoint(gateway, wanted)
            if wanted >= _FIRST_PORT and self._key(found) not in proxy.associations:
                if (gateway, wanted) not in proxy.services:
                    return found
            wanted = _FIRST_PORT + self._next_port
            self._next_port = (self._next_port + 1) % _PORTS
        return None
