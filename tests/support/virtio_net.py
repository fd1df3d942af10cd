"""What a virtio network card and its driver agree on (virtio 1.2, 5.1): feature bits, the header of a frame, what may arrive."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple

from tests.support.virtqueue import DeviceFault


class Feature(IntEnum):
    """Bits of the device's features."""

    CSUM = 0
    GUEST_CSUM = 1
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    GUEST_ANNOUNCE = 21
    MQ = 22
    NOTIFY_ON_EMPTY = 24
    LOG_ALL = 26
    ANY_LAYOUT = 27
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    PROTOCOL_FEATURES = 30
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    RING_RESET = 40
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57

    @property
    def mask(self) -> int:
        return 1 << self.value


def mask(*features: Feature) -> int:
    return sum(feature.mask for feature in features)


PLAIN: Final = mask(Feature.VERSION_1)
"""What a driver of today has without any extra."""
RINGS: Final = mask(Feature.INDIRECT_DESC, Feature.EVENT_IDX)
CHECKSUMS: Final = mask(Feature.CSUM, Feature.GUEST_CSUM)
SUPER_FRAMES: Final = mask(
    Feature.GUEST_TSO4,
    Feature.GUEST_TSO6,
    Feature.GUEST_ECN,
    Feature.HOST_TSO4,
    Feature.HOST_TSO6,
    Feature.HOST_ECN,
    Feature.HOST_USO,
)
FULL: Final = PLAIN | RINGS | CHECKSUMS | SUPER_FRAMES | Feature.MRG_RXBUF.mask

HEADER: Final = struct.Struct("<BBHHHHH")
"""flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers; a legacy driver without MRG_RXBUF has no last one."""
NEEDS_CSUM, DATA_VALID, RSC_INFO = 1, 2, 4
GSO_NONE, GSO_TCPV4, GSO_UDP, GSO_TCPV6, GSO_UDP_L4, GSO_ECN = 0, 1, 3, 4, 5, 0x80
SINGLE: Final = 1526
"""A receive buffer for one ordinary frame with its header."""
BIG: Final = 65562
"""A receive buffer for whatever may come without MRG_RXBUF (5.1.6.3.1)."""


class Header(NamedTuple):
    """`virtio_net_hdr`."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self, size: int = 12) -> bytes:
        return HEADER.pack(*self)[:size]

    @classmethod
    def unpack(cls, octets: bytes) -> Header:
        """10 or 12 octets."""
        return cls._make(HEADER.unpack(octets.ljust(12, b"\0")))


NO_OFFLOAD: Final = Header()


@dataclass(frozen=True, slots=True)
class Received:
    header: Header
    frame: bytes
    buffers: int
    """Receive buffers it came in."""


def check(received: Received, features: int, mtu: int) -> None:
    """What a driver that negotiated `features` may rely on (5.1.6.4.1). Raises `DeviceFault`."""

    def has(feature: Feature) -> bool:
        return bool(features & feature.mask)

    header, octets = received.header, len(received.frame)
    if octets < 14:
        raise DeviceFault(f"a frame of {octets} octets")
    if has(Feature.VERSION_1) and not has(Feature.MRG_RXBUF) and header.num_buffers != 1:
        raise DeviceFault(f"num_buffers is {header.num_buffers} without MRG_RXBUF")
    if header.flags & ~(NEEDS_CSUM | DATA_VALID):
        raise DeviceFault(f"flags {header.flags:#x}")
    if header.flags and not has(Feature.GUEST_CSUM):
        raise DeviceFault("checksum flags without GUEST_CSUM")
    if header.flags & NEEDS_CSUM:
        if not 14 <= header.csum_start <= header.csum_start + header.csum_offset + 2 <= octets:
            raise DeviceFault(f"a checksum outside the frame: {header}")
    elif header.csum_start or header.csum_offset:
        raise DeviceFault(f"a place of a checksum, and none is asked for: {header}")
    kind = header.gso_type & ~GSO_ECN
    if header.gso_type & GSO_ECN and not has(Feature.GUEST_ECN):
        raise DeviceFault("ECN without GUEST_ECN")
    if kind == GSO_NONE:
        if header.gso_type or header.gso_size:
            raise DeviceFault(f"half a super-frame: {header}")
        if octets > mtu + 14:
            raise DeviceFault(f"a frame of {octets} octets, the MTU is {mtu}")
        return
    wanted = {GSO_TCPV4: Feature.GUEST_TSO4, GSO_TCPV6: Feature.GUEST_TSO6}.get(kind)
    if wanted is None or not has(wanted):
        raise DeviceFault(f"a super-frame the driver does not take: {header}")
    if not header.flags & NEEDS_CSUM or not header.gso_size or not 0 < header.hdr_len <= octets:
        raise DeviceFault(f"a super-frame with a bad header: {header}")
    if octets > BIG - 12 or header.hdr_len + header.gso_size > mtu + 14:
        raise DeviceFault(f"a super-frame of {octets} octets, MTU {mtu}: {header}")
