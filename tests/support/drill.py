"""The drill player: one guest, one stack, one scripted outside world, all in virtual time.

    d = Drill()
    f = d.open(dst=("93.184.216.34", 80), mss=1460, scale=7, sack=True)   # guest's SYN ... handshake done
    d.guest(f, "R", seq=f.rcv + 100)                                      # inject a segment
    d.expect(f, ".", ack=f.snd)                                           # the next frame of the flow, now
    d.guest(f, "R", seq=f.snd); d.expect_none(1.0)
    assert d.host(f).aborted
    d.assert_clean()

`f.snd` and `f.rcv` are what the guest sends next and expects next, as plain numbers of the wire. Every frame in and out goes
through the oracle and into `d.frames`; `save` writes them as a pcap (done for a test that fails, see `tests/support/plugin.py`).

The text form (`d.script`) uses numbers relative to both ISNs, as packetdrill and tcpdump do:

    +0    send 5000                                  the far end on the host sends 5000 octets
    +0    > P. 1:5001(5000)  ack 1                   the stack's frames; adjoining segments count as one range
    +.10  < .  1:1(0)        ack 1  win 100 <sack 1001:2001>
    +0~1  > .  1:1001(1000)  ack 1                   within this time
    +1    none                                       nothing was sent during this second
    +0    received 100 | eof | aborted               what the far end on the host has seen
    +0    shutdown | reset | stop | resume           what it does
"""

from __future__ import annotations

import os
import random
import re
import struct
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from netstack.api import Endpoint
from netstack.observe.events import Event, EventBus
from netstack.settings import Network
from netstack.stack import Stack
from tests.support import packets
from tests.support.clock import VirtualClock
from tests.support.fake_host import Accept, Address, FakeHostIO, FakeSocket, Outcome, Peer
from tests.support.link import make_link
from tests.support.oracle import Oracle, Violation
from tests.support.packets import ACK, FIN, IPV4, MASK, PSH, RST, SYN, Packet, Segment, ip

GUEST_MAC = bytes.fromhex("02000000aa03")
GUEST = ip("192.168.65.3")
GATEWAY = ip("192.168.65.1")
HOST_ALIAS = ip("192.168.65.2")
GATEWAY_MAC = bytes.fromhex("f61636bcf9c6")
SERVER: Address = ("93.184.216.34", 80)
EPSILON = 1e-6
TURNS = 20_000


def text(address: bytes) -> str:
    return ".".join(map(str, address))


def pattern(octets: int, start: int = 0) -> bytes:
    """Octets that differ from place to place, so that a shifted or repeated range shows."""
    return random.Random(f"pattern {start}").randbytes(octets)


class Flow:
    """The guest's end of one TCP connection, driven by hand."""

    def __init__(self, guest: bytes, remote: bytes, sport: int, dport: int, isn: int) -> None:
        self.guest, self.remote, self.sport, self.dport = guest, remote, sport, dport
        self.isn = isn
        self.iss = 0
        self.snd = isn
        self.rcv = 0
        self.window = 65535
        self.scale = 0
        self.mac = GUEST_MAC
        self.received = bytearray()
        self.sock: FakeSocket | None = None
        self.far: Peer | None = None
        self.synack: Segment | None = None
        self.inbox: deque[Segment] = deque()

    @property
    def key(self) -> tuple[bytes, int, bytes, int]:
        return self.guest, self.sport, self.remote, self.dport

    def __str__(self) -> str:
        return f"{text(self.guest)}:{self.sport} - {text(self.remote)}:{self.dport}"


class Drill:
    """See the module. `link` is one of `tests.support.link.KINDS` (`offload=True` is "vnet": virtio-net header and TSO);
    `peek_off=False` an older kernel."""

    def __init__(
        self,
        *,
        mtu: int = 1500,
        link_mtu: int | None = None,
        offload: bool = False,
        link: str = "",
        peek_off: bool = True,
        seed: int = 1,
        check: bool = True,
        resolve: bool = True,
        **settings: Any,
    ) -> None:
        self.clock = VirtualClock()
        self.io = FakeHostIO(self.clock, peek_off=peek_off)
        self.bus = EventBus()
        self.events: list[Event] = []
        self.bus.subscribe(self.events.append)
        self.network = Network(mtu=mtu, **settings)
        self.random = random.Random(seed)
        self.stack = Stack(self.network, clock=self.clock, rng=random.Random(seed), io=self.io, events=self.bus)
        mtu = link_mtu or mtu
        self.link: Any = make_link(link or ("vnet" if offload else "plain"), mtu)
        self.io.adopt(self.link)
        self.mtu = mtu
        self.offload = bool(self.link.partial_checksums)
        self.oracle = Oracle(mtu=mtu, tso=self.link.tso, headroom=self.link.headroom, vnet=self.offload)
        self._out: deque[bytes] = deque()
        self._violation: Violation | None = None
        self.use(self.link)
        self.check = check
        self.frames: list[tuple[float, bytes]] = []
        self.others: deque[Packet] = deque()
        """Frames that are not TCP of a known flow: ICMP, UDP, ARP (protocol -1), RSTs to nobody."""
        self.flows: dict[tuple[bytes, int, bytes, int], Flow] = {}
        self.emitted = 0
        self._next_port = 40000
        self.port = self.stack.attach(self.link)
        self.settle()
        if resolve:
            self.learn(GUEST, GUEST_MAC)

    def use(self, link: Any) -> None:
        """Speak through `link` from here on (the caller attaches it)."""
        self.link = link
        link.on_receive = self.oracle.guest_sent
        link.on_send = self._emitted_frame

    def _emitted_frame(self, raw: bytes) -> None:
        """The oracle sees frames at the moment they leave; the stack would contain what it raises, so `_collect` does."""
        self._out.append(raw)
        if self.check and self._violation is None:
            try:
                self.oracle.stack_sent(raw)
            except Violation as violation:
                self._violation = violation

    # time

    def settle(self) -> None:
        """Let the stack do all it can do now."""
        for _ in range(TURNS):
            self.clock.fire()
            more = self.stack.turn()
            self._collect()
            deadline = self.stack.deadline()
            due = deadline is not None and deadline <= self.clock.now
            if not more and not due and self.io.idle():
                return
        raise AssertionError("the stack is never done (it spins)")

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass, stopping at each deadline on the way."""
        end = self.clock.now + seconds
        for _ in range(TURNS):
            if not self._step(end):
                return
        raise AssertionError(f"more than {TURNS} deadlines in {seconds} s")

    def _step(self, end: float) -> bool:
        """Go to the next deadline, at most to `end`; False when the end was reached."""
        self.settle()
        times = [when for when in (self.stack.deadline(), self.clock.deadline()) if when is not None]
        following = min(times, default=end)
        if following >= end:
            self.clock.now = max(end, self.clock.now)
            self.settle()
            return False
        self.clock.now = max(following, self.clock.now) + EPSILON
        self.settle()
        return True

    # frames

    def inject(self, frame: bytes, header: bytes | None = None) -> None:
        """A frame from the guest, as it is (without the link's headroom), and let the stack handle it."""
        self.queue(frame, header)
        self.settle()

    def queue(self, frame: bytes, header: bytes | None = None) -> None:
        """As `inject`, but the stack finds it only at its next turn: several make a batch."""
        self._log(frame)
        self.link.feed(frame, header)

    def _log(self, frame: bytes) -> None:
        if len(self.frames) < 20_000:
            self.frames.append((self.clock.now, frame))

    def _collect(self) -> None:
        while self._out:
            raw = self._out.popleft()
            self.emitted += 1
            frame = raw[self.link.headroom :]
            self._log(frame)
            self._sort(raw, frame)
        violation, self._violation = self._violation, None
        if violation is not None:
            raise violation

    def _sort(self, raw: bytes, frame: bytes) -> None:
        packet = packets.read_ipv4(frame)
        if packet is None:
            kind = frame[12:14]
            self.others.append(
                Packet(frame[28:32], frame[38:42], -1, 0, 0, False, False, 0, frame[14:], kind, self.clock.now)
            )
            return
        packet.time = self.clock.now
        if packet.protocol == packets.TCP:
            segment = packets.read_tcp(packet)
            if self.offload:
                segment.gso_size = int.from_bytes(raw[4:6], "little")
            flow = self.flows.get((segment.destination, segment.dport, segment.source, segment.sport))
            if flow is not None:
                flow.inbox.append(segment)
                return
        self.others.append(packet)

    def ip(
        self,
        protocol: int,
        payload: bytes,
        *,
        src: bytes = GUEST,
        dst: bytes = GATEWAY,
        mac: bytes = GUEST_MAC,
        **fields: Any,
    ) -> None:
        """An IPv4 packet from the guest to the gateway's MAC."""
        self.inject(packets.ether(GATEWAY_MAC, mac, IPV4, packets.ipv4(src, dst, protocol, payload, **fields)))

    def udp(self, dst: Address | tuple[bytes, int], payload: bytes, *, sport: int = 5000, **fields: Any) -> None:
        """A datagram from the guest, fragmented as its kernel would."""
        address = ip(dst[0]) if isinstance(dst[0], str) else dst[0]
        source = fields.pop("src", GUEST)
        body = packets.udp(source, address, sport, dst[1], payload, check=fields.pop("check", None))
        packet = packets.ipv4(source, address, packets.UDP, body, **fields) if 20 + len(body) < 65536 else b""
        if len(body) + 20 <= self.mtu:
            self.inject(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet))
            return
        head = packet or (packets.ipv4(source, address, packets.UDP, b"", **fields) + body)
        size = (self.mtu - 20) & ~7
        for part in packets.fragments(head, size, ident=self.random.randrange(1, 65536)):
            self.queue(packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, part))
        self.settle()

    def learn(self, address: bytes, mac: bytes) -> None:
        """Tell the stack where `address` is, as a guest's gratuitous ARP does."""
        self.inject(packets.ether(b"\xff" * 6, mac, packets.ARP, packets.arp(1, mac, address, bytes(6), address)))
        self.others.clear()

    # what came out beside TCP flows

    def take(self, protocol: int, *, within: float = 0.0) -> Packet:
        """The next packet of `protocol` (-1 for ARP) that belongs to no flow; it must be the next one at all."""
        self._wait(lambda: bool(self.others), within)
        assert self.others, f"nothing was sent within {within} s; expected protocol {protocol}"
        packet = self.others.popleft()
        assert packet.protocol == protocol, f"protocol {packet.protocol} came instead of {protocol}: {packet}"
        return packet

    def take_whole(self, protocol: int, *, within: float = 0.0) -> Packet:
        """As `take`, with fragments put together (the oracle checks what they carry)."""
        first = self.take(protocol, within=within)
        parts = {first.offset: first}
        while not any(not part.mf for part in parts.values()) or sum(len(p.payload) for p in parts.values()) < max(
            p.offset + len(p.payload) for p in parts.values()
        ):
            part = self.take(protocol)
            assert part.ident == first.ident
            parts[part.offset] = part
        first.payload = b"".join(parts[at].payload for at in sorted(parts))
        return first

    def take_icmp(self, kind: int, code: int, *, within: float = 0.0) -> Packet:
        packet = self.take(packets.ICMP, within=within)
        assert (packet.payload[0], packet.payload[1]) == (kind, code), f"ICMP {packet.payload[0]}/{packet.payload[1]}"
        return packet

    def take_udp(self, *, within: float = 0.0) -> tuple[Address, int, bytes]:
        """`(source, destination port, payload)` of the next datagram to the guest."""
        packet = self.take_whole(packets.UDP, within=within)
        sport, dport = struct.unpack_from("!HH", packet.payload)
        return (text(packet.source), sport), dport, packet.payload[8:]

    def take_rst(self, *, within: float = 0.0) -> Segment:
        """The RST to a segment of no flow."""
        segment = packets.read_tcp(self.take(packets.TCP, within=within))
        assert segment.flags & RST, f"not a RST: {segment}"
        return segment

    # flows

    def flow(
        self, dst: Address = SERVER, *, sport: int | None = None, isn: int | None = None, guest: bytes = GUEST
    ) -> Flow:
        """A flow of which the stack has seen nothing yet."""
        if sport is None:
            sport = self._next_port
            self._next_port += 1
        flow = Flow(guest, ip(dst[0]), sport, dst[1], self.random.getrandbits(32) if isn is None else isn)
        self.flows[flow.key] = flow
        return flow

    def syn(
        self,
        flow: Flow,
        *,
        mss: int | None = 1460,
        scale: int | None = 7,
        sack: bool = True,
        window: int = 65535,
        flags: str = "S",
        data: bytes = b"",
        options: bytes | None = None,
    ) -> None:
        """The guest's SYN (repeatable); its flow expects the answer next."""
        if options is None:
            options = b"" if mss is None else packets.mss_option(mss)
            options += b"" if scale is None else packets.scale_option(scale)
            options += packets.SACK_PERMITTED if sack else b""
        flow.scale = scale or 0
        attempts = len(self.io.connects)
        self.guest(flow, flags, seq=flow.isn, ack=0, data=data, options=options, window=window, scaled=False)
        flow.snd = (flow.isn + 1) & MASK
        if flow.sock is None and len(self.io.connects) > attempts:
            flow.sock = self.io.connects[-1]
            flow.far = flow.sock.peer

    def open(
        self,
        dst: Address = SERVER,
        *,
        mss: int | None = 1460,
        scale: int | None = 7,
        sack: bool = True,
        window: int = 65535,
        outcome: Outcome | None = None,
        sport: int | None = None,
        isn: int | None = None,
        options: bytes | None = None,
        guest: bytes = GUEST,
    ) -> Flow:
        """A guest-opened flow, handshake complete. `window` is what the guest advertises (scaled after the SYN)."""
        if outcome is not None:
            self.io.on_connect(dst, outcome)
        flow = self.flow(dst, sport=sport, isn=isn, guest=guest)
        self.syn(flow, mss=mss, scale=scale, sack=sack, window=min(window, 65535), options=options)
        wait = outcome.after if isinstance(outcome, Accept) else 0.0
        self.establish(flow, window=window, within=wait + 0.001)
        return flow

    def establish(self, flow: Flow, *, window: int = 65535, within: float = 0.0) -> Segment:
        """Take the SYN-ACK and answer it."""
        synack = self.expect(flow, "S.", ack=flow.snd, within=within)
        flow.iss, flow.rcv, flow.synack = synack.seq, (synack.seq + 1) & MASK, synack
        if synack.shift is None:
            flow.scale = 0
        flow.window = window
        self.guest(flow, ".")
        return synack

    def dial(
        self,
        port: int = 80,
        *,
        guest: bytes = GUEST,
        source: Endpoint | None = None,
        isn: int | None = None,
        on_close: Callable[[str], None] | None = None,
        preface: bytes = b"",
    ) -> Flow:
        """A published port: the stack opens towards the guest; returns after its SYN, which is in `flow.synack`."""
        sock, far = self.io.connected()
        self.stack.dial(Endpoint(guest, port), sock, source=source, on_close=on_close, preface=preface)
        self.settle()
        segment: Segment | None = None
        for _ in range(5):
            for index, packet in enumerate(self.others):
                if packet.protocol == packets.TCP and packet.payload[13] & SYN:
                    segment = packets.read_tcp(packet)
                    del self.others[index]
                    break
            if segment is not None:
                break
            self.advance(0.01)
        assert segment is not None, "no SYN to the guest"
        assert segment.flags == SYN and segment.dport == port, str(segment)
        flow = Flow(guest, segment.source, port, segment.sport, self.random.getrandbits(32) if isn is None else isn)
        flow.iss, flow.rcv, flow.synack = segment.seq, (segment.seq + 1) & MASK, segment
        flow.sock, flow.far = sock, far
        self.flows[flow.key] = flow
        return flow

    def forward(
        self,
        port: int = 80,
        *,
        mss: int | None = 1460,
        scale: int | None = 7,
        sack: bool = True,
        window: int = 65535,
        isn: int | None = None,
        guest: bytes = GUEST,
        source: Endpoint | None = None,
        preface: bytes = b"",
    ) -> Flow:
        """A flow from the host through a published port, handshake complete."""
        flow = self.dial(port, guest=guest, isn=isn, source=source, preface=preface)
        options = (b"" if mss is None else packets.mss_option(mss)) + (packets.SACK_PERMITTED if sack else b"")
        options += b"" if scale is None else packets.scale_option(scale)
        flow.scale = scale or 0
        self.guest(
            flow,
            "S.",
            seq=flow.isn,
            ack=flow.rcv,
            options=options,
            window=min(window, 65535),
            scaled=False,
        )
        flow.snd = (flow.isn + 1) & MASK
        flow.window = window
        self.expect(flow, ".", seq=flow.rcv, ack=flow.snd)
        return flow

    def host(self, flow: Flow) -> Peer:
        """The far end of the host socket of `flow`."""
        assert flow.far is not None, "no host socket"
        return flow.far

    def segment(
        self,
        flow: Flow,
        flags: str,
        *,
        seq: int | None = None,
        ack: int | None = None,
        data: bytes = b"",
        window: int | None = None,
        options: bytes = b"",
        scaled: bool = True,
        **fields: Any,
    ) -> bytes:
        """The Ethernet frame of a segment of the guest."""
        bits = packets.flags_of(flags)
        if window is None:
            window = flow.window
        field = min(window >> flow.scale if scaled else window, 65535)
        body = packets.tcp(
            flow.guest,
            flow.remote,
            flow.sport,
            flow.dport,
            flow.snd if seq is None else seq & MASK,
            (flow.rcv if ack is None else ack & MASK) if bits & ACK or ack is not None else 0,
            bits,
            field,
            data,
            options,
            **fields,
        )
        packet = packets.ipv4(flow.guest, flow.remote, packets.TCP, body, df=True)
        return packets.ether(GATEWAY_MAC, flow.mac, IPV4, packet)

    def guest(self, flow: Flow, flags: str, *, queue: bool = False, **fields: Any) -> None:
        """Send a segment; `flow.snd` moves on when it is the next one in order. `window` in octets, unscaled."""
        data, bits = fields.get("data", b""), packets.flags_of(flags)
        frame = self.segment(flow, flags, **fields)
        seq = fields.get("seq")
        if seq is None or seq & MASK == flow.snd:
            flow.snd = (flow.snd + len(data) + bool(bits & FIN)) & MASK
        if fields.get("window") is not None and fields.get("scaled", True):
            flow.window = fields["window"]
        header = None
        if self.offload and fields.get("partial"):
            header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)
        if queue:
            self.queue(frame, header)
        else:
            self.inject(frame, header)

    def _wait(self, there: Callable[[], bool], within: float) -> None:
        self.settle()
        end = self.clock.now + within
        while not there() and self.clock.now < end:
            if not self._step(end):
                break

    def expect(
        self,
        flow: Flow,
        flags: str | None = None,
        *,
        seq: int | None = None,
        ack: int | None = None,
        length: int | None = None,
        data: bytes | None = None,
        window: int | None = None,
        within: float = 0.0,
        not_before: float = 0.0,
    ) -> Segment:
        """The next segment of the flow. PSH is not compared; `window` in octets as the guest reads it."""
        begin = self.clock.now
        self._wait(lambda: bool(flow.inbox), within)
        wanted = f"{flags} seq {seq} ack {ack} length {length if data is None else len(data)}"
        assert flow.inbox, f"{flow}: nothing was sent within {within} s; expected {wanted}"
        got = flow.inbox.popleft()
        assert self.clock.now - begin >= not_before - EPSILON * 10, (
            f"{flow}: too early, {self.clock.now - begin} s: {got}"
        )
        if flags is not None:
            bits = packets.flags_of(flags)
            assert got.flags & ~PSH == bits & ~PSH, f"{flow}: {got}; expected {wanted}"
        for name, value, found in (
            ("seq", seq, got.seq),
            ("ack", ack, got.ack),
            ("length", length, len(got.payload)),
            ("data", data, got.payload),
            ("window", window, got.window << (0 if got.flags & SYN else self.shift(flow))),
        ):
            if value is not None:
                value = value & MASK if isinstance(value, int) else value
                assert value == found, f"{flow}: {name} is {found!r}, expected {value!r}: {got}"
        if not got.flags & (SYN | RST) and got.seq == flow.rcv:
            flow.received += got.payload
            flow.rcv = got.end
        return got

    def shift(self, flow: Flow) -> int:
        """The window scale of the stack's segments."""
        synack = flow.synack
        return (synack.shift or 0) if synack is not None and synack.shift is not None and flow.scale else 0

    def window_of(self, flow: Flow, segment: Segment) -> int:
        return segment.window << (0 if segment.flags & SYN else self.shift(flow))

    def collect(self, flow: Flow, *, within: float = 0.0) -> list[Segment]:
        """All segments that wait (or come within that time), in order; `flow.rcv` moves over what is in order."""
        self.settle()
        if within:
            self.advance(within)
        found = []
        while flow.inbox:
            found.append(self.expect(flow))
        return found

    def expect_none(self, seconds: float = 0.0, flow: Flow | None = None) -> None:
        """Nothing is sent (on `flow`, or at all) for so long."""
        self.settle()
        if seconds:
            self.advance(seconds)
        where = self.flows.values() if flow is None else [flow]
        for each in where:
            assert not each.inbox, f"{each}: unexpected {each.inbox[0]}"
        if flow is None:
            assert not self.others, f"unexpected {self.others[0]}"

    def transfer(self, flow: Flow, octets: int, *, ack_every: int = 1, limit_s: float = 60.0) -> bytes:
        """Take `octets` from the stack, acknowledging as they come; returns them."""
        start = len(flow.received)
        end = self.clock.now + limit_s
        while len(flow.received) - start < octets:
            self._wait(lambda: bool(flow.inbox), end - self.clock.now)
            assert flow.inbox, f"{flow}: only {len(flow.received) - start} of {octets} octets came"
            while flow.inbox:
                self.expect(flow)
            self.guest(flow, ".")
        return bytes(flow.received[start:])

    def reset(self, flow: Flow) -> None:
        """The guest ends the flow with an exact RST."""
        self.guest(flow, "R", seq=flow.snd)

    def finish(self, flow: Flow) -> None:
        """Close in both directions, the guest first, and let TIME_WAIT pass."""
        self.guest(flow, "F.")
        self.collect(flow)
        self.host(flow).shutdown()
        for segment in self.collect(flow, within=0.3):
            if segment.flags & FIN:
                break
        self.guest(flow, ".")
        self.advance(120.0)
        flow.inbox.clear()

    # the end

    def assert_clean(self) -> None:
        """Nothing is left: no flow, no host socket, no timer (P6); and nothing odd happened on the way (P1)."""
        self.settle()
        flows = list(self.stack.flows())
        assert not flows, f"{len(flows)} flows are left, the first: {flows[0]}"
        assert not self.io.sockets, f"{len(self.io.sockets)} host sockets are left open"
        assert self.io.watched.keys() <= {self.link.fileno()}, f"watched descriptors are left: {self.io.watched}"
        self.assert_sane()

    def assert_sane(self) -> None:
        contained = [event for event in self.events if event.name == "Contained"]
        assert not contained and not self.stack.counters.contained, f"a bug was contained: {contained}"
        assert not self.io.misuse, f"misuse of host sockets: {self.io.misuse}"

    def close(self) -> None:
        """End the drill: whatever is open is reset, and nothing may remain."""
        self.stack.close()
        self._collect()
        assert not self.io.sockets, f"close leaves {len(self.io.sockets)} host sockets open"
        self.assert_sane()

    def save(self, path: Path) -> None:
        """Write the frames seen so far as a pcap with nanosecond timestamps."""
        write_pcap(path, self.frames)

    # the text form

    def script(self, flow: Flow, lines: str) -> None:
        """Play a script in the text form (see the module) on an established flow."""
        sent = len(self.host(flow).received)
        for line in lines.splitlines():
            line = line.split("#")[0].strip()
            if not line:
                continue
            when, _space, rest = line.partition(" ")
            begin, _tilde, span = when.lstrip("+").partition("~")
            try:
                self._play(flow, float(begin), float(span or 0), rest.strip(), sent)
            except AssertionError as error:
                raise AssertionError(f"in `{line}`: {error}") from error

    def _play(self, flow: Flow, begin: float, span: float, rest: str, base: int) -> None:
        word, _space, argument = rest.partition(" ")
        if word == "none":
            self.expect_none(begin, flow)
            return
        if begin and word == ">":
            self.advance(begin - 2 * EPSILON if begin > 0.001 else begin)
            assert not flow.inbox, f"too early: {flow.inbox[0]}"
            self._expect_line(flow, argument.strip(), span + 0.001)
            return
        if begin:
            self.advance(begin)
        far = self.host(flow)
        match word:
            case "<":
                self._guest_line(flow, argument.strip())
            case ">":
                self._expect_line(flow, argument.strip(), span)
            case "send":
                far.send(pattern(int(argument)))
                self.settle()
            case "shutdown" | "reset" | "close":
                getattr(far, word)()
                self.settle()
            case "stop":
                far.stop_reading()
            case "resume":
                far.resume()
                self.settle()
            case "received":
                assert len(far.received) == int(argument), f"the host received {len(far.received)} octets"
            case "eof":
                assert far.eof, "the host saw no end of file"
            case "aborted":
                assert far.aborted, "the host saw no RST"
            case _:
                raise ValueError(f"cannot read {rest!r}")

    _LINE = re.compile(
        r"(?P<flags>[FSRPUEWA.-]+)\s+(?P<begin>\d+):(?P<end>\d+)\((?P<length>\d+)\)"
        r"(?:\s+ack\s+(?P<ack>\d+))?(?:\s+win\s+(?P<win>\d+))?(?:\s+<sack\s+(?P<sack>[\d: ]+)>)?$"
    )

    def _guest_line(self, flow: Flow, argument: str) -> None:
        match = self._LINE.match(argument)
        assert match, f"cannot read {argument!r}"
        options = b""
        if match["sack"]:
            pairs = [pair.split(":") for pair in match["sack"].split()]
            options = packets.sack_option([(int(a) + flow.iss, int(b) + flow.iss) for a, b in pairs])
        ack = None if match["ack"] is None else int(match["ack"]) + flow.iss
        begin, length = int(match["begin"]), int(match["length"])
        assert int(match["end"]) - begin == length, f"the range does not fit its length in {argument!r}"
        # `snd` follows the script, so that a line may say the same number twice.
        flow.snd = (flow.isn + begin) & MASK
        self.guest(
            flow,
            match["flags"],
            ack=ack,
            data=pattern(1 << 16, 7)[begin : begin + length] if length else b"",
            window=None if match["win"] is None else int(match["win"]),
            options=options,
        )

    def _expect_line(self, flow: Flow, argument: str, within: float) -> None:
        match = self._LINE.match(argument)
        assert match, f"cannot read {argument!r}"
        bits = packets.flags_of(match["flags"])
        at, end = int(match["begin"]), int(match["end"])
        assert end - at == int(match["length"]), f"the range does not fit its length in {argument!r}"
        while True:
            got = self.expect(flow, within=within)
            begin = (got.seq - flow.iss) & MASK
            assert begin == at, f"begins at {begin}, expected {at}: {got}"
            at += len(got.payload)
            assert at <= end, f"ends at {at}, expected {end}: {got}"
            last = at == end
            assert got.flags & ~(PSH | FIN) == bits & ~(PSH | FIN), f"flags: {got}"
            assert not last or got.flags & FIN == bits & FIN, f"flags: {got}"
            if match["ack"] is not None:
                assert (got.ack - flow.isn) & MASK == int(match["ack"]), f"ack {(got.ack - flow.isn) & MASK}: {got}"
            if last:
                if match["win"] is not None:
                    assert self.window_of(flow, got) == int(match["win"]), f"window {self.window_of(flow, got)}: {got}"
                if match["sack"]:
                    pairs = [tuple(map(int, pair.split(":"))) for pair in match["sack"].split()]
                    found = [((a - flow.isn) & MASK, (b - flow.isn) & MASK) for a, b in got.sack]
                    assert found == pairs, f"SACK {found}, expected {pairs}"
                return


def write_pcap(path: Path, frames: list[tuple[float, bytes]]) -> None:
    """A classic pcap of Ethernet frames with nanosecond timestamps."""
    with open(path, "wb") as file:
        file.write(struct.pack("<IHHiIII", 0xA1B23C4D, 2, 4, 0, 0, 262144, 1))
        for time, frame in frames:
            seconds = int(time)
            file.write(struct.pack("<IIII", seconds, int((time - seconds) * 1e9), len(frame), len(frame)))
            file.write(frame)


def failed_path(name: str) -> Path:
    """Where the pcap of a failed test goes."""
    directory = Path(os.environ.get("PYVPNKIT_TEST_PCAPS", "test-pcaps"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory / (re.sub(r"[^A-Za-z0-9_.-]+", "_", name)[-150:] + ".pcap")
