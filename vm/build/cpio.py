"""The archive that Linux unpacks as its first file system: cpio "newc" (Documentation/driver-api/early-userspace/buffer-format).

The same tree gives the same octets: paths in order, inodes counted from 1, one time for all, gzip without a name or a time. Every
directory comes before what is in it, which Linux asks for. Hard links have one inode and the octets with the first of them: Linux
wants them there no more than elsewhere, and GNU cpio takes either.
"""

from __future__ import annotations

import contextlib
import gzip
import lzma
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Literal, cast

from netstack.errors import ConfigError, Malformed
from vm.build.tree import MAX_PATH, Entry, Tree

Compression = Literal["none", "gzip", "xz"]
MAGIC: Final = b"070701"
TRAILER: Final = "TRAILER!!!"
HEADER: Final = 110
"""Octets: the magic and 13 numbers of 8 hexadecimal digits."""
MAX_SIZE: Final = 0xFFFF_FFFF


def header(name: str, mode: int, inode: int, links: int, size: int, uid: int, gid: int, mtime: int,
           device: tuple[int, int]) -> bytes:  # fmt: skip
    """The header and the name, filled up to 4 octets."""
    path = os.fsencode(name)
    # The last of them is a check sum, of another variant; the two before the name's length are the device's numbers.
    fields = (inode, mode, uid, gid, links, mtime, size, 0, 0, *device, len(path) + 1, 0)
    for field in fields:
        if not 0 <= field <= MAX_SIZE:
            raise ConfigError(f"/{name}: {field:,} does not fit a cpio archive: 0 to {MAX_SIZE:,} would")
    return _padded(MAGIC + b"".join(b"%08x" % field for field in fields) + path + b"\0")


def blocks(tree: Tree, mtime: int = 0) -> Iterator[bytes]:
    """The archive, some at a time; never more of a file than a `Slice` gives at once is in memory."""
    links: dict[int, int] = {}
    for _, entry in tree.walk():
        links[id(entry)] = links.get(id(entry), 0) + 1
    inodes: dict[int, int] = {}
    number = 0
    for path, entry in tree.walk():
        if entry.is_dir():  # DIRECTORY is at many paths, and none of them is a link
            number, inode, count = number + 1, number + 1, 2
        else:
            count = links[id(entry)]
            inode = inodes.get(id(entry), 0)
        written = inode != 0 and not entry.is_dir()
        if not inode:
            number, inode = number + 1, number + 1
            inodes[id(entry)] = inode
        size = 0 if written else entry.size
        yield header(path, entry.mode, inode, count, size, entry.uid, entry.gid, mtime, entry.device)
        if size:
            yield from entry.chunks()
            yield bytes(-size % 4)
    yield header(TRAILER, 0, 0, 1, 0, 0, 0, 0, (0, 0))


def write(
    tree: Tree, path: Path, *, compression: Compression = "none", mtime: int = 0, before: Entry | None = None
) -> int:
    """Write the archive to `path`, which appears when it is whole; its octets. Raises `ConfigError`, `HostError`, `OSError`.

    `before` is another archive, which stays as it is: Linux looks for microcode at the very beginning.
    """
    with _replacing(path) as raw:
        if before is not None:
            raw.writelines(before.chunks())
            raw.write(bytes(-before.size % 512))
        with _compressed(raw, compression) as out:
            out.writelines(blocks(tree, mtime))
        return raw.tell()


def replaced(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that appears when it is whole."""
    with _replacing(path) as file:
        file.writelines(chunks)


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    try:
        with open(scratch, "xb") as file:  # not through a link that somebody else has put there
            yield file
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def read(file: BinaryIO) -> Iterator[tuple[str, Entry, int]]:
    """`(path, entry, inode)` of an archive that is not compressed, octets and all. Raises `Malformed`."""
    while True:
        head = file.read(HEADER)
        if len(head) < HEADER or not head.startswith(MAGIC):
            raise Malformed("cpio: no header of the newc kind")
        try:
            numbers = [int(head[at : at + 8], 16) for at in range(6, HEADER, 8)]
        except ValueError:
            raise Malformed("cpio: a number that is none") from None
        inode, mode, uid, gid, _links, _mtime, size, _major, _minor, rmajor, rminor, length, _check = numbers
        if not 1 < length <= MAX_PATH + 1:
            raise Malformed("cpio: the length of a name cannot be")
        name = file.read(length + -(HEADER + length) % 4)[: length - 1]
        content = file.read(size)
        if len(name) < length - 1 or len(content) < size:
            raise Malformed("cpio: cut short")
        file.read(-size % 4)
        path = os.fsdecode(name)
        if path == TRAILER:
            return
        yield path, Entry(mode=mode, uid=uid, gid=gid, content=content, device=(rmajor, rminor)), inode


def listing(entry: Entry, path: str) -> str:
    """A line about an entry, as `ls -l` would have it."""
    size = f"{entry.device[0]},{entry.device[1]}" if _is_device(entry.mode) else f"{entry.size}"
    target = f" -> {os.fsdecode(entry.read(MAX_PATH))}" if entry.is_link() else ""
    return f"{stat.filemode(entry.mode)} {entry.uid}:{entry.gid} {size:>9} /{path}{target}"


def _is_device(mode: int) -> bool:
    return stat.S_ISCHR(mode) or stat.S_ISBLK(mode)


def _padded(octets: bytes) -> bytes:
    return octets + bytes(-len(octets) % 4)


def _compressed(raw: BinaryIO, how: Compression) -> contextlib.AbstractContextManager[BinaryIO]:
    match how:
        case "none":
            return contextlib.nullcontext(raw)
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile("", "wb", 6, raw, mtime=0))
        case "xz":  # the kernel's decoder knows no check but CRC32
            return cast(BinaryIO, lzma.LZMAFile(raw, "wb", check=lzma.CHECK_CRC32, preset=6))
    raise ConfigError(f"initramfs compression {how!r}: none, gzip or xz would be accepted")
