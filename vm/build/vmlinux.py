"""The kernel without its compression (Linux, Documentation/x86/boot.rst: a bzImage has its real self as a payload).

That is the form Firecracker starts, and Cloud Hypervisor; QEMU starts either, and this one some seconds earlier under emulation,
for nothing is left to be decompressed by emulated instructions.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Final

from netstack.errors import ConfigError
from vm.build.archive import Cache, plain
from vm.build.tree import Entry, Slice

ELF: Final = b"\x7fELF"
_SETUP: Final = 0x250
"""Octets of the header that are looked at."""
_SECTOR: Final = 512


def uncompressed(binary: Entry, cache: Cache, what: str) -> Entry | None:
    """The ELF file in a bzImage; `binary` itself if it is one; `None` where it is compressed in a way not known here (LZ4, LZO)."""
    part = binary.content
    if not isinstance(part, Slice) or part.size < _SETUP:
        return None
    with part.open() as file:
        head = file.read(_SETUP)
    if head.startswith(ELF):
        return binary
    if head[0x202:0x206] != b"HdrS":
        return None
    sectors = head[0x1F1] or 4
    offset, length = struct.unpack_from("<II", head, 0x248)  # payload_offset, payload_length
    start = (sectors + 1) * _SECTOR + offset
    if length <= 4 or start + length > part.size:
        return None
    payload = Slice(part.path, part.offset + start, length - 4)  # behind it is its size when decompressed
    try:
        whole = plain(payload, cache, what)
    except ConfigError:
        return None
    with whole.open() as file:
        return replace(binary, content=whole) if file.read(4) == ELF else None
