"""A host UDP socket with a guest behind it: what NAT mappings and published ports have in common. HOT PATH.

Guest to host: the interface finds an `Association` by the 12 octets of addresses and ports and calls `forward`. Datagrams of
one batch that follow each other there with equal length leave in one `sendmsg` (UDP_SEGMENT, Linux), which costs a third of
a `sendto` each; `flush` ends the batch. Host to guest: `ready` receives a burst of datagrams into one buffer of the proxy,
each with room in front, has `Template.frame` put the headers there, and hands the frames to the guest's port in one call.

The socket is watched level-triggered for reading only: watched for writing, every datagram that leaves is an event. What a
budget leaves in the socket makes it ready again, so nothing is lost and other sockets get their turn in between. One
datagram is read per event until a socket proves to have more; so a single answer costs no failing second call.

Errors never end a socket. What the error queue reports goes to the guest as ICMP with its own datagram quoted.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from netstack.api import Clock, Endpoint, Frame
from netstack.host import error_queue
from netstack.host.error_queue import QueuedError
from netstack.host.io import ERROR, READ, HostIO
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Network
from netstack.udp import quote
from netstack.udp.nat import Entry
from netstack.udp.template import LEAD, TRAIL, Template
from netstack.wire import ethernet, icmp, udp

if TYPE_CHECKING:
    from netstack.iface.neighbours import Neighbour
    from netstack.iface.output import Output
    from netstack.iface.switch import Port

Address: TypeAlias = tuple[str, int]
"""As the socket calls take and give it."""

MAX_BURST: Final = 32
"""Datagrams per socket and event."""
ROUTES: Final = 256
"""Remembered remotes per socket; forgotten ones cost a few µs again."""
_DATAGRAM: Final = 65536
_BATCH_OCTETS: Final = 65536
_RECEIVE_BUFFER: Final = 1 << 20
"""Asked for per socket (the kernel may grant less): at 60,000 datagrams/s its default holds 3 ms."""
_PROTOCOL: Final = 17
_UDP_SEGMENT: Final = 103
MAX_SEGMENTS: Final = 64
"""Linux's UDP_MAX_SEGMENTS of kernels before 6.9."""
_MAX_TRAIN: Final = 62000
_ORDINARY: Final = 1472
_NO_SEGMENTS: Final = frozenset((errno.EINVAL, errno.EIO, errno.EOPNOTSUPP, errno.ENOPROTOOPT, errno.EMSGSIZE))
"""What a way out without segmentation says: a tunnel (IPsec), a device without checksums, a small MTU, an old kernel."""


class Wiring:
    """What all sockets of one proxy share."""

    __slots__ = ("buffer", "clock", "collecting", "counters", "identification", "io", "network", "output", "view")

    def __init__(self, network: Network, io: HostIO, output: Output, counters: Counters, clock: Clock) -> None:
        self.network = network
        self.io = io
        self.output = output
        self.counters = counters
        self.clock = clock
        self.identification = 0
        self.collecting: Association | None = None
        """Whose datagrams wait for more of the same."""
        self.buffer = bytearray(LEAD + _BATCH_OCTETS + _DATAGRAM + TRAIL)
        self.view = memoryview(self.buffer)


class Route:
    """How the datagrams of one remote get to the guest."""

    __slots__ = ("entry", "neighbour", "source", "template", "version")

    def __init__(self, source: Endpoint, entry: Entry[Any]) -> None:
        self.source = source
        """As the guest sees the remote."""
        self.entry = entry
        self.neighbour: Neighbour | None = None
        self.version = -1
        self.template: Template | None = None
        """None while the guest's place is not known: the general way out then asks for it."""


class Association:
    """A guest's source and one destination, found by the frame's 12 octets `key`."""

    __slots__ = (
        "address",
        "destination",
        "dont_fragment",
        "entry",
        "guest",
        "key",
        "octets",
        "port",
        "sendto",
        "socket",
        "waiting",
    )

    def __init__(
        self,
        key: bytes,
        socket: GuestSocket,
        address: Address,
        destination: Endpoint,
        port: Port | None,
    ) -> None:
        self.key = key
        self.socket = socket
        self.entry: Entry[Any]
        """The mapping's or the peer's; set by who makes the association."""
        self.address = address
        """Where the host socket sends."""
        self.destination = destination
        """What the guest addressed."""
        self.guest = socket.guest
        self.port = port
        """The guest's place on the switch: the interface takes the fast way only from there."""
        self.dont_fragment = False
        """DF of the last whole datagram that took the general way; those of one socket hardly differ."""
        self.octets = 0
        """Payload of the last datagram, also for the quote of an error."""
        self.waiting: list[memoryview] = []
        """Datagrams of this batch, all of that length; they die with it."""
        self.sendto: Callable[[memoryview, Address], int] = socket.sock.sendto

    def forward(self, payload: memoryview, ttl: int, now: float) -> None:
        """Take one datagram of the guest; `ttl` (2..255) is what its header says. `payload` lives until `flush`. HOT PATH."""
        holder = self.socket
        wiring = holder.wiring
        octets = len(payload)
        if wiring.collecting is self:
            waiting = self.waiting
            count = len(waiting)
            if (
                octets == self.octets
                and ttl == holder.ttl
                and self.dont_fragment is holder.dont_fragment
                and holder.segments
                and 0 < octets <= _ORDINARY
                and count < MAX_SEGMENTS
                and octets * count < _MAX_TRAIN
            ):
                waiting.append(payload)
                return
            self.flush(now)
        elif wiring.collecting is not None:
            wiring.collecting.flush(now)
        if ttl != holder.ttl or self.dont_fragment is not holder.dont_fragment:
            holder.set_mode(ttl, self.dont_fragment)
        self.entry.sent = now
        self.octets = octets
        self.waiting.append(payload)
        wiring.collecting = self

    def flush(self, now: float) -> None:
        """Send what waits."""
        holder = self.socket
        holder.wiring.collecting = None
        waiting, self.waiting = self.waiting, []
        if holder.closed:
            return
        if len(waiting) > 1:
            ancillary = ((_PROTOCOL, _UDP_SEGMENT, self.octets.to_bytes(2, sys.byteorder)),)
            try:
                self.entry.octets_outbound += holder.sock.sendmsg(waiting, ancillary, 0, self.address)
                return
            except OSError as error:
                if error.errno in _NO_SEGMENTS:
                    holder.segments = False
                else:
                    holder.relay_errors(now)  # it was about an earlier one
        for payload in waiting:
            try:
                self.sendto(payload, self.address)
            except OSError as error:
                holder.send_failed(self, payload, error, now)
            else:
                self.entry.octets_outbound += len(payload)


class GuestSocket:
    """See the module. `guest` is the guest's endpoint; the subclass says how remotes look from there."""

    def __init__(self, wiring: Wiring, sock: Any, guest: Endpoint) -> None:
        self.wiring = wiring
        self.sock = sock
        self.guest = guest
        self.ttl = -1
        """The guest's, one more than the socket's."""
        self.dont_fragment: bool | None = None
        self.closed = False
        self.segments = sys.platform == "linux"
        """Whether several datagrams may leave in one call; no longer once the way out refused."""
        self.associations: dict[Address, Association] = {}
        self._routes: dict[Address, Route] = {}
        self._burst = 1
        self._fd: int = sock.fileno()
        try:
            error_queue.enable(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
        except OSError:
            pass  # an option refused is a service less, not a flow less
        wiring.io.watch(self._fd, self.ready, edge=False)

    def seen_as(self, remote: Address, now: float) -> Route | None:
        """How the guest sees `remote`; None: its datagrams do not pass."""
        raise NotImplementedError

    def set_mode(self, ttl: int, dont_fragment: bool) -> None:
        """Carry TTL, less our hop, and DF on to the socket (RFC 1812 5.3.1, 5.2.6)."""
        sock = self.sock
        try:
            if ttl != self.ttl:
                self.ttl = ttl
                sock.setsockopt(socket.IPPROTO_IP, socket.IP_TTL, max(1, ttl - 1))
            if dont_fragment is not self.dont_fragment:
                self.dont_fragment = dont_fragment
                if error_queue.LINUX:
                    mode = error_queue.PMTUDISC_DO if dont_fragment else error_queue.PMTUDISC_DONT
                    sock.setsockopt(socket.IPPROTO_IP, error_queue.IP_MTU_DISCOVER, mode)
        except OSError:
            self.ttl, self.dont_fragment = -1, None  # this one goes on as the host would send its own

    def close(self) -> None:
        """Let go of the descriptor; harmless when repeated."""
        if not self.closed:
            self.closed = True
            self.wiring.io.unwatch(self._fd)
            self.sock.close()
            self._routes.clear()

    def dropped(self, association: Association) -> None:
        """`association` is no more."""
        if self.associations.get(association.address) is association:
            del self.associations[association.address]
        self._routes.pop(association.address, None)

    def forget_routes(self) -> None:
        """Ask `seen_as` again for every remote."""
        self._routes.clear()

    # Host to guest.

    def ready(self, mask: int) -> None:
        """The socket has something for us. HOT PATH."""
        if self.closed:
            return
        now = self.wiring.clock()
        if mask & ERROR:
            self.relay_errors(now)
        if mask & READ:
            self.receive(now)

    def receive(self, now: float) -> None:
        """Bring at most one burst of datagrams to the guest. HOT PATH."""
        wiring = self.wiring
        buffer, view = wiring.buffer, wiring.view
        receive = self.sock.recvfrom_into
        routes = self._routes
        identification = wiring.identification
        frames: list[Frame] = []
        at = LEAD
        budget = self._burst
        received = 0
        port = None
        while received < budget:
            try:
                octets, remote = receive(view[at : at + _DATAGRAM])
            except BlockingIOError:
                self._burst = 1 if received < 2 else budget
                break
            except OSError:
                received += 1
                self.relay_errors(now)
                continue
            received += 1
            route = routes.get(remote)
            if route is None:
                route = self._new_route(remote, now)
                if route is None:
                    wiring.counters.drops[Drop.UDP_FILTERED] += 1
                    continue
            entry = route.entry
            entry.heard = now
            entry.octets_inbound += octets
            neighbour = route.neighbour
            if neighbour is None or neighbour.version != route.version:
                neighbour = self._find_guest(route)
            template = route.template
            if template is None or octets > template.limit:
                if frames and port is not None:
                    port.send(frames)  # before it, as they came
                    frames = []
                self._send_general(route.source, view[at : at + octets], now)
                continue
            if neighbour is not None:
                port = neighbour.port
            identification = (identification + 1) & 0xFFFF
            frames.append((template.frame(buffer, view, at, octets, identification),))
            at += LEAD + (octets if octets > TRAIL else TRAIL)
            if at > _BATCH_OCTETS:
                if port is not None:
                    port.send(frames)
                frames = []
                at = LEAD
        else:
            self._burst = min(MAX_BURST, budget * 4)
        wiring.identification = identification
        if frames and port is not None:
            port.send(frames)

    def _new_route(self, remote: Address, now: float) -> Route | None:
        route = self.seen_as(remote, now)
        if route is not None:
            if len(self._routes) >= ROUTES:
                self._routes.clear()
            self._routes[remote] = route
        return route

    def _find_guest(self, route: Route) -> Neighbour | None:
        """Make the template for where the guest is now."""
        wiring = self.wiring
        guest = self.guest
        neighbour = wiring.output.neighbour(guest.address)
        route.neighbour, route.template = neighbour, None
        if neighbour is not None:
            route.version = neighbour.version
            port = neighbour.port
            if port is not None:
                route.template = Template(
                    ethernet_header=ethernet.header(neighbour.mac, wiring.output.gateway_mac, ethernet.ETHERTYPE_IPV4),
                    source=route.source.address,
                    source_port=route.source.port,
                    destination=guest.address,
                    destination_port=guest.port,
                    prefix=port.link.prefix,
                    offload=port.partial,
                    mtu=port.mtu,
                )
        return neighbour

    def _send_general(self, source: Endpoint, payload: memoryview, now: float) -> None:
        guest = self.guest
        datagram = udp.emit(source.port, guest.port, payload, source.address, guest.address)
        self.wiring.output.send_ip(guest.address, _PROTOCOL, datagram, source=source.address, now=now)

    # Errors.

    def send_failed(self, association: Association, payload: memoryview, error: OSError, now: float) -> None:
        """`sendto` refused a datagram: tell the guest why, unless the error belongs to an earlier one."""
        number = error.errno or 0
        drops = self.wiring.counters.drops
        if number in error_queue.NO_ROOM:
            drops[Drop.UDP_SEND] += 1
            return
        reported = self.relay_errors(now)
        if number == errno.EMSGSIZE:
            drops[Drop.UDP_SEND] += 1
            mtu = error_queue.fitting_mtu(reported, association.address[0])
            self._tell(association, icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, None, mtu, payload, now)
            return
        try:
            # The call before this one took the pending error of an earlier datagram with it; this one was not sent.
            association.sendto(payload, association.address)
        except OSError as again:
            drops[Drop.UDP_SEND] += 1
            code = error_queue.unreachable_code(again.errno or 0)
            if code is not None and not (code == icmp.PORT_UNREACHABLE and error_queue.LINUX):
                self._tell(association, icmp.UNREACHABLE, code, None, 0, payload, now)
            return
        association.entry.octets_outbound += len(payload)

    def relay_errors(self, now: float) -> list[QueuedError]:
        """Pass on what the host was told about earlier datagrams (conformance C05, U07)."""
        reported = error_queue.drain(self.sock)
        for error in reported:
            association = self.associations.get(error.destination)
            if association is not None and not error.local:
                self._tell(association, error.kind, error.code, error.offender, error.mtu, error.quoted, now)
        return reported

    def _tell(
        self,
        association: Association,
        kind: int,
        code: int,
        offender: bytes | None,
        mtu: int,
        payload: bytes | memoryview,
        now: float,
    ) -> None:
        """An ICMP error about a datagram of `association`, from the router that said so where it is known."""
        guest, destination = association.guest, association.destination
        if offender is not None and offender == socket.inet_aton(association.address[0]):
            offender = destination.address
        elif offender is not None and offender[0] == 127:
            offender = None
        data = quote.udp_datagram(
            guest.address, guest.port, destination.address, destination.port, payload, association.octets
        )
        output = self.wiring.output
        neighbour = output.neighbour(guest.address)
        if neighbour is not None:
            output.icmp_quoting(kind, code, data, neighbour, source=offender, mtu=mtu, now=now)
