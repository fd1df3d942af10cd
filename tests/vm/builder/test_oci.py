"""Images of containers from files: layers and what they take away, digests, configs, and `docker save`."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError
from tests.support.images import contents, layout, member, stored, tar
from vm.build import oci
from vm.build.archive import Cache
from vm.build.tree import Tree


def laid(directory: Path, *layers: bytes) -> Tree:
    tree, _ = oci.layout(layout(directory / "image", layers), "", Cache(directory / "cache"))
    return tree


LOWER = {"etc/": b"", "etc/a": b"a", "etc/b": b"b", "etc/sub/c": b"c", "usr/bin/x": b"x", "bin": "usr/bin"}
WHITEOUTS: dict[str, tuple[dict[str, Any], dict[str, bytes | str]]] = {
    "a file goes": ({"etc/.wh.a": b""}, {"etc/b": b"b", "etc/sub/c": b"c"}),
    "a directory goes": ({"etc/.wh.sub": b""}, {"etc/a": b"a", "etc/b": b"b"}),
    "all of a directory goes": ({"etc/.wh..wh..opq": b"", "etc/new": b"n"}, {"etc/new": b"n"}),
    "what the same layer brings stays, whichever comes first": (
        {"etc/a": b"again", "etc/.wh.a": b"", "etc/new": b"n", "etc/.wh..wh..opq": b""},
        {"etc/a": b"again", "etc/new": b"n"},
    ),
    "nothing goes": (
        {"etc/.wh.nothing": b"", "gone/.wh..wh..opq": b""},
        {"etc/a": b"a", "etc/b": b"b", "etc/sub/c": b"c"},
    ),
    "a file takes a directory's place": ({"etc/sub": b"f"}, {"etc/a": b"a", "etc/b": b"b", "etc/sub": b"f"}),
    "a directory takes a file's place": (
        {"etc/a/": b"", "etc/a/x": b"x"},
        {"etc/a/x": b"x", "etc/b": b"b", "etc/sub/c": b"c"},
    ),
}


@pytest.mark.parametrize(("upper", "expected"), WHITEOUTS.values(), ids=WHITEOUTS.keys())
def test_layers(upper: dict[str, Any], expected: dict[str, bytes | str], tmp_path: Path) -> None:
    tree = laid(tmp_path, gzip.compress(tar(LOWER)), tar(upper))
    assert {path: text for path, text in contents(tree).items() if path.startswith("etc/")} == expected
    assert contents(tree)["usr/bin/x"] == b"x"


def test_a_whiteout_through_a_link_takes_away_within_the_tree(tmp_path: Path) -> None:
    tree = laid(tmp_path, tar(LOWER), tar({"bin/.wh.x": b""}))
    assert "usr/bin/x" not in contents(tree)


@pytest.mark.parametrize("name", ["etc/.wh...", "etc/.wh..", ".wh."])
def test_a_whiteout_of_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes away what is no file"):
        laid(tmp_path, tar(LOWER), tar({name: b""}))


def test_the_config_of_an_image(tmp_path: Path) -> None:
    config = {
        "Entrypoint": ["/bin/x"],
        "Cmd": ["-a"],
        "Env": ["A=b"],
        "WorkingDir": "/srv",
        "User": "web:www",
        "Labels": {oci.LABEL: '{"net": "host"}'},
    }
    files = {"etc/passwd": b"root:x:0:0::/:\nweb:x:33:34::/:\n", "etc/group": b"www:x:35:\n"}
    tree, found = oci.layout(layout(tmp_path, [tar(files)], config), "it", Cache(tmp_path / "cache"))
    assert (found.entrypoint, found.cmd, found.env, found.cwd, found.user) == (
        ("/bin/x",),
        ("-a",),
        ("A=b",),
        "/srv",
        "web:www",
    )
    assert found.labels == {oci.LABEL: '{"net": "host"}'}
    assert (
        oci.identity(tree, "web", "passwd"),
        oci.identity(tree, "www", "group"),
        oci.identity(tree, "7", "passwd"),
    ) == (33, 35, 7)
    with pytest.raises(ConfigError, match="'nobody' is not in the image's /etc/passwd"):
        oci.identity(tree, "nobody", "passwd")


def test_one_of_several_images_is_named(tmp_path: Path) -> None:
    layout(tmp_path, [tar({"one": b""})], name="one:1.0")
    layout(tmp_path, [tar({"two": b""})], name="two")
    cache = Cache(tmp_path / "cache")
    assert set(contents(oci.layout(tmp_path, "one:1.0", cache)[0])) == {"one"}
    for name in ("", "three"):
        with pytest.raises(ConfigError, match=r"images fit; it has one:1\.0, two: name one with"):
            oci.layout(tmp_path, name, cache)


def test_the_image_for_our_processor_of_several(tmp_path: Path) -> None:
    layout(tmp_path, [tar({"arm": b""})], name="it")
    layout(tmp_path, [tar({"ours": b""})], name="it")
    index = json.loads((tmp_path / "index.json").read_text())
    for described, processor in zip(index["manifests"], ("arm64", "amd64"), strict=True):
        described["platform"] = {"os": "linux", "architecture": processor}
    inner = json.dumps({"manifests": index["manifests"]}).encode()
    digest = hashlib.sha256(inner).hexdigest()
    (tmp_path / "blobs/sha256" / digest).write_bytes(inner)
    (tmp_path / "index.json").write_text(json.dumps({"manifests": [{"digest": f"sha256:{digest}"}]}))
    assert set(contents(oci.layout(tmp_path, "", Cache(tmp_path / "cache"))[0])) == {"ours"}


def damaged(directory: Path) -> None:
    for blob in (directory / "blobs/sha256").iterdir():
        blob.write_bytes(blob.read_bytes() + b" ")


def traversing(directory: Path) -> None:
    (directory / "secret").write_text("{}")
    (directory / "index.json").write_text(json.dumps({"manifests": [{"digest": "sha256:../../secret"}]}))


def endless(directory: Path) -> None:
    """An index in an index in an index ..."""
    previous = b"{}"
    for _ in range(6):
        digest = hashlib.sha256(previous).hexdigest()
        (directory / "blobs/sha256" / digest).write_bytes(previous)
        previous = json.dumps({"manifests": [{"digest": f"sha256:{digest}"}]}).encode()
    (directory / "index.json").write_bytes(previous)


def without_index(directory: Path) -> None:
    (directory / "index.json").unlink()


def with_index(text: str) -> Callable[[Path], None]:
    return lambda directory: [(directory / "index.json").write_text(text)] and None


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (damaged, "has other octets than its name says"),
        (traversing, "sha256: and 64 hexadecimal digits would be accepted"),
        (endless, "'config' in its JSON|digest|an object is wanted"),
        (without_index, "index.json: No such file"),
        (with_index("{"), "index.json: is not JSON"),
        (with_index("[" * 100_000), "index.json: is not JSON"),
        (with_index("[]"), "an object is wanted in its JSON"),
        (with_index('{"manifests": 7}'), "'manifests' in its JSON: a list is wanted"),
        (with_index('{"manifests": [7]}'), "an object is wanted"),
        (with_index('{"manifests": [{"platform": [], "annotations": 3}]}'), "digest None|an object is wanted"),
        (with_index(" " * (5 << 20)), "at most 4,194,304 are read"),
    ],
)
def test_damaged_and_hostile_layouts(harm: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    layout(tmp_path, [tar({"a": b""})])
    harm(tmp_path)
    with pytest.raises(ConfigError, match=words):
        oci.layout(tmp_path, "", Cache(tmp_path / "cache"))


def saved(directory: Path, *, config: str = "c.json", layers: list[str] | None = None) -> Path:
    images = [
        {
            "Config": config,
            "RepoTags": ["web:1"],
            "Layers": ["1/layer.tar", "2/layer.tar"] if layers is None else layers,
        },
        {"Config": config, "RepoTags": ["other:2"], "Layers": ["2/layer.tar"]},
    ]
    files: dict[str, Any] = {
        "manifest.json": json.dumps(images).encode(),
        "c.json": json.dumps({"config": {"Cmd": ["/bin/web"]}}).encode(),
        "1/layer.tar": tar({"a": b"1", "b": b"1"}),
        "2/layer.tar": tar({".wh.a": b"", "b": b"2"}),
        "3/layer.tar": member("3/layer.tar", b"2", link="../1/layer.tar"),
    }
    path = stored(directory, gzip.compress(tar(files)))[0].path
    assert isinstance(path, Path)
    return path


def test_docker_save(tmp_path: Path) -> None:
    tree, config = oci.saved(saved(tmp_path), "web:1", Cache(tmp_path / "cache"))
    assert contents(tree) == {"b": b"2"}
    assert config.cmd == ("/bin/web",)
    with pytest.raises(ConfigError, match="which image\\? It has other:2, web:1"):
        oci.saved(saved(tmp_path), "", Cache(tmp_path / "cache"))


@pytest.mark.parametrize(
    "given",
    [{"config": "../../etc/passwd"}, {"config": "nothing"}, {"layers": ["/etc/passwd"]}, {"layers": ["x"] * 999}],
)
def test_docker_save_that_is_hostile(given: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        oci.saved(saved(tmp_path, **given), "web:1", Cache(tmp_path / "cache"))
