"""vfkit, of macOS: Apple's Virtualization.framework (spec companions 1.1-1.3, 2.2).

Its REST API takes Stop, HardStop, Pause and Resume; the console's pty is named in the answer to `/vm/inspect`. The guest's console
is `hvc0`. There is a device for each vsock port, in each direction, so both have to be known beforehand. Its virtiofs is its own:
files act as the user that runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from vm.api import Nic, Plan, Share, StateDir, VmSpec, VsockSpec
from vm.hypervisors import caps
from vm.hypervisors.words import flagged, guest_socket, host_socket, mounts, plain

NAME: Final = "vfkit"


def plan(spec: VmSpec, state: StateDir) -> Plan:
    caps.check(NAME, caps.caps_of(NAME), spec)
    argv = [
        NAME,
        *("--cpus", str(spec.cpus)),
        *("--memory", str(spec.memory_mib)),
        *("--bootloader", _loader(spec, state)),
        *flagged("--device", _devices(spec)),
        *("--restful-uri", f"unix://{state.monitor}"),
        *spec.extra,
    ]
    dialled = () if spec.vsock is None else tuple(guest_socket(spec.vsock, port) for port in spec.vsock.ports.values())
    return Plan(
        driver=NAME,
        argv=tuple(argv),
        disks=spec.disks,
        sockets=(state.monitor, *dialled),
        console="printed",
        vsock=None if spec.vsock is None else "per-port",
        mounts=mounts(spec),
    )


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
        yield from _vsock(spec.vsock)
    yield from (f"virtio-blk,path={plain(NAME, 'disk', disk.path)}" for disk in spec.disks)
    yield from (_share(share) for share in spec.shares if share.kind == "virtiofs")
    yield "virtio-rng"
    yield "virtio-serial,pty"


def _nic(nic: Nic) -> str:
    path = plain(NAME, "network socket", nic.socket or "")
    return f"virtio-net,unixSocketPath={path}" + (f",mac={nic.mac}" if nic.mac else "")


def _vsock(vsock: VsockSpec) -> Iterator[str]:
    for port in vsock.ports.values():
        yield f"virtio-vsock,port={port},socketURL={plain(NAME, 'vsock directory', guest_socket(vsock, port))},connect"
    for port in vsock.served.values():
        yield f"virtio-vsock,port={port},socketURL={plain(NAME, 'vsock directory', host_socket(vsock, port))},listen"


def _share(share: Share) -> str:
    source = plain(NAME, "source of a share", share.source)
    return f"virtio-fs,sharedDir={source},mountTag={plain(NAME, 'tag of a share', share.tag)}"
