"""Undo offloads: fill in a partial checksum and cut a TCP super-frame into ordinary frames (virtio 1.2, 5.1.6.2).

Off the hot path: only frames that one guest sends to another, or that a capture wants complete, come here.
"""

from __future__ import annotations

import struct
from typing import Final

from netstack.wire.checksum import internet, partial, pseudo

VNET_HEADER: Final = struct.Struct(
    "<BBHHHHH"
)  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
NEEDS_CHECKSUM: Final = 1
_FIN_PSH: Final = 0x09


def make_plain(frame: memoryview, mtu: int) -> list[bytes]:
    """Ordinary Ethernet frames of a frame with virtio-net header; `[]` when its offload fields make no sense.

    A super-frame is cut into segments of its `gso_size`, or smaller ones where `mtu` wants it.
    """
    if len(frame) < VNET_HEADER.size + 14:
        return []
    flags, gso_type, _length, gso_size, start, offset, _buffers = VNET_HEADER.unpack_from(frame)
    octets = bytearray(frame[VNET_HEADER.size :])
    if gso_type == 0:
        if flags & NEEDS_CHECKSUM:
            at = start + offset
            if start < 14 or at + 2 > len(octets):
                return []
            # The field holds the pseudo-header's sum already.
            struct.pack_into("!H", octets, at, internet(memoryview(octets)[start:]) or 0xFFFF)
        return [bytes(octets)]
    if gso_type & 0x7F != 1 or octets[12:14] != b"\x08\x00" or len(octets) < 54:
        return []
    ip_length = (octets[14] & 15) * 4
    tcp_at = 14 + ip_length
    if tcp_at + 20 > len(octets):
        return []
    header_length = tcp_at + (octets[tcp_at + 12] >> 4) * 4
    total = int.from_bytes(octets[16:18], "big")
    mss = min(gso_size or mtu, mtu - (header_length - 14))
    if header_length > len(octets) or mss <= 0 or 14 + total > len(octets):
        return []
    payload = memoryview(octets)[header_length : 14 + total]
    identification = int.from_bytes(octets[18:20], "big")
    seq = int.from_bytes(octets[tcp_at + 4 : tcp_at + 8], "big")
    tcp_flags = octets[tcp_at + 13]
    source, destination = bytes(octets[26:30]), bytes(octets[30:34])
    frames: list[bytes] = []
    for at in range(0, max(len(payload), 1), mss):
        part = payload[at : at + mss]
        header = bytearray(octets[:header_length])
        struct.pack_into("!HH", header, 16, header_length - 14 + len(part), identification + len(frames) & 0xFFFF)
        header[24:26] = b"\0\0"
        header[24:26] = internet(memoryview(header)[14:tcp_at]).to_bytes(2, "big")
        struct.pack_into("!I", header, tcp_at + 4, seq + at & 0xFFFFFFFF)
        header[tcp_at + 13] = tcp_flags if at + mss >= len(payload) else tcp_flags & ~_FIN_PSH
        header[tcp_at + 16 : tcp_at + 18] = b"\0\0"
        length = header_length - tcp_at + len(part)
        total_sum = pseudo(source, destination, 6, length) + partial(memoryview(header)[tcp_at:])
        header[tcp_at + 16 : tcp_at + 18] = internet(part, total_sum).to_bytes(2, "big")
        frames.append(bytes(header) + bytes(part))
    return frames
