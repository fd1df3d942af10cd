"""Sequence number arithmetic modulo 2**32 (RFC 9293 3.4): the only place that knows it. HOT PATH."""

from __future__ import annotations

from typing import Final

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000


def add(a: int, octets: int) -> int:
    """`a` moved on by `octets` (which may be negative)."""
    return (a + octets) & MASK


def distance(a: int, b: int) -> int:
    """How far `b` lies beyond `a`, -2**31 .. 2**31-1."""
    return ((b - a + HALF) & MASK) - HALF
