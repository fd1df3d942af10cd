"""The kernel without its compression: out of a bzImage made on the spot."""

from __future__ import annotations

import gzip
import lzma
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.images import stored
from vm.build.tree import Entry
from vm.build.vmlinux import uncompressed

VMLINUX = b"\x7fELF" + bytes(range(256)) * 100


def bzimage(payload: bytes, *, sectors: int = 27, magic: bytes = b"HdrS", longer: int = 0) -> bytes:
    head = bytearray(((sectors or 4) + 1) * 512)
    head[0x1F1] = sectors
    head[0x202:0x206] = magic
    struct.pack_into("<II", head, 0x248, 16, len(payload) + 4 + longer)
    return bytes(head) + b"decompressor ..." + payload + struct.pack("<I", len(VMLINUX)) + b"more"


def found(octets: bytes, directory: Path) -> bytes | None:
    part, cache = stored(directory, octets)
    entry = uncompressed(Entry(mode=stat.S_IFREG | 0o644, content=part), cache, "it")
    return entry.read() if entry else None


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bytes], ids=["gzip", "xz", "plain"])
@pytest.mark.parametrize("sectors", [27, 0])
def test_the_kernel_in_a_bzimage(pack: Callable[[bytes], bytes], sectors: int, tmp_path: Path) -> None:
    assert found(bzimage(pack(VMLINUX), sectors=sectors), tmp_path) == VMLINUX


def test_one_that_is_not_compressed(tmp_path: Path) -> None:
    assert found(VMLINUX, tmp_path) == VMLINUX


@pytest.mark.parametrize(
    "octets",
    [
        bzimage(b"\x02\x21\x4c\x18 LZ4"),
        bzimage(gzip.compress(b"no ELF")),
        bzimage(lzma.compress(VMLINUX)[:200]),
        bzimage(gzip.compress(VMLINUX), magic=b"    "),
        bzimage(gzip.compress(VMLINUX), longer=10_000),
        b"short",
        bytes(4096),
    ],
)
def test_what_is_none_or_cannot_be_decompressed(octets: bytes, tmp_path: Path) -> None:
    assert found(octets, tmp_path) is None
