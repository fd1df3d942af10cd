"""virtiofs by virtiofsd, of which there are two (spec companions 2.2).

The one in C came with QEMU up to 7.2 (Debian 12: /usr/lib/qemu/virtiofsd). It has to be root, ids of the guest are ids of the host,
and it has no read-only shares. The one in Rust (Debian 13 and later: package virtiofsd) also runs as a user, in a user namespace of
its own, and may map ids:

    passthrough   both, as root: 1:1; set-user-id bits and device nodes of the guest are real ones on the host
    mapped        Rust, not root: the guest's root is our user, its other ids are our subordinate ids (/etc/subuid, newuidmap);
                  where we have none, it has root alone
    squash        Rust 1.13 or later: every id of the guest is `uid` and `gid` on the host (ourselves, where we are not root),
                  and what these own is shown as root's

A path with `qemu` in it is the one in C, without being asked; another is asked once for its version, since some systems had the one
in C where others have the one in Rust. Its words were not tried with the real program (none in Debian 12).
"""

from __future__ import annotations

import functools
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from netstack.errors import ConfigError
from vm.api import Endpoint, Lost, Owner, Share, ShareKind, Sidecar, StateDir, Unsupported
from vm.filesystems.mounts import mount

PLACES: Final = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd")
"""Debian 13, Fedora; Arch; Debian 12. They are no commands, so they are in no PATH."""
_ALL_IDS: Final = (1 << 32) - 1
_ASK_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Program:
    path: Path
    kind: Literal["C", "Rust"]


@dataclass(frozen=True, slots=True)
class User:
    """Who runs it. `subuids` and `subgids` are the first of the subordinate ids and how many there are."""

    uid: int
    gid: int
    subuids: tuple[int, int] | None = None
    subgids: tuple[int, int] | None = None


class Virtiofsd:
    """`found` and `user` tell which program there is (`None`: none), and who we are."""

    kind: ShareKind = "virtiofs"
    owners: frozenset[Owner] = frozenset({"passthrough", "mapped", "squash"})

    def __init__(self, found: Callable[[], Program | None], user: Callable[[], User]) -> None:
        self._found = found
        self._user = user

    def plan(self, share: Share, state: StateDir, index: int = 0) -> Endpoint:
        program, user = self._found(), self._user()
        if program is None:
            raise ConfigError(
                f"share {share.tag}: kind virtiofs: virtiofsd is not installed; apt install virtiofsd (Debian 12: "
                "qemu-system-common), or use kind: 9p-local"
            )
        socket = state.share(share.tag)
        words = _c(share, socket, user) if program.kind == "C" else _rust(share, socket, user)
        server = Sidecar(
            name=f"share-{share.tag}",
            argv=(str(program.path), *words),
            ready=socket,
            lost=Lost.DEGRADED,
        )
        return Endpoint(share=share, sidecars=(server,), socket=socket, mount=mount("virtiofs", share.tag, share))


def _c(share: Share, socket: Path, user: User) -> list[str]:
    if user.uid != 0:
        raise _unable(share, "the virtiofsd of QEMU 7.2 has to run as root")
    if share.owner != "passthrough":
        raise _unable(share, f"the virtiofsd of QEMU 7.2 has no owner: {share.owner}; it has passthrough")
    if share.readonly:
        raise _unable(share, "the virtiofsd of QEMU 7.2 has no read-only shares")
    if "," in str(share.source):
        raise ConfigError(
            f"share {share.tag}: {share.source}: virtiofsd divides its options at commas; use another name"
        )
    options = (f"source={share.source}", "cache=auto", "sandbox=namespace", "xattr")
    return [f"--socket-path={socket}", *(word for option in options for word in ("-o", option))]


def _rust(share: Share, socket: Path, user: User) -> list[str]:
    words = ["--socket-path", str(socket), "--shared-dir", str(share.source), "--cache", "auto"]
    words += ["--sandbox", "namespace", "--xattr"]
    if share.readonly:
        words.append("--readonly")
    if user.uid == 0:
        if share.owner == "mapped":
            raise _unable(share, "virtiofsd as root has no owner: mapped; it has passthrough and squash")
    elif share.owner == "passthrough":
        raise _unable(share, "virtiofsd has owner: passthrough as root only; it has mapped and squash")
    else:
        words += [*_map("uid", user.uid, user.subuids), *_map("gid", user.gid, user.subgids)]
    if share.owner == "squash":
        words += _squashed(share, user)
    return words


def _squashed(share: Share, user: User) -> list[str]:
    """Ids are those that virtiofsd sees: in its own user namespace our user is 0."""
    if user.uid == 0:
        return [*_squash("uid", share.uid), *_squash("gid", share.gid)]
    if (share.uid, share.gid) != (user.uid, user.gid):
        own = f"{user.uid}:{user.gid}"
        raise _unable(share, f"virtiofsd squashes to {share.uid}:{share.gid} as root only, and to {own} as this user")
    return [*_squash("uid", 0), *_squash("gid", 0)]


def _map(kind: str, own: int, subordinate: tuple[int, int] | None) -> list[str]:
    """Ids of its user namespace: root is our user, the others subordinate ones."""
    if subordinate is None:
        return [f"--{kind}-map", f":0:{own}:1:"]
    first, count = subordinate
    return [f"--{kind}-map", f":0:{own}:1:", f"--{kind}-map", f":1:{first}:{count}:"]


def _squash(kind: str, to: int) -> list[str]:
    flag = f"--translate-{kind}"
    return [flag, f"squash-guest:0:{to}:{_ALL_IDS}", flag, f"host:{to}:0:1"]


def _unable(share: Share, what: str) -> Unsupported:
    return Unsupported("virtiofs", f"share {share.tag}: {what}", ("9p-local", "9p-vsock"))


# What is here.


@functools.cache
def kind_of(path: Path) -> Literal["C", "Rust"]:
    """Which of the two a program is. It is asked where its place does not say so."""
    if "qemu" in path.parts:
        return "C"
    try:
        asked = [str(path), "--version"]
        said = subprocess.run(
            asked,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_ASK_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return "Rust"
    return "C" if re.search(r"QEMU|FUSE kernel interface", said.stdout + said.stderr) else "Rust"


def found() -> Program | None:
    """The virtiofsd of this host, that in Rust where there are both."""
    there = [Path(place) for place in (shutil.which("virtiofsd"), *PLACES) if place and os.access(place, os.X_OK)]
    programs = [Program(path, kind_of(path)) for path in there]
    return next((program for program in programs if program.kind == "Rust"), programs[0] if programs else None)


def user() -> User:
    """Ourselves."""
    uid, gid = os.geteuid(), os.getegid()
    return User(uid, gid, subordinate(Path("/etc/subuid"), uid), subordinate(Path("/etc/subgid"), uid))


def subordinate(table: Path, uid: int) -> tuple[int, int] | None:
    """The first range of ids in `table` (subuid(5)) that belongs to a user."""
    try:
        names = {str(uid), pwd.getpwuid(uid).pw_name}
    except KeyError:
        names = {str(uid)}
    try:
        lines = table.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        match line.split(":"):
            case [name, first, count] if name in names and first.isdecimal() and count.isdecimal():
                return int(first), int(count)
    return None


SHARE: Final = Virtiofsd(found, user)
