"""vfkit, of macOS: Apple's Virtualization.framework (spec companions 1.1-1.3, 2.2).

Its REST API takes Stop, HardStop, Pause and Resume; the console's pty is named in the answer to `/vm/inspect`. The guest's console
is `hvc0`. There is a device for each vsock port, in each direction, so both have to be known beforehand. Its virtiofs is its own:
files act as the user that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

from vm.api import Hypervisor, Machine, Nic, Plan, RestCall, Share, StateDir, VmSpec, VsockSpec
from vm.filesystems import ninep_share
from vm.hypervisors.caps import caps_of, check
from vm.hypervisors.machine import Orders, start_by_rest
from vm.hypervisors.words import flagged, mounts, plain
from vm.vsock.api.hyperkit import guest_dials
from vm.vsock.api.per_port import host_dials

NAME: Final = "vfkit"
_INSTALL: Final = "brew install vfkit"


def _state(state: str) -> RestCall:
    return RestCall(method="POST", path="/vm/state", body={"state": state})


ORDERS: Final[Orders] = {"pause": _state("Pause"), "resume": _state("Resume"), "powerdown": _state("Stop")}


class Vfkit:
    """The driver."""

    name = NAME
    caps = caps_of(NAME)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        argv = [
            NAME,
            *("--cpus", str(spec.cpus)),
            *("--memory", str(spec.memory_mib)),
            *("--bootloader", _loader(spec, state)),
            *flagged("--device", _devices(spec)),
            *("--restful-uri", f"unix://{state.monitor}"),
            *spec.extra,
        ]
        dialled = (
            ()
            if spec.vsock is None
            else tuple(spec.vsock.directory / host_dials(spec.vsock.cid, port) for port in spec.vsock.ports.values())
        )
        return Plan(
            driver=NAME,
            argv=tuple(argv),
            disks=spec.disks,
            sockets=(state.monitor, *dialled),
            console="printed",
            vsock=None if spec.vsock is None else "per-port",
            mounts=mounts(spec, state, self.caps),
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        return await start_by_rest(plan, state, install=_INSTALL, inspect="/vm/inspect", pty=_pty, orders=ORDERS)


DRIVER: Final[Hypervisor] = Vfkit()


def _loader(spec: VmSpec, state: StateDir) -> str:
    if spec.kernel is None:
        return f"efi,variable-store={plain(NAME, 'state directory', state.path / 'efi-variables')},create"
    words = ["linux", f"kernel={plain(NAME, 'kernel', spec.kernel)}"]
    if spec.initrd is not None:
        words.append(f"initrd={plain(NAME, 'initrd', spec.initrd)}")
    words.append(f'cmdline="{plain(NAME, "kernel command line", spec.cmdline, forbidden=chr(34))}"')
    return ",".join(words)


def _devices(spec: VmSpec) -> Iterator[str]:
    yield from (_nic(nic) for nic in spec.nics if nic.kind != "none")
    if spec.vsock is not None:
        yield from _vsock(spec.vsock, spec.shares)
    yield from (f"virtio-blk,path={plain(NAME, 'disk', disk.path)}" for disk in spec.disks)
    yield from (_share(share) for share in spec.shares if share.kind == "virtiofs")
    yield "virtio-rng"
    yield "virtio-serial,pty"


def _nic(nic: Nic) -> str:
    path = plain(NAME, "network socket", nic.socket or "")
    return f"virtio-net,unixSocketPath={path}" + (f",mac={nic.mac}" if nic.mac else "")


def _vsock(vsock: VsockSpec, shares: Sequence[Share]) -> Iterator[str]:
    directory = plain(NAME, "vsock directory", vsock.directory)
    for port in vsock.ports.values():
        yield f"virtio-vsock,port={port},socketURL={directory}/{host_dials(vsock.cid, port)},connect"
    over_vsock = sum(share.kind == "9p-vsock" for share in shares)
    # A share's may be among those of the file, or not.
    for port in dict.fromkeys((*vsock.served.values(), *map(ninep_share.port, range(over_vsock)))):
        yield f"virtio-vsock,port={port},socketURL={directory}/{guest_dials(port)},listen"


def _share(share: Share) -> str:
    source = plain(NAME, "source of a share", share.source)
    return f"virtio-fs,sharedDir={source},mountTag={plain(NAME, 'tag of a share', share.tag)}"


def _pty(inspected: Any) -> str:
    """The console's pty, of the answer to `/vm/inspect`; empty where it is not there yet."""
    devices = inspected.get("devices") if isinstance(inspected, dict) else None
    for device in devices if isinstance(devices, list) else ():
        if isinstance(device, dict) and isinstance(name := device.get("ptyName"), str) and name:
            return name
    return ""
