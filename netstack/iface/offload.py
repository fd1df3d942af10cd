"""Undo offloads: fill in a partial checksum and cut a super-frame into ordinary frames (virtio 1.2, 5.1.6.2).

Off the hot path: only frames that one guest sends to another come here, and bursts of datagrams (`split_datagrams`).
"""

from __future__ import annotations

import struct
from typing import Final

from netstack.wire.checksum import internet, partial, pseudo

VNET_HEADER: Final = struct.Struct(
    "<BBHHHHH"
)  # flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers
_WITHOUT_BUFFERS: Final = struct.Struct("<BBHHHH")
NEEDS_CHECKSUM: Final = 1
_ECN: Final = 0x80
_TCPV4: Final = 1
_TCPV6: Final = 4
_UDP_L4: Final = 5
_FIN_PSH: Final = 0x09
_CWR: Final = 0x80


def make_plain(frame: memoryview, headroom: int, mtu: int) -> list[bytes]:
    """Ordinary Ethernet frames of a frame with virtio-net header (`headroom` octets, 12 or 10); `[]` when its offload fields
    make no sense.

    A super-frame is cut into segments of its `gso_size`, or smaller ones where `mtu` wants it; datagrams keep their size.
    """
    if len(frame) < headroom + 14:
        return []
    flags, gso_type, _length, gso_size, start, offset = _WITHOUT_BUFFERS.unpack_from(frame)
    octets = bytearray(frame[headroom:])
    kind = gso_type & ~_ECN
    if kind in (_TCPV4, _TCPV6, _UDP_L4):
        return _cut(octets, kind, gso_size, mtu)
    if kind:
        return []
    if flags & NEEDS_CHECKSUM:
        at = start + offset
        if start < 14 or at + 2 > len(octets):
            return []
        # The field holds the pseudo-header's sum already.
        struct.pack_into("!H", octets, at, internet(memoryview(octets)[start:]) or 0xFFFF)
    return [bytes(octets)]


def _cut(octets: bytearray, kind: int, gso_size: int, mtu: int) -> list[bytes]:
    """The segments of a super-frame, with all lengths, numbers and checksums."""
    ethertype = bytes(octets[12:14])
    if ethertype == b"\x08\x00" and kind != _TCPV6 and len(octets) >= 34:
        at = 14 + (octets[14] & 15) * 4
        total = int.from_bytes(octets[16:18], "big")
        addresses = bytes(octets[26:34])
    elif ethertype == b"\x86\xdd" and kind != _TCPV4 and len(octets) >= 54:
        at = 54
        total = 40 + int.from_bytes(octets[18:20], "big")
        addresses = bytes(octets[22:54])
    else:
        return []
    tcp = kind != _UDP_L4
    if at < 34 or at + (20 if tcp else 8) > len(octets):
        return []
    protocol = 6 if tcp else 17
    header_length = at + ((octets[at + 12] >> 4) * 4 if tcp else 8)
    fits = mtu - (header_length - 14)
    size = min(gso_size or mtu, fits) if tcp else gso_size
    if not at + 8 <= header_length <= len(octets) or size <= 0 or 14 + total > len(octets):
        return []
    payload = memoryview(octets)[header_length : 14 + total]
    identification = int.from_bytes(octets[18:20], "big")
    seq = int.from_bytes(octets[at + 4 : at + 8], "big")
    flags = octets[at + 13] if tcp else 0
    half = len(addresses) // 2
    frames: list[bytes] = []
    for begin in range(0, max(len(payload), 1), size):
        part = payload[begin : begin + size]
        header = bytearray(octets[:header_length])
        length = header_length - at + len(part)
        if half == 4:
            struct.pack_into("!HH", header, 16, header_length - 14 + len(part), (identification + len(frames)) & 0xFFFF)
            header[24:26] = b"\0\0"
            header[24:26] = internet(memoryview(header)[14:at]).to_bytes(2, "big")
        else:
            struct.pack_into("!H", header, 18, length)
        if tcp:
            struct.pack_into("!I", header, at + 4, (seq + begin) & 0xFFFFFFFF)
            keep = 0xFF if begin + size >= len(payload) else ~_FIN_PSH
            header[at + 13] = flags & keep & (0xFF if not begin else ~_CWR)
            field = at + 16
        else:
            struct.pack_into("!H", header, at + 4, length)
            field = at + 6
        header[field : field + 2] = b"\0\0"
        sums = pseudo(addresses[:half], addresses[half:], protocol, length) + partial(memoryview(header)[at:])
        header[field : field + 2] = (internet(part, sums) or (0 if tcp else 0xFFFF)).to_bytes(2, "big")
        frames.append(bytes(header) + bytes(part))
    return frames


def split_datagrams(frame: memoryview, headroom: int) -> list[memoryview]:
    """The frames of a burst of datagrams (`VIRTIO_NET_HDR_GSO_UDP_L4`), each behind a header without offloads."""
    plain = bytes(headroom)
    return [memoryview(plain + one) for one in make_plain(frame, headroom, 0)]
