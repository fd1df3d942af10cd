"""The emission checker: every frame the stack sends is read here again, from the RFCs and without any of its code.

Two kinds of rules. About one frame (testing.md P2): lengths agree, padding is zero, checksums are right (or rightly left to
the link), options are well formed, flags go together, addresses are the network's own business. About a flow (P3): sequence
and acknowledgement numbers never go back, a number always carries the same octet, the guest's window and MSS are kept, the
right edge of ours never moves left, nothing comes after a FIN or a RST.

The test feeds both directions: `guest_sent` and `stack_sent`. A broken rule raises `Violation`.
"""

from __future__ import annotations

import struct
from collections import deque

ACK, FIN, SYN, RST, URG = 0x10, 0x01, 0x02, 0x04, 0x20
MASK = 0xFFFFFFFF
ICMP_ERRORS = frozenset((3, 4, 5, 11, 12))


class Violation(AssertionError):
    """The stack sent what it must not."""


def _sum(data: bytes) -> int:
    if len(data) & 1:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) >> 1}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return (total & 0xFFFF) + (total >> 16)


def _ahead(a: int, b: int) -> int:
    """How far `a` is beyond `b` modulo 2**32."""
    return ((a - b + 0x80000000) & MASK) - 0x80000000


def _need(condition: object, text: str, *details: object) -> None:
    if not condition:
        raise Violation(text + (": " + " ".join(map(str, details)) if details else ""))


class _Flow:
    """What is known of one TCP flow; numbers are the stack's (`iss` ...) and the guest's (`isn` ...)."""

    def __init__(self, iss: int, isn: int | None) -> None:
        self.iss, self.isn = iss, isn
        self.stream = bytearray()  # octets sent from iss + 1 on
        self.fin_at: int | None = None  # length of the stream, once a FIN went out
        self.dead = False
        self.ack: int | None = None
        self.right: int | None = None
        self.shift = 0  # of our windows
        self.our_shift: int | None = None  # as offered by the stack
        self.guest_shift: int | None = None
        self.guest_mss = 536
        self.guest_end = 0  # one beyond the last number the guest sent
        self.guest_ack: int | None = None
        self.guest_right: int | None = None  # the furthest the guest ever allowed
        self.synchronised = False
        self.sack_permitted = False


class Oracle:
    """`headroom` octets come before each frame: a virtio-net header where `vnet` (by default when it is 12), a length when
    it is 4. `macs` are the guests'."""

    def __init__(
        self,
        *,
        mtu: int = 1500,
        tso: int = 0,
        headroom: int = 0,
        vnet: bool | None = None,
        gateway_mac: bytes = bytes.fromhex("f61636bcf9c6"),
        gateway: bytes = bytes((192, 168, 65, 1)),
        prefix: bytes = bytes((192, 168, 65)),
    ) -> None:
        self.mtu, self.tso, self.headroom = mtu, tso, headroom
        self.vnet = headroom == 12 if vnet is None else vnet
        self.gateway_mac, self.gateway, self.prefix = gateway_mac, gateway, prefix
        self.macs: set[bytes] = set()
        self.flows: dict[bytes, _Flow] = {}
        self.syns: dict[bytes, dict[int, list[tuple[int | None, int, int, bool, int]]]] = {}  # by key and ISN
        self.parts: dict[bytes, dict[int, tuple[bytes, bool]]] = {}
        self.idents: deque[bytes] = deque(maxlen=64)
        self.guest_errors: deque[bytes] = deque(maxlen=256)
        self.martians: set[bytes] = set()  # loopback addresses the guest itself wrote to
        self.frames = 0

    # the guest's side

    def guest_sent(self, frame: bytes) -> None:
        """A frame the guest put on the wire, without headroom; nonsense in it is its own business."""
        if len(frame) >= 14 and not frame[6] & 1:
            self.macs.add(frame[6:12])
        if len(frame) < 34 or frame[12:14] != b"\x08\x00":
            return
        head = (frame[14] & 15) * 4
        total = int.from_bytes(frame[16:18], "big")
        body = frame[14 + head : 14 + total]
        if frame[30] == 127:
            self.martians.add(frame[30:34])
        if frame[23] == 1 and body[:1] and body[0] in ICMP_ERRORS:
            self.guest_errors.append(frame[14 : 14 + head + 8])
        if frame[23] != 6 or len(body) < 20 or (frame[20] << 8 | frame[21]) & 0x3FFF:  # a fragment
            return
        sport_dport, seq, ack, offset_flags, window = struct.unpack_from("!4sIIHH", body)
        flags = offset_flags & 0xFF
        key = frame[26:34] + sport_dport
        length = max(len(body) - (offset_flags >> 12) * 4, 0)
        if flags & SYN and not flags & (RST | FIN):
            mss, shift, sack = 536, None, False
            for kind, value in self._options(body[20 : (offset_flags >> 12) * 4], strict=False):
                if kind == 2 and len(value) == 2 and any(value):
                    # A peer that asks for less than 88 gets segments of 88 (threats G20).
                    mss = max(int.from_bytes(value, "big"), 88)
                elif kind == 3 and len(value) == 1:
                    shift = min(value[0], 14)
                elif kind == 4:
                    sack = True
            flow = self.flows.get(key)
            if flow is None or flow.isn is not None or flow.dead:
                asked = self.syns.setdefault(key, {})
                if not flags & ACK:
                    asked.setdefault(seq, []).append((shift, mss, window, sack, length))
                if len(asked) > 64:
                    del asked[next(iter(asked))]
            else:  # the answer to our SYN, or crossing it
                flow.isn, flow.guest_shift, flow.guest_mss, flow.sack_permitted = seq, shift, mss, sack
                flow.guest_end = (seq + 1 + length) & MASK
                flow.guest_right = (flow.iss + 1 + window) & MASK
        flow = self.flows.get(key)
        end = (seq + length + bool(flags & FIN) + bool(flags & SYN)) & MASK
        if flow is None or flow.isn is None:
            return
        if flow.right is not None and _ahead(end, flow.right) > 0:
            end = flow.right  # beyond it nothing counts as sent
        if not flags & RST and _ahead(end, flow.guest_end) > 0:
            flow.guest_end = end
        if flags & ACK and not flags & RST:
            scale = 0 if flags & SYN or flow.our_shift is None else flow.guest_shift or 0
            right = (ack + (window << scale)) & MASK
            top = (flow.iss + 1 + len(flow.stream) + 1) & MASK
            if 0 <= _ahead(top, ack) <= len(flow.stream) + 2 and (
                flow.guest_right is None or _ahead(right, flow.guest_right) > 0
            ):
                flow.guest_right = right
            flow.guest_ack = ack

    # the stack's side

    def stack_sent(self, raw: bytes) -> None:
        """A frame the stack emitted, headroom included. Raises `Violation`."""
        self.frames += 1
        vnet, frame = raw[: self.headroom], raw[self.headroom :]
        _need(len(vnet) == self.headroom, "headroom is missing")
        partial, gso = self._vnet(vnet, frame) if self.vnet else (False, 0)
        if not self.vnet and self.headroom == 4:
            _need(int.from_bytes(vnet, "big") == len(frame), "stream: length prefix", vnet.hex(), len(frame))
        _need(len(frame) >= (42 if self.vnet else 60), "frame below 60 octets", len(frame))
        limit = 14 + (self.tso + 120 if gso else self.mtu)
        _need(len(frame) <= limit, "frame longer than the link takes", len(frame), limit)
        destination, source, kind = frame[:6], frame[6:12], frame[12:14]
        _need(destination in self.macs or destination == b"\xff" * 6, "frame to a MAC nobody has", destination.hex())
        _need(source == self.gateway_mac or source in self.macs, "frame from a strange MAC", source.hex())
        if source != self.gateway_mac:
            return  # switched from another guest
        if kind == b"\x08\x06":
            self._arp(frame)
        elif kind == b"\x08\x00":
            self._ipv4(frame, partial, gso)
        else:
            _need(False, "ethertype", kind.hex())

    def _vnet(self, vnet: bytes, frame: bytes) -> tuple[bool, int]:
        flags, gso_type, head, gso_size, start, offset, _buffers = struct.unpack("<BBHHHHH", vnet)
        _need(not flags & ~3, "vnet: flags", flags)
        _need(gso_type in (0, 1), "vnet: gso type", gso_type)
        partial = bool(flags & 1)
        if partial:
            transport = 14 + (frame[14] & 15) * 4
            wanted = 16 if frame[23] == 6 else 6
            _need((start, offset) == (transport, wanted), "vnet: checksum position", start, offset)
        if gso_type:
            _need(partial, "vnet: segmentation without NEEDS_CSUM")
            headers = 34 + (frame[46] >> 4) * 4
            _need(frame[23] == 6 and head == headers, "vnet: header length", head, headers)
            _need(0 < gso_size <= self.mtu - (headers - 14), "vnet: gso size", gso_size)
            return partial, gso_size
        _need(gso_size == 0, "vnet: gso size without type", gso_size)
        return partial, 0

    def _arp(self, frame: bytes) -> None:
        htype, ptype, hlen, plen, op, sha, spa, _tha, tpa = struct.unpack_from("!HHBBH6s4s6s4s", frame, 14)
        _need((htype, ptype, hlen, plen) == (1, 0x0800, 6, 4) and op in (1, 2), "arp: fields")
        _need(sha == self.gateway_mac and spa[:3] == self.prefix, "arp: sender", sha.hex(), spa.hex())
        _need(tpa[:3] == self.prefix or op == 2, "arp: target", tpa.hex())
        _need(op == 1 or frame[:6] != b"\xff" * 6, "arp: reply to everybody")
        _need(not any(frame[42:]), "arp: padding is not zero")

    def _ipv4(self, frame: bytes, partial: bool, gso: int) -> None:
        head = (frame[14] & 15) * 4
        _need(frame[14] >> 4 == 4 and head == 20, "ipv4: version and header length", frame[14])
        total = int.from_bytes(frame[16:18], "big")
        packet = frame[14 : 14 + total]
        _need(len(packet) == total >= head, "ipv4: total length", total, len(frame))
        _need(len(frame) <= max(14 + total, 60) and not any(frame[14 + total :]), "ipv4: padding")
        _need(gso or total <= self.mtu, "ipv4: longer than the MTU", total)
        _need(_sum(packet[:head]) == 0xFFFF, "ipv4: header checksum")
        fragment = int.from_bytes(packet[6:8], "big")
        _need(not fragment & 0x8000, "ipv4: reserved flag")
        _need(packet[8] > 0, "ipv4: TTL 0")
        source, destination = packet[12:16], packet[16:20]
        _need(0 < source[0] < 224, "ipv4: source", source.hex())
        _need(source[0] != 127 or source in self.martians, "ipv4: source is a loopback address", source.hex())
        _need(source != destination, "ipv4: source is destination", source.hex())
        ident = packet[4:6] + packet[9:10] + source + destination
        if fragment & 0x3FFF:
            _need(not fragment & 0x4000, "ipv4: a fragment with DF")
            if fragment & 0x1FFF == 0:
                _need(ident not in self.idents, "ipv4: identification used again", ident.hex())
                self.idents.append(ident)
            self._fragment(packet, fragment, ident)
            return
        if not fragment & 0x4000:
            _need(ident not in self.idents, "ipv4: identification used again", ident.hex())
            self.idents.append(ident)
        self._transport(packet, partial, gso)

    def _fragment(self, packet: bytes, fragment: int, ident: bytes) -> None:
        more, offset, payload = bool(fragment & 0x2000), (fragment & 0x1FFF) * 8, packet[20:]
        _need(not more or len(payload) % 8 == 0, "ipv4: fragment not a multiple of 8", len(payload))
        _need(payload, "ipv4: empty fragment")
        parts = self.parts.setdefault(ident, {})
        parts[offset] = (payload, more)
        whole, at = b"", 0
        while at in parts:
            octets, more = parts[at]
            whole, at = whole + octets, at + len(octets)
            if not more:
                del self.parts[ident]
                _need(at <= 65515, "ipv4: datagram too long", at)
                length = struct.pack("!H", 20 + at) if 20 + at < 65536 else b"\xff\xff"
                self._transport(packet[:2] + length + packet[4:20] + whole, False, 0)
                return

    def _transport(self, packet: bytes, partial: bool, gso: int) -> None:
        protocol, payload = packet[9], packet[20:]
        pseudo = packet[12:20] + struct.pack("!BBH", 0, protocol, len(payload))
        if protocol == 6:
            _need(len(payload) >= 20, "tcp: short")
            if partial:
                _need(int.from_bytes(payload[16:18], "big") == _sum(pseudo), "tcp: partial checksum")
            else:
                _need(_sum(pseudo + payload) == 0xFFFF, "tcp: checksum")
            self._tcp(packet, payload, gso)
        elif protocol == 17:
            _need(len(payload) >= 8, "udp: short")
            sport, dport, length, stored = struct.unpack_from("!HHHH", payload)
            _need(length == len(payload), "udp: length", length, len(payload))
            _need(sport and dport, "udp: port 0")
            if partial:
                _need(stored == _sum(pseudo), "udp: partial checksum")
            else:
                _need(stored == 0 or _sum(pseudo + payload) == 0xFFFF, "udp: checksum")
        elif protocol == 1:
            _need(not partial, "icmp: partial checksum")
            self._icmp(packet, payload)
        else:
            _need(False, "ipv4: protocol", protocol)

    def _icmp(self, packet: bytes, message: bytes) -> None:
        _need(len(message) >= 8, "icmp: short")
        _need(_sum(message) == 0xFFFF, "icmp: checksum")
        kind, code = message[0], message[1]
        _need(kind in (0, 3, 8, 11, 12), "icmp: type", kind)
        if kind in (0, 8):
            _need(code == 0, "icmp: echo code", code)
            return
        _need(code <= 15, "icmp: code", code)
        _need(len(packet) <= 576, "icmp: an error longer than 576 octets", len(packet))
        quoted = message[8:]
        _need(len(quoted) >= 20 and quoted[0] >> 4 == 4, "icmp: quote is not IPv4")
        whole = int.from_bytes(quoted[2:4], "big")
        _need(len(quoted) >= min((quoted[0] & 15) * 4 + 8, whole), "icmp: quotes less than 8 octets", len(quoted))
        head = (quoted[0] & 15) * 4
        _need(quoted[12:16] == packet[16:20], "icmp: error to somebody who did not send it")
        _need(quoted[16] < 224 and quoted[16] != 0, "icmp: error about broadcast or multicast")
        _need(quoted[16:19] != self.prefix or quoted[19] != 255, "icmp: error about a broadcast")
        _need(not int.from_bytes(quoted[6:8], "big") & 0x1FFF, "icmp: error about a later fragment")
        if quoted[9] == 1:
            _need(len(quoted) <= head or quoted[head] not in ICMP_ERRORS, "icmp: error about an ICMP error")
        if (kind, code) == (3, 4):
            _need(int.from_bytes(message[6:8], "big") >= 68, "icmp: fragmentation needed without MTU")

    # TCP

    @staticmethod
    def _options(octets: bytes, *, strict: bool) -> list[tuple[int, bytes]]:
        found, at = [], 0
        while at < len(octets) and octets[at] != 0:
            if octets[at] == 1:
                at += 1
                continue
            length = octets[at + 1] if at + 1 < len(octets) else 0
            if length < 2 or at + length > len(octets):
                _need(not strict, "tcp: option length", octets.hex())
                break
            found.append((octets[at], octets[at + 2 : at + length]))
            at += length
        if strict:
            _need(not any(octets[at:]), "tcp: octets after the end of options")
            _need(len({kind for kind, _value in found}) == len(found), "tcp: an option twice")
        return found

    def _tcp(self, packet: bytes, segment: bytes, gso: int) -> None:
        sport, _dport, seq, ack, offset_flags, window, _check, urgent = struct.unpack_from("!HHIIHHHH", segment)
        head, flags = offset_flags >> 12 << 2, offset_flags & 0xFFF
        _need(20 <= head <= len(segment), "tcp: data offset", head)
        _need(not flags & ~0x3F, "tcp: reserved or ECN bits", hex(flags))
        _need(not flags & URG and not urgent, "tcp: urgent")
        _need(bin(flags & (SYN | FIN | RST)).count("1") <= 1, "tcp: flags", hex(flags))
        _need(flags & (ACK | SYN | RST), "tcp: no flags")
        _need(sport or flags & RST, "tcp: port 0")  # who asks from port 0 is answered there
        payload = segment[head:]
        options = dict(self._options(segment[20:head], strict=True))
        key = packet[16:20] + packet[12:16] + segment[2:4] + segment[:2]
        if flags & SYN:
            self._syn(key, seq, ack, flags, window, options, payload)
            return
        _need(not {2, 3, 4} & options.keys(), "tcp: SYN options in another segment")
        flow = self.flows.get(key)
        if flags & RST:
            _need(not payload and not options, "tcp: RST with data or options")
            if flow is not None and seq == (flow.iss + 1 + len(flow.stream) + (flow.fin_at is not None)) & MASK:
                flow.dead = True
            return
        _need(flow is not None, "tcp: a segment of no flow")
        assert flow is not None
        _need(not flow.dead, "tcp: a segment after our RST")
        _need(flow.isn is not None, "tcp: a segment before the guest's SYN")
        self._numbers(flow, seq, ack, bool(flags & FIN), payload, gso, head)
        if flow.our_shift is not None and flow.guest_shift is not None:
            flow.shift = flow.our_shift
        self._edge(flow, ack, window << flow.shift)
        if 5 in options:
            self._sack(flow, ack, options[5])

    def _syn(
        self, key: bytes, seq: int, ack: int, flags: int, window: int, options: dict[int, bytes], payload: bytes
    ) -> None:
        _need(not payload, "tcp: data on a SYN")
        _need(2 in options, "tcp: SYN without MSS")
        _need(int.from_bytes(options[2], "big") == self.mtu - 40, "tcp: MSS", int.from_bytes(options[2], "big"))
        _need(not options.keys() - {2, 3, 4, 8}, "tcp: SYN options", sorted(options))
        flow = self.flows.get(key)
        offered = options[3][0] if 3 in options else None
        if flags & ACK:
            isn = (ack - 1) & MASK
            asked = self.syns.get(key, {})
            if isn in asked and (flow is None or flow.isn != isn or flow.dead or seq != flow.iss):
                # One number asked twice with other options: the last SYN that fits what the answer takes up.
                fits = [one for one in asked[isn] if (offered is None) == (one[0] is None) and (4 in options) == one[3]]
                shift, mss, guest_window, sack, length = (fits or asked[isn])[-1]
                self.syns[key] = {}
                flow = self.flows[key] = _Flow(seq, isn)
                flow.guest_shift, flow.guest_mss, flow.sack_permitted = shift, mss, sack
                flow.guest_end = (isn + 1 + length) & MASK
                flow.guest_right = (seq + 1 + guest_window) & MASK
            _need(flow is not None, "tcp: a SYN-ACK nobody asked for")
            assert flow is not None and flow.isn is not None
            _need(seq == flow.iss, "tcp: SYN-ACK with another ISN", seq, flow.iss)
            _need(ack == (flow.isn + 1) & MASK, "tcp: SYN-ACK number", ack, flow.isn)
            _need(offered is None or flow.guest_shift is not None, "tcp: window scale not offered by the guest")
            _need(4 not in options or flow.sack_permitted, "tcp: SACK not offered by the guest")
        else:
            _need(ack == 0, "tcp: SYN with an acknowledgement number")
            if flow is None or flow.dead or flow.isn is not None:
                flow = self.flows[key] = _Flow(seq, None)
            _need(seq == flow.iss, "tcp: SYN with another ISN")
        if offered is not None:
            _need(offered <= 14, "tcp: window scale", offered)
        flow.our_shift = offered
        if flow.isn is not None and (flow.right is None or _ahead((ack + window) & MASK, flow.right) > 0):
            # A repeated SYN-ACK cannot tell a scaled window again that an ACK told meanwhile.
            self._edge(flow, ack, window)

    def _numbers(self, flow: _Flow, seq: int, ack: int, fin: bool, payload: bytes, gso: int, head: int) -> None:
        at = _ahead(seq, (flow.iss + 1) & MASK)
        _need(-1 <= at, "tcp: sequence number before the first", seq)
        known = len(flow.stream)
        if payload:
            if at < 0:
                raise Violation("tcp: data before the first number")
            _need(at <= known, "tcp: a gap in what was sent", at, known)
            overlap = bytes(flow.stream[at : at + len(payload)])
            _need(payload[: len(overlap)] == overlap, "tcp: other octets at the same numbers", at, len(payload))
            _need(flow.fin_at is None or at + len(payload) <= flow.fin_at, "tcp: octets after the FIN", at, flow.fin_at)
            flow.stream += payload[len(overlap) :]
            limit = flow.guest_mss - (head - 20)
            _need(
                (gso or len(payload)) <= max(limit, 1), "tcp: longer than the guest's MSS", gso or len(payload), limit
            )
            assert flow.guest_right is not None
            beyond = _ahead((seq + len(payload)) & MASK, flow.guest_right)
            _need(beyond <= (1 if len(payload) == 1 else 0), "tcp: beyond the guest's window", beyond)
        else:
            _need(at <= known + (flow.fin_at is not None), "tcp: empty segment beyond what was sent", at, known)
        if fin:
            end = at + len(payload)
            _need(end == len(flow.stream), "tcp: FIN before the last octet", end, len(flow.stream))
            _need(flow.fin_at in (None, end), "tcp: FIN at another number", end, flow.fin_at)
            flow.fin_at = end

    def _edge(self, flow: _Flow, ack: int, window: int) -> None:
        if flow.ack is not None:
            _need(_ahead(ack, flow.ack) >= 0, "tcp: acknowledgement number goes back", ack, flow.ack)
        _need(_ahead(ack, flow.guest_end) <= 0, "tcp: acknowledges what the guest never sent", ack, flow.guest_end)
        right = (ack + window) & MASK
        if flow.right is not None:
            _need(_ahead(right, flow.right) >= 0, "tcp: the right edge shrinks", right, flow.right)
        flow.ack, flow.right = ack, right

    def _sack(self, flow: _Flow, ack: int, value: bytes) -> None:
        _need(flow.sack_permitted, "tcp: SACK not permitted")
        _need(value and len(value) % 8 == 0, "tcp: SACK length")
        for begin, end in struct.iter_unpack("!II", value):
            _need(_ahead(end, begin) > 0, "tcp: SACK block turned round")
            _need(_ahead(begin, ack) > 0 or _ahead(end, ack) <= 0, "tcp: SACK block across the acknowledgement")
            _need(_ahead(end, flow.guest_end) <= 0, "tcp: SACK of what was never sent")
