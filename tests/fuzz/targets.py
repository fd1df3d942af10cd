"""Fuzz targets (testing.md section 4): each is a function of a seeded random source that raises when a property breaks.

Z1 wire parsers; Z2 the whole stack, with checksums put right or not; Z4 the reassembler and Z5 the receiver against
brute-force models; beside this module Z6 and Z7 `shared_rings`, Z8 `streams`, Z9 `names`, Z10 `services` (without IPv6), Z12
`texts`. Structured rather than blind: a frame is built right and then bent, since noise dies at the first check.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

from netstack.api import Endpoint
from netstack.errors import Malformed
from netstack.ip.fragments import Reassembler
from netstack.observe.metrics import Counters
from netstack.settings import Limits
from netstack.tcp.receiver import Receiver
from netstack.wire import arp, dhcp, ethernet, icmp, ipv4, tcp, udp
from tests.fuzz.bend import spoil
from tests.fuzz.companions import z17_companions
from tests.fuzz.hostside import z16_hostside
from tests.fuzz.mux import z14_mux
from tests.fuzz.names import z9_names
from tests.fuzz.ninep import z13_ninep
from tests.fuzz.ports import z15_ports
from tests.fuzz.services import z10_services
from tests.fuzz.shared_rings import z6_rings, z7_messages
from tests.fuzz.streams import z8_streams
from tests.fuzz.texts import z12_texts
from tests.support import packets
from tests.support.drill import GATEWAY, GATEWAY_MAC, GUEST, GUEST_MAC, HOST_ALIAS, Drill, Flow, pattern, text
from tests.support.fake_host import Accept, Never, Refuse
from tests.support.link import KINDS
from tests.support.packets import ACK, IPV4, MASK, SYN, ip

REMOTES = [
    ip("93.184.216.34"),
    ip("8.8.8.8"),
    HOST_ALIAS,
    GATEWAY,
    ip("192.168.65.9"),
    ip("127.0.0.1"),
    ip("224.0.0.1"),
]
STREAM = pattern(1 << 16) * 2
"""What guests say, by sequence number modulo 65,536: so the host's end can be checked, whatever overlapped."""


def said(octets: bytes) -> bool:
    """Whether `octets` are a run of the stream."""
    at = STREAM.find(octets[: 1 << 16])
    return at >= 0 and octets == (STREAM * (len(octets) // len(STREAM) + 2))[at : at + len(octets)]


def options(rng: random.Random) -> bytes:
    """TCP options, right or wrong."""
    made = b"".join(
        rng.choice(
            [
                b"\1",
                b"\0",
                packets.mss_option(rng.choice([0, 1, 88, 536, 1460, 65535])),
                bytes((3, 3, rng.randrange(20))),
                b"\4\2",
                packets.sack_option([(rng.getrandbits(32), rng.getrandbits(32)) for _ in range(rng.randrange(1, 4))]),
                packets.timestamp_option(rng.getrandbits(32), rng.getrandbits(32)),
                bytes((rng.randrange(256), rng.randrange(256))) + rng.randbytes(rng.randrange(6)),
            ]
        )
        for _ in range(rng.randrange(4))
    )
    return made[:40]


def resum(frame: bytes) -> bytes:
    """The frame with its IPv4 header and transport checksums put right, as far as it can be read."""
    if len(frame) < 34 or frame[12:14] != b"\x08\0":
        return frame
    octets = bytearray(frame)
    head = (octets[14] & 15) * 4
    if head < 20 or 14 + head > len(octets):
        return frame
    octets[24:26] = b"\0\0"
    octets[24:26] = struct.pack("!H", packets.checksum(octets[14 : 14 + head]))
    total = int.from_bytes(octets[16:18], "big")
    at, end = 14 + head, 14 + total
    where = {6: 16, 17: 6, 1: 2}.get(octets[23])
    if where is None or end > len(octets) or at + where + 2 > end or int.from_bytes(octets[20:22], "big") & 0x3FFF:
        return bytes(octets)
    octets[at + where : at + where + 2] = b"\0\0"
    lead = b"" if octets[23] == 1 else packets.pseudo(bytes(octets[26:30]), bytes(octets[30:34]), octets[23], end - at)
    octets[at + where : at + where + 2] = struct.pack("!H", packets.checksum(lead + bytes(octets[at:end])) or 0xFFFF)
    return bytes(octets)


# Z1


def _sample(rng: random.Random) -> dict[str, bytes]:
    remote = rng.choice(REMOTES)
    payload = rng.randbytes(rng.choice([0, 1, 8, 40]))
    segment = packets.tcp(GUEST, remote, 1, 2, 3, 4, rng.randrange(256), 5, payload, options(rng))
    message = packets.icmp(rng.choice([0, 3, 8, 11]), rng.randrange(16), rng.randbytes(4), payload)
    datagram = packets.udp(GUEST, remote, 1, 2, payload)
    lease = bytes((1, 1, 6, 0)) + rng.randbytes(8) + bytes(16) + GUEST_MAC + bytes(202) + b"\x63\x82\x53\x63"
    lease += b"".join(bytes((rng.randrange(256), n := rng.randrange(6))) + rng.randbytes(n) for _ in range(8)) + b"\xff"
    return {
        "arp": packets.arp(rng.randrange(4), GUEST_MAC, GUEST, bytes(6), remote),
        "ethernet": packets.ether(GATEWAY_MAC, GUEST_MAC, rng.getrandbits(16), payload),
        "icmp": message,
        "ipv4": packets.ipv4(GUEST, remote, rng.randrange(256), segment, options=bytes(4 * rng.randrange(3))),
        "tcp": segment,
        "udp": datagram,
        "dhcp": lease,
    }


PARSERS: dict[str, Callable[[memoryview], Any]] = {
    "arp": arp.parse,
    "ethernet": ethernet.parse,
    "icmp": icmp.parse,
    "ipv4": ipv4.parse,
    "tcp": tcp.parse,
    "udp": udp.parse,
    "dhcp": lambda octets: dhcp.parse(bytes(octets)),
}


def z1_parsers(rng: random.Random) -> None:
    """Any octets parse or are `Malformed`."""
    for name, good in _sample(rng).items():
        for octets in (good, spoil(rng, good), rng.randbytes(rng.randrange(80)), good[: rng.randrange(len(good) + 1)]):
            try:
                PARSERS[name](memoryview(octets))
            except Malformed:
                pass
            except Exception as error:
                raise AssertionError(f"{name}.parse({octets.hex()}) raises {error!r}") from error
        tcp.parse_options(rng.randbytes(rng.randrange(41)))
        tcp.parse_options(options(rng))


# Z2


class Hostile:
    """A guest, a host and time that do as they like; the stack must keep every promise meanwhile."""

    LIMITS = Limits(
        max_flows=40, max_udp_flows=20, max_pings=10, max_neighbours=20, max_fragments=8, max_fragment_octets=60_000
    )

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.d = Drill(
            link=rng.choice(KINDS), peek_off=rng.random() < 0.7, seed=rng.getrandbits(32), limits=self.LIMITS
        )
        self.d.io.sent_buffer = rng.choice([1000, 20_000, 256 << 10])
        self.flows: list[Flow] = []
        self.lies = rng.random() < 0.5
        """Bent frames get right checksums: then anything may be said."""
        self.d.stack.serve_datagrams(GATEWAY, 53, lambda payload, source, reply: reply(payload * 3))

    def step(self) -> None:
        rng, d = self.rng, self.d
        for _ in range(rng.choice([1, 1, 3, 20])):
            frame = rng.choice([self.tcp_frame, self.tcp_frame, self.tcp_frame, self.ip_frame, self.arp_frame])()
            odd = rng.random()
            if odd < 0.15:
                frame = spoil(rng, frame)
            if self.lies and odd < 0.12:
                frame = resum(frame)
            header = None
            if d.offload and self.lies and rng.random() < 0.1:
                header = struct.pack(
                    "<BBHHHHH",
                    *(rng.choice([0, 1, 2, 255]) for _ in range(2)),
                    *(rng.getrandbits(16) for _ in range(5)),
                )
                d.check = False  # what the header makes of the frame is not known to the oracle
            d.queue(frame, header)
        if rng.random() < 0.5:
            self.host_acts()
        if rng.random() < 0.5:
            d.settle()
        else:
            d.advance(rng.choice([0.0, 0.01, 0.3, 2.0, 40.0]))
        self.check()

    def tcp_frame(self) -> bytes:
        rng, d = self.rng, self.d
        if not self.flows or rng.random() < 0.1:
            remote = rng.choice(REMOTES[:3])
            f = d.flow((text(remote), rng.choice([80, 443, 53])), sport=rng.choice([rng.randrange(65536), 40000]))
            self.flows.append(f)
            if len(self.flows) > 6:
                self.flows.pop(0)
            f.scale = rng.choice([0, 7, 14])
            opts = (
                packets.mss_option(rng.choice([88, 536, 1460])) + packets.scale_option(f.scale) + packets.SACK_PERMITTED
            )
            f.snd = (f.isn + 1) & MASK
            return d.segment(
                f, "S", seq=f.isn, ack=0, options=opts if rng.random() < 0.8 else options(rng), scaled=False
            )
        f = rng.choice(self.flows)
        while f.inbox:
            segment = f.inbox.popleft()
            if segment.flags & SYN:
                f.iss, f.rcv, f.synack = segment.seq, (segment.seq + 1) & MASK, segment
            elif segment.seq == f.rcv:
                f.rcv = segment.end
        flags = rng.choice([".", ".", ".", ".", ".", "P.", "P.", "F.", "R", "R.", "S", "S.", "U.", "-", "SF", "FPU"])
        offset = rng.choice(
            [0, 0, 0, 0, 0, 1, -1, 100, 1460, -1460, rng.randrange(-70_000, 70_000), rng.getrandbits(32)]
        )
        seq = (f.snd + offset) & MASK
        if "S" in flags and seq == f.isn:
            seq = (seq + 7) & MASK  # one number for two SYNs with other options: nobody can tell which was answered
        length = rng.choice([0, 0, 0, 1, 5, 100, 1460])
        at = (seq + ("S" in flags) - f.isn - 1) & MASK  # a SYN takes a number, then the octets follow
        data = STREAM[at & 0xFFFFF :][:length]
        if flags in ("S", "SF", "-", "FPU"):
            data = b""
        if offset == 0 and flags in (".", "P.", "F."):
            f.snd = (f.snd + len(data) + ("F" in flags)) & MASK
        ack = (f.rcv + rng.choice([0, 0, 0, 0, 0, -1, 1, -1000, 1000, rng.getrandbits(32)])) & MASK
        return d.segment(
            f,
            flags,
            seq=seq,
            ack=ack,
            data=data,
            window=rng.choice([65535, 65535, 65535, 1000, 0, 1, rng.getrandbits(20)]),
            options=options(rng) if rng.random() < 0.05 and len(data) < 1400 else b"",
        )

    def ip_frame(self) -> bytes:
        rng = self.rng
        remote = rng.choice(REMOTES)
        kind = rng.randrange(7)
        protocol = 17
        if kind <= 1:
            body = packets.udp(
                GUEST,
                remote,
                rng.choice([68, 1000, 1001, rng.randrange(65536)]),
                rng.choice([53, 67, 123, 9, 0]),
                rng.randbytes(rng.choice([0, 1, 300, 1400])),
            )
        elif kind == 2:
            protocol, body = (
                1,
                packets.echo(rng.randrange(4), rng.getrandbits(16), rng.randbytes(rng.choice([0, 56, 1400]))),
            )
        elif kind == 3:
            protocol = 1
            if self.flows:
                f = rng.choice(self.flows)
                inner = packets.tcp(
                    f.remote, f.guest, f.dport, f.sport, (f.rcv - rng.randrange(3000)) & MASK, 0, ACK, 100
                )
                quoted = packets.ipv4(f.remote, f.guest, 6, inner, df=True)
            else:
                quoted = packets.ipv4(remote, GUEST, 17, packets.udp(remote, GUEST, 53, 1000, b""))
            body = packets.icmp(
                rng.choice([3, 3, 4, 5, 11, 12]),
                rng.randrange(16),
                struct.pack("!HH", 0, rng.choice([0, 68, 576, 1000, 9000])),
                quoted[: rng.choice([28, 60, 20, 5])],
            )
        elif kind == 4:
            protocol, body = rng.randrange(256), rng.randbytes(rng.randrange(60))
        elif kind == 5:
            lease = bytes((1, 1, 6, 0)) + rng.randbytes(8) + bytes(16) + GUEST_MAC + bytes(202) + b"\x63\x82\x53\x63"
            lease += (
                bytes((53, 1, rng.randrange(10)))
                + bytes((50, 4))
                + rng.choice(REMOTES)
                + spoil(rng, bytes((55, 3, 1, 3, 6)))
                + b"\xff"
            )
            source = rng.choice([bytes(4), GUEST])
            target = rng.choice([b"\xff" * 4, GATEWAY])
            body = packets.udp(source, target, 68, 67, lease)
            return packets.ether(
                rng.choice([b"\xff" * 6, GATEWAY_MAC]), GUEST_MAC, IPV4, packets.ipv4(source, target, 17, body)
            )
        else:
            size = rng.randrange(1, 180) * 8
            packet = packets.ipv4(
                GUEST,
                remote,
                17,
                rng.randbytes(size),
                ident=rng.randrange(4),
                mf=rng.random() < 0.7,
                offset=8 * rng.choice([0, 0, 10, 100, rng.randrange(8192)]),
            )
            return packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet)
        packet = packets.ipv4(
            GUEST if rng.random() < 0.95 else rng.randbytes(4),
            remote,
            protocol,
            body,
            ttl=rng.choice([64, 64, 64, 2, 1, 0, 255]),
            df=rng.random() < 0.5,
            options=rng.choice([b"", b"", b"", b"\1\1\1\1", b"\x83\7\4\1\2\3\4\0", rng.randbytes(4)]),
        )
        if len(packet) > self.d.mtu:
            packet = packet[: self.d.mtu]
        return packets.ether(GATEWAY_MAC, GUEST_MAC, IPV4, packet)

    def arp_frame(self) -> bytes:
        rng = self.rng
        mac = GUEST_MAC if rng.random() < 0.8 else b"\2" + rng.randbytes(5)
        body = packets.arp(
            rng.choice([1, 1, 2, 3]),
            mac,
            rng.choice([GUEST, bytes(4), bytes((192, 168, 65, rng.randrange(256)))]),
            bytes(6),
            rng.choice(REMOTES),
        )
        return packets.ether(rng.choice([b"\xff" * 6, GATEWAY_MAC]), mac, packets.ARP, body)

    def host_acts(self) -> None:
        rng, d = self.rng, self.d
        d.io.default = rng.choice([Accept(), Accept(), Accept(0.05), Refuse(), Refuse(0.1), Never()])
        streams = [sock for sock in d.io.sockets if hasattr(sock, "peer")]
        if streams:
            far = rng.choice(streams).peer
            kind = rng.randrange(8)
            if kind <= 2 and not far._fin:
                far.send(pattern(rng.choice([1, 100, 5000, 100_000])))
            elif kind == 3:
                far.shutdown()
            elif kind == 4:
                far.reset()
            elif kind == 5:
                far.stop_reading()
            elif kind == 6:
                far.resume()
            else:
                far.close()
        if d.io.datagrams and rng.random() < 0.5:
            sent = rng.choice(d.io.datagrams[-20:])
            if rng.random() < 0.3:
                sent.sock.unreachable(
                    sent, rng.choice([3, 11]), rng.randrange(6), 111, "10.0.0.1", info=rng.choice([0, 1000])
                )
            elif sent.sock.proto == 0:
                sent.answer(rng.randbytes(rng.choice([0, 1, 100, 3000])))
            else:
                sent.answer(rng.choice([b"\0\0\0\0", b"\3\3\0\0"]) + sent.data[4:])
        if rng.random() < 0.05:
            sock, _far = d.io.connected()
            d.stack.dial(Endpoint(rng.choice([GUEST, ip("192.168.65.77")]), 8000), sock)
        del d.io.datagrams[:-50]

    def check(self) -> None:
        d, limits = self.d, self.LIMITS
        d.assert_sane()
        d.others.clear()
        for key, flow in list(d.flows.items()):
            if flow not in self.flows:
                del d.flows[key]
        assert len(d.stack.tcp.flows) <= limits.max_flows
        assert len(d.stack.neighbours.all()) <= limits.max_neighbours
        assert len(d.stack.reassembler) <= limits.max_fragments
        assert d.stack.reassembler.octets <= limits.max_fragment_octets
        assert len(d.io.sockets) <= limits.max_flows + 3 * (limits.max_udp_flows + limits.max_pings)
        for sock in d.io.connects[-40:]:
            assert self.lies or said(bytes(sock.peer.received)), "the host received what the guest never said"
        del d.io.connects[:-200]

    def finish(self) -> None:
        """P6: with the guest gone and the host closing, nothing is left after a day."""
        d = self.d
        for sock in list(d.io.sockets):
            if hasattr(sock, "peer"):
                sock.peer.resume()
                sock.peer.reset()
        d.advance(86_400.0)
        self.check()
        d.events.clear()
        for flow in d.stack.flows():
            raise AssertionError(f"left after a day: {flow}")
        d.close()


def z2_stack(rng: random.Random) -> None:
    """Frames with and without right checksums, host events and time, in any order."""
    hostile = Hostile(rng)
    for _ in range(60):
        hostile.step()
    hostile.finish()


# Z4


def z4_fragments(rng: random.Random) -> None:
    """What comes out of the reassembler is what a bitmap says: whole, without overlap, right octets."""
    counters = Counters()
    reassembler = Reassembler(8, 1 << 20, 30.0, counters)
    size = rng.randrange(1, 60) * 8 + rng.choice([0, 3])
    whole = rng.randbytes(size)
    seen: dict[int, int] = {}
    condemned = False
    for _ in range(rng.randrange(1, 40)):
        begin = rng.randrange(0, size, 8)
        end = min(begin + rng.randrange(1, 12) * 8, size)
        more = end < size
        packet = packets.ipv4(GUEST, GATEWAY, 17, whole[begin:end], ident=7, offset=begin, mf=more)
        got = reassembler.add(ipv4.parse(memoryview(packet)), memoryview(packet), 0.0)
        if seen.get(begin) != end:
            condemned = condemned or any(a < end and begin < b for a, b in seen.items())
        if condemned:
            assert got is None, "a datagram with an overlap came out"
            continue
        seen[begin] = end
        covered = sum(b - a for a, b in seen.items()) == size
        assert (got is not None) == covered, f"{seen} of {size}"
        if got is not None:
            assert got[20:] == whole
            ipv4.parse(memoryview(got))
            return
    assert reassembler.octets <= 1 << 20


# Z5


def z5_receiver(rng: random.Random) -> None:
    """Ranges beyond a hole against a map of octets, near the wrap of sequence numbers."""
    irs = rng.choice([0, (1 << 32) - rng.randrange(1, 3000), rng.getrandbits(32)])
    receiver = Receiver(irs, 1 << 16, 0)
    receiver.window()
    base = receiver.nxt
    kept: dict[int, tuple[int, int]] = {}
    at = 0
    known: set[int] = set()
    for _ in range(rng.randrange(1, 120)):
        begin = at + rng.randrange(0, 3000)
        end = begin + rng.randrange(1, 700)
        if begin > at:
            stored = receiver.store((base + begin) & MASK, (base + end) & MASK)
            if stored is not None:
                first, last = ((number - base) & MASK for number in stored)
                assert begin <= first < last <= end
                assert not known & set(range(first, last)), "octets stored twice"
                known |= set(range(first, last))
                kept[stored[0]] = first, last
        else:
            receiver.nxt = (base + end) & MASK
            at = end
            for seq, skip, length in receiver.fill():
                first, last = kept.pop(seq)
                if length:
                    assert first + skip == at and first + skip + length == last
                    at += length
            assert receiver.nxt == (base + at) & MASK
            known = {octet for octet in known if octet >= at}
        ranges = receiver.ranges()
        assert len(ranges) <= 32
        spans = [((a - base) & MASK, (b - base) & MASK) for a, b in ranges]
        assert sorted(spans) == spans
        assert {octet for a, b in spans for octet in range(a, b)} == known
        blocks = receiver.sack_blocks()
        assert sorted(blocks) == sorted(ranges)


TARGETS: dict[str, Callable[[random.Random], None]] = {
    "z1_parsers": z1_parsers,
    "z2_stack": z2_stack,
    "z4_fragments": z4_fragments,
    "z5_receiver": z5_receiver,
    "z6_rings": z6_rings,
    "z7_messages": z7_messages,
    "z8_streams": z8_streams,
    "z9_names": z9_names,
    "z10_services": z10_services,
    "z12_texts": z12_texts,
    "z13_ninep": z13_ninep,
    "z14_mux": z14_mux,
    "z15_ports": z15_ports,
    "z16_hostside": z16_hostside,
    "z17_companions": z17_companions,
}
