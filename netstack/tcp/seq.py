"""Sequence number arithmetic modulo 2**32 (RFC 9293 3.4). HOT PATH.

Sums and differences are taken in place, `(a + b) & MASK`, where a call would cost more than they do.
"""

from __future__ import annotations

from typing import Final

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000


def distance(a: int, b: int) -> int:
    """How far `b` lies beyond `a`, -2**31 .. 2**31-1."""
    return ((b - a + HALF) & MASK) - HALF
