"""The stack's own place on the switch: takes frames apart and hands them to the protocol they are for. HOT PATH: `input`.

One `unpack_from` at a fixed offset reads Ethernet, IPv4 and the first 16 octets of TCP or UDP in the common case (no
options, no fragment); the 12 contiguous octets of addresses and ports find the TCP flow or the UDP association, which then
takes the numbers. Everything else, and everything new, goes the general way: `_frame`, `_ipv4`, protocol handlers.

What the fast way relies on: a flow or association in the tables was made by a packet that went the general way, so its
source was checked; it is only taken when the frame came in on the same port.
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol, cast

from netstack.errors import Malformed
from netstack.iface.neighbours import Neighbour, Neighbours
from netstack.iface.offload import split_datagrams
from netstack.iface.switch import Port, Switch
from netstack.observe.metrics import Counters, Drop
from netstack.settings import Network
from netstack.wire import arp, ethernet, icmp, ipv4
from netstack.wire.checksum import BadChecksum
from netstack.wire.checksum import partial as partial_sum
from netstack.wire.ipv4 import SourceRouted

_FAST: Final = struct.Struct("!12xIH2xI2x12sIIHH")
"""Ethertype+version+TOS, total length, fragment+TTL+protocol, key, seq, ack, offset+flags, window: 50 octets.

For UDP `seq` is length and checksum; the rest is not looked at."""
_FAST_OCTETS: Final = 54
_IPV4_NO_OPTIONS: Final = 0x080045
_FRAGMENT_AND_PROTOCOL: Final = 0xBFFF00FF
"""All but "don't fragment" and TTL."""
_TCP: Final = 6
_ACK: Final = 0x10
_NOT_PUSH: Final = 0x0FF7
"""The flags of TCP and the reserved bits, but for PSH."""
_GSO_TYPE: Final = 0x7F
_GSO_UDP_L4: Final = 5
_UDP: Final = 17
_TCP_FLAGS: Final = 0x3F
_SYN: Final = 2
_ANY: Final = bytes(4)
_LIMITED_BROADCAST: Final = b"\xff\xff\xff\xff"


class TcpFlow(Protocol):
    port: Port | None

    def segment(
        self, frame: memoryview, at: int, end: int, seq: int, ack: int, offset_flags: int, window: int
    ) -> None: ...

    def train(
        self, view: memoryview, stride: int, count: int, at: int, length: int, seq: int, ack: int, window: int
    ) -> bool: ...

    def pieces(self, pieces: list[memoryview], octets: int, seq: int, ack: int, window: int) -> bool: ...


class Train(Protocol):
    """Frames side by side: `count` of them, each `stride` octets, equal but for sequence number and payload."""

    @property
    def view(self) -> memoryview: ...
    @property
    def stride(self) -> int: ...
    @property
    def count(self) -> int: ...


class Scattered(Protocol):
    """A long frame in pieces; `head` is a copy of its beginning, with all that is parsed."""

    @property
    def head(self) -> bytes: ...
    @property
    def octets(self) -> int: ...

    def after(self, at: int) -> list[memoryview]:
        """The octets from `at` on."""
        ...

    def joined(self) -> memoryview:
        """A copy in one piece."""
        ...


class UdpAssociation(Protocol):
    port: Port | None

    def forward(self, payload: memoryview, ttl: int, now: float) -> None: ...


class Packet:
    """An IPv4 packet of a guest on the general way: header checked, padding gone. Valid during the call only."""

    __slots__ = (
        "checksum_ok",
        "data",
        "destination",
        "dont_fragment",
        "for_many",
        "neighbour",
        "payload",
        "port",
        "protocol",
        "source",
        "source_mac",
        "ttl",
    )

    def __init__(
        self,
        port: Port,
        source_mac: bytes,
        header: ipv4.Header,
        data: memoryview,
        neighbour: Neighbour | None,
        checksum_ok: bool,
        for_many: bool = False,
    ) -> None:
        self.port = port
        self.source_mac = source_mac
        self.source = header.source
        self.destination = header.destination
        self.ttl = header.ttl
        self.protocol = header.protocol
        self.dont_fragment = header.dont_fragment
        self.data = data
        """The whole packet."""
        self.payload = data[header.header_length :]
        self.neighbour = neighbour
        """Whose source address this is; `None` only for DHCP from 0.0.0.0."""
        self.for_many = for_many
        """It came in a link-layer broadcast or multicast: no ICMP error may be sent about it (RFC 1122 3.2.2)."""
        self.checksum_ok = checksum_ok
        """The transport checksum need not be looked at: it came over a trusted kernel path that leaves it out."""


Handler = Callable[[Packet, float], None]


class Reassemble(Protocol):
    def add(self, header: ipv4.Header, packet: memoryview, now: float) -> bytes | None: ...


class Interface:
    """See the module. `tcp_flows` and `udp_associations` are the tables of the proxies; `handlers` maps IP protocol to
    general input; `dhcp` takes datagrams for port 67; `refuse(kind, code, packet, now)` sends an ICMP error."""

    def __init__(
        self,
        network: Network,
        counters: Counters,
        switch: Switch,
        neighbours: Neighbours,
        reassembler: Reassemble,
        tcp_flows: Mapping[bytes, TcpFlow],
        udp_associations: Mapping[bytes, UdpAssociation],
        handlers: Mapping[int, Handler],
        dhcp: Handler,
        refuse: Callable[[int, int, Packet, float], None],
        tcp_open: Callable[[Neighbour, bytes, int, int, memoryview, memoryview], None],
        on_arp: Callable[[Neighbour], None],
        leased: Callable[[bytes], bool],
        contain: Callable[[Any, Exception], None],
    ) -> None:
        self._counters = counters
        self._drops = counters.drops
        self._switch = switch
        self._neighbours = neighbours
        self._reassembler = reassembler
        self._tcp_flows = tcp_flows
        self._udp_associations = udp_associations
        self._handlers = handlers
        self._dhcp = dhcp
        self._refuse = refuse
        self._tcp_open = tcp_open
        self._on_arp = on_arp
        self._leased = leased
        self._contain = contain
        self._strict = network.strict_sources
        self._mac = network.gateway_mac_bytes
        self._own = network.own_addresses
        subnet = network.network
        self._subnets = [(int(subnet.network_address), int(subnet.netmask))]
        for prefix in network.routed:
            routed = ipaddress.IPv4Network(prefix)
            self._subnets.append((int(routed.network_address), int(routed.netmask)))
        self._broadcasts = {subnet.broadcast_address.packed, subnet.network_address.packed}

    def input(self, port: Port, frames: Sequence[memoryview], now: float) -> None:
        """A batch of frames of one link, each with the link's headroom in front."""
        headroom = port.headroom
        partial = port.partial_in
        flows = self._tcp_flows
        associations = self._udp_associations
        unpack = _FAST.unpack_from
        shortest = headroom + _FAST_OCTETS
        ip_at = headroom + 14
        data_at = headroom + 34
        octets = 0
        for frame in frames:
            length = len(frame)
            octets += length
            if length >= shortest:
                version, total, protocol, key, seq, ack, offset_flags, window = unpack(frame, headroom)
                if version >> 8 == _IPV4_NO_OPTIONS and total + ip_at <= length:
                    protocol_ttl = protocol
                    protocol &= _FRAGMENT_AND_PROTOCOL
                    if protocol == _TCP:
                        flow = flows.get(key)
                        if flow is not None and flow.port is port:
                            at = data_at + (offset_flags >> 10 & 0x3C)
                            end = ip_at + total
                            if (
                                offset_flags >= 0x5000
                                and at <= end
                                and ((partial and frame[0] & 3) or self._tcp_sum_good(frame, data_at, end, key))
                            ):
                                try:
                                    flow.segment(frame, at, end, seq, ack, offset_flags, window)
                                except Exception as error:  # contained: this flow, and the batch goes on
                                    self._contain(flow, error)
                                continue
                        elif flow is None and offset_flags & _TCP_FLAGS == _SYN and protocol_ttl & 0xFF00 > 0x0100:
                            if self._syn(port, frame, ip_at, ip_at + total, key, seq, offset_flags, window):
                                continue
                    elif protocol == _UDP:
                        association = associations.get(key)
                        if (
                            association is not None
                            and association.port is port
                            and protocol_ttl & 0xFF00 > 0x0100
                            and seq >> 16 == total - 20
                            and (
                                (partial and frame[0] & 3)
                                or not seq & 0xFFFF
                                or self._udp_sum_good(frame, data_at, ip_at + total, key)
                            )
                        ):
                            association.forward(frame[data_at + 8 : ip_at + total], protocol_ttl >> 8 & 0xFF, now)
                            continue
            self._frame(port, frame, now)
        count = len(frames)
        port.frames_in += count
        counters = self._counters
        counters.frames_in += count
        counters.octets_in += octets - count * headroom

    def input_trains(self, port: Port, items: Sequence[memoryview | Train | Scattered], now: float) -> None:
        """As `input`, for a link that finds trains (`netstack.link.trains`); their checksums are good. Or for one whose long
        frames come in pieces."""
        singles: list[memoryview] = []
        for item in items:
            if isinstance(item, memoryview):
                singles.append(item)
                continue
            if singles:
                self.input(port, singles, now)
                singles = []
            if hasattr(item, "head"):
                self._scattered(port, cast(Scattered, item), now)
            else:
                self._train(port, item, now)
        if singles:
            self.input(port, singles, now)

    def _train(self, port: Port, train: Train, now: float) -> None:
        view, stride, count = train.view, train.stride, train.count
        _version, total, _protocol, key, seq, ack, _flags, window = _FAST.unpack_from(view, port.headroom)
        flow = self._tcp_flows.get(key)
        at = port.headroom + 54
        if (
            flow is None
            or flow.port is not port
            or not flow.train(view, stride, count, at, total - 40, seq, ack, window)
        ):
            self.input(port, [view[start : start + stride] for start in range(0, stride * count, stride)], now)
            return
        port.frames_in += count
        counters = self._counters
        counters.frames_in += count
        counters.octets_in += (stride - port.headroom) * count

    def _scattered(self, port: Port, item: Scattered, now: float) -> None:
        """A TCP segment in order of a known flow is taken as it is; of all else a copy goes the usual way."""
        head, headroom = item.head, port.headroom
        if head[1] & _GSO_TYPE == _GSO_UDP_L4:
            self.input(port, split_datagrams(item.joined(), headroom), now)
            return
        version, total, protocol, key, seq, ack, offset_flags, window = _FAST.unpack_from(head, headroom)
        if (
            version >> 8 == _IPV4_NO_OPTIONS
            and protocol & _FRAGMENT_AND_PROTOCOL == _TCP
            and head[0] & 1
            and port.partial_in
            and offset_flags & _NOT_PUSH == _ACK
            and offset_flags >= 0x5000
        ):
            flow = self._tcp_flows.get(key)
            at = headroom + 34 + (offset_flags >> 10 & 0x3C)
            end = headroom + 14 + total
            if flow is not None and flow.port is port and at < end <= item.octets:
                pieces = item.after(at)
                if end < item.octets:
                    pieces = _shortened(pieces, end - at)
                try:
                    taken = flow.pieces(pieces, end - at, seq, ack, window)
                except Exception as error:  # contained: this flow
                    self._contain(flow, error)
                    taken = True
                if taken:
                    port.frames_in += 1
                    counters = self._counters
                    counters.frames_in += 1
                    counters.octets_in += item.octets - headroom
                    return
        self.input(port, [item.joined()], now)

    def _syn(
        self, port: Port, frame: memoryview, ip_at: int, end: int, key: bytes, seq: int, offset_flags: int, window: int
    ) -> bool:
        """A SYN of a guest that is known by address, MAC and port; False when it must go the general way."""
        neighbour = self._neighbours.get(key[:4])
        if (
            neighbour is None
            or neighbour.port is not port
            or self._strict
            or key[:4] == key[4:8]
            or not 0 < key[4] < 224
            or key[4:8] in self._broadcasts
            or frame[ip_at - 14 : ip_at - 2] != self._mac + neighbour.mac
        ):
            return False
        options_end = ip_at + 20 + (offset_flags >> 10 & 0x3C)
        if not ip_at + 40 <= options_end <= end:
            return False
        if not (port.partial_in and frame[0] & 3) and not self._tcp_sum_good(frame, ip_at + 20, end, key):
            return False
        self._tcp_open(neighbour, key, seq, window, frame[ip_at + 40 : options_end], frame[ip_at:end])
        return True

    def _tcp_sum_good(self, frame: memoryview, at: int, end: int, key: bytes) -> bool:
        """TCP over pseudo-header (addresses are `key[:8]`) and the IPv4 header; the general way counts what is wrong."""
        total = partial_sum(frame[at:end]) + int.from_bytes(key[:8], "big") + _TCP + end - at
        return not total % 0xFFFF and not int.from_bytes(frame[at - 20 : at], "big") % 0xFFFF

    def _udp_sum_good(self, frame: memoryview, at: int, end: int, key: bytes) -> bool:
        total = partial_sum(frame[at:end]) + int.from_bytes(key[:8], "big") + _UDP + end - at
        return not total % 0xFFFF and not int.from_bytes(frame[at - 20 : at], "big") % 0xFFFF

    # The general way.

    def _frame(self, port: Port, frame: memoryview, now: float) -> None:
        headroom = port.headroom
        if len(frame) < headroom + 14:
            self._drops[Drop.FRAME_SHORT] += 1
            return
        destination = bytes(frame[headroom : headroom + 6])
        source = bytes(frame[headroom + 6 : headroom + 12])
        if not self._switch.learn(source, port) or source == self._mac:
            self._drops[Drop.FRAME_SOURCE] += 1
            return
        if destination == self._mac:
            self._local(port, frame, source, False, now)
        elif destination[0] & 1:
            self._local(port, frame, source, True, now)
            if len(self._switch.ports) > 1:
                self._switch.forward(port, frame, destination)
        else:
            self._switch.forward(port, frame, destination)

    def _local(self, port: Port, frame: memoryview, source_mac: bytes, for_many: bool, now: float) -> None:
        headroom = port.headroom
        ethertype = frame[headroom + 12] << 8 | frame[headroom + 13]
        body = frame[headroom + 14 :]
        if ethertype == ethernet.ETHERTYPE_IPV4:
            trusted = port.partial_in and bool(frame[0] & 3)
            try:
                self._ipv4(port, source_mac, body, trusted, for_many, now)
            except BadChecksum:
                self._drops[Drop.IPV4_CHECKSUM] += 1
            except SourceRouted:
                self._drops[Drop.IPV4_SOURCE_ROUTE] += 1
            except Malformed:
                self._drops[Drop.IPV4_HEADER] += 1
        elif ethertype == ethernet.ETHERTYPE_ARP:
            self._arp(port, source_mac, body)
        else:
            self._drops[Drop.ETHERTYPE] += 1

    def _arp(self, port: Port, source_mac: bytes, body: memoryview) -> None:
        """RFC 826, answering for the stack's own addresses only; an address conflict probe (RFC 5227) learns nothing."""
        try:
            packet = arp.parse(body)
        except Malformed:
            self._drops[Drop.ARP_MALFORMED] += 1
            return
        if packet.sha != source_mac or packet.spa in self._own:
            self._drops[Drop.FRAME_SOURCE] += 1
            return
        if packet.spa != _ANY and self._source_allowed(packet.spa, port):
            neighbour = self._neighbours.learn(packet.spa, packet.sha, port)
            if neighbour is not None:
                self._on_arp(neighbour)
        if packet.op == 1 and packet.tpa in self._own:
            reply = arp.emit(arp.Packet(2, self._mac, packet.tpa, packet.sha, packet.spa))
            frame = ethernet.pad(ethernet.header(source_mac, self._mac, ethernet.ETHERTYPE_ARP) + reply)
            port.put((port.link.prefix(len(frame)), frame))

    def _source_allowed(self, source: bytes, port: Port) -> bool:
        if source in self._own or source in self._broadcasts:
            return False
        number = int.from_bytes(source, "big")
        if not any(number & mask == base for base, mask in self._subnets):
            return False
        return not self._strict or self._leased(source)

    def _ipv4(self, port: Port, source_mac: bytes, body: memoryview, trusted: bool, for_many: bool, now: float) -> None:
        header = ipv4.parse(body)
        data = body[: header.total_length]
        source, destination = header.source, header.destination
        neighbour: Neighbour | None = None
        if source != _ANY:
            if not self._source_allowed(source, port):
                self._drops[Drop.IPV4_SOURCE] += 1
                return
            neighbour = self._neighbours.get(source)
            if neighbour is None or neighbour.port is not port or neighbour.mac != source_mac:
                neighbour = self._neighbours.learn(source, source_mac, port)
                if neighbour is None:
                    return
                self._on_arp(neighbour)
        if header.fragment:
            whole = self._reassembler.add(header, data, now)
            if whole is None:
                return
            data = memoryview(whole)
            header = ipv4.parse(data)
            # The kernel fills checksums in before it fragments.
            trusted = False
        packet = Packet(port, source_mac, header, data, neighbour, trusted, for_many)
        if header.protocol == _UDP and len(packet.payload) >= 8 and bytes(packet.payload[2:4]) == b"\0C":
            if destination == _LIMITED_BROADCAST or destination in self._own or destination in self._broadcasts:
                self._dhcp(packet, now)
                return
        if neighbour is None:
            self._drops[Drop.IPV4_SOURCE] += 1
            return
        first = destination[0]
        # To its own source ("LAND"): an answer would make the guest talk to itself.
        if first >= 224 or first == 0 or destination in self._broadcasts or destination == source:
            self._drops[Drop.IPV4_DESTINATION] += 1
            return
        if header.ttl <= 1 and destination not in self._own:
            self._drops[Drop.TTL_EXPIRED] += 1
            self._refuse(icmp.TIME_EXCEEDED, icmp.TTL_EXCEEDED, packet, now)
            return
        handler = self._handlers.get(header.protocol)
        if handler is None:
            self._drops[Drop.IPV4_PROTOCOL] += 1
            self._refuse(icmp.UNREACHABLE, icmp.PROTOCOL_UNREACHABLE, packet, now)
            return
        handler(packet, now)


def _shortened(pieces: list[memoryview], octets: int) -> list[memoryview]:
    """The first `octets` octets: a frame may be padded behind its packet."""
    found = []
    for piece in pieces:
        if len(piece) >= octets:
            found.append(piece[:octets])
            break
        found.append(piece)
        octets -= len(piece)
    return found
