"""Machines to be planned: one with next to nothing, one with everything its hypervisor has. Their paths are made up."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Any
from uuid import UUID

from tests.support.golden import STATE
from vm.api import Disk, Nic, NicKind, Share, ShareKind, VmSpec, VsockSpec

MAC = "5a:94:ef:e4:0c:ee"


def minimal(**changes: Any) -> VmSpec:
    return VmSpec(**{"name": "docker", "uuid": UUID(int=7), "kernel": Path("/boot/vmlinuz"), **changes})


def full(nic: NicKind, shares: tuple[ShareKind, ...] = (), **changes: Any) -> VmSpec:
    """Two processors, a disk to write and one to read, a card, vsock with ports both ways, a share of each of `shares`."""
    whole = {
        "cpus": 2,
        "memory_mib": 2048,
        "initrd": Path("/boot/initrd"),
        "cmdline": "console=ttyS0,115200 quiet",
        "disks": (disk(), Disk(path=Path("/vm/seed.img"), readonly=True)),
        "nics": (card(nic),),
        "vsock": vsock(),
        "shares": tuple(share(kind) for kind in shares),
        "extra": ("--word",),
    }
    return minimal(**{**whole, **changes})


def disk(**changes: Any) -> Disk:
    return Disk(**{"path": Path("/vm/data.img"), "size": 4 << 30, "discard": True, **changes})


def card(kind: NicKind, **changes: Any) -> Nic:
    own: dict[str, Any] = {"tap": "vmtap0"} if kind == "tap" else {"socket": STATE.network}
    return Nic(
        kind=kind, **{"mac": MAC, "uuid": UUID(int=8), "preferred_ip": IPv4Address("192.168.65.9"), **own, **changes}
    )


def vsock(**changes: Any) -> VsockSpec:
    ports = {"docker": 2376, "forwarder": 62373}
    return VsockSpec(**{"directory": STATE.vsock, "ports": ports, "served": {"control": 4098}, **changes})


def share(kind: ShareKind, **changes: Any) -> Share:
    words = {"tag": f"tag-{kind}", "source": Path("/home/me/src"), "target": "/Users/me/my src", "owner": "passthrough"}
    return Share(kind=kind, **{**words, **changes})
