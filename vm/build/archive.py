"""Archives of others as trees: what is in a tar, compressed or not.

An archive is unpacked into nothing: if it is compressed it is kept in the cache once more as a plain tar, by its digest, and the
tree points into that file. So the worst that an archive can do to the host is to fill `MAX_OCTETS` of the cache. Names with
`..` are refused, a leading `/` is dropped, links lead nowhere but within the tree, and device nodes are entries, never made here.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, cast

from netstack.errors import ConfigError, HostError
from vm.build.tree import MAX_ENTRIES, Entry, Slice, Tree

MAX_OCTETS: Final = 4 << 30
"""Of one archive, unpacked: Debian's kernel has 0.4 GB, a container image with everything for machine learning 10 GB and more."""
MAX_HEADER: Final = 1 << 20
"""Of one header with its extensions, which tarfile reads at once."""
MAX_HEADERS: Final = 256 << 20
"""Of all of them together: what global ones say is remembered to the end."""
MAX_MEMORY: Final = 256 << 20
"""Octets that a decompressor may take for itself: `xz -9` wants 65 MiB, but an archive may say that it takes 4 GiB."""
_CHUNK: Final = 1 << 20
_DAMAGED: Final = (
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    OverflowError,
    IndexError,
    KeyError,
    RecursionError,
)


class Window(io.RawIOBase):
    """A slice as a file of its own."""

    def __init__(self, part: Slice) -> None:
        self._file = part.open()
        self._start, self._size, self._at = part.offset, part.size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        self._file.seek(self._start + self._at)
        room = memoryview(buffer)[: max(0, min(len(buffer), self._size - self._at))]
        taken = self._file.readinto(room)  # type: ignore[attr-defined]
        self._at += taken
        return int(taken)

    def close(self) -> None:
        self._file.close()
        super().close()


def whole(path: Path) -> Slice:
    """All of a file."""
    try:
        status = os.stat(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: is not a file")
    return Slice(path.resolve(), 0, status.st_size)


def sha256(part: Slice) -> str:
    """The digest, in hexadecimal."""
    made = hashlib.sha256()
    for chunk in part.chunks():
        made.update(chunk)
    return made.hexdigest()


@dataclass(frozen=True, slots=True)
class Cache:
    """A directory of what was downloaded and decompressed, by digests; it may be deleted between builds."""

    directory: Path
    refresh: bool = False
    """What may have changed in the world since it was kept is asked again."""

    def keep(self, name: str, fill: Callable[[BinaryIO], None], *, anew: bool = False) -> Path:
        """The file `name`, which `fill` writes if it is not there, or `anew`. Raises `HostError` where nothing can be kept."""
        path = self.directory / name
        if path.exists() and not anew:
            return path
        with self.scratch() as scratch:
            made = scratch / "file"
            with open(made, "wb") as file:
                fill(file)
            self.move(made, name)
        return path

    def move(self, made: Path, name: str) -> None:
        """Keep `made`, a file or a directory of a `scratch`, as `name`; as it is where somebody else was first."""
        path = self.directory / name
        with _kept(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                made.rename(path)
            except OSError:
                if not path.is_dir():
                    raise

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory in the cache, for as long as the block takes."""
        with _kept(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            made = tempfile.TemporaryDirectory(dir=self.directory)
        with made as name:
            yield Path(name)


@contextlib.contextmanager
def _kept(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise HostError(f"nothing can be kept in {path}: {error.strerror}; set XDG_CACHE_HOME") from None


def plain(part: Slice, cache: Cache, what: str, digest: str = "") -> Slice:
    """`part` decompressed: itself where it is not compressed. `digest` is its SHA-256, if that is known; `what` is for errors."""
    with Window(part) as file:
        kind = _kind(file.read(6) or b"")
    if not kind:
        return part

    def fill(out: BinaryIO) -> None:
        left = MAX_OCTETS
        try:
            with _decompressed(part, kind, what) as stream:
                while chunk := stream.read(_CHUNK):
                    left -= len(chunk)
                    if left < 0:
                        raise ConfigError(f"{what}: more than {MAX_OCTETS:,} octets when decompressed")
                    out.write(chunk)
        except (*_DAMAGED, OSError) as error:
            if isinstance(error, OSError) and error.errno:  # gzip's and bz2's complaints have none
                raise HostError(f"{what}: {error.strerror}") from None
            raise ConfigError(f"{what}: damaged {kind}: {error}") from None

    return whole(cache.keep(f"plain/{digest or sha256(part)}", fill))


def _kind(head: bytes) -> str:
    for kind, magic in (("gzip", b"\x1f\x8b"), ("xz", b"\xfd7zXZ\0"), ("bzip2", b"BZh"), ("zstd", b"\x28\xb5\x2f\xfd")):
        if head.startswith(magic):
            return kind
    return ""


@contextlib.contextmanager
def _decompressed(part: Slice, kind: str, what: str) -> Iterator[BinaryIO]:
    if kind == "zstd":
        with _zstd(part, what) as stream:
            yield stream
        return
    with io.BufferedReader(Window(part), _CHUNK) as file:
        opened: dict[str, Callable[[], io.IOBase]] = {
            "gzip": lambda: gzip.GzipFile(fileobj=file),
            "bzip2": lambda: bz2.BZ2File(file),
            "xz": lambda: io.BufferedReader(_Xz(file)),
        }
        with opened[kind]() as stream:
            yield cast(BinaryIO, stream)


class _Xz(io.RawIOBase):
    """What is in an xz file. (Python's own reader knows no `MAX_MEMORY`.)"""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._made = self._begun()
        self._between = False
        """Whether a stream has ended, behind which zeros may follow, and another."""

    @staticmethod
    def _begun() -> lzma.LZMADecompressor:
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while True:
            octets = b""
            if self._made.eof:
                octets, self._made, self._between = self._made.unused_data, self._begun(), True
            if not octets and self._made.needs_input:
                octets = self._file.read(_CHUNK)
                if not octets and not self._between:
                    raise EOFError("it is cut short")
                if not octets:
                    return 0
            if self._between:
                octets = octets.lstrip(b"\0")
                if not octets:
                    continue
                self._between = False
            if octets := self._made.decompress(octets, len(buffer)):
                buffer[: len(octets)] = octets
                return len(octets)


@contextlib.contextmanager
def _zstd(part: Slice, what: str) -> Iterator[BinaryIO]:
    """Python has no zstd before 3.14."""
    program = shutil.which("zstd")
    if program is None:
        raise HostError(f"{what}: compressed by zstd, and there is no program `zstd`; install it, or compress by gzip")
    with tempfile.TemporaryFile() as whole_part:
        for chunk in part.chunks():
            whole_part.write(chunk)
        whole_part.seek(0)
        command = [program, "--decompress", "--stdout", "--quiet", "--memory=128MB"]
        with subprocess.Popen(command, stdin=whole_part, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            try:
                yield cast(BinaryIO, process.stdout)
                said = process.stderr.read(1000).decode(errors="replace").strip()
                if process.wait():
                    raise ConfigError(f"{what}: damaged zstd: {said}")
            finally:
                if process.poll() is None:
                    process.kill()


class _Headers(io.RawIOBase):
    """What tarfile reads of an archive: headers only, for it seeks over the rest."""

    def __init__(self, window: Window, what: str) -> None:
        self._window, self._what = window, what
        self._left = MAX_HEADERS

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise ConfigError(f"{self._what}: a header of more than {MAX_HEADER:,} octets")
        self._left -= size
        if self._left < 0:
            raise ConfigError(f"{self._what}: headers of more than {MAX_HEADERS:,} octets in all")
        return self._window.read(size) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._window.seek(offset, whence)

    def tell(self) -> int:
        return self._window.seek(0, os.SEEK_CUR)


@dataclass(frozen=True, slots=True)
class Member:
    """A name in a tar: an entry, or for a hard link the name of what it is one to."""

    path: str
    entry: Entry
    link: str | None = None


def members(part: Slice, what: str) -> Iterator[Member]:
    """What is in a plain tar, in its order. Raises `ConfigError` for what is none, or is hostile."""
    count = 0
    with Window(part) as window:
        try:
            with tarfile.open(fileobj=_Headers(window, what), mode="r:") as tar:
                for found in tar:
                    count += 1
                    if count > MAX_ENTRIES:
                        raise ConfigError(f"{what}: more than {MAX_ENTRIES:,} files")
                    tar.members.clear()  # type: ignore[attr-defined]
                    if (member := _member(found, part, what)) is not None:
                        yield member
        except _DAMAGED as error:
            raise ConfigError(f"{what}: no tar archive, or a damaged one: {error}") from None


def _member(found: tarfile.TarInfo, part: Slice, what: str) -> Member | None:
    kind = _KINDS.get(found.type)
    if kind is None or found.sparse is not None:
        raise ConfigError(f"{what}: {found.name!r} is of a kind that is not unpacked here; pack it as an ordinary file")
    content: Slice | bytes = b""
    device = (0, 0)
    if kind == stat.S_IFREG and found.type != tarfile.LNKTYPE:
        if not 0 <= found.size <= part.size - found.offset_data:
            raise ConfigError(f"{what}: {found.name!r} is cut short")
        content = Slice(part.path, part.offset + found.offset_data, found.size)
    elif kind == stat.S_IFLNK:
        content = os.fsencode(found.linkname)
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        device = (found.devmajor, found.devminor)
    mode = kind | (found.mode & 0o7777)
    entry = Entry(mode=mode, uid=found.uid, gid=found.gid, content=content, device=device)
    return Member(found.name, entry, found.linkname if found.type == tarfile.LNKTYPE else None)


_KINDS: Final = {
    **dict.fromkeys((tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE, tarfile.LNKTYPE), stat.S_IFREG),
    tarfile.SYMTYPE: stat.S_IFLNK,
    tarfile.CHRTYPE: stat.S_IFCHR,
    tarfile.BLKTYPE: stat.S_IFBLK,
    tarfile.DIRTYPE: stat.S_IFDIR,
    tarfile.FIFOTYPE: stat.S_IFIFO,
}


def unpack(
    part: Slice, tree: Tree, what: str, *, layer: bool = False, skip: Callable[[str], bool] | None = None
) -> None:
    """Add what is in a plain tar to `tree` (`layer`: see `Tree.add`), but for paths that `skip` is true of."""
    for member in members(part, what):
        if skip is not None and skip(member.path):
            continue
        try:
            if member.link is None:
                tree.add(member.path, member.entry, layer=layer)
            else:
                tree.link(member.path, member.link, layer=layer)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}") from None
