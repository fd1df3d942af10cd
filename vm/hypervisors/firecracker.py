"""Firecracker, of Linux with KVM (spec companions 1.1-1.3).

It is started empty and told by REST what it is, each part by a call; the last one starts it. The console is on its standard input
and output, for which we make the pty.

**Network.** It has TAPs only, and opens the device by its name. A TAP has one program at its descriptor: that is Firecracker, so
our network takes the other side, the interface: `--link packet:NAME`. `vm.hypervisors.tap` makes such a TAP for it and keeps the
host's own network stack out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

from vm.api import Disk, Hypervisor, Machine, Nic, Plan, RestCall, StateDir, VmSpec
from vm.hypervisors.caps import caps_of, check
from vm.hypervisors.machine import Orders, RestMachine, place, spawn_on_pty
from vm.hypervisors.rest import Rest
from vm.hypervisors.words import HYBRID

NAME: Final = "firecracker"
_INSTALL: Final = "github.com/firecracker-microvm/firecracker has it as one file"


def _put(path: str, body: Mapping[str, Any]) -> RestCall:
    return RestCall(method="PUT", path=path, body=body)


ORDERS: Final[Orders] = {
    "pause": RestCall(method="PATCH", path="/vm", body={"state": "Paused"}),
    "resume": RestCall(method="PATCH", path="/vm", body={"state": "Resumed"}),
    "powerdown": _put("/actions", {"action_type": "SendCtrlAltDel"}),
}


class Firecracker:
    """The driver."""

    name = NAME
    caps = caps_of(NAME)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        return Plan(
            driver=NAME,
            argv=(NAME, "--id", str(spec.uuid), "--api-sock", str(state.monitor), *spec.extra),
            disks=spec.disks,
            rest=tuple(_calls(spec)),
            sockets=(state.monitor,) if spec.vsock is None else (state.monitor, spec.vsock.directory / HYBRID),
            console="stdio",
            vsock=None if spec.vsock is None else "hybrid",
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        await place(plan, state)
        async with contextlib.AsyncExitStack() as undo:
            console, process = await spawn_on_pty(plan, state, install=_INSTALL, undo=undo)
            rest = Rest(state.monitor, NAME)
            await rest.there(process)
            for call in plan.rest:
                await rest.call(call)
            undo.pop_all()
            return RestMachine(NAME, process, console, rest, ORDERS)


DRIVER: Final[Hypervisor] = Firecracker()


def _calls(spec: VmSpec) -> Iterator[RestCall]:
    yield _put("/machine-config", {"vcpu_count": spec.cpus, "mem_size_mib": spec.memory_mib})
    boot = {"kernel_image_path": str(spec.kernel)}
    if spec.initrd is not None:
        boot["initrd_path"] = str(spec.initrd)
    if spec.cmdline:
        boot["boot_args"] = spec.cmdline
    yield _put("/boot-source", boot)
    for number, disk in enumerate(spec.disks):
        yield _drive(f"disk{number}", disk)
    for number, nic in enumerate(nic for nic in spec.nics if nic.kind != "none"):
        yield _interface(f"eth{number}", nic)
    if spec.vsock is not None:
        yield _put("/vsock", {"guest_cid": spec.vsock.cid, "uds_path": str(spec.vsock.directory / HYBRID)})
    yield _put("/actions", {"action_type": "InstanceStart"})


def _drive(name: str, disk: Disk) -> RestCall:
    body = {"drive_id": name, "path_on_host": str(disk.path), "is_root_device": False, "is_read_only": disk.readonly}
    return _put(f"/drives/{name}", body)


def _interface(name: str, nic: Nic) -> RestCall:
    body = {"iface_id": name, "host_dev_name": nic.tap}
    return _put(f"/network-interfaces/{name}", {**body, "guest_mac": nic.mac} if nic.mac else body)
