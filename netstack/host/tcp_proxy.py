"""All TCP flows of a network: who may open one, the host's connect, refusals, TIME-WAIT, and forwards into the guest.

Theory of operation. A SYN without a flow asks the policy where it may go, takes a host socket and connects it; the guest
waits without an answer (its SYN retransmissions are absorbed) until the host has decided: connected becomes SYN-ACK, refused
RST, unreachable an ICMP error. A published port comes the other way: the accepted socket is given to `dial` and we send the
SYN. Connections to services on the network's own addresses run over a socket pair whose other end the service serves, and
where a tunnel takes one the host socket is a unix socket (`netstack.host.tunnels`). On a way out it is connected to a proxy
(`netstack.host.ways_out`).

Table: `flows` by the 12 octets of the guest's segments. A connection that has ended keeps only a note in `TIME-WAIT` (bounded,
oldest first out), enough to answer a repeated FIN; a new SYN there opens a new connection (T17).

Bounds: `limits.max_flows` flows; descriptors end in an honest RST. Both have counters.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import socket
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from netstack.api import Endpoint, Intercept
from netstack.errors import Malformed
from netstack.flow.records import FlowRecord, flow_id, local_address, local_end, remote_end
from netstack.host.io import ERROR, HANGUP, HostIO, first_source_port
from netstack.host.octets import Budget, OctetsOf
from netstack.host.tcp_burst import Burst
from netstack.host.tcp_flow import TcpFlow
from netstack.host.tcp_flow_state import FlowState
from netstack.host.tcp_forwards import Forwards, prepare
from netstack.host.tcp_frames import FrameMaker
from netstack.host.tcp_time_wait import Note, TimeWait
from netstack.host.tcp_to_guest import ToGuest
from netstack.host.tcp_to_host import ToHost
from netstack.host.timers import Timers
from netstack.host.tunnels import TunnelHandshake
from netstack.host.ways_out import CONNECTED, IN_PROGRESS, OutwardHandshake, Upstreams
from netstack.iface.interface import Packet
from netstack.iface.neighbours import Neighbour
from netstack.iface.output import Output
from netstack.observe.events import EventBus, FlowClosed, FlowOpened, FlowRefused
from netstack.observe.metrics import Counters, Drop
from netstack.policy.egress import Answer, Deny, Egress, Rewrite, Tunnel
from netstack.policy.ways_out import Outward
from netstack.settings import Network
from netstack.tcp.connection import Connection
from netstack.tcp.seq import MASK
from netstack.tcp.state import State
from netstack.wire import icmp
from netstack.wire import tcp as wire
from netstack.wire.checksum import verify
from netstack.wire.tcp import ACK, FIN, RST, SYN

log = logging.getLogger("pyvpnkit.tcp")

_UNREACHABLE: Final = {
    errno.EHOSTUNREACH: icmp.HOST_UNREACHABLE,
    errno.ENETUNREACH: icmp.NET_UNREACHABLE,
    errno.ETIMEDOUT: icmp.HOST_UNREACHABLE,
    errno.EHOSTDOWN: icmp.HOST_UNREACHABLE,
    errno.EACCES: icmp.ADMINISTRATIVELY_PROHIBITED,
    errno.EPERM: icmp.ADMINISTRATIVELY_PROHIBITED,
}
"""ICMP destination-unreachable codes for what a host connect says (RFC 792, RFC 1812)."""
_DESCRIPTORS: Final = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM))


class TcpProxy:
    """See the module. `now` is set by the stack once per turn."""

    def __init__(
        self,
        network: Network,
        io: HostIO,
        output: Output,
        egress: Egress,
        counters: Counters,
        events: EventBus,
        rng: random.Random,
        timers: Timers,
    ) -> None:
        self.io = io
        self.output = output
        self.counters = counters
        self.limits = network.limits
        self.timeouts = network.timeouts
        self.gateway_mac = network.gateway_mac_bytes
        self.now = 0.0
        self.flows: dict[bytes, TcpFlow] = {}
        self.dirty: list[FlowState] = []
        self.ready: list[ToGuest] = []
        """Flows that used their budget up and have more to send."""
        self.delayed: deque[ToHost] = deque()
        """Flows whose ACK waits for an answer to carry it, in order of time."""
        self.unacknowledged: list[ToHost] = []
        """Flows to acknowledge at the end of the turn; one may be in it more than once."""
        self.services: dict[tuple[bytes, int], Callable[[Any, Endpoint], None]] = {}
        """`(address, port)` -> function that takes its end of a socket pair and the guest's endpoint."""
        self.intercept: Intercept | None = None
        """Asked about connections that would leave the network; who it names serves them as a service does."""
        self.budget = Budget(network.limits.max_memory)
        self.octets_of = OctetsOf(network.limits.flow_buffer, self.budget)
        self.batch = 0
        """Number of the batch of frames that is being taken apart."""
        self.accepting = True
        self._mtu = network.mtu
        self.egress = egress
        self._events = events
        self._rng = rng
        self.timers = timers
        self._source_ports = first_source_port()
        self._secret = rng.randbytes(16)
        self.time_wait = TimeWait()
        self._bursts: dict[tuple[int, int], Burst] = {}
        self.upstreams = Upstreams()
        self.forwards = Forwards(self, network.gateway_bytes, rng.randrange(49152, 65536))

    # What flows use.

    def burst(self, headroom: int, mss: int) -> Burst:
        """The block for bursts of this shape; few shapes exist at a time, so few are kept."""
        key = headroom, mss
        found = self._bursts.get(key)
        if found is None:
            if len(self._bursts) >= 8:
                self._bursts.clear()
            found = self._bursts[key] = Burst(headroom, mss)
        return found

    def again(self, flow: ToGuest) -> None:
        """Pump this flow again once the others had their turn."""
        if not flow.queued:
            flow.queued = True
            self.ready.append(flow)

    def isn(self, key: bytes) -> int:
        """RFC 6528: a keyed hash of the connection's name and a clock of 4 µs."""
        digest = hashlib.blake2b(key, digest_size=4, key=self._secret).digest()
        return (int.from_bytes(digest, "big") + int(self.now * 250_000)) & MASK

    def hold(self, octets: int) -> bool:
        """`octets` more are held; False when that is too much for all flows together."""
        budget = self.budget
        budget.held += octets
        if budget.held <= budget.limit:
            return True
        self.counters.drops[Drop.MEMORY] += 1
        return False

    # Turns.

    def flush(self) -> None:
        """End of a batch: every flow it touched does what is due."""
        dirty = self.dirty
        while dirty:
            self.dirty = []
            for flow in dirty:
                flow.flush()
            dirty = self.dirty

    def pump(self) -> None:
        """One round for the flows that had more to send than their budget."""
        ready, self.ready = self.ready, []
        for flow in ready:
            flow.queued = False
            if not flow.end:
                flow.pump()
                conn = flow.conn
                if conn is not None and conn.snd.rto_at and not flow.end:
                    flow.rearm(conn.snd.rto_at)

    def acknowledge(self) -> None:
        """The turn is over."""
        flows, self.unacknowledged = self.unacknowledged, []
        for flow in flows:
            flow.acknowledge()

    def acknowledge_late(self, now: float) -> None:
        """ACKs that waited in vain leave."""
        delayed = self.delayed
        for _ in range(len(delayed)):
            if delayed[0].ack_due > now:
                break
            flow = delayed.popleft()
            if flow.answer_late(now):
                delayed.append(flow)

    # From the guest, the general way.

    def input(self, packet: Packet, now: float) -> None:
        """A segment of an unknown flow, or one that the fast way did not take."""
        segment = packet.payload
        try:
            header = wire.parse(segment)
        except Malformed:
            self.counters.drops[Drop.TCP_MALFORMED] += 1
            return
        if not packet.checksum_ok and not verify(
            segment, int.from_bytes(packet.source + packet.destination, "big") % 0xFFFF + 6 + len(segment)
        ):
            self.counters.drops[Drop.TCP_CHECKSUM] += 1
            return
        neighbour = packet.neighbour
        if neighbour is None:
            return
        flags = header.flags
        key = packet.source + packet.destination + bytes(segment[:4])
        flow = self.flows.get(key)
        if flow is not None:
            flow.port = neighbour.port
            offset_flags = header.payload_at << 10 | flags
            flow.segment(segment, header.payload_at, len(segment), header.seq, header.ack, offset_flags, header.window)
            return
        if flags & RST or not flags & (SYN | ACK) or flags & (SYN | FIN) == SYN | FIN:
            self.counters.drops[Drop.TCP_NO_FLOW] += 1
            return
        waiting = self.time_wait.get(key, now)
        if waiting is not None:
            if not (flags & SYN and not flags & ACK):
                # An acceptable ACK without text is what ends the wait's purpose; all else is told where we are.
                if flags & FIN or header.payload_at < len(segment) or header.seq != waiting.ack:
                    self._answer_time_wait(neighbour, key, waiting)
                return
        if flags & SYN and not flags & ACK:
            options = segment[wire.HEADER_LENGTH : header.payload_at]
            self.open(neighbour, key, header.seq, header.window, options, packet.data)
            return
        self.counters.drops[Drop.TCP_NO_FLOW] += 1
        self._reset_stray(neighbour, key, header, len(segment) - header.payload_at)

    def _maker(self, neighbour: Neighbour, key: bytes) -> FrameMaker | None:
        if neighbour.port is None:
            return None
        return FrameMaker(neighbour.port, neighbour, self.gateway_mac, key, 536)

    def _reset_stray(self, neighbour: Neighbour, key: bytes, header: wire.Segment, length: int) -> None:
        """RFC 9293 3.10.7.1: a segment for no connection is answered RST (never a RST)."""
        maker = self._maker(neighbour, key)
        if maker is None:
            return
        if header.flags & ACK:
            frame = maker.bare(header.ack, 0, RST, 0)
        else:
            length += bool(header.flags & SYN) + bool(header.flags & FIN)
            frame = maker.bare(0, (header.seq + length) & MASK, RST | ACK, 0)
        maker.port.put((frame,))

    def _answer_time_wait(self, neighbour: Neighbour, key: bytes, note: Note) -> None:
        maker = self._maker(neighbour, key)
        if maker is not None:
            maker.port.put((maker.bare(note.seq, note.ack, ACK, note.window),))

    # Guest opens.

    def open(
        self, neighbour: Neighbour, key: bytes, seq: int, window: int, options: memoryview, quoted: memoryview
    ) -> None:
        """A guest's SYN for no flow: `quoted` is its packet, checked, and `options` those of TCP. HOT PATH of connects."""
        self.time_wait.remove(key)  # a new SYN opens a new connection there (T17)
        address = key[4:8]
        port = int.from_bytes(key[10:12], "big")
        if not self.accepting or len(self.flows) >= self.limits.max_flows:
            self.counters.drops[Drop.TCP_LIMIT] += 1
            self._refuse(neighbour, key, seq, "too many flows")
            return
        egress = self.egress
        service = self.services.get((address, port))
        if service is not None and egress.overrides(6, address, port):
            service = None
        target: tuple[str, int] | None = None
        tunnel: Tunnel | None = None
        outward: Outward | None = None
        if service is None:
            led = egress.tunnels or egress.ways_out
            decision = egress.led(address, port) if led else egress.decide(6, address, port)
            if isinstance(decision, Deny):
                self.counters.drops[Drop.POLICY] += 1
                if decision.answer is Answer.PROHIBITED and address[0] == 127:
                    # A RST from there would be a martian, which the guest's kernel ignores.
                    self.output.icmp_quoting(icmp.UNREACHABLE, decision.answer.value, quoted, neighbour, now=self.now)
                elif decision.answer is not Answer.SILENT:
                    self._refuse(neighbour, key, seq, decision.reason)
                return
            if isinstance(decision, Rewrite):
                target = decision.where
            elif self.intercept is not None and (found := self.intercept(Endpoint(address, port))) is not None:
                service = found
            elif isinstance(decision, Tunnel):
                tunnel = decision
            elif isinstance(decision, Outward):
                outward = decision
        try:
            if service is not None:
                sock, other = self._pair()
            else:
                sock = self.io.socket(socket.AF_INET if tunnel is None else socket.AF_UNIX, socket.SOCK_STREAM)
        except OSError as error:
            self.counters.drops[Drop.DESCRIPTORS] += 1
            self._refuse(neighbour, key, seq, f"no socket: {error.strerror}")
            return
        flow = TcpFlow(self, key, neighbour, sock, inbound=False, now=self.now)
        flow.syn = (seq, window, wire.parse_options(options))
        self.flows[key] = flow
        if service is not None:
            self.begun(flow)
            service(other, Endpoint(key[:4], int.from_bytes(key[8:10], "big")))
            return
        if tunnel is not None:
            flow.dialling(self.now + self.timeouts.tcp_connect_s)
            TunnelHandshake(self, flow, tunnel).start(self.now)
            return
        if outward is not None:
            flow.quoted = bytes(quoted[:60])
            OutwardHandshake(self, flow, outward).start(self.now)
            return
        self.dial(flow, (socket.inet_ntoa(address), port) if target is None else target, quoted)

    def dial(self, flow: TcpFlow, where: tuple[str, int], quoted: memoryview | bytes) -> None:
        """Connect the flow's fresh socket to `where`; `quoted` is the guest's SYN."""
        sock = flow.sock
        try:
            prepare(sock)
            result = self.connect(sock, where)
        except OSError as error:
            result = error.errno or errno.EIO
        if result in CONNECTED:
            self.begun(flow)
            return
        flow.quoted = bytes(quoted[:60])
        if result not in IN_PROGRESS:
            self.connect_failed(flow, result)
            return
        try:
            self.io.watch(sock.fileno(), flow.ready, write=True)
        except OSError as error:
            self.connect_failed(flow, error.errno or errno.EIO)
            return
        flow.watched = True
        flow.dialling(self.now + self.timeouts.tcp_connect_s)

    def connect(self, sock: Any, where: tuple[str, int]) -> int:
        """Connect; the errno, one of `CONNECTED` or `IN_PROGRESS` where there is none. Raises `OSError`."""
        result: int = sock.connect_ex(where)
        if result in IN_PROGRESS:
            # On loopback the second call already knows; that saves a turn of the loop.
            result = sock.connect_ex(where)
        if result in CONNECTED and where[1] >= self._source_ports and sock.getsockname()[:2] == where:
            return errno.ECONNREFUSED  # nobody listens: the socket has met itself (RFC 9293 3.5, both sides open)
        return result

    def connected(self, flow: TcpFlow, mask: int) -> None:
        """A connect was pending and its socket is ready: it has succeeded or failed."""
        number = flow.socket_error()
        if number:
            self.connect_failed(flow, number)
        elif mask & (ERROR | HANGUP) and not mask & 4:
            self.connect_failed(flow, errno.ECONNREFUSED)
        elif mask & 4:
            self.begun(flow)

    def begun(self, flow: TcpFlow) -> None:
        """The host is connected, and whoever stands in between has agreed: answer the guest."""
        seq, window, options = flow.syn
        conn = Connection.passive(self.isn(flow.key), seq, window, options, self.capacity(flow), self.mss(flow))
        flow.begin(conn)
        if not flow.watched:
            flow.watched = True
            try:
                self.io.watch(flow.sock.fileno(), flow.ready)
            except OSError as error:
                self.connect_failed(flow, error.errno or errno.EIO)
                return
        self.opened(flow)

    def capacity(self, flow: TcpFlow) -> int:
        """Receive window in octets, a multiple of the window scale's unit."""
        port = flow.neighbour.port
        return min(self.limits.flow_buffer, port.window if port is not None else 1 << 30) & ~127

    def mss(self, flow: TcpFlow) -> int:
        """What we announce: the largest segment of the guest's link (RFC 9293 3.7.1)."""
        port = flow.neighbour.port
        return (port.mtu if port is not None else self._mtu) - 40

    def _pair(self) -> tuple[socket.socket, socket.socket]:
        """A socket pair between a flow and a service. Raises `OSError`."""
        sock, other = socket.socketpair()
        try:
            self.io.admit(other)
            self.io.admit(sock)
        except OSError:
            sock.close()
            other.close()
            raise
        sock.setblocking(False)
        other.setblocking(False)
        return sock, other

    def opened(self, flow: TcpFlow) -> None:
        """Count and tell of a new flow."""
        self.counters.tcp_opened += 1
        if self._events.wanted:
            guest, remote = flow.endpoints()
            self._events.emit(
                FlowOpened(
                    time=self.now,
                    protocol="tcp",
                    guest=str(guest),
                    remote=str(remote),
                    direction="inbound" if flow.inbound else "outbound",
                )
            )

    def connect_failed(self, flow: TcpFlow, number: int, reason: str = "") -> None:
        """The host could not connect: RST, or the ICMP error that gives the guest the same errno (T03, T04, F14).

        `reason` is for people, by default the errno's name; `number` is 0 where no errno fits: RST, whatever the reason.
        """
        reason = reason or errno.errorcode.get(number, str(number))
        code = _UNREACHABLE.get(number)
        neighbour = flow.neighbour
        self.counters.tcp_refused += 1
        if number in _DESCRIPTORS:
            self.counters.drops[Drop.DESCRIPTORS] += 1
        if code is not None and flow.quoted:
            self.output.icmp_quoting(icmp.UNREACHABLE, code, flow.quoted, neighbour, now=self.now)
        if code is None or number == errno.ETIMEDOUT:
            self.refuse_waiting(flow)
        if self._events.wanted:
            guest, remote = flow.endpoints()
            self._events.emit(
                FlowRefused(
                    time=self.now,
                    protocol="tcp",
                    guest=str(guest),
                    remote=str(remote),
                    reason=reason,
                )
            )
        flow.finish(f"connect: {reason}", reset_host=False)

    def refuse_waiting(self, flow: FlowState) -> None:
        """RST for the guest's SYN that waits for an answer."""
        maker = self._maker(flow.neighbour, flow.key)
        if maker is not None and not flow.inbound:
            maker.port.put((maker.bare(0, (flow.syn[0] + 1) & MASK, RST | ACK, 0),))

    def _refuse(self, neighbour: Neighbour, key: bytes, seq: int, reason: str) -> None:
        """RST for a SYN that gets no flow."""
        self.counters.tcp_refused += 1
        maker = self._maker(neighbour, key)
        if maker is not None:
            maker.port.put((maker.bare(0, (seq + 1) & MASK, RST | ACK, 0),))
        if self._events.wanted:
            guest = Endpoint(key[:4], int.from_bytes(key[8:10], "big"))
            remote = Endpoint(key[4:8], int.from_bytes(key[10:12], "big"))
            self._events.emit(
                FlowRefused(time=self.now, protocol="tcp", guest=str(guest), remote=str(remote), reason=reason)
            )

    def returned(self, neighbour: Neighbour) -> None:
        """A guest whose link was lost is back: what its flows kept for it goes on."""
        for flow in list(self.flows.values()):
            if flow.neighbour is neighbour:
                flow.port = neighbour.port
                flow.resume()

    # The end of flows.

    def retire(self, flow: TcpFlow, conn: Connection) -> None:
        """Both directions are closed: leave a note for TIME-WAIT and let go."""
        if conn.state is not State.TIME_WAIT:
            flow.finish("closed", reset_host=False)
            return
        until = self.now + self.timeouts.tcp_time_wait_s
        self.time_wait.add(flow.key, Note(conn.snd.max, conn.rcv.nxt, flow.window(conn), until))
        flow.finish("closed", reset_host=False)

    def gone(self, flow: FlowState) -> None:
        """`flow` has finished."""
        if self.flows.get(flow.key) is flow:
            del self.flows[flow.key]
        self.timers.forget(flow)
        if flow.on_close is not None:
            flow.on_close(flow.end)
        if flow.conn is not None and self._events.wanted:
            guest, remote = flow.endpoints()
            self._events.emit(
                FlowClosed(
                    time=self.now,
                    protocol="tcp",
                    guest=str(guest),
                    remote=str(remote),
                    reason=flow.end,
                    octets_outbound=flow.octets_out,
                    octets_inbound=flow.octets_in,
                    duration_s=self.now - flow.opened_at,
                )
            )

    def deadline(self) -> float | None:
        """When `expire` has something to do; flows have timers of their own."""
        over = self.time_wait.deadline()
        if not self.delayed:
            return over
        due = self.delayed[0].ack_due
        return due if over is None or due < over else over

    def expire(self, now: float) -> None:
        """Let old TIME-WAIT notes go, and ACKs that waited long enough."""
        self.acknowledge_late(now)
        self.time_wait.expire(now)

    def probe_guest(self, ip: bytes) -> None:
        """The guest at `ip` began anew (DHCP DISCOVER): a rebooted one answers our probes with RST and frees its flows."""
        for flow in list(self.flows.values()):
            if flow.key[:4] == ip:
                flow.probe()

    def guest_error(self, packet: Packet, kind: int, code: int, mtu: int, quoted: memoryview, now: float) -> None:
        """An ICMP error of the guest about `quoted`, our packet to it (RFC 5927: the number must be in flight).

        Fragmentation needed makes smaller segments (T55); unreachable ends a connection that is being opened into the guest
        (T20) and never an established one (G29).
        """
        at = (quoted[0] & 15) << 2
        key = bytes(quoted[16:20]) + bytes(quoted[12:16]) + bytes(quoted[at + 2 : at + 4]) + bytes(quoted[at : at + 2])
        flow = self.flows.get(key)
        if flow is None or flow.conn is None:
            return
        conn = flow.conn
        snd = conn.snd
        if (int.from_bytes(quoted[at + 4 : at + 8], "big") - snd.una) & MASK >= max(snd.flight(), 1):
            return
        if (kind, code) == (icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED):
            if 576 <= mtu and mtu - 40 < snd.mss:
                snd.mss = mtu - 40
                flow.frames = None
                snd.timed_out(self.now)
                flow.resume()
        elif kind == icmp.UNREACHABLE and conn.state is State.SYN_SENT:
            flow.finish("guest: unreachable", reset_host=True)

    def reset_guest(self, ip: bytes, reason: str) -> None:
        for flow in list(self.flows.values()):
            if flow.key[:4] == ip:
                flow.abort(reason)

    def host_changed(self, before: frozenset[bytes], now: frozenset[bytes]) -> int:
        """The host's addresses are now these: reset flows over one that is gone; how many.

        A flow of a guest has an address the host had, since the kernel chose it. Of a published port's that is known only
        where it was among those `before`: a client may have been led here under an address that is nobody's (TPROXY, AnyIP).
        """
        count = 0
        for flow in list(self.flows.values()):
            local = local_address(flow.sock)
            if local is None or local in now or (flow.inbound and local not in before):
                continue
            flow.abort("host address is gone")
            count += 1
        return count

    def close(self, reason: str = "shutting down") -> None:
        for flow in list(self.flows.values()):
            flow.abort(reason)
        self.time_wait.clear()

    # For people.

    def records(self, now: float, *, ends: bool = False) -> list[FlowRecord]:
        """Every flow; with `ends` its host socket is asked for its names, two system calls each."""
        return [self._record(flow, now, ends) for flow in self.flows.values()]

    def reset(self, id: str) -> bool:
        """RST to both ends of the flow named so (`FlowRecord.id`); False when there is none."""
        for flow in self.flows.values():
            if flow_id("tcp", flow.key, flow.opened_at) == id:
                flow.abort("reset by hand")
                return True
        return False

    def _record(self, flow: TcpFlow, now: float, ends: bool) -> FlowRecord:
        guest, remote = flow.endpoints()
        local, peer = (local_end(flow.sock), remote_end(flow.sock)) if ends else ("", "")
        if flow.conn is not None:
            state = flow.conn.state.value
        else:
            state = "RESOLVING" if flow.inbound else "CONNECTING"
        return FlowRecord(
            id=flow_id("tcp", flow.key, flow.opened_at),
            protocol="tcp",
            direction="inbound" if flow.inbound else "outbound",
            guest=str(guest),
            remote=str(remote),
            remotes=1,
            host_local=local,
            host_remote=peer,
            state=state,
            octets_outbound=flow.octets_out,
            octets_inbound=flow.octets_in,
            age_s=now - flow.opened_at,
            idle_s=None,
        )
