"""A folder whose owners are kept in attributes moves between QEMU's own 9P (mapped-xattr) and our server: each sees the other's."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from pyvpnkit.machine import Card
from tests.qemu.test_qemu_driver import KIND
from tests.support import machine
from tests.support.machine import Machine
from tests.support.netns import require, world
from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import site

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

SEEN = ["dir 7:8 1777", "fifo 0:0 620", "file 1234:2345 4755", "link 5:6 777"]


def seen(client: Client) -> list[str]:
    found = [(name.decode(), client.stat(name)) for name in client.list()]
    return [f"{name} {state.uid}:{state.gid} {stat.S_IMODE(state.mode):o}" for name, state in found]


def kinds(client: Client) -> list[int]:
    return [stat.S_IFMT(client.stat(name).mode) for name in client.list()]


def test_a_folder_moves_between_qemu_and_us(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    require("ip", "nsenter", "unshare", "setpriv", "qemu-system-x86_64")
    parts = machine.parts(tmp_path_factory.mktemp("machine"), KIND)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for folder in (ours, theirs):
        folder.mkdir()
    with site(ours, "mapped") as place:
        client = place.client()
        client.store("file", b"data", mode=0o4755)
        client.chown("file", 1234, 2345)
        client.chmod("file", 0o4755)
        client.mkdir("dir", mode=0o1777)
        client.chown("dir", 7, 8)
        client.symlink("link", "file")
        client.chown("link", 5, 6)
        client.mknod("fifo", stat.S_IFIFO | 0o620)
        assert seen(client) == SEEN
        kinds_here = kinds(client)
    words: list[str] = []
    for tag, folder in (("ours", ours), ("theirs", theirs)):
        words += ["-fsdev", f"local,id={tag},path={folder},security_model=mapped-xattr"]
        words += ["-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}"]
    with world(tmp_path) as place_of_machine:
        listener = socket.socket(socket.AF_UNIX)
        with listener:  # a network card's other end, where nobody speaks
            listener.bind(path := place_of_machine.socket_path())
            listener.listen()
            card = Card(f"stream,id=n,server=off,addr.type=unix,addr.path={path}", words=tuple(words))
            guest = Machine(place_of_machine.namespace("qemu"), parts, card)
            place_of_machine.defer(guest.kill)
            for tag in ("ours", "theirs"):
                guest.run(f"mkdir /{tag}; mount -t 9p -o trans=virtio,version=9p2000.L {tag} /{tag}")
            assert guest.run("cd /ours; stat -c '%n %u:%g %a' *").splitlines() == SEEN
            assert guest.run("cd /ours; [ -p fifo ] && [ -L link ] && [ -d dir ] && cat link") == "data"
            guest.run(
                "cd /theirs; echo -n data >file; chown 1234:2345 file; chmod 4755 file; mkdir dir; chmod 1777 dir; chown 7:8 dir;"
                " ln -s file link; chown -h 5:6 link; mkfifo -m 620 fifo; mknod null c 1 3"
            )
            guest.run("cd /; umount /ours /theirs")
    with site(theirs, "mapped") as place:
        client = place.client()
        assert client.stat("null").rdev == 0x103 and stat.S_ISCHR(client.stat("null").mode)
        client.unlink("null")
        assert seen(client) == SEEN and kinds(client) == kinds_here
        assert client.load("file") == b"data" and client.readlink("link") == b"file"
