"""What each file-sharing companion starts and what the guest has to run; who cannot do what is asked says who could."""

from __future__ import annotations

import shlex
import socket
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from netstack.errors import ConfigError
from tests.support.specs import share, vsock
from vm.api import Caps, Endpoint, Share, ShareKind, StateDir, Unsupported, VmSpec
from vm.filesystems import registry, virtiofsd
from vm.filesystems.ninep.__main__ import _parser as server_options
from vm.filesystems.ninep.owners import parse_owner
from vm.filesystems.ninep_share import port
from vm.filesystems.qemu9p import security_model
from vm.filesystems.virtiofsd import Program, User, Virtiofsd
from vm.guest import mount9p

STATE = StateDir(Path("/run/vm"))
C = Program(Path("/usr/lib/qemu/virtiofsd"), "C")
RUST = Program(Path("/usr/libexec/virtiofsd"), "Rust")
ROOT = User(0, 0)
ME = User(1000, 100)
WITH_IDS = User(1000, 100, (100000, 65536), (200000, 65535))
ANYTHING = Caps(nics=frozenset())


def planned(kind: ShareKind, index: int = 0, **changes: Any) -> Endpoint:
    return registry.load(kind).plan(share(kind, **changes), STATE, index)


def argv(endpoint: Endpoint) -> str:
    (server,) = endpoint.sidecars
    return " ".join(server.argv).replace(sys.executable, "PYTHON")


def test_qemus_own_9p_needs_no_server() -> None:
    made = planned("9p-local", owner="mapped")
    assert made.sidecars == () and made.socket is None
    assert made.mount == ("mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 tag-9p-local '/Users/me/my src'")
    assert planned("9p-local", owner="mapped", readonly=True).mount.split()[4].endswith(",ro")


@pytest.mark.parametrize("owner", ["squash", "requester"])
def test_qemus_own_9p_has_no_such_owner(owner: str) -> None:
    with pytest.raises(Unsupported, match="9p-vsock, 9p-socket could") as told:
        planned("9p-local", owner=owner)
    assert owner in registry.load(told.value.able[0]).owners


@pytest.mark.parametrize(
    ("owner", "root", "model"),
    [
        ("mapped", True, "mapped-xattr"),
        ("mapped", False, "mapped-xattr"),
        ("passthrough", True, "passthrough"),
        ("passthrough", False, "none"),
    ],
)
def test_security_models(owner: Any, root: bool, model: str) -> None:
    assert security_model(owner, root) == model


def test_our_server_on_a_socket() -> None:
    made = planned("9p-socket", owner="mapped")
    assert made.socket == STATE.share("tag-9p-socket")
    assert argv(made) == (
        "PYTHON -m vm.filesystems.ninep --socket /run/vm/share-tag-9p-socket.sock --export /home/me/src "
        "--owner mapped --ready-fd {ready_fd}"
    )
    assert made.mount.startswith("mount -t 9p -o trans=virtio,version=9p2000.L,msize=262144 tag-9p-socket ")


def test_our_server_over_vsock_has_a_port_for_each_share() -> None:
    spec = VmSpec(
        name="docker",
        uuid=UUID(int=7),
        shares=(share("9p-vsock", tag="a"), share("9p-local", owner="mapped"), share("9p-vsock", tag="b", target="/b")),
        vsock=vsock(),
    )
    first, between, second = registry.endpoints(spec, STATE, ANYTHING)
    assert (first.socket, second.socket) == (
        STATE.path / "vsock/00000002.00000234",
        STATE.path / "vsock/00000002.00000235",
    )
    assert port(0) == 564 and " --port 564 " in first.mount and " --port 565 /b" in second.mount
    assert between.sidecars == ()
    assert [one.name for made in (first, second) for one in made.sidecars] == ["share-a", "share-b"]


def test_our_server_squashes_and_forbids_writing() -> None:
    made = planned("9p-vsock", owner="squash", uid=501, gid=20, readonly=True)
    assert argv(made).endswith("--owner squash:501:20 --read-only --ready-fd {ready_fd}")
    assert "--read-only" in made.mount


@pytest.mark.parametrize("owner", ["passthrough", "squash", "mapped", "requester"])
def test_our_server_and_the_guests_mount_take_these_words(owner: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    made = planned("9p-vsock", owner=owner, uid=501, gid=20, readonly=True, source=tmp_path / "folder")
    words = [word for word in made.sidecars[0].argv if word not in ("--ready-fd", "{ready_fd}")][3:]
    taken = server_options().parse_args(words)
    assert (taken.socket, taken.export, taken.read_only) == (str(made.socket), tmp_path / "folder", True)
    assert str(parse_owner(taken.owner)).startswith(owner)
    mounted: list[tuple[str, int]] = []
    arguments = shlex.split(made.mount)[1:]
    with socket.socket(socket.AF_UNIX) as server:
        path = str(tmp_path / "564")  # in place of vsock, which a test must not open
        server.bind(path)
        server.listen()
        arguments = [path if word == "564" else word for word in arguments]
        arguments[-1] = str(tmp_path / "mnt")
        assert mount9p.main(arguments, mount=lambda _, target, flags, *more: mounted.append((target, flags))) == 0
    assert mounted == [(str(tmp_path / "mnt"), mount9p.MS_RDONLY)]


def virtiofs(program: Program | None, user: User, **changes: Any) -> Endpoint:
    one: Share = share("virtiofs", **{"target": "/mnt", **changes})
    return Virtiofsd(lambda: program, lambda: user).plan(one, STATE)


def test_virtiofsd_in_c() -> None:
    made = virtiofs(C, ROOT)
    assert argv(made) == (
        "/usr/lib/qemu/virtiofsd --socket-path=/run/vm/share-tag-virtiofs.sock -o source=/home/me/src -o cache=auto "
        "-o sandbox=namespace -o xattr"
    )
    assert made.sidecars[0].ready == made.socket == STATE.share("tag-virtiofs")
    assert made.mount == "mount -t virtiofs tag-virtiofs /mnt"


HEAD = "/usr/libexec/virtiofsd --socket-path /run/vm/share-tag-virtiofs.sock --shared-dir /home/me/src --cache auto"


@pytest.mark.parametrize(
    ("user", "changes", "words"),
    [
        (ROOT, {}, ""),
        (ROOT, {"readonly": True}, " --readonly"),
        (
            ROOT,
            {"owner": "squash", "uid": 501, "gid": 20},
            " --translate-uid squash-guest:0:501:4294967295 --translate-uid host:501:0:1"
            " --translate-gid squash-guest:0:20:4294967295 --translate-gid host:20:0:1",
        ),
        (ME, {"owner": "mapped"}, " --uid-map :0:1000:1: --gid-map :0:100:1:"),
        (
            WITH_IDS,
            {"owner": "mapped"},
            " --uid-map :0:1000:1: --uid-map :1:100000:65536: --gid-map :0:100:1: --gid-map :1:200000:65535:",
        ),
        (
            ME,
            {"owner": "squash", "uid": 1000, "gid": 100},
            " --uid-map :0:1000:1: --gid-map :0:100:1:"
            " --translate-uid squash-guest:0:0:4294967295 --translate-uid host:0:0:1"
            " --translate-gid squash-guest:0:0:4294967295 --translate-gid host:0:0:1",
        ),
    ],
)
def test_virtiofsd_in_rust(user: User, changes: dict[str, Any], words: str) -> None:
    assert argv(virtiofs(RUST, user, **changes)) == f"{HEAD} --sandbox namespace --xattr{words}"


@pytest.mark.parametrize(
    ("program", "user", "changes", "why"),
    [
        (C, ME, {}, "has to run as root; 9p-local, 9p-vsock could"),
        (C, ROOT, {"owner": "mapped"}, "no owner: mapped; it has passthrough; 9p-local"),
        (C, ROOT, {"readonly": True}, "no read-only shares; 9p-local, 9p-vsock could"),
        (C, ROOT, {"source": Path("/a,b")}, "divides its options at commas"),
        (RUST, ROOT, {"owner": "mapped"}, "as root has no owner: mapped"),
        (RUST, ME, {}, "passthrough as root only"),
        (RUST, ME, {"owner": "squash"}, "squashes to 0:0 as root only, and to 1000:100 as this user"),
        (None, ROOT, {}, "virtiofsd is not installed; apt install virtiofsd"),
    ],
)
def test_what_virtiofsd_cannot(program: Program | None, user: User, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        virtiofs(program, user, **changes)


def test_a_hypervisor_that_serves_virtiofs_itself_gets_no_server() -> None:
    spec = VmSpec(name="docker", uuid=UUID(int=7), shares=(share("virtiofs"),))
    (made,) = registry.endpoints(spec, STATE, Caps(nics=frozenset(), serves_virtiofs=True))
    assert made.sidecars == () and made.socket is None


def test_which_virtiofsd_it_is(tmp_path: Path) -> None:
    for name, said, kind in (
        ("old", "virtiofsd version 5.2.0\nusing FUSE kernel interface version 7.31", "C"),
        ("new", "virtiofsd 1.13.0", "Rust"),
    ):
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\necho '{said}'\n")
        program.chmod(0o700)
        assert virtiofsd.kind_of(program) == kind
    assert virtiofsd.kind_of(tmp_path / "qemu" / "virtiofsd") == "C", "not asked"
    assert virtiofsd.kind_of(tmp_path / "absent") == "Rust"


def test_subordinate_ids_of_a_user(tmp_path: Path) -> None:
    table = tmp_path / "subuid"
    table.write_text("nobody-else:1:2\nbad line\n4242:x:1\n4242:100000:65536\nroot:200000:10\n")
    assert virtiofsd.subordinate(table, 4242) == (100000, 65536)
    assert virtiofsd.subordinate(table, 0) == (200000, 10)
    assert virtiofsd.subordinate(table, 4243) is None
    assert virtiofsd.subordinate(tmp_path / "absent", 0) is None
