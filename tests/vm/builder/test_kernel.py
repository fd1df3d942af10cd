"""Kernel and modules out of images: which are taken, in which order they are loaded, and what depmod would have written."""

from __future__ import annotations

import gzip
import json
import lzma
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError
from tests.support.images import contents, stored, tar
from tests.vm.builder.test_debian import Apt
from vm.build import kernel
from vm.build.archive import Cache
from vm.build.kernel import Picked
from vm.build.sources import Sources
from vm.linuxkit.schema import Kernel

AT = "lib/modules/6.1.0"


def module(depends: str = "", *aliases: str) -> bytes:
    """What is looked at in a module."""
    info = b"".join(b"alias=%s\0" % alias.encode() for alias in aliases)
    return b"\x7fELF\0license=GPL\0" + info + b"depends=%s\0retpoline=Y\0" % depends.encode()


MODULES = {
    f"{AT}/kernel/virtio.ko": module(),
    f"{AT}/kernel/virtio-ring.ko.xz": lzma.compress(module("virtio")),
    f"{AT}/kernel/virtio_net.ko.gz": gzip.compress(
        module("virtio_ring,net-failover,virtio", "virtio:d1v*", "virtio:d1w*")
    ),
    f"{AT}/kernel/net_failover.ko": module("failover"),
    f"{AT}/kernel/failover.ko": module(),
    f"{AT}/kernel/ext4.ko": module("jbd2"),
    f"{AT}/kernel/jbd2.ko": module(),
    f"{AT}/kernel/other.ko": module(),
    f"{AT}/modules.builtin": b"kernel/drivers/acpi/button.ko\n",
    f"{AT}/modules.symbols": b"x",
}
IMAGE = {"boot/vmlinuz-6.1.0": b"MZ kernel", "boot/config": b"x", **MODULES}


def picked(directory: Path, files: Mapping[str, Any], query: str = "", **given: str) -> Picked:
    stored(directory, tar(files))
    sources = Sources(Cache(directory / "cache"), directory)
    return kernel.pick(Kernel(image=f"tar:archive{query}", **given), sources)


def text(found: Picked, name: str) -> str:
    entry = found.modules.get(f"{AT}/{name}")
    assert entry is not None, name
    return entry.read().decode()


def modules(found: Picked) -> list[str]:
    return [path.rpartition("/")[2] for path in contents(found.modules) if path.endswith(".ko")]


def test_a_machine_gets_what_it_wants(tmp_path: Path) -> None:
    found = picked(tmp_path, IMAGE)
    assert (found.binary.read(), found.release) == (b"MZ kernel", "6.1.0")
    assert text(found, "load").split() == [
        "kernel/failover.ko" if name == "failover" else f"kernel/{name}.ko"
        for name in ("virtio", "virtio-ring", "failover", "net_failover", "virtio_net")
    ]
    assert modules(found) == [
        "ext4.ko",
        "failover.ko",
        "jbd2.ko",
        "net_failover.ko",
        "virtio-ring.ko",
        "virtio.ko",
        "virtio_net.ko",
    ]
    assert (
        text(found, "kernel/virtio_net.ko")
        == module("virtio_ring,net-failover,virtio", "virtio:d1v*", "virtio:d1w*").decode()
    )


def test_what_depmod_would_have_written(tmp_path: Path) -> None:
    found = picked(tmp_path, IMAGE)
    lines = dict(line.split(":") for line in text(found, "modules.dep").splitlines())
    assert lines["kernel/virtio_net.ko"].split() == [
        f"kernel/{name}.ko" for name in ("net_failover", "failover", "virtio-ring", "virtio")
    ], "the nearest first: modprobe begins at the end"
    assert lines["kernel/virtio.ko"] == ""
    assert text(found, "modules.alias") == "alias virtio:d1v* virtio_net\nalias virtio:d1w* virtio_net\n"


def test_chosen_modules(tmp_path: Path) -> None:
    found = picked(tmp_path, IMAGE, "?modules=virtio_ring,button")
    assert modules(found) == ["virtio-ring.ko", "virtio.ko"], "button is built in"
    assert text(found, "load").split() == ["kernel/virtio.ko", "kernel/virtio-ring.ko"]
    found = picked(tmp_path, IMAGE, "?modules=all")
    assert len(modules(found)) == 8
    assert "other" not in text(found, "load")


@pytest.mark.parametrize(
    ("query", "files", "given", "words"),
    [
        ("?modules=nothing", IMAGE, {}, "there is no module nothing"),
        ("?modules=", IMAGE, {}, "modules=all or modules=NAME,NAME"),
        ("?x=y", IMAGE, {}, "modules=all or modules=NAME,NAME"),
        ("", {"etc/x": b""}, {}, "no kernel: neither kernel nor boot/vmlinuz-\\*"),
        ("", {**IMAGE, "boot/vmlinuz-7": b""}, {}, "2 kernels in /boot; say with kernel.binary which"),
        ("", IMAGE, {"binary": "bzImage"}, "neither bzImage nor"),
        ("", IMAGE, {"tar": "mods.tar"}, "has no mods.tar"),
        ("", IMAGE, {"ucode": "ucode.cpio"}, "has no ucode.cpio"),
        ("", {**IMAGE, "lib/modules/7/x.ko": module()}, {}, "modules of two kernels, 6.1.0 and 7"),
        ("", {**IMAGE, f"{AT}/kernel/virtio.ko": b"x"}, {}, "neither a module nor one in an .xz"),
        ("", {**IMAGE, f"{AT}/kernel/virtio-ring.ko.xz": b"x"}, {}, "virtio-ring.ko.xz: "),
    ],
)
def test_what_cannot_be_picked(
    query: str, files: Mapping[str, Any], given: dict[str, str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        picked(tmp_path, files, query, **given)


def test_modules_that_depend_on_each_other_end(tmp_path: Path) -> None:
    files = {"kernel": b"k", f"{AT}/a.ko": module("b"), f"{AT}/b.ko": module("a,a,missing")}
    found = picked(tmp_path, files, "?modules=a")
    assert text(found, "load").split() == ["b.ko", "a.ko"]


def test_a_module_may_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "MAX_MODULE", 1 << 20)
    files = {"kernel": b"k", f"{AT}/a.ko.xz": lzma.compress(module("b") + bytes(50 << 20))}
    assert len(text(picked(tmp_path, files, "?modules=a"), "a.ko")) == 1 << 20


def test_a_kernel_image_of_linuxkit(tmp_path: Path) -> None:
    files = {"kernel": b"bz", "kernel.tar": gzip.compress(tar(MODULES)), "ucode.cpio": b"micro", "other": b"raw"}
    found = picked(tmp_path, files, ucode="ucode.cpio")
    assert found.binary.read() == b"bz" and "virtio_net.ko" in modules(found)
    assert found.microcode is not None and found.microcode.read() == b"micro"
    found = picked(tmp_path, files, binary="other", tar="none")
    assert (found.binary.read(), len(found.modules), found.release) == (b"raw", 0, "")


def test_debians_package_is_kept_as_what_was_picked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    apt = Apt(tmp_path / "bin")
    apt.add("linux-image-test", "linux-image-6.1.0 (= 1), kmod")
    apt.add("linux-image-6.1.0", "kmod, initramfs-tools | linux-initramfs-tool")
    package = apt.known["linux-image-6.1.0"]
    from tests.support.images import deb

    package["SHA256"] = deb(apt.directory / "linux-image-6.1.0.deb", IMAGE)
    (apt.directory / "known.json").write_text(json.dumps(apt.known))
    monkeypatch.setenv("PATH", f"{apt.directory}:{os.environ['PATH']}")
    sources = Sources(Cache(tmp_path / "cache"), tmp_path)
    wanted = Kernel(image="deb:linux-image-test")
    first = kernel.pick(wanted, sources)
    assert "download linux-image-6.1.0=1.0 linux-image-test=1.0" in apt.asked(), "and no kmod"
    monkeypatch.setenv("PATH", "/nothing")
    again = kernel.pick(wanted, sources)
    assert contents(again.modules) == contents(first.modules) and again.release == first.release == "6.1.0"
    assert again.binary.read() == b"MZ kernel"
    assert not (tmp_path / "cache/plain").exists(), "the whole package is not kept unpacked"
    with pytest.raises(ConfigError, match="binary, tar and ucode are of other images"):
        kernel.pick(Kernel(image="deb:linux-image-test", tar="none"), sources)
