"""Packages of Debian and its relatives as trees. Nothing is installed and none of their scripts is run, so no root is needed.

apt knows what there is and where; it is asked for a package and what that depends on, and downloads it into the cache. What was
resolved is kept too: the same packages again need neither apt nor a network, until the cache is deleted.
"""

from __future__ import annotations

import fnmatch
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from vm.build.archive import Cache, plain, sha256, unpack, whole
from vm.build.tree import Slice, Tree

DOWNLOAD_S: Final = 600
MAX_PACKAGES: Final = 300
LEFT_OUT: Final = frozenset(
    "adduser debconf dpkg init-system-helpers install-info lsb-base media-types perl-base sensible-utils ucf".split()
)
"""Dependencies that only scripts of packages want, and those are not run. Who names one gets it."""
UNWANTED: Final = tuple(
    f"usr/share/{name}/*" for name in ("doc", "man", "info", "locale", "lintian", "bug", "initramfs-tools")
)
"""Paths that no package is unpacked with."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_VERSION: Final = re.compile(r"[A-Za-z0-9.+:~-]+")
_AR: Final = b"!<arch>\n"


@dataclass(frozen=True, slots=True)
class Package:
    """One that apt can download; `sha256` is what the package lists, which apt has verified, say of it."""

    name: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Wanted:
    """`NAME[=VERSION]`, with what they depend on, but for `-NAME` and what that depends on, and without paths `-/PATTERN`."""

    packages: tuple[str, ...]
    without: frozenset[str] = frozenset()
    skip: tuple[str, ...] = ()
    only: str = ""
    """What the names of dependencies begin with, if not all are wanted."""

    @classmethod
    def parse(cls, text: str) -> Wanted:
        packages, without, skip = [], set(), []
        for word in text.split(","):
            name, equals, version = word.removeprefix("-").partition("=")
            if word.startswith("-/"):
                skip.append(word[2:])
            elif not _NAME.fullmatch(name) or (equals and not _VERSION.fullmatch(version)):
                raise ConfigError(
                    f"package {word!r}: NAME, NAME=VERSION, -NAME to leave one out, or -/PATTERN for paths"
                )
            elif word.startswith("-"):
                without.add(name)
            else:
                packages.append(word)
        if not packages:
            raise ConfigError(f"{text!r} names no package")
        return cls(tuple(packages), frozenset(without), tuple(skip))


def tree(wanted: Wanted, cache: Cache, *, downloads: Cache | None = None) -> Tree:
    """The packages and what they depend on, unpacked over each other; `downloads` keeps the packages themselves, if not `cache`.
    Raises `ConfigError` and `HostError`."""
    made = Tree()
    skip = functools.partial(_matches, patterns=(*UNWANTED, *wanted.skip))
    for package, deb in packages(wanted, downloads or cache):
        what = f"deb:{package.name}"
        # By the digest of the whole package, which is known already.
        unpack(plain(data(deb, what), cache, what, f"{package.sha256}.deb"), made, what, skip=skip)
    return made


def packages(wanted: Wanted, cache: Cache) -> list[tuple[Package, Path]]:
    """The packages and what they depend on, sorted by name, each with its .deb in the cache.

    Where apt does not know one, or cannot get it any more, its lists are brought up to date first, if that may be done.
    """
    try:
        found = resolve(wanted, cache, anew=cache.refresh)
        return list(zip(found, fetch(found, cache), strict=True))
    except (ConfigError, HostError):
        try:
            _apt("apt-get", "update")
        except HostError:
            updated = False
        else:
            updated = True
        if not updated:
            raise
    found = resolve(wanted, cache, anew=True)
    return list(zip(found, fetch(found, cache), strict=True))


def resolve(wanted: Wanted, cache: Cache, *, anew: bool = False) -> tuple[Package, ...]:
    """The packages, sorted by name. From the cache, if the same was asked for before and it is not to be done `anew`."""
    key = json.dumps([sorted(wanted.packages), sorted(wanted.without), wanted.only])

    def fill(out: Any) -> None:
        found = _closure(wanted)
        out.write(json.dumps([[one.name, one.version, one.sha256] for one in found]).encode())

    path = cache.keep(f"resolved/{hashlib.sha256(key.encode()).hexdigest()}.json", fill, anew=anew)
    return tuple(Package(*fields) for fields in json.loads(path.read_text()))


def fetch(packages: Sequence[Package], cache: Cache) -> list[Path]:
    """The .deb of each, verified, in the cache. What is missing comes in one download."""
    paths = [cache.directory / "deb" / f"{package.sha256}.deb" for package in packages]
    missing = {package.sha256: package for package, path in zip(packages, paths, strict=True) if not path.exists()}
    if missing:
        with cache.scratch() as scratch:
            words = [f"{package.name}={package.version}" for package in missing.values()]
            _apt("apt-get", "download", *words, cwd=scratch)
            for found in scratch.glob("*.deb"):
                digest = sha256(whole(found))
                if missing.pop(digest, None) is not None:
                    cache.move(found, f"deb/{digest}.deb")
    for package in missing.values():
        raise HostError(
            f"{package.name} {package.version}: what was downloaded is something else; run `apt-get update`"
        )
    return paths


def data(deb: Path, what: str) -> Slice:
    """Where in a .deb (deb(5): an ar archive) the files are, mostly compressed."""
    size = deb.stat().st_size
    with open(deb, "rb") as file:
        if file.read(len(_AR)) != _AR:
            raise ConfigError(f"{what}: no Debian package")
        while len(head := file.read(60)) == 60:
            name, length, at = head[:16].rstrip(b" /"), head[48:58].strip(), file.tell()
            if not length.isdigit() or int(length) > size - at:
                break
            if name.startswith(b"data.tar"):
                return Slice(deb, at, int(length))
            file.seek(at + int(length) + int(length) % 2)
    raise ConfigError(f"{what}: a damaged package: it has no data.tar")


def _matches(path: str, patterns: Sequence[str]) -> bool:
    bare = path.removeprefix("./").removeprefix("/")
    return any(fnmatch.fnmatchcase(bare, pattern) for pattern in patterns)


def _closure(wanted: Wanted) -> list[Package]:
    """The packages and, level by level, those they depend on."""
    found: dict[str, Package] = {}
    todo: list[str] = list(wanted.packages)
    named = {word.partition("=")[0] for word in todo}
    while todo:
        known = _show(todo)
        for word in todo:
            if word.partition("=")[0] not in known:
                raise ConfigError(f"package {word!r} is unknown to apt: is it spelled so, and `apt-get update` recent?")
        wishes: list[list[str]] = []
        for fields in known.values():
            name = fields["Package"]
            found[name] = Package(name, fields["Version"], fields["SHA256"])
            wishes += _alternatives(fields)
        if len(found) > MAX_PACKAGES:
            raise ConfigError(
                f"{','.join(wanted.packages)}: more than {MAX_PACKAGES} packages; leave some out with -NAME"
            )
        left_out = wanted.without | (LEFT_OUT - named)
        wishes = [wish for wish in wishes if not left_out & set(wish) and wish[0].startswith(wanted.only)]
        todo = _chosen(wishes, found)
    return [found[name] for name in sorted(found)]


def _chosen(wishes: Iterable[list[str]], found: Mapping[str, Package]) -> list[str]:
    """For each wish that nothing in `found` fulfils, the first package that apt has, or the first that provides it."""
    open_wishes = [wish for wish in wishes if not found.keys() & set(wish)]
    known = _show(sorted({name for wish in open_wishes for name in wish})) if open_wishes else {}
    chosen: dict[str, None] = {}
    for wish in open_wishes:
        name = next((name for name in wish if name in known), None)
        if name is None:
            raise ConfigError(
                f"no package is {' or '.join(wish)}: name one that provides it, or -{wish[0]} to do without"
            )
        if not chosen.keys() & set(wish):
            chosen[name] = None
    return list(chosen)


def _alternatives(fields: Mapping[str, str]) -> list[list[str]]:
    """`a (>= 1), b | c` as `[[a], [b, c]]`; apt's lists are of one release, so versions fit."""
    text = ",".join(fields[key] for key in ("Pre-Depends", "Depends") if key in fields)
    wishes = [[name.split("(")[0].split(":")[0].strip() for name in wish.split("|")] for wish in text.split(",")]
    return [wish for wish in wishes if wish != [""]]


def _show(names: Sequence[str]) -> dict[str, dict[str, str]]:
    """What apt has of these, by name: each one's newest version, unless `NAME=VERSION` says which."""
    said = _apt("apt-cache", "show", "--no-all-versions", *names, check=False)
    shown: dict[str, dict[str, str]] = {}
    for paragraph in said.split("\n\n"):
        lines = (line.partition(": ") for line in paragraph.splitlines() if not line.startswith(" "))
        fields = {key: value for key, _, value in lines}
        if {
            "Package",
            "Version",
            "SHA256",
        } <= fields.keys():  # an installed one that no list has any more has no digest
            shown.setdefault(fields["Package"], fields)
    return shown


def _apt(*words: str, cwd: Path | None = None, check: bool = True) -> str:
    """What it said. Raises `HostError` where it failed, if that is to be checked."""
    if shutil.which(words[0]) is None:
        raise HostError(f"packages come by apt, and there is no {words[0]}; use dir:, tar: or oci-layout: images here")
    command = [words[0], "-q", "-o", "APT::Sandbox::User=root", *words[1:]]
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"{' '.join(words)}: not done after {DOWNLOAD_S} s; is there a network?") from None
    if check and done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise HostError(f"{' '.join(words)}: {last}; is there a network, and a recent `apt-get update`?")
    return done.stdout
