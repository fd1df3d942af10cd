"""One virtual network assembled: links, switch, interface, IPv4, TCP, UDP, ICMP, DHCP, and the host sockets behind them.

Theory of operation. The stack waits on one descriptor (`fileno`: the private epoll of `HostIO` with every link and every
host socket in it). When it is readable, or `deadline` comes, the owner calls `turn`, which makes one bounded pass: what is
ready, batch by batch; flows that had more to send; timers; then everything queued leaves. `turn` returns whether it should
be called again at once. Nothing here awaits, so the stack runs under any loop, or none (in tests, with a clock of their own).

Time: `clock` is read once per turn; every protocol gets `now` from here.

Faults: whatever a guest sends is counted and dropped where it is noticed. An exception that is our own bug is contained: to
the flow where one is known, else to the batch; it is counted and logged once per place.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from netstack.api import (
    Clock,
    DatagramHandler,
    Datagrams,
    Endpoint,
    GatewayForward,
    Intercept,
    Link,
    OutwardProxy,
    SocketHandler,
    StreamHandler,
    TunnelRule,
    WayOutRule,
)
from netstack.dhcp.leases import Leases
from netstack.dhcp.server import Server as DhcpServer
from netstack.errors import LinkDown, Malformed
from netstack.host.handshake import Handshake
from netstack.host.icmp_proxy import IcmpProxy
from netstack.host.io import READ, HostIO, native_io
from netstack.host.tcp_flow_state import FlowState
from netstack.host.tcp_proxy import TcpProxy
from netstack.host.timers import Timers
from netstack.host.udp_proxy import UdpProxy
from netstack.host.ways_out import Upstreams
from netstack.iface.interface import Interface, Packet
from netstack.iface.neighbours import Neighbour, Neighbours
from netstack.iface.offload import make_plain
from netstack.iface.output import Output
from netstack.iface.switch import Port, Switch
from netstack.ip import icmp
from netstack.ip.fragments import Reassembler
from netstack.ip.ipv4 import Identifications
from netstack.link.capture import CaptureLink
from netstack.observe.events import Contained, EventBus
from netstack.observe.live import Live
from netstack.observe.metrics import Counters
from netstack.policy.egress import Egress
from netstack.policy.ways_out import Ways
from netstack.settings import Network
from netstack.views import Views
from netstack.wire import icmp as wire_icmp
from netstack.wire import udp

log = logging.getLogger("pyvpnkit.stack")

ROUNDS: Final = 4
"""Batches per turn before the loop has its turn."""
GUEST_LOST_S: Final = 30.0
"""Flows of a guest whose link is gone are reset after this, unless it came back."""
_NEVER: Final = float("inf")
RETRY_S: Final = 0.002
"""When a congested link that tells nothing (a full datagram socket) is tried again."""


class Stack(Views):
    """See the module. `io` is where host sockets come from; `rng` decides what nobody may guess."""

    def __init__(
        self,
        network: Network,
        *,
        clock: Clock = time.monotonic,
        rng: random.Random | None = None,
        io: HostIO | None = None,
        events: EventBus | None = None,
        leases: Leases | None = None,
    ) -> None:
        self.network = network
        self.clock = clock
        self.events = events if events is not None else EventBus()
        self.counters = Counters()
        rng = rng if rng is not None else random.SystemRandom()
        self.io = io if io is not None else native_io(network.limits.descriptor_reserve)
        self.switch = Switch(self.counters, make_plain)
        self.leases = leases if leases is not None else Leases(network)
        self.neighbours = Neighbours(
            network.limits.max_neighbours, self.counters.drops, lambda ip: self.leases.at(ip, clock())
        )
        self.dhcp = DhcpServer(network, self.leases, counters=self.counters, events=self.events, rng=rng)
        self.egress = Egress(network)
        self.output = Output(
            network, self.counters, self.switch, self.neighbours, icmp.RateLimit(), Identifications(rng)
        )
        self.timers = Timers()
        self.tcp = TcpProxy(network, self.io, self.output, self.egress, self.counters, self.events, rng, self.timers)
        self.udp = UdpProxy(network, self.io, self.output, self.egress, self.counters, self.events, clock)
        self.icmp = IcmpProxy(network, self.io, self.output, self.egress, self.counters, self.events, clock)
        self.icmp.guest_errors.update({6: self.tcp.guest_error, 17: self.udp.guest_error})
        limits, timeouts = network.limits, network.timeouts
        self.reassembler = Reassembler(
            limits.max_fragments, limits.max_fragment_octets, timeouts.reassembly_s, self.counters
        )
        self.interface = Interface(
            network,
            self.counters,
            self.switch,
            self.neighbours,
            self.reassembler,
            self.tcp.flows,
            self.udp.associations,
            {1: self.icmp.input, 6: self.tcp.input, 17: self.udp.input},
            self._dhcp,
            lambda kind, code, packet, now: self.output.icmp_error(kind, code, packet, now=now),
            self.tcp.open,
            self._learnt,
            lambda ip: self.leases.at(ip, self.clock()) is not None,
            self._contain_flow,
        )
        self._parts = (self.tcp, self.udp, self.icmp, self.reassembler, self.dhcp)
        self.on_detached: Callable[[Link, str], None] = lambda link, reason: None
        """Told of every link that the stack let go of."""
        self.on_work: Callable[[], None] = lambda: None
        """Called when something outside a turn (a service's answer, a dial) queued work: the owner calls `turn` soon."""
        self._port_number = 0
        self._host_addresses: frozenset[bytes] = frozenset()
        self._lost: dict[bytes, float] = {}
        self._begun_anew: set[bytes] = set()
        """Addresses that were asked for by a guest without one, and that it has not used yet."""
        self.live = Live(self._watch_links)
        """Live captures of all links."""
        self._plain: dict[Port, Link] = {}
        """What was attached to ports whose link has a live capture around it now."""
        self._busy: set[Port] = set()
        """Ports to look at again in the next round: frames may come without a word."""
        self._looks: dict[Port, Callable[[int], None]] = {}
        self._retry_at = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._told: set[str] = set()
        self._turns = 0
        self._in_turn = False
        self._closed = False

    # Links.

    def attach(self, link: Link, identity: str | None = None) -> Port:
        """Take a link into the network; links of one `identity` belong to one guest."""
        self._port_number += 1
        port = Port(link, self._port_number, self.counters, identity)
        port.on_down = self.detach
        port.on_blocked = self._blocked
        self.switch.ports.append(port)
        if self.live:
            self._plain[port] = link
            port.use(CaptureLink(link, self.live))
        self._watch_link(port)
        return port

    def _watch_link(self, port: Port) -> None:
        ready = self._ready_function(port)
        if port.wakes_itself:
            port.link.watch(self.io, ready)  # type: ignore[attr-defined]
        else:
            self.io.watch(port.link.fileno(), ready, edge=False)

    def _unwatch_link(self, port: Port) -> None:
        if port.wakes_itself:
            port.link.unwatch()  # type: ignore[attr-defined]
        else:
            self.io.unwatch(port.link.fileno())

    def _watch_links(self, on: bool) -> None:
        """Put live captures around all links, or take them off: ports, and who is called when a link is ready, hold the other."""
        for port in tuple(self.switch.ports):
            self._unwatch_link(port)
            if on:
                self._plain[port] = port.link
                port.use(CaptureLink(port.link, self.live))
            else:
                port.use(self._plain.pop(port))
            try:
                self._watch_link(port)
                if port.congested:
                    self._want_room(port, True)
            except OSError as error:  # no room to watch it again
                port.down(f"cannot be watched: {error.strerror}")
        if not self._closed:
            self._work()

    def _ready_function(self, port: Port) -> Callable[[int], None]:
        """What to call when the port's link is ready; links that find trains are asked for them."""
        link = port.link
        receive: Callable[[], Any] = link.receive
        take: Callable[..., None] = self.interface.input
        if hasattr(link, "receive_trains"):
            receive, take = link.receive_trains, self.interface.input_trains
        if hasattr(link, "whole"):
            one_by_one, together = self.interface.input, self.interface.input_trains

            def take(port: Port, frames: Any, now: float) -> None:
                (one_by_one if link.whole else together)(port, frames, now)

        def ready(mask: int) -> None:
            self._link_ready(port, mask, receive, take)

        if port.polled:
            self._looks[port] = ready
        return ready

    def detach(self, port: Port, reason: str) -> None:
        """Let a link go (its peer is gone, or it is no longer wanted); its guests may come back elsewhere."""
        if port not in self.switch.ports:
            return
        self.switch.ports.remove(port)
        port.alive = False
        self._busy.discard(port)
        self._looks.pop(port, None)
        self._unwatch_link(port)
        link = self._plain.pop(port, port.link)
        self.switch.forget(port)
        self.dhcp.forget_port(port)
        until = self.clock() + GUEST_LOST_S
        for neighbour in self.neighbours.port_lost(port):
            self._lost[neighbour.ip] = until
        self.on_detached(link, reason)
        link.close()

    def _blocked(self, port: Port) -> None:
        self._want_room(port, True)

    def _want_room(self, port: Port, wanted: bool) -> None:
        if not port.wakes_itself:
            self.io.want_write(port.link.fileno(), wanted)

    def _link_ready(self, port: Port, mask: int, receive: Callable[[], Any], take: Callable[..., None]) -> None:
        """A link has frames, or room again."""
        if not port.alive:
            return
        if port.congested and mask & ~1:
            self._relieve(port)
        if not port.alive:
            return
        try:
            frames = receive()
        except LinkDown as error:
            port.down(str(error))
            return
        if port.polled:
            (self._busy.add if port.link.busy else self._busy.discard)(port)  # type: ignore[attr-defined]
        if frames:
            self.tcp.batch += 1
            try:
                take(port, frames, self.tcp.now)
            except Exception as error:  # contained: one batch, not the network
                self._contain("interface", error)
            self._flush_tcp()
            try:
                self.udp.flush(self.tcp.now)
            except Exception as error:  # contained: these datagrams
                self._contain("udp", error)

    def _relieve(self, port: Port) -> None:
        if port.drain():
            if port.alive:
                self._want_room(port, False)
            port.resume()
        elif not port.wakes_itself:
            # Writable, yet it takes nothing: a datagram peer that does not read. Ask again a little later.
            self._want_room(port, False)
            self._retry_at = self.tcp.now + RETRY_S

    def _flush_tcp(self) -> None:
        """End of a batch; a flow that fails by a bug of ours is reset alone."""
        tcp = self.tcp
        while tcp.dirty:
            dirty, tcp.dirty = tcp.dirty, []
            for flow in dirty:
                try:
                    flow.flush()
                except Exception as error:  # contained: this flow is reset
                    self._contain_flow(flow, error)

    def _contain_flow(self, flow: Any, error: Exception) -> None:
        self._contain("tcp flow", error)
        try:
            flow.abort("internal error")
        except Exception:
            log.exception("a flow could not be reset")

    def _contain(self, where: str, error: Exception) -> None:
        self.counters.contained += 1
        name = f"{where}: {type(error).__name__}: {error}"
        if name not in self._told and len(self._told) < 64:
            self._told.add(name)
            log.error("contained: %s", name, exc_info=error)
        self.events.emit(Contained(time=self.tcp.now, where=where, error=repr(error)))

    # Turns.

    def fileno(self) -> int:
        """Readable when `turn` has work."""
        return self.io.fileno()

    def turn(self) -> bool:
        """One bounded pass; True when more work waits right now."""
        tcp = self.tcp
        now = tcp.now = self.clock()
        self._in_turn = True
        more = False
        idle = True
        for round_ in range(ROUNDS):
            events = self.io.poll()
            if events:
                idle = False
            for ready, mask in events:
                try:
                    ready(mask)
                except Exception as error:  # contained: one event; a flow's is reset
                    owner = getattr(ready, "__self__", None)
                    if isinstance(owner, FlowState | Handshake):
                        self._contain_flow(owner, error)
                    else:
                        self._contain("event", error)
            if self._busy:
                for port in tuple(self._busy):
                    idle = False
                    self._looks[port](READ)
            if tcp.dirty:
                self._flush_tcp()
            if tcp.ready:
                tcp.pump()
            for port in self.switch.ports:
                if port.queued:
                    port.push()
            if not events and not tcp.ready and not self._busy:
                break
            more = round_ == ROUNDS - 1
        if tcp.unacknowledged:
            tcp.acknowledge()
        if tcp.delayed and tcp.delayed[0].ack_due <= now:
            tcp.acknowledge_late(now)
        for flow in self.timers.due(now):
            try:
                flow.timer(now)
            except Exception as error:  # contained: this flow is reset
                self._contain_flow(flow, error)
        # While events keep coming the rare time-outs are looked at now and then; a turn that a deadline brought has none.
        self._turns += 1
        if idle or not self._turns & 31:
            self._run_rare(now)
        if tcp.dirty:
            self._flush_tcp()
        self._push()
        self._in_turn = False
        return more or bool(tcp.ready) or bool(tcp.dirty) or bool(tcp.unacknowledged) or bool(self._busy)

    def _push(self) -> None:
        """What is queued leaves, and rings show what was done."""
        for port in tuple(self.switch.ports):
            if port.queued:
                port.push()
            publish = port.publish
            if publish is not None and port.alive:
                try:
                    publish()
                except Exception as error:  # contained: this link
                    self._contain("link", error)
                    port.down("internal error")

    def _run_rare(self, now: float) -> None:
        """Time-outs that are looked at each turn because each is one comparison."""
        output = self.output
        if output.ask_at and now >= output.ask_at:
            for ip in output.tick(now):
                self.tcp.forwards.unresolved(ip)
        if self._retry_at and now >= self._retry_at:
            self._retry_at = 0.0
            for port in self.switch.ports:
                if port.congested:
                    self._want_room(port, True)
        deadline = self.tcp.deadline()
        if deadline is not None and now >= deadline:
            self.tcp.expire(now)
        deadline = self.udp.deadline()
        if deadline is not None and now >= deadline:
            self.udp.expire(now)
        deadline = self.icmp.deadline()
        if deadline is not None and now >= deadline:
            self.icmp.expire(now)
        deadline = self.reassembler.deadline()
        if deadline is not None and now >= deadline:
            for first in self.reassembler.expire(now):
                neighbour = self.neighbours.get(first[12:16])
                if neighbour is not None:
                    self.output.icmp_quoting(
                        wire_icmp.TIME_EXCEEDED, wire_icmp.REASSEMBLY_EXCEEDED, first, neighbour, now=now
                    )
        deadline = self.dhcp.deadline()
        if deadline is not None and now >= deadline:
            self.dhcp.timeout(now)
        if self._lost:
            self._end_lost(now)

    def _end_lost(self, now: float) -> None:
        """Flows of guests that did not come back."""
        for ip, until in list(self._lost.items()):
            neighbour = self.neighbours.get(ip)
            if neighbour is None or neighbour.port is not None:
                del self._lost[ip]
            elif now >= until:
                del self._lost[ip]
                self.tcp.reset_guest(ip, "guest is gone")
                self.udp.close_guest(ip)
                self.icmp.close_guest(ip)

    def deadline(self) -> float | None:
        """When `turn` is next wanted although nothing is readable; `None` for never."""
        due = self.timers.deadline()
        found = _NEVER if due is None else due
        if self.output.ask_at:
            found = min(found, self.output.ask_at)
        if self._retry_at:
            found = min(found, self._retry_at)
        for part in self._parts:
            when = part.deadline()
            if when is not None and when < found:
                found = when
        if self._lost:
            found = min(found, *self._lost.values())
        return found if found != _NEVER else None

    # Who is where.

    def _learnt(self, neighbour: Neighbour) -> None:
        self.output.learnt(neighbour)
        self.tcp.forwards.learnt(neighbour)
        self._back(neighbour)
        if neighbour.ip in self._begun_anew:
            # It asked for its address anew, so it may have been started anew; now that it has the address it answers probes.
            self._begun_anew.discard(neighbour.ip)
            self.tcp.probe_guest(neighbour.ip)

    def _back(self, neighbour: Neighbour) -> None:
        if self._lost.pop(neighbour.ip, None) is not None:
            self.tcp.returned(neighbour)

    def _dhcp(self, packet: Packet, now: float) -> None:
        try:
            source_port, _port, payload = udp.parse(packet.payload)
        except Malformed:
            self.counters.drops["udp_malformed"] += 1
            return
        if not packet.checksum_ok and not udp.verify(packet.payload, packet.source, packet.destination):
            self.counters.drops["udp_checksum"] += 1
            return
        if source_port != 68:
            self.counters.drops["dhcp_ignored"] += 1
            return
        reply = self.dhcp.handle(
            payload,
            source_mac=packet.source_mac,
            source=packet.source,
            destination=packet.destination,
            port=packet.port,
            mtu=packet.port.mtu,
            now=now,
        )
        if reply is None:
            return
        if packet.source == bytes(4):
            if len(self._begun_anew) >= 1024:
                self._begun_anew.clear()
            self._begun_anew.add(bytes(reply.payload[16:20]))
        if reply.leased is not None and reply.leased in self._lost:
            # It is back on another link, and may have nothing to say itself.
            neighbour = self.neighbours.learn(reply.leased, packet.source_mac, packet.port)
            if neighbour is not None:
                self._back(neighbour)
        datagram = udp.emit(67, 68, reply.payload, reply.source, reply.destination)
        target = Neighbour(reply.destination, reply.destination_mac, packet.port)
        self.output.send_to(target, 17, datagram, source=reply.source)

    # Services on our own addresses (netstack.api.Services).

    def serve_datagrams(self, address: bytes, port: int, handler: DatagramHandler) -> None:
        """Datagrams of guests to `address:port` go to `handler`."""

        def guarded(payload: bytes, source: Endpoint, reply: Callable[[bytes], None]) -> None:
            def answer(octets: bytes) -> None:
                reply(octets)
                self._work()

            handler(payload, source, answer)

        self.udp.services[address, port] = guarded

    def serve_streams(self, address: bytes, port: int, handler: StreamHandler) -> None:
        """Connections of guests to `address:port` are served by tasks that run `handler`."""

        async def serve(sock: socket.socket, source: Endpoint) -> None:
            reader, writer = await asyncio.open_connection(sock=sock)
            try:
                await handler(reader, writer, source)
            except (OSError, asyncio.IncompleteReadError):
                pass  # the guest went away
            except Exception as error:  # contained: this connection
                self._contain("service", error)
            finally:
                writer.close()

        def start(sock: socket.socket, source: Endpoint) -> None:
            task = asyncio.get_running_loop().create_task(serve(sock, source))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self.tcp.services[address, port] = start

    def serve_sockets(self, address: bytes, port: int, handler: SocketHandler) -> None:
        """The sockets of guests' connections to `address:port` are given to `handler`, for servers with protocols of their own."""

        self.tcp.services[address, port] = self._giving(handler)

    def stop_serving(self, address: bytes, port: int) -> None:
        """New connections to `address:port` are refused; those that exist are their handler's. Harmless when repeated."""
        self.tcp.services.pop((address, port), None)

    def _giving(self, handler: SocketHandler) -> SocketHandler:
        def give(sock: socket.socket, source: Endpoint) -> None:
            try:
                handler(sock, source)
            except Exception as error:  # contained: this connection
                self._contain("service", error)
                sock.close()

        return give

    def intercept(self, ask: Intercept | None) -> None:
        """Ask about each new TCP connection that may leave the network; the handler that `ask` names serves it, at once.

        What is refused stays refused, and the host alias and the gateway's forwards are not asked about.
        """
        if ask is None:
            self.tcp.intercept = None
            return

        def found(destination: Endpoint) -> SocketHandler | None:
            handler = ask(destination)
            return None if handler is None else self._giving(handler)

        self.tcp.intercept = found

    # Into the guest (netstack.api.Dialer).

    def dial(
        self,
        guest: Endpoint,
        sock: socket.socket,
        *,
        source: Endpoint | None = None,
        on_close: Callable[[str], None] | None = None,
        preface: bytes = b"",
    ) -> None:
        """Carry a connected host socket into the guest; see `netstack.api.Dialer`."""
        self.tcp.forwards.dial(guest, sock, source, on_close, preface, self.clock())
        self._work()

    def datagrams(self, guest: Endpoint, sock: socket.socket, *, show_client: bool = False) -> Datagrams:
        """Carry datagrams of a bound host socket to the guest; see `netstack.api.Dialer`."""
        published: Datagrams = self.udp.publish(guest, sock, show_client)
        return published

    # Guests' flows that are led elsewhere (netstack.api.Outgoing).

    def forward_gateway(self, forwards: Sequence[GatewayForward]) -> None:
        """Have these ports of the gateway lead elsewhere; see `netstack.api.Outgoing`."""
        self.egress.gateway_forwards.replace(forwards)

    def tunnel(self, rules: Sequence[TunnelRule]) -> None:
        """Have these tunnels for outgoing TCP; see `netstack.api.Outgoing`."""
        self.egress.tunnels.replace(rules)

    @property
    def ways_out(self) -> Ways:
        """The rules of ways out, and by which names they know addresses."""
        return self.egress.ways_out

    @property
    def upstreams(self) -> Upstreams:
        """The proxies on the way out as they are now."""
        return self.tcp.upstreams

    def go_out(self, rules: Sequence[WayOutRule], *, fail_open: bool = False, datagrams: bool = False) -> None:
        """Have these ways out; see `netstack.api.Outgoing`."""
        self.egress.ways_out.replace(rules, fail_open=fail_open, datagrams=datagrams)
        self.tcp.upstreams.keep(rule.way for rule in rules if isinstance(rule.way, OutwardProxy))

    def _work(self) -> None:
        if not self._in_turn:
            self.on_work()

    # The host's own network.

    def host_changed(self, local_addresses: frozenset[bytes]) -> int:
        """The host's addresses (4 or 16 octets each, loopback too) are these now: TCP flows over an address that is gone are
        reset, both ways; how many. All others go on; so do UDP and ping, whose sockets have no address of their own.
        """
        before, self._host_addresses = self._host_addresses, local_addresses
        self.tcp.now = self.clock()
        count = self.tcp.host_changed(before, local_addresses)
        if count:
            self._work()
        return count

    def egress_mtu(self, mtu: int | None) -> None:
        """What fits the host's way out (octets, 576 at least), from now on: DHCP tells no guest more, and "fragmentation needed"
        says so where the host itself did not. `None`: not known, as in the beginning."""
        self.dhcp.highest_mtu = None if mtu is None else max(576, mtu)
        self.output.egress_mtu = 0 if mtu is None else max(576, mtu)

    # The end.

    def drain(self) -> None:
        """Take no new flows; those that exist go on."""
        self.tcp.accepting = False
        self.udp.draining = True
        self.icmp.draining = True

    def close(self) -> None:
        """Reset every flow, close every link and socket."""
        if self._closed:
            return
        self._closed = True
        self.tcp.now = self.clock()
        self.tcp.close()
        self.udp.close()
        self.icmp.close()
        for port in tuple(self.switch.ports):
            port.push()
            self.detach(port, "shutting down")
        self.live.close()
        for task in tuple(self._tasks):
            task.cancel()
        self.io.close()
