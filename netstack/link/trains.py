"""Trains: consecutive full-size TCP segments of one flow in a stream link's buffer, found and verified at once. HOT PATH.

A guest without segmentation offload sends its bulk data as segment after segment. In the buffer of one read they lie side by
side, equal in length and in every header field but a few, with sequence numbers in steps. numpy compares the headers and
sums all checksums of such a run for about 0.2 µs a frame, where unpacking and summing each by itself costs 4 µs; the flow
then takes the run as one segment whose payload is scattered (what a network card's receive offload does in hardware).
Whatever is not exactly so stays single frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

SHORTEST: Final = 600
"""Frames below this many octets are not worth a look."""
FEWEST: Final = 6
_HEADERS: Final = 54
_MAY_DIFFER: Final = frozenset((18, 19, 24, 25, 38, 39, 40, 41, 47, 50, 51))
"""IPv4 identification and checksum, sequence number, flags (PSH, looked at apart), TCP checksum."""
_ETHERTYPE_TO_IHL: Final = b"\x08\x00\x45"
_PSH: Final = 8


@dataclass(frozen=True, slots=True)
class Train:
    """`count` frames of `stride` octets (prefix included) side by side in `view`; all checksums are good."""

    view: memoryview
    stride: int
    count: int


class TrainFinder:
    """Looks for trains behind `headroom` octets of prefix."""

    def __init__(self, headroom: int) -> None:
        import numpy as np  # by need: links with offload never come here

        self._np = np
        self._headroom = headroom
        prefix = list(range(headroom))
        same = [headroom + at for at in range(_HEADERS) if at not in _MAY_DIFFER]
        self._same = self._np.array(prefix + same)

    def find(self, buffer: bytearray, view: memoryview, position: int, end: int, length: int) -> Train | None:
        """A train that begins with the frame of `length` octets at `position`, within `end`; `None` if there is none."""
        headroom = self._headroom
        at = position + headroom
        if (
            buffer[at + 12 : at + 15] != _ETHERTYPE_TO_IHL
            or buffer[at + 23] != 6
            or buffer[at + 46] != 0x50
            or buffer[at + 47] & ~_PSH != 0x10
            or (buffer[at + 20] & 0xBF) | buffer[at + 21]
            or (buffer[at + 16] << 8 | buffer[at + 17]) != length - 14
        ):
            return None
        np = self._np
        stride = headroom + length
        count = (end - position) // stride

        def table(kind: str, offset: int, columns: int, width: int) -> Any:
            return np.ndarray((count, columns), kind, buffer=buffer, offset=position + offset, strides=(stride, width))

        headers = table("u1", 0, headroom + _HEADERS, 1)
        bad = ((headers != headers[0])[:, self._same]).any(axis=1)
        flags = headers[:, headroom + 47]
        bad |= (flags & ~np.uint8(_PSH)) != 0x10
        seqs = np.ndarray((count,), ">u4", buffer=buffer, offset=at + 38, strides=(stride,)).astype(np.uint32)
        payload = length - _HEADERS
        steps = (seqs - seqs[0]) != np.arange(count, dtype=np.uint32) * np.uint32(payload)
        bad |= steps
        first_bad = int(bad.argmax())
        if first_bad:
            count = first_bad
        if count < FEWEST:
            return None
        # TCP with the pseudo-header's addresses in front of it; then the IPv4 header. Byte order does not matter for
        # "is a multiple of 0xFFFF" but for what is added, which is swapped.
        octets = length - 26
        words = table("<u2", headroom + 26, octets >> 1, 2)
        sums = words.sum(axis=1, dtype=np.uint32)
        if octets & 1:
            sums += _last_octets(np, buffer, position + stride - 1, stride, count)
        constant = 6 + length - 34
        sums += (constant & 0xFF) << 8 | constant >> 8
        ip = table("<u2", headroom + 14, 10, 2).sum(axis=1, dtype=np.uint32)
        if (sums % 0xFFFF).any() or (ip % 0xFFFF).any():
            return None
        return Train(view[position : position + stride * count], stride, count)


def _last_octets(np: Any, buffer: bytearray, offset: int, stride: int, count: int) -> Any:
    """The last octet of each row, as the low octet of a little-endian word."""
    return np.ndarray((count,), "u1", buffer=buffer, offset=offset, strides=(stride,)).astype(np.uint32)
