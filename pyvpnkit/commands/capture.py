"""`pyvpnkit capture`: the live capture into a file or a pipe.

Only whole pcapng blocks are written, so that what there is can be read whenever it ends. The number of packets that were lost is in
the stream (in a block before which packets were lost, and in statistics blocks) and is told at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import struct
import sys
from collections.abc import Iterator
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from pyvpnkit.commands.client import Client, Stream, control_path

_STATISTICS: Final = 5
_PACKET: Final = 6
_IFDROP: Final = 5
_DROPCOUNT: Final = 4
_MAX_BLOCK: Final = 16 << 20


class Blocks:
    """Cuts a pcapng stream into blocks, and counts what they say. Raises `HostError` for what is no pcapng."""

    def __init__(self) -> None:
        self.packets = 0
        self._waiting = b""
        self._lost_before = 0
        self._lost_in_all: dict[int, int] = {}

    @property
    def lost(self) -> int:
        """Packets that did not come through, as far as the stream has told."""
        return max(self._lost_before, sum(self._lost_in_all.values()))

    def feed(self, octets: bytes) -> Iterator[bytes]:
        """The blocks that are whole now."""
        self._waiting += octets
        at, waiting = 0, self._waiting
        try:
            while len(waiting) - at >= 12:
                kind, length = struct.unpack_from("<II", waiting, at)
                if length % 4 or not 12 <= length <= _MAX_BLOCK:
                    raise HostError("the daemon's capture is not pcapng; is it of another version?")
                if len(waiting) - at < length:
                    break
                block = waiting[at : at + length]
                at += length
                self._count(kind, block)
                yield block
        finally:
            self._waiting = waiting[at:]

    def _count(self, kind: int, block: bytes) -> None:
        if kind == _PACKET and len(block) >= 32:
            self.packets += 1
            (captured,) = struct.unpack_from("<I", block, 20)
            self._lost_before += _option(block, 28 + (captured + 3 & ~3), _DROPCOUNT) or 0
        elif kind == _STATISTICS and len(block) >= 24:
            (interface,) = struct.unpack_from("<I", block, 8)
            self._lost_in_all[interface] = _option(block, 20, _IFDROP) or 0


def _option(block: bytes, at: int, wanted: int) -> int | None:
    end = len(block) - 4
    while at + 4 <= end:
        code, length = struct.unpack_from("<HH", block, at)
        if code == 0:
            break
        if code == wanted:
            return int.from_bytes(block[at + 4 : at + 4 + length], "little")
        at += 4 + (length + 3 & ~3)
    return None


def capture(parsed: argparse.Namespace) -> int:
    """Write until Ctrl-C, `--count` frames, or the end of the daemon or of who reads."""
    if parsed.count is not None and parsed.count < 1:
        raise ConfigError(f"--count {parsed.count}: at least 1")
    target = parsed.write or "-"
    if target == "-" and sys.stdout.isatty():
        raise ConfigError("capture: would write octets to a terminal; give -w FILE, or pipe it: | wireshark -k -i -")
    words = " ".join(parsed.filter) or None
    with (
        Client(control_path(parsed.control)).stream("/v1/capture", filter=words, snaplen=parsed.snaplen) as stream,
        _Output(target) as output,
    ):
        blocks = Blocks()
        try:
            _copy(stream, blocks, output, parsed.count)
        finally:
            print(f"{blocks.packets} packets captured, {blocks.lost} lost", file=sys.stderr)
    return 0


def _copy(stream: Stream, blocks: Blocks, output: _Output, limit: int | None) -> None:
    try:
        while not output.over and (octets := stream.read()):
            for block in blocks.feed(octets):
                output.write(block)
                if output.over or blocks.packets == limit:
                    return
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        pass  # who read it has seen enough
    except OSError as error:
        raise HostError(f"{output.name}: {error.strerror}; what was written before can be read") from None


class _Output:
    """Where blocks go. SIGINT and SIGTERM end the capture between two blocks, or at once when they come a second time."""

    def __init__(self, target: str) -> None:
        self.over = False
        self.name = target
        self._fd = 1 if target == "-" else _open(target)
        self._writing = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Output:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._signal)
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._fd != 1:
            os.close(self._fd)

    def _signal(self, _number: int, _frame: object) -> None:
        again, self.over = self.over, True
        if again or not self._writing:
            raise KeyboardInterrupt

    def write(self, octets: bytes) -> None:
        self._writing = True
        left = memoryview(octets)
        while left:
            left = left[os.write(self._fd, left) :]
        self._writing = False


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"--write {path}: {error.strerror}; choose another file") from None
