"""Packages by an apt of the test's own: what it is asked, what depends on what, and what is kept."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError
from tests.support.images import contents, deb
from vm.build import debian
from vm.build.archive import Cache
from vm.build.debian import Wanted

APT = """\
#!/usr/bin/python3
import json, pathlib, shutil, sys
here = pathlib.Path(sys.argv[0]).parent
words = [word for word in sys.argv[1:] if not word.startswith("-") and "=User" not in word and "::" not in word]
with open(here / "asked", "a") as log:
    print(*words, file=log)
known = json.loads((here / "known.json").read_text())
if words[0] == "show":
    for word in words[1:]:
        name, _, version = word.partition("=")
        if name in known and version in ("", known[name]["Version"]):
            print("".join(f"{key}: {value}\\n" for key, value in known[name].items() if value))
elif words[0] == "download":
    for word in words[1:]:
        name = word.partition("=")[0]
        shutil.copy(here / f"{name}.deb", f"{name}_amd64.deb")
elif words[0] == "update":
    newer = here / "newer.json"
    if not newer.exists():
        sys.exit("E: no network")
    newer.rename(here / "known.json")
"""


class Apt:
    """What apt knows; a package without a digest is a virtual one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir()
        for name in ("apt-get", "apt-cache"):
            (directory / name).write_text(APT)
            (directory / name).chmod(0o755)
        self.known: dict[str, dict[str, str]] = {}

    def add(self, name: str, depends: str = "", *, pre: str = "", files: Iterable[str] = ()) -> None:
        paths = {path: f"of {name}".encode() for path in (f"usr/share/{name}", *files)}
        digest = deb(self.directory / f"{name}.deb", dict(paths), compress=("xz", "gz", "")[len(self.known) % 3])
        fields = {"Package": name, "Version": "1.0", "Pre-Depends": pre, "Depends": depends, "SHA256": digest}
        self.known[name] = {**fields, "Description": "words\n more words"}
        (self.directory / "known.json").write_text(json.dumps(self.known))

    def asked(self) -> list[str]:
        """Since it was asked the last time."""
        path = self.directory / "asked"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return lines


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    made = Apt(tmp_path / "bin")
    made.add("libc6", "libgcc-s1 (>= 3)")
    made.add("libgcc-s1", "libc6 (>= 2), gcc-base (= 1)")
    made.add("gcc-base")
    made.add(
        "tool", "libc6 (>= 2.3) | musl, debconf (>= 0.5) | debconf-2.0", pre="libz:any", files=["usr/share/doc/tool/x"]
    )
    made.add("libz", "libc6", files=["usr/lib/x/gconv/a.so", "usr/lib/x/libz.so"])
    made.add("debconf", "perl-base")
    made.add("virtual-user", "mail-agent")
    monkeypatch.setenv("PATH", f"{made.directory}:{os.environ['PATH']}")
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def names(text: str, cache: Cache) -> list[str]:
    return [package.name for package in debian.resolve(Wanted.parse(text), cache)]


def test_a_package_comes_with_what_it_depends_on(apt: Apt, cache: Cache) -> None:
    assert names("tool", cache) == ["gcc-base", "libc6", "libgcc-s1", "libz", "tool"]
    assert names("tool,debconf,-perl-base", cache) == ["debconf", "gcc-base", "libc6", "libgcc-s1", "libz", "tool"]
    assert names("tool,-libc6", cache) == ["libz", "tool"]
    assert names("tool=1.0,-libz,-libc6", cache) == ["tool"]


def test_trees_of_packages(apt: Apt, cache: Cache) -> None:
    tree = debian.tree(Wanted.parse("tool,-/usr/lib/*/gconv/*"), cache)
    assert contents(tree) == {
        **{f"usr/share/{name}": f"of {name}".encode() for name in ("gcc-base", "libc6", "libgcc-s1", "libz", "tool")},
        "usr/lib/x/libz.so": b"of libz",
    }


def test_the_second_time_apt_is_not_asked(apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    first = contents(debian.tree(Wanted.parse("tool"), cache))
    asked = apt.asked()
    assert [line.split()[0] for line in asked].count("download") == 1, "all in one"
    monkeypatch.setenv("PATH", "/nothing")
    assert contents(debian.tree(Wanted.parse("tool"), cache)) == first
    assert apt.asked() == []


def test_packages_are_those_of_the_first_time_unless_asked_for_anew(apt: Apt, cache: Cache) -> None:
    debian.tree(Wanted.parse("gcc-base"), cache)
    apt.add("gcc-base", files=["usr/newer"])
    assert "usr/newer" not in contents(debian.tree(Wanted.parse("gcc-base"), cache))
    assert "usr/newer" in contents(debian.tree(Wanted.parse("gcc-base"), replace(cache, refresh=True)))


def test_what_was_downloaded_has_to_be_what_was_listed(apt: Apt, cache: Cache) -> None:
    deb(apt.directory / "libz.deb", {"evil": b"x"})
    with pytest.raises(HostError, match=r"libz 1.0: what was downloaded is something else; run `apt-get update`"):
        debian.tree(Wanted.parse("tool"), cache)
    assert len(list((cache.directory / "deb").iterdir())) == 4, "the others are kept"


def test_unknown_and_virtual_packages(apt: Apt, cache: Cache) -> None:
    with pytest.raises(ConfigError, match="package 'tol' is unknown to apt"):
        names("tol", cache)
    with pytest.raises(ConfigError, match=r"package 'tool=2.0' is unknown to apt"):
        names("tool=2.0", cache)
    with pytest.raises(ConfigError, match="no package is mail-agent: name one that provides it, or -mail-agent"):
        names("virtual-user", cache)
    assert names("virtual-user,-mail-agent", cache) == ["virtual-user"]


def test_lists_that_are_old_are_brought_up_to_date(apt: Apt, cache: Cache) -> None:
    old = (apt.directory / "known.json").read_text()
    apt.add("libz", "libc6", files=["usr/lib/x/newer.so"])
    apt.add("tool2", "libz")
    new = (apt.directory / "known.json").read_text()
    for package, asked in (("tool", ["download", "download"]), ("tool2", ["download"])):
        (apt.directory / "known.json").write_text(old)
        (apt.directory / "newer.json").write_text(new)
        assert "usr/lib/x/newer.so" in contents(debian.tree(Wanted.parse(package), cache))
        said = [line.split()[0] for line in apt.asked()]
        assert "update" in said and [word for word in said if word == "download"] == asked


def test_too_many_packages(apt: Apt, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "MAX_PACKAGES", 3)
    with pytest.raises(ConfigError, match="more than 3 packages; leave some out with -NAME"):
        names("tool", cache)


@pytest.mark.parametrize("text", ["", "-x", "a b", "Tool", "--option", "-o=x", "a=1=2", "tool,;rm", "../x"])
def test_words_that_are_no_packages_never_reach_apt(text: str, apt: Apt) -> None:
    with pytest.raises(ConfigError, match=r"names no package|NAME, NAME=VERSION"):
        Wanted.parse(text)


def test_without_apt(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nothing")
    with pytest.raises(HostError, match="there is no apt-cache; use dir:, tar: or oci-layout:"):
        names("tool", cache)


def cut(octets: bytes) -> bytes:
    return octets[:150]


def lying(octets: bytes) -> bytes:
    return octets[:8] + octets[8:].replace(b"data.tar.xz     ", b"other.tar       ")


def longer(octets: bytes) -> bytes:
    at = octets.index(b"data.tar") + 48
    return octets[:at] + b"9999999999" + octets[at + 10 :]


@pytest.mark.parametrize("harm", [cut, lying, longer, lambda octets: b"no package"])
def test_damaged_packages(harm: Callable[[bytes], bytes], tmp_path: Path) -> None:
    deb(tmp_path / "x.deb", {"a": b""})
    (tmp_path / "x.deb").write_bytes(harm((tmp_path / "x.deb").read_bytes()))
    with pytest.raises(ConfigError, match=r"it: (a damaged package|no Debian package)"):
        debian.data(tmp_path / "x.deb", "it")


def test_what_is_kept_is_the_users_own(apt: Apt, cache: Cache) -> None:
    debian.tree(Wanted.parse("gcc-base"), cache)
    for path in cache.directory.rglob("*"):
        assert not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) & 0o022 == 0
