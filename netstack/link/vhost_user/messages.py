"""vhost-user messages: what a VMM (the front-end) says over the control socket (vhost-user protocol, "Message specification").

A message is u32 request, u32 flags, u32 payload size and the payload, all in the machine's order, which is little-endian on every
machine that this link runs on; descriptors come along by SCM_RIGHTS. `Assembler` cuts the stream; the functions below take
payloads apart and put them together. Nothing here knows what a message does.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from netstack.errors import Malformed

HEADER: Final = struct.Struct("<III")
VERSION: Final = 1
_VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3
MAX_PAYLOAD: Final = 4096
"""The longest we have a use for is the configuration space, 268 octets."""
MAX_REGIONS: Final = 8
"""Of one SET_MEM_TABLE, by the protocol; also what one message may bring of descriptors."""

U64: Final = struct.Struct("<Q")
STATE: Final = struct.Struct("<II")
_ADDRESSES: Final = struct.Struct("<IIQQQQ")
_REGION: Final = struct.Struct("<QQQQ")
_CONFIG: Final = struct.Struct("<III")
INFLIGHT: Final = struct.Struct("<QQHH")
NO_DESCRIPTOR: Final = 1 << 8
"""In the u64 of SET_VRING_KICK, CALL and ERR: no descriptor comes along."""


class Request(IntEnum):
    """Front-end requests by their numbers."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class ProtocolFeature(IntEnum):
    """Bits of GET_PROTOCOL_FEATURES, those that we know of."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    CONFIG = 9
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16


def name_of(request: int) -> str:
    """For people: the name, or the number of a request that we do not know."""
    try:
        return Request(request).name
    except ValueError:
        return f"request {request}"


@dataclass(frozen=True, slots=True)
class Message:
    """One request as it came; `need_reply` asks for an acknowledgement where there is no answer anyway."""

    request: int
    payload: bytes
    need_reply: bool


class Assembler:
    """Cuts the octets of a control socket into messages. Ask `wanted` and read at most so many octets: then descriptors that
    come with a read belong to the message that is being put together."""

    def __init__(self) -> None:
        self._octets = bytearray()
        self._size = -1

    @property
    def wanted(self) -> int:
        return (HEADER.size if self._size < 0 else HEADER.size + self._size) - len(self._octets)

    @property
    def unfinished(self) -> bool:
        """Whether a message has begun."""
        return bool(self._octets)

    def feed(self, octets: bytes) -> Message | None:
        """At most `wanted` octets; the message that is complete now. Raises `Malformed`, after which there is no going on."""
        self._octets += octets
        if self._size < 0:
            if len(self._octets) < HEADER.size:
                return None
            request, flags, size = HEADER.unpack(self._octets)
            if flags & _VERSION_MASK != VERSION:
                raise Malformed(
                    f"{name_of(request)}: version {flags & _VERSION_MASK} of the protocol; we speak {VERSION}"
                )
            if flags & REPLY:
                raise Malformed(f"{name_of(request)}: a reply to nothing that was asked")
            if size > MAX_PAYLOAD:
                raise Malformed(f"{name_of(request)}: a payload of {size} octets; at most {MAX_PAYLOAD} are believed")
            self._size = size
        if len(self._octets) < HEADER.size + self._size:
            return None
        request, flags, _size = HEADER.unpack_from(self._octets)
        message = Message(request, bytes(self._octets[HEADER.size :]), bool(flags & NEED_REPLY))
        self._octets.clear()
        self._size = -1
        return message


def reply(request: int, payload: bytes) -> bytes:
    """An answer, ready to send."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def _sized(payload: bytes, form: struct.Struct, what: str) -> tuple[int, ...]:
    if len(payload) != form.size:
        raise Malformed(f"{what}: {len(payload)} octets of payload instead of {form.size}")
    return form.unpack(payload)


def u64(payload: bytes) -> int:
    """Raises `Malformed`, as all of these."""
    return _sized(payload, U64, "u64")[0]


def vring_state(payload: bytes) -> tuple[int, int]:
    """(index of the ring, number)."""
    index, number = _sized(payload, STATE, "vring state")
    return index, number


@dataclass(frozen=True, slots=True, kw_only=True)
class RingAddresses:
    """SET_VRING_ADDR: where in the front-end's own address space the three parts of a ring begin."""

    index: int
    descriptors: int
    used: int
    available: int


def ring_addresses(payload: bytes) -> RingAddresses:
    index, _flags, descriptors, used, available, _log = _sized(payload, _ADDRESSES, "vring addresses")
    return RingAddresses(index=index, descriptors=descriptors, used=used, available=available)


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A piece of the guest's memory: where the guest sees it, where the front-end, and where it lies in its file."""

    guest: int
    size: int
    user: int
    offset: int


def memory_table(payload: bytes) -> list[Region]:
    """SET_MEM_TABLE: u32 count, u32 padding, regions."""
    if len(payload) < STATE.size:
        raise Malformed(f"memory table: {len(payload)} octets")
    count, _padding = STATE.unpack_from(payload)
    if not 1 <= count <= MAX_REGIONS or len(payload) != STATE.size + count * _REGION.size:
        raise Malformed(f"memory table: {count} regions in {len(payload)} octets; 1 to {MAX_REGIONS} are possible")
    return [_region(payload, STATE.size + number * _REGION.size) for number in range(count)]


def single_region(payload: bytes) -> Region:
    """ADD_MEM_REG and REM_MEM_REG: u64 padding, one region."""
    if len(payload) != 8 + _REGION.size:
        raise Malformed(f"memory region: {len(payload)} octets")
    return _region(payload, 8)


def _region(payload: bytes, at: int) -> Region:
    guest, size, user, offset = _REGION.unpack_from(payload, at)
    return Region(guest=guest, size=size, user=user, offset=offset)


def config_request(payload: bytes) -> tuple[int, int, bytes]:
    """GET_CONFIG and SET_CONFIG: (offset, size, octets)."""
    if len(payload) < _CONFIG.size:
        raise Malformed(f"config: {len(payload)} octets")
    offset, size, _flags = _CONFIG.unpack_from(payload)
    octets = payload[_CONFIG.size :]
    if size > 256 or len(octets) != size:
        raise Malformed(f"config: {size} octets announced, {len(octets)} there")
    return offset, size, octets


def config_reply(offset: int, octets: bytes) -> bytes:
    """The payload of an answer to GET_CONFIG."""
    return _CONFIG.pack(offset, len(octets), 0) + octets


def inflight(payload: bytes) -> tuple[int, int, int, int]:
    """(mmap size, mmap offset, number of queues, queue size). Some front-ends pad the structure to 24 octets."""
    if len(payload) not in (INFLIGHT.size, 24):
        raise Malformed(f"inflight description: {len(payload)} octets")
    size, offset, queues, queue_size = INFLIGHT.unpack_from(payload)
    return size, offset, queues, queue_size
