"""Frames of VPNKit's multiplexer, its handshake, and the destination all generations share (spec vpnkit 7.3.1-7.3.3).

HOT PATH: `Decoder.feed` once per read of the transport, `data_header` once per chunk. All integers are little-endian.

    header length u16 (all but the payload of Data) | command u8 | channel id u32 | body
        1 Open      connection u8 (2: multiplexed), destination
        2 Close     -
        3 Shutdown  -
        4 Data      payload length u32; the payload follows the header
        5 Window    u64: octets the receiver of this frame may have sent since the channel was opened
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from netstack.errors import GuestError, Malformed
from portfwd.carriers import Destination

MAGIC: Final = b"https://github.com/moby/vpnkit multiplexer protocol\n"
HANDSHAKE: Final = MAGIC + b"\0\0"
"""What either side of generation 3 says first: the magic, and the length of a payload that nobody uses yet."""

OPEN: Final = 1
CLOSE: Final = 2
SHUTDOWN: Final = 3
DATA: Final = 4
WINDOW: Final = 5
NAMES: Final = {OPEN: "Open", CLOSE: "Close", SHUTDOWN: "Shutdown", DATA: "Data", WINDOW: "Window"}

DEDICATED: Final = 1
"""An Open that wants the whole connection for one channel; nobody implements it."""
MULTIPLEXED: Final = 2

MAX_PATH: Final = 4096
"""Octets of a unix path in an Open: PATH_MAX of Linux."""
MAX_OPEN: Final = 11 + MAX_PATH
"""The longest header we believe."""

_HEAD: Final = struct.Struct("<HBI")
_DATA: Final = struct.Struct("<HBII")
_WINDOW: Final = struct.Struct("<HBIQ")
_U16: Final = struct.Struct("<H")
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")

data_header: Final = _DATA.pack
"""`data_header(11, DATA, id, length)`: as `emit`, without the object."""

_PROTOCOLS: Final = {1: "tcp", 2: "udp", 3: "unix"}
_NUMBERS: Final = {name: number for number, name in _PROTOCOLS.items()}
_MAPPED: Final = b"\0" * 10 + b"\xff\xff"
"""What Go puts before the 4 octets of an IPv4 address."""


class MuxError(GuestError):
    """The peer broke the protocol: its connection ends, and every channel in it."""


def plain_address(address: bytes) -> bytes:
    """4 octets for `::ffff:a.b.c.d`, which Go peers write; others as they are."""
    return address[12:] if len(address) == 16 and address.startswith(_MAPPED) else address


def emit_destination(target: Destination) -> bytes:
    """As it stands in an Open, and before the octets of a connection of generation 1; `Malformed` where it cannot be said."""
    if target.protocol == "unix":
        path = os.fsencode(target.path)
        if not 1 <= len(path) <= MAX_PATH or b"\0" in path:
            raise Malformed(f"mux: a unix path has 1 to {MAX_PATH} octets, none of them NUL")
        return b"\3" + _U16.pack(len(path)) + path
    if len(target.address) not in (4, 16) or not 0 <= target.port <= 65535 or target.protocol not in _NUMBERS:
        raise Malformed(f"mux: {target!r} has no address to go to")
    return struct.pack("<BH", _NUMBERS[target.protocol], len(target.address)) + target.address + _U16.pack(target.port)


def destination_size(octets: bytes | bytearray | memoryview) -> int | None:
    """How long the destination is that begins with `octets`; `None` while they are too few to tell.

    Raises `Malformed` for one that can never be right.
    """
    if not octets:
        return None
    if octets[0] not in _PROTOCOLS:
        raise Malformed(f"mux: destination of unknown protocol {octets[0]}")
    if len(octets) < 3:
        return None
    length = octets[1] | octets[2] << 8
    if octets[0] == 3:
        if not 1 <= length <= MAX_PATH:
            raise Malformed(f"mux: destination with a path of {length} octets")
        return 3 + length
    if length not in (4, 16):
        raise Malformed(f"mux: destination with an address of {length} octets")
    return 5 + length


def parse_destination(octets: bytes | memoryview) -> Destination:
    """A complete destination and nothing else; an IPv4 address written in 16 octets becomes one of 4. Raises `Malformed`."""
    size = destination_size(octets)
    if size is None or size != len(octets):
        raise Malformed("mux: a destination cut short or too long")
    protocol = _PROTOCOLS[octets[0]]
    if protocol == "unix":
        path = bytes(octets[3:])
        if b"\0" in path:
            raise Malformed("mux: destination with a NUL in its path")
        return Destination("unix", path=os.fsdecode(path))
    return Destination(protocol, plain_address(bytes(octets[3:-2])), octets[-2] | octets[-1] << 8)


def detect(first: bytes) -> int | None:
    """The generation (1, 2 or 3) of a peer by the first octets it sends (spec vpnkit 0.1); `None`: three are needed.

    Raises `MuxError` for what is none of them. Generation 3 begins with `https`, 2 with the length and the command of a
    frame, 1 with a destination, whose third octet (the high one of its length) is no command. Paths of 256 octets and more
    in generation 1 would look like 2; they fit no socket address.
    """
    if len(first) < 3:
        return None
    if first[:3] == MAGIC[:3]:
        return 3
    length, command = first[0] | first[1] << 8, first[2]
    if command == 0 and ((first[0] in (1, 2) and first[1] in (4, 16)) or (first[0] == 3 and first[1])):
        return 1
    if command in NAMES and 7 <= length <= MAX_OPEN:
        return 2
    raise MuxError(f"mux: a peer that begins with {bytes(first[:3]).hex(' ')} speaks no generation of the protocol")


@dataclass(frozen=True, slots=True)
class Open:
    id: int
    destination: Destination
    connection: int = MULTIPLEXED


@dataclass(frozen=True, slots=True)
class Close:
    id: int


@dataclass(frozen=True, slots=True)
class Shutdown:
    id: int


@dataclass(frozen=True, slots=True)
class Data:
    """The header; its `length` octets of payload follow it."""

    id: int
    length: int


@dataclass(frozen=True, slots=True)
class Window:
    id: int
    seq: int


Frame: TypeAlias = Open | Close | Shutdown | Data | Window


def emit(frame: Frame) -> bytes:
    """The header of `frame`: everything but the payload of Data."""
    match frame:
        case Open(id, destination, connection):
            body = bytes((connection,)) + emit_destination(destination)
            return _HEAD.pack(_HEAD.size + len(body), OPEN, id) + body
        case Close(id):
            return _HEAD.pack(7, CLOSE, id)
        case Shutdown(id):
            return _HEAD.pack(7, SHUTDOWN, id)
        case Data(id, length):
            return _DATA.pack(11, DATA, id, length)
        case Window(id, seq):
            return _WINDOW.pack(15, WINDOW, id, seq)


_SIZES: Final = {CLOSE: 7, SHUTDOWN: 7, DATA: 11, WINDOW: 15}


def check_head(length: int, command: int) -> None:
    """Raises `MuxError` for a header length that the command cannot have, and for an unknown command."""
    if command == OPEN:
        if not 7 + 1 + 4 <= length <= MAX_OPEN:
            raise MuxError(f"mux: an Open of {length} octets")
    elif command not in _SIZES:
        raise MuxError(f"mux: unknown command {command}")
    elif length != _SIZES[command]:
        raise MuxError(f"mux: {NAMES[command]} with a header of {length} octets")


def parse(header: bytes | memoryview) -> Frame:
    """A complete header. Raises `MuxError`."""
    if len(header) < _HEAD.size:
        raise MuxError("mux: a header cut short")
    length, command, id = _HEAD.unpack_from(header)
    check_head(length, command)
    if length != len(header):
        raise MuxError("mux: a header cut short or too long")
    if command == OPEN:
        try:
            return Open(id, parse_destination(header[8:]), header[7])
        except Malformed as error:
            raise MuxError(str(error)) from None
    if command == DATA:
        return Data(id, _U32.unpack_from(header, 7)[0])
    if command == WINDOW:
        return Window(id, _U64.unpack_from(header, 7)[0])
    return Close(id) if command == CLOSE else Shutdown(id)


Piece: TypeAlias = tuple[int, int, int, Open | memoryview | None]
"""`(command, channel id, number, more)`: for DATA, `more` is the next octets of a payload (`number` 0) or, before them, `None`
and `number` the payload's length; for WINDOW, `number` is the sequence; for OPEN, `more` is the frame."""


class Decoder:
    """Fed octets in any pieces, returns frames; payload is passed on as it comes and never kept.

    What is kept is less than one header, `MAX_OPEN` octets. After `MuxError` the stream cannot be read further.
    """

    def __init__(self) -> None:
        self._kept = bytearray()
        self._left = 0
        """Octets of the current payload that are still to come ..."""
        self._id = 0
        """... and whose they are."""

    @property
    def idle(self) -> bool:
        """Neither a header nor a payload was begun."""
        return not self._kept and not self._left

    def feed(self, octets: memoryview) -> Iterator[Piece]:
        """Frames and parts of payloads, in order. The views are parts of `octets`. Raises `MuxError`.

        Run it to its end before the next call.
        """
        at, end = 0, len(octets)
        while at < end:
            if self._left:
                take = min(self._left, end - at)
                self._left -= take
                yield DATA, self._id, 0, octets[at : at + take]
                at += take
                continue
            kept = self._kept
            if kept or end - at < _HEAD.size:
                at = self._gather(octets, at)
                if len(kept) < _HEAD.size or len(kept) < (kept[0] | kept[1] << 8):
                    return
                header, begin = memoryview(bytes(kept)), 0
                kept.clear()
                length, command, id = _HEAD.unpack_from(header)
            else:
                length, command, id = _HEAD.unpack_from(octets, at)
                check_head(length, command)
                if end - at < length:
                    kept += octets[at:]
                    return
                header, begin = octets, at
                at += length
            if command == DATA:
                self._id, self._left = id, _U32.unpack_from(header, begin + 7)[0]
                yield DATA, id, self._left, None
            elif command == WINDOW:
                yield WINDOW, id, _U64.unpack_from(header, begin + 7)[0], None
            elif command == OPEN:
                frame = parse(header[begin : begin + length])
                assert isinstance(frame, Open)
                yield OPEN, id, 0, frame
            else:
                yield command, id, 0, None

    def _gather(self, octets: memoryview, at: int) -> int:
        """Complete the header that was begun; returns where the octets behind it begin."""
        kept = self._kept
        if len(kept) < _HEAD.size:
            take = _HEAD.size - len(kept)
            kept += octets[at : at + take]
            at = min(at + take, len(octets))
            if len(kept) < _HEAD.size:
                return at
        length, command, _id = _HEAD.unpack_from(kept)
        check_head(length, command)
        missing: int = length - len(kept)
        kept += octets[at : at + missing]
        return min(at + missing, len(octets))
