"""Messages of 9P2000 and 9P2000.u (spec vpnkit, appendix D; intro(5) of Plan 9): octets <-> values.

A message is `size[4] type[1] tag[2] body`, everything little-endian, `size` counting itself. 9P2000.u has the same messages; some
have a field more at their end, which is why `parse` and `emit` are told the dialect (`unix`). A dialect is a table of layouts, out
of which `Codec` is made; that of 9P2000.L is in `vm.filesystems.ninep`.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Final, TypeAlias

from netstack.errors import Malformed
from portfwd.ninep.messages import (
    MAX_WALK,
    Message,
    Rattach,
    Rauth,
    Rclunk,
    Rcreate,
    Rerror,
    Rflush,
    Ropen,
    Rread,
    Rremove,
    Rstat,
    Rversion,
    Rwalk,
    Rwrite,
    Rwstat,
    Stat,
    Tattach,
    Tauth,
    Tclunk,
    Tcreate,
    Tflush,
    Topen,
    Tread,
    Tremove,
    Tstat,
    Tversion,
    Twalk,
    Twrite,
    Twstat,
)
from portfwd.ninep.messages import Qid as Qid  # for other dialects

HEADER: Final = 7
"""Octets of `size type tag`: the shortest message."""
IO_OVERHEAD: Final = 24
"""Octets of a message around the data of a Twrite (its header is 23), as Linux and Plan 9 reckon (IOHDRSZ)."""

_HEAD = struct.Struct("<IBH")
_QID = struct.Struct("<BIQ")
_INTS: Final = {"1": "B", "2": "H", "4": "I", "8": "Q"}
_STAT = struct.Struct("<HHIBIQIIIQ")  # size, type, dev, qid, mode, atime, mtime, length
_IDS = struct.Struct("<III")


Octets: TypeAlias = bytes | memoryview

# The body of each: digits are ints of so many octets, s a string, q a qid, Q qids, N names, d data with their count, S a stat.
# Other dialects have b and B, a string and names that need not be UTF-8, and o, four octets that may be missing at the end.
# The last column is what 9P2000.u has besides.
_LAYOUTS: Final[dict[int, tuple[type[Any], str, str]]] = {
    100: (Tversion, "4s", ""),
    101: (Rversion, "4s", ""),
    102: (Tauth, "4ss", "4"),
    103: (Rauth, "q", ""),
    104: (Tattach, "44ss", "4"),
    105: (Rattach, "q", ""),
    107: (Rerror, "s", "4"),
    108: (Tflush, "2", ""),
    109: (Rflush, "", ""),
    110: (Twalk, "44N", ""),
    111: (Rwalk, "Q", ""),
    112: (Topen, "41", ""),
    113: (Ropen, "q4", ""),
    114: (Tcreate, "4s41", "s"),
    115: (Rcreate, "q4", ""),
    116: (Tread, "484", ""),
    117: (Rread, "d", ""),
    118: (Twrite, "48d", ""),
    119: (Rwrite, "4", ""),
    120: (Tclunk, "4", ""),
    121: (Rclunk, "", ""),
    122: (Tremove, "4", ""),
    123: (Rremove, "", ""),
    124: (Tstat, "4", ""),
    125: (Rstat, "S", ""),
    126: (Twstat, "4S", ""),
    127: (Rwstat, "", ""),
}


class _Reader:
    """Takes fields off the front; raises `Malformed` where there are fewer octets than said."""

    def __init__(self, octets: Octets, unix: bool) -> None:
        self.octets = octets
        self.at = 0
        self.unix = unix

    def take(self, count: int) -> Octets:
        end = self.at + count
        if end > len(self.octets):
            raise Malformed("9p: a field reaches beyond its message")
        self.at, begin = end, self.at
        return self.octets[begin:end]

    def number(self, octets: int) -> int:
        return int.from_bytes(self.take(octets), "little")

    def string(self) -> str:
        try:
            return str(self.take(self.number(2)), "utf-8")
        except UnicodeDecodeError:
            raise Malformed("9p: a string is not UTF-8") from None

    def qid(self) -> Qid:
        return Qid(*_QID.unpack(self.take(_QID.size)))

    def several(self) -> range:
        count = self.number(2)
        if count > MAX_WALK:
            raise Malformed(f"9p: {count} names in one walk; at most {MAX_WALK}")
        return range(count)

    def stat(self) -> Stat:
        size, kind, dev, *qid, mode, atime, mtime, length = _STAT.unpack(self.take(_STAT.size))
        end = self.at - _STAT.size + 2 + size
        names = [self.string() for _ in range(4)]
        more: list[Any] = [self.string(), *_IDS.unpack(self.take(_IDS.size))] if self.unix else []
        if self.at != end:
            raise Malformed("9p: a stat is not as long as it says")
        fields: list[Any] = [kind, dev, Qid(*qid), mode, atime, mtime, length, *names, *more]
        return Stat(*fields)

    def field(self, kind: str) -> Any:
        match kind:
            case "s":
                return self.string()
            case "q":
                return self.qid()
            case "N":
                return tuple(self.string() for _ in self.several())
            case "Q":
                return tuple(self.qid() for _ in self.several())
            case "d":
                return self.take(self.number(4))
            case "b":
                return bytes(self.take(self.number(2)))
            case "B":
                return tuple(bytes(self.take(self.number(2))) for _ in self.several())
            case "o":
                return self.number(4) if self.at < len(self.octets) else 0
            case "S":
                begin = self.at + 2
                end = begin + self.number(2)
                found = self.stat()
                if self.at != end:
                    raise Malformed("9p: a stat is not as long as its message says")
                return found
            case _:
                raise ValueError(f"9p: no field is of kind {kind}")


def tag_of(message: Octets) -> int:
    """The tag of a whole message (at least `HEADER` octets)."""
    return int.from_bytes(message[5:7], "little")


class Codec:
    """The messages of a dialect, octets <-> values.

    `layouts` has, for each type of message, the dataclass of its values (`tag` is the first), and what the others are.
    """

    def __init__(self, layouts: Mapping[int, tuple[type[Any], str]], *, unix: bool = False) -> None:
        self._unix = unix
        self._layouts = {number: (kind, _steps(fields)) for number, (kind, fields) in layouts.items()}
        self._numbers = {
            kind: (number, _steps(fields), attrgetter("tag", *kind.__dataclass_fields__))
            for number, (kind, fields) in layouts.items()
        }

    def parse(self, message: Octets) -> Any:
        """One whole message, its size included; data are a view where `message` is. Raises `Malformed`."""
        if len(message) < HEADER:
            raise Malformed("9p: truncated header")
        size, number, tag = _HEAD.unpack_from(message)
        if size != len(message):
            raise Malformed(f"9p: a message of {len(message)} octets says it has {size}")
        layout = self._layouts.get(number)
        if layout is None:
            raise Malformed(f"9p: there is no message of type {number}")
        kind, steps = layout
        reader = _Reader(message, self._unix)
        reader.at = HEADER
        values: list[Any] = []
        for step in steps:
            if isinstance(step, str):
                values.append(reader.field(step))
            else:
                values += step.unpack(reader.take(step.size))
        if reader.at != len(message):
            raise Malformed(f"9p: {len(message) - reader.at} octets behind a {kind.__name__}")
        return kind(tag, *values)

    def emit(self, message: Any) -> bytes:
        """The inverse of `parse`."""
        number, steps, values_of = self._numbers[type(message)]
        _, tag, *values = values_of(message)  # twice the tag: of one name alone, attrgetter makes no tuple
        left = iter(values)
        body = b"".join(
            _field(step, next(left), self._unix)
            if isinstance(step, str)
            else step.pack(*itertools.islice(left, len(step.format) - 1))
            for step in steps
        )
        return _HEAD.pack(HEADER + len(body), number, tag) + body


def _steps(fields: str) -> tuple[str | struct.Struct, ...]:
    """What is taken off at once: a field, or ints in a row."""
    runs = re.findall(r"\d+|\D", fields)
    return tuple(
        struct.Struct("<" + "".join(_INTS[octets] for octets in run)) if run.isdigit() else run for run in runs
    )


_CODECS: Final = (
    Codec({number: (kind, fields) for number, (kind, fields, _) in _LAYOUTS.items()}),
    Codec({number: (kind, fields + more) for number, (kind, fields, more) in _LAYOUTS.items()}, unix=True),
)


def parse(message: bytes, *, unix: bool = False) -> Message:
    """One whole message, its size included. Raises `Malformed`."""
    made: Message = _CODECS[unix].parse(message)
    return made


def _string(text: str | bytes) -> bytes:
    octets = text if isinstance(text, bytes) else text.encode()
    if len(octets) > 0xFFFF:
        raise ValueError("9p: a string of more than 65535 octets")
    return len(octets).to_bytes(2, "little") + octets


def _qid(qid: Qid) -> bytes:
    return _QID.pack(qid.kind, qid.version, qid.path)


def emit_stat(stat: Stat, *, unix: bool = False) -> bytes:
    """A directory entry as it is read from a directory, its own size in front."""
    names = b"".join(map(_string, (stat.name, stat.uid, stat.gid, stat.muid)))
    if unix:
        names += _string(stat.extension) + _IDS.pack(stat.n_uid, stat.n_gid, stat.n_muid)
    qid = stat.qid
    size = _STAT.size - 2 + len(names)
    head = (size, stat.type, stat.dev, qid.kind, qid.version, qid.path, stat.mode, stat.atime, stat.mtime, stat.length)
    return _STAT.pack(*head) + names


def parse_stats(octets: bytes, *, unix: bool = False) -> list[Stat]:
    """What was read from a directory: whole entries. Raises `Malformed`."""
    reader = _Reader(octets, unix)
    found = []
    while reader.at < len(octets):
        found.append(reader.stat())
    return found


def _field(kind: str, value: Any, unix: bool) -> bytes:
    match kind:
        case "s" | "b":
            return _string(value)
        case "q":
            return _qid(value)
        case "N" | "B":
            return len(value).to_bytes(2, "little") + b"".join(map(_string, value))
        case "Q":
            return len(value).to_bytes(2, "little") + b"".join(map(_qid, value))
        case "d":
            return len(value).to_bytes(4, "little") + bytes(value)
        case "S":
            octets = emit_stat(value, unix=unix)
            return len(octets).to_bytes(2, "little") + octets
        case _:
            return int(value).to_bytes(4, "little")


def emit(message: Message, *, unix: bool = False) -> bytes:
    """The inverse of `parse`."""
    return _CODECS[unix].emit(message)


class Decoder:
    """Whole messages out of a stream: `feed` octets, then call `next` until there is none.

    What waits is at most what was fed and not yet taken, and a part of one message of at most `limit` octets.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        """Octets of the longest message that is believed; may be changed between two messages (msize)."""
        self._waiting = bytearray()

    def __len__(self) -> int:
        """Octets that wait."""
        return len(self._waiting)

    def feed(self, octets: bytes | bytearray | memoryview) -> None:
        self._waiting += octets

    def size(self) -> int:
        """Octets that the message at the front says it has; 0 where that is not known yet."""
        return int.from_bytes(self._waiting[:4], "little") if len(self._waiting) >= 4 else 0

    def take(self) -> bytes:
        """What waits, whole or not: for who receives the rest of a long message elsewhere."""
        waiting = bytes(self._waiting)
        self._waiting.clear()
        return waiting

    def next(self) -> bytes | None:
        """The next whole message. Raises `Malformed`, again and again, when a size cannot be believed: the stream is lost."""
        waiting = self._waiting
        if len(waiting) < 4:
            return None
        size = int.from_bytes(waiting[:4], "little")
        if not HEADER <= size <= self.limit:
            raise Malformed(f"9p: a message of {size} octets; from {HEADER} to {self.limit} are allowed here")
        if len(waiting) < size:
            return None
        with memoryview(waiting) as view:
            message = bytes(view[:size])
        del waiting[:size]
        return message


def names_fit(names: Sequence[str], longest: int) -> bool:
    """Whether each may be the name of a file: no slash, no NUL, at most `longest` octets."""
    return all(name and "/" not in name and "\0" not in name and len(name.encode()) <= longest for name in names)
