"""A guest that wants out of its folder, and a host whose files move about while it looks."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site
from tests.vm.filesystems.ninep.test_session import refused
from vm.filesystems.ninep import beneath
from vm.filesystems.ninep import messages as m
from vm.filesystems.ninep.limits import Limits
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep.share import Share

SECRET = b"not for guests"


@pytest.fixture
def outside(export: Path) -> Path:
    """A directory beside the folder, with a secret in it."""
    made = export.parent / "outside"
    made.mkdir()
    (made / "secret").write_bytes(SECRET)
    return made


@pytest.fixture(params=[beneath.find_by_openat2, beneath.find_by_steps], ids=["openat2", "steps"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[int, bytes], int]:
    """With the kernel's help and without."""
    if request.param is beneath.find_by_openat2 and beneath.find is not beneath.find_by_openat2:
        pytest.skip("expected: no openat2 before Linux 5.6")
    monkeypatch.setattr(beneath, "find", request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [b"..", b".", b"", b"a/b", b"/etc", b"a\0b", b"../outside", b"x" * 256])
def test_names_that_are_none(client: Client, export: Path, outside: Path, name: bytes) -> None:
    (export / "a").mkdir()
    (export / "a" / "b").touch()
    fid = client.walk("a", "b")
    for what in (
        lambda: client.create(name),
        lambda: client.mkdir(name),
        lambda: client.symlink(name, "x"),
        lambda: client.mknod(name, 0o100600),
        lambda: client.link(fid, name),
        lambda: client.unlink(name),
        lambda: client.unlink(name, m.AT_REMOVEDIR),
        lambda: client.rename(name, "new"),
        lambda: client.rename("a", name),
        lambda: client.call(m.Trename(1, fid, 0, name), m.Rrename),
    ):
        with pytest.raises(OSError) as caught:
            what()
        assert caught.value.errno in (errno.EINVAL, errno.EEXIST, errno.ENAMETOOLONG)
    if name not in (b"..", b"."):
        with pytest.raises(OSError):
            client.walk(name)
    assert sorted(path.name for path in export.iterdir()) == ["a"] and (export / "a" / "b").exists()
    assert sorted(path.name for path in export.parent.iterdir()) == ["export", "outside"]


def test_up_from_the_root_is_the_root(client: Client, export: Path, outside: Path) -> None:
    root = client.stat().qid.path
    assert client.stat("..").qid.path == client.stat(*[".."] * 40).qid.path == root
    refused(errno.ENOENT, client.walk, "..", "..", "outside")
    (export / "a").mkdir()
    assert client.stat("a", "..", "..").qid.path == root
    entries = {name: qid for qid, _, _, name in client.entries(client.open())}
    assert entries[b".."].path == root, "the inode of what is above is not told"


@pytest.mark.parametrize("target", ["/etc", "{outside}", "../outside", "/proc/self/root"])
def test_links_of_the_host_are_not_followed(client: Client, export: Path, outside: Path, target: str) -> None:
    (export / "link").symlink_to(target.format(outside=outside))
    (export / "dir").mkdir()
    assert client.stat("link").qid.kind == m.QTSYMLINK
    with pytest.raises(OSError):
        client.walk("link", "secret")
    fid = client.walk("link")
    for what in (
        lambda: client.open("link"),
        lambda: client.open("link", flags=os.O_WRONLY | os.O_TRUNC),
        lambda: client.open("link", flags=os.O_RDONLY | os.O_DIRECTORY),
        lambda: client.create("link"),
        lambda: client.create("new", begin=fid),
        lambda: client.mkdir("new", begin=fid),
        lambda: client.unlink("secret", begin=fid),
        lambda: client.rename("secret", "new", begin=fid),
        lambda: client.set("link", valid=m.SET_SIZE, size=0),
        lambda: client.set_xattr("link", "user.x", b"1"),
    ):
        with pytest.raises(OSError) as caught:
            what()
        assert caught.value.errno in (errno.ELOOP, errno.ENOTDIR, errno.EPERM, errno.EINVAL), caught.value
    assert (outside / "secret").read_bytes() == SECRET and list(outside.iterdir()) == [outside / "secret"]


def test_what_is_done_to_a_link_is_done_to_the_link(client: Client, export: Path, outside: Path) -> None:
    before = (outside / "secret").stat()
    (export / "link").symlink_to(outside / "secret")
    client.set("link", valid=m.SET_MTIME | m.SET_MTIME_TO, mtime_sec=5)
    if os.geteuid() == 0:
        client.chown("link", 77, 77)
        assert (export / "link").lstat().st_uid == 77
    refused(errno.EOPNOTSUPP, client.chmod, "link", 0o777)
    client.link(client.walk("link"), "second")
    client.rename("link", "third")
    client.unlink("third")
    assert (export / "second").is_symlink()
    after = (outside / "secret").stat()
    assert (after.st_mode, after.st_uid, after.st_mtime_ns, after.st_nlink) == (
        before.st_mode,
        before.st_uid,
        before.st_mtime_ns,
        before.st_nlink,
    )


def test_a_link_that_a_guest_made_leads_the_server_nowhere(client: Client, export: Path, outside: Path) -> None:
    client.symlink("evil", str(outside))
    client.symlink("relative", "../outside/secret")
    for name in ("evil", "relative"):
        refused(errno.ELOOP, client.open, name)
        with pytest.raises(OSError):
            client.walk(name, "secret")
    with pytest.raises(OSError):
        client.create("secret", begin=client.walk("evil"))
    refused(errno.EINVAL, client.symlink, "empty", "")
    refused(errno.EINVAL, client.symlink, "nul", b"a\0b")
    refused(errno.ENAMETOOLONG, client.symlink, "long", b"x" * 4096)


@contextlib.contextmanager
def flipping(one: Path, other: Path) -> Iterator[None]:
    """A thread that exchanges two names all the time."""
    over = threading.Event()

    def flip() -> None:
        spare = one.parent / "spare"
        while not over.is_set():
            one.rename(spare)
            other.rename(one)
            spare.rename(other)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def test_a_directory_that_becomes_a_link_while_it_is_walked(client: Client, export: Path, outside: Path) -> None:
    """The race that following names loses: nothing of what is outside is ever read or written."""
    (export / "dir").mkdir()
    (export / "dir" / "secret").write_bytes(b"inside")
    (export / "link").symlink_to(outside)
    found = 0
    with flipping(export / "dir", export / "link"):
        for number in range(400):
            with contextlib.suppress(OSError):
                assert client.load("dir", "secret") == b"inside"
                found += 1
            with contextlib.suppress(OSError):
                client.store(f"new{number}", b"x", begin=client.walk("dir"))
            with contextlib.suppress(OSError):
                client.chmod("dir", 0o755)
    assert found, "sometimes it was the directory"
    assert list(outside.iterdir()) == [outside / "secret"] and (outside / "secret").read_bytes() == SECRET


def test_a_file_that_becomes_a_link_while_it_is_opened(client: Client, export: Path, outside: Path) -> None:
    (export / "file").write_bytes(b"inside")
    (export / "link").symlink_to(outside / "secret")
    with flipping(export / "file", export / "link"):
        for _ in range(400):
            with contextlib.suppress(OSError):
                fid = client.create("file", flags=os.O_RDWR)
                assert client.read(fid) in (b"inside", b""), "or made anew while there was neither"
                client.write(fid, b"inside")
                client.clunk(fid)
    assert (outside / "secret").read_bytes() == SECRET


def test_a_directory_moved_up_while_a_guest_is_below_it(client: Client, export: Path, outside: Path) -> None:
    """The classic way out: `..` from where a directory was moved to. Here `..` is where the guest came from."""
    (export / "a" / "b").mkdir(parents=True)
    deep = client.walk("a", "b")
    (export / "a" / "b").rename(outside / "b")
    assert client.stat("..", "..", "..", begin=deep).qid == client.stat().qid
    with pytest.raises(OSError):
        client.walk("..", "secret", begin=deep)
    with pytest.raises(OSError):
        client.walk("..", "..", "outside", begin=deep)


def test_hard_links_count_and_stay_within(client: Client, export: Path, outside: Path) -> None:
    client.store("file", b"1")
    fid = client.walk("file")
    client.unlink("file")
    refused(errno.ENOENT, client.link, fid, "again")
    refused(errno.ENOENT, client.call, m.Trename(1, fid, 0, b"again"), m.Rrename)


def test_what_something_else_has_replaced_is_not_removed_by_fid(client: Client, export: Path) -> None:
    client.store("file", b"1")
    fid = client.walk("file")
    (export / "file").rename(export / "moved")
    (export / "file").write_bytes(b"another")
    refused(errno.ESTALE, client.call, m.Trename(1, fid, 0, b"new"), m.Rrename)
    refused(errno.ESTALE, client.call, m.Tremove(1, fid), m.Rremove)
    assert (export / "file").read_bytes() == b"another" and (export / "moved").read_bytes() == b"1"


def test_what_is_put_in_the_place_of_a_new_directory_is_not_given_away(
    client: Client, export: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program of the host is faster than the server's second look."""
    real = os.mkdir

    def exchanged(name: bytes, mode: int, *, dir_fd: int) -> None:
        real(name, mode, dir_fd=dir_fd)
        os.rmdir(name, dir_fd=dir_fd)
        os.symlink(outside, name, dir_fd=dir_fd)

    monkeypatch.setattr(os, "mkdir", exchanged)
    before = outside.stat()
    refused(errno.ESTALE, client.mkdir, "dir", 0o777)
    assert (export / "dir").is_symlink() and outside.stat() == before


@pytest.mark.parametrize("owner", ["passthrough", "mapped", "requester"])
def test_with_few_descriptors_files_are_found_again(export: Path, owner: str) -> None:
    """Names are what is left of most; they follow renames by clients, and never lead to another file."""
    with site(export, owner, limits=Limits(descriptors=32)) as place:
        client = place.client()
        client.mkdir("dir")
        directory = client.walk("dir")
        fids = []
        for number in range(100):
            client.store(str(number), str(number).encode(), begin=directory)
            fids.append(client.walk("dir", str(number)))
        assert place.server.share.nodes.descriptors <= 16 and place.server.share.nodes.evicted > 50
        client.rename("dir", "renamed")
        for number, fid in enumerate(fids):
            client.call(m.Tlopen(1, new := client.walk(begin=fid), os.O_RDONLY), m.Rlopen)
            assert client.read(new) == str(number).encode()
            client.clunk(new)
        inner = export / "renamed"
        (inner / "0").unlink()
        (inner / "1").rename(inner / "01")
        (inner / "1").write_bytes(b"another")
        (inner / "2").rename(inner / "02")
        (inner / "2").symlink_to("02")
        for fid in fids[:3]:
            refused(errno.ESTALE, client.getattr, fid)
        client.unlink("99", begin=client.walk("renamed"))
        assert client.getattr(fids[99]).nlink == 0, "what a client removes keeps its descriptor"
        for fid in fids[3:98]:
            client.getattr(fid)
        assert client.getattr(fids[99]).nlink == 0
        assert place.server.share.nodes.stale == 3
        for fid in (*fids, directory):
            client.clunk(fid)
        client.store("last", b"")


def test_descriptors_are_given_back(place: Site, client: Client, export: Path) -> None:
    for number in range(50):
        (export / str(number)).touch()
    before = len(os.listdir("/proc/self/fd"))
    fids = [client.walk(str(number)) for number in range(50)] + [client.open(str(number)) for number in range(50)]
    assert len(os.listdir("/proc/self/fd")) == before + 100
    for fid in fids:
        client.clunk(fid)
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(place.server.share.nodes) == place.server.share.nodes.descriptors == 1


def test_folders_that_cannot_be_served(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(ConfigError, match="--export"):
            Share(path, parse_owner("passthrough"))


def test_find_goes_down_and_nowhere_else(tmp_path: Path, way: Callable[[int, bytes], int]) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").touch()
    (tmp_path / "up").symlink_to("a")
    directory = os.open(tmp_path, os.O_PATH)
    try:
        os.close(way(directory, b"a/b/c"))
        os.close(way(directory, b"up"))
        for path in (b"a/../..", b"..", b"/", b"/etc/passwd", b"up/b", b"a/b/c/d", b"none", b""):
            with pytest.raises(OSError):
                os.close(way(directory, path))
    finally:
        os.close(directory)
