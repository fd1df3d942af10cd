"""ICMP of the guests (RFC 792): echo to us is answered, echo to others goes through ping sockets, errors find their flow.

Echo to the gateway or the host alias is answered here, whatever its size. For other addresses each (guest, identifier) has
one unprivileged ping socket (`SOCK_DGRAM`, `IPPROTO_ICMP`): on Linux the kernel gives it an identifier of its own and
delivers replies to that one only, so two processes, or two guests, are never confused; the guest's identifier is put back on
the way in. TTL and DF are carried on, and the error queue brings time-exceeded and unreachable back with the router's
address, so traceroute and path MTU discovery work through us. Where the identifier is not the kernel's (macOS, whose sockets
also see everybody's replies) replies with another identifier are passed over.

Ping sockets may be forbidden (`net.ipv4.ping_group_range`). That is no reason not to start: it is logged once, tried again
every minute, and meanwhile echo to others meets silence, counted.

Errors a guest sends are about packets of ours: they go to the protocol they quote (`guest_errors`), which decides what to
believe (RFC 5927). Everything else is counted and dropped.
"""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from netstack.api import Clock, Endpoint
from netstack.errors import Malformed
from netstack.flow.records import FlowRecord, flow_id, local_end
from netstack.host import error_queue
from netstack.host.error_queue import QueuedError
from netstack.host.io import ERROR, READ, HostIO
from netstack.host.udp_proxy import UdpFlow
from netstack.observe.events import EventBus, FlowRefused
from netstack.observe.metrics import Counters, Drop
from netstack.policy.egress import Answer, Deny, Egress
from netstack.settings import Network
from netstack.udp.nat import Entry, Table
from netstack.wire import checksum, icmp, ipv4
from netstack.wire.checksum import BadChecksum

if TYPE_CHECKING:
    from netstack.iface.interface import Packet
    from netstack.iface.output import Output

log = logging.getLogger("pyvpnkit")

GuestErrorHandler: TypeAlias = "Callable[[Packet, int, int, int, memoryview, float], None]"
"""`handler(packet, kind, code, mtu, quoted, now)`: a guest's ICMP error; `quoted` is at least an IPv4 header and 8 octets,
its destination the guest that sent the error. `mtu` is the next hop's where `kind`, `code` are 3, 4 (0: not told)."""

RETRY_S: Final = 60.0
"""How long a refusal of ping sockets is believed."""
MAX_BURST: Final = 16
"""Replies per socket and event."""
_GROUP: Final = "ping"
_FORBIDDEN: Final = frozenset((errno.EACCES, errno.EPERM, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT))
_REFUSALS_TOLD: Final = 256


class Ping:
    """One (guest, identifier) and its socket."""

    __slots__ = ("dont_fragment", "entry", "fd", "guest", "identifier", "octets", "proxy", "sock", "ttl")

    def __init__(self, proxy: IcmpProxy, sock: Any, guest: bytes, identifier: int) -> None:
        self.proxy = proxy
        self.sock = sock
        self.guest = guest
        self.identifier = identifier
        self.entry: Entry[Ping]
        self.fd: int = sock.fileno()
        self.ttl = -1
        self.dont_fragment: bool | None = None
        self.octets = 0
        """ICMP message last sent, for the quote of an error."""

    def set_mode(self, ttl: int, dont_fragment: bool) -> None:
        try:
            if ttl != self.ttl:
                self.ttl = ttl
                self.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, max(1, ttl - 1))
            if dont_fragment is not self.dont_fragment:
                self.dont_fragment = dont_fragment
                if error_queue.LINUX:
                    mode = error_queue.PMTUDISC_DO if dont_fragment else error_queue.PMTUDISC_DONT
                    self.sock.setsockopt(socket.IPPROTO_IP, error_queue.IP_MTU_DISCOVER, mode)
        except OSError:
            self.ttl, self.dont_fragment = -1, None  # this one goes on as the host would send its own

    def ready(self, mask: int) -> None:
        if not self.entry.closed:
            now = self.proxy.clock()
            if mask & ERROR:
                self.proxy.relay_errors(self, now)
            if mask & READ:
                self.proxy.receive(self, now)


class IcmpProxy:
    """See the module. `clock` is the stack's, for what no caller gives a time to."""

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
        self.clock = clock
        self.guest_errors: dict[int, GuestErrorHandler] = {}
        """By the IP protocol of the packet quoted: who wants to hear of it."""
        self.draining = False
        self._io = io
        self._output = output
        self._egress = egress
        self._counters = counters
        self._events = events
        self._own = network.own_addresses
        subnet = network.network
        self._subnet = (int(subnet.network_address), int(subnet.netmask))
        self._pings: Table[Ping] = Table(limit=network.limits.max_pings, idle_s=network.timeouts.ping_idle_s)
        self._forbidden_until = float("-inf")
        self._told_forbidden = False
        self._refused: set[tuple[bytes, bytes]] = set()
        self._buffer = bytearray(65536)
        self._view = memoryview(self._buffer)

    # Guest to host.

    def input(self, packet: Packet, now: float) -> None:
        """An ICMP message of a guest, reassembled if it came in fragments."""
        drops = self._counters.drops
        try:
            message = icmp.parse(packet.payload)
        except BadChecksum:
            drops[Drop.ICMP_CHECKSUM] += 1
            return
        except Malformed:
            drops[Drop.ICMP_MALFORMED] += 1
            return
        if message.type == icmp.ECHO_REQUEST and message.code == 0:
            if packet.destination in self._own:
                reply = icmp.emit(icmp.ECHO_REPLY, 0, message.rest, message.body)
                self._output.send_ip(
                    packet.source, ipv4.PROTOCOL_ICMP, reply, source=packet.destination, dont_fragment=False, now=now
                )
            else:
                self._forward(packet, message, now)
        elif message.type in icmp.ERRORS:
            self._guest_error(packet, message, now)
        else:
            drops[Drop.ICMP_UNHANDLED] += 1

    def _guest_error(self, packet: Packet, message: icmp.Message, now: float) -> None:
        quoted = message.body
        if len(quoted) >= ipv4.HEADER_LENGTH and quoted[0] >> 4 == 4:
            header_length = (quoted[0] & 15) << 2
            handler = self.guest_errors.get(quoted[9])
            # RFC 5927 4.1: only about a packet that was sent to whoever complains.
            about_it = header_length >= ipv4.HEADER_LENGTH and quoted[16:20] == packet.source
            if handler is not None and about_it and len(quoted) >= header_length + 8:
                needs = (message.type, message.code) == (icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED)
                handler(packet, message.type, message.code, message.mtu if needs else 0, quoted, now)
                return
        self._counters.drops[Drop.ICMP_UNHANDLED] += 1

    def _forward(self, packet: Packet, message: icmp.Message, now: float) -> None:
        decision = self._egress.decide(ipv4.PROTOCOL_ICMP, packet.destination, 0)
        if isinstance(decision, Deny):
            self._refuse(packet, decision, now)
            return
        drops = self._counters.drops
        identifier = message.echo[0]
        ping = self._ping(packet, identifier, now)
        if ping is None:
            return
        if ping.ttl != packet.ttl or ping.dont_fragment is not packet.dont_fragment:
            ping.set_mode(packet.ttl, packet.dont_fragment)
        entry = ping.entry
        entry.sent = now
        ping.octets = len(packet.payload)
        address = (socket.inet_ntoa(packet.destination), 0)
        try:
            ping.sock.sendto(packet.payload, address)
        except OSError as error:
            if not self._send_again(ping, packet, address, error, now):
                drops[Drop.PING_SEND] += 1
                return
        entry.octets_outbound += ping.octets

    def _send_again(self, ping: Ping, packet: Packet, address: tuple[str, int], error: OSError, now: float) -> bool:
        """`sendto` failed: once more if that was the error of an earlier request, else tell the guest why."""
        if error.errno in error_queue.NO_ROOM:
            return False
        reported = self.relay_errors(ping, now)
        if error.errno == errno.EMSGSIZE:
            mtu = error_queue.fitting_mtu(reported, address[0])
            self._output.icmp_error(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, packet, mtu=mtu, now=now)
            return False
        try:
            ping.sock.sendto(packet.payload, address)
        except OSError as again:
            code = error_queue.unreachable_code(again.errno or 0)
            if code is not None:
                self._output.icmp_error(icmp.UNREACHABLE, code, packet, now=now)
            return False
        return True

    def _ping(self, packet: Packet, identifier: int, now: float) -> Ping | None:
        key = packet.source + identifier.to_bytes(2, "big")
        known = self._pings.get(key)
        if known is not None:
            return known.owner
        drops = self._counters.drops
        if self.draining:
            drops[Drop.POLICY] += 1
            return None
        if now < self._forbidden_until:
            drops[Drop.PING_FORBIDDEN] += 1
            return None
        for entry in self._pings.make_room(_GROUP):
            self._end(entry.owner)
        sock = self._socket(now)
        if sock is None:
            return None
        try:
            error_queue.enable(sock)
        except OSError:
            pass
        ping = Ping(self, sock, packet.source, identifier)
        try:
            self._io.watch(ping.fd, ping.ready, edge=False)
        except OSError:
            sock.close()
            drops[Drop.DESCRIPTORS] += 1
            return None
        ping.entry = self._pings.open(key, _GROUP, ping, now)
        self._counters.pings += 1
        return ping

    def _socket(self, now: float) -> Any:
        """A ping socket, if need be after letting go of idle ones; None and counted where there is none to be had."""
        drops = self._counters.drops
        for attempt in (1, 2):
            try:
                return self._io.socket(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
            except OSError as error:
                if error.errno in _FORBIDDEN:
                    self._forbidden_until = now + RETRY_S
                    drops[Drop.PING_FORBIDDEN] += 1
                    if not self._told_forbidden:
                        self._told_forbidden = True
                        log.warning(
                            "ping beyond the gateway will not work: the host allows no ping sockets (%s); "
                            "on Linux net.ipv4.ping_group_range must include one of our groups",
                            error.strerror,
                        )
                    return None
                if attempt == 1 and error.errno in error_queue.EXHAUSTED:
                    for entry in self._pings.evict(None, 1 + len(self._pings) // Table.BATCH):
                        self._end(entry.owner)
        drops[Drop.DESCRIPTORS] += 1
        return None

    def _refuse(self, packet: Packet, decision: Deny, now: float) -> None:
        self._counters.drops[Drop.POLICY] += 1
        told = (packet.source, packet.destination)
        if self._events.wanted and told not in self._refused:
            if len(self._refused) >= _REFUSALS_TOLD:
                self._refused.clear()
            self._refused.add(told)
            guest, remote = socket.inet_ntoa(packet.source), socket.inet_ntoa(packet.destination)
            self._events.emit(
                FlowRefused(time=now, protocol="icmp", guest=guest, remote=remote, reason=decision.reason)
            )
        if decision.answer is not Answer.SILENT:
            self._output.icmp_error(icmp.UNREACHABLE, decision.answer.value, packet, now=now)

    # Host to guest.

    def receive(self, ping: Ping, now: float) -> None:
        """Bring at most one burst of replies to the guest."""
        view = self._view
        for _ in range(MAX_BURST):
            try:
                octets, remote = ping.sock.recvfrom_into(view)
            except BlockingIOError:
                return
            except OSError:
                self.relay_errors(ping, now)
                continue
            self._reply(ping, remote[0], view[:octets], now)

    def _reply(self, ping: Ping, remote: str, data: memoryview, now: float) -> None:
        if len(data) > ipv4.HEADER_LENGTH and data[0] >> 4 == 4:  # macOS gives the IP header too
            data = data[(data[0] & 15) << 2 :]
        if len(data) < icmp.HEADER_LENGTH or data[0] != icmp.ECHO_REPLY:
            return
        message = icmp.Message(data[0], data[1], bytes(data[4:8]), data[8:])
        identifier, sequence = message.echo
        if not error_queue.LINUX and identifier != ping.identifier:
            return
        source = socket.inet_aton(remote)
        if source[0] == 127 or int.from_bytes(source, "big") & self._subnet[1] == self._subnet[0]:
            if isinstance(self._egress.decide(ipv4.PROTOCOL_ICMP, source, 0), Deny):
                self._counters.drops[Drop.UDP_FILTERED] += 1
                return
        entry = ping.entry
        entry.heard = now
        entry.octets_inbound += len(data)
        reply = icmp.emit(icmp.ECHO_REPLY, 0, icmp.echo_rest(ping.identifier, sequence), message.body)
        self._output.send_ip(ping.guest, ipv4.PROTOCOL_ICMP, reply, source=source, now=now)

    def relay_errors(self, ping: Ping, now: float) -> list[QueuedError]:
        """Pass on what the host was told about earlier requests, the guest's own packet quoted (RFC 1122 3.2.2)."""
        reported = error_queue.drain(ping.sock)
        for error in reported:
            if error.local or error.destination is None:
                continue
            destination = socket.inet_aton(error.destination[0])
            data = quoted_request(ping.guest, destination, error.quoted, ping.identifier, ping.octets)
            if data is None:
                continue
            offender = error.offender
            if offender is not None and offender[0] == 127:
                offender = None
            neighbour = self._output.neighbour(ping.guest)
            if neighbour is not None:
                self._output.icmp_quoting(
                    error.kind, error.code, data, neighbour, source=offender, mtu=error.mtu, now=now
                )
        return reported

    # Ends.

    def deadline(self) -> float | None:
        """When `expire` is next wanted; None while there is nothing to expire."""
        return self._pings.deadline()

    def expire(self, now: float) -> None:
        """End what was idle too long; harmless when called early."""
        for entry in self._pings.expire(now):
            self._end(entry.owner)

    def close_guest(self, address: bytes) -> None:
        """The guest at `address` is gone for good."""
        for entry in self._pings:
            if entry.owner.guest == address:
                self._pings.close(entry)
                self._end(entry.owner)

    def close(self) -> None:
        """Let go of every socket."""
        for entry in self._pings:
            self._pings.close(entry)
            self._end(entry.owner)

    def flows(self) -> list[UdpFlow]:
        """What exists now; the guest's `port` is the identifier."""
        return [
            UdpFlow(
                guest=Endpoint(entry.owner.guest, entry.owner.identifier),
                remotes=(),
                direction="outbound",
                opened=entry.opened,
                used=entry.used,
                expires=entry.expires(),
                octets_outbound=entry.octets_outbound,
                octets_inbound=entry.octets_inbound,
            )
            for entry in self._pings
        ]

    def records(self, now: float, *, ends: bool = False) -> list[FlowRecord]:
        """The same for the control API; with `ends` each ping socket is asked for its name (its port is our identifier)."""
        return [
            FlowRecord(
                id=flow_id("icmp", entry.key, entry.opened),
                protocol="icmp",
                direction="outbound",
                guest=str(Endpoint(entry.owner.guest, entry.owner.identifier)),
                remote="*",
                remotes=0,
                host_local=local_end(entry.owner.sock) if ends else "",
                host_remote="",
                state="ANSWERED" if entry.answered else "UNANSWERED",
                octets_outbound=entry.octets_outbound,
                octets_inbound=entry.octets_inbound,
                age_s=now - entry.opened,
                idle_s=now - entry.used,
            )
            for entry in self._pings
        ]

    def reset(self, id: str) -> bool:
        """Close the ping socket named so (`FlowRecord.id`); False when there is none."""
        for entry in self._pings:
            if flow_id("icmp", entry.key, entry.opened) == id:
                self._pings.close(entry)
                self._end(entry.owner)
                return True
        return False

    def _end(self, ping: Ping) -> None:
        self._io.unwatch(ping.fd)
        ping.sock.close()


def quoted_request(source: bytes, destination: bytes, message: bytes, identifier: int, octets: int) -> bytes | None:
    """The IPv4 packet of a guest's echo request as an ICMP error quotes it, from what the host sent.

    `message` is the host's request from the ICMP header on, perhaps cut short; the guest's `identifier` is put back.
    `octets` is the length of the guest's ICMP message. None when `message` is no echo request with its whole header.
    """
    if len(message) < icmp.HEADER_LENGTH or message[0] != icmp.ECHO_REQUEST:
        return None
    kind, code, stored, rest = icmp.HEADER.unpack_from(message)
    own = identifier.to_bytes(2, "big")
    stored = checksum.adjust(stored, rest[:2], own)
    outer = ipv4.header(source, destination, ipv4.PROTOCOL_ICMP, max(octets, len(message)), ttl=1)
    return outer + icmp.HEADER.pack(kind, code, stored, own + rest[2:]) + message[icmp.HEADER_LENGTH :]
