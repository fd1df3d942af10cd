"""9P2000.L: octets <-> the values of `messages`. Framing and kinds of fields are those of `portfwd.ninep.wire`."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, Final

from netstack.errors import Malformed
from portfwd.ninep.wire import HEADER, Codec, Octets, Qid
from vm.filesystems.ninep import messages as m

READ_OVERHEAD: Final = HEADER + 4
"""Octets of an Rread or Rreaddir before its data."""
_ENTRY: Final = struct.Struct("<BIQQBH")  # qid, offset of the next one, type, length of the name
_READ_HEADER: Final = struct.Struct("<IBHI")

# What the digits and letters are is said in portfwd.ninep.wire.
LAYOUTS: Final[dict[int, tuple[type[Any], str]]] = {
    7: (m.Rlerror, "4"),
    8: (m.Tstatfs, "4"),
    9: (m.Rstatfs, "448888884"),
    12: (m.Tlopen, "44"),
    13: (m.Rlopen, "q4"),
    14: (m.Tlcreate, "4b444"),
    15: (m.Rlcreate, "q4"),
    16: (m.Tsymlink, "4bb4"),
    17: (m.Rsymlink, "q"),
    18: (m.Tmknod, "4b4444"),
    19: (m.Rmknod, "q"),
    20: (m.Trename, "44b"),
    21: (m.Rrename, ""),
    22: (m.Treadlink, "4"),
    23: (m.Rreadlink, "b"),
    24: (m.Tgetattr, "48"),
    25: (m.Rgetattr, "8q444" + 15 * "8"),
    26: (m.Tsetattr, "4444488888"),
    27: (m.Rsetattr, ""),
    30: (m.Txattrwalk, "44b"),
    31: (m.Rxattrwalk, "8"),
    32: (m.Txattrcreate, "4b84"),
    33: (m.Rxattrcreate, ""),
    40: (m.Treaddir, "484"),
    41: (m.Rreaddir, "d"),
    50: (m.Tfsync, "4o"),
    51: (m.Rfsync, ""),
    52: (m.Tlock, "414884b"),
    53: (m.Rlock, "1"),
    54: (m.Tgetlock, "41884b"),
    55: (m.Rgetlock, "1884b"),
    70: (m.Tlink, "44b"),
    71: (m.Rlink, ""),
    72: (m.Tmkdir, "4b44"),
    73: (m.Rmkdir, "q"),
    74: (m.Trenameat, "4b4b"),
    75: (m.Rrenameat, ""),
    76: (m.Tunlinkat, "4b4"),
    77: (m.Runlinkat, ""),
    100: (m.Tversion, "4b"),
    101: (m.Rversion, "4b"),
    102: (m.Tauth, "4bb4"),
    104: (m.Tattach, "44bb4"),
    105: (m.Rattach, "q"),
    108: (m.Tflush, "2"),
    109: (m.Rflush, ""),
    110: (m.Twalk, "44B"),
    111: (m.Rwalk, "Q"),
    116: (m.Tread, "484"),
    117: (m.Rread, "d"),
    118: (m.Twrite, "48d"),
    119: (m.Rwrite, "4"),
    120: (m.Tclunk, "4"),
    121: (m.Rclunk, ""),
    122: (m.Tremove, "4"),
    123: (m.Rremove, ""),
}
TVERSION, TFLUSH, _RREAD = 100, 108, 117
_CODEC: Final = Codec(LAYOUTS)


def type_of(message: Octets) -> int:
    """What a whole message is, before it is parsed."""
    return message[4]


def parse(message: Octets) -> m.Message:
    """One whole message; data are a view where `message` is. Raises `Malformed`."""
    made: m.Message = _CODEC.parse(message)
    return made


def emit(message: m.Message) -> bytes:
    """The inverse of `parse`."""
    return _CODEC.emit(message)


def put_read_header(message: bytearray, tag: int, octets: int) -> None:
    """Write what comes before the data of an Rread with so many of them."""
    _READ_HEADER.pack_into(message, 0, READ_OVERHEAD + octets, _RREAD, tag, octets)


def emit_entry(qid: Qid, offset: int, kind: int, name: bytes) -> bytes:
    """An entry in an Rreaddir; `offset` is where the next one is, `kind` a DT_ of readdir(3)."""
    return _ENTRY.pack(qid.kind, qid.version, qid.path, offset, kind, len(name)) + name


def entry_octets(name: bytes) -> int:
    """How long its entry is."""
    return _ENTRY.size + len(name)


def parse_entries(data: Octets) -> Iterator[tuple[Qid, int, int, bytes]]:
    """The inverse, of many. Raises `Malformed`."""
    at = 0
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise Malformed("9p: an entry is cut short")
        kind, version, path, offset, what, length = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if at + length > len(data):
            raise Malformed("9p: an entry is cut short")
        yield Qid(kind, version, path), offset, what, bytes(data[at : at + length])
        at += length
