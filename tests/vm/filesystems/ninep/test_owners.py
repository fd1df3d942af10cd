"""Whose files are: what guests see and what the host has, for each way (spec companions 2.1, 2.3)."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import site
from tests.vm.filesystems.ninep.test_session import refused
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep.share import Share

ROOT = Path(__file__).parents[4]
NOBODY = 65534
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="expected: only root can give files away")


def seen(client: Client, *names: str) -> tuple[str, int, int]:
    found = client.stat(*names)
    return f"{found.mode:o}", found.uid, found.gid


def on_host(path: Path) -> tuple[str, int, int]:
    found = path.lstat()
    return f"{found.st_mode:o}", found.st_uid, found.st_gid


def us() -> tuple[int, int]:
    return os.geteuid(), os.getegid()


def number(path: Path, name: str) -> int:
    return int(struct.unpack("<I", os.getxattr(path, f"user.virtfs.{name}"))[0])


@contextlib.contextmanager
def unprivileged(directory: Path, owner: str) -> Iterator[tuple[Client, Path]]:
    """The server as a program of the user nobody, and a client of it."""
    directory.chmod(0o755)
    export = directory / "export"
    export.mkdir()
    os.chown(export, NOBODY, NOBODY)
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        words = [sys.executable, "-m", "vm.filesystems.ninep", "--serve-fd", str(fd), "--export", str(export)]
        process = subprocess.Popen(
            [*words, "--owner", owner], pass_fds=[fd], cwd=ROOT, user=NOBODY, group=NOBODY, extra_groups=[]
        )
    client = Client(ours, uid=7)
    try:
        yield client, export
    finally:
        client.close()
        assert process.wait(30) == 0


@root_only
def test_passthrough_is_what_the_host_has(export: Path) -> None:
    with site(export, "passthrough") as place:
        client = place.client(1000)
        client.store("file", b"", mode=0o644)
        client.mkdir("dir", gid=7)
        client.symlink("link", "file")
        assert seen(client, "file") == on_host(export / "file") == ("100644", 1000, 0)
        assert on_host(export / "dir") == ("40755", 1000, 7)
        assert on_host(export / "link") == ("120777", 1000, 0)
        client.chown("file", 1234, 2345)
        client.chmod("file", 0o4755)
        assert seen(client, "file") == on_host(export / "file") == ("104755", 1234, 2345)
        client.chown("link", 5, 6)
        assert on_host(export / "link")[1:] == (5, 6) and on_host(export / "file")[1:] == (1234, 2345)
        client.set("file", valid=m.SET_GID, gid=9)
        assert on_host(export / "file")[1:] == (1234, 9)


def test_squash_says_one_owner_for_all(export: Path) -> None:
    (export / "theirs").touch()
    with site(export, "squash:501:20") as place:
        client = place.client(1000)
        client.store("file", b"", mode=0o640)
        assert seen(client, "theirs")[1:] == (501, 20) and seen(client, "file") == ("100640", 501, 20)
        assert on_host(export / "file") == ("100640", *us())
        client.chown("file", 501, 20)
        refused(errno.EPERM, client.chown, "file", 1234, 2345)
        client.chmod("file", 0o4755)
        assert seen(client, "file")[0] == on_host(export / "file")[0] == "100755", "nobody becomes the server"
        client.mkdir("dir", mode=0o7755)
        assert on_host(export / "dir")[0] == "43755"


def test_mapped_keeps_everything_in_attributes(export: Path) -> None:
    (export / "theirs").write_bytes(b"")
    (export / "theirs").chmod(0o644)
    before = on_host(export / "theirs")
    with site(export, "mapped") as place:
        client = place.client(1000)
        client.store("file", b"data", mode=0o640)
        assert seen(client, "file") == ("100640", 1000, 0) and on_host(export / "file") == ("100600", *us())
        client.chown("file", 1234, 2345)
        client.chmod("file", 0o4755)
        assert seen(client, "file") == ("104755", 1234, 2345) and on_host(export / "file") == ("100600", *us())
        assert [number(export / "file", name) for name in ("uid", "gid", "mode")] == [1234, 2345, 0o104755]
        client.mkdir("dir", mode=0o1777, gid=3)
        assert seen(client, "dir") == ("41777", 1000, 3) and on_host(export / "dir") == ("40700", *us())
        assert seen(client, "theirs") == before and on_host(export / "theirs") == before
        client.chown("theirs", 501, 20)
        assert seen(client, "theirs") == ("100644", 501, 20) and on_host(export / "theirs") == before
        assert client.xattr("file", "") == b"", "what we keep is not for guests"


def test_mapped_links_and_fifos_are_plain_files(export: Path) -> None:
    with site(export, "mapped") as place:
        client = place.client(1000)
        client.symlink("link", "/etc/passwd")
        client.mknod("fifo", stat.S_IFIFO | 0o620)
        client.mknod("socket", stat.S_IFSOCK | 0o600)
        client.store("file", b"")
        refused(errno.EPERM, client.mknod, "device", stat.S_IFCHR | 0o600, 1, 3)
        assert seen(client, "link") == ("120777", 1000, 0) and client.stat("link").size == 11
        assert client.readlink("link") == b"/etc/passwd" and client.stat("link").qid.kind == m.QTSYMLINK
        assert seen(client, "fifo") == ("10620", 1000, 0) and seen(client, "socket")[0] == "140600"
        assert on_host(export / "link") == on_host(export / "fifo") == ("100600", *us())
        assert (export / "link").read_bytes() == b"/etc/passwd"
        refused(errno.ELOOP, client.open, "link")
        refused(errno.ENXIO, client.open, "fifo", flags=os.O_RDWR)
        refused(errno.EINVAL, client.readlink, "file")
        kinds = {name: kind for _, _, kind, name in client.entries(client.open())}
        assert kinds[b"link"] == kinds[b"file"] == 0, "clients must look"
        client.chown("link", 5, 6)
        client.chmod("fifo", 0o666)
        assert seen(client, "link") == ("120777", 5, 6) and seen(client, "fifo")[0] == "10666"


def test_mapped_as_qemu_left_it(export: Path) -> None:
    """A device of QEMU's is seen; what cannot be believed is not."""
    for name, mode in (("device", stat.S_IFCHR | 0o600), ("liar", stat.S_IFDIR | 0o755), ("short", 0)):
        (export / name).touch(0o600)
        os.setxattr(export / name, "user.virtfs.mode", struct.pack("<I", mode)[: 2 if name == "short" else 4])
    os.setxattr(export / "device", "user.virtfs.rdev", struct.pack("<Q", os.makedev(1, 3)))
    (export / "dir").mkdir()
    os.setxattr(export / "dir", "user.virtfs.mode", struct.pack("<I", stat.S_IFLNK | 0o700))
    with site(export, "mapped") as place:
        client = place.client()
        assert seen(client, "device")[0] == "20600" and client.stat("device").rdev == os.makedev(1, 3)
        assert seen(client, "liar")[0] == "100755" and seen(client, "dir")[0] == "40700"
        assert seen(client, "short")[0] == "100600"
        refused(errno.ENXIO, client.open, "device")


def test_requester_who_asks_owns_it_until_a_chown(export: Path) -> None:
    (export / "theirs").touch(0o644)
    with site(export, "requester") as place:
        root, user = place.client(0), place.client(1000)
        user.store("file", b"", mode=0o640)
        user.symlink("link", "file")
        for name in ("theirs", "file", "link"):
            assert seen(root, name)[1:] == (0, 0) and seen(user, name)[1:] == (1000, 1000)
        assert on_host(export / "file") == ("100640", *us())
        root.chown("file", 1234, 2345)
        for client in (root, user):
            assert seen(client, "file") == ("100640", 1234, 2345)
        assert on_host(export / "file") == ("100640", *us())
        root.set("theirs", valid=m.SET_GID, gid=7)
        assert seen(root, "theirs")[1:] == (0, 7) and seen(user, "theirs")[1:] == (1000, 7)
        root.chmod("file", 0o4711)
        assert on_host(export / "file")[0] == "100711"
        root.chown("link", 1, 1)
        assert seen(user, "link")[1:] == (1000, 1000), "there is nowhere to keep that"


def test_requester_lets_everybody_into_the_folder_itself(export: Path) -> None:
    export.chmod(0o750)
    with site(export, "requester") as place:
        client = place.client(77)
        assert seen(client) == ("40777", 77, 77) and on_host(export)[0] == "40750"
        fid = client.walk()
        client.call(m.Tsetattr(1, fid, m.SET_UID, uid=5), m.Rsetattr)
        assert seen(client) == ("40750", 5, 77)


def test_requester_by_attach_on_one_connection(export: Path) -> None:
    """As Linux does with access=user; and a client without users is told what the host has."""
    (export / "file").touch()
    with site(export, "requester") as place:
        client = place.client(0)
        client.attach(1000, 77)
        client.attach(1001, m.NONUNAME)
        assert client.stat("file", begin=1000).uid == 77
        assert client.stat("file", begin=1001).uid == os.geteuid()
        assert client.stat("file").uid == 0


@pytest.mark.parametrize("owner", ["passthrough", "mapped", "requester"])
def test_what_cannot_be_given_its_owner_is_not_made(export: Path, owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no room for an attribute")

    with site(export, owner) as place:
        client = place.client()
        monkeypatch.setattr(place.server.share.owners, "created", full)
        for what in (
            lambda: client.create("file"),
            lambda: client.mkdir("dir"),
            lambda: client.symlink("link", "x"),
            lambda: client.mknod("fifo", stat.S_IFIFO | 0o600),
        ):
            refused(errno.ENOSPC, what)
        assert list(export.iterdir()) == []


@root_only
def test_requester_keeps_a_chown_of_a_file_that_its_user_may_not_write() -> None:
    with tempfile.TemporaryDirectory() as place, unprivileged(Path(place), "requester") as (client, export):
        for mode in (0o444, 0o000):
            client.store(f"{mode:o}", b"", mode=mode)
            client.chown(f"{mode:o}", 1234, 2345)
            assert stat.S_IMODE((export / f"{mode:o}").stat().st_mode) == mode
        assert seen(client, "444") == ("100444", 1234, 2345)
        assert seen(client, "0") == ("100000", 7, 7), "what cannot be read is as if it were not there"


@root_only
@pytest.mark.parametrize("owner", ["passthrough", "mapped"])
def test_a_server_without_root(owner: str) -> None:
    with tempfile.TemporaryDirectory() as place, unprivileged(Path(place), owner) as (client, export):
        client.store("file", b"data", mode=0o644)
        (export / "theirs").touch(0o600)
        refused(errno.EACCES, client.open, "theirs")
        if owner == "passthrough":
            assert seen(client, "file") == ("100644", NOBODY, NOBODY)
            refused(errno.EPERM, client.chown, "file", 1234, 2345)
        else:
            client.chown("file", 1234, 2345)
            assert seen(client, "file") == ("100644", 1234, 2345)
            assert on_host(export / "file") == ("100600", NOBODY, NOBODY)
            refused(errno.EACCES, client.chown, "theirs", 1, 1)


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Path]:
    """A file system without extended attributes of users: /proc has none, nor anything that could be written."""
    yield Path("/proc/self")


def test_mapped_needs_attributes(plain: Path) -> None:
    with pytest.raises(ConfigError, match="use requester, squash:UID:GID or passthrough"):
        Share(plain, parse_owner("mapped"))


def test_requester_does_without(plain: Path) -> None:
    with site(plain, "requester", read_only=True) as place:
        assert place.client(77).stat("status").uid == 77


def test_words() -> None:
    for text in ("passthrough", "mapped", "requester", "squash:0:4294967294"):
        assert str(parse_owner(text)) == text
    for text in ("", "root", "squash", "squash:1", "squash:1:-1", "squash:1:4294967295", "mapped:1", "squash:1:2:3"):
        with pytest.raises(ConfigError, match="--owner"):
            parse_owner(text)
