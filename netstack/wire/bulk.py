"""Checksums of much data at once, by numpy: links without offload need them (spec dataplane D, E). HOT PATH.

numpy is imported when the first large buffer comes, so a daemon that has only TAP or shared-ring links never loads it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from netstack.wire.checksum import Buffer, partial

if TYPE_CHECKING:
    import numpy

_WORTHWHILE: Final = 600
"""Octets from which numpy's fixed cost of about 2 µs pays."""

_numpy: Any = None


def load() -> Any:
    """The numpy module."""
    global _numpy
    if _numpy is None:
        import numpy

        _numpy = numpy
    return _numpy


def swap(total: int) -> int:
    """A sum of little-endian words as that of big-endian ones (RFC 1071 section 2 (B): byte order independence)."""
    return (total & 0xFF) << 8 | total >> 8


def bulk_sum(data: Buffer) -> int:
    """As `checksum.partial`: the folded big-endian sum of `data`, not inverted."""
    length = len(data)
    if length < _WORTHWHILE:
        return partial(data)
    np = _numpy or load()
    whole = length & ~7
    words: numpy.ndarray[Any, Any] = np.frombuffer(data, dtype="<u4", count=whole >> 2)
    total = int(words.sum(dtype=np.uint64)) % 0xFFFF
    number = swap(total or 0xFFFF)
    if whole != length:
        number += partial(memoryview(data)[whole:])
    return number % 0xFFFF or 0xFFFF
