"""What a driver of somebody else's is held to, and what a machine answers whose hypervisor has no such order."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError
from tests.support.specs import card, disk, minimal, share, vsock
from vm.api import Caps, EventKind, Unsupported
from vm.hypervisors.caps import check
from vm.hypervisors.machine import MAX_EVENTS, ProcessMachine
from vm.hypervisors.process import spawn

BHYVE = Caps(nics=frozenset({"tap"}))


@pytest.mark.parametrize(
    ("changes", "what", "able"),
    [
        ({"nics": (card("vmnet"),)}, "a network card of kind vmnet: it has tap", ("hyperkit",)),
        (
            {"vsock": vsock()},
            "it has no vsock",
            ("qemu", "hyperkit", "vfkit", "cloud-hypervisor", "firecracker", "crosvm"),
        ),
        ({"shares": (share("9p-socket"),)}, "share tag-9p-socket of kind 9p-socket: it has none", ("hyperkit",)),
    ],
)
def test_a_driver_of_somebody_elses_is_held_to_its_caps(
    changes: dict[str, Any], what: str, able: tuple[str, ...]
) -> None:
    with pytest.raises(Unsupported) as refused:
        check("bhyve", BHYVE, minimal(**changes))
    assert (refused.value.driver, refused.value.what, refused.value.able) == ("bhyve", what, able)
    assert isinstance(refused.value, ConfigError)


def test_and_to_nothing_else() -> None:
    check(
        "bhyve",
        BHYVE,
        minimal(kernel=None, accel="kvm", disks=(disk(format="qcow2", readonly=True),), nics=(card("tap"),)),
    )


async def test_a_machine_without_an_order_names_hypervisors_that_have_it(tmp_path: Path) -> None:
    process = await spawn((sys.executable, "-c", "input()"), log=tmp_path / "log" / "bhyve.log")
    machine = ProcessMachine("bhyve", process)
    for order in (machine.pause, machine.resume, machine.powerdown):
        with pytest.raises(Unsupported, match=r"bhyve: it cannot .*; qemu, hyperkit, vfkit, .* could"):
            await order()
    await machine.close()
    assert [event.kind async for event in machine.events()][-1] is EventKind.EXITED


async def test_events_that_nobody_reads_have_a_bound_and_the_last_is_kept(tmp_path: Path) -> None:
    class Pausing(ProcessMachine):
        async def _pause(self) -> None: ...

    process = await spawn((sys.executable, "-c", "pass"), log=tmp_path / "log" / "x.log")
    machine = Pausing("x", process)
    for _ in range(MAX_EVENTS + 10):
        await machine.pause()
    await machine.wait()
    events = [event.kind async for event in machine.events()]
    assert len(events) == MAX_EVENTS
    assert events[-1] is EventKind.EXITED
    await machine.close()


async def test_an_order_whose_answer_comes_after_the_end_is_told_before_it(tmp_path: Path) -> None:
    class Slow(ProcessMachine):
        async def _powerdown(self) -> None:
            self.process.kill()
            await self.process.wait()
            await asyncio.sleep(0.05)

    process = await spawn((sys.executable, "-c", "input()"), log=tmp_path / "log" / "x.log")
    machine = Slow("x", process)
    await machine.powerdown()
    events = [event.kind async for event in machine.events()]
    assert events == [EventKind.STARTED, EventKind.POWERDOWN, EventKind.EXITED]
    await machine.close()
