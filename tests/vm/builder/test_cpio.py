"""The archive as GNU cpio takes it, and the same octets from the same tree."""

from __future__ import annotations

import gzip
import io
import lzma
import os
import stat
import subprocess
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError, Malformed
from tests.support.netns import require
from vm.build import cpio
from vm.build.tree import Entry, Slice, Tree


def sample() -> Tree:
    """One of each kind."""
    tree = Tree()
    tree.directory("etc", 0o751, uid=3, gid=4)
    tree.file("etc/motd", "hello\n", 0o4644, uid=1000, gid=1001)
    tree.file("etc/empty", "")
    tree.link("etc/motd-again", "etc/motd")
    tree.link("also", "etc/motd")
    tree.symlink("link", "etc/motd")
    tree.add("pipe", Entry(mode=stat.S_IFIFO | 0o600))
    tree.add("null", Entry(mode=stat.S_IFCHR | 0o666, device=(1, 3)))
    tree.add("disk", Entry(mode=stat.S_IFBLK | 0o660, gid=6, device=(254, 77)))
    tree.file("spëcial \udcff name\n", "x")
    return tree


def octets(tree: Tree, mtime: int = 0) -> bytes:
    return b"".join(cpio.blocks(tree, mtime))


def gnu(arguments: list[str], archive: bytes, directory: Path) -> bytes:
    require("cpio")
    done = subprocess.run(
        ["cpio", "--quiet", *arguments], input=archive, cwd=directory, capture_output=True, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


def test_gnu_cpio_lists_it(tmp_path: Path) -> None:
    said = gnu(["-t", "--null"], octets(sample()), tmp_path)
    assert said.split(b"\0")[:-1] == [os.fsencode(path) for path, _ in sample().walk()]


@pytest.mark.skipif(os.geteuid() != 0, reason="device nodes and owners need root")
def test_gnu_cpio_unpacks_what_was_meant(tmp_path: Path) -> None:
    gnu(["-idm"], octets(sample(), mtime=86400), tmp_path)
    motd = (tmp_path / "etc/motd").lstat()
    assert (stat.S_IMODE(motd.st_mode), motd.st_uid, motd.st_gid) == (0o4644, 1000, 1001)
    assert (motd.st_nlink, motd.st_mtime) == (3, 86400)
    assert (tmp_path / "also").samefile(tmp_path / "etc/motd-again")
    assert (tmp_path / "etc/motd-again").read_text() == "hello\n"
    assert (tmp_path / "etc/empty").stat().st_size == 0
    assert os.readlink(tmp_path / "link") == "etc/motd"
    etc = (tmp_path / "etc").stat()
    assert (stat.S_IMODE(etc.st_mode), etc.st_uid, etc.st_gid) == (0o751, 3, 4)
    for name, kind, device in (
        ("null", stat.S_IFCHR, (1, 3)),
        ("disk", stat.S_IFBLK, (254, 77)),
        ("pipe", stat.S_IFIFO, None),
    ):
        found = (tmp_path / name).lstat()
        assert stat.S_IFMT(found.st_mode) == kind
        assert device is None or (os.major(found.st_rdev), os.minor(found.st_rdev)) == device
    assert (tmp_path / os.fsdecode("spëcial ".encode() + b"\xff name\n")).read_text() == "x"


def test_its_own_reader_has_it_all_back() -> None:
    inodes: dict[int, list[str]] = {}
    found = {}
    for path, entry, inode in cpio.read(io.BytesIO(octets(sample()))):
        found[path] = entry
        inodes.setdefault(inode, []).append(path)
    assert list(found) == [path for path, _ in sample().walk()]
    for path, entry in sample().walk():
        assert (entry.mode, entry.uid, entry.gid, entry.device) == (
            found[path].mode,
            found[path].uid,
            found[path].gid,
            found[path].device,
        )
    assert [paths for paths in inodes.values() if len(paths) > 1] == [["also", "etc/motd", "etc/motd-again"]]
    assert [found[path].read() for path in ("also", "etc/motd")] == [b"hello\n", b""], "the first link has the octets"
    assert cpio.listing(found["null"], "null") == "crw-rw-rw- 0:0       1,3 /null"


@pytest.mark.parametrize("cut", [0, 50, 120, 700])
def test_a_damaged_archive_is_malformed(cut: int) -> None:
    whole = octets(sample())
    with pytest.raises(Malformed):
        list(cpio.read(io.BytesIO(whole[:cut])))
    with pytest.raises(Malformed):
        list(cpio.read(io.BytesIO(b"070701" + b"xyz" * 40)))


@pytest.mark.parametrize("compression", ["none", "gzip", "xz"])
def test_written_twice_it_is_the_same(compression: cpio.Compression, tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(bytes(range(256)) * 20_000)
    written = []
    for name in ("one", "another name"):
        tree = sample()
        tree.add("big", Entry(mode=stat.S_IFREG | 0o644, content=Slice(tmp_path / "source", 0, 5_120_000)))
        size = cpio.write(tree, tmp_path / name, compression=compression)
        written.append((tmp_path / name).read_bytes())
        assert size == len(written[-1])
    assert written[0] == written[1]
    plain = {"none": lambda data: data, "gzip": gzip.decompress, "xz": lzma.decompress}[compression](written[0])
    assert {path for path, _, _ in cpio.read(io.BytesIO(plain))} >= {"big", "etc/motd"}


def test_another_archive_may_go_before(tmp_path: Path) -> None:
    before = Entry(mode=stat.S_IFREG, content=b"microcode")
    cpio.write(sample(), tmp_path / "initrd", compression="gzip", before=before)
    written = (tmp_path / "initrd").read_bytes()
    assert written.startswith(b"microcode".ljust(512, b"\0"))
    assert gzip.decompress(written[512:]) == octets(sample())


def test_a_file_that_became_shorter_leaves_no_half_an_archive(tmp_path: Path) -> None:
    (tmp_path / "source").write_bytes(b"short")
    tree = Tree()
    tree.add("x", Entry(mode=stat.S_IFREG, content=Slice(tmp_path / "source", 0, 6)))
    with pytest.raises(HostError, match="became shorter"):
        cpio.write(tree, tmp_path / "initrd")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_numbers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tree = Tree()
    tree.file("x", "", uid=1 << 32)
    with pytest.raises(ConfigError, match="/x: 4,294,967,296 does not fit"):
        octets(tree)
    with pytest.raises(ConfigError, match="none, gzip or xz"):
        cpio.write(sample(), tmp_path / "initrd", compression="brotli")  # type: ignore[arg-type]


def test_a_link_in_the_way_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("mine")
    (tmp_path / f".kernel.{os.getpid()}").symlink_to(tmp_path / "victim")
    cpio.replaced(tmp_path / "kernel", [b"a kernel"])
    assert (tmp_path / "victim").read_text() == "mine" and not (tmp_path / "kernel").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["kernel", "victim"]
