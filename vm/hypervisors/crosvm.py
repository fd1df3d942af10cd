"""crosvm, of Linux with KVM (spec companions 1.1-1.3, 2.2).

Its own program carries orders to its control socket: `crosvm powerbtn|suspend|resume|stop SOCKET`. The console is on its standard
input and output, for which we make the pty. Its virtiofs is its own.

vsock is our vhost-user device where there is one, otherwise the kernel's. A card on a shared ring has the address that our network
tells (`mac=` of the link); there is no word for it here.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Final

from netstack.errors import HostError
from vm.api import Console, Disk, Hypervisor, Machine, Nic, Plan, Share, Sidecar, StateDir, VmSpec, VsockKind, VsockSpec
from vm.hypervisors.caps import caps_of, check
from vm.hypervisors.machine import LIMIT_S, ProcessMachine, spawn_on_pty
from vm.hypervisors.prepare import prepare
from vm.hypervisors.process import Process, spawn, until
from vm.hypervisors.qemu_plan import vsock_device
from vm.hypervisors.words import flagged, mounts, plain

NAME: Final = "crosvm"
_INSTALL: Final = "crosvm.dev says how it is built"


class Crosvm:
    """The driver."""

    name = NAME
    caps = caps_of(NAME)

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        check(NAME, self.caps, spec)
        argv = [
            *(NAME, "run"),
            *("-s", str(state.monitor)),
            *("--cpus", str(spec.cpus)),
            *("--mem", str(spec.memory_mib)),
            *("--serial", "type=stdout,hardware=serial,num=1,console,stdin"),
            *flagged("--block", (_disk(disk) for disk in spec.disks)),
            *_nics(spec),
            *flagged("--shared-dir", (_share(share) for share in spec.shares if share.kind == "virtiofs")),
            *_vsock(spec.vsock),
            *(("--initrd", str(spec.initrd)) if spec.initrd is not None else ()),
            *(("--params", spec.cmdline) if spec.cmdline else ()),
            str(spec.kernel),
            *spec.extra,
        ]
        return Plan(
            driver=NAME,
            argv=tuple(argv),
            disks=spec.disks,
            sidecars=_beside(spec.vsock),
            sockets=(state.monitor,),
            console="stdio",
            vsock=_vsock_kind(spec.vsock),
            mounts=mounts(spec, state, self.caps),
        )

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        await prepare(plan)
        async with contextlib.AsyncExitStack() as undo:
            console, process = await spawn_on_pty(plan, state, install=_INSTALL, undo=undo)
            await until(state.monitor.exists, process, LIMIT_S, f"control socket at {state.monitor}")
            undo.pop_all()
            return OrderedMachine(plan.argv[0], process, console, state)


DRIVER: Final[Hypervisor] = Crosvm()


class OrderedMachine(ProcessMachine):
    """Each order is a run of the hypervisor's own program."""

    def __init__(self, program: str, process: Process, console: Console, state: StateDir) -> None:
        super().__init__(NAME, process, console)
        self._program = program
        self._state = state

    async def _pause(self) -> None:
        await self._order("suspend")

    async def _resume(self) -> None:
        await self._order("resume")

    async def _powerdown(self) -> None:
        await self._order("powerbtn")

    async def _order(self, order: str) -> None:
        """Raises `HostError` with what the program said."""
        run = await spawn((self._program, order, str(self._state.monitor)), log=self._state.log(f"{NAME}-orders"))
        try:
            status = await asyncio.wait_for(run.wait(), LIMIT_S)
        except TimeoutError:
            raise HostError(f"{NAME}: {order}: no answer within {LIMIT_S:.0f} s") from None
        finally:
            await run.close()
        if status:
            raise HostError(f"{NAME}: {order}: {run.said() or f'status {status}'}")


def _nics(spec: VmSpec) -> Iterator[str]:
    for nic in spec.nics:
        if nic.kind == "tap":
            yield from ("--net", _tap(nic))
        elif nic.kind == "vhost-user":
            yield from ("--vhost-user", f"type=net,socket={plain(NAME, 'network socket', nic.socket or '')}")


def _tap(nic: Nic) -> str:
    return f"tap-name={plain(NAME, 'tap', nic.tap)}" + (f",mac={nic.mac}" if nic.mac else "")


def _disk(disk: Disk) -> str:
    return f"path={plain(NAME, 'disk', disk.path)}" + (",ro" if disk.readonly else "")


def _share(share: Share) -> str:
    source = plain(NAME, "source of a share", share.source, forbidden=":")
    return f"{source}:{plain(NAME, 'tag of a share', share.tag, forbidden=':')}:type=fs"


def _vsock(vsock: VsockSpec | None) -> list[str]:
    if vsock is None:
        return []
    if vsock.socket is None:
        return ["--vsock", str(vsock.cid)]
    return ["--vhost-user", f"type=vsock,socket={plain(NAME, 'vsock device', vsock.socket)}"]


def _beside(vsock: VsockSpec | None) -> tuple[Sidecar, ...]:
    return () if vsock is None or vsock.socket is None else (vsock_device(vsock, vsock.socket),)


def _vsock_kind(vsock: VsockSpec | None) -> VsockKind | None:
    if vsock is None:
        return None
    return "kernel" if vsock.socket is None else "vhost-user"
