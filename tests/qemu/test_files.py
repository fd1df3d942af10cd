"""Folders of the host mounted by Linux: what its 9P client makes of what a shell does, and what our server makes of that.

One server for each way of owning files, all of them tasks of this process; the guest reaches them as it would any server on the
host's loopback. The cloud kernel of the other tests has no 9P, so this is Debian's ordinary one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.site import Site
from tests.support.machine import Machine
from tests.support.netns import HOST, inside, wait_until
from vm.filesystems.ninep.listen import FileServer
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep.share import Share

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

MOUNT_S = 30.0
MIB = 16
OPTIONS = ("version=9p2000.L", "msize=524288", "access=user")
OWNERS = ("passthrough", "squash:1001:50", "mapped", "requester")


class Server:
    """A folder for each way of owning files, and one that is read-only; in a thread that belongs to the host's namespace."""

    def __init__(self, place: Site, directory: Path) -> None:
        self.folders = {owner: directory / owner.partition(":")[0] for owner in (*OWNERS, "read-only")}
        self.ports: dict[str, int] = {}
        self._servers: dict[str, FileServer] = {}
        self._path = place.host.path
        self._ready, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(MOUNT_S)

    def _run(self) -> None:
        with inside(self._path):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            for owner, folder in self.folders.items():
                folder.mkdir()
                listener = socket.create_server(("127.0.0.1", 0))
                self.ports[owner] = listener.getsockname()[1]
                kept = parse_owner("passthrough" if owner == "read-only" else owner)
                share = Share(folder, kept, read_only=owner == "read-only")
                self._servers[owner] = await stack.enter_async_context(FileServer(share, [listener]))
            self._ready.set()
            await asyncio.to_thread(self._over.wait)

    def held(self) -> dict[str, object]:
        """Of which folder clients have something."""
        nothing = {"connections": 0, "opened": 0, "locks": 0, "nodes": 1, "descriptors": 1, "contained": 0}
        found = {owner: {name: server.describe()[name] for name in nothing} for owner, server in self._servers.items()}
        return {owner: counters for owner, counters in found.items() if counters != nothing}

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture(scope="module")
def server(place: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(place, tmp_path_factory.mktemp("folders"))
    yield made
    made.close()


def mount(guest: Machine, port: int, where: str, *more: str) -> None:
    options = ",".join(("trans=tcp", f"port={port}", *OPTIONS, *more))
    guest.run(f"mkdir -p {where}; mount -t 9p -o {options} {HOST} {where}", limit_s=MOUNT_S)


@contextlib.contextmanager
def mounted(guest: Machine, server: Server, owner: str, *more: str) -> Iterator[Path]:
    """At /m; the folder on the host."""
    mount(guest, server.ports[owner], "/m", *more)
    try:
        yield server.folders[owner]
    finally:
        guest.run("cd /; umount /m || umount -l /m", check=False, limit_s=MOUNT_S)


@pytest.fixture
def guest(place: Site, server: Server) -> Machine:
    return place.machine()


@pytest.fixture(params=[(), ("cache=loose",)], ids=["no cache", "cache=loose"])
def files(request: pytest.FixtureRequest, guest: Machine, server: Server) -> Iterator[Path]:
    """On the host, the folder that is mounted at /m: files are passed through."""
    with mounted(guest, server, "passthrough", *request.param) as folder:
        yield folder
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def test_files_as_a_shell_uses_them(guest: Machine, files: Path) -> None:
    assert guest.run("cd /m; echo hello >a; cat a; echo more >>a; cat a; wc -c <a; sync").split() == [
        *("hello", "hello", "more", "11"),
    ]
    assert (files / "a").read_bytes() == b"hello\nmore\n"
    assert guest.run("cd /m; truncate -s 3 a; cat a") == "hel"
    assert guest.run("cd /m; echo new >b; mv b a; cat a; ls").split() == ["new", "a"]
    assert guest.run("cd /m; ln a b; stat -c '%h' a b; [ $(stat -c %i a) = $(stat -c %i b) ] && echo one").split() == [
        *("2", "2", "one"),
    ]
    assert guest.run("cd /m; ln -s a c; cat c; readlink c; ln -s /no/where d; cat d", check=False).splitlines() == [
        *("new", "a", "cat: can't open 'd': No such file or directory"),
    ]
    assert os.readlink(files / "d") == "/no/where"
    assert guest.run(
        "cd /m; exec 3<>u; echo data >&3; rm u; [ -e u ] || cat /proc/self/fd/3; stat -L -c %s:%h /proc/self/fd/3"
    ) == ("data\n5:0")
    assert guest.run("cd /m; mkdir -p x/y; mv a x/y; ls x/y; mv x z; cat z/y/a; rm -r z; ls").split() == [
        "a",
        "new",
        "b",
        "c",
        "d",
    ]
    assert guest.run(
        "cd /m; cp b q; cmp b q; : >q; [ -s q ] || echo empty; rm q; dd if=b of=q conv=fsync 2>/dev/null; sync; cat q"
    ) == ("empty\nnew")
    for command, words in (
        ("cat none", "No such file or directory"),
        ("mkdir b", "File exists"),
        ("rmdir b", "Not a directory"),
        ("mkdir e; touch e/f; rmdir e", "Directory not empty"),
        (f"touch {'x' * 256}", "File name too long"),
        ("mknod dev c 1 3", "Operation not permitted"),
    ):
        assert words in guest.run(f"cd /m; {command}", check=False), command


def test_a_tree_goes_in_and_out(guest: Machine, files: Path) -> None:
    for number in range(30):
        (files / "tree" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (files / "tree" / str(number % 3) / str(number)).write_bytes(b"x" * 1000 * number)
    (files / "tree" / "link").symlink_to("0/3")
    (files / "tree" / "0" / "hard").hardlink_to(files / "tree" / "1" / "1")
    assert guest.run("cd /m; find tree -type f | wc -l; find tree -type l; find tree -type d | wc -l").split() == [
        *("31", "tree/link", "4"),
    ]
    assert (
        guest.run(
            "cd /m; tar cf /tmp/t tree; mkdir copy; tar xf /tmp/t -C copy; rm /tmp/t; sync; cat tree/link", limit_s=60
        )
        == "x" * 3000
    )
    copied = files / "copy" / "tree"
    for number in range(30):
        assert (copied / str(number % 3) / str(number)).read_bytes() == b"x" * 1000 * number
    assert os.readlink(copied / "link") == "0/3" and (copied / "1" / "1").stat().st_nlink == 2


def test_a_directory_of_two_thousand(guest: Machine, files: Path) -> None:
    for number in range(2000):
        (files / f"file {number}").touch()
    assert guest.run("cd /m; set -- *; echo $#; echo $1", limit_s=60) == "2000\nfile 0"
    assert guest.run("cd /m; rm *' '19??; set -- *; echo $#", limit_s=60) == "1900"
    assert len(list(files.iterdir())) == 1900


def test_much_of_it(guest: Machine, files: Path) -> None:
    """Figures are for the log: they are those of this host's TCG, and of the way through two TCP stacks."""
    begin = time.monotonic()
    guest.run(f"dd if=/dev/urandom of=/tmp/r bs=1M count={MIB}; sha256sum </tmp/r", limit_s=60)
    made = time.monotonic()
    guest.run("dd if=/tmp/r of=/m/r bs=1M", limit_s=60)
    written = time.monotonic()
    again = "sync; echo 3 >/proc/sys/vm/drop_caches; dd if=/m/r of=/tmp/s bs=1M 2>/dev/null"
    said = guest.run(f"sha256sum </tmp/r; {again}; sha256sum </tmp/s; rm /tmp/r /tmp/s", limit_s=60)
    assert len(set(said.split()) - {"-"}) == 1
    assert hashlib.sha256((files / "r").read_bytes()).hexdigest() in said
    print(f"{MIB} MiB: made {made - begin:.1f} s, written {written - made:.2f} s")


def test_what_the_host_changes_is_seen(guest: Machine, server: Server) -> None:
    with mounted(guest, server, "passthrough") as folder:
        (folder / "file").write_text("one")
        assert guest.run("cat /m/file") == "one"
        (folder / "file").write_text("another")
        assert guest.run("cat /m/file") == "another"
        (folder / "new").write_text("by rename")
        (folder / "new").rename(folder / "file")
        assert guest.run("cat /m/file; echo; ls /m") == "by rename\nfile"
        (folder / "file").unlink()
        assert "No such file" in guest.run("cat /m/file", check=False)
        assert guest.run("df -k /m | tail -1").split()[-1] == "/m"


@pytest.mark.parametrize("options", ["cache=mmap", "access=client,posixacl", "access=any", "msize=4096"])
def test_other_ways_to_mount(guest: Machine, server: Server, options: str) -> None:
    with mounted(guest, server, "mapped", options) as folder:
        said = guest.run(
            f"cd /m; echo data >file; cat file; mkdir dir; mv file dir; ls -R; chmod 4711 dir/file; {INSIDE}; sync"
        )
        assert said.split()[-1] == "4711:5"
        assert (folder / "dir" / "file").read_bytes() == b"data\n"
        assert (
            guest.run("cd /m; dd if=/dev/zero of=dir/big bs=100k count=10 2>/dev/null; wc -c <dir/big; rm -r dir; ls")
            == "1024000"
        )


def test_several_processes_at_once(guest: Machine, server: Server) -> None:
    make = "mkdir -p /tmp/src; for i in 1 2 3 4 5 6; do dd if=/dev/urandom of=/tmp/src/$i bs=37k count=$i 2>/dev/null; done"
    work = "mkdir w$w; cp /tmp/src/* w$w; mv w$w v$w; tar cf t$w -C v$w .; mkdir x$w; tar xf t$w -C x$w; rm -r v$w; cp -a x$w y$w"
    with mounted(guest, server, "mapped") as folder:
        guest.run(f"{make}; cd /m; for w in 1 2 3; do ({work}) & done; wait; sync", limit_s=120)
        sums = guest.run("cd /tmp/src; sha256sum *").split()[::2]
        for worker in "123":
            for copy in "xy":
                found = [(folder / f"{copy}{worker}" / name).read_bytes() for name in "123456"]
                assert [hashlib.sha256(octets).hexdigest() for octets in found] == sums
        assert guest.run("rm -r /m/* /tmp/src; ls /m", limit_s=60) == ""


def test_mounted_by_a_descriptor_and_again(guest: Machine, server: Server) -> None:
    """A program connects and hands the descriptor to mount (spec companions 4.4)."""
    options = ",".join(("trans=fd", "rfdno=0", "wfdno=1", *OPTIONS))
    for text in ("first", "second"):
        guest.run(
            f"mkdir -p /f; nc {HOST} {server.ports['mapped']} -e /bin/mount -t 9p -o {options} share /f",
            limit_s=MOUNT_S,
        )
        guest.run("until grep -q ' /f 9p ' /proc/mounts; do usleep 10000; done", limit_s=MOUNT_S)
        guest.run(f"echo {text} >>/f/both")
        guest.run("umount /f")
    assert (server.folders["mapped"] / "both").read_text() == "first\nsecond\n"


INSIDE = "stat -c %a:%s dir/file"
SEEN = "stat -c '%n %u:%g %a' file fifo link host"
DONE = "touch file; chown 1234:2345 file; chmod 4755 file; mknod device c 1 3; mkfifo -m 620 fifo; ln -s file link"


@pytest.mark.parametrize(
    ("owner", "guest_sees", "host_has"),
    [
        pytest.param(
            "passthrough",
            ["file 1234:2345 4755", "fifo 0:0 620", "link 0:0 777", "host 501:20 644"],
            ["file 1234:2345 104755", "fifo 0:0 10620", "link 0:0 120777", "host 501:20 100644"],
            id="passthrough",
        ),
        pytest.param(
            "squash:1001:50",
            ["file 1001:50 755", "fifo 1001:50 620", "link 1001:50 777", "host 1001:50 644"],
            ["file 0:0 100755", "fifo 0:0 10620", "link 0:0 120777", "host 501:20 100644"],
            id="squash",
        ),
        pytest.param(
            "mapped",
            ["file 1234:2345 4755", "fifo 0:0 620", "link 0:0 777", "host 501:20 644"],
            ["file 0:0 100600", "fifo 0:0 100600", "link 0:0 100600", "host 501:20 100644"],
            id="mapped",
        ),
        pytest.param(
            "requester",
            ["file 1234:2345 755", "fifo 0:0 620", "link 0:0 777", "host 0:0 644"],
            ["file 0:0 100755", "fifo 0:0 10620", "link 0:0 120777", "host 501:20 100644"],
            id="requester",
        ),
    ],
)
def test_ownership(guest: Machine, server: Server, owner: str, guest_sees: list[str], host_has: list[str]) -> None:
    """What the table of spec companions 2.3 is about."""
    with mounted(guest, server, owner) as folder:
        (folder / "host").touch()
        (folder / "host").chmod(0o644)
        os.chown(folder / "host", 501, 20)
        said = guest.run(f"cd /m; {DONE}", check=False)
        assert ("chown" in said) == (owner == "squash:1001:50"), said
        assert "mknod: device: Operation not permitted" in said
        assert guest.run(f"cd /m; {SEEN}").splitlines() == guest_sees
        assert guest.run("cd /m; [ -p fifo ] && [ -L link ] && echo kinds") == "kinds"
        assert guest.run("cd /m; (echo through >fifo &); cat fifo") == "through", "a fifo is the guest's own affair"
        assert guest.run("cd /m; echo data >link; cat file") == "data"
        found = [(name, (folder / name).lstat()) for name in ("file", "fifo", "link", "host")]
        assert [f"{name} {state.st_uid}:{state.st_gid} {state.st_mode:o}" for name, state in found] == host_has
        guest.run("rm -rf /m/*")
        assert not any((folder / name).exists() for name, _ in found)


def test_two_users_each_own_what_they_ask_about(guest: Machine, server: Server) -> None:
    """access=user attaches once for each; without a cache, who asks is told that it is theirs."""
    guest.run(
        "mkdir -p /etc; printf 'root:x:0:0::/:/bin/sh\\none:x:1000:1000::/:/bin/sh\\ntwo:x:2000:2000::/:/bin/sh\\n' >/etc/passwd"
    )
    with mounted(guest, server, "requester") as folder:
        folder.chmod(0o755)
        (folder / "file").write_text("data")
        (folder / "file").chmod(0o600)
        for user in ("one", "two", "root"):
            uid = {"one": 1000, "two": 2000, "root": 0}[user]
            assert guest.run(f"su {user} -c 'stat -c %u:%g /m/file; cat /m/file'") == f"{uid}:{uid}\ndata", user
            assert guest.run(f"su {user} -c 'echo {user} >/m/by-{user}; stat -c %u /m/by-{user}'") == str(uid), user
        guest.run("chown 1000:1000 /m/file")
        assert guest.run("su two -c 'stat -c %u /m/file; cat /m/file'", check=False).startswith("1000\ncat: can't open")
        assert guest.run("su one -c 'cat /m/file'") == "data"
        assert {path.name: path.stat().st_uid for path in folder.iterdir()} == dict.fromkeys(
            ("file", "by-one", "by-two", "by-root"), os.geteuid()
        )
        guest.run("rm /m/*")


def test_a_folder_that_is_read_only(guest: Machine, server: Server) -> None:
    with mounted(guest, server, "read-only") as folder:
        (folder / "file").write_text("data")
        assert guest.run("cat /m/file; echo; ls /m") == "data\nfile"
        for command in (
            "touch /m/new",
            "echo >/m/file",
            "rm /m/file",
            "mkdir /m/d",
            "chmod 777 /m/file",
            "mv /m/file /m/e",
        ):
            assert "Read-only file system" in guest.run(command, check=False), command
        assert (folder / "file").read_text() == "data"


def test_nothing_outside_is_reached(guest: Machine, server: Server) -> None:
    """Links are followed by the guest, in its own tree; `..` ends at the folder."""
    with mounted(guest, server, "passthrough") as folder:
        (folder.parent / "secret").write_text("secret")
        (folder / "absolute").symlink_to(folder.parent / "secret")
        (folder / "relative").symlink_to("../secret")
        (folder / "up").symlink_to(folder.parent)
        for path in ("absolute", "relative", "up/secret", "../secret", "../../secret"):
            assert "No such file" in guest.run(f"cat /m/{path}", check=False), path
        guest.run("echo overwritten >/m/relative; rm -f /secret", check=False)
        assert (folder.parent / "secret").read_text() == "secret"
        guest.run("rm -f /m/*")
        assert sorted(path.name for path in folder.parent.iterdir() if path.is_file()) == ["secret"]


def test_nothing_is_left(server: Server, guest: Machine) -> None:
    """Guests that have unmounted hold nothing: no file, no lock, no descriptor but the folder's."""
    wait_until(lambda: not server.held(), why=lambda: str(server.held()))
