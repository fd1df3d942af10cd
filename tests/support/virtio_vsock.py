"""A virtio-vsock driver (virtio 1.2, 5.10) with a hypervisor and a guest's sockets around it, over a vhost-user back-end.

    guest = Guest(front, memory)                     # written from the specifications, without the project's code
    guest.start()
    sock = guest.connect(5000); guest.pump(); sock.send(b"octets")
    guest.listen(2376); ...; accepted = guest.accepted[0]

`pump` takes what the device sent and gives its buffers back. It believes nothing: who sends more than it was given credit for, or
in a state in which nothing may come, is a `DeviceFault`. `send_packet` sends any packet at all.
"""

from __future__ import annotations

import itertools
import os
import struct
from collections.abc import Sequence
from typing import Final, NamedTuple

from tests.support.guest_memory import GuestMemory
from tests.support.vhost_front import FrontEnd, ProtocolFeature
from tests.support.virtio_net import Feature
from tests.support.virtqueue import DeviceFault, DriverQueue, Piece

HEADER: Final = struct.Struct("<QQIIIHHIII")
SIZE: Final = 44
STREAM: Final = 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
RECEIVE, SEND = 1, 2
"""Flags of SHUTDOWN: no more of that."""
HOST: Final = 2
FEATURES: Final = Feature.VERSION_1.mask | Feature.INDIRECT_DESC.mask | Feature.EVENT_IDX.mask
RX, TX, EVENTS = 0, 1, 2
MASK: Final = 0xFFFFFFFF


class Packet(NamedTuple):
    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int
    payload: bytes = b""

    def octets(self) -> bytes:
        return HEADER.pack(*self[:10]) + self.payload


class Sock:
    """One stream of the guest. Nothing is taken from what arrived until `take` (or `greedy`)."""

    def __init__(self, guest: Guest, port: int, peer: int, buf_alloc: int) -> None:
        self.guest = guest
        self.port = port
        self.peer = peer
        self.state = "new"
        self.received = bytearray()
        self.greedy = True
        self.eof = False
        """The host sends no more."""
        self.deaf = False
        """The host takes no more."""
        self.buf_alloc = buf_alloc
        self.rx = self.fwd = self.told = 0
        self.tx = 0
        self.peer_buf_alloc = self.peer_fwd = 0
        self.updates = 0

    @property
    def room(self) -> int:
        return max(0, self.peer_buf_alloc - ((self.tx - self.peer_fwd) & MASK))

    def say(self, op: int, payload: bytes = b"", flags: int = 0, cuts: Sequence[int] = ()) -> None:
        self.told = self.fwd
        packet = Packet(
            self.guest.cid,
            HOST,
            self.port,
            self.peer,
            len(payload),
            STREAM,
            op,
            flags,
            self.buf_alloc,
            self.fwd & MASK,
            payload,
        )
        self.guest.send_packet(packet, cuts)

    def send(self, data: bytes, largest: int = 65536, cuts: Sequence[int] = ()) -> int:
        """As much as there is credit for, and room in the ring; how much."""
        sent = 0
        self.guest.reclaim()
        while sent < len(data) and self.room and self.guest.queues[TX].room > 3:
            piece = data[sent : sent + min(self.room, largest)]
            self.tx += len(piece)
            self.say(RW, piece, cuts=cuts)
            sent += len(piece)
        return sent

    def take(self, octets: int | None = None) -> None:
        """Read so much of what came, and let the host know."""
        self.fwd += (self.rx - self.fwd) if octets is None else octets
        if self.buf_alloc - (self.rx - self.told) < self.buf_alloc // 2:
            self.say(CREDIT_UPDATE)

    def shutdown(self, flags: int) -> None:
        self.say(SHUTDOWN, flags=flags)

    def close(self) -> None:
        self.state = "closing"
        self.shutdown(RECEIVE | SEND)

    def arrives(self, packet: Packet) -> None:
        self.peer_buf_alloc, self.peer_fwd = packet.buf_alloc, packet.fwd_cnt
        op = packet.op
        if op == RST:
            self.state = "refused" if self.state == "connecting" else "reset" if self.state == "open" else "closed"
            del self.guest.socks[self.port, self.peer]
        elif op == RESPONSE and self.state == "connecting":
            self.state = "open"
        elif self.state == "closing":
            pass
        elif self.state != "open":
            raise DeviceFault(f"{packet} in state {self.state}")
        elif op == RW:
            self.rx += packet.length
            if self.rx - self.fwd > self.buf_alloc:
                raise DeviceFault(f"{self.rx - self.fwd} octets on the way, the credit is {self.buf_alloc}")
            if self.eof:
                raise DeviceFault("octets after SHUTDOWN")
            self.received += packet.payload
            if self.greedy:
                self.take()
        elif op == SHUTDOWN:
            self.eof |= bool(packet.flags & SEND)
            self.deaf |= bool(packet.flags & RECEIVE)
            if self.eof and self.deaf:
                self.say(RST)
                self.state = "closed"
                del self.guest.socks[self.port, self.peer]
        elif op == CREDIT_UPDATE:
            self.updates += 1
        elif op == CREDIT_REQUEST:
            self.say(CREDIT_UPDATE)
        else:
            raise DeviceFault(f"{packet} in state {self.state}")


class Guest:
    """See the module. `buffer` octets in each of the guest's receive buffers, cut at `cuts`; `buffers` of them at most."""

    def __init__(
        self,
        front: FrontEnd,
        memory: GuestMemory,
        *,
        cid: int = 3,
        features: int = FEATURES,
        size: int = 128,
        buffer: int = 3776,
        buffers: int = 128,
        cuts: Sequence[int] = (),
        buf_alloc: int = 256 << 10,
    ) -> None:
        self.front = front
        self.memory = memory
        self.cid = cid
        self.features = features
        self.buf_alloc = buf_alloc
        indirect, event_idx = (bool(features & one.mask) for one in (Feature.INDIRECT_DESC, Feature.EVENT_IDX))
        self.queues: list[DriverQueue[list[Piece]]] = [
            DriverQueue(memory, size, indirect=indirect, event_idx=event_idx) for _ in range(3)
        ]
        self.queues[TX].want_calls(False)
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(3)]
        self.errors = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicked = [0, 0, 0]
        self.spare: list[list[Piece]] = []
        """Receive buffers that the device does not have."""
        for _ in range(buffers):
            edges = [0, *cuts, buffer]
            self.spare.append(
                [Piece(memory.allocate(end - start), end - start, True) for start, end in itertools.pairwise(edges)]
            )
        self.socks: dict[tuple[int, int], Sock] = {}
        self.listening: set[int] = set()
        self.accepted: list[Sock] = []
        self.strays: list[Packet] = []
        """Packets for no socket of ours, but RSTs and requests."""
        self.resets: list[Packet] = []
        """RSTs for none."""
        self.events: list[bytes] = []
        self.posting = True
        self.answering = True
        """Answer what belongs to nothing with RST."""
        self.running = False
        self._port = 1024

    # the hypervisor

    def start(self, *, events: bool = True) -> None:
        """Negotiate, and let the rings run from where they are."""
        front, user = self.front, self.memory.user
        offered = front.get_features()
        if self.features & ~offered:
            raise DeviceFault(f"features {self.features & ~offered:#x} are not offered")
        protocol = front.get_protocol_features() & (ProtocolFeature.REPLY_ACK.mask | ProtocolFeature.CONFIG.mask)
        front.set_protocol_features(protocol)
        front.need_reply = True
        front.set_owner()
        front.set_features(self.features | Feature.PROTOCOL_FEATURES.mask)
        front.set_mem_table(self.memory.regions())
        for index in range(3 if events else 2):
            queue = self.queues[index]
            front.set_vring_num(index, queue.size)
            front.set_vring_base(index, queue.next_used)
            front.set_vring_addr(index, user(queue.table), user(queue.used), user(queue.available))
            front.set_vring_kick(index, self.kicks[index])
            front.set_vring_call(index, self.calls[index])
            front.set_vring_err(index, self.errors)
        for index in range(3 if events else 2):
            front.set_vring_enable(index, True)
        front.settle()
        self.running = True
        self.post()
        if events:
            while len(self.queues[EVENTS].outstanding) < 8:
                piece = Piece(self.memory.allocate(4), 4, True)
                self.queues[EVENTS].add([piece], [piece])
            self.queues[EVENTS].publish()
        for index in range(3):
            self.kick(index)

    def stop(self) -> list[int]:
        """As a hypervisor does before it pauses or resets the machine."""
        self.running = False
        return [self.front.get_vring_base(index) for index in range(3)]

    def reboot(self) -> None:
        """The guest starts anew; nothing of before is known to it."""
        self.stop()
        for queue in self.queues:
            if queue is self.queues[RX]:
                self.spare += [outstanding.token for outstanding in queue.outstanding.values() if outstanding.token]
            queue.reset()
        self.socks.clear()
        self.start()

    def reconnect(self, front: FrontEnd) -> None:
        """The back-end was started anew; the guest does not know."""
        self.front = front
        self.start()

    def kick(self, index: int) -> None:
        self.kicked[index] += 1
        os.eventfd_write(self.kicks[index], 1)

    def called(self, index: int) -> int:
        """How often the device has called since this was asked last."""
        try:
            return os.eventfd_read(self.calls[index])
        except BlockingIOError:
            return 0

    def close(self) -> None:
        self.front.close()
        for fd in [*self.kicks, *self.calls, self.errors]:
            os.close(fd)

    # packets

    def post(self) -> None:
        """Give the device the receive buffers that it does not have."""
        queue = self.queues[RX]
        while self.posting and self.spare and queue.room >= len(self.spare[-1]):
            pieces = self.spare.pop()
            queue.add(pieces, pieces)
        if queue.publish():
            self.kick(RX)

    def send_packet(self, packet: Packet | bytes, cuts: Sequence[int] = (), *, publish: bool = True) -> None:
        """Any octets at all, in descriptors cut at `cuts` (by default behind the header, as Linux 6.1 does)."""
        octets = packet if isinstance(packet, bytes) else packet.octets()
        self.reclaim()
        edges = sorted({0, *(one for one in (cuts or (SIZE,)) if one < len(octets)), len(octets)})
        pieces = []
        for start, end in itertools.pairwise(edges):
            piece = Piece(self.memory.allocate(max(end - start, 1)), end - start, False)
            self.memory.write(piece.address, octets[start:end])
            pieces.append(piece)
        self.queues[TX].add(pieces, pieces)
        if publish and self.queues[TX].publish():
            self.kick(TX)

    def publish(self) -> None:
        """What was sent with `publish=False`."""
        if self.queues[TX].publish():
            self.kick(TX)

    def reclaim(self) -> None:
        """Take back what was sent."""
        for pieces, written in self.queues[TX].harvest():
            if written:
                raise DeviceFault(f"{written} octets written to a chain to be sent")
            for piece in pieces:
                self.memory.free(piece.address)

    def packets(self) -> list[Packet]:
        """What the device sent; its buffers are spare again."""
        found = []
        for pieces, written in self.queues[RX].harvest():
            self.spare.append(pieces)
            if not written:
                continue
            octets = b"".join(self.memory.read(piece.address, piece.length) for piece in pieces)[:written]
            packet = Packet(*HEADER.unpack(octets[:SIZE]), octets[SIZE:])
            if packet.length != len(packet.payload):
                raise DeviceFault(f"{len(packet.payload)} octets in {packet[:10]}")
            if (packet.src_cid != HOST and packet.op != RST) or packet.dst_cid != self.cid:
                raise DeviceFault(f"{packet[:10]} at guest {self.cid}")
            found.append(packet)
        for pieces, written in self.queues[EVENTS].harvest():
            self.events.append(self.memory.read(pieces[0].address, written))
        return found

    # the guest's sockets

    def connect(self, port: int, own: int | None = None) -> Sock:
        """To a service of the host."""
        if own is None:
            self._port += 1
        sock = self._sock(self._port if own is None else own, port, "connecting")
        sock.say(REQUEST)
        return sock

    def listen(self, port: int) -> None:
        self.listening.add(port)

    def _sock(self, port: int, peer: int, state: str) -> Sock:
        sock = self.socks[port, peer] = Sock(self, port, peer, self.buf_alloc)
        sock.state = state
        return sock

    def pump(self) -> bool:
        """Take what came, whether something did."""
        found = self.packets()
        for packet in found:
            sock = self.socks.get((packet.dst_port, packet.src_port))
            if sock is not None:
                sock.arrives(packet)
            elif packet.op == RST:
                self.resets.append(packet)
            elif packet.op == REQUEST and packet.dst_port in self.listening:
                sock = self._sock(packet.dst_port, packet.src_port, "open")
                sock.peer_buf_alloc, sock.peer_fwd = packet.buf_alloc, packet.fwd_cnt
                self.accepted.append(sock)
                sock.say(RESPONSE)
            else:
                if packet.op != REQUEST:
                    self.strays.append(packet)
                if self.answering:
                    self.send_packet(Packet(self.cid, HOST, packet.dst_port, packet.src_port, 0, STREAM, RST, 0, 0, 0))
        self.post()
        return bool(found)
