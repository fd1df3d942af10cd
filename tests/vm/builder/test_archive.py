"""Archives of others: unpacked into nothing, and what a hostile one may not do."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import random
import stat
import subprocess
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError, NetstackError
from tests.support.images import contents, member, stored, tar
from tests.support.netns import require
from vm.build import archive
from vm.build.archive import Cache, Window, plain, unpack, whole
from vm.build.tree import Slice, Tree


def unpacked(directory: Path, octets: bytes) -> Tree:
    part, cache = stored(directory, octets)
    tree = Tree()
    unpack(plain(part, cache, "it"), tree, "it")
    return tree


def zstd(octets: bytes) -> bytes:
    require("zstd")
    return subprocess.run(["zstd", "-qc"], input=octets, capture_output=True, check=True).stdout


PACKERS = [bytes, gzip.compress, lzma.compress, bz2.compress, zstd]


@pytest.mark.parametrize("pack", PACKERS, ids=["plain", "gzip", "xz", "bzip2", "zstd"])
def test_a_tar_however_compressed(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    big = os.urandom(300_000)
    octets = pack(tar({"./etc/": b"", "./etc/motd": b"hello", "link": "etc/motd", "/big": big}))
    tree = unpacked(tmp_path, octets)
    assert contents(tree) == {"etc/motd": b"hello", "link": "etc/motd", "big": big}
    assert all(path.parent.name in ("plain", "cache") for path in (tmp_path / "cache").rglob("*")), (
        "nothing is unpacked"
    )


def test_an_xz_of_several_parts(tmp_path: Path) -> None:
    octets = tar({"a": os.urandom(5000), "b": b"x" * 3_000_000})
    parts = [lzma.compress(octets[at : at + 700_000]) for at in range(0, len(octets), 700_000)]
    part, cache = stored(tmp_path, bytes(0).join(parts) + bytes(4))
    assert b"".join(plain(part, cache, "it").chunks()) == octets
    part, cache = stored(tmp_path, bytes(8).join(parts))
    assert b"".join(plain(part, cache, "it").chunks()) == octets
    for end in (b"more", bytes(4) + b"more"):
        with pytest.raises(ConfigError, match="damaged xz"):
            plain(stored(tmp_path, parts[0] + end)[0], cache, "it")


def test_an_xz_that_wants_all_the_memory_there_is_gets_none(tmp_path: Path) -> None:
    octets = bytearray(lzma.compress(bytes(1000), check=lzma.CHECK_NONE))
    header = octets[12 : 12 + 4 * (octets[12] + 1)]  # of its only block (xz's file format, 3.1)
    header[header.index(b"\x21\x01") + 2] = 40  # LZMA2, with a dictionary of 4 GiB
    header[-4:] = zlib.crc32(header[:-4]).to_bytes(4, "little")
    octets[12 : 12 + len(header)] = header
    assert lzma.decompress(octets) == bytes(1000)
    part, cache = stored(tmp_path, bytes(octets))
    with pytest.raises(ConfigError, match="damaged xz: Memory usage limit exceeded"):
        plain(part, cache, "it")


def test_the_second_time_nothing_is_decompressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    octets = gzip.compress(tar({"a": b"x"}))
    unpacked(tmp_path, octets)
    monkeypatch.setattr(archive, "_decompressed", None)
    assert contents(unpacked(tmp_path, octets)) == {"a": b"x"}


def test_kinds_owners_and_hard_links_stay(tmp_path: Path) -> None:
    node = member("dev/null", tarfile.CHRTYPE, mode=0o666)
    node.devmajor, node.devminor = 1, 3
    owned = member("owned", mode=0o4755)
    owned.uid, owned.gid = 1000, 100
    files: dict[str, bytes | str | tarfile.TarInfo] = {
        "a": b"x",
        "dev/null": node,
        "owned": owned,
        "b": member("b", tarfile.LNKTYPE, link="./a"),
        "pipe": member("pipe", tarfile.FIFOTYPE),
    }
    tree = unpacked(tmp_path, tar(files))
    found = dict(tree.walk())
    assert found["a"] is found["b"]
    assert stat.S_ISCHR(found["dev/null"].mode) and found["dev/null"].device == (1, 3)
    assert (found["owned"].mode & 0o7777, found["owned"].uid, found["owned"].gid) == (0o4755, 1000, 100)
    assert stat.S_ISFIFO(found["pipe"].mode)


HOSTILE = {
    "a name that leads out": {"../../etc/cron.d/x": b"x"},
    "a name that leads out further down": {"a/../../x": b"x"},
    "a hard link that leads out": {"x": member("x", tarfile.LNKTYPE, link="../../etc/passwd")},
    "a hard link to what is not there": {"x": member("x", tarfile.LNKTYPE, link="/etc/passwd")},
    "links that lead to each other": {"a": "b", "b": "a", "a/x": b"x"},
    "a kind that nobody knows": {"x": member("x", b"Z")},
    "a directory that becomes a file": {"a/b": b"x", "a": b"x"},
}


@pytest.mark.parametrize("files", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_names_are_refused(files: dict[str, bytes | str | tarfile.TarInfo], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^it: "):
        unpacked(tmp_path, tar(files))
    assert {path.name for path in tmp_path.iterdir()} <= {"archive", "cache"}


def test_a_file_through_a_link_stays_within_the_tree(tmp_path: Path) -> None:
    tree = unpacked(tmp_path, tar({"out": f"{tmp_path}/victim", "out/x": b"pwned", "up": "../../..", "up/y": b"pwned"}))
    assert contents(tree)[f"{str(tmp_path)[1:]}/victim/x"] == b"pwned", "a place in the tree, of that name"
    assert contents(tree)["y"] == b"pwned"
    assert not (tmp_path / "victim").exists()


def test_a_bomb_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_OCTETS", 1 << 20)
    with pytest.raises(ConfigError, match="more than 1,048,576 octets when decompressed"):
        unpacked(tmp_path, gzip.compress(bytes(20 << 20)))
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_ENTRIES", 5)
    with pytest.raises(ConfigError, match="more than 5 files"):
        unpacked(tmp_path, tar(dict.fromkeys("abcdef", b"")))


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    """A pax header, or a long name, is read as a whole: as long as it says."""
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info = member("x", kind, size=1 << 31)
        octets = info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)
        with pytest.raises(ConfigError, match="it: "):
            unpacked(tmp_path, octets)


def pax(kind: bytes, number: int) -> bytes:
    """A header with one more thing to remember."""
    text = f"key{number:05}={'v' * 300}\n"
    body = f"{len(text) + 4} {text}".encode()
    return member("x", kind, size=len(body)).tobuf() + body + bytes(-len(body) % 512)


def test_headers_without_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive, "MAX_HEADERS", 100_000)
    files = tar({"a": b""})[:512]
    endless = b"".join(pax(tarfile.XGLTYPE, number) + files for number in range(200))
    with pytest.raises(ConfigError, match=r"it: headers of more than 100,000 octets in all"):
        unpacked(tmp_path, endless)


def test_headers_of_headers_are_refused(tmp_path: Path) -> None:
    nested = b"".join(pax(tarfile.XHDTYPE, number) for number in range(2000)) + tar({"a": b""})
    with pytest.raises(ConfigError, match=r"it: no tar archive, or a damaged one"):
        unpacked(tmp_path, nested)


def test_a_file_that_is_cut_short(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it: 'x' is cut short|it: no tar"):
        unpacked(tmp_path, tar({"x": b"y" * 5000})[: 512 + 600])


@pytest.mark.parametrize(
    "octets", [b"", b"no tar at all" * 100, b"\x1f\x8b" + b"x" * 100, b"\xfd7zXZ\0" + b"y" * 99, b"BZh9" + b"z" * 99]
)
def test_what_is_no_archive_is_said_to_be_none(octets: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^it: (no tar archive|damaged)"):
        unpacked(tmp_path, octets)


def test_a_damaged_zstd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    octets = zstd(tar({"x": os.urandom(200_000)}))
    with pytest.raises(ConfigError, match="damaged zstd"):
        unpacked(tmp_path, octets[:100_000])
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="no program `zstd`; install it"):
        unpacked(tmp_path, octets)


def test_flipped_bits_are_errors_or_other_trees(tmp_path: Path) -> None:
    """Nothing but our own errors, and no endless work."""
    rng = random.Random(7)
    good = tar(
        {"etc/" + "long" * 40: b"x" * 700, "link": "etc", "b": member("b", tarfile.LNKTYPE, link="link"), "c": b""}
    )
    for number in range(400):
        damaged = bytearray(good)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(3000)] = rng.randrange(256)
        part = stored(tmp_path, bytes(damaged))[0]
        try:
            tree = Tree()
            unpack(part, tree, "it")
            contents(tree)
        except NetstackError:
            continue
        assert len(tree) < 10, number


def test_a_window_is_a_file_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(200)))
    with io.BufferedReader(Window(Slice(tmp_path / "file", 50, 20))) as file:
        assert file.read() == bytes(range(50, 70))
        file.seek(-5, os.SEEK_END)
        assert file.read(99) == bytes(range(65, 70))
        file.seek(3)
        assert file.read(2) == bytes((53, 54))


def test_what_is_read_is_a_file_and_no_link(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        whole(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="is not a file"):
        whole(tmp_path)
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(HostError, match="symbolic links"):
        list(Slice(tmp_path / "link", 0, 1).chunks())


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"nothing can be kept in .*: .*; set XDG_CACHE_HOME"):
        Cache(tmp_path / "file" / "cache").keep("x", lambda out: None)
