"""A machine from its start to its end, as whoever looks after it sees it. The hypervisor is fake, its processes are real."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import HostError
from tests.support.vm_house import FAST, house
from vm.supervisor import ending, services
from vm.supervisor.lifecycle import ENDS, TRANSITIONS, Cause, Input, State, Verdict, backoff
from vm.supervisor.status import status

ALONE = "network: none\n" + FAST


async def test_a_machine_comes_up_and_goes_down_in_order() -> None:
    async with house(ALONE) as made:
        await made.ready()
        assert made.supervisor.pid > 0
        assert made.home.state.console.is_symlink()
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert made.states == ["sidecars", "created", "running", "ready", "stopping", "stopped"]
        assert "the guest is asked to power down" in made.said
        assert "killing" not in made.said
        assert made.home.read("result")["state"] == "stopped"


async def test_what_it_makes_is_for_its_user_alone() -> None:
    async with house(ALONE + "docker_socket: docker.sock\nready: docker\n", "serve=2376:docker") as made:
        await made.ready()
        assert stat.S_IMODE(made.home.path.stat().st_mode) == 0o700
        for path in [*made.home.path.glob("*.sock"), *(made.home.path / "run").iterdir()]:
            assert not stat.S_IMODE(path.stat().st_mode) & 0o077, path


async def test_the_guests_own_poweroff_is_no_crash() -> None:
    async with house(ALONE) as made:
        await made.ready()
        await made.order(order="poweroff")
        assert await made.over() is State.STOPPED
        assert made.supervisor.reason == "the guest powered off"
        assert made.supervisor.restarts == 0


async def test_a_guest_that_reboots_stays_up() -> None:
    async with house(ALONE) as made:
        await made.ready()
        pid = made.supervisor.pid
        await made.order(order="reboot")
        await made.until(lambda: "the guest reboots" in made.said)
        assert (made.supervisor.state, made.supervisor.pid) == (State.READY, pid)


async def test_a_guest_that_reboots_without_end_does_not_fill_the_log() -> None:
    async with house(ALONE) as made:
        await made.ready()
        for _ in range(50):
            await made.order(order="reboot")
        await made.until(lambda: made.supervisor.guest.resets == 50)
        told = made.said.count("the guest reboots")
        assert 0 < told < 50


async def test_a_crash_is_followed_by_another_start() -> None:
    async with house(ALONE, "crash-after=0.2", "crash-times=1", "crash-status=3") as made:
        await made.until(lambda: made.states.count("ready") == 2)
        assert made.supervisor.restarts == 1
        assert made.states[:7] == ["sidecars", "created", "running", "ready", "stopping", "new", "sidecars"]
        assert "fake ended with status 3: the fake machine crashes, as it was told" in made.said


async def test_a_hypervisor_that_is_killed_is_started_again() -> None:
    async with house(ALONE) as made:
        await made.ready()
        await made.order(order="crash", status=-9)
        await made.until(lambda: made.states.count("ready") == 2)
        assert "fake ended with signal 9" in made.said


async def test_who_crashes_again_and_again_is_given_up_after_five_restarts() -> None:
    async with house(ALONE, "crash-after=0") as made:
        assert await made.over() is State.FAILED
        assert made.supervisor.restarts == 5
        assert made.said.count("starting fake") == 6
        assert made.supervisor.reason.endswith("(6 times in a row)")
        waits = [entry["text"] for entry in made.entries if entry["kind"] == "waiting"]
        assert [text.split(" in ")[1].split(" ")[0] for text in waits] == ["0.05", "0.1", "0.2", "0.2", "0.2"]


async def test_a_machine_that_is_not_to_be_restarted_is_not() -> None:
    async with house("network: none\nrestart: never\n", "crash-after=0.1") as made:
        assert await made.over() is State.FAILED
        assert made.said.count("starting fake") == 1


async def test_a_kernel_panic_is_a_crash_though_the_hypervisor_goes_on() -> None:
    async with house(ALONE) as made:
        await made.ready()
        await made.order(order="panic")
        await made.until(lambda: made.states.count("ready") == 2)
        assert "stopping: the guest's kernel panicked" in made.said


async def test_a_guest_that_does_not_obey_is_killed_after_the_grace() -> None:
    async with house(ALONE + "stop: {grace: 0.3}\n", "powerdown=ignore") as made:
        await made.ready()
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert "the guest did not power down within 0.3 s" in made.said


async def test_a_guest_that_takes_its_time_is_waited_for() -> None:
    async with house(ALONE, "shutdown=0.5") as made:
        await made.ready()
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert "killing" not in made.said


async def test_a_guest_that_did_not_hear_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AGAIN_S", 0.1)
    pressed: list[float] = []
    async with house(ALONE + "stop: {grace: 1}\n", "powerdown=ignore") as made:
        await made.ready()
        machine = made.supervisor._machine
        assert machine is not None
        press = machine.powerdown

        async def powerdown() -> None:
            pressed.append(asyncio.get_running_loop().time())
            await press()

        monkeypatch.setattr(machine, "powerdown", powerdown)
        made.supervisor.down()
        await made.over()
    assert len(pressed) > 2


@pytest.mark.parametrize("broken", [["powerdown"], ["powerdown", "kill"], ["close"]], ids=", ".join)
async def test_a_driver_of_others_may_fail_in_ways_of_its_own(
    broken: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(ALONE) as made:
        await made.ready()
        machine = made.supervisor._machine
        close = machine.close if machine is not None else None

        async def fails() -> None:
            if "close" in broken and close is not None:
                await close()
            raise ValueError("a fault of theirs")

        for order in broken:
            monkeypatch.setattr(machine, order, fails)
        made.supervisor.down()
        assert await made.over() is State.STOPPED
    assert "a fault of theirs" in caplog.text


async def test_who_has_no_patience_may_kill_while_it_is_waited_for() -> None:
    async with house(ALONE, "powerdown=ignore") as made:
        await made.ready()
        made.supervisor.down()
        await made.until(lambda: "asked to power down" in made.said)
        made.supervisor.down(kill=True)
        assert await made.over() is State.STOPPED
        assert "killing the machine" in made.said
        assert "did not power down within" not in made.said


async def test_a_paused_machine_goes_on_to_power_down() -> None:
    async with house(ALONE) as made:
        await made.ready()
        await made.supervisor.pause()
        assert (await status(made.supervisor))["paused"] is True
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert "killing" not in made.said


async def test_down_while_it_waits_to_be_ready() -> None:
    async with house(ALONE + "ready: console:never said\n") as made:
        await made.until(lambda: made.supervisor.state is State.RUNNING)
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert "ready" not in made.states


async def test_down_while_the_hypervisor_does_not_answer() -> None:
    async with house(ALONE, "start=hangs") as made:
        await made.until(lambda: made.supervisor.state is State.CREATED)
        made.supervisor.down()
        assert await made.over() is State.STOPPED


async def test_down_between_two_starts() -> None:
    async with house("network: none\nrestart: {backoff: 30}\n", "crash-after=0") as made:
        await made.until(lambda: made.supervisor.state is State.NEW and made.supervisor.restarts == 1)
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert made.said.count("starting fake") == 1


async def test_down_while_it_is_built() -> None:
    begun = asyncio.Event()

    async def build(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    async with house("network: none\nboot: {linuxkit: linuxkit.yml}\n", build=build) as made:
        await asyncio.wait_for(begun.wait(), 10)
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert "starting fake" not in made.said


async def test_it_is_built_once_and_what_the_builder_says_is_heard() -> None:
    built: list[Path] = []

    async def build(_settings: object, _home: object, out: Path, say: Callable[[str], None]) -> None:
        built.append(out)
        say("deb:busybox")

    async with house(
        ALONE + "boot: {linuxkit: linuxkit.yml}\n", "crash-after=0.1", "crash-times=1", build=build
    ) as made:
        await made.until(lambda: made.states.count("ready") == 2)
        assert built == [made.home.path / "boot"]
        assert "deb:busybox" in made.said


async def test_a_hypervisor_that_is_not_installed_says_so_once() -> None:
    async with house(ALONE, "binary=no-such-hypervisor") as made:
        assert await made.over() is State.FAILED
        assert "no-such-hypervisor is not installed" in made.supervisor.reason
        assert made.supervisor.restarts == 0


async def test_a_hypervisor_that_fails_to_start_is_heard() -> None:
    async with house(ALONE, "start=fails") as made:
        assert await made.over() is State.FAILED
        assert "with status 1" in made.supervisor.reason


async def test_a_guest_that_is_never_ready_is_taken_down() -> None:
    async with house(ALONE + "ready: {probe: 'console:never said', limit: 0.3}\n") as made:
        assert await made.over() is State.FAILED
        assert "not ready within 0.3 s (ready: console:never said)" in made.supervisor.reason
        assert str(made.home.state.console_log) in made.supervisor.reason


async def test_a_directory_that_is_not_there_is_named_before_anything_starts() -> None:
    async with house(ALONE + "shares: [{source: nowhere, target: /mnt, kind: 9p-local}]\n") as made:
        assert await made.over() is State.FAILED
        assert "nowhere is no directory" in made.supervisor.reason
        assert "starting fake" not in made.said


@pytest.mark.parametrize(
    ("probe", "words"),
    [
        ("console:login", ["boot=0.2"]),
        ("vsock:1024", ["boot=0.2", "serve=1024:hold"]),
        ("vsock:1024", ["boot=0.2", "serve=1024:hold", "vsock=hyperkit"]),
        ("docker", ["boot=0.2", "serve=2376:docker"]),
    ],
)
async def test_it_is_ready_when_the_probe_says_so(probe: str, words: list[str]) -> None:
    docker = "docker_socket: docker.sock\n" if probe == "docker" else ""
    never = [word.replace("boot=0.2", "boot=signal") for word in words]
    async with house(f"{ALONE}ready: '{probe}'\n{docker}", *never) as made:
        await made.until(lambda: "waiting until it is ready" in made.said)
        await asyncio.sleep(0.5)
        assert made.supervisor.state is State.RUNNING
        await made.order(order="boot")
        await made.ready()


async def test_restart_is_down_and_up_again() -> None:
    async with house(ALONE) as made:
        await made.ready()
        pid = made.supervisor.pid
        made.supervisor.restart()
        await made.until(lambda: made.states.count("ready") == 2)
        assert made.supervisor.pid != pid
        assert made.supervisor.failures == 0


async def test_what_is_down_cannot_be_paused() -> None:
    async with house(ALONE) as made:
        await made.ready()
        made.supervisor.down()
        await made.over()
        with pytest.raises(HostError, match="house is stopped, not up"):
            await made.supervisor.pause()


async def test_docker_sock_leads_to_the_guest_and_goes_before_it() -> None:
    async with house(ALONE + "docker_socket: docker.sock\n", "serve=2376:docker", "powerdown=ignore") as made:
        await made.ready()
        found = await status(made.supervisor)
        assert found["docker_socket"] == str(made.home.state.docker)
        reader, writer = await asyncio.open_unix_connection(made.home.state.docker)
        writer.write(b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n")
        assert b"Docker" in await reader.read()
        writer.close()
        made.supervisor.down()
        await made.until(lambda: "asked to power down" in made.said)
        assert not made.home.state.docker.exists()


async def test_clients_of_docker_sock_wait_while_the_machine_comes_again() -> None:
    async with house(ALONE + "docker_socket: docker.sock\n", "serve=2376:docker", "boot=0.3") as made:
        await made.ready()
        await made.order(order="crash")
        await made.until(lambda: made.supervisor.state is State.CREATED)
        reader, writer = await asyncio.open_unix_connection(made.home.state.docker)
        writer.write(b"GET /_ping HTTP/1.1\r\nHost: d\r\n\r\n")
        assert b"Docker" in await reader.read()
        writer.close()
        assert made.states.count("ready") == 2


async def test_the_guests_clock_is_looked_after_while_it_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    made_with: list[Any] = []

    class Recorder:
        def __init__(self, dial: Any) -> None:
            made_with.append(dial)

        async def close(self) -> None:
            made_with.append("closed")

    monkeypatch.setattr(services, "TimeSync", Recorder)
    async with house(ALONE + "vsock: {ports: {timesync: 62372}}\n", "serve=62372:eof") as made:
        await made.ready()
        (dial,) = made_with
        with closing(await dial()) as sock:
            assert await asyncio.get_running_loop().sock_recv(sock, 1) == b""
        made.supervisor.down()
        await made.over()
        assert made_with[1:] == ["closed"]


async def test_docker_sock_in_a_place_that_is_taken_is_degraded() -> None:
    async with house(ALONE + "docker_socket: taken\nready: none\n") as made:
        (made.home.path / "taken").write_text("mine")
        await made.ready()
        assert "is not a socket" in made.supervisor.degraded["docker_socket"]
        made.supervisor.down()
        await made.over()
        assert (made.home.path / "taken").read_text() == "mine"


async def test_further_names_of_the_console() -> None:
    async with house(ALONE + "console: {path: serial, log: serial.log}\n") as made:
        await made.ready()
        assert (made.home.path / "serial").readlink() == made.home.state.console
        await made.until(lambda: "boots" in (made.home.path / "serial.log").read_text())


async def test_the_events_are_kept_for_who_comes_later() -> None:
    async with house(ALONE) as made:
        await made.ready()
        later = made.supervisor.journal.read(after=made.entries[1]["id"])
        assert (await anext(later))["id"] == made.entries[2]["id"]
        await later.aclose()
        json.dumps(made.entries)


def test_every_state_can_be_left_but_the_last() -> None:
    for state in State:
        ways = [given for (before, given) in TRANSITIONS if before is state]
        assert bool(ways) is (state not in ENDS), state
        assert state in ENDS or state is State.STOPPING or Input.OVER in ways


def test_backoff_doubles_up_to_its_most() -> None:
    assert [backoff(number, 1.0, 30.0) for number in range(1, 8)] == [1, 2, 4, 8, 16, 30, 30]
    assert backoff(10_000, 1.0, 30.0) == 30


def test_which_ends_count_as_failures() -> None:
    assert {cause for cause in Cause if Verdict(cause).counts} == {Cause.CRASHED, Cause.LOST}
