"""HyperKit, of macOS on Intel processors (spec companions 1.1-1.3, 2.2).

It takes signals and no other orders: SIGTERM presses the power button, which a guest without acpid does not hear, SIGUSR1 stops the
processors and SIGUSR2 lets them go. It connects to the network's socket by itself, and presses the power button when that is
lost. The console's link and log it makes itself, so nothing has to be attached before the guest begins.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError
from vm.api import Disk, Hypervisor, Machine, Nic, Plan, StateDir, VmSpec, VsockSpec
from vm.console import PtyConsole
from vm.hypervisors.caps import caps_of, check
from vm.hypervisors.machine import LIMIT_S, ProcessMachine
from vm.hypervisors.prepare import prepare
from vm.hypervisors.process import spawn, until
from vm.hypervisors.words import flagged, plain
from vm.vsock.api.per_port import host_dials

NAME: Final = "hyperkit"
_INSTALL: Final = (
    "it is a part of Docker Desktop's older versions for macOS, and github.com/moby/hyperkit has its source"
)
PORTS: Final = "port"
"""The tag of VPNKit's tree of ports; guests of Docker for Mac mount it on /port or /var/vpnkit."""
_SLOTS: Final = range(1, 31)
"""Of the one PCI bus; 0 is the bridge, 31 the old devices (serial line)."""


class HyperKit:
    """The driver."""

    name = NAME
    caps = caps_of(NAME)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        if spec.ports_tree is not None and any(share.tag == PORTS for share in spec.shares):
            raise ConfigError(f"shares: the tag {PORTS} is that of VPNKit's ports here; choose another")
        devices = [*_devices(spec, state), "virtio-rnd"]
        if len(devices) > len(_SLOTS):
            raise ConfigError(
                f"{NAME}: {len(devices)} devices; it has slots for {len(_SLOTS)}, so leave out disks or shares"
            )
        slots = (f"{slot},{device}" for slot, device in zip(_SLOTS, devices, strict=False))
        kexec = [plain(NAME, "kernel", spec.kernel or ""), plain(NAME, "initrd", spec.initrd or ""), spec.cmdline]
        argv = [
            *(NAME, "-A", "-u"),
            *("-F", str(state.path / "hyperkit.pid")),
            *("-c", str(spec.cpus)),
            *("-m", f"{spec.memory_mib}M"),
            *("-U", str(spec.uuid)),
            *flagged("-s", ("0:0,hostbridge", "31,lpc", *slots)),
            *("-l", f"com1,autopty={plain(NAME, 'state directory', state.console)},log={state.console_log}"),
            *("-f", ",".join(("kexec", *kexec))),
            *spec.extra,
        ]
        return Plan(
            driver=NAME,
            argv=tuple(argv),
            disks=spec.disks,
            sockets=() if spec.vsock is None else (spec.vsock.directory / "connect", *_forwards(spec.vsock)),
            console="link",
            vsock=None if spec.vsock is None else "hyperkit",
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        await prepare(plan)
        state.console.unlink(missing_ok=True)  # of a run before: its pty may be another's now
        async with contextlib.AsyncExitStack() as undo:
            process = await spawn(plan.argv, plan.env, log=state.log(NAME), install=_INSTALL)
            undo.push_async_callback(process.close)
            await until(state.console.exists, process, LIMIT_S, f"console at {state.console}")
            console = await PtyConsole.found(state.console, state.console_log)
            undo.pop_all()
            return SignalledMachine(NAME, process, console)


DRIVER: Final[Hypervisor] = HyperKit()


class SignalledMachine(ProcessMachine):
    """Whether the guest has heard, nobody tells."""

    async def _pause(self) -> None:
        self.process.signal(signal.SIGUSR1)

    async def _resume(self) -> None:
        self.process.signal(signal.SIGUSR2)

    async def _powerdown(self) -> None:
        self.process.signal(signal.SIGTERM)


def _devices(spec: VmSpec, state: StateDir) -> Iterator[str]:
    yield from (_nic(nic) for nic in spec.nics if nic.kind != "none")
    if spec.vsock is not None:
        yield _vsock(spec.vsock)
    yield from (_disk(disk) for disk in spec.disks)
    yield from (_share(share.tag, state.share(share.tag)) for share in spec.shares if share.kind == "9p-socket")
    if spec.ports_tree is not None:
        yield _share(PORTS, spec.ports_tree)


def _nic(nic: Nic) -> str:
    words = ["virtio-vpnkit", f"path={plain(NAME, 'network socket', nic.socket or '')}"]
    if nic.uuid is not None:
        words.append(f"uuid={nic.uuid}")
    if nic.preferred_ip is not None:
        words.append(f"preferred_ipv4={nic.preferred_ip}")
    return ",".join(words)


def _vsock(vsock: VsockSpec) -> str:
    words = ["virtio-sock", f"guest_cid={vsock.cid}", f"path={plain(NAME, 'vsock directory', vsock.directory)}"]
    if vsock.ports:
        words.append("guest_forwards=" + ";".join(map(str, vsock.ports.values())))
    return ",".join(words)


def _forwards(vsock: VsockSpec) -> Iterator[Path]:
    for port in vsock.ports.values():
        yield vsock.directory / host_dials(vsock.cid, port)
        yield vsock.directory / f"guest.{port:08x}"


def _disk(disk: Disk) -> str:
    path = plain(NAME, "disk", disk.path)
    if disk.format == "qcow2":
        path = f"file://{path},format=qcow"
    return f"virtio-blk,{path}" + (",ro" if disk.readonly else "")


def _share(tag: str, socket: Path) -> str:
    return f"virtio-9p,path={plain(NAME, 'state directory', socket)},tag={plain(NAME, 'tag of a share', tag)}"
