"""A capture file in pcapng (IETF draft-ietf-opsawg-pcapng), as Wireshark and tcpdump open it.

One interface block per link, timestamps in nanoseconds, the direction of each frame in `epb_flags`: *inbound* is what a
link received from its guest, as on any interface one captures at. The file is bounded: at `limit` octets it becomes
`FILE.1`, `FILE.1` becomes `FILE.2` and so on, and `files` of them are kept, each complete in itself (threats G30).

A capture never harms the network: when the disk is full it stops, says so once as `CaptureStopped`, and what it would have
written is not (F17). Octets wait in a buffer of at most 64 KiB or one second of traffic; `flush` writes them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import time
from collections.abc import Callable
from typing import Final

from netstack.errors import ConfigError
from netstack.observe.events import CaptureStopped, EventBus

INBOUND: Final = 1
OUTBOUND: Final = 2
DEFAULT_SNAPLEN: Final = 65535
DEFAULT_LIMIT: Final = 256 << 20
DEFAULT_FILES: Final = 2

_BUFFER: Final = 64 << 10
_LINGER_NS: Final = 1_000_000_000
_LINKTYPE_ETHERNET: Final = 1
_SECTION_HEADER: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_STATISTICS: Final = 5
_ENHANCED_PACKET: Final = 6
_IF_NAME: Final = 2
_IF_TSRESOL: Final = 9
_EPB_FLAGS: Final = 2
_EPB_DROPCOUNT: Final = 4
_ISB_IFRECV: Final = 4
_ISB_IFDROP: Final = 5
_ISB_FILTERACCEPT: Final = 6
_USER_APPLICATION: Final = 4

_EPB_HEAD = struct.Struct("<IIIIIII")  # type, length, interface, timestamp high, low, captured, original
_EPB_TAIL = struct.Struct("<HHIII")  # epb_flags, 4, direction, end of options, length
_EPB_LOST = struct.Struct("<HHIHHQII")  # the same with epb_dropcount, 8, packets before `end of options`
_EPB_FIXED: Final = _EPB_HEAD.size + _EPB_TAIL.size
_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + _PADDING[len(value) & 3]


def _block(kind: int, body: bytes) -> bytes:
    length = len(body) + 12
    return struct.pack("<II", kind, length) + body + struct.pack("<I", length)


def section_header() -> bytes:
    """The block a file begins with; little-endian, length of the section unknown."""
    return _block(
        _SECTION_HEADER, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1) + _option(_USER_APPLICATION, b"pyvpnkit") + bytes(4)
    )


def interface(name: str, snaplen: int) -> bytes:
    """An interface description: Ethernet, nanoseconds. Control characters in `name` are written as escapes."""
    shown = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in name).encode(errors="replace")[
        :255
    ]
    options = _option(_IF_NAME, shown) + _option(_IF_TSRESOL, b"\x09") + bytes(4)
    return _block(_INTERFACE, struct.pack("<HHI", _LINKTYPE_ETHERNET, 0, snaplen) + options)


def packet_octets(captured: int, lost: int = 0) -> int:
    """How long `put_packet` makes the block of a frame of which `captured` octets are kept."""
    return _EPB_FIXED + captured + len(_PADDING[captured & 3]) + (_EPB_LOST.size - _EPB_TAIL.size if lost else 0)


def put_packet(
    buffer: bytearray,
    number: int,
    direction: int,
    time_ns: int,
    frame: bytes | bytearray | memoryview,
    captured: int,
    lost: int = 0,
) -> None:
    """Append a frame of interface `number`, its first `captured` octets; `lost` frames before it could not be kept."""
    length = packet_octets(captured, lost)
    original = len(frame)
    buffer += _EPB_HEAD.pack(
        _ENHANCED_PACKET, length, number, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF, captured, original
    )
    buffer += frame if captured == original else frame[:captured]
    buffer += _PADDING[captured & 3]
    if lost:
        buffer += _EPB_LOST.pack(_EPB_FLAGS, 4, direction, _EPB_DROPCOUNT, 8, lost, 0, length)
    else:
        buffer += _EPB_TAIL.pack(_EPB_FLAGS, 4, direction, 0, length)


def statistics(number: int, time_ns: int, *, received: int, accepted: int, lost: int) -> bytes:
    """The counts of interface `number` up to `time_ns`: frames seen, let through by the filter, lost for want of room."""
    counts = ((_ISB_IFRECV, received), (_ISB_IFDROP, lost), (_ISB_FILTERACCEPT, accepted))
    options = b"".join(_option(code, count.to_bytes(8, "little")) for code, count in counts)
    body = struct.pack("<III", number, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF) + options + bytes(4)
    return _block(_STATISTICS, body)


class PcapWriter:
    """An open capture file. Raises `ConfigError` when `path` cannot be opened; nothing else raises."""

    def __init__(
        self,
        path: str,
        *,
        limit: int = DEFAULT_LIMIT,
        files: int = DEFAULT_FILES,
        snaplen: int = DEFAULT_SNAPLEN,
        events: EventBus | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if limit < 64 << 10 or files < 1 or not 64 <= snaplen <= 262144:
            raise ConfigError(
                f"capture {path}: limit={limit}, files={files}, snaplen={snaplen}; "
                "at least 65536 octets, one file, and 64 to 262144 octets of each frame"
            )
        self.path = path
        self.stopped: str | None = None
        """Why nothing is written any more."""
        self.frames = 0
        self._limit = limit
        self._files = files
        self._snaplen = snaplen
        self._events = events
        self._clock = clock
        self._interfaces: list[str] = []
        self._buffer = bytearray()
        self._written_ns = 0
        self._size = 0
        try:
            self._fd = _open(path)
        except OSError as error:
            advice = (
                ""
                if error.errno == errno.ELOOP
                else "; name a file that this user may write, in a directory that exists"
            )
            raise ConfigError(f"capture {path}: {_why(error)}{advice}") from None
        self._begin()

    def add_interface(self, name: str) -> int:
        """The number under which frames of the link `name` are written; the same again for the same name."""
        if name in self._interfaces:
            return self._interfaces.index(name)
        self._interfaces.append(name)
        if self.stopped is None:
            self._buffer += interface(name, self._snaplen)
        return len(self._interfaces) - 1

    def write(self, number: int, direction: int, time_ns: int, frame: bytes | bytearray | memoryview) -> None:
        """One Ethernet frame on interface `number` at `time_ns` (since 1970); `direction` is `INBOUND` or `OUTBOUND`."""
        if self.stopped is not None:
            return
        captured = min(len(frame), self._snaplen)
        if self._size + len(self._buffer) + packet_octets(captured) > self._limit:
            self._rotate()
        buffer = self._buffer
        put_packet(buffer, number, direction, time_ns, frame, captured)
        self.frames += 1
        if len(buffer) >= _BUFFER or not 0 <= time_ns - self._written_ns < _LINGER_NS:
            self._written_ns = time_ns
            self.flush()

    def flush(self) -> None:
        """Write what waits; call it now and then, so that a quiet network's frames are seen too."""
        if self.stopped is not None or not self._buffer:
            return
        pending = memoryview(self._buffer)
        whole = self._size
        try:
            while pending:
                written = os.write(self._fd, pending)
                self._size += written
                pending = pending[written:]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, whole)  # half a block at the end would be an error to every reader
            self._stop(_why(error))
        finally:
            pending.release()
            self._buffer = bytearray()

    def close(self) -> None:
        """Write the rest and end; harmless when repeated."""
        self.flush()
        if self.stopped is None:
            self.stopped = "closed"
            os.close(self._fd)

    def _begin(self) -> None:
        self._size = 0
        self._buffer += section_header()
        for name in self._interfaces:
            self._buffer += interface(name, self._snaplen)

    def _rotate(self) -> None:
        self.flush()
        if self.stopped is not None:
            return
        try:
            if self._files == 1:
                os.ftruncate(self._fd, 0)
                os.lseek(self._fd, 0, os.SEEK_SET)
            else:
                for number in range(self._files - 1, 0, -1):
                    older = self.path if number == 1 else f"{self.path}.{number - 1}"
                    if os.path.lexists(older):
                        os.replace(older, f"{self.path}.{number}")
                fresh = _open(self.path)
                os.close(self._fd)
                self._fd = fresh
        except OSError as error:
            self._stop(_why(error))
            return
        self._begin()

    def _stop(self, reason: str) -> None:
        self.stopped = reason
        self._buffer = bytearray()
        with contextlib.suppress(OSError):  # an error that was late to come, about what is given up anyway
            os.close(self._fd)
        if self._events is not None:
            self._events.emit(CaptureStopped(time=self._clock(), path=self.path, reason=reason))


def _open(path: str) -> int:
    """A new file of mode 0600, or our own ordinary one emptied; never through a symbolic link (threats L2)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags | os.O_EXCL, 0o600)
    except FileExistsError:
        pass
    fd = os.open(path, flags, 0o600)
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink != 1:
            raise OSError(errno.EEXIST, "exists and is not an ordinary file of ours; choose another path")
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _why(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a symbolic link; choose another path"
    return error.strerror or str(error)
