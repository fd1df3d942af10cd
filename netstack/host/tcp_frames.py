"""TCP frames to the guest: headers from templates, super-frames where the link takes them, else whole batches. HOT PATH.

A `FrameMaker` belongs to one flow and one version of its neighbour. Everything that does not change is packed once: link
prefix, Ethernet, IPv4 (an atomic datagram, so its identification is 0), ports, and the parts of the sums.

On links that take partial checksums the TCP checksum field holds the folded pseudo-header sum (virtio 1.2, 5.1.6.2) and one
frame carries up to 64 KiB. Elsewhere each segment needs a header and a checksum of its own; numpy computes them for a whole
burst at a time (`Burst`), which costs per 64 KiB what plain Python costs per frame or two.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Final

from netstack.iface.neighbours import Neighbour
from netstack.iface.offload import VNET_HEADER
from netstack.iface.switch import Port
from netstack.wire.checksum import partial as partial_sum
from netstack.wire.checksum import use_numpy
from netstack.wire.ethernet import MIN_FRAME

_IPV4: Final = b"\x08\x00\x45\x00"
_DF_TTL_TCP: Final = bytes((0, 0, 0x40, 0, 64, 6))
"""Identification 0, don't fragment, TTL 64, TCP."""
_IPV4_CONSTANT_SUM: Final = 0x4500 + 0x4000 + 0x4006
HEADERS: Final = 54
"""Ethernet, IPv4 and TCP without options."""
SMALL: Final = 512
"""Octets of an answer that is taken out of the host socket at once; a guest's MSS is hardly ever smaller."""
_NEEDS_CHECKSUM: Final = 1
_GSO_TCPV4: Final = 1
_TCP_AT: Final = 34
_CHECKSUM_AT: Final = 16


_PLAIN_PREFIX: Final = VNET_HEADER.pack(_NEEDS_CHECKSUM, 0, 0, 0, _TCP_AT, _CHECKSUM_AT, 1)


@cache
def _packers(headroom: int, padding: int) -> tuple[Callable[..., None], Callable[..., bytes]]:
    """`pack_into` of all headers, and `pack` of a frame without payload; links have few shapes."""
    every = f"!{headroom}s16sH6sH12sIIHHHH"
    return struct.Struct(every).pack_into, struct.Struct(f"{every}{padding}x").pack


@cache
def _options_packer(headroom: int, octets: int, padding: int) -> Callable[..., bytes]:
    """`pack` of a frame with `octets` of options."""
    return struct.Struct(f"!{headroom}s16sH6sH12sIIHHHH{octets}s{padding}x").pack


@cache
def _scratch(headroom: int) -> tuple[bytearray, memoryview, memoryview, memoryview]:
    buffer = bytearray(headroom + HEADERS + 65536)
    view = memoryview(buffer)
    return buffer, view, view[headroom + HEADERS :], view[headroom + HEADERS : headroom + HEADERS + SMALL]


@lru_cache(maxsize=64)
def _gso_prefix(mss: int) -> bytes:
    return VNET_HEADER.pack(_NEEDS_CHECKSUM, _GSO_TCPV4, HEADERS, mss, _TCP_AT, _CHECKSUM_AT, 1)


class FrameMaker:
    """Headers of one flow. `key` is the guest's (source, destination, ports on the wire): ours is the reverse."""

    __slots__ = (
        "_ack_sum",
        "_addresses",
        "_bare_checksum",
        "_bare_prefix",
        "_ethernet",
        "_ip_sum",
        "_mss",
        "_pack",
        "_pack_into",
        "_prefix_gso",
        "_prefix_plain",
        "_pseudo",
        "_shortest",
        "_small",
        "_small_octets",
        "headroom",
        "partial",
        "port",
        "scratch",
        "version",
    )

    def __init__(self, port: Port, neighbour: Neighbour, gateway_mac: bytes, key: bytes, mss: int) -> None:
        self.port = port
        self.version = neighbour.version
        headroom = self.headroom = port.headroom
        self.scratch = _scratch(headroom)
        """A buffer for one frame, and views: all of it, its payload place, and that of a small payload. Whoever fills it
        sends it at once."""
        self.partial = port.partial
        self._addresses = key[4:8] + key[:4] + key[10:] + key[8:10]
        self._ethernet = neighbour.mac + gateway_mac + _IPV4
        addresses_sum = int.from_bytes(key[:8], "big") % 0xFFFF
        self._ip_sum = _IPV4_CONSTANT_SUM + addresses_sum
        self._pseudo = addresses_sum + 6
        # Without offloads a frame has 60 octets at least (IEEE 802.3); a virtual one need not.
        if self.partial:
            self._prefix_plain = self._bare_prefix = _PLAIN_PREFIX
            self._prefix_gso = _gso_prefix(mss)
            self._shortest = HEADERS
        else:
            self._prefix_plain = self._prefix_gso = b""
            self._bare_prefix = port.link.prefix(MIN_FRAME)
            self._shortest = MIN_FRAME
            use_numpy()
        self._bare_checksum = 0xFFFF ^ ((self._ip_sum + 40) % 0xFFFF or 0xFFFF)
        self._pack_into, self._pack = _packers(headroom, self._shortest - HEADERS)
        self._mss = mss
        self._small_octets = -1
        self._small = (0, 0, 0)
        self._ack_sum = self._pseudo + 20 + int.from_bytes(key[8:], "big")

    def _ip_checksum(self, total: int) -> bytes:
        return (0xFFFF ^ ((self._ip_sum + total) % 0xFFFF or 0xFFFF)).to_bytes(2, "big")

    def bare(self, seq: int, ack: int, flags: int, window: int) -> bytes:
        """A frame without payload or options: ACK, FIN, RST."""
        offset_flags = 0x5000 | flags
        if self.partial:
            checksum = (self._pseudo + 20) % 0xFFFF or 0xFFFF
        else:
            # 2**16 is 1 modulo 0xFFFF, so a 32-bit number counts as the sum of its halves.
            checksum = 0xFFFF ^ ((self._ack_sum + seq + ack + offset_flags + window) % 0xFFFF or 0xFFFF)
        return self._pack(
            self._bare_prefix, self._ethernet, 40, _DF_TTL_TCP, self._bare_checksum, self._addresses,
            seq, ack, offset_flags, window, checksum, 0,
        )  # fmt: skip

    def with_options(self, seq: int, ack: int, flags: int, window: int, options: bytes) -> bytes:
        """A frame without payload but with options (padded to four octets): SYN, SYN-ACK, ACK with SACK blocks."""
        length = 20 + len(options)
        offset_flags = (length // 4) << 12 | flags
        total = 20 + length
        if self.partial:
            prefix = self._prefix_plain
            checksum = (self._pseudo + length) % 0xFFFF or 0xFFFF
        else:
            prefix = self.port.link.prefix(max(34 + length, MIN_FRAME))
            tcp = struct.pack("!4sIIHHHH", self._addresses[8:], seq, ack, offset_flags, window, 0, 0) + options
            checksum = 0xFFFF ^ ((partial_sum(tcp) + self._pseudo + length) % 0xFFFF or 0xFFFF)
        ip_checksum = 0xFFFF ^ ((self._ip_sum + total) % 0xFFFF or 0xFFFF)
        pack = _options_packer(self.headroom, len(options), max(self._shortest - 34 - length, 0))
        return pack(
            prefix, self._ethernet, total, _DF_TTL_TCP, ip_checksum, self._addresses,
            seq, ack, offset_flags, window, checksum, 0, options,
        )  # fmt: skip

    def finish(
        self, buffer: bytearray | memoryview, octets: int, seq: int, ack: int, flags: int, window: int, start: int = 0
    ) -> int:
        """Write the headers of a frame that begins at `start` in `buffer`; its payload lies behind them already.

        Returns the frame's length with headroom and padding. With more than one segment of payload it becomes a
        super-frame (only on links that take them).
        """
        total = 40 + octets
        offset_flags = 0x5000 | flags
        length = 20 + octets
        if self.partial:
            prefix = self._prefix_gso if octets > self._mss else self._prefix_plain
            checksum = (self._pseudo + length) % 0xFFFF or 0xFFFF
        else:
            prefix = self.port.link.prefix(max(HEADERS + octets, MIN_FRAME))
            at = start + self.headroom + HEADERS
            total_sum = (
                self._ack_sum - 20 + length
                + seq + ack + offset_flags + window
                + partial_sum(memoryview(buffer)[at : at + octets])
            )  # fmt: skip
            checksum = 0xFFFF ^ (total_sum % 0xFFFF or 0xFFFF)
        ip_checksum = 0xFFFF ^ ((self._ip_sum + total) % 0xFFFF or 0xFFFF)
        self._pack_into(
            buffer, start, prefix, self._ethernet, total, _DF_TTL_TCP, ip_checksum, self._addresses,
            seq, ack, offset_flags, window, checksum, 0,
        )  # fmt: skip
        end = HEADERS + octets
        if end < self._shortest:
            at = start + self.headroom
            buffer[at + end : at + self._shortest] = bytes(self._shortest - end)
            end = self._shortest
        return self.headroom + end

    def finish_small(self, buffer: bytearray, octets: int, seq: int, ack: int, flags: int, window: int) -> int:
        """As `finish` for less than a segment; answers of one length after another have most of their header alike."""
        if not self.partial:
            return self.finish(buffer, octets, seq, ack, flags, window)
        if octets != self._small_octets:
            total = 40 + octets
            ip_checksum = 0xFFFF ^ ((self._ip_sum + total) % 0xFFFF or 0xFFFF)
            self._small_octets = octets
            self._small = (total, ip_checksum, (self._pseudo + 20 + octets) % 0xFFFF or 0xFFFF)
        total, ip_checksum, checksum = self._small
        self._pack_into(
            buffer, 0, self._prefix_plain, self._ethernet, total, _DF_TTL_TCP, ip_checksum, self._addresses,
            seq, ack, 0x5000 | flags, window, checksum, 0,
        )  # fmt: skip
        return self.headroom + HEADERS + octets

    def template(self, payload_octets: int, ack: int, flags: int, window: int) -> tuple[bytes, int]:
        """The headers of one of many equal segments, sequence number and checksum zero, and the sum of all but both."""
        total = 40 + payload_octets
        offset_flags = 0x5000 | flags
        head = b"".join(
            (
                self.port.link.prefix(HEADERS + payload_octets),
                self._ethernet,
                total.to_bytes(2, "big"),
                _DF_TTL_TCP,
                self._ip_checksum(total),
                self._addresses,
            )
        )
        octets = struct.pack(f"!{len(head)}sIIHHHH", head, 0, ack, offset_flags, window, 0, 0)
        return octets, self._ack_sum + payload_octets + ack + offset_flags + window
