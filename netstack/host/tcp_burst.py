"""A burst of ordinary TCP segments: read from the host socket into place, headers and checksums by numpy. HOT PATH.

For links without segmentation offload. The block holds whole frames one after another; one `recvmsg_into` scatters the
octets over the payload places, numpy writes all headers (a template, then columns of sequence numbers and checksums), and
the frames leave as views of the block in one `send`. Per 1,448-octet segment that is about 0.3 µs of Python and numpy,
where a header packed and a sum taken by itself cost 3 µs (spec dataplane D).
"""

from __future__ import annotations

from typing import Any, Final

from netstack.host.octets import KeptOctets, PeekedOctets
from netstack.host.tcp_frames import HEADERS, FrameMaker
from netstack.tcp.seq import MASK
from netstack.wire.tcp import ACK, PSH

_BLOCK_OCTETS: Final = 1 << 16
_ROWS: Final = 64
"""A guest that asks for tiny segments gets smaller bursts, since each row costs when the block is made."""
_SEQ_AT: Final = 38
_CHECKSUM_AT: Final = 50


class Burst:
    """One block for segments of `mss` octets behind `headroom`; any flow of that shape uses it in turn."""

    def __init__(self, headroom: int, mss: int) -> None:
        import numpy as np

        self._np = np
        self.count = min(max(_BLOCK_OCTETS // mss, 1), _ROWS)
        stride = headroom + HEADERS + mss
        self._mss = mss
        self._head = headroom + HEADERS
        self._stride = stride
        self._block = bytearray(stride * self.count)
        view = memoryview(self._block)
        rows = range(self.count)
        self._payloads = [view[row * stride + self._head : (row + 1) * stride] for row in rows]
        self._frames = [(view[row * stride : (row + 1) * stride],) for row in rows]

        def column(kind: str, at: int, words: int = 0, width: int = 0) -> Any:
            shape, strides = ((self.count, words), (stride, width)) if words else ((self.count,), (stride,))
            return np.ndarray(shape, kind, buffer=self._block, offset=at, strides=strides)

        self._headers = column("u1", 0, self._head, 1)
        self._seqs = column(">u4", headroom + _SEQ_AT)
        self._checksums = column(">u2", headroom + _CHECKSUM_AT)
        self._words = column("<u2", self._head, mss // 2, 2)
        self._odd = column("u1", stride - 1) if mss & 1 else None
        self._steps = np.arange(self.count, dtype=np.uint64) * mss

    def send(
        self,
        frames: FrameMaker,
        source: PeekedOctets | KeptOctets,
        offset: int,
        limit: int,
        seq: int,
        ack: int,
        window: int,
    ) -> tuple[int, bool] | None:
        """Send up to `limit` octets from `offset` on, numbered from `seq`.

        Returns how many went out and whether the block was filled; `(0, False)` at the end of the stream, `None` when
        nothing waits.
        """
        rows = min(self.count, limit // self._mss)
        payloads = self._payloads if rows == self.count else self._payloads[:rows]
        got = source.read_scattered(offset, payloads)
        if not got:
            return None if got is None else (0, False)
        mss = self._mss
        full, rest = divmod(got, mss)
        if full:
            np = self._np
            template, constant = frames.template(mss, ack, ACK | PSH, window)
            self._headers[:full] = np.frombuffer(template, dtype="u1")
            numbers = (self._steps[:full] + seq) & MASK
            self._seqs[:full] = numbers
            sums = self._words[:full].sum(axis=1, dtype=np.uint32).astype(np.uint64) % 0xFFFF
            sums = ((sums & 0xFF) << 8) + (sums >> 8)
            if self._odd is not None:
                sums += self._odd[:full].astype(np.uint64) << 8
            sums += numbers
            sums += constant
            self._checksums[:full] = 0xFFFF - sums % 0xFFFF
        out = self._frames[:full] if full < self.count else self._frames
        if rest:
            start = full * self._stride
            end = frames.finish(self._block, rest, (seq + full * mss) & MASK, ack, ACK | PSH, window, start)
            row = self._frames[full][0]
            out = [*out, (row[:end],)]
        frames.port.send(out)
        return got, got == rows * mss
