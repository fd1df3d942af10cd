"""How QEMU is started, heard and ended, and what is said when it will not start; a program of the test's is in its place."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.errors import HostError
from tests.support import fake_qemu
from tests.support.specs import minimal
from vm.api import Event, EventKind, Plan, StateDir
from vm.hypervisors import process
from vm.hypervisors.qemu import Qemu, QemuMachine

FAKE = Path(fake_qemu.__file__)


@pytest.fixture
def state() -> Iterator[StateDir]:
    directory = Path(tempfile.mkdtemp(prefix="vm"))
    yield StateDir(directory)
    shutil.rmtree(directory)


def planned(how: str, state: StateDir, text: str = "") -> Plan:
    """As for a machine, with the test's program (or `text`) in QEMU's place."""
    program = state.path / "qemu"
    program.write_text(text or f'#!/bin/sh\nexec {sys.executable} {FAKE} {how!r} "$@"\n')
    program.chmod(0o700)
    plan = Qemu().plan(minimal(), state)
    return dataclasses.replace(plan, argv=(str(program), *plan.argv[1:]))


def running(word: str) -> list[str]:
    """Processes that have it in their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


async def start(how: str, state: StateDir, monitor_s: float = 20.0) -> QemuMachine:
    return await Qemu(monitor_s=monitor_s).start(planned(how, state), state)


async def rest_of(machine: QemuMachine) -> list[Event]:
    return [event async for event in machine.events()]


async def test_the_console_is_linked_before_the_guest_runs(state: StateDir) -> None:
    machine = await start("well", state)
    assert machine.version == (8, 1, 5)
    assert process.started(machine.pid) is not None
    pty = state.console.readlink()
    assert pty.is_char_device() and pty.stat().st_mode & 0o777 == 0o600
    assert state.console_log.stat().st_mode & 0o777 == 0o600
    await machine.close()
    assert not state.console.is_symlink()
    assert process.started(machine.pid) is None


async def test_what_qemu_tells_is_told(state: StateDir) -> None:
    machine = await start("well", state)
    await machine.pause()
    await machine.resume()
    with pytest.raises(HostError, match="qemu's monitor: it is gone"):
        await machine.powerdown()
    assert await machine.wait() == 0
    assert await rest_of(machine) == [
        Event(kind=EventKind.STARTED),
        Event(kind=EventKind.PAUSED, text="disk d0: No space left on device"),
        Event(kind=EventKind.RESUMED),
        Event(kind=EventKind.POWERDOWN),
        Event(kind=EventKind.RESET, by_guest=True, text="guest-reset"),
        Event(kind=EventKind.PANIC, by_guest=True),
        Event(kind=EventKind.SHUTDOWN, by_guest=True, text="guest-panic"),
        Event(kind=EventKind.EXITED),
    ]
    for order in (machine.pause, machine.resume, machine.powerdown):
        with pytest.raises(HostError, match="it is gone"):
            await order()
    await machine.kill()
    await machine.close()


async def test_one_that_its_accelerator_gave_up_says_so(state: StateDir) -> None:
    machine = await start("gives-up", state)
    await machine.pause()
    async with contextlib.aclosing(machine.events()) as events:
        found = [await anext(events) for _ in range(3)]
    assert [event.kind for event in found] == [EventKind.STARTED, EventKind.PAUSED, EventKind.PANIC]
    assert found[2].text == f"QEMU stopped it by an internal error; see {state.log('qemu')}"
    await machine.kill()
    await machine.close()


async def test_one_that_was_killed_says_so(state: StateDir) -> None:
    machine = await start("well", state)
    os.kill(machine.pid, signal.SIGKILL)
    assert await machine.wait() == -signal.SIGKILL
    assert (await rest_of(machine))[-1] == Event(kind=EventKind.EXITED, status=-signal.SIGKILL)
    await machine.close()


async def test_one_that_hangs_is_killed(state: StateDir) -> None:
    machine = await start("hangs", state)
    machine.process.terminate()
    order = asyncio.create_task(machine.powerdown())
    await asyncio.sleep(0)
    await machine.kill()
    assert await machine.wait() == -signal.SIGKILL
    with pytest.raises(HostError, match="qemu's monitor"):  # gone, or reset with an order unread
        await order
    await machine.close()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("refuses", "qemu: cont: it is held by another"),
        ("old", r"QEMU 6\.2\.0 is too old; 7\.2 or later is needed"),
        ("no-pty", "no pty for the console; is there another -serial in extra"),
    ],
)
async def test_one_that_is_not_what_is_wanted_is_ended(state: StateDir, how: str, why: str) -> None:
    with pytest.raises(HostError, match=why):
        await start(how, state)
    assert not state.console.is_symlink()


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("silent", r"no greeting within .*it said: qemu-system-x86_64: waiting for the other end"),
        ("deaf", r"no monitor at .*monitor\.sock within"),
    ],
)
async def test_one_that_is_too_slow(state: StateDir, how: str, why: str) -> None:
    with pytest.raises(HostError, match=why):
        await start(how, state, monitor_s=2.0)


@pytest.mark.parametrize(
    ("complaint", "advice"),
    [
        ("Could not access KVM kernel module: Permission denied", "usermod -aG kvm"),
        ("Could not access KVM kernel module: No such file or directory", "this host has no KVM; say accel: tcg"),
        ('-device virtio-blk-pci: Failed to get "write" lock', "another machine uses that disk"),
        ("Parameter 'type' expects a netdev backend type", "needs QEMU 7.2 or later"),
        ("cannot set up guest memory: Cannot allocate memory", "ask for less"),
    ],
)
async def test_its_complaint_is_quoted_with_what_to_do(state: StateDir, complaint: str, advice: str) -> None:
    with pytest.raises(HostError) as told:
        await start(complaint.replace("'", ""), state)
    first, second, third, *_ = str(told.value).splitlines()
    assert first == "qemu ended with status 1:"
    assert second == f"qemu-system-x86_64: {complaint}".replace("'", "")
    assert third.startswith("(") and advice in third
    assert complaint.replace("'", "") in state.log("qemu").read_text()


OLD = """#!/bin/sh
[ "$1" = --version ] && echo "QEMU emulator version 5.2.0" && exit
echo what >&2
exit 1
"""


async def test_an_old_one_is_said_to_be_old_when_it_does_not_start(state: StateDir) -> None:
    plan = planned("", state, OLD)
    with pytest.raises(HostError, match=r"(?s)status 1:\nwhat\n\(QEMU 5\.2 is too old; 7\.2 or later is needed\)"):
        await Qemu().start(plan, state)


async def test_none_is_installed(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Qemu().plan(minimal(), state)
    monkeypatch.setenv("PATH", str(state.path))
    with pytest.raises(HostError, match=r"qemu-system-\w+ is not installed; apt install qemu-system-x86"):
        await Qemu().start(plan, state)


async def test_giving_up_while_it_starts_leaves_nothing(state: StateDir) -> None:
    starting = asyncio.create_task(start("silent", state))
    async with asyncio.timeout(20):
        while not state.monitor.is_socket():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not running(str(state.monitor))
