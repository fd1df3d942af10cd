"""RCV.*: what has arrived from the guest, what may still come, and the ranges beyond a hole. HOT PATH.

Numbers only: the flow keeps the octets. In-order octets that the host socket did not take yet are counted in `held` and
narrow the window; the right edge once told never moves back (RFC 9293 3.8.6). Ranges beyond a hole are bounded in number
(`MAX_RANGES`) and, by the window, in octets; a segment that would need one more is not kept and the guest sends it again.
"""

from __future__ import annotations

from typing import Final

from netstack.tcp.seq import HALF, MASK, distance

MAX_RANGES: Final = 32
"""Separate ranges beyond a hole (threats G20)."""
MAX_PIECES: Final = 1024
"""Stored segments that make up those ranges."""


class Receiver:
    """RCV.NXT, the window, and what lies beyond a hole. `capacity` is the largest window in octets."""

    __slots__ = ("capacity", "held", "last_piece", "nxt", "pieces", "right", "shift")

    def __init__(self, irs: int, capacity: int, shift: int) -> None:
        self.nxt = (irs + 1) & MASK
        self.shift = shift
        self.capacity = min(capacity, 0xFFFF << shift)
        self.held = 0
        self.right = self.nxt
        self.pieces: list[tuple[int, int]] = []
        """`(seq, end)` of stored segments in order, without overlap."""
        self.last_piece = 0

    def window(self, ceiling: int = 1 << 30) -> int:
        """The window field to send now; moves the right edge on, to `ceiling` octets from RCV.NXT at the most.

        The edge moves on only when it gains a segment or half the buffer (silly window avoidance, RFC 9293 3.8.6.2.2), and
        rounding by the scale is upwards so that it never moves back.
        """
        told = (self.right - self.nxt) & MASK
        if told >= HALF:
            told = 0
        room = max(min(self.capacity, ceiling) - self.held, 0)
        if room - told >= min(1460, self.capacity >> 1):
            told = room
        scaled = min((told + (1 << self.shift) - 1) >> self.shift, 0xFFFF)
        self.right = (self.nxt + (scaled << self.shift)) & MASK
        return scaled

    def told(self) -> int:
        """Octets the peer may still send by what it was last told."""
        told = (self.right - self.nxt) & MASK
        return told if told < HALF else 0

    def acceptable(self, seg_seq: int, seg_len: int) -> bool:
        """RFC 9293 3.10.7.4, first test; `seg_len` counts SYN and FIN."""
        window = self.told()
        start = distance(self.nxt, seg_seq)
        if seg_len == 0:
            return start == 0 if window == 0 else 0 <= start < window
        if window == 0:
            return False
        return 0 <= start < window or 0 <= start + seg_len - 1 < window

    def store(self, seq: int, end: int) -> tuple[int, int] | None:
        """Keep `[seq, end)` beyond a hole; returns the part that is new and to be stored, or `None`.

        A part covered by stored pieces is cut off; of a segment that straddles several only the first gap is kept.
        """
        nxt = self.nxt
        begin, stop = distance(nxt, seq), distance(nxt, end)
        at = 0
        for at, (piece_seq, piece_end) in enumerate(self.pieces):  # noqa: B007  # `at` is used after the loop
            piece_begin, piece_stop = distance(nxt, piece_seq), distance(nxt, piece_end)
            if stop <= piece_begin:
                break
            if begin < piece_begin:
                stop = piece_begin
                break
            if begin < piece_stop:
                begin = piece_stop
        else:
            at = len(self.pieces)
        if begin >= stop or len(self.pieces) >= MAX_PIECES:
            return None
        piece = ((nxt + begin) & MASK, (nxt + stop) & MASK)
        touches = (at > 0 and self.pieces[at - 1][1] == piece[0]) or (
            at < len(self.pieces) and self.pieces[at][0] == piece[1]
        )
        if not touches and len(self.ranges()) >= MAX_RANGES:
            return None
        self.pieces.insert(at, piece)
        self.last_piece = piece[0]
        return piece

    def ranges(self) -> list[tuple[int, int]]:
        """The pieces merged into ranges, in order."""
        merged: list[tuple[int, int]] = []
        for seq, end in self.pieces:
            if merged and merged[-1][1] == seq:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((seq, end))
        return merged

    def sack_blocks(self) -> list[tuple[int, int]]:
        """Ranges with the most recently changed one first (RFC 2018 section 4)."""
        blocks = self.ranges()
        nxt, last = self.nxt, distance(self.nxt, self.last_piece)
        for index, (seq, end) in enumerate(blocks):
            if distance(nxt, seq) <= last < distance(nxt, end):
                blocks.insert(0, blocks.pop(index))
                break
        return blocks

    def fill(self) -> list[tuple[int, int, int]]:
        """After `nxt` moved on: the pieces that are in order now, as `(seq of the stored piece, octets to skip, length)`.

        `nxt` moves over them; a piece wholly behind `nxt` comes with length 0 so that its octets are let go.
        """
        ready: list[tuple[int, int, int]] = []
        while self.pieces:
            seq, end = self.pieces[0]
            skip = distance(seq, self.nxt)
            if skip < 0:
                break
            self.pieces.pop(0)
            length = max(distance(self.nxt, end), 0)
            ready.append((seq, min(skip, distance(seq, end)), length))
            self.nxt = (self.nxt + length) & MASK
        return ready
