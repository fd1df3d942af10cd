"""A vhost-user device without sockets: what each message does to it (vhost-user protocol; virtio 1.2 for what is behind it).

`Device` is any kind of device; a kind (`net`) says which features it has, what its configuration space holds, and is told when its
rings run (`rings_changed`). `handle` takes a message and the descriptors that came with it, and returns the answer.

States of a ring: it *starts* when its kick descriptor arrives and *stops* at GET_VRING_BASE; it is *enabled* by
SET_VRING_ENABLE (or from the start, where protocol features were not agreed on). A ring that is started and enabled runs. Rings
always continue at the used index that is in the guest's memory, whatever SET_VRING_BASE says: chains are used up in order and a
batch is shown at once (see `ring`), so that index is right after a crash too, when the front-end can only guess (QEMU guesses the
used index, cloud-hypervisor the available one). For the same reason the inflight region of INFLIGHT_SHMFD is handed out and
taken back, but nothing in it is needed.

Whose descriptors: those of a message are `handle`'s; what it keeps is closed at the latest by `close`, the others before it
returns.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Final

from netstack.errors import Malformed, NetstackError
from netstack.link.vhost_user import messages
from netstack.link.vhost_user.memory import Broken, GuestMemory, Unmappable
from netstack.link.vhost_user.messages import Message, ProtocolFeature, Request, RingAddresses, name_of
from netstack.link.vhost_user.ring import MAX_SIZE, SplitQueue

log = logging.getLogger("pyvpnkit.link")

INDIRECT_DESC: Final = 28
EVENT_IDX: Final = 29
PROTOCOL_FEATURES: Final = 30
"""Of vhost-user, never the guest's."""
VERSION_1: Final = 32
EVENTFD: Final = "anon_inode:[eventfd]"
"""What /proc calls one; a file may have a name like it, but not the same, for a path begins with a slash."""
MEM_SLOTS: Final = 64
_INFLIGHT_ENTRY: Final = 16
_INFLIGHT_HEAD: Final = 16
INFLIGHT_LIMIT: Final = 4 << 20

OFFERED: Final = (
    ProtocolFeature.MQ,
    ProtocolFeature.REPLY_ACK,
    ProtocolFeature.MTU,
    ProtocolFeature.BACKEND_REQ,
    ProtocolFeature.CONFIG,
    ProtocolFeature.INFLIGHT_SHMFD,
    ProtocolFeature.RESET_DEVICE,
    ProtocolFeature.CONFIGURE_MEM_SLOTS,
    ProtocolFeature.STATUS,
)


def warn(_cause: str, text: str) -> None:
    """To the log, always."""
    log.warning("%s", text)


class Refused(NetstackError):
    """A message that cannot be obeyed: answered with a failure where an answer is wanted, else the end of the connection."""


class Ring:
    """What the front-end said about one ring; `queue` is there while it runs."""

    __slots__ = ("addresses", "base", "call", "enabled", "error", "index", "kick", "queue", "size")

    def __init__(self, index: int, enabled: bool) -> None:
        self.index = index
        self.size = 0
        self.addresses: RingAddresses | None = None
        self.base = 0
        self.kick = self.call = self.error = -1
        self.enabled = enabled
        self.queue: SplitQueue | None = None

    @property
    def runs(self) -> bool:
        return self.queue is not None and self.enabled


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


class Device:
    """See the module. `features` are the virtio feature bits offered, `queues` the most rings there may be, `queue_number` what
    GET_QUEUE_NUM says."""

    def __init__(
        self,
        name: str,
        *,
        features: int,
        queues: int,
        queue_number: int,
        protocol: Sequence[ProtocolFeature] = OFFERED,
        complain: Callable[[str, str], None] = warn,
    ) -> None:
        self.name = name
        self.complain = complain
        """Told `(cause, text)` of what a person should know; who listens may say only so much of one cause."""
        self.features = features | 1 << PROTOCOL_FEATURES
        self.protocol = sum(1 << bit for bit in protocol)
        self.queues = queues
        self.queue_number = queue_number
        self.agreed = 0
        """Virtio features of the driver, as of the last SET_FEATURES."""
        self.agreed_protocol = 0
        self.status = 0
        self.memory = GuestMemory()
        self.rings: dict[int, Ring] = {}
        self.broken = ""
        """Why the device has stopped by itself; a driver that starts its rings anew ends that."""
        self.why = ""
        """The reason, where rings stop for another one than that the driver stopped them."""
        self._backend_channel = -1
        self._inflight: mmap.mmap | None = None
        self._handlers: dict[int, Callable[[Message, list[int]], bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._nothing,
            Request.RESET_OWNER: self._reset,
            Request.RESET_DEVICE: self._reset,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_LOG_BASE: self._nothing,
            Request.SET_LOG_FD: self._nothing,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SEND_RARP: self._nothing,
            Request.NET_SET_MTU: self._net_set_mtu,
            Request.SET_BACKEND_REQ_FD: self._set_backend_channel,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight,
            Request.SET_INFLIGHT_FD: self._set_inflight,
            Request.GET_MAX_MEM_SLOTS: self._get_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
            Request.SET_STATUS: self._set_status,
            Request.GET_STATUS: self._get_status,
        }
        self.outgoing: list[int] = []
        """Descriptors that leave with the answer; whoever sends it closes them."""

    # What a kind of device adds.

    def config(self) -> bytes:
        """The configuration space."""
        return b""

    def rings_changed(self) -> None:
        """Rings began or ceased to run, or run with another memory."""

    def mtu_set(self, mtu: int) -> None:
        """NET_SET_MTU."""
        raise Refused(f"an MTU of {mtu} for a device without one")

    # The whole.

    def has(self, feature: int) -> bool:
        """Whether the driver agreed to a virtio feature bit."""
        return bool(self.agreed >> feature & 1)

    def speaks(self, feature: ProtocolFeature) -> bool:
        return bool(self.agreed_protocol >> feature & 1)

    def handle(self, message: Message, descriptors: list[int]) -> bytes | None:
        """Do what is asked; the answer's octets, if there is one. Raises `Malformed` or `Refused`: the connection is to be
        closed. All `descriptors` that are not kept are closed."""
        self.outgoing = []
        wanted = message.need_reply and self.speaks(ProtocolFeature.REPLY_ACK)
        try:
            handler = self._handlers.get(message.request)
            if handler is None:
                raise Refused("is not known here, and was not offered")
            answer = handler(message, descriptors)
            if answer is not None:
                return messages.reply(message.request, answer)
            status = 0
        except (Refused, Unmappable, Broken) as error:
            text = f"{name_of(message.request)}: {error}"
            if not wanted:
                raise Refused(text) from None
            self.complain("refused", f"{self.name}: {text}")
            status = 1
        except Malformed as error:
            raise Malformed(f"{name_of(message.request)}: {error}") from None
        finally:
            close_all(descriptors)
        return messages.reply(message.request, messages.U64.pack(status)) if wanted else None

    def close(self, reason: str) -> None:
        """Stop all rings and let go of everything."""
        self.why = reason
        self._stop_all()
        close_all([self._backend_channel] if self._backend_channel >= 0 else [])
        self._backend_channel = -1
        if self._inflight is not None:
            self._inflight.close()
            self._inflight = None
        self.memory = GuestMemory()

    def stop_by_itself(self, reason: str) -> None:
        """The guest's rings are broken: none runs until the front-end starts it anew. Tells by the error descriptors."""
        self.broken = reason
        self.complain("broken", f"{self.name}: {reason}; the device stops until the guest's driver starts it again")
        for ring in self.rings.values():
            if ring.error >= 0:
                with contextlib.suppress(OSError):
                    os.eventfd_write(ring.error, 1)
        self.rings_changed()

    def _reset(self, _message: Message, _descriptors: list[int]) -> None:
        """All rings stop and are forgotten, status is 0; memory and features stay until they are told anew."""
        self._stop_all()
        self.status = 0

    def _stop_all(self) -> None:
        rings = list(self.rings.values())
        for ring in rings:
            ring.queue = None
        self.broken = ""
        self.rings_changed()
        for ring in rings:
            close_all([one for one in (ring.kick, ring.call, ring.error) if one >= 0])
        self.rings.clear()

    def _nothing(self, _message: Message, _descriptors: list[int]) -> None:
        """Asked for out of habit; there is nothing to do (no dirty log, no RARP were offered)."""

    # Features.

    def _get_features(self, _message: Message, _descriptors: list[int]) -> bytes:
        return messages.U64.pack(self.features)

    def _set_features(self, message: Message, _descriptors: list[int]) -> None:
        features = messages.u64(message.payload)
        if features & ~self.features:
            raise Refused(f"features {features & ~self.features:#x} were not offered")
        self.agreed = features

    def _get_protocol_features(self, _message: Message, _descriptors: list[int]) -> bytes:
        return messages.U64.pack(self.protocol)

    def _set_protocol_features(self, message: Message, _descriptors: list[int]) -> None:
        features = messages.u64(message.payload)
        if features & ~self.protocol:
            raise Refused(f"protocol features {features & ~self.protocol:#x} were not offered")
        self.agreed_protocol = features

    def _get_queue_num(self, _message: Message, _descriptors: list[int]) -> bytes:
        return messages.U64.pack(self.queue_number)

    def _set_status(self, message: Message, _descriptors: list[int]) -> None:
        status = messages.u64(message.payload)
        if status > 0xFF:
            raise Refused(f"a device status of {status}")
        if status == 0 and self.status:
            self._stop_all()
        self.status = status

    def _get_status(self, _message: Message, _descriptors: list[int]) -> bytes:
        return messages.U64.pack(self.status)

    def _get_config(self, message: Message, _descriptors: list[int]) -> bytes:
        offset, size, _octets = messages.config_request(message.payload)
        space = self.config()
        if offset + size > len(space):
            # "Payload size 0 is an error" (GET_CONFIG), but front-ends ask for the largest they know.
            space = space.ljust(256, b"\0")
        if offset + size > len(space):
            raise Refused(f"{size} octets at {offset} of the configuration")
        return messages.config_reply(offset, space[offset : offset + size])

    def _set_config(self, message: Message, _descriptors: list[int]) -> None:
        messages.config_request(message.payload)
        raise Refused("the configuration is not for writing")

    def _net_set_mtu(self, message: Message, _descriptors: list[int]) -> None:
        self.mtu_set(messages.u64(message.payload))

    def _set_backend_channel(self, _message: Message, descriptors: list[int]) -> None:
        """Kept for requests of ours; there are none, since the configuration does not change while a guest runs."""
        descriptor = self._only(descriptors)
        close_all([self._backend_channel] if self._backend_channel >= 0 else [])
        self._backend_channel = descriptor

    # Memory.

    def _set_mem_table(self, message: Message, descriptors: list[int]) -> None:
        regions = messages.memory_table(message.payload)
        if len(descriptors) != len(regions):
            raise Refused(f"{len(regions)} memory regions with {len(descriptors)} descriptors")
        self._use_memory(GuestMemory.of(regions, descriptors))

    def _get_mem_slots(self, _message: Message, _descriptors: list[int]) -> bytes:
        return messages.U64.pack(MEM_SLOTS)

    def _add_mem_reg(self, message: Message, descriptors: list[int]) -> None:
        region = messages.single_region(message.payload)
        if len(descriptors) != 1:
            raise Refused(f"one memory region with {len(descriptors)} descriptors")
        self._use_memory(self.memory.with_region(region, descriptors[0]))

    def _rem_mem_reg(self, message: Message, _descriptors: list[int]) -> None:
        self._use_memory(self.memory.without_region(messages.single_region(message.payload)))

    def _use_memory(self, memory: GuestMemory) -> None:
        before = self.memory
        running = [ring for ring in self.rings.values() if ring.queue is not None]
        self.memory = memory
        try:
            for ring in running:
                assert ring.queue is not None
                ring.queue.remap(memory)
        except (Broken, IndexError):
            self.memory = before
            for ring in running:
                assert ring.queue is not None
                ring.queue.remap(before)
            raise Refused("a running ring would be in no memory any more") from None
        self.rings_changed()

    # Rings.

    def _ring(self, index: int) -> Ring:
        if index >= self.queues:
            raise Refused(f"ring {index}; there are {self.queues}")
        ring = self.rings.get(index)
        if ring is None:
            ring = self.rings[index] = Ring(index, not self.has(PROTOCOL_FEATURES))
        return ring

    def _stopped_ring(self, index: int) -> Ring:
        ring = self._ring(index)
        if ring.queue is not None:
            raise Refused(f"ring {index} runs; it is changed while it is stopped")
        return ring

    def _set_vring_num(self, message: Message, _descriptors: list[int]) -> None:
        index, size = messages.vring_state(message.payload)
        if not 0 < size <= MAX_SIZE or size & (size - 1):
            raise Refused(f"ring {index} of {size} entries; a power of two up to {MAX_SIZE} is possible")
        self._stopped_ring(index).size = size

    def _set_vring_addr(self, message: Message, _descriptors: list[int]) -> None:
        addresses = messages.ring_addresses(message.payload)
        ring = self._ring(addresses.index)
        if addresses.descriptors & 15 or addresses.available & 1 or addresses.used & 3:
            raise Refused(f"ring {addresses.index}: its parts are not aligned to 16, 2 and 4 octets (virtio 1.2, 2.7)")
        if not ring.size:
            raise Refused(f"ring {addresses.index} has no size yet")
        if ring.queue is not None:
            # Only for the dirty log, which there is none of; the ring itself does not move while it runs.
            if ring.addresses is None or (addresses.descriptors, addresses.available, addresses.used) != (
                ring.addresses.descriptors,
                ring.addresses.available,
                ring.addresses.used,
            ):
                raise Refused(f"ring {addresses.index} runs; it is moved while it is stopped")
            return
        for address, octets in (
            (addresses.descriptors, 16 * ring.size),
            (addresses.available, 6 + 2 * ring.size),
            (addresses.used, 6 + 8 * ring.size),
        ):
            self.memory.at_user_address(address, octets)
        ring.addresses = addresses

    def _set_vring_base(self, message: Message, _descriptors: list[int]) -> None:
        index, base = messages.vring_state(message.payload)
        if base > 0xFFFF:
            raise Refused(f"ring {index} is to begin at {base}; it has a split ring's index, 16 bits")
        self._stopped_ring(index).base = base

    def _get_vring_base(self, message: Message, _descriptors: list[int]) -> bytes:
        """Stops the ring; its descriptors are the front-end's again."""
        index, _number = messages.vring_state(message.payload)
        ring = self._ring(index)
        queue, ring.queue = ring.queue, None
        self.rings_changed()
        close_all([one for one in (ring.kick, ring.call, ring.error) if one >= 0])
        ring.kick = ring.call = ring.error = -1
        if queue is not None:
            ring.base = queue.next
        if not any(ring.queue for ring in self.rings.values()):
            self.broken = ""
        return messages.STATE.pack(index, ring.base)

    def _set_vring_enable(self, message: Message, _descriptors: list[int]) -> None:
        index, enabled = messages.vring_state(message.payload)
        if enabled > 1:
            raise Refused(f"ring {index} is to be enabled by {enabled}")
        ring = self._ring(index)
        if bool(enabled) != ring.enabled:
            ring.enabled = bool(enabled)
            self.rings_changed()

    def _set_vring_kick(self, message: Message, descriptors: list[int]) -> None:
        ring, descriptor = self._ring_and_descriptor(message, descriptors)
        if descriptor < 0:
            raise Refused(f"ring {ring.index} without a kick descriptor would have to be looked at all the time")
        if ring.queue is None:
            try:
                if ring.addresses is None:
                    raise Refused(f"ring {ring.index} has no addresses yet")
                if not self.memory.regions:
                    raise Refused("there is no memory yet")
                ring.queue = SplitQueue(
                    ring.index,
                    ring.size,
                    ring.addresses,
                    self.memory,
                    event_idx=self.has(EVENT_IDX),
                    indirect=self.has(INDIRECT_DESC),
                )
            except BaseException:
                close_all([descriptor])
                raise
            ring.queue.call = ring.call
            if ring.queue.next != ring.base:
                log.info("%s: ring %d goes on at %d, not at %d", self.name, ring.index, ring.queue.next, ring.base)
        before, ring.kick = ring.kick, descriptor
        self.rings_changed()
        close_all([before] if before >= 0 else [])

    def _set_vring_call(self, message: Message, descriptors: list[int]) -> None:
        ring, descriptor = self._ring_and_descriptor(message, descriptors)
        before, ring.call = ring.call, descriptor
        if ring.queue is not None:
            ring.queue.call = descriptor
            ring.queue.tell()  # what the one before was told may have been lost with it
        close_all([before] if before >= 0 else [])

    def _set_vring_err(self, message: Message, descriptors: list[int]) -> None:
        ring, descriptor = self._ring_and_descriptor(message, descriptors)
        before, ring.error = ring.error, descriptor
        close_all([before] if before >= 0 else [])

    def _ring_and_descriptor(self, message: Message, descriptors: list[int]) -> tuple[Ring, int]:
        """The ring, and the eventfd for it (ours from now on), -1 where the message says that there is none."""
        number = messages.u64(message.payload)
        ring = self._ring(number & 0xFF)
        if number & ~(0xFF | messages.NO_DESCRIPTOR):
            raise Refused(f"ring {number:#x}")
        if number & messages.NO_DESCRIPTOR:
            if descriptors:
                raise Refused(f"ring {ring.index}: a descriptor, and the word that there is none")
            return ring, -1
        descriptor = self._only(descriptors)
        try:
            kind = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            kind = EVENTFD  # no /proc: believe it
        if kind != EVENTFD:
            close_all([descriptor])
            raise Refused(f"ring {ring.index}: its descriptor is {kind}, not an eventfd")
        os.set_blocking(descriptor, False)
        return ring, descriptor

    @staticmethod
    def _only(descriptors: list[int]) -> int:
        """Take the one descriptor that must have come."""
        if len(descriptors) != 1:
            raise Refused(f"{len(descriptors)} descriptors instead of one")
        return descriptors.pop()

    # What a front-end keeps for the next of us.

    def _get_inflight(self, message: Message, _descriptors: list[int]) -> bytes:
        _size, _offset, queues, entries = messages.inflight(message.payload)
        octets = self._inflight_octets(queues, entries)
        descriptor = os.memfd_create("pyvpnkit-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, octets)
            self._keep_inflight(descriptor, octets)
        except BaseException:
            os.close(descriptor)
            raise
        self.outgoing = [descriptor]
        return messages.INFLIGHT.pack(octets, 0, queues, entries)

    def _set_inflight(self, message: Message, descriptors: list[int]) -> None:
        _size, offset, queues, entries = messages.inflight(message.payload)
        if len(descriptors) != 1:
            raise Refused(f"{len(descriptors)} descriptors instead of one")
        octets = self._inflight_octets(queues, entries)
        if offset or os.fstat(descriptors[0]).st_size < octets:
            raise Refused(f"an inflight region that is not one of ours, of {octets} octets")
        self._keep_inflight(descriptors[0], octets)

    def _inflight_octets(self, queues: int, entries: int) -> int:
        """By the layout for split rings of the protocol, each queue's part rounded up to 64."""
        if not 0 < queues <= self.queues or not 0 < entries <= MAX_SIZE:
            raise Refused(f"an inflight region for {queues} rings of {entries} entries")
        octets = queues * (-(-(_INFLIGHT_HEAD + entries * _INFLIGHT_ENTRY) // 64) * 64)
        if octets > INFLIGHT_LIMIT:
            raise Refused(f"an inflight region of {octets} octets")
        return octets

    def _keep_inflight(self, descriptor: int, octets: int) -> None:
        try:
            mapped = mmap.mmap(descriptor, octets)
        except (OSError, ValueError) as error:
            raise Refused(f"an inflight region that cannot be mapped: {error}") from None
        if self._inflight is not None:
            self._inflight.close()
        self._inflight = mapped
