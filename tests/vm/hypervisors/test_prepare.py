"""Disks, files and sockets before a hypervisor starts."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from netstack.errors import ConfigError, HostError
from vm.api import Disk, Plan
from vm.hypervisors.prepare import prepare


async def test_a_disk_is_made_once_and_takes_no_room(tmp_path: Path) -> None:
    disk = Disk(path=tmp_path / "data.img", size=4 << 30)
    plan = Plan(driver="x", argv=(), disks=(disk,), files={tmp_path / "conf": b"new"})
    (tmp_path / "conf").write_bytes(b"old")
    await prepare(plan)
    made = disk.path.stat()
    assert (made.st_size, made.st_mode & 0o777) == (4 << 30, 0o600)
    assert made.st_blocks * 512 < 1 << 20
    assert (tmp_path / "conf").read_bytes() == b"new" and (tmp_path / "conf").stat().st_mode & 0o777 == 0o600
    disk.path.write_bytes(b"precious")
    await prepare(plan)
    assert disk.path.read_bytes() == b"precious"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="no qemu-img (package qemu-utils)")
async def test_a_qcow2_disk(tmp_path: Path) -> None:
    disk = Disk(path=tmp_path / "data.qcow2", size=1 << 30, format="qcow2")
    await prepare(Plan(driver="x", argv=(), disks=(disk,)))
    assert disk.path.read_bytes()[:4] == b"QFI\xfb"
    assert disk.path.stat().st_mode & 0o777 == 0o600


async def test_without_qemu_img_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    disk = Disk(path=tmp_path / "data.qcow2", size=1 << 30, format="qcow2")
    with pytest.raises(HostError, match=r"qemu-img is not installed; .* apt install qemu-utils, or use format: raw"):
        await prepare(Plan(driver="x", argv=(), disks=(disk,)))
    assert not disk.path.exists()


async def test_a_disk_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is not there; name one that is, or give a size"):
        await prepare(Plan(driver="x", argv=(), disks=(Disk(path=tmp_path / "absent"),)))
    with pytest.raises(HostError, match=r"/no/d\.img cannot be made: No such file or directory"):
        await prepare(Plan(driver="x", argv=(), disks=(Disk(path=tmp_path / "no" / "d.img", size=1),)))
    with pytest.raises(HostError, match="cannot be made"):
        await prepare(Plan(driver="x", argv=(), disks=(Disk(path=tmp_path / "huge", size=1 << 63 - 1),)))
    assert not (tmp_path / "huge").exists()


async def test_a_socket_of_a_run_before_goes_and_a_file_stays(tmp_path: Path) -> None:
    left, file = tmp_path / "s", tmp_path / "f"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(left))
    file.write_text("somebody's")
    await prepare(Plan(driver="x", argv=(), sockets=(left, file, tmp_path / "absent")))
    assert not left.exists() and file.read_text() == "somebody's"
