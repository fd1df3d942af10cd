"""What must be there before a hypervisor starts: its files and disks, and no socket of a run before."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
from pathlib import Path

from netstack.errors import ConfigError, HostError
from vm.api import Disk, Plan
from vm.hypervisors.process import find


async def prepare(plan: Plan) -> None:
    """Harmless when repeated. Raises `ConfigError` for a disk that is to be there and is not, `HostError` for what fails."""
    for path in plan.sockets:
        remove_socket(path)
    for path, octets in plan.files.items():
        write(path, octets)
    for disk in plan.disks:
        await make(disk)


def remove_socket(path: Path) -> None:
    """Where it is one: a file of that name is somebody's."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISSOCK(path.lstat().st_mode):
            path.unlink()


def write(path: Path, octets: bytes) -> None:
    """The whole of it or what was there before, for us alone. Raises `HostError`."""
    scratch = path.with_name(f"{path.name}.new")
    try:
        scratch.unlink(missing_ok=True)
        with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(octets)
        scratch.replace(path)
    except OSError as error:
        raise HostError(f"{path} cannot be written: {error.strerror}") from None


async def make(disk: Disk) -> None:
    """Make its file where it is absent; it takes no room until it is written to."""
    if disk.path.exists():
        return
    if disk.size is None:
        raise ConfigError(f"disk {disk.path}: it is not there; name one that is, or give a size to have it made")
    try:
        descriptor = os.open(disk.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise HostError(f"disk {disk.path} cannot be made: {error.strerror}") from None
    try:
        if disk.format == "raw":
            os.ftruncate(descriptor, disk.size)
        else:
            await _qcow2(disk)
    except OSError as error:
        disk.path.unlink()
        raise HostError(f"disk {disk.path} cannot be made: {error.strerror}") from None
    except HostError:
        disk.path.unlink()
        raise
    finally:
        os.close(descriptor)


async def _qcow2(disk: Disk) -> None:
    program = find("qemu-img", "a disk in qcow2 is made with it; apt install qemu-utils, or use format: raw")
    process = await asyncio.create_subprocess_exec(
        *(program, "create", "-q", "-f", "qcow2", str(disk.path), str(disk.size)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    _, said = await process.communicate()
    if process.returncode:
        raise HostError(f"disk {disk.path} cannot be made: {said.decode(errors='replace').strip()}")
