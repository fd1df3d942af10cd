"""Image references: each kind, several in one, and what is said of those that would need a registry."""

from __future__ import annotations

import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from tests.support.images import contents, layout, stored, tar
from vm.build.archive import Cache
from vm.build.sources import SITE, Sources


@pytest.fixture
def sources(tmp_path: Path) -> Sources:
    return Sources(Cache(tmp_path / "cache"), tmp_path)


def test_a_directory_is_taken_as_it_is_but_for_its_owners(sources: Sources, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/motd").write_text("hello")
    (root / "etc/motd").chmod(0o4640)
    (root / "etc/link").symlink_to("/etc/shadow")
    os.mkfifo(root / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(root / "socket"))
        tree = sources.image("dir:root").tree
    assert {path: stat.filemode(entry.mode) for path, entry in tree.walk()} == {
        "etc": "drwxr-xr-x",
        "etc/link": "lrwxrwxrwx",
        "etc/motd": "-rwSr-----",
        "pipe": "prw-r--r--",
    }
    assert {(entry.uid, entry.gid) for _, entry in tree.walk()} == {(0, 0)}
    assert contents(tree)["etc/link"] == "/etc/shadow"


def test_several_are_laid_over_each_other(sources: Sources, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/x").write_text("one")
    (tmp_path / "one/y").write_text("one")
    stored(tmp_path, tar({"x": b"two"}))
    assert contents(sources.image("dir:one;tar:archive").tree) == {"x": b"two", "y": b"one"}
    assert sources.image("dir:one;tar:archive") is sources.image("dir:one;tar:archive")


def test_paths_with_colons(sources: Sources, tmp_path: Path) -> None:
    layout(tmp_path / "a:b", [tar({"x": b""})], name="it:1")
    assert set(contents(sources.image("oci-layout:a:b:it:1").tree)) == {"x"}
    assert set(contents(sources.image("oci-layout:a:b").tree)) == {"x"}
    with pytest.raises(ConfigError, match="there is no such file or directory"):
        sources.image("oci-layout:c:it")


def test_modules_of_this_python(sources: Sources) -> None:
    tree = sources.image("python:portfwd,netstack.errors,tarfile").tree
    paths = set(contents(tree))
    assert {f"{SITE}/portfwd/mux/engine.py", f"{SITE}/netstack/errors.py", f"{SITE}/tarfile.py"} <= paths
    assert {path for path in paths if path.startswith(f"{SITE}/netstack/")} == {
        f"{SITE}/netstack/__init__.py",
        f"{SITE}/netstack/errors.py",
    }
    assert not [path for path in paths if "__pycache__" in path]
    assert {stat.filemode(entry.mode) for _, entry in tree.walk()} == {"drwxr-xr-x", "-rw-r--r--"}
    for name in ("nothing_of_the_kind", "netstack.nothing", "../x", "sys", "tarfile.x", ""):
        with pytest.raises(ConfigError, match=r"has no package or module of this name|no registry"):
            sources.image(f"python:{name}")


def test_python_is_compiled_beforehand_where_it_is_of_our_version(sources: Sources, tmp_path: Path) -> None:
    library = tmp_path / f"python/usr/lib/python3.{sys.version_info.minor}"
    library.mkdir(parents=True)
    (library / "good.py").write_text("WORDS = {'a', 'b', 'c', 'd'}\ndef f(x): return x in {'p', 'q', 'r', 's'}\n")
    (library / "bad.py").write_text("no Python at all")
    found = dict(sources.image("dir:python").tree.walk())
    (name,) = [path for path in found if path.endswith(".pyc")]
    assert name.endswith(f"/__pycache__/good.cpython-3{sys.version_info.minor}.pyc")
    octets = found[name].read()
    assert octets[4] & 1 and not octets[4] & 2, "by a hash that is not looked at (PEP 552)"
    assert str(tmp_path).encode() not in octets
    other = Sources(Cache(tmp_path / "another-cache"), tmp_path)
    assert contents(other.image("dir:python").tree)[name] == octets


@pytest.mark.parametrize(
    "reference", ["alpine", "linuxkit/init:v1.2", "docker.io/library/nginx@sha256:abc", "@pkg:./x", "dir:"]
)
def test_there_is_no_registry(reference: str, sources: Sources) -> None:
    with pytest.raises(ConfigError) as error:
        sources.image(reference)
    assert f"image {reference!r}: there is no registry here" in str(error.value)
    assert "skopeo copy" in str(error.value) and "docker save" in str(error.value)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("dir:nothing", "is not a directory"),
        ("tar:nothing", "No such file"),
        ("tar:.", "is not a file"),
        ("deb:X", "package 'X'"),
        ("docker-archive:nothing:x", "there is no such file"),
    ],
)
def test_what_is_not_there(reference: str, words: str, sources: Sources) -> None:
    with pytest.raises(ConfigError, match=words):
        sources.image(reference)
