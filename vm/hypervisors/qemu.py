"""QEMU, told what to do by QMP (spec companions 1.3, 4.3).

    plan      words for the command line (`qemu_plan`)
    start     disks made; QEMU started, held (`-S`); its monitor dialled; the console's pty asked for and linked; let go (`cont`)
    machine   orders are commands of the monitor, events come from there, and the end is the end of the process

QEMU dies with us (`process`). What it complains of when it does not start is in the error, with what to do about it (`HINTS`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Final

from netstack.errors import HostError
from vm.api import Caps, Console, Event, EventKind, Hypervisor, Plan, StateDir, VmSpec
from vm.console import PtyConsole
from vm.hypervisors import caps, qemu_plan
from vm.hypervisors.machine import ProcessMachine
from vm.hypervisors.prepare import prepare
from vm.hypervisors.process import Process, ended, spawn, until
from vm.hypervisors.qemu_plan import NAME, Host, host_arch, kvm_denied
from vm.hypervisors.qmp import MAX_WORDS, Qmp, QmpEvent

log = logging.getLogger("pyvpnkit")

OLDEST: Final = (7, 2)
MONITOR_S: Final = 10.0
INSTALL: Final = "apt install qemu-system-x86 (or qemu-system-arm), or brew install qemu"
JOIN_KVM: Final = "join the group kvm (usermod -aG kvm $USER, log in anew)"
HINTS: Final = (
    (r"KVM kernel module: Permission denied", f"{JOIN_KVM}, or say accel: tcg"),
    (r"KVM kernel module: No such file|failed to initialize kvm|invalid accelerator kvm", "this host has no KVM; say accel: tcg"),
    (r"invalid accelerator hvf|failed to initialize HVF", "hvf is for macOS; say accel: auto"),
    (r"Failed to get \"(write|consistent read)\" lock|Failed to get shared", "another machine uses that disk"),
    (r"expects a netdev backend type|Parameter 'type'.*(stream|dgram)", "that kind of network card needs QEMU 7.2 or later"),
    (r"vhost-vsock.*(No such file|Permission denied)", "the kernel's vsock needs /dev/vhost-vsock (modprobe vhost_vsock)"),
    (r"seccomp|-sandbox", "this QEMU has no seccomp; say extra: ['-sandbox', 'off']"),
    (r"Cannot allocate memory|cannot set up guest memory", "there is not so much memory; ask for less"),
)  # fmt: skip
"""What QEMU says, and what to do about it."""
_CHATTER: Final = "char device redirected to /dev/"
"""It is said of every pty."""


class Qemu:
    """The driver. `host` is where QEMU runs, by default here; name one for a QEMU that is known to be newer than 7.2."""

    name: str = NAME
    caps: Caps = caps.caps_of(NAME)

    def __init__(self, host: Host | None = None, *, monitor_s: float = MONITOR_S) -> None:
        self._host = host
        self._monitor_s = monitor_s

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        return qemu_plan.plan(spec, state, self._host or Host.here())

    async def start(self, plan: Plan, state: StateDir) -> QemuMachine:
        await prepare(plan)
        if "kvm" not in plan.argv and kvm_denied(host_arch()):
            log.warning("qemu: without KVM, which is several times as fast; %s", JOIN_KVM)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(state.console_log, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        async with contextlib.AsyncExitStack() as undo:
            process = await spawn(plan.argv, plan.env, log=state.log(NAME), install=INSTALL)
            undo.push_async_callback(process.close)
            events = _Held()
            try:
                qmp = await self._monitor(process, state.monitor, events)
            except HostError as error:
                raise HostError(await _explained(str(error), plan.argv[0])) from None
            undo.push_async_callback(qmp.close)
            if qmp.version < OLDEST:
                raise HostError(f"QEMU {_dotted(qmp.version)} is too old; 7.2 or later is needed")
            pty = _pty(await qmp.execute("query-chardev"))
            console = PtyConsole.linked(state.console, state.console_log, pty)
            machine = QemuMachine(process, qmp, console)
            undo.push_async_callback(machine.close)
            events.hand_on(machine)
            await machine.begin()
            undo.pop_all()
            return machine

    async def _monitor(self, process: Process, path: Path, events: _Held) -> Qmp:
        """Raises `HostError` with what QEMU said when it ended, or is slow."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._monitor_s
        await until(path.is_socket, process, self._monitor_s, f"monitor at {path}")
        while True:
            try:
                return await Qmp.connect(path, events, limit_s=max(0.1, end - loop.time()))
            except HostError as error:
                # It may not listen yet; or be about to end, in which case its own words say more.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 0.2)
                if process.returncode is not None:
                    raise await ended(process) from None
                if loop.time() >= end:
                    said = process.said()
                    raise HostError(f"{error}{f'; it said: {said}' if said else ''}") from None


class QemuMachine(ProcessMachine):
    """A machine that runs. `version` is QEMU's."""

    def __init__(self, process: Process, qmp: Qmp, console: Console) -> None:
        self._qmp = qmp
        self.version = qmp.version
        self._begun = False
        self._over = False
        self._why = ""
        """What a disk complained of, before QEMU stops for it."""
        self._looking: asyncio.Task[None] | None = None
        """At why QEMU has stopped, which its event does not say."""
        super().__init__(NAME, process, console)

    async def begin(self) -> None:
        """Let go of a machine that is held. Raises `HostError`."""
        try:
            await self._qmp.execute("cont")
        except HostError as error:
            said = self.process.said()
            raise HostError(f"{error}; it said: {said}" if said else str(error)) from None

    async def pause(self) -> None:
        await self._qmp.execute("stop")

    async def resume(self) -> None:
        await self._qmp.execute("cont")

    async def powerdown(self) -> None:
        self._asked = True
        await self._qmp.execute("system_powerdown")

    async def close(self) -> None:
        await super().close()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await self._qmp.close()

    async def _look(self) -> None:
        """A machine that the accelerator gave up can only be begun again."""
        with contextlib.suppress(HostError):
            match await self._qmp.execute("query-status"):
                case {"status": "internal-error"}:
                    self.tell(
                        Event(
                            kind=EventKind.PANIC, text=f"QEMU stopped it by an internal error; see {self.process.log}"
                        )
                    )

    def hear(self, event: QmpEvent) -> None:
        """An event of QEMU's. Those that are not of interest are many: a guest can make some of them at will."""
        by_guest = event.data.get("guest") is True
        reason = str(event.data.get("reason", ""))[:MAX_WORDS]
        match event.name:
            case "RESUME":
                if self._begun:  # the first is STARTED
                    self.tell(Event(kind=EventKind.RESUMED))
                self._begun = True
            case "STOP":
                self.tell(Event(kind=EventKind.PAUSED, text=self._why))
                self._why = ""
                if self._looking is None or self._looking.done():
                    self._looking = asyncio.create_task(self._look())
            case "BLOCK_IO_ERROR" if event.data.get("action") == "stop":
                disk = str(event.data.get("device", ""))[:MAX_WORDS]
                self._why = f"disk {disk}: {reason or 'an error'}"
            case "POWERDOWN":
                self.tell(Event(kind=EventKind.POWERDOWN))
            case "SHUTDOWN":
                self._over = True
                self.tell(Event(kind=EventKind.SHUTDOWN, by_guest=by_guest, text=reason))
            case "RESET" if not self._over:
                self.tell(Event(kind=EventKind.RESET, by_guest=by_guest, text=reason))
            case "GUEST_PANICKED":
                self.tell(Event(kind=EventKind.PANIC, by_guest=True))

    async def _end(self) -> int:
        status = await self.process.wait()
        await self._qmp.over()  # what it said last is heard before
        said = "\n".join(line for line in self.process.said().splitlines() if not line.startswith(_CHATTER))
        self.tell(Event(kind=EventKind.EXITED, status=status, text=said))
        return status


class _Held:
    """Keeps events until there is a machine to hear them; a guest that is held makes hardly any."""

    def __init__(self) -> None:
        self._kept: list[QmpEvent] = []
        self._machine: QemuMachine | None = None

    def __call__(self, event: QmpEvent) -> None:
        if self._machine is not None:
            self._machine.hear(event)
        else:
            self._kept.append(event)

    def hand_on(self, machine: QemuMachine) -> None:
        self._machine = machine
        for event in self._kept:
            machine.hear(event)


def _pty(chardevs: object) -> Path:
    """Of the console, in the answer to query-chardev. Raises `HostError`."""
    for chardev in chardevs if isinstance(chardevs, list) else ():
        match chardev:
            case {"label": "con", "filename": str(name)} if name.startswith("pty:/dev/"):
                return Path(name.removeprefix("pty:"))
    raise HostError("qemu has no pty for the console; is there another -serial in extra?")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


async def _explained(said: str, program: str) -> str:
    """With what to do about it, where that is known."""
    hints = [hint for pattern, hint in HINTS if re.search(pattern, said)]
    found = await version_of(program)
    if found is not None and found < OLDEST:
        hints.append(f"QEMU {_dotted(found)} is too old; 7.2 or later is needed")
    return "\n".join([said, *(f"({hint})" for hint in hints)])


async def version_of(program: str) -> tuple[int, ...] | None:
    """QEMU's version, as it says itself; `None` where it does not."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(program, "--version"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError:
        return None
    try:
        said, _ = await asyncio.wait_for(process.communicate(), MONITOR_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        return None
    found = re.search(rb"version (\d+)\.(\d+)", said)
    return None if found is None else (int(found[1]), int(found[2]))


DRIVER: Final[Hypervisor] = Qemu()
