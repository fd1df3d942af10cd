"""The Internet checksum (RFC 1071). HOT PATH: once per packet on links without checksum offload.

2¹⁶ ≡ 1 (mod 0xFFFF), so the ones'-complement sum of 16-bit big-endian words is the whole buffer, read as one big
number, modulo 0xFFFF: two passes in C instead of a loop in Python. The sum has two zeros; only a buffer of zeros sums
to 0, any other multiple of 0xFFFF is 0xFFFF. Sums may be added as plain ints and folded once at the end.

Division takes most of that time, and on a link whose every frame needs a checksum numpy does without: 1,480 octets in 0.9
instead of 2.7 µs, 64 KiB in 5 instead of 200. It is 20 MiB that other links do not need, so it waits for `use_numpy`.
The results are the same; the processor's byte order does not matter to the sum either (RFC 1071 section 2 (B)).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final, TypeAlias

from netstack.errors import Malformed

Buffer: TypeAlias = bytes | bytearray | memoryview

_NUMPY_FROM: Final = 768
"""Octets from which a call of numpy is cheaper than a division."""

_words: Callable[[Buffer], int] | None = None
"""Sum of the 32-bit words, native byte order, of a buffer; what is left behind the last whole one is not in it."""


class BadChecksum(Malformed):
    """The checksum is wrong although the format is right; drops of this kind are counted apart."""


def partial(data: Buffer) -> int:
    """The folded sum of `data`, not inverted, 0..0xFFFF; an odd length counts as padded with one zero octet."""
    size = len(data)
    if size >= _NUMPY_FROM and _words is not None:
        tail = data[size & ~3 :] if size & 3 else b""
        return fold(_big_endian(_words(data)) + partial(tail))
    number = int.from_bytes(data, "big")
    total = number % 0xFFFF
    if size & 1:
        total = (total << 8) % 0xFFFF
    return total or (0xFFFF if number else 0)


def fold(total: int) -> int:
    """Reduce a sum of sums (not negative) to 0..0xFFFF with end-around carry; only 0 becomes 0."""
    return total % 0xFFFF or (0xFFFF if total else 0)


def pseudo(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """Sum of the pseudo-header (RFC 793 3.1, RFC 768, RFC 8200 8.1), not inverted and not folded.

    Addresses of 4 or 16 octets; `length` is the upper-layer length in octets. The two pseudo-headers differ in layout
    only, which a sum does not see.
    """
    return int.from_bytes(source + destination, "big") % 0xFFFF + protocol + length


def internet(data: Buffer, initial: int = 0) -> int:
    """The checksum to store: the inverted sum of `data`, its checksum field zero, and `initial` (as from `pseudo`)."""
    return 0xFFFF ^ fold(partial(data) + initial)


def verify(data: Buffer, initial: int = 0) -> bool:
    """Whether `data`, its checksum field included, and `initial` sum to 0xFFFF (RFC 1071 section 1, step 3)."""
    return fold(partial(data) + initial) == 0xFFFF


def adjust(checksum: int, old: Buffer, new: Buffer) -> int:
    """The stored `checksum` after `old` was replaced by `new` (RFC 1624 [Eqn. 3]); both start at an even offset."""
    return 0xFFFF ^ fold((0xFFFF ^ checksum) + (0xFFFF ^ partial(old)) + partial(new))


def use_numpy() -> bool:
    """Sum long buffers with numpy from now on; `False` where it is not installed. For links without offload."""
    global _words
    if _words is not None:
        return True
    try:
        import numpy as np
    except ImportError:
        return False
    words, wide, add, view = np.dtype(np.uint32), np.dtype(np.uint64), np.add.reduce, np.frombuffer

    def sum_words(data: Buffer) -> int:
        return int(add(view(data, words, len(data) >> 2), dtype=wide))

    _words = sum_words
    return True


def _big_endian(total: int) -> int:
    """The folded sum of a sum of native words."""
    folded = fold(total)
    return folded if sys.byteorder == "big" else (folded & 0xFF) << 8 | folded >> 8
