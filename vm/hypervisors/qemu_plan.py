"""QEMU's command line (spec companions 1.1-1.3, 2.2, 4.1); the words are those that QEMU 7.2 of Debian 12 takes.

Order: what machine it is, how it is told what to do, what it boots, network cards, vsock, disks, shares, and the user's own words.
Memory is shared with other processes (a memfd) only where a device is one of vhost-user, whose other end is such a process.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.api import Disk, Lost, Nic, Plan, Share, Sidecar, StateDir, Unsupported, VmSpec, VsockSpec
from vm.filesystems.qemu9p import security_model
from vm.filesystems.registry import endpoints
from vm.hypervisors import caps

NAME: Final = "qemu"
MACHINES: Final = {"x86_64": "q35", "aarch64": "virt,gic-version=max"}
_SPELLINGS: Final = {"amd64": "x86_64", "arm64": "aarch64"}
SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def host_arch() -> str:
    found = platform.machine().lower()
    return _SPELLINGS.get(found, found)


def kvm_works(arch: str, device: Path = Path("/dev/kvm"), processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether KVM is to be tried. A guest may hang without a word where the device is there for something else than VMX or SVM."""
    return os.access(device, os.R_OK | os.W_OK) and _virtualizes(arch, processors)


def kvm_denied(arch: str, device: Path = Path("/dev/kvm"), processors: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether KVM is there and would work, and we may not use it."""
    return device.exists() and not os.access(device, os.R_OK | os.W_OK) and _virtualizes(arch, processors)


def _virtualizes(arch: str, processors: Path) -> bool:
    if arch != "x86_64":
        return True
    try:
        return re.search(r"^flags\s*:.* (vmx|svm)( |$)", processors.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Where QEMU runs, as far as its words depend on that."""

    arch: str = field(default_factory=host_arch)
    """Of the guest too."""
    system: str = sys.platform
    root: bool | None = None
    """QEMU runs as root; `None`: as we do."""
    version: tuple[int, int] = (7, 2)
    """Of QEMU. The words of 7.2 are taken by all later ones up to 9.2 at least; a stream link needs 8.0 to dial again."""
    kvm: bool = True
    """For `accel: auto`."""

    @classmethod
    def here(cls) -> Host:
        """This one. Nothing is started to find out, and nothing opened but /proc."""
        arch = host_arch()
        return cls(arch=arch, kvm=sys.platform == "linux" and kvm_works(arch))


def argv(spec: VmSpec, state: StateDir, host: Host) -> list[str]:
    """All words. Raises `ConfigError`, `Unsupported`."""
    if host.arch not in MACHINES:
        raise Unsupported(NAME, f"machines of {host.arch}: the driver knows {', '.join(MACHINES)}")
    if spec.kernel is None and host.arch != "x86_64" and "-bios" not in spec.extra:
        raise Unsupported(NAME, f"on {host.arch} it boots a kernel, or with firmware in `extra`: -bios FILE")
    shared = shares_memory(spec)
    if shared and host.system != "linux":
        raise Unsupported(NAME, f"memory shared with other processes ({shared}) is for Linux here")
    words = [f"qemu-system-{host.arch}"]
    words += ["-name", quoted(spec.name), "-uuid", str(spec.uuid)]
    words += ["-nodefaults", "-no-user-config", "-display", "none"]
    words += _machine(spec, host, bool(shared))
    # Not by -qmp: that takes a path with an equals sign for something else.
    words += ["-S", "-chardev", f"socket,id=qmp,path={quoted(state.monitor)},server=on,wait=off"]
    words += ["-mon", "chardev=qmp,mode=control"]
    # Appended to, so that it can be cut while QEMU has it open (vm.console_log).
    words += ["-chardev", f"pty,id=con,logfile={quoted(state.console_log)},logappend=on", "-serial", "chardev:con"]
    words += ["-device", "virtio-rng-pci", "-device", "pvpanic-pci"]
    if spec.kernel is not None:
        words += ["-kernel", str(spec.kernel)]
        words += ["-initrd", str(spec.initrd)] if spec.initrd is not None else []
        words += ["-append", spec.cmdline] if spec.cmdline else []
    for number, nic in enumerate(spec.nics):
        words += _nic(number, nic, spec, state, host)
    words += _vsock(spec.vsock)
    for number, disk in enumerate(spec.disks):
        words += _disk(number, disk)
    for number, share in enumerate(spec.shares):
        words += _share(number, share, state, host)
    if host.system == "linux" and "-sandbox" not in spec.extra:
        words += ["-sandbox", SANDBOX]
    return [*words, *spec.extra]


def plan(spec: VmSpec, state: StateDir, host: Host) -> Plan:
    """Pure. Raises `ConfigError`, `Unsupported`."""
    offers = caps.caps_of(NAME)
    caps.check(NAME, offers, spec)
    served = endpoints(spec, state, offers)
    beside = [sidecar for endpoint in served for sidecar in endpoint.sidecars]
    if spec.vsock is not None and spec.vsock.socket is not None:
        beside.append(vsock_device(spec.vsock, spec.vsock.socket))
    return Plan(
        driver=NAME,
        argv=tuple(argv(spec, state, host)),
        disks=spec.disks,
        sidecars=tuple(beside),
        sockets=(
            state.monitor,
            *(
                _own_end(number, state)
                for number, nic in enumerate(spec.nics)
                if nic.kind in ("qemu-dgram", "unixgram")
            ),
        ),
        console="pty-log",
        vsock=None if spec.vsock is None else "kernel" if spec.vsock.socket is None else "vhost-user",
        mounts=tuple(endpoint.mount for endpoint in served),
    )


def vsock_device(vsock: VsockSpec, socket: Path) -> Sidecar:
    """Our vhost-user-vsock device. A guest cannot join another one (spec companions 5)."""
    words = [
        "-m",
        "vm.vsock",
        "--vhost-user",
        str(socket),
        "--directory",
        str(vsock.directory),
        "--cid",
        str(vsock.cid),
    ]
    for port in vsock.ports.values():
        words += ["--forward", str(port)]
    return Sidecar(name="vsock", argv=(sys.executable, *words, "--ready-fd", "{ready_fd}"), lost=Lost.STOPS_MACHINE)


def quoted(value: str | Path) -> str:
    """As a value in a word that QEMU divides at commas; two of them are one."""
    return str(value).replace(",", ",,")


def shares_memory(spec: VmSpec) -> str:
    """Who wants it, or nothing."""
    wanted = [f"network card {nic.kind}" for nic in spec.nics if nic.kind == "vhost-user"]
    wanted += [f"share {share.tag}" for share in spec.shares if share.kind == "virtiofs"]
    if spec.vsock is not None and spec.vsock.socket is not None:
        wanted.append("vsock")
    return ", ".join(wanted)


def _machine(spec: VmSpec, host: Host, shared: bool) -> list[str]:
    words = [word for accel in _accels(spec, host) for word in ("-accel", accel)]
    words += ["-machine", MACHINES[host.arch] + (",memory-backend=mem" if shared else "")]
    words += ["-cpu", "max", "-smp", str(spec.cpus), "-m", str(spec.memory_mib)]
    if shared:
        words += ["-object", f"memory-backend-memfd,id=mem,size={spec.memory_mib}M,share=on"]
    return [*words, "-rtc", "base=utc,clock=host"]


def _accels(spec: VmSpec, host: Host) -> list[str]:
    """QEMU takes the first that it can begin with."""
    if spec.accel != "auto":
        return [spec.accel]
    if host.system == "darwin":
        return ["hvf", "tcg"]
    return ["kvm", "tcg"] if host.kvm else ["tcg"]


def _nic(number: int, nic: Nic, spec: VmSpec, state: StateDir, host: Host) -> Iterator[str]:
    if nic.kind == "none":
        return
    socket = "" if nic.socket is None else quoted(nic.socket)
    options = ""
    match nic.kind:
        case "qemu-stream":
            link = f"stream,id=n{number},server=off,addr.type=unix,addr.path={socket}"
            link += f",{_again(host)}" if host.version >= (8, 0) else ""
        case "qemu-dgram" | "unixgram":
            own = quoted(_own_end(number, state))
            link = f"dgram,id=n{number},local.type=unix,local.path={own},remote.type=unix,remote.path={socket}"
        case "vhost-user":
            yield from ("-chardev", f"socket,id=n{number}c,path={socket},{_again(host)}")
            link = f"vhost-user,id=n{number},chardev=n{number}c"
            # QEMU 7.2 crashes under TCG when the guest starts such a card with MSI-X (spec companions 1.3).
            options = ",vectors=0" if "tcg" in _accels(spec, host) else ""
        case "tap":
            link = f"tap,id=n{number},ifname={quoted(nic.tap)},script=no,downscript=no"
        case _:
            raise Unsupported(NAME, f"a network card of kind {nic.kind}")
    if nic.mtu != 1500 and nic.kind != "vhost-user":  # on a ring our end tells it
        options += f",host_mtu={nic.mtu}"
    mac = nic.mac or made_up_mac(spec, number)
    yield from ("-netdev", link, "-device", f"virtio-net-pci,netdev=n{number},romfile=,mac={mac}{options}")


def _again(host: Host) -> str:
    """Dial every second when the other end is gone."""
    return "reconnect-ms=1000" if host.version >= (9, 2) else "reconnect=1"


def _own_end(number: int, state: StateDir) -> Path:
    return state.socket(f"nic{number}.sock")


def made_up_mac(spec: VmSpec, number: int) -> str:
    """The same each time, and another for each machine; QEMU's own are the same in all machines."""
    return "52:54:00:" + hashlib.sha256(spec.uuid.bytes + bytes([number])).digest()[:3].hex(":")


def _vsock(vsock: VsockSpec | None) -> list[str]:
    if vsock is None:
        return []
    if vsock.socket is None:
        return ["-device", f"vhost-vsock-pci,guest-cid={vsock.cid}"]
    chardev = f"socket,id=vsock,path={quoted(vsock.socket)}"
    return ["-chardev", chardev, "-device", "vhost-user-vsock-pci,chardev=vsock"]


def _disk(number: int, disk: Disk) -> list[str]:
    drive = f"if=none,id=d{number},file={quoted(disk.path)},format={disk.format}"
    drive += ",discard=unmap,detect-zeroes=unmap" if disk.discard else ""
    drive += ",readonly=on" if disk.readonly else ""
    return ["-drive", drive, "-device", f"virtio-blk-pci,drive=d{number}"]


def _share(number: int, share: Share, state: StateDir, host: Host) -> list[str]:
    tag = quoted(share.tag)
    if share.kind == "9p-local":
        if len(share.tag.encode()) > 31:
            raise ConfigError(f"share {share.tag}: a tag of QEMU's 9P has at most 31 octets")
        model = security_model(share.owner, host.root)
        # Files of several file systems may have the same number: told apart.
        local = f"local,id=fs{number},path={quoted(share.source)},security_model={model},multidevs=remap"
        local += ",readonly=on" if share.readonly else ""
        return ["-fsdev", local, "-device", f"virtio-9p-pci,fsdev=fs{number},mount_tag={tag}"]
    if share.kind == "virtiofs":
        chardev = f"socket,id=fs{number},path={quoted(state.share(share.tag))}"
        return ["-chardev", chardev, "-device", f"vhost-user-fs-pci,chardev=fs{number},tag={tag},queue-size=1024"]
    return []  # over vsock
