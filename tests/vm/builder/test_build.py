"""A machine's root and files from its YAML: what lies where, that it is the same wherever it is built, and what is refused."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError, HostError
from tests.support.images import layout, tar
from vm.build import cpio
from vm.build.build import Built, build
from vm.build.tree import Entry
from vm.linuxkit.load import load, load_all

YAML = """\
kernel: {image: "dir:kernel?modules=x", cmdline: "console=hvc0"}
init: [dir:busybox]
volumes: [{name: data, image: dir:web}]
onboot:
  - {name: first, image: dir:busybox, command: [/bin/true]}
  - {name: second, image: dir:busybox, command: [/bin/true]}
onshutdown:
  - {name: last, image: dir:web, command: [/bin/true]}
services:
  - {name: web, image: "oci-layout:oci", capabilities: [all]}
files:
  - {path: etc/motd, contents: hello, mode: "0640", uid: web}
  - {path: etc/link, symlink: motd}
  - {path: var/empty, directory: true, mode: "0711"}
  - {path: etc/source, source: web/index.html}
  - {path: etc/none, source: nothing, optional: true}
  - {path: etc/linuxkit.yml, metadata: yaml}
"""


def place(directory: Path) -> Path:
    """What the YAML wants, in a directory."""
    for path, text in (
        ("kernel/kernel", "bzImage"),
        ("kernel/lib/modules/6/x.ko", "\x7fELF\0depends=\0"),
        ("busybox/bin/busybox", "static"),
        ("web/index.html", "it works"),
    ):
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text(text)
    label = '{"binds": ["/etc/motd:/etc/motd"], "capabilities.add": ["CAP_KILL"], "net": "new"}'
    config = {"Cmd": ["/bin/web"], "User": "7", "Labels": {"org.mobyproject.config": label}}
    layout(directory / "oci", [tar({"bin/web": b"#!"})], config)
    return directory


def built(directory: Path, yaml: str = YAML, **given: Any) -> tuple[Built, dict[str, Entry]]:
    made = build(
        load(yaml), directory / "out", cache=directory / "cache", base_directory=place(directory / "base"), **given
    )
    with open(made.initrd, "rb") as file:
        return made, {path: entry for path, entry, _ in cpio.read(file)}


def test_what_lies_where(tmp_path: Path) -> None:
    made, files = built(tmp_path)
    assert made.kernel.read_text() == "bzImage"
    assert made.vmlinux.read_text() == "bzImage", "whose compression nobody knows"
    assert (made.cmdline, (tmp_path / "out/cmdline").read_text()) == ("console=hvc0", "console=hvc0\n")
    assert (made.release, made.initrd_octets, made.files) == ("6", made.initrd.stat().st_size, len(files))
    assert files["init"].read().startswith(b"#!/bin/busybox sh\n") and files["init"].mode == stat.S_IFREG | 0o755
    assert {
        path for path in files if path.startswith("containers/") and path.count("/") < 4 and not files[path].is_dir()
    } >= {
        "containers/onboot/000-first/run",
        "containers/onboot/000-first/inside",
        "containers/onboot/001-second/run",
        "containers/onshutdown/000-last/run",
        "containers/services/web/run",
        "containers/volumes/data/index.html",
    }
    assert "containers/images/0/bin/busybox" in files, "of two containers"
    assert "containers/onboot/000-first/rootfs/bin/busybox" not in files
    assert "containers/services/web/rootfs/bin/web" in files
    assert "containers/onshutdown/000-last/rootfs/index.html" in files
    inside = files["containers/services/web/inside"].read().decode()
    assert "bind /etc/motd /etc/motd" in inside and "-S7 -G0 -- /bin/web" in inside, "of its label and its config"
    assert " -n " in files["containers/services/web/run"].read().decode()
    for path in ("dev", "proc", "sys", "run", "tmp", "var/log", "etc/hosts", "etc/resolv.conf", "lib/modules/6/x.ko"):
        assert path in files
    assert [str(warning) for warning in made.warnings] == [
        "web: capabilities: user 7 has none without util-linux's setpriv: put deb:util-linux in init",
        "first, second, last: capabilities: all are had: busybox cannot take any away, util-linux's setpriv can: "
        "put deb:util-linux in init",
    ]


def test_files(tmp_path: Path) -> None:
    _, files = built(tmp_path)
    motd = files["etc/motd"]
    assert (motd.read(), stat.S_IMODE(motd.mode), motd.uid, motd.gid) == (b"hello", 0o640, 103, 0)
    assert files["etc/link"].is_link() and files["etc/link"].read() == b"motd"
    assert files["var/empty"].mode == stat.S_IFDIR | 0o711
    assert files["etc/source"].read() == b"it works"
    assert "etc/none" not in files
    assert load(files["etc/linuxkit.yml"].read().decode()) == load(YAML)


@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_the_same_octets_wherever_it_is_built(compression: str, tmp_path: Path) -> None:
    initrds = []
    for name in ("here", "somewhere/else"):
        made, _ = (build(load(YAML), tmp_path / name / "out", cache=tmp_path / name / "cache",
                         base_directory=place(tmp_path / name / "base"), compression=compression), None)  # type: ignore[arg-type]  # fmt: skip
        initrds.append(made.initrd.read_bytes())
    assert initrds[0] == initrds[1]
    assert len(initrds[0]) > 1000


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[str] = []
    built(tmp_path, progress=told.append)
    assert told == ["dir:kernel", "dir:busybox", "dir:web", "oci-layout:oci", "initramfs"]


REFUSED = [
    ({'kernel: {image: "dir:kernel?modules=x", cmdline: "console=hvc0"}\n': ""}, "kernel is missing"),
    ({'image: "dir:kernel?modules=x", ': ""}, "kernel.image is not given"),
    ({"init: [dir:busybox]": "init: [dir:web]"}, "none of its images has a /bin/busybox"),
    ({"image: dir:web, command": "image: nginx:1.2, command"}, "image 'nginx:1.2': there is no registry here"),
    ({"name: data, image": "name: data, format: oci, image"}, "volumes: data: format oci is not made here"),
    ({"source: nothing, optional: true": "source: nothing"}, "nothing: No such file"),
    ({"path: etc/link,": "path: etc/motd/x,"}, "'etc/motd/x': /etc/motd is a file already"),
    ({"path: var/empty,": "path: etc/motd,"}, "/etc/motd is a file already and cannot become a directory"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_cannot_be_built(changes: dict[str, str], words: str, tmp_path: Path) -> None:
    yaml = YAML
    for old, new in changes.items():
        assert old in yaml
        yaml = yaml.replace(old, new)
    with pytest.raises(ConfigError, match=words):
        built(tmp_path, yaml)
    assert not (tmp_path / "out/initrd.img").exists()


def test_what_is_not_done_is_said(tmp_path: Path) -> None:
    (place(tmp_path / "base") / "busybox/init").write_text("another")
    made, files = built(tmp_path, YAML + "  - {path: tmp/x, contents: hidden}\ntrust: {org: [linuxkit]}\n")
    assert {str(warning).partition(": ")[0] for warning in made.warnings} >= {"init", "files", "trust"}
    assert files["init"].read() != b"another"


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"file/out: Not a directory"):
        build(load(YAML), tmp_path / "file/out", cache=tmp_path / "cache", base_directory=place(tmp_path / "base"))


def test_what_cannot_be_a_name_is_refused(tmp_path: Path) -> None:
    label = '{"env": ["A=\\ud800"]}'
    base = place(tmp_path / "base")
    layout(base / "bad", [tar({"x": b""})], {"Cmd": ["/x"], "Labels": {"org.mobyproject.config": label}})
    for yaml in (
        YAML.replace("oci-layout:oci", "oci-layout:bad"),
        YAML.replace("path: etc/motd", 'path: "etc/\\ud800"'),
        YAML.replace("dir:web,", '"dir:\\ud800",'),
    ):
        with pytest.raises(ConfigError, match=r"\\ud800|\ud800"):
            built(tmp_path, yaml)


def test_modules_that_depend_without_end_are_refused(tmp_path: Path) -> None:
    modules = place(tmp_path / "base") / "kernel/lib/modules/6"
    for number in range(1500):
        (modules / f"m{number}.ko").write_text(f"\x7fELF\0depends=m{number + 1}\0")
    with pytest.raises(ConfigError, match="too deep to follow"):
        built(tmp_path, YAML.replace("?modules=x", "?modules=m0"))


def test_the_example_is_complete() -> None:
    """The machine of the README; what it is built from is downloaded in `tests/qemu/test_build.py`."""
    machine = load_all([Path(__file__).parents[3] / "examples/tiny-linuxkit.yml"])
    assert {service.name for service in machine.services} == {
        "getty",
        "web",
        "docker-socket",
        "engine",
        "forwarder",
        "timesync",
    }
