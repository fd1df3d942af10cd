"""UDP of the guests: services on our own addresses, and one host socket per guest source for all the rest.

Who calls: the interface hands datagrams of known (source, destination) pairs straight to an `Association` in `associations`,
everything else to `input`; the sockets call back through `HostIO`; the stack calls `expire` at `deadline`.

A mapping (RFC 4787) belongs to a guest address and port whatever the destination, so it looks the same to every remote and
hole punching works; its replies carry the remote's real address, with the host's loopback shown as the host alias.
A port of the gateway that is forwarded elsewhere has mappings of its own, whose replies come from that port.
Filtering is endpoint-independent too, as VPNKit's, unless `udp_filtering: endpoint`. Mappings end 90 s after the last
datagram in either direction, 5 s after the answer of a DNS or NTP exchange, when evicted by newer ones of the same guest,
or when the guest says that nobody listens there any more; then the port is closed, and a remote that goes on hears so from
the host's kernel.

Example: 192.168.65.3:4000 sends to 192.168.65.2:9. `input` asks `Egress`, which rewrites to 127.0.0.1:9; a socket is opened,
the datagram goes out, and the association is kept. Nobody listens: the kernel queues ECONNREFUSED, and the guest receives
port unreachable from 192.168.65.2 with its datagram quoted.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

from netstack.api import Clock, DatagramHandler, Endpoint, Reply
from netstack.errors import Malformed
from netstack.flow.records import FlowRecord, flow_id, local_end
from netstack.host import error_queue
from netstack.host.io import HostIO
from netstack.host.udp_publish import Publication
from netstack.host.udp_socket import Address, Association, GuestSocket, Route, Wiring
from netstack.observe.events import EventBus, FlowClosed, FlowOpened, FlowRefused
from netstack.observe.metrics import Counters, Drop
from netstack.policy.egress import Answer, Deny, Egress, Rewrite
from netstack.settings import Network
from netstack.udp.nat import Entry, Table
from netstack.wire import icmp, udp

if TYPE_CHECKING:
    from netstack.iface.interface import Packet
    from netstack.iface.output import Output

_PROTOCOL: Final = 17
ASSOCIATIONS_PER_MAPPING: Final = 256
"""Destinations remembered per guest source; a forgotten one takes the general way once more."""
ASSOCIATIONS: Final = 16384
"""The same for all guests together."""
_REFUSALS_TOLD: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class UdpFlow:
    """One mapping or one peer of a published port, for listings. Times are the stack's clock, seconds."""

    guest: Endpoint
    remotes: tuple[Endpoint, ...]
    """As the guest addresses them."""
    direction: str
    opened: float
    used: float
    expires: float
    octets_outbound: int
    octets_inbound: int


class Mapping(GuestSocket):
    """One guest source and its host socket."""

    def __init__(self, proxy: UdpProxy, sock: Any, guest: Endpoint) -> None:
        super().__init__(proxy.wiring, sock, guest)
        self.proxy = proxy
        self.entry: Entry[Mapping] | None = None
        self.contacted: dict[Address, None] = {}
        """Remotes the guest spoke to, kept where only they may answer."""

    def seen_as(self, remote: Address, now: float) -> Route | None:
        proxy, entry = self.proxy, self.entry
        if entry is None or (proxy.endpoint_filtering and remote not in self.contacted):
            return None
        known = self.associations.get(remote)
        source = proxy.remote_seen_as(remote) if known is None else known.destination
        return None if source is None else Route(source, entry)


class UdpProxy:
    """See the module. `egress` decides on new associations; `clock` is the stack's, for what no caller gives a time to."""

    def __init__(
        self,
        network: Network,
        io: HostIO,
        output: Output,
        egress: Egress,
        counters: Counters,
        events: EventBus,
        clock: Clock,
    ) -> None:
        limits, timeouts = network.limits, network.timeouts
        self.wiring = Wiring(network, io, output, counters, clock)
        self.associations: dict[bytes, Association] = {}
        """By source address, destination address, source port, destination port as on the wire (12 octets)."""
        self.services: dict[tuple[bytes, int], DatagramHandler] = {}
        self.endpoint_filtering = network.udp_filtering == "endpoint"
        self.draining = False
        """New mappings are refused, those that exist go on."""
        self.publications: list[Publication] = []
        self.peers: Table[Association] = Table(limit=limits.max_udp_flows, idle_s=timeouts.udp_idle_s)
        """Peers of published ports, grouped by publication."""
        self._mappings: Table[Mapping] = Table(
            limit=limits.max_udp_flows, idle_s=timeouts.udp_idle_s, short_s=timeouts.udp_short_s
        )
        self._egress = egress
        self._events = events
        self._refused: set[tuple[bytes, bytes, int]] = set()
        self._gateway = network.gateway_bytes
        subnet = network.network
        self._subnet = (int(subnet.network_address), int(subnet.netmask))

    # Guest to host.

    def flush(self, now: float) -> None:
        """A batch of the guest's frames is over: what was collected leaves."""
        collecting = self.wiring.collecting
        if collecting is not None:
            collecting.flush(now)

    def input(self, packet: Packet, now: float) -> None:
        """A datagram that no association took: verify it, find who is to have it, and remember the way."""
        drops = self.wiring.counters.drops
        datagram = packet.payload
        try:
            source_port, port, payload = udp.parse(datagram)
        except Malformed:
            drops[Drop.UDP_MALFORMED] += 1
            return
        if not source_port or not port:
            # RFC 768 has 0 for "no answer wanted"; no socket of a host sends it, and none could answer.
            drops[Drop.UDP_MALFORMED] += 1
            return
        if not packet.checksum_ok and not udp.verify(datagram, packet.source, packet.destination):
            drops[Drop.UDP_CHECKSUM] += 1
            return
        key = packet.source + packet.destination + bytes(datagram[:4])
        association = self.associations.get(key)
        if association is None:
            handler = self.services.get((packet.destination, port))
            if handler is not None and not self._egress.overrides(_PROTOCOL, packet.destination, port):
                self._serve(handler, packet, Endpoint(packet.source, source_port), port, payload)
                return
            association = self._associate(packet, key, source_port, port, now)
            if association is None:
                return
        association.port = packet.port
        whole = len(packet.data) <= packet.port.mtu  # a reassembled datagram has no DF, its source's others may
        if whole:
            association.dont_fragment = packet.dont_fragment
            association.forward(payload, packet.ttl, now)
        else:
            usual, association.dont_fragment = association.dont_fragment, packet.dont_fragment
            association.forward(payload, packet.ttl, now)
            association.dont_fragment = usual

    def _serve(self, handler: DatagramHandler, packet: Packet, asker: Endpoint, port: int, payload: memoryview) -> None:
        own = packet.destination
        wiring = self.wiring

        def reply(answer: bytes) -> None:
            if len(answer) > udp.MAX_PAYLOAD:
                wiring.counters.drops[Drop.UDP_SEND] += 1
                return
            datagram = udp.emit(port, asker.port, answer, own, asker.address)
            wiring.output.send_ip(asker.address, _PROTOCOL, datagram, source=own, now=wiring.clock())

        answering: Reply = reply
        handler(bytes(payload), asker, answering)

    def _associate(self, packet: Packet, key: bytes, source_port: int, port: int, now: float) -> Association | None:
        """The decision point: policy, then a mapping, then an association."""
        decision = self._egress.decide(_PROTOCOL, packet.destination, port)
        if isinstance(decision, Deny):
            self._refuse(packet, decision, source_port, port, now)
            return None
        counters = self.wiring.counters
        if port == 0:  # no socket sends there, and nobody may listen there (RFC 6335 6)
            counters.drops[Drop.UDP_SEND] += 1
            return None
        real = decision.endpoint if isinstance(decision, Rewrite) else Endpoint(packet.destination, port)
        forwarded = (
            packet.destination == self._gateway and self._egress.gateway_forwards.find(_PROTOCOL, port) is not None
        )
        # A port of the gateway that leads elsewhere has a socket of its own: else the guest could address the same remote by
        # its own name too, and an answer had two names to come from.
        mapping = self._mapping(packet, source_port, port if forwarded else 0, now)
        if mapping is None or mapping.entry is None:
            return None
        self._mappings.spoke(mapping.entry, port)
        address = (real.text, real.port)
        destination = Endpoint(packet.destination, port)
        previous = mapping.associations.get(address)
        if previous is not None:  # the same remote under two names: the host alias, and 127.0.0.1 where that is allowed
            self._forget(previous)
        elif not mapping.associations and self._events.wanted:
            self._events.emit(
                FlowOpened(
                    time=now, protocol="udp", guest=str(mapping.guest), remote=str(destination), direction="outbound"
                )
            )
        if len(mapping.associations) >= ASSOCIATIONS_PER_MAPPING:
            self._forget(next(iter(mapping.associations.values())))
        if len(self.associations) >= ASSOCIATIONS:
            for old in list(islice(self.associations.values(), ASSOCIATIONS // 16)):
                if isinstance(old.socket, Mapping):
                    self._forget(old)
        association = Association(key, mapping, address, destination, packet.port)
        association.entry = mapping.entry
        mapping.associations[address] = association
        self.associations[key] = association
        if self.endpoint_filtering:
            if len(mapping.contacted) >= ASSOCIATIONS_PER_MAPPING:
                del mapping.contacted[next(iter(mapping.contacted))]
                mapping.forget_routes()
            mapping.contacted[address] = None
        return association

    def _mapping(self, packet: Packet, source_port: int, gateway_port: int, now: float) -> Mapping | None:
        """The guest's socket; `gateway_port` is that of a gateway forward, else 0."""
        guest = Endpoint(packet.source, source_port)
        key = packet.source + source_port.to_bytes(2, "big")
        if gateway_port:
            key += gateway_port.to_bytes(2, "big")
        known = self._mappings.get(key)
        if known is not None:
            return known.owner
        counters = self.wiring.counters
        if self.draining:
            counters.drops[Drop.POLICY] += 1
            return None
        for entry in self._mappings.make_room(guest.address):
            self._end(entry, "evicted", now)
        sock = self._socket(guest.address, now)
        if sock is None:
            counters.drops[Drop.DESCRIPTORS] += 1
            self.wiring.output.icmp_error(icmp.UNREACHABLE, icmp.HOST_UNREACHABLE, packet, now=now)
            return None
        try:
            mapping = Mapping(self, sock, guest)
        except OSError:  # no room to watch one more descriptor
            sock.close()
            counters.drops[Drop.DESCRIPTORS] += 1
            self.wiring.output.icmp_error(icmp.UNREACHABLE, icmp.HOST_UNREACHABLE, packet, now=now)
            return None
        mapping.entry = self._mappings.open(key, guest.address, mapping, now)
        counters.udp_mappings += 1
        return mapping

    def _socket(self, guest: bytes, now: float) -> Any:
        """A host socket, if need be after letting go of idle mappings: the guest's own, else anybody's."""
        for group in (guest, None):
            try:
                return self.wiring.io.socket(socket.AF_INET, socket.SOCK_DGRAM)
            except OSError as error:
                if error.errno not in error_queue.EXHAUSTED:
                    return None
            for entry in self._mappings.evict(group, Table.BATCH):
                self._end(entry, "evicted", now)
        try:
            return self.wiring.io.socket(socket.AF_INET, socket.SOCK_DGRAM)
        except OSError:
            return None

    def _refuse(self, packet: Packet, decision: Deny, source_port: int, port: int, now: float) -> None:
        drops = self.wiring.counters.drops
        drops[Drop.UDP_NO_SERVICE if decision.answer is Answer.REFUSED else Drop.POLICY] += 1
        told = (packet.source, packet.destination, port)
        if self._events.wanted and told not in self._refused:
            if len(self._refused) >= _REFUSALS_TOLD:
                self._refused.clear()
            self._refused.add(told)
            guest, remote = Endpoint(packet.source, source_port), Endpoint(packet.destination, port)
            self._events.emit(
                FlowRefused(time=now, protocol="udp", guest=str(guest), remote=str(remote), reason=decision.reason)
            )
        answer = decision.answer
        if answer is not Answer.SILENT:
            source = packet.destination if answer is Answer.REFUSED else None
            self.wiring.output.icmp_error(icmp.UNREACHABLE, answer.value, packet, source=source, now=now)

    # Host to guest.

    def remote_seen_as(self, remote: Address) -> Endpoint | None:
        """The address a guest sees a remote under; None when no guest may hear from it.

        Programs on the host are the host alias. Nobody outside may appear under an address of the virtual network.
        """
        address = socket.inet_aton(remote[0])
        network = self.wiring.network
        if address[0] == 127:
            alias = network.host_alias_bytes
            return None if alias is None else Endpoint(alias, remote[1])
        if int.from_bytes(address, "big") & self._subnet[1] == self._subnet[0]:
            return None
        return Endpoint(address, remote[1])

    def guest_error(self, packet: Packet, kind: int, code: int, mtu: int, quoted: memoryview, now: float) -> None:
        """An ICMP error of the guest about `quoted`, a UDP packet to it (`netstack.host.icmp_proxy.GuestErrorHandler`).

        Port unreachable: nobody listens there, so that mapping ends. Only the guest that had the mapping is believed (RFC
        5927 4.1), and the most it can break is its own. Other errors say nothing about the other end.
        """
        if (kind, code) != (icmp.UNREACHABLE, icmp.PORT_UNREACHABLE) or quoted[16:20] != packet.source:
            return
        at = (quoted[0] & 15) << 2
        key = packet.source + bytes(quoted[at + 2 : at + 4])
        entry = self._mappings.get(key + bytes(quoted[at : at + 2])) if quoted[12:16] == self._gateway else None
        if entry is None:
            entry = self._mappings.get(key)
        if entry is not None:
            self._mappings.close(entry)
            self._end(entry, "port unreachable", now)

    # Published ports.

    def publish(self, guest: Endpoint, sock: Any, show_client: bool = False) -> Publication:
        """Carry the datagrams that arrive at the bound host socket `sock`, which is ours from here on, to `guest`.

        With `show_client` it sees each peer's own address where it can. Raises `OSError` when the socket cannot be watched; it
        is closed then.
        """
        try:
            publication = Publication(self, sock, guest, show_client)
        except OSError:
            sock.close()
            raise
        self.publications.append(publication)
        return publication

    # Ends.

    def deadline(self) -> float | None:
        """When `expire` is next wanted; None while there is nothing to expire."""
        mappings, peers = self._mappings.deadline(), self.peers.deadline()
        if mappings is None or peers is None:
            return peers if mappings is None else mappings
        return min(mappings, peers)

    def expire(self, now: float) -> None:
        """End what was idle too long; harmless when called early."""
        for entry in self._mappings.expire(now):
            self._end(entry, "idle", now)
        for peer in self.peers.expire(now):
            self._forget(peer.owner)

    def close_guest(self, address: bytes) -> None:
        """The guest at `address` is gone for good: let go of its mappings. Published ports stay."""
        now = self.wiring.clock()
        for entry in self._mappings.group(address):
            self._mappings.close(entry)
            self._end(entry, "guest gone", now)

    def close(self) -> None:
        """Let go of every socket."""
        now = self.wiring.clock()
        for publication in tuple(self.publications):
            publication.close()
        for entry in self._mappings:
            self._mappings.close(entry)
            self._end(entry, "closed", now)

    def flows(self) -> list[UdpFlow]:
        """What exists now."""
        return [
            UdpFlow(
                guest=holder.guest,
                remotes=tuple(item.destination for item in associations),
                direction=direction,
                opened=entry.opened,
                used=entry.used,
                expires=entry.expires(),
                octets_outbound=entry.octets_outbound,
                octets_inbound=entry.octets_inbound,
            )
            for direction, entry, holder, associations in self._listed()
        ]

    def records(self, now: float, *, ends: bool = False) -> list[FlowRecord]:
        """The same for the control API; with `ends` each host socket is asked for its name."""
        return [
            FlowRecord(
                id=flow_id("udp", entry.key, entry.opened),
                protocol="udp",
                direction=direction,
                guest=str(holder.guest),
                remote=str(associations[-1].destination) if associations else "*",
                remotes=len(associations),
                host_local=local_end(holder.sock) if ends else "",
                host_remote=str(Endpoint.of(*associations[-1].address)) if ends and associations else "",
                state="ANSWERED" if entry.answered else "UNANSWERED",
                octets_outbound=entry.octets_outbound,
                octets_inbound=entry.octets_inbound,
                age_s=now - entry.opened,
                idle_s=now - entry.used,
            )
            for direction, entry, holder, associations in self._listed()
        ]

    def reset(self, id: str) -> bool:
        """Close the mapping named so (`FlowRecord.id`), or forget the peer of a published port; False when there is none."""
        now = self.wiring.clock()
        for entry in self._mappings:
            if flow_id("udp", entry.key, entry.opened) == id:
                self._mappings.close(entry)
                self._end(entry, "reset by hand", now)
                return True
        for peer in self.peers:
            if flow_id("udp", peer.key, peer.opened) == id:
                self._forget(peer.owner)
                return True
        return False

    def _listed(self) -> list[tuple[str, Entry[Any], GuestSocket, list[Association]]]:
        outbound: list[tuple[str, Entry[Any], GuestSocket, list[Association]]] = [
            ("outbound", entry, entry.owner, list(entry.owner.associations.values())) for entry in self._mappings
        ]
        return outbound + [("inbound", entry, entry.owner.socket, [entry.owner]) for entry in self.peers]

    def _end(self, entry: Entry[Mapping], reason: str, now: float) -> None:
        mapping = entry.owner
        if reason == "evicted":
            self.wiring.counters.udp_evicted += 1
        if self._events.wanted:
            first = next(iter(mapping.associations.values()), None)
            self._events.emit(
                FlowClosed(
                    time=now,
                    protocol="udp",
                    guest=str(mapping.guest),
                    remote="" if first is None else str(first.destination),
                    reason=reason,
                    octets_outbound=entry.octets_outbound,
                    octets_inbound=entry.octets_inbound,
                    duration_s=now - entry.opened,
                )
            )
        for association in tuple(mapping.associations.values()):
            self._forget(association)
        mapping.close()

    def _forget(self, association: Association) -> None:
        self.associations.pop(association.key, None)
        association.socket.dropped(association)
