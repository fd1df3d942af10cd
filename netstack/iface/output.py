"""IPv4 packets to a guest on the general way: its MAC is asked for when unknown, what is too long is fragmented.

TCP and the UDP proxy build their own frames; ICMP, DHCP, services and large datagrams leave through here.
"""

from __future__ import annotations

from collections.abc import Callable

from netstack.api import Buffer
from netstack.iface.interface import Packet
from netstack.iface.neighbours import ASK_AGAIN_S, ASK_TIMES, WAITING_PACKETS, Neighbour, Neighbours
from netstack.iface.switch import Switch
from netstack.ip import icmp
from netstack.ip.ipv4 import fragment
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Network
from netstack.wire import arp, ethernet
from netstack.wire import icmp as wire_icmp

_PENDING_ADDRESSES = 64


class Output:
    """See the module; `rate` limits ICMP errors. `random16` gives identifications of fragmented datagrams."""

    def __init__(
        self,
        network: Network,
        counters: Counters,
        switch: Switch,
        neighbours: Neighbours,
        rate: icmp.RateLimit,
        random16: Callable[[], int],
    ) -> None:
        self.gateway_mac = network.gateway_mac_bytes
        self._gateway = network.gateway_bytes
        self._counters = counters
        self._switch = switch
        self._neighbours = neighbours
        self._rate = rate
        self._random16 = random16
        self._subnet = (int(network.network.network_address), int(network.network.netmask))
        self._pending: dict[bytes, _Pending] = {}
        self.ask_at = 0.0
        """When to ask again for an unresolved address; 0 when nothing is pending."""
        self.egress_mtu = 0
        """What fits the host's way out, for packets of which the host said only that they do not; 0: not known."""

    def neighbour(self, ip: bytes) -> Neighbour | None:
        """The guest at `ip`, if it is known."""
        return self._neighbours.get(ip)

    def send_ip(
        self,
        destination: bytes,
        protocol: int,
        payload: Buffer,
        *,
        source: bytes,
        now: float,
        ttl: int = 64,
        dont_fragment: bool = False,
    ) -> None:
        """Send one datagram (payload 0..65,515 octets) to a guest; longer than the MTU it is fragmented."""
        neighbour = self._neighbours.get(destination)
        if neighbour is None or neighbour.port is None:
            self._wait(destination, (protocol, bytes(payload), source, ttl, dont_fragment), now)
            return
        self.send_to(neighbour, protocol, payload, source=source, ttl=ttl, dont_fragment=dont_fragment)

    def send_to(
        self,
        neighbour: Neighbour,
        protocol: int,
        payload: Buffer,
        *,
        source: bytes,
        ttl: int = 64,
        dont_fragment: bool = False,
        mac: bytes | None = None,
        destination: bytes | None = None,
    ) -> None:
        """The same to a known neighbour; `mac` and `destination` override (DHCP speaks to guests without an address)."""
        port = neighbour.port
        if port is None:
            return
        packets = fragment(
            source,
            destination or neighbour.ip,
            protocol,
            payload,
            mtu=port.mtu,
            identification=self._random16(),
            ttl=ttl,
            dont_fragment=dont_fragment,
        )
        header = ethernet.header(mac or neighbour.mac, self.gateway_mac, ethernet.ETHERTYPE_IPV4)
        for ip_header, part in packets:
            frame = ethernet.pad(b"".join((header, ip_header, part)))
            port.put((port.link.prefix(len(frame)), frame))

    def icmp_error(
        self, kind: int, code: int, packet: Packet, *, now: float, source: bytes | None = None, mtu: int = 0
    ) -> None:
        """An ICMP error about a guest's packet, within the rules of RFC 1122 3.2.2 and the rate limit."""
        if packet.neighbour is not None and not packet.for_many:
            self.icmp_quoting(kind, code, packet.data, packet.neighbour, now=now, source=source, mtu=mtu)

    def icmp_quoting(
        self,
        kind: int,
        code: int,
        quoted: Buffer,
        neighbour: Neighbour,
        *,
        now: float,
        source: bytes | None = None,
        mtu: int = 0,
    ) -> None:
        """The same about a packet of which only the beginning (header and 8 octets at least) was kept."""
        if mtu <= 0 and kind == wire_icmp.UNREACHABLE and code == wire_icmp.FRAGMENTATION_NEEDED:
            # A packet that would have fit there was too long for something further on: `icmp.error` guesses then.
            if len(quoted) >= 4 and int.from_bytes(quoted[2:4], "big") > self.egress_mtu:
                mtu = self.egress_mtu
        message = icmp.error(kind, code, memoryview(quoted), mtu=mtu)
        if message is None:
            return
        if not self._rate.allow(now):
            self._counters.drops[Drop.ICMP_RATE] += 1
            return
        self._counters.icmp_sent += 1
        self.send_to(neighbour, 1, message, source=source or self._gateway)

    # Addresses not seen yet (a published port whose guest has not spoken).

    def _wait(self, destination: bytes, packet: tuple[int, bytes, bytes, int, bool], now: float) -> None:
        number = int.from_bytes(destination, "big")
        pending = self._pending.get(destination)
        if pending is None:
            if number & self._subnet[1] != self._subnet[0] or len(self._pending) >= _PENDING_ADDRESSES:
                self._counters.drops[Drop.NEIGHBOUR_UNRESOLVED] += 1
                return
            pending = self._pending[destination] = _Pending()
            self._ask(destination)
            pending.again_at = now + ASK_AGAIN_S
            self.ask_at = min(self.ask_at or pending.again_at, pending.again_at)
        if len(pending.packets) < WAITING_PACKETS:
            pending.packets.append(packet)
        else:
            self._counters.drops[Drop.NEIGHBOUR_UNRESOLVED] += 1

    def resolve(self, ip: bytes, now: float) -> None:
        """Ask who has `ip` (as for a packet, but with nothing to send yet)."""
        if ip not in self._pending and len(self._pending) < _PENDING_ADDRESSES:
            pending = self._pending[ip] = _Pending()
            self._ask(ip)
            pending.again_at = now + ASK_AGAIN_S
            self.ask_at = min(self.ask_at or pending.again_at, pending.again_at)

    def _ask(self, ip: bytes) -> None:
        request = arp.emit(arp.Packet(1, self.gateway_mac, self._gateway, bytes(6), ip))
        frame = ethernet.pad(ethernet.header(ethernet.BROADCAST, self.gateway_mac, ethernet.ETHERTYPE_ARP) + request)
        for port in self._switch.ports:
            port.put((port.link.prefix(len(frame)), frame))

    def learnt(self, neighbour: Neighbour) -> None:
        """A guest showed itself: send what waited for it."""
        pending = self._pending.pop(neighbour.ip, None)
        if pending is not None:
            for protocol, payload, source, ttl, dont_fragment in pending.packets:
                self.send_to(neighbour, protocol, payload, source=source, ttl=ttl, dont_fragment=dont_fragment)

    def tick(self, now: float) -> list[bytes]:
        """Ask again what is due; returns the addresses given up (asked `ASK_TIMES` times)."""
        given_up: list[bytes] = []
        self.ask_at = 0.0
        for ip, pending in list(self._pending.items()):
            if now >= pending.again_at:
                if pending.asked >= ASK_TIMES:
                    del self._pending[ip]
                    self._counters.drops[Drop.NEIGHBOUR_UNRESOLVED] += len(pending.packets)
                    given_up.append(ip)
                    continue
                pending.asked += 1
                pending.again_at = now + ASK_AGAIN_S
                self._ask(ip)
            self.ask_at = min(self.ask_at or pending.again_at, pending.again_at)
        return given_up


class _Pending:
    __slots__ = ("again_at", "asked", "packets")

    def __init__(self) -> None:
        self.asked = 1
        self.again_at = 0.0
        self.packets: list[tuple[int, bytes, bytes, int, bool]] = []
