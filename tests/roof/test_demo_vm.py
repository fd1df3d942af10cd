"""`pyvpnkit demo --vm`, and what it says where there cannot be a machine."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.errors import HostError
from pyvpnkit import boot, cli
from tests.roof.embedded import World, need, processes_with
from tests.support import machine

STEPS = ["parts", "boot", "lease", "features"]
STEPS += ["names", "ping", "page", "published", "upload", "download", "counters", "capture"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A temporary directory that everybody may use."""
    with tempfile.TemporaryDirectory(prefix="pyvpnkit-test-") as name:
        os.chmod(name, 0o1777)
        yield Path(name)


@pytest.mark.qemu
@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_every_step_works(user: str, directory: Path, tmp_path: Path) -> None:
    need("qemu-system-x86_64")
    kept = machine.parts(tmp_path).kernel.parent
    shutil.copytree(kept, directory / "cache" / "pyvpnkit" / kept.name)
    places = {"TMPDIR": str(directory), "XDG_CACHE_HOME": str(directory / "cache")}
    done = World(user=user).run("demo", "--vm", limit_s=150, http_proxy="http://192.0.2.1:1", **places)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    lines = dict(re.findall(r"^ok +(\w+) +(.*)$", done.stdout, re.MULTILINE))
    assert list(lines) == STEPS
    assert lines["lease"].startswith("192.168.65.3 for 5a:94:ef:e4:0c:ee; in there: default via 192.168.65.1 ")
    assert "GUEST_TSO4, " in lines["features"] and "tcp-segmentation-offload: on" in done.stdout
    assert "host.internal is 192.168.65.2" in lines["names"]
    assert "Hello from the host" in lines["page"] and "Hello from the guest" in lines["published"]
    assert done.stdout.count("\ntcp  192.168.65.3:") >= 2, "the flow, while it carries each direction"
    (left,) = (path for path in directory.iterdir() if path.name != "cache")
    assert str(left) in lines["capture"], "and nothing else is left"
    assert not processes_with(str(directory)), "nor the machine"


def test_without_qemu_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["demo", "--vm"]) == 1
    assert "apt-get install qemu-system-x86" in capsys.readouterr().err


def test_without_apt_there_is_no_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(boot.NotHere, match=r"apt|x86-64"):
        boot.parts(tmp_path, tmp_path / "cache")


def test_a_cache_that_cannot_be_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(HostError, match=r"XDG_CACHE_HOME|x86-64"):
        boot.parts(tmp_path, tmp_path / "file" / "cache")
