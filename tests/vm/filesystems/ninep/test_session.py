"""A folder by 9P2000.L: what a client can do with its files."""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep import wire

SECOND = 1_000_000_000


def refused(number: int, what: Callable[..., object], *args: object, **more: object) -> None:
    with pytest.raises(OSError) as caught:
        what(*args, **more)
    assert errno.errorcode[caught.value.errno or 0] == errno.errorcode[number]


def test_a_file_is_made_written_and_read(client: Client, export: Path) -> None:
    fid = client.create("new", mode=0o640)
    assert client.write(fid, b"hello ") == 6
    assert client.write(fid, b"world", 6) == 5
    assert client.read(fid, 3, 5) == b"lo wo"
    assert client.read(fid, 11) == b""
    client.clunk(fid)
    assert (export / "new").read_bytes() == b"hello world"
    assert stat.S_IMODE((export / "new").stat().st_mode) == 0o640
    assert client.load("new") == b"hello world"


def test_the_mode_is_the_clients_whatever_the_umask(client: Client, export: Path) -> None:
    mask = os.umask(0o077)
    try:
        client.store("file", b"", mode=0o666)
        client.mkdir("dir", mode=0o777)
        client.mknod("fifo", stat.S_IFIFO | 0o622)
    finally:
        os.umask(mask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in export.iterdir()}
    assert modes == {"file": 0o666, "dir": 0o777, "fifo": 0o622}


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        pytest.param(0, b"old", id="an existing file is opened"),
        pytest.param(os.O_TRUNC, b"", id="and cut if that is asked for"),
        pytest.param(os.O_EXCL, None, id="but not where it must be new"),
    ],
)
def test_create(client: Client, export: Path, flags: int, found: bytes | None) -> None:
    (export / "file").write_bytes(b"old")
    if found is None:
        refused(errno.EEXIST, client.create, "file", flags=os.O_RDWR | flags)
    else:
        assert client.read(client.create("file", flags=os.O_RDWR | flags)) == found


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("piece", [1 << 20, 70_001, 4099])
def test_long_messages_among_short_ones(
    export: Path, piece: int, new_loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """However they are cut on their way."""
    parts = [
        bytes([number]) * length for number, length in enumerate((300_000, 1, 65_513, 65_514, 0, 200_000, 500_000))
    ]
    with site(export, new_loop=new_loop) as place:
        client = place.client()
        fid = client.create("file")
        requests: list[m.Message] = []
        at = 0
        for number, part in enumerate(parts):
            requests += [m.Twrite(100 + number, fid, at, part), m.Tgetattr(200 + number, fid, 0)]
            at += len(part)
        octets = b"".join(map(wire.emit, requests))
        for begin in range(0, len(octets), piece):
            client.sock.sendall(octets[begin : begin + piece])
        answers = {reply.tag: reply for reply in (client.receive() for _ in requests)}
        for number, part in enumerate(parts):
            assert answers[100 + number] == m.Rwrite(100 + number, len(part))
            assert isinstance(answers[200 + number], m.Rgetattr)
    assert (export / "file").read_bytes() == b"".join(parts)


def test_append_and_truncate(client: Client, export: Path) -> None:
    (export / "log").write_bytes(b"one\n")
    fid = client.open("log", flags=os.O_WRONLY | os.O_APPEND)
    client.write(fid, b"two\n", 0)
    assert (export / "log").read_bytes() == b"one\ntwo\n"
    client.set("log", valid=m.SET_SIZE, size=3)
    assert (export / "log").read_bytes() == b"one"
    client.clunk(client.open("log", flags=os.O_WRONLY | os.O_TRUNC))
    assert (export / "log").read_bytes() == b""


def test_a_file_opened_for_writing_is_cut_though_it_is_read_only_by_now(client: Client, export: Path) -> None:
    fid = client.create("file", mode=0o444)
    client.write(fid, b"12345")
    client.call(m.Tsetattr(1, fid, m.SET_SIZE, size=2), m.Rsetattr)
    assert (export / "file").read_bytes() == b"12"


def test_what_is_removed_lives_on_for_who_has_it(client: Client, export: Path) -> None:
    fid = client.create("file")
    client.write(fid, b"data")
    also = client.walk("file")
    client.unlink("file")
    assert client.read(fid) == b"data"
    assert client.getattr(also).nlink == 0, "not opened, and still the same file"
    assert client.getattr(also).size == 4
    client.store("file", b"another")
    assert client.read(fid) == b"data"
    client.call(m.Tlopen(1, also, os.O_RDONLY), m.Rlopen)
    assert client.read(also) == b"data"


def test_attributes(client: Client, export: Path) -> None:
    path = export / "file"
    path.write_bytes(b"x" * 5000)
    os.utime(path, ns=(3 * SECOND + 1, -2 * SECOND + 7))
    found, real = client.stat("file"), path.stat()
    assert (found.mode, found.uid, found.gid, found.nlink) == (real.st_mode, real.st_uid, real.st_gid, 1)
    assert (found.size, found.blksize, found.blocks) == (5000, real.st_blksize, real.st_blocks)
    assert (found.atime_sec, found.atime_nsec, found.mtime_nsec) == (3, 1, 7)
    assert found.mtime_sec == (1 << 64) - 2, "before 1970"
    assert found.qid.path == real.st_ino
    assert (found.ctime_sec, found.ctime_nsec) == divmod(real.st_ctime_ns, SECOND)
    assert client.stat().qid.kind == m.QTDIR


def test_times(client: Client, export: Path) -> None:
    path = export / "file"
    path.write_bytes(b"")
    both = m.SET_ATIME | m.SET_MTIME | m.SET_ATIME_TO | m.SET_MTIME_TO
    client.set("file", valid=both, atime_sec=5, atime_nsec=6, mtime_sec=(1 << 64) - 1, mtime_nsec=8)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5 * SECOND + 6, -SECOND + 8)
    client.set("file", valid=m.SET_MTIME | m.SET_MTIME_TO, mtime_sec=9)
    assert (path.stat().st_atime_ns, path.stat().st_mtime_ns) == (5 * SECOND + 6, 9 * SECOND)
    before = path.stat().st_ctime_ns
    client.set("file", valid=m.SET_ATIME)
    assert path.stat().st_atime_ns >= before - SECOND and path.stat().st_mtime_ns == 9 * SECOND
    client.set("file", valid=m.SET_ATIME | m.SET_MTIME)
    assert path.stat().st_mtime_ns >= before - SECOND


def test_directories(client: Client, export: Path) -> None:
    client.mkdir("a", mode=0o700)
    inner = client.walk("a")
    client.mkdir("b", begin=inner)
    client.store("c", b"1", begin=inner)
    assert client.list("a") == [b"b", b"c"]
    refused(errno.EEXIST, client.mkdir, "a")
    refused(errno.ENOTEMPTY, client.unlink, "a", m.AT_REMOVEDIR)
    refused(errno.EISDIR, client.unlink, "a")
    refused(errno.ENOTDIR, client.unlink, "c", m.AT_REMOVEDIR, begin=inner)
    refused(errno.EISDIR, client.open, "a", flags=os.O_RDWR)
    refused(errno.EINVAL, client.unlink, "c", 0x800, begin=inner)
    client.unlink("b", m.AT_REMOVEDIR, begin=inner)
    client.unlink("c", begin=inner)
    client.unlink("a", m.AT_REMOVEDIR)
    assert list(export.iterdir()) == []


@pytest.mark.parametrize("count", [100, 4096, 1 << 20])
def test_a_large_directory_is_read_in_pieces(client: Client, export: Path, count: int) -> None:
    names = {f"{number}-{'x' * (number % 50)}".encode() for number in range(1000)}
    for name in names:
        os.close(os.open(export / os.fsdecode(name), os.O_CREAT | os.O_WRONLY))
    (export / "dir").mkdir()
    (export / "link").symlink_to("dir")
    fid = client.open()
    entries = {name: (qid, kind) for qid, _, kind, name in client.entries(fid, count)}
    assert set(entries) == names | {b".", b"..", b"dir", b"link"}
    assert entries[b"dir"][1] == 4 and entries[b"link"][1] == 10 and entries[next(iter(names))][1] == 8
    assert entries[b"dir"][0].path == (export / "dir").stat().st_ino
    (export / "late").touch()
    assert b"late" in {name for *_, name in client.entries(fid, count)}, "it is read anew from the beginning"


def test_removing_while_reading_misses_nothing(client: Client, export: Path) -> None:
    for number in range(500):
        (export / str(number)).touch()
    fid = client.open()
    for *_, name in client.entries(fid, 1000):
        if name not in (b".", b".."):
            client.unlink(name)
    assert list(export.iterdir()) == []


def test_reading_a_directory_from_where_no_entry_is(client: Client, export: Path) -> None:
    fid = client.open()
    refused(errno.EINVAL, client.call, m.Treaddir(1, fid, 0, 10), m.Rreaddir)
    assert len(list(client.entries(fid))) == 2
    refused(errno.EINVAL, client.call, m.Treaddir(1, fid, 1, 1000), m.Rreaddir)
    assert client.call(m.Treaddir(1, fid, 1 << 63, 1000), m.Rreaddir).data == b""
    refused(errno.EISDIR, client.read, fid)


def test_links(client: Client, export: Path) -> None:
    client.store("file", b"data")
    client.symlink("link", "/no/where")
    assert os.readlink(export / "link") == "/no/where"
    assert client.readlink("link") == b"/no/where"
    assert client.stat("link").qid.kind == m.QTSYMLINK
    refused(errno.EINVAL, client.readlink, "file")
    client.link(client.walk("file"), "second")
    assert client.stat("second").nlink == 2 and client.stat("second").qid == client.stat("file").qid
    client.link(client.walk("link"), "third")
    assert os.readlink(export / "third") == "/no/where", "the link itself, not what it leads to"
    client.mkdir("dir")
    refused(errno.EPERM, client.link, client.walk("dir"), "fourth")
    refused(errno.EEXIST, client.link, client.walk("file"), "second")


def test_renames(client: Client, export: Path) -> None:
    client.store("a", b"a")
    client.store("b", b"b")
    client.mkdir("dir")
    known = client.walk("a")
    client.rename("a", "b")
    assert client.list() == [b"b", b"dir"] and client.load("b") == b"a"
    client.rename("b", "c", end=client.walk("dir"))
    assert client.load("dir", "c") == b"a"
    client.call(m.Trename(1, known, 0, b"again"), m.Rrename)
    assert client.list() == [b"again", b"dir"], "the fid went along"
    refused(errno.ENOENT, client.rename, "none", "other")
    refused(errno.EISDIR, client.rename, "again", "dir")
    refused(errno.EINVAL, client.rename, "dir", "dir", end=client.walk("dir"))
    client.rename("again", "again")
    client.call(m.Tremove(1, known), m.Rremove)
    assert client.list() == [b"dir"]
    refused(errno.EBADF, client.clunk, known)
    refused(errno.EBUSY, client.call, m.Tremove(1, 0), m.Rremove)


def test_walks(client: Client, export: Path) -> None:
    (export / "a" / "b").mkdir(parents=True)
    assert client.walk("a", "b") and client.walk("a", "b", "..", "..")
    assert client.stat("a", "..").qid == client.stat().qid
    part = client.call(m.Twalk(1, 0, 99, (b"a", b"none", b"b")), m.Rwalk)
    assert len(part.qids) == 1
    refused(errno.EBADF, client.clunk, 99)
    refused(errno.ENOENT, client.walk, "none")
    fid = client.walk("a")
    client.call(m.Twalk(1, fid, fid, (b"b",)), m.Rwalk)
    assert client.getattr(fid).qid.path == (export / "a" / "b").stat().st_ino
    refused(errno.EBADF, client.call, m.Twalk(1, 0, fid, ()), m.Rwalk)
    refused(errno.EBADF, client.call, m.Twalk(1, 0, m.NOFID, ()), m.Rwalk)
    opened = client.open("a")
    refused(errno.EBUSY, client.call, m.Twalk(1, opened, opened, (b"b",)), m.Rwalk)
    client.walk("b", begin=opened)


def test_special_files(client: Client, export: Path) -> None:
    client.mknod("fifo", stat.S_IFIFO | 0o600)
    client.mknod("socket", stat.S_IFSOCK | 0o600)
    client.mknod("plain", stat.S_IFREG | 0o600)
    kinds = {path.name: stat.S_IFMT(path.lstat().st_mode) for path in export.iterdir()}
    assert kinds == {"fifo": stat.S_IFIFO, "socket": stat.S_IFSOCK, "plain": stat.S_IFREG}
    for kind in (stat.S_IFCHR, stat.S_IFBLK):
        refused(errno.EPERM, client.mknod, "device", kind | 0o600, 1, 3)
    refused(errno.EINVAL, client.mknod, "what", stat.S_IFDIR | 0o600)
    for name in ("fifo", "socket"):
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            refused(errno.ENXIO, client.open, name, flags=flags)


def test_a_device_on_the_host_is_seen_and_never_opened(client: Client, export: Path) -> None:
    if os.geteuid():
        pytest.skip("expected: only root makes devices")
    os.mknod(export / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    assert client.stat("null").rdev == os.makedev(1, 3)
    refused(errno.ENXIO, client.open, "null")
    refused(errno.ENXIO, client.create, "null")
    refused(errno.EINVAL, client.set, "null", valid=m.SET_SIZE, size=0)


def test_names_are_octets(client: Client, export: Path) -> None:
    for name in (b"\xff\xfe", "größe".encode(), b"new\nline", b"x" * 255, b" "):
        client.store(name, name)
        assert client.load(name) == name
        assert os.path.exists(os.fsencode(export) + b"/" + name)
    assert b"\xff\xfe" in client.list()


def test_extended_attributes_of_users(client: Client, export: Path) -> None:
    client.store("file", b"")
    client.set_xattr("file", "user.a", b"1" * 1000)
    assert os.getxattr(export / "file", "user.a") == b"1" * 1000
    assert client.xattr("file", "user.a") == b"1" * 1000
    assert client.xattr("file", "") == b"user.a\0"
    client.set_xattr("file", "user.b", b"")
    assert client.xattr("file", "user.b") == b""
    refused(errno.EEXIST, client.set_xattr, "file", "user.a", b"2", m.XATTR_CREATE)
    refused(errno.ENODATA, client.set_xattr, "file", "user.c", b"2", m.XATTR_REPLACE)
    client.set_xattr("file", "user.a", b"", m.XATTR_REPLACE)
    refused(errno.ENODATA, client.xattr, "file", "user.a")
    for name in ("security.capability", "system.posix_acl_access", "trusted.x", "user.virtfs.uid"):
        refused(errno.EOPNOTSUPP, client.xattr, "file", name)
        refused(errno.EOPNOTSUPP, client.set_xattr, "file", name, b"\0\0\0\0")
    refused(errno.E2BIG, client.call, m.Txattrcreate(1, client.walk("file"), b"user.x", 1 << 40, 0), m.Rxattrcreate)


def test_an_attribute_that_was_written_in_part_is_not_set(client: Client, export: Path) -> None:
    client.store("file", b"")
    fid = client.walk("file")
    client.call(m.Txattrcreate(1, fid, b"user.x", 10, 0), m.Rxattrcreate)
    client.write(fid, b"12345")
    refused(errno.EINVAL, client.write, fid, b"9", 7)
    refused(errno.ENOSPC, client.write, fid, b"678901", 5)
    refused(errno.EBADF, client.read, fid)
    refused(errno.EINVAL, client.clunk, fid)
    refused(errno.EBADF, client.clunk, fid)
    assert os.listxattr(export / "file") == []


def test_fsync_and_statfs(client: Client, export: Path) -> None:
    fid = client.create("file")
    client.write(fid, b"data")
    client.call(m.Tfsync(1, fid, 0), m.Rfsync)
    client.call(m.Tfsync(1, fid, 1), m.Rfsync)
    refused(errno.EBADF, client.call, m.Tfsync(1, 0, 0), m.Rfsync)
    found, real = client.call(m.Tstatfs(1, fid), m.Rstatfs), os.statvfs(export)
    assert (found.bsize, found.blocks, found.namelen) == (real.f_frsize, real.f_blocks, real.f_namemax)


def test_locks_keep_two_guests_apart(place: Site) -> None:
    one, other = place.client(), place.client()
    mine, yours = one.create("file"), other.open("file")
    assert one.lock(mine, m.WRLCK, start=10, length=10) == m.LOCK_SUCCESS
    assert other.lock(yours, m.RDLCK) == m.LOCK_BLOCKED
    assert other.lock(yours, m.RDLCK, start=20) == m.LOCK_SUCCESS
    found = other.call(m.Tgetlock(1, yours, m.WRLCK, 0, 0, 5, b"me"), m.Rgetlock)
    assert (found.type, found.start, found.length, found.proc_id) == (m.WRLCK, 10, 10, 1)
    assert one.lock(mine, m.UNLCK, start=12, length=4) == m.LOCK_SUCCESS, "a hole in the middle"
    assert other.lock(yours, m.WRLCK, start=12, length=4) == m.LOCK_SUCCESS
    assert other.lock(yours, m.WRLCK, start=11, length=1) == m.LOCK_BLOCKED
    assert one.lock(mine, m.WRLCK, process=2, start=16, length=1) == m.LOCK_BLOCKED, "of another process"
    one.clunk(mine)
    assert other.lock(yours, m.WRLCK) == m.LOCK_SUCCESS
    assert len(place.server.share.locks) == 1
    free = other.call(m.Tgetlock(1, yours, m.WRLCK, 0, 0, 1, b"guest"), m.Rgetlock)
    assert free.type == m.UNLCK
    refused(errno.EINVAL, other.lock, yours, 3)


def test_a_guest_that_is_gone_has_no_locks(place: Site) -> None:
    one, other = place.client(), place.client()
    assert one.lock(one.create("file"), m.WRLCK) == m.LOCK_SUCCESS
    fid = other.open("file")
    one.close()
    while other.lock(fid, m.WRLCK) != m.LOCK_SUCCESS:
        pass


def test_a_share_that_is_read_only(export: Path) -> None:
    (export / "file").write_bytes(b"data")
    (export / "dir").mkdir()
    with site(export, read_only=True) as place:
        client = place.client()
        assert client.load("file") == b"data" and client.list() == [b"dir", b"file"]
        fid = client.open("file")
        assert client.lock(fid, m.WRLCK) == m.LOCK_SUCCESS
        for what in (
            lambda: client.open("file", flags=os.O_WRONLY),
            lambda: client.open("file", flags=os.O_RDONLY | os.O_TRUNC),
            lambda: client.create("new"),
            lambda: client.create("file"),
            lambda: client.mkdir("new"),
            lambda: client.symlink("new", "x"),
            lambda: client.mknod("new", stat.S_IFIFO),
            lambda: client.link(client.walk("file"), "new"),
            lambda: client.rename("file", "new"),
            lambda: client.call(m.Trename(1, client.walk("file"), 0, b"new"), m.Rrename),
            lambda: client.unlink("file"),
            lambda: client.unlink("dir", m.AT_REMOVEDIR),
            lambda: client.call(m.Tremove(1, client.walk("file")), m.Rremove),
            lambda: client.chmod("file", 0o777),
            lambda: client.chown("file", 1, 1),
            lambda: client.set("file", valid=m.SET_SIZE, size=0),
            lambda: client.set("file", valid=m.SET_MTIME),
            lambda: client.set_xattr("file", "user.x", b"1"),
        ):
            refused(errno.EROFS, what)
        refused(errno.EBADF, client.write, fid, b"x")
    assert (export / "file").read_bytes() == b"data" and sorted(path.name for path in export.iterdir()) == [
        "dir",
        "file",
    ]


def test_several_clients_at_once(place: Site, export: Path) -> None:
    clients = [place.client(uid) for uid in range(8)]
    for number, client in enumerate(clients):
        client.store(str(number), str(number).encode())
    for client in clients:
        assert client.list() == [str(number).encode() for number in range(8)]
        assert client.load("5") == b"5"
    assert {path.name: path.stat().st_uid for path in export.iterdir()} == {str(uid): uid for uid in range(8)}
