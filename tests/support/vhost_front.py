"""The front-end's side of vhost-user: what a hypervisor says to a network back-end, message by message.

Written from the protocol's description (the vhost-user specification), without the project's code. A message is u32 request,
u32 flags, u32 size and `size` octets of payload, little-endian; descriptors travel with its first octet.

    front = FrontEnd(sock, turn=peer.readable)       # a back-end in this thread: `turn` lets it handle what waits
    offered = front.get_features()
    front.need_reply = True                          # once REPLY_ACK is negotiated: every message is confirmed
    front.set_vring_num(0, 256)                      # raises `Refused` when the back-end says no

Methods say what the protocol says and nothing else: order, repetition and nonsense are up to the caller. `send` writes any
octets at all.
"""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

VERSION: Final = 1
REPLY: Final = 4
NEED_REPLY: Final = 8
HEADER: Final = struct.Struct("<III")
U64: Final = struct.Struct("<Q")
STATE: Final = struct.Struct("<II")  # ring, number
ADDRESSES: Final = struct.Struct("<IIQQQQ")  # ring, flags, descriptor table, used ring, available ring, log
REGION: Final = struct.Struct("<QQQQ")  # guest address, size, user address, offset in the file
INFLIGHT: Final = struct.Struct("<QQHH")  # size, offset, rings, ring size
IOTLB: Final = struct.Struct("<QQQBB6x")  # guest address, size, user address, permission, type
NO_DESCRIPTOR: Final = 0x100
TURNS: Final = 64
"""How often a back-end in this thread is given its turn before its silence counts."""


class Request(IntEnum):
    """Messages of the front-end."""

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
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class ProtocolFeature(IntEnum):
    """Bits of the protocol's own features."""

    MQ = 0
    LOG_SHMFD = 1
    RARP = 2
    REPLY_ACK = 3
    MTU = 4
    BACKEND_REQ = 5
    CROSS_ENDIAN = 6
    PAGEFAULT = 8
    CONFIG = 9
    BACKEND_SEND_FD = 10
    HOST_NOTIFIER = 11
    INFLIGHT_SHMFD = 12
    RESET_DEVICE = 13
    INBAND_NOTIFICATIONS = 14
    CONFIGURE_MEM_SLOTS = 15
    STATUS = 16
    XEN_MMAP = 17
    SHARED_OBJECT = 18
    DEVICE_STATE = 19

    @property
    def mask(self) -> int:
        return 1 << self.value


class Disconnected(Exception):
    """The back-end has hung up."""


class NoReply(Exception):
    """The back-end says nothing although it was asked."""


class Refused(Exception):
    """The back-end confirmed a message with anything but 0."""


class BadReply(AssertionError):
    """What the back-end answered is no answer to what it was asked."""


@dataclass(frozen=True, slots=True)
class Region:
    """One piece of guest memory as the back-end is told of it."""

    guest_address: int
    size: int
    user_address: int
    offset: int
    fd: int

    def pack(self) -> bytes:
        return REGION.pack(self.guest_address, self.size, self.user_address, self.offset)


@dataclass(frozen=True, slots=True)
class Reply:
    request: int
    flags: int
    payload: bytes
    fds: tuple[int, ...]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class FrontEnd:
    """A connection to a back-end. `turn` is called while something is waited for; without it, up to `patience_s` are."""

    def __init__(self, sock: socket.socket, turn: Callable[[], None] | None = None, *, patience_s: float = 2.0) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.turn = turn
        self.need_reply = False
        """Ask for a confirmation of every message that has no reply of its own, and wait for it."""
        self._patience_s = patience_s

    def close(self) -> None:
        self.sock.close()

    # octets

    def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = VERSION,
        size: int | None = None,
    ) -> None:
        """One message as told; `size` replaces the true one. Raises `Disconnected`."""
        self.send_octets(HEADER.pack(request, flags, len(payload) if size is None else size) + payload, fds)

    def send_octets(self, octets: bytes, fds: Sequence[int] = ()) -> None:
        """Any octets, `fds` with the first of them."""
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        turns = 0
        while octets:
            try:
                sent = self.sock.sendmsg([octets], ancillary)
            except BlockingIOError:
                turns = self._wait(turns, write=True)
                continue
            except (BrokenPipeError, ConnectionResetError) as error:
                raise Disconnected(str(error)) from error
            octets, ancillary, turns = octets[sent:], [], 0

    def receive(self) -> Reply:
        """The next message of the back-end. Raises `NoReply`, `Disconnected`."""
        fds: list[int] = []
        try:
            request, flags, size = HEADER.unpack(self._exactly(HEADER.size, fds))
            if size > 1 << 16:
                raise BadReply(f"a reply of {size} octets")
            return Reply(request, flags, self._exactly(size, fds), tuple(fds))
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise

    def _exactly(self, octets: int, fds: list[int]) -> bytes:
        received = b""
        turns = 0
        while len(received) < octets:
            try:
                some, ancillary, _flags, _address = self.sock.recvmsg(octets - len(received), socket.CMSG_SPACE(64 * 4))
            except BlockingIOError:
                turns = self._wait(turns)
                continue
            except ConnectionResetError as error:
                raise Disconnected(str(error)) from error
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds += array.array("i", data[: len(data) & ~3])
            if not some:
                raise Disconnected("end of stream")
            received += some
        return received

    def _wait(self, turns: int, *, write: bool = False) -> int:
        """Let the back-end work; raises `NoReply` when it had its time."""
        if self.turn is not None:
            if turns >= TURNS:
                raise NoReply
            self.turn()
            return turns + 1
        ready = select.select([] if write else [self.sock], [self.sock] if write else [], [], self._patience_s)
        if not any(ready):
            raise NoReply
        return turns

    def settle(self) -> None:
        """Let a back-end in this thread handle everything sent so far."""
        if self.turn is not None:
            for _ in range(4):
                self.turn()

    def hung_up(self) -> bool:
        """Whether the back-end ended the connection, after it has handled everything sent so far."""
        self.settle()
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            return True

    def silent(self) -> bool:
        """Whether nothing of the back-end waits to be read (and it is there)."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        return False

    # questions and orders

    def ask(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), *, flags: int = VERSION) -> Reply:
        """A message that has a reply of its own, and that reply."""
        self.send(request, payload, fds, flags=flags)
        reply = self.receive()
        if reply.request != request or reply.flags & 7 != VERSION | REPLY:
            reply.close()
            raise BadReply(f"{reply} to request {request}")
        return reply

    def order(self, request: int, payload: bytes = b"", fds: Sequence[int] = ()) -> None:
        """A message without a reply of its own; confirmed if `need_reply`. Raises `Refused`."""
        if not self.need_reply:
            self.send(request, payload, fds)
            return
        reply = self.ask(request, payload, fds, flags=VERSION | NEED_REPLY)
        if len(reply.payload) != 8 or reply.fds:
            reply.close()
            raise BadReply(f"{reply} as confirmation")
        if any(reply.payload):
            raise Refused(f"{Request(request).name}: {U64.unpack(reply.payload)[0]}")

    def _number(self, request: int) -> int:
        reply = self.ask(request)
        if len(reply.payload) != 8 or reply.fds:
            reply.close()
            raise BadReply(f"{reply} instead of a number")
        return int(U64.unpack(reply.payload)[0])

    def get_features(self) -> int:
        return self._number(Request.GET_FEATURES)

    def set_features(self, features: int) -> None:
        self.order(Request.SET_FEATURES, U64.pack(features))

    def get_protocol_features(self) -> int:
        return self._number(Request.GET_PROTOCOL_FEATURES)

    def set_protocol_features(self, features: int) -> None:
        self.order(Request.SET_PROTOCOL_FEATURES, U64.pack(features))

    def set_owner(self) -> None:
        self.order(Request.SET_OWNER)

    def reset_owner(self) -> None:
        self.order(Request.RESET_OWNER)

    def get_queue_num(self) -> int:
        return self._number(Request.GET_QUEUE_NUM)

    def set_mem_table(self, regions: Sequence[Region]) -> None:
        payload = STATE.pack(len(regions), 0) + b"".join(region.pack() for region in regions)
        self.order(Request.SET_MEM_TABLE, payload, [region.fd for region in regions])

    def get_max_mem_slots(self) -> int:
        return self._number(Request.GET_MAX_MEM_SLOTS)

    def add_mem_reg(self, region: Region) -> None:
        self.order(Request.ADD_MEM_REG, bytes(8) + region.pack(), [region.fd])

    def rem_mem_reg(self, region: Region, *, with_fd: bool = False) -> None:
        """Some front-ends send the descriptor along, which the back-end closes and ignores."""
        self.order(Request.REM_MEM_REG, bytes(8) + region.pack(), [region.fd] if with_fd else [])

    def set_vring_num(self, ring: int, entries: int) -> None:
        self.order(Request.SET_VRING_NUM, STATE.pack(ring, entries))

    def set_vring_base(self, ring: int, index: int) -> None:
        self.order(Request.SET_VRING_BASE, STATE.pack(ring, index))

    def get_vring_base(self, ring: int) -> int:
        """Stops the ring; returns the next index of the available ring the back-end would take."""
        reply = self.ask(Request.GET_VRING_BASE, STATE.pack(ring, 0))
        if len(reply.payload) != STATE.size or reply.fds:
            reply.close()
            raise BadReply(f"{reply} instead of a ring's state")
        index, base = STATE.unpack(reply.payload)
        if index != ring:
            raise BadReply(f"the state of ring {index} instead of {ring}")
        return int(base)

    def set_vring_addr(self, ring: int, table: int, used: int, available: int, *, flags: int = 0, log: int = 0) -> None:
        """User addresses."""
        self.order(Request.SET_VRING_ADDR, ADDRESSES.pack(ring, flags, table, used, available, log))

    def _ring_fd(self, request: int, ring: int, fd: int | None) -> None:
        self.order(request, U64.pack(ring | (NO_DESCRIPTOR if fd is None else 0)), [] if fd is None else [fd])

    def set_vring_kick(self, ring: int, fd: int | None) -> None:
        self._ring_fd(Request.SET_VRING_KICK, ring, fd)

    def set_vring_call(self, ring: int, fd: int | None) -> None:
        self._ring_fd(Request.SET_VRING_CALL, ring, fd)

    def set_vring_err(self, ring: int, fd: int | None) -> None:
        self._ring_fd(Request.SET_VRING_ERR, ring, fd)

    def set_vring_enable(self, ring: int, enabled: bool) -> None:
        self.order(Request.SET_VRING_ENABLE, STATE.pack(ring, enabled))

    def set_vring_endian(self, ring: int, big: bool) -> None:
        self.order(Request.SET_VRING_ENDIAN, STATE.pack(ring, big))

    def net_set_mtu(self, mtu: int) -> None:
        self.order(Request.NET_SET_MTU, U64.pack(mtu))

    def send_rarp(self, mac: bytes) -> None:
        self.order(Request.SEND_RARP, mac.ljust(8, b"\0"))

    def get_config(self, offset: int, size: int, *, flags: int = 0) -> bytes:
        head = struct.pack("<III", offset, size, flags)
        reply = self.ask(Request.GET_CONFIG, head + bytes(size))
        if reply.fds:
            reply.close()
            raise BadReply("descriptors with a configuration")
        if not reply.payload:
            raise Refused("GET_CONFIG")
        if len(reply.payload) != 12 + size or reply.payload[:8] != head[:8]:
            raise BadReply(f"{reply} to GET_CONFIG")
        return reply.payload[12:]

    def set_config(self, offset: int, data: bytes, *, flags: int = 0) -> None:
        self.order(Request.SET_CONFIG, struct.pack("<III", offset, len(data), flags) + data)

    def get_inflight_fd(self, rings: int, ring_size: int) -> tuple[int, int, int]:
        """`(size, offset, fd)` of the memory where the back-end notes what it is working on; the caller closes `fd`."""
        reply = self.ask(Request.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, rings, ring_size))
        if len(reply.payload) != INFLIGHT.size or len(reply.fds) != 1:
            reply.close()
            raise BadReply(f"{reply} to GET_INFLIGHT_FD")
        size, offset, _rings, _ring_size = INFLIGHT.unpack(reply.payload)
        return int(size), int(offset), reply.fds[0]

    def set_inflight_fd(self, size: int, offset: int, rings: int, ring_size: int, fd: int) -> None:
        self.order(Request.SET_INFLIGHT_FD, INFLIGHT.pack(size, offset, rings, ring_size), [fd])

    def set_log_base(self, size: int, offset: int, fd: int) -> None:
        """Has a reply of its own where LOG_SHMFD is negotiated."""
        self.ask(Request.SET_LOG_BASE, struct.pack("<QQ", size, offset), [fd]).close()

    def set_log_fd(self, fd: int) -> None:
        self.order(Request.SET_LOG_FD, b"", [fd])

    def set_backend_req_fd(self, fd: int) -> None:
        self.order(Request.SET_BACKEND_REQ_FD, b"", [fd])

    def iotlb(self, guest_address: int, size: int, user_address: int, permission: int, kind: int) -> None:
        self.order(Request.IOTLB_MSG, IOTLB.pack(guest_address, size, user_address, permission, kind))

    def reset_device(self) -> None:
        self.order(Request.RESET_DEVICE)

    def set_status(self, status: int) -> None:
        self.order(Request.SET_STATUS, U64.pack(status))

    def get_status(self) -> int:
        return self._number(Request.GET_STATUS)
