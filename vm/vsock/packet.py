"""The header of a virtio-vsock packet (virtio 1.2, 5.10.6). HOT PATH: once per packet."""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from netstack.errors import Malformed

HEADER: Final = struct.Struct("<QQIIIHHIII")
"""src_cid, dst_cid, src_port, dst_port, len, type, op, flags, buf_alloc, fwd_cnt; little-endian, 44 octets."""
SIZE: Final = HEADER.size
HOST: Final = 2
"""VMADDR_CID_HOST."""
FIRST_GUEST: Final = 3
ANY: Final = 0xFFFFFFFF
"""VMADDR_CID_ANY; also the port that stands for any."""
LARGEST_CID: Final = 0xFFFFFFFE
"""The upper 32 bits of a CID are reserved and zero (5.10.4)."""
LARGEST_PORT: Final = 0xFFFFFFFE

STREAM: Final = 1
SEQPACKET: Final = 2

REQUEST: Final = 1
RESPONSE: Final = 2
RST: Final = 3
SHUTDOWN: Final = 4
RW: Final = 5
CREDIT_UPDATE: Final = 6
CREDIT_REQUEST: Final = 7

NO_MORE_RECEIVE: Final = 1
"""Of SHUTDOWN's flags: the sender of the packet receives nothing any more."""
NO_MORE_SEND: Final = 2
"""The sender of the packet sends nothing any more."""
NO_MORE: Final = NO_MORE_RECEIVE | NO_MORE_SEND

TRANSPORT_RESET: Final = (0).to_bytes(4, "little")
"""VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7): the driver drops its connections and reads its CID again."""

_unpack: Final = HEADER.unpack_from


class Header(NamedTuple):
    """One packet's header, as it came or as it will leave."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int
    """Octets of payload."""
    type: int
    op: int
    flags: int
    buf_alloc: int
    fwd_cnt: int


def parse(octets: bytes | memoryview) -> Header:
    """The header at the beginning of `octets`; what follows is the payload. Raises `Malformed` where it is cut short."""
    if len(octets) < SIZE:
        raise Malformed(f"vsock: a packet of {len(octets)} octets, its header has {SIZE}")
    return Header._make(_unpack(octets))


def emit(header: Header) -> bytes:
    """Its 44 octets. Raises `struct.error` for a field that is out of range: our own bug."""
    return HEADER.pack(*header)
