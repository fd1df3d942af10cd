"""What every target shares: right input, bent (noise dies at the first check), and what may come of it: a value, or words."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any


def spoil(rng: random.Random, data: bytes) -> bytes:
    """A few octets changed, cut, repeated or added."""
    octets = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        kind = rng.randrange(6)
        at = rng.randrange(len(octets) + 1)
        if kind == 0 and octets:
            octets[at % len(octets)] ^= 1 << rng.randrange(8)
        elif kind == 1 and octets:
            octets[at % len(octets)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
        elif kind == 2:
            del octets[at:]
        elif kind == 3:
            octets[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            octets += rng.randbytes(rng.randrange(1, 40))
        elif len(octets) >= 2:
            struct.pack_into("!H", octets, at % (len(octets) - 1), rng.choice([0, 1, 0x7FFF, 0x8000, 0xFFFF]))
    return bytes(octets)


def split(rng: random.Random, data: bytes) -> list[bytes]:
    """`data` in pieces as a socket may give it: single octets, a few large ones, or anything between."""
    largest = rng.choice([1, 3, 50, 2000, 1 << 20])
    pieces = []
    at = 0
    while at < len(data):
        octets = rng.randrange(1, largest + 1)
        pieces.append(data[at : at + octets])
        at += octets
    return pieces


def complains(text: object, run: Callable[[], Any], *kinds: type[Exception]) -> Any:
    """What `run` returns, or `None` when it complained in words."""
    try:
        return run()
    except kinds as error:
        assert str(error).strip(), text
        return None
    except Exception as error:
        raise AssertionError(f"{text!r}: {error!r}") from error
