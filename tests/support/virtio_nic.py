"""A virtio network card's driver (virtio 1.2, 5.1) with a hypervisor around it, over a vhost-user back-end.

    nic = Nic(front, memory, features=FULL)
    nic.start()
    nic.send(frame)
    for received in nic.receive(): received.frame
    nic.stop(); nic.start()                          # paused and resumed: rings go on where they were
    nic.reboot(Feature.VERSION_1.mask)               # the guest started anew, with a driver that wants less
    nic.reconnect(FrontEnd(other), "qemu")           # the back-end was started anew

Written from the specifications, without the project's code. It believes nothing of what it receives: see `virtio_net.check`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from tests.support.guest_memory import PAGE, GuestMemory
from tests.support.vhost_front import FrontEnd, ProtocolFeature
from tests.support.virtio_net import FULL, NO_OFFLOAD, SINGLE, Feature, Header, Received, check
from tests.support.virtqueue import DeviceFault, DriverQueue, Piece, QueueFull

Shape = Literal["mergeable", "big", "single"]


class Pair:
    """A queue pair: its two rings, and the eventfds with which it is told and told of."""

    def __init__(self, nic: Nic, number: int, size: int) -> None:
        indirect, event_idx = nic.has(Feature.INDIRECT_DESC), nic.has(Feature.EVENT_IDX)
        self.nic = nic
        self.number = number
        self.rx: DriverQueue[list[Piece]] = DriverQueue(nic.memory, size, indirect=indirect, event_idx=event_idx)
        self.tx: DriverQueue[list[Piece]] = DriverQueue(nic.memory, size, indirect=indirect, event_idx=event_idx)
        if nic.first:
            self.rx.reset(nic.first)
            self.tx.reset(nic.first)
        self.tx.want_calls(False)  # chains are taken back when the next frame is sent
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
        self.buffers: list[list[Piece]] = []
        """Receive buffers that the device does not have."""
        self.kicked = [0, 0]

    @property
    def queues(self) -> tuple[DriverQueue[list[Piece]], DriverQueue[list[Piece]]]:
        return self.rx, self.tx

    def indexes(self) -> tuple[int, int]:
        """Of the rings, as vhost-user counts them."""
        return 2 * self.number, 2 * self.number + 1

    def kick(self, which: int) -> None:
        """`which`: 0 for rx, 1 for tx."""
        self.kicked[which] += 1
        os.eventfd_write(self.kicks[which], 1)

    def called(self, which: int) -> int:
        """How often the device has called since this was asked last."""
        try:
            return os.eventfd_read(self.calls[which])
        except BlockingIOError:
            return 0

    def post(self) -> int:
        """Give the device all receive buffers it does not have; returns how many it has then."""
        try:
            while self.buffers:
                pieces = self.buffers[-1]
                self.rx.add(pieces, pieces)
                self.buffers.pop()
        except QueueFull:
            pass
        if self.rx.publish():
            self.kick(0)
        return len(self.rx.outstanding)

    def reclaim(self) -> None:
        """Take sent chains back."""
        for pieces, written in self.tx.harvest():
            if written:
                raise DeviceFault(f"{written} octets written to a chain to be sent")
            for piece in pieces:
                self.nic.memory.free(piece.address)

    def close(self) -> None:
        for fd in self.kicks + self.calls:
            os.close(fd)
        self.kicks, self.calls = [], []


class Nic:
    """See the module. `size` descriptors per ring; `shape` of receive buffers, by default what the features ask for."""

    def __init__(
        self,
        front: FrontEnd,
        memory: GuestMemory,
        *,
        features: int = FULL,
        pairs: int = 1,
        size: int = 256,
        shape: Shape | None = None,
        buffer: int = 4096,
        buffers: int = 1 << 16,
        mtu: int = 1500,
        first: int = 0,
        slots: bool = False,
    ) -> None:
        self.front = front
        self.memory = memory
        self.mtu = mtu
        self.size = size
        self.first = first
        """Index with which rings begin; a driver's is 0, but that of a machine that was migrated may be any."""
        self.slots = slots
        """Tell of memory region by region (CONFIGURE_MEM_SLOTS) instead of all at once."""
        self.offered = self.protocol = self.queue_pairs = 0
        self.features = features
        self._shape, self._buffer, self._buffers = shape, buffer, buffers
        self.running = False
        self.errors = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.pairs: list[Pair] = []
        self._inflight: tuple[int, int, int] | None = None
        self._make_rings(pairs)

    def has(self, feature: Feature) -> bool:
        """Whether the driver uses it."""
        return bool(self.features & feature.mask)

    @property
    def header_size(self) -> int:
        return 12 if self.has(Feature.VERSION_1) or self.has(Feature.MRG_RXBUF) else 10

    @property
    def super_frames(self) -> bool:
        """Whether frames of up to 64 KiB may come."""
        return self.has(Feature.GUEST_TSO4) or self.has(Feature.GUEST_TSO6)

    @property
    def shape(self) -> Shape:
        return self._shape or ("mergeable" if self.has(Feature.MRG_RXBUF) else "big" if self.super_frames else "single")

    def _make_rings(self, pairs: int) -> None:
        self.pairs = [Pair(self, number, self.size) for number in range(pairs)]
        for pair in self.pairs:
            self._make_buffers(pair)

    def _make_buffers(self, pair: Pair) -> None:
        """As many as the ring takes."""
        lengths = {
            "mergeable": [self._buffer],
            "single": [self._buffer if self._shape == "single" else SINGLE],
            # As Linux does: the header alone, the rest of its page, then pages.
            "big": [self.header_size, PAGE - 16, *[PAGE] * 16],
        }[self.shape]
        chains = self.size if len(lengths) == 1 or self.has(Feature.INDIRECT_DESC) else self.size // len(lengths)
        for _ in range(min(chains, self._buffers)):
            pair.buffers.append([Piece(self.memory.allocate(length), length, True) for length in lengths])

    # the hypervisor

    def negotiate(self, front: FrontEnd | None = None, *, need_reply: bool = True) -> None:
        """Everything before the guest runs."""
        front = self.front = front or self.front
        self.offered = front.get_features()
        if self.offered & Feature.PROTOCOL_FEATURES.mask:
            wanted = {
                ProtocolFeature.MQ,
                ProtocolFeature.MTU,
                ProtocolFeature.STATUS,
                ProtocolFeature.CONFIGURE_MEM_SLOTS if self.slots else ProtocolFeature.MQ,
                ProtocolFeature.INFLIGHT_SHMFD,
                ProtocolFeature.RESET_DEVICE,
            }
            if need_reply:
                wanted.add(ProtocolFeature.REPLY_ACK)
            self.protocol = front.get_protocol_features() & sum(feature.mask for feature in wanted)
            front.set_protocol_features(self.protocol)
            front.need_reply = self.speaks(ProtocolFeature.REPLY_ACK)
        self.queue_pairs = front.get_queue_num() if self.speaks(ProtocolFeature.MQ) else 1
        front.set_owner()
        missing = self.features & ~self.offered
        if missing:
            raise DeviceFault(f"the device does not offer {[f.name for f in Feature if f.mask & missing]}")
        if self.speaks(ProtocolFeature.MTU) and self.has(Feature.MTU):
            front.net_set_mtu(self.mtu)

    def speaks(self, feature: ProtocolFeature) -> bool:
        return bool(self.protocol & feature.mask)

    def start(self, *, bases: Sequence[int] | None = None) -> None:
        """The guest's driver is ready: rings begin at `bases`, by default where the driver is."""
        if not self.offered:
            self.negotiate()
        front = self.front
        front.set_features(self.features | self.offered & Feature.PROTOCOL_FEATURES.mask)
        if self.slots and self.speaks(ProtocolFeature.CONFIGURE_MEM_SLOTS):
            for region in self.memory.regions():
                front.add_mem_reg(region)
        else:
            front.set_mem_table(self.memory.regions())
        if self.speaks(ProtocolFeature.INFLIGHT_SHMFD):
            self._share_inflight()
        for pair in self.pairs:
            for which, (index, queue) in enumerate(zip(pair.indexes(), pair.queues, strict=True)):
                front.set_vring_num(index, queue.size)
                front.set_vring_base(index, queue.next_used if bases is None else bases[index])
                user = self.memory.user
                front.set_vring_addr(index, user(queue.table), user(queue.used), user(queue.available))
                front.set_vring_kick(index, pair.kicks[which])
                front.set_vring_call(index, pair.calls[which])
                front.set_vring_err(index, self.errors)
        if self.offered & Feature.PROTOCOL_FEATURES.mask:
            for pair in self.pairs:
                for index in pair.indexes():
                    front.set_vring_enable(index, True)
        front.settle()
        self.running = True
        for pair in self.pairs:
            pair.post()
            for which in (0, 1):  # what was put in while nobody looked
                pair.kick(which)

    def _share_inflight(self) -> None:
        rings = 2 * len(self.pairs)
        if self._inflight is None:
            self._inflight = self.front.get_inflight_fd(rings, self.size)
        size, offset, fd = self._inflight
        self.front.set_inflight_fd(size, offset, rings, self.size, fd)

    def stop(self) -> list[int]:
        """As a hypervisor does before it pauses, migrates or resets; returns the bases the back-end told."""
        bases = [self.front.get_vring_base(index) for pair in self.pairs for index in pair.indexes()]
        self.running = False
        return bases

    def reset_rings(self) -> None:
        """As the guest's driver does after a reset: nothing is outstanding, everything begins at 0."""
        for pair in self.pairs:
            pair.buffers += [outstanding.token for outstanding in pair.rx.outstanding.values() if outstanding.token]
            for outstanding in pair.tx.outstanding.values():
                for piece in outstanding.token:
                    self.memory.free(piece.address)
            pair.rx.reset()
            pair.tx.reset()
            for which in (0, 1):
                pair.called(which)

    def reboot(self, features: int | None = None) -> None:
        """The guest starts anew; its driver may want other features."""
        if self.running:
            self.stop()
        self.reset_rings()
        if features is not None and features != self.features:
            for pair in self.pairs:
                for pieces in pair.buffers:
                    for piece in pieces:
                        self.memory.free(piece.address)
                pair.buffers = []
            self.features = features
            for pair in self.pairs:
                for queue in pair.queues:
                    queue.indirect, queue.event_idx = self.has(Feature.INDIRECT_DESC), self.has(Feature.EVENT_IDX)
                    queue.reset()
                self._make_buffers(pair)
        self.start()

    def reconnect(self, front: FrontEnd, like: Literal["qemu", "cloud-hypervisor"]) -> None:
        """The back-end went away and another is there. QEMU begins at what is used, cloud-hypervisor at what was offered."""
        bases = [
            queue.used_index if like == "qemu" else queue.published for pair in self.pairs for queue in pair.queues
        ]
        self.front.close()
        self.offered = self.protocol = 0
        self.negotiate(front)
        self.start(bases=bases)

    def close(self) -> None:
        """The hypervisor ends; harmless when repeated."""
        self.front.close()
        for pair in self.pairs:
            pair.close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1
        if self._inflight is not None:
            os.close(self._inflight[2])
            self._inflight = None

    # the driver

    def send(
        self,
        frame: bytes,
        header: Header = NO_OFFLOAD,
        *,
        pieces: Sequence[int] | None = None,
        pair: int = 0,
        kick: bool = True,
    ) -> None:
        """Put one frame in the ring, header and all cut into `pieces` octets (the last takes the rest).

        Without `pieces` the header has a descriptor of its own. Raises `QueueFull`.
        """
        at = self.pairs[pair]
        octets = header.pack(self.header_size) + frame
        cuts = [self.header_size] if pieces is None else pieces
        chain: list[Piece] = []
        done = 0
        for length in [*cuts, len(octets)]:
            part = octets[done : done + length]
            done += len(part)
            if part:
                address = self.memory.allocate(len(part))
                self.memory.write(address, part)
                chain.append(Piece(address, len(part), False))
        try:
            try:
                at.tx.add(chain, chain)
            except QueueFull:
                at.reclaim()
                at.tx.add(chain, chain)
        except QueueFull:
            for piece in chain:
                self.memory.free(piece.address)
            raise
        if kick:
            self.flush(pair)

    def flush(self, pair: int = 0) -> bool:
        """Let the device see what was put in with `kick=False`; whether it wanted to be told."""
        at = self.pairs[pair]
        wanted = at.tx.publish()
        if wanted:
            at.kick(1)
        return wanted

    def receive(self, pair: int = 0, *, called: bool = False) -> list[Received]:
        """All frames that arrived, their buffers given back to the device; `called`: look only if the device has called."""
        at = self.pairs[pair]
        if called and not at.called(0):
            return []
        waiting = at.rx.harvest()
        found: list[Received] = []
        position = 0
        while position < len(waiting):
            pieces, written = waiting[position]
            octets = self._written(pieces, written)
            if written < self.header_size:
                raise DeviceFault(f"a used length of {written}, less than the header's")
            header = Header.unpack(octets[: self.header_size])
            count = header.num_buffers if self.has(Feature.MRG_RXBUF) else 1
            if not 1 <= count <= len(waiting) - position:
                raise DeviceFault(f"num_buffers is {count}, {len(waiting) - position} are used")
            for more, written in waiting[position + 1 : position + count]:
                if not written:
                    raise DeviceFault("an empty buffer of a frame")
                octets += self._written(more, written)
            found.append(Received(header, octets[self.header_size :], count))
            check(found[-1], self.features, self.mtu)
            position += count
        at.buffers += [pieces for pieces, _written in waiting]
        if waiting:
            at.post()
        return found

    def _written(self, pieces: list[Piece], written: int) -> bytes:
        parts = []
        for piece in pieces:
            if not written:
                break
            parts.append(self.memory.read(piece.address, min(piece.length, written)))
            written -= len(parts[-1])
        return b"".join(parts)
