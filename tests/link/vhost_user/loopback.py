"""A back-end in its plainest form, to prove the driver with: whatever the guest sends, it receives.

Descriptor by descriptor, octet by octet, one frame after the other; it trusts the guest. `sabotage` makes it break one rule of the
specification, which the driver has to notice.
"""

from __future__ import annotations

import array
import mmap
import os
import socket
import struct
from dataclasses import dataclass, field

from tests.support.vhost_front import ProtocolFeature, Request
from tests.support.virtio_net import FULL, Feature

OFFERED = FULL | Feature.PROTOCOL_FEATURES.mask | Feature.MQ.mask | Feature.MTU.mask
PROTOCOL = sum(
    feature.mask
    for feature in (
        ProtocolFeature.MQ,
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.MTU,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.RESET_DEVICE,
        ProtocolFeature.STATUS,
    )
)
NEXT, WRITE, INDIRECT = 1, 2, 4


@dataclass
class Ring:
    size: int = 0
    addresses: tuple[int, int, int] = (0, 0, 0)  # descriptors, used, available: of the front-end
    next: int = 0
    kick: int = -1
    call: int = -1
    enabled: bool = False
    chains: int = 0


@dataclass
class Mapped:
    guest: int
    user: int
    size: int
    octets: memoryview


@dataclass
class Loopback:
    """`turn` answers messages, then carries frames from each transmit ring to the receive ring of its pair."""

    sock: socket.socket
    sabotage: str = ""
    features: int = 0
    regions: list[Mapped] = field(default_factory=list)
    rings: dict[int, Ring] = field(default_factory=dict)
    mtu: int = 0
    status: int = 0
    received: bytearray = field(default_factory=bytearray)
    fds: list[int] = field(default_factory=list)
    unsent: dict[int, list[bytes]] = field(default_factory=dict)
    """Frames for which the guest had no room, by receive ring."""

    def __post_init__(self) -> None:
        self.sock.setblocking(False)

    # messages

    def turn(self) -> None:
        while self.sock.fileno() >= 0:
            try:
                octets, ancillary, _flags, _address = self.sock.recvmsg(65536, socket.CMSG_SPACE(256))
            except (BlockingIOError, ConnectionResetError):
                break
            for _level, _kind, data in ancillary:
                self.fds += array.array("i", data)
            if not octets:
                break
            self.received += octets
            while len(self.received) >= 12:
                request, flags, size = struct.unpack_from("<III", self.received)
                if len(self.received) < 12 + size:
                    break
                payload = bytes(self.received[12 : 12 + size])
                del self.received[: 12 + size]
                self._message(request, flags, payload)
        for number in sorted(self.rings):
            if number % 2 and self.rings[number].enabled:
                self._carry(number)

    def _message(self, request: int, flags: int, payload: bytes) -> None:
        fds, self.fds = self.fds, []  # one message at a time has descriptors, as the front-end waits for each reply
        code = 0
        answer: bytes | None = None
        match request:
            case Request.GET_FEATURES:
                answer = struct.pack("<Q", OFFERED)
            case Request.GET_PROTOCOL_FEATURES:
                answer = struct.pack("<Q", PROTOCOL)
            case Request.GET_QUEUE_NUM | Request.GET_MAX_MEM_SLOTS:
                answer = struct.pack("<Q", 8)
            case Request.GET_STATUS:
                answer = struct.pack("<Q", self.status)
            case Request.SET_STATUS:
                (self.status,) = struct.unpack("<Q", payload)
            case Request.SET_FEATURES:
                (self.features,) = struct.unpack("<Q", payload)
            case Request.SET_MEM_TABLE:
                (count,) = struct.unpack_from("<I", payload)
                self.regions = [self._map(payload[8 + 32 * at : 40 + 32 * at], fds[at]) for at in range(count)]
            case Request.ADD_MEM_REG:
                self.regions.append(self._map(payload[8:], fds[0]))
            case Request.REM_MEM_REG:
                self.regions = [one for one in self.regions if one.guest != struct.unpack_from("<Q", payload, 8)[0]]
            case Request.NET_SET_MTU:
                (self.mtu,) = struct.unpack("<Q", payload)
            case Request.SET_VRING_NUM | Request.SET_VRING_BASE | Request.SET_VRING_ENABLE | Request.GET_VRING_BASE:
                number, value = struct.unpack("<II", payload)
                ring = self.rings.setdefault(number, Ring())
                if request == Request.SET_VRING_NUM:
                    ring.size = value
                elif request == Request.SET_VRING_BASE:
                    ring.next = value
                elif request == Request.SET_VRING_ENABLE:
                    ring.enabled = bool(value)
                else:
                    ring.enabled = False
                    answer = struct.pack("<II", number, ring.next)
            case Request.SET_VRING_ADDR:
                number, _flags, descriptors, used, available, _log = struct.unpack("<IIQQQQ", payload)
                self.rings.setdefault(number, Ring()).addresses = (descriptors, used, available)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                (value,) = struct.unpack("<Q", payload)
                ring = self.rings.setdefault(value & 0xFF, Ring())
                fd = -1 if value & 0x100 else os.dup(fds[0])
                if request == Request.SET_VRING_KICK:
                    ring.kick = self._replace(ring.kick, fd)
                elif request == Request.SET_VRING_CALL:
                    ring.call = self._replace(ring.call, fd)
                elif fd >= 0:
                    os.close(fd)
            case Request.SET_PROTOCOL_FEATURES | Request.SET_OWNER | Request.RESET_OWNER | Request.RESET_DEVICE:
                pass
            case _:
                code = 1
        for fd in fds:
            os.close(fd)
        if answer is None and flags & 8:
            answer = struct.pack("<Q", code)
        if answer is not None:
            self.sock.send(struct.pack("<III", request, 5, len(answer)) + answer)

    @staticmethod
    def _replace(old: int, new: int) -> int:
        if old >= 0:
            os.close(old)
        return new

    @staticmethod
    def _map(region: bytes, fd: int) -> Mapped:
        guest, size, user, offset = struct.unpack("<QQQQ", region)
        return Mapped(guest, user, size, memoryview(mmap.mmap(fd, size, offset=offset)))

    def close(self) -> None:
        for ring in self.rings.values():
            for fd in (ring.kick, ring.call):
                if fd >= 0:
                    os.close(fd)
        self.rings.clear()
        self.regions.clear()
        self.sock.close()

    # memory

    def _user(self, address: int, octets: int) -> memoryview:
        for region in self.regions:
            if region.user <= address and address + octets <= region.user + region.size:
                return region.octets[address - region.user : address - region.user + octets]
        raise AssertionError(f"user address {address:#x}")

    def _guest(self, address: int, octets: int) -> memoryview:
        for region in self.regions:
            if region.guest <= address and address + octets <= region.guest + region.size:
                return region.octets[address - region.guest : address - region.guest + octets]
        raise AssertionError(f"guest address {address:#x}")

    # rings

    def _available(self, ring: Ring) -> int | None:
        """The next head, if there is one."""
        area = self._user(ring.addresses[2], 6 + 2 * ring.size).cast("H")
        if area[1] == ring.next:
            return None
        head = area[2 + ring.next % ring.size]
        ring.next = (ring.next + 1) & 0xFFFF
        if self.features & Feature.EVENT_IDX.mask:
            self._user(ring.addresses[1], 6 + 8 * ring.size).cast("H")[2 + 4 * ring.size] = ring.next
        return head

    def _pieces(self, ring: Ring, head: int) -> list[memoryview]:
        table = self._user(ring.addresses[0], 16 * ring.size)
        found = []
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", table, 16 * head)
            if flags & INDIRECT:
                table, head = self._guest(address, length), 0
                continue
            found.append(self._guest(address, length))
            if not flags & NEXT:
                return found
            head = following

    def _use(self, ring: Ring, used: list[tuple[int, int]]) -> None:
        area = self._user(ring.addresses[1], 6 + 8 * ring.size)
        words = area.cast("H")
        before = words[1]
        for number, (head, written) in enumerate(used):
            struct.pack_into("<II", area, 4 + 8 * ((before + number) % ring.size), head, written)
        words[1] = (before + len(used)) & 0xFFFF
        ring.chains += len(used)
        available = self._user(ring.addresses[2], 6 + 2 * ring.size).cast("H")
        if self.features & Feature.EVENT_IDX.mask:
            wanted = (words[1] - available[2 + ring.size] - 1) & 0xFFFF < len(used)
        else:
            wanted = not available[0] & 1
        if wanted and self.sabotage != "never calls":
            os.eventfd_write(ring.call, 1)

    def _carry(self, number: int) -> None:
        transmit, receive = self.rings[number], self.rings[number - 1]
        header = 12 if self.features & (Feature.VERSION_1.mask | Feature.MRG_RXBUF.mask) else 10
        queued = self.unsent.setdefault(number - 1, [])
        while (head := self._available(transmit)) is not None:
            frame = b"".join(self._pieces(transmit, head))
            match self.sabotage:
                case "completes what it was not given":
                    self._use(transmit, [((head + 1) % transmit.size, 0)])
                case "completes twice":
                    self._use(transmit, [(head, 0), (head, 0)])
                case "says it wrote to a chain to be sent":
                    self._use(transmit, [(head, 1)])
                case "forgets a chain":
                    pass
                case _:
                    self._use(transmit, [(head, 0)])
            queued.append(frame[header:])
        while queued and self._deliver(receive, queued[0], header):
            del queued[0]

    def _deliver(self, ring: Ring, frame: bytes, header: int) -> bool:
        merge = bool(self.features & Feature.MRG_RXBUF.mask)
        start = ring.next
        used: list[tuple[int, int]] = []
        places: list[memoryview] = []
        room = 0
        while room < header + len(frame):
            head = self._available(ring)
            if head is None or (used and not merge):
                ring.next = start
                return False
            pieces = self._pieces(ring, head)
            room += sum(map(len, pieces))
            used.append((head, sum(map(len, pieces))))
            places += pieces
        used[-1] = (used[-1][0], used[-1][1] - (room - header - len(frame)))
        buffers = len(used)
        if self.sabotage == "num_buffers is 0":
            buffers = 0
        octets = struct.pack("<BBHHHHH", 0, 0, 0, 0, 0, 0, buffers)[:header] + frame
        if self.sabotage == "asks for checksums nobody negotiated":
            octets = struct.pack("<BBHHHHH", 1, 0, 0, 0, 14, 2, buffers)[:header] + frame
        if self.sabotage == "changes an octet":
            octets = octets[:-1] + bytes((octets[-1] ^ 1,))
        for place in places:
            place[: len(octets)] = octets[: len(place)]
            octets = octets[len(place) :]
        if self.sabotage == "writes more than fits":
            used[-1] = (used[-1][0], used[-1][1] + 100_000)
        if self.sabotage == "shows half a frame":
            self._use(ring, used[:1])
            return True
        if self.sabotage == "jumps":
            area = self._user(ring.addresses[1], 6 + 8 * ring.size).cast("H")
            area[1] = (area[1] + 1000) & 0xFFFF
        self._use(ring, used)
        return True
