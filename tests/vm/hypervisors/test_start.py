"""Each driver beside QEMU's starts a program (which stands for the hypervisor), tells it what to do, and hears how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import HostError
from tests.support import machines, stand_in
from tests.support.machines import LIMIT_S, history, kinds, until
from tests.support.specs import full, minimal
from vm.api import EventKind, Hypervisor, Machine, StateDir
from vm.hypervisors import cloud_hypervisor, crosvm, firecracker, hyperkit, vfkit
from vm.hypervisors import machine as machine_module

DRIVERS: dict[str, Hypervisor] = {
    module.DRIVER.name: module.DRIVER for module in (hyperkit, vfkit, cloud_hypervisor, firecracker, crosvm)
}
API = "/api/v1"
ORDERED: dict[str, dict[str, Any]] = {
    "hyperkit": {"pause": "SIGUSR1", "resume": "SIGUSR2", "powerdown": "SIGTERM"},
    "vfkit": {
        "pause": ["POST /vm/state", {"state": "Pause"}],
        "resume": ["POST /vm/state", {"state": "Resume"}],
        "powerdown": ["POST /vm/state", {"state": "Stop"}],
    },
    "cloud-hypervisor": {
        "pause": [f"PUT {API}/vm.pause", None],
        "resume": [f"PUT {API}/vm.resume", None],
        "powerdown": [f"PUT {API}/vm.power-button", None],
    },
    "firecracker": {
        "pause": ["PATCH /vm", {"state": "Paused"}],
        "resume": ["PATCH /vm", {"state": "Resumed"}],
        "powerdown": ["PUT /actions", {"action_type": "SendCtrlAltDel"}],
    },
    "crosvm": {"pause": "suspend", "resume": "resume", "powerdown": "powerbtn"},
}


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> Iterator[StateDir]:
    with tempfile.TemporaryDirectory(prefix="vm") as made:
        home = Path(made)
        for name in DRIVERS:
            stand_in.install(home / "bin", name)
        (home / "state").mkdir(mode=0o700)
        monkeypatch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("STAND_IN_STATE", str(home / "state"))
        yield StateDir(home / "state")


def started(name: str, state: StateDir) -> contextlib.AbstractAsyncContextManager[Machine]:
    return machines.started(DRIVERS[name], minimal(), state)


async def told(state: StateDir, wanted: Any) -> None:
    await until(lambda: wanted in stand_in.orders(state.path))


@pytest.mark.parametrize("name", DRIVERS)
async def test_a_machine_is_paused_resumed_and_powered_down_in_the_hypervisors_own_words(
    name: str, state: StateDir
) -> None:
    async with started(name, state) as machine:
        before = len(stand_in.orders(state.path))
        await machine.pause()
        await told(state, ORDERED[name]["pause"])
        await machine.resume()
        await told(state, ORDERED[name]["resume"])
        await machine.powerdown()
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 0
        assert stand_in.orders(state.path)[before:] == list(ORDERED[name].values())
        assert await kinds(machine) == [
            EventKind.STARTED,
            EventKind.PAUSED,
            EventKind.RESUMED,
            EventKind.POWERDOWN,
            EventKind.SHUTDOWN,
            EventKind.EXITED,
        ]


@pytest.mark.parametrize("name", DRIVERS)
async def test_the_console_is_a_private_pty_behind_one_link(name: str, state: StateDir) -> None:
    async with started(name, state) as machine:
        assert machine.console is not None
        assert machine.console.path == state.console
        assert stat.S_ISCHR(state.console.stat().st_mode)
        assert stat.S_IMODE(state.console.stat().st_mode) == 0o600
        reader, writer = await machine.console.attach()
        writer.write(b"uname\n")
        async with asyncio.timeout(LIMIT_S):
            while b"UNAME" not in await reader.readline():
                pass
        writer.close()
    assert not state.console.is_symlink()


@pytest.mark.parametrize("name", ["vfkit", "cloud-hypervisor", "firecracker", "crosvm"])
async def test_what_the_guest_says_first_is_in_the_log(name: str, state: StateDir) -> None:
    async with started(name, state):
        await until(lambda: stand_in.GREETING in state.console_log.read_bytes())


@pytest.mark.parametrize("name", DRIVERS)
async def test_a_machine_that_is_killed_says_so(name: str, state: StateDir) -> None:
    async with started(name, state) as machine:
        await machine.kill()
        events = await history(machine)
        assert [event.kind for event in events] == [EventKind.STARTED, EventKind.EXITED]
        assert events[-1].status == -9
        with pytest.raises(ProcessLookupError):
            os.kill(machine.pid, 0)


@pytest.mark.parametrize("name", DRIVERS)
async def test_a_hypervisor_that_does_not_start_is_quoted(name: str, state: StateDir) -> None:
    (state.path / stand_in.REFUSE).write_text(json.dumps({"start": "no KVM here"}))
    with pytest.raises(HostError, match=r"(?s)ended with status 3.*no KVM here"):
        await DRIVERS[name].start(DRIVERS[name].plan(minimal(), state), state)
    assert not state.console.is_symlink()


@pytest.mark.parametrize("name", DRIVERS)
async def test_a_hypervisor_that_is_not_installed_is_named_with_what_to_do(
    name: str, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match=f"{name} is not installed; ."):
        await DRIVERS[name].start(DRIVERS[name].plan(minimal(), state), state)
    assert not state.console.is_symlink()


@pytest.mark.parametrize(
    ("name", "order"),
    [("vfkit", "POST /vm/state"), ("cloud-hypervisor", f"PUT {API}/vm.pause"), ("firecracker", "PATCH /vm")],
)
async def test_an_order_that_is_refused_is_an_error_and_no_event(name: str, order: str, state: StateDir) -> None:
    (state.path / stand_in.REFUSE).write_text(json.dumps({order: [500, {"error": "not in this state"}]}))
    async with started(name, state) as machine:
        with pytest.raises(HostError, match=f"{name}: {order}: 500 .*not in this state"):
            await machine.pause()
        await machine.kill()
        assert await kinds(machine) == [EventKind.STARTED, EventKind.EXITED]


@pytest.mark.parametrize(("name", "inspect"), [("vfkit", "/vm/inspect"), ("cloud-hypervisor", f"{API}/vm.info")])
@pytest.mark.parametrize(
    ("answer", "why"),
    [([404, {}], "GET {}: 404"), ([200, {"config": 7, "devices": 7}], "{} names no pty of the console")],
)
async def test_a_hypervisor_that_never_names_its_console_is_given_up(
    name: str, inspect: str, answer: Any, why: str, state: StateDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module, "LIMIT_S", 0.3)
    (state.path / stand_in.REFUSE).write_text(json.dumps({f"GET {inspect}": answer}))
    with pytest.raises(HostError, match=re.escape(f"{name}: {why.format(inspect)}")):
        await DRIVERS[name].start(DRIVERS[name].plan(minimal(), state), state)


async def test_an_order_that_crosvms_program_refuses_is_an_error(state: StateDir) -> None:
    (state.path / stand_in.REFUSE).write_text(json.dumps({"suspend": "the control socket said no"}))
    async with started("crosvm", state) as machine:
        with pytest.raises(HostError, match="crosvm: suspend: the control socket said no"):
            await machine.pause()


async def test_firecracker_is_told_each_part_in_order_and_started_last(state: StateDir) -> None:
    state.vsock.mkdir()
    driver = DRIVERS["firecracker"]
    plan = driver.plan(full("tap", disks=(), extra=()), state)
    machine = await driver.start(plan, state)
    try:
        assert stand_in.orders(state.path) == [[f"{call.method} {call.path}", call.body] for call in plan.rest]
        assert stand_in.orders(state.path)[-1] == ["PUT /actions", {"action_type": "InstanceStart"}]
    finally:
        await machine.close()


async def test_a_part_that_firecracker_refuses_ends_it(state: StateDir) -> None:
    (state.path / stand_in.REFUSE).write_text(
        json.dumps({"PUT /boot-source": [400, {"fault_message": "no such kernel"}]})
    )
    driver = DRIVERS["firecracker"]
    with pytest.raises(HostError, match=r"firecracker: PUT /boot-source: 400 .*no such kernel"):
        await driver.start(driver.plan(minimal(), state), state)
    assert [order for order, _ in stand_in.orders(state.path)] == ["PUT /machine-config", "PUT /boot-source"]
    assert not state.console.is_symlink()


async def test_ports_that_are_served_at_hyperkits_names_are_there_for_a_hypervisor_that_dials_others(
    state: StateDir,
) -> None:
    state.vsock.mkdir()
    (state.vsock / "vsock_4098").touch()
    for port in ("00000234", "00001002"):
        (state.vsock / f"00000002.{port}").touch()
    driver = DRIVERS["cloud-hypervisor"]
    machine = await driver.start(driver.plan(full("tap", disks=(), extra=()), state), state)
    try:
        assert (state.vsock / "vsock_564").readlink() == Path("00000002.00000234")
        assert not (state.vsock / "vsock_4098").is_symlink(), "what is there already is somebody's"
    finally:
        await machine.close()


async def test_a_machine_can_be_closed_twice_and_when_it_is_gone(state: StateDir) -> None:
    async with started("hyperkit", state) as machine:
        await machine.kill()
        await machine.close()
        assert await machine.wait() == -9
