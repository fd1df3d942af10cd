"""QEMU's driver with the real one, and machines that boot: console, orders, events, disks and shares.

Nothing of the daemon is here. What `plan` wants beside the machine is started as the supervisor does it. The cloud kernel of the
other tests has neither 9P nor virtiofs, so this is Debian's ordinary one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from netstack.errors import HostError
from pyvpnkit import boot
from pyvpnkit.boot import Kind, Parts
from tests.support import machine
from tests.support.netns import require
from vm.api import Disk, Event, EventKind, Nic, Plan, Share, StateDir, VmSpec
from vm.hypervisors import process
from vm.hypervisors.process import spawn, until
from vm.hypervisors.qemu import Qemu, QemuMachine

pytestmark = pytest.mark.qemu

KIND = Kind(
    "linux-image-amd64",
    (*boot.SMALL.modules, "virtio_blk", "9p", "9pnet_virtio", "virtiofs", "button", "evdev", "pvpanic_pci"),
    "machine-companions-1",
)
CMDLINE = "console=ttyS0 quiet panic=-1 mitigations=off nokaslr random.trust_cpu=on cryptomgr.notests"
BOOT_S = 90.0
ANSWER_S = 60.0
VIRTIOFSD = Path("/usr/lib/qemu/virtiofsd")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    require("qemu-system-x86_64", "qemu-img")
    return machine.parts(tmp_path_factory.mktemp("machine"), KIND)


@pytest.fixture
def state() -> Iterator[StateDir]:
    before = os.umask(0o077)  # as the supervisor has it; a guest is not to notice
    directory = Path(tempfile.mkdtemp(prefix="vm=1"))  # what QEMU's words could be misled by
    yield StateDir(directory)
    shutil.rmtree(directory)
    os.umask(before)


def spec(parts: Parts, **changes: Any) -> VmSpec:
    words = {"kernel": parts.kernel, "initrd": parts.initrd, "cmdline": CMDLINE, "memory_mib": 256, "accel": "tcg"}
    return VmSpec(**{"name": "test", "uuid": UUID(int=7), **words, **changes})


@contextlib.asynccontextmanager
async def started(wanted: VmSpec, state: StateDir) -> AsyncIterator[QemuMachine]:
    """With what belongs beside it."""
    driver = Qemu()
    plan = driver.plan(wanted, state)
    async with contextlib.AsyncExitStack() as stack:
        for sidecar in plan.sidecars:
            made = await spawn(sidecar.argv, sidecar.env, log=state.log(sidecar.name))
            stack.push_async_callback(made.close)
            assert sidecar.ready is not None
            await until(sidecar.ready.is_socket, made, ANSWER_S, "socket")
        running = await driver.start(plan, state)
        stack.push_async_callback(running.close)
        yield running


class Guest:
    """Types at the console (`pyvpnkit.boot` says what is understood there)."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._tag = 0

    async def wait_line(self, start: str, limit_s: float) -> tuple[list[str], str]:
        """Lines before, and what is behind `start` in the first that has it."""
        before: list[str] = []
        async with asyncio.timeout(limit_s):
            while octets := await self._reader.readline():
                line = octets.decode(errors="replace").strip()
                _, mark, rest = line.partition(start)
                if mark:
                    return before, rest
                before.append(line)
        raise AssertionError(before)

    def send(self, line: str) -> int:
        self._tag += 1
        self._writer.write(f"{self._tag} {line}\n".encode())
        return self._tag

    async def run(self, line: str, limit_s: float = ANSWER_S) -> str:
        """What it prints, and its status in a last line where that is not 0."""
        before, status = await self.wait_line(f"@{self.send(line)} ", limit_s)
        return "\n".join([*before, f"status {status}"] if status != "0" else before)


@contextlib.asynccontextmanager
async def at_console(running: QemuMachine) -> AsyncIterator[Guest]:
    assert running.console is not None
    reader, writer = await running.console.attach()
    guest = Guest(reader, writer)
    try:
        await guest.wait_line("@up", BOOT_S)
        yield guest
    finally:
        writer.close()


async def kinds(running: QemuMachine, last: EventKind) -> list[EventKind]:
    """Of the events up to the first of kind `last`."""
    seen = []
    async with asyncio.timeout(ANSWER_S):
        async for event in running.events():
            seen.append(event.kind)
            if event.kind is last:
                break
    return seen


async def to_the_end(running: QemuMachine) -> list[Event]:
    async with asyncio.timeout(ANSWER_S):
        return [event async for event in running.events()]


async def test_a_machine_from_its_start_to_its_power_button(parts: Parts, state: StateDir) -> None:
    """With disks of both kinds and shares of both owners."""
    mapped, plain = (state.path / name for name in ("mapped", "plain"))
    for directory in (mapped, plain):
        directory.mkdir()
        put(directory / "ours")
    disks = (
        Disk(path=state.path / "a,b.img", size=64 << 20, discard=True),
        Disk(path=state.path / "c.qcow2", size=64 << 20, format="qcow2"),
    )
    shares = (
        Share(tag="mapped", source=mapped, target="/mapped", kind="9p-local", owner="mapped"),
        Share(tag="plain", source=plain, target="/plain", kind="9p-local", owner="passthrough"),
        Share(tag="read", source=plain, target="/read", kind="9p-local", owner="passthrough", readonly=True),
    )
    wanted = spec(parts, disks=disks, shares=shares, cpus=2)
    async with started(wanted, state) as running, at_console(running) as guest:
        assert state.console.is_symlink() and stat.S_ISCHR(state.console.stat().st_mode)
        assert stat.S_IMODE(state.console.stat().st_mode) == 0o600
        assert "@up" in state.console_log.read_text()
        assert await guest.run("nproc") == "2"

        await disks_hold(guest, disks)
        for line in Qemu().plan(wanted, state).mounts:
            target = line.split()[-1]
            assert await guest.run(f"mkdir {target}; {line}") == ""
            assert await guest.run(f"stat -c '%u:%g %a' {target}/ours; cat {target}/ours") == "501:20 644\nof the host"
        await owners_are_kept(guest, mapped, plain)
        assert "Read-only file system" in await guest.run("touch /read/new")

        await running.pause()
        guest.send("echo")
        assert await kinds(running, EventKind.PAUSED) == [EventKind.STARTED, EventKind.PAUSED]
        with pytest.raises(TimeoutError):
            await guest.wait_line("@", 0.5)
        await running.resume()
        await guest.wait_line("@", ANSWER_S)

        # What acpid does: wait for the button.
        button = await guest.run("grep -A 5 'Power Button' /proc/bus/input/devices | grep -o 'event[0-9]*'")
        heard = f"dd if=/dev/input/{button} of=/dev/null bs=24 count=1 2>/dev/null"
        assert await guest.run(f"({heard}; umount -a; poweroff -f) >/dev/null 2>&1 &") == ""
        await guest.run(f"until ls -l /proc/[0-9]*/fd | grep -q input/{button}; do usleep 10000; done")
        await running.powerdown()
        assert await asyncio.wait_for(running.wait(), ANSWER_S) == 0
        resumed, pressed, shutdown, exited = await to_the_end(running)
        assert (resumed.kind, pressed.kind) == (EventKind.RESUMED, EventKind.POWERDOWN)
        assert shutdown == Event(kind=EventKind.SHUTDOWN, by_guest=True, text="guest-shutdown")
        assert (exited.kind, exited.status) == (EventKind.EXITED, 0)
        assert "attempt to open special file" in exited.text, "what QEMU complained of last"
    assert not state.console.is_symlink()
    assert not state.monitor.exists()


def put(path: Path) -> None:
    """Somebody's file."""
    path.write_text("of the host\n")
    path.chmod(0o644)
    os.chown(path, 501, 20)


async def disks_hold(guest: Guest, disks: tuple[Disk, ...]) -> None:
    for name in ("vda", "vdb"):
        written = await guest.run(f"seq 1 1000000 | dd of=/dev/{name} bs=1M count=4 iflag=fullblock 2>/dev/null; sync")
        assert written == ""
        assert await guest.run(f"head -n 2 /dev/{name}; blockdev --getsize64 /dev/{name}") == f"1\n2\n{64 << 20}"
    raw = disks[0].path
    taken = raw.stat().st_blocks
    assert taken * 512 >= 4 << 20
    assert (await guest.run("blkdiscard /dev/vda || fstrim /dev/vda")).find("status") < 0
    assert raw.stat().st_blocks < taken, "what is discarded is given back"


async def owners_are_kept(guest: Guest, mapped: Path, plain: Path) -> None:
    """Spec companions 2.3, as root."""
    for target in ("/mapped", "/plain"):
        made = f"cd {target} && echo hello >file && chown 1234:2345 file && chmod 4755 file && stat -c '%u:%g %a' file"
        assert await guest.run(made) == "1234:2345 4755"
        assert await guest.run(f"mkdir {target}/d; >{target}/f; stat -c %a {target}/d {target}/f") == "755\n644"
    assert (
        await guest.run("cd /mapped && mkfifo pipe && mknod null c 1 3 && ln -s file link && readlink link") == "file"
    )
    assert await guest.run("stat -c %F /mapped/pipe /mapped/null") == "fifo\ncharacter special file"
    assert "status" in await guest.run("mknod /plain/null c 1 3"), "QEMU 7.2 refuses"
    for name in ("file", "pipe", "null", "link"):
        found = (mapped / name).lstat()
        assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o600 and found.st_uid == os.geteuid()
    owner = [int.from_bytes(os.getxattr(mapped / "file", f"user.virtfs.{name}"), "little") for name in ("uid", "gid")]
    assert owner == [1234, 2345]
    found = (plain / "file").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o4755)


@pytest.mark.skipif(not VIRTIOFSD.exists(), reason="no virtiofsd of QEMU 7.2 (package qemu-system-common)")
@pytest.mark.skipif(os.geteuid() != 0, reason="expected: it has to be root")
async def test_virtiofs_shows_the_hosts_own_owners(parts: Parts, state: StateDir) -> None:
    source = state.path / "source"
    source.mkdir()
    put(source / "ours")
    share = Share(tag="files", source=source, target="/mnt", kind="virtiofs", owner="passthrough")
    async with started(spec(parts, shares=(share,)), state) as running, at_console(running) as guest:
        (mount,) = Qemu().plan(spec(parts, shares=(share,)), state).mounts
        assert await guest.run(f"mkdir /mnt; {mount}") == ""
        assert await guest.run("stat -c '%u:%g %a' /mnt/ours; cat /mnt/ours") == "501:20 644\nof the host"
        assert await guest.run("echo hello >/mnt/file && chown 1234:2345 /mnt/file && chmod 640 /mnt/file") == ""
        assert await guest.run("mkdir /mnt/d; >/mnt/f; stat -c %a /mnt/d /mnt/f") == "755\n644"
        assert await guest.run("mkfifo /mnt/pipe && ln -s file /mnt/link") == ""
    found = (source / "file").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1234, 2345, 0o640)
    assert stat.S_ISFIFO((source / "pipe").stat().st_mode)
    assert (source / "link").readlink() == Path("file")


async def test_a_guest_that_reboots_and_then_panics(parts: Parts, state: StateDir) -> None:
    async with started(spec(parts), state) as running, at_console(running) as guest:
        guest.send("reboot -f")
        assert await kinds(running, EventKind.RESET) == [EventKind.STARTED, EventKind.RESET]
        await guest.wait_line("@up", BOOT_S)
        guest.send("echo c >/proc/sysrq-trigger")
        events = await to_the_end(running)
        while events[0].kind is EventKind.RESET:  # the firmware does it once more
            events.pop(0)
        assert events == [
            Event(kind=EventKind.PANIC, by_guest=True),
            Event(kind=EventKind.SHUTDOWN, by_guest=True, text="guest-panic"),
            Event(kind=EventKind.EXITED),
        ]


async def test_a_machine_that_is_killed(parts: Parts, state: StateDir) -> None:
    async with started(spec(parts), state) as running:
        await running.kill()
        assert await running.wait() == -signal.SIGKILL
        events = await to_the_end(running)
        assert [event.kind for event in events] == [EventKind.STARTED, EventKind.EXITED]
        assert events[-1].status == -signal.SIGKILL


SUPERVISOR = """
import asyncio, pathlib, sys, uuid
from vm.api import StateDir, VmSpec
from vm.hypervisors.qemu import DRIVER

async def main():
    state = StateDir(pathlib.Path(sys.argv[1]))
    spec = VmSpec(name="test", uuid=uuid.UUID(int=7), kernel=pathlib.Path(sys.argv[2]), accel="tcg", memory_mib=256)
    machine = await DRIVER.start(DRIVER.plan(spec, state), state)
    print(machine.pid, flush=True)
    await machine.wait()

asyncio.run(main())
"""


async def test_a_machine_does_not_outlive_its_supervisor(parts: Parts, state: StateDir) -> None:
    supervisor = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", textwrap.dedent(SUPERVISOR), str(state.path), str(parts.kernel)),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert supervisor.stdout is not None
    pid = int(await asyncio.wait_for(supervisor.stdout.readline(), ANSWER_S))
    assert process.started(pid) is not None
    supervisor.kill()
    await supervisor.wait()
    async with asyncio.timeout(ANSWER_S):
        while process.started(pid) is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def test_links_that_dial_and_cards_without_an_address(parts: Parts, state: StateDir) -> None:
    """QEMU takes the words for each; that frames go through them is for the tests of our daemon."""
    dialled = asyncio.Event()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        dialled.set()

    server = await asyncio.start_unix_server(accept, str(state.network))
    nics = tuple(Nic(kind=kind, socket=state.network) for kind in ("qemu-stream", "unixgram", "qemu-dgram"))
    async with started(spec(parts, nics=nics), state) as running:
        await asyncio.wait_for(dialled.wait(), ANSWER_S)
        assert (state.path / "nic1.sock").is_socket() and (state.path / "nic2.sock").is_socket()
        assert running.version >= (7, 2)
    server.close()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"extra": ("-device", "no-such-device")},
            r"qemu-system-x86_64 ended with status 1:\n.*'no-such-device' is not a",
        ),
        ({"disks": (Disk(path=Path("/etc/passwd"), format="qcow2", readonly=True),)}, "Image is not in qcow2 format"),
        ({"memory_mib": 1 << 40}, "ended with status 1"),
        ({"accel": "hvf"}, r"invalid accelerator hvf\n\(hvf is for macOS; say accel: auto\)"),
    ],
)
async def test_qemus_own_complaint(parts: Parts, state: StateDir, changes: dict[str, Any], complaint: str) -> None:
    plan: Plan = Qemu().plan(spec(parts, **changes), state)
    with pytest.raises(HostError, match=f"(?s){complaint}"):
        await Qemu().start(plan, state)
    assert not state.console.is_symlink()


async def test_a_disk_that_another_machine_uses(parts: Parts, state: StateDir) -> None:
    disk = Disk(path=state.path / "data.img", size=1 << 20)
    other = StateDir(state.path / "other")
    other.path.mkdir(0o700)
    async with started(spec(parts, disks=(disk,)), state):
        with pytest.raises(HostError, match="another machine uses that disk"):
            await Qemu().start(Qemu().plan(spec(parts, disks=(disk,)), other), other)
