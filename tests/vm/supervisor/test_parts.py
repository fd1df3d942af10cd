"""What happens when a program beside a machine ends by itself (spec companions 5, failure rules)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netstack.errors import HostError
from tests.support.vm_house import FAST, Beside, House, house, short_directory
from vm import settings_file
from vm.api import Lost, Sidecar
from vm.hypervisors.process import started
from vm.supervisor.building import build
from vm.supervisor.home import Home
from vm.supervisor.lifecycle import State
from vm.supervisor.parts import Part
from vm.supervisor.status import status

ALONE = "network: none\n" + FAST
LIMIT_S = 60.0
SLEEPS = (sys.executable, "-c", "import time; time.sleep(1000)")


def beside(lost: Lost) -> Beside:
    return Beside([Sidecar(name="helper", argv=SLEEPS, lost=lost)])


async def test_a_part_the_machine_can_do_without_is_degraded() -> None:
    async with house(ALONE, driver=beside(Lost.DEGRADED)) as made:
        await made.ready()
        pid = made.supervisor.pid
        os.kill(made.pid("helper"), signal.SIGKILL)
        await made.until(lambda: "helper" in made.supervisor.degraded)
        found = await status(made.supervisor)
        assert "SIGKILL" in found["degraded"]["helper"]
        assert found["parts"] == [{"name": "helper", "pid": 0, "restarts": 0}]
        assert (made.supervisor.state, made.supervisor.pid) == (State.READY, pid)


async def test_a_part_that_can_come_again_is_started_again_and_the_guest_goes_on() -> None:
    async with house(ALONE, driver=beside(Lost.RESTART)) as made:
        await made.ready()
        pid, first = made.supervisor.pid, made.pid("helper")
        os.kill(first, signal.SIGKILL)
        await made.until(lambda: "helper is back" in made.said)
        assert made.supervisor.degraded == {}
        assert made.pid("helper") not in (0, first)
        assert made.supervisor.parts["helper"].restarts == 1
        assert (made.supervisor.state, made.supervisor.pid) == (State.READY, pid)


async def test_a_part_that_ends_again_and_again_takes_the_machine_down() -> None:
    driver = Beside([Sidecar(name="helper", argv=(sys.executable, "-c", ""), lost=Lost.RESTART)])
    async with house("network: none\nrestart: {policy: never, max: 2, backoff: 0.05}\n", driver=driver) as made:
        assert await made.over() is State.FAILED
        assert "helper cannot be had again" in made.supervisor.reason


async def test_a_part_the_guest_cannot_go_on_without_stops_the_machine_which_comes_again_with_it() -> None:
    async with house(ALONE, driver=beside(Lost.STOPS_MACHINE)) as made:
        await made.ready()
        pid, first = made.supervisor.pid, made.pid("helper")
        os.kill(first, signal.SIGKILL)
        await made.until(lambda: made.states.count("ready") == 2)
        assert "stopping: helper was lost" in made.said
        assert "the guest is asked to power down" in made.said
        assert made.pid("helper") not in (0, first)
        assert made.supervisor.pid != pid
        assert made.supervisor.restarts == 1


async def test_without_restarts_such_a_machine_has_failed() -> None:
    async with house("network: none\nrestart: never\n", driver=beside(Lost.STOPS_MACHINE)) as made:
        await made.ready()
        os.kill(made.pid("helper"), signal.SIGKILL)
        assert await made.over() is State.FAILED
        assert made.supervisor.reason.startswith("helper was lost")


async def test_a_part_that_ends_with_the_machine_is_not_what_ended_it() -> None:
    # As a device of vhost-user may: it ends when its front-end has gone.
    async with house(ALONE, driver=beside(Lost.STOPS_MACHINE)) as made:
        await made.ready()
        helper = made.pid("helper")
        await made.order(order="poweroff")
        os.kill(helper, signal.SIGKILL)
        assert await made.over() is State.STOPPED
        assert made.supervisor.reason == "the guest powered off"


async def test_a_part_that_is_not_installed_says_so() -> None:
    driver = Beside([Sidecar(name="helper", argv=("no-such-helper",))])
    async with house(ALONE, driver=driver) as made:
        assert await made.over() is State.FAILED
        assert "no-such-helper is not installed" in made.supervisor.reason
        assert "starting fake" not in made.said


async def test_parts_start_before_the_machine_or_after_it_and_end_in_reverse() -> None:
    script = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: (open(sys.argv[1], 'a').write(sys.argv[2]), sys.exit(0)))\n"
        "time.sleep(1000)"
    )
    with short_directory() as directory:
        path = directory / "order"

        def one(name: str, *, after: bool = False) -> Sidecar:
            argv = (sys.executable, "-c", script, str(path), name)
            return Sidecar(name=name, argv=argv, after_machine=after)

        async with house(ALONE, driver=Beside([one("a"), one("b"), one("c", after=True)])) as made:
            await made.ready()
            order = [line for line in made.said.splitlines() if line.startswith("starting ")]
            assert order == ["starting a", "starting b", "starting fake", "starting c"]
            await asyncio.sleep(0.3)  # until each has its handler
            made.supervisor.down()
            await made.over()
        assert path.read_text() == "cba"


# One part by itself.


@pytest.fixture
async def home() -> AsyncIterator[Home]:
    with short_directory() as directory:
        made = Home(directory)
        made.prepare()
        yield made


def python(name: str, script: str, *more: str, ready: Path | None = None) -> Sidecar:
    return Sidecar(name=name, argv=(sys.executable, "-c", script, *more), ready=ready)


@pytest.mark.parametrize(
    "script",
    [
        pytest.param("import os, sys, time; os.write(int(sys.argv[1]), b'1'); time.sleep(1000)", id="written to"),
        pytest.param("import os, sys, time; os.close(int(sys.argv[1])); time.sleep(1000)", id="closed"),
    ],
)
async def test_a_part_is_ready_when_its_descriptor_is(home: Home, script: str) -> None:
    part = Part(python("p", script, "{ready_fd}"), home)
    await part.start()
    assert part.pid
    assert [path.name for path in (home.path / "run").iterdir()] == ["p.pid"]
    await part.stop()
    assert part.pid == 0
    assert list((home.path / "run").iterdir()) == []


async def test_a_part_is_ready_when_its_socket_is_there_and_not_that_of_a_run_before(home: Home) -> None:
    path = home.path / "x.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    before = path.stat().st_ino
    script = "import socket, sys, time; time.sleep(.2); s = socket.socket(1); s.bind(sys.argv[1]); time.sleep(1000)"
    part = Part(python("p", script, str(path), ready=path), home)
    await part.start()
    assert path.stat().st_ino != before
    await part.stop()


async def test_a_part_that_ends_before_it_is_ready_says_what_it_said(home: Home) -> None:
    part = Part(python("p", "import sys; sys.exit('no such luck')", "{ready_fd}"), home)
    with pytest.raises(HostError, match=r"(?s)^p: .* with status 1.*no such luck"):
        await part.start()
    assert list((home.path / "run").iterdir()) == []


async def test_a_part_that_does_not_get_ready_in_time_is_ended(home: Home) -> None:
    part = Part(python("p", "import time; time.sleep(1000)", "{ready_fd}"), home, ready_s=0.3)
    with pytest.raises(HostError, match=r"p: not ready within 0\.3 s"):
        await part.start()
    assert list((home.path / "run").iterdir()) == []


async def test_a_part_that_does_not_end_is_killed(home: Home) -> None:
    script = (
        "import os, signal, sys, time; signal.signal(15, signal.SIG_IGN); os.close(int(sys.argv[1])); time.sleep(1000)"
    )
    part = Part(python("p", script, "{ready_fd}"), home, stop_s=0.2)
    await part.start()
    pid = part.pid
    await part.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# The network, which is the real one.

NETWORK = "network: {kind: %s}\nready: none\n" + FAST


async def lost_network(made: House) -> int:
    await made.ready()
    pid = made.pid("network")
    os.kill(pid, signal.SIGKILL)
    await made.until(lambda: "network is back" in made.said)
    return pid


async def test_a_network_that_is_lost_comes_again_and_a_guest_that_can_rejoin_goes_on() -> None:
    async with house(NETWORK % "vhost-user" + "publish: ['0:80', '0:81']\n") as made:
        await made.ready()
        before, machine = list(made.supervisor.published.held.values()), made.supervisor.pid
        assert len(set(before)) == 2
        pid = await lost_network(made)
        await made.until(lambda: not made.supervisor.degraded)
        assert made.pid("network") not in (0, pid)
        assert (made.supervisor.state, made.supervisor.pid) == (State.READY, machine)
        assert list(made.supervisor.published.held.values()) == before
        host, port = before[0].removeprefix("tcp:").split(":")[:2]
        await made.until(lambda: accepts(host, int(port)))


async def test_a_guest_that_cannot_rejoin_its_network_goes_down_and_comes_again() -> None:
    async with house(NETWORK % "qemu-stream") as made:
        await made.ready()
        machine = made.supervisor.pid
        await lost_network(made)
        await made.until(lambda: made.states.count("ready") == 2)
        assert "the network was lost, and fake cannot join it again" in made.said
        assert made.said.count("starting the network") == 1
        assert made.supervisor.pid != machine


async def test_a_hypervisor_that_never_rejoins_is_taken_at_its_word() -> None:
    async with house(NETWORK % "vhost-user", driver=Beside(rejoins_network=False)) as made:
        await lost_network(made)
        await made.until(lambda: made.states.count("ready") == 2)


async def test_ports_are_published_when_it_is_ready_and_taken_back_before_it_goes() -> None:
    async with house(
        NETWORK.replace("none", "console:login") % "vhost-user" + "publish: ['0:80']\n",
        "powerdown=ignore",
        "boot=signal",
    ) as made:
        await made.until(lambda: made.supervisor.state is State.RUNNING)
        assert made.supervisor.published.held == {}
        assert await forwards(made) == []
        await made.order(order="boot")
        await made.ready()
        assert await forwards(made) == list(made.supervisor.published.held.values())
        made.supervisor.down()
        await made.until(lambda: "asked to power down" in made.said)
        assert await forwards(made) == []


async def test_a_port_that_somebody_has_is_degraded_and_the_others_are_published() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with house(NETWORK % "vhost-user" + f"publish: ['{port}:80', '0:81']\n") as made:
            await made.ready()
            assert str(port) in made.supervisor.degraded[f"publish {port}:80"]
            assert list(made.supervisor.published.held) == ["0:81"]


async def test_what_a_killed_supervisor_published_is_taken_back_by_the_next() -> None:
    async with house(NETWORK % "vhost-user" + "publish: ['0:80']\n") as made:
        await made.ready()
        held = dict(made.supervisor.published.held)
        made.supervisor.published._held.clear()  # as if it had forgotten
        await made.supervisor.published.withdraw()
        assert await forwards(made) == []
        assert held


async def test_a_disk_that_is_full_costs_notes_but_no_guest_its_power_down() -> None:
    async with house(NETWORK % "vhost-user" + "publish: ['0:80']\n") as made:
        await made.ready()
        for name in ("published", "result"):
            (made.home.path / f"{name}.json.new").mkdir()  # nothing can be written there
        made.supervisor.restart()
        await made.until(lambda: made.states.count("ready") == 2)
        made.supervisor.down()
        assert await made.over() is State.STOPPED
        assert made.said.count("the guest is asked to power down") == 2
        assert "what is published is not noted: " in made.said


async def test_a_hypervisor_that_cannot_be_recorded_is_taken_down_again() -> None:
    async with house("network: none\nready: none\n" + FAST) as made:
        (made.home.path / "run" / "hypervisor.pid.new").mkdir()
        assert await made.over() is State.FAILED
        assert made.supervisor.reason == f"{made.home.path}/run/hypervisor.pid: Is a directory"


async def test_what_the_guest_dials_at_the_control_port_is_served_by_the_network() -> None:
    text = NETWORK % "vhost-user" + "vsock: {ports: {control: 4098}}\n"
    async with house(text) as made:
        await made.ready()
        # As the hypervisor does for what its guest dials at CID 2.
        reader, writer = await asyncio.open_unix_connection(made.home.state.vsock / "vsock_4098")
        writer.write(b"GET /forwards/list HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()


async def forwards(made: House) -> list[str]:
    return [one["spec"] for one in (await made.supervisor.network._ask("GET", "/v1/forwards"))["forwards"]]


def accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 5).close()
    except OSError:
        return False
    return True


async def test_a_build_that_is_given_up_leaves_nothing(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not apt, which it waits for, nor what was to become of that."""
    programs, cache, pid = home.path / "bin", home.path / "cache", home.path / "apt.pid"
    programs.mkdir()
    for name, does in (
        ("apt-cache", "echo Package: box; echo Version: 1; echo SHA256: 0"),
        ("apt-get", f"echo $$ >{pid}.new; mv {pid}.new {pid}; exec sleep 1000"),
    ):
        (programs / name).write_text(f"#!/bin/sh\n{does}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (home.path / "linuxkit.yml").write_text("kernel: {image: 'deb:box'}\n")
    (home.path / "box.yml").write_text("hypervisor: {driver: fake}\nboot: {linuxkit: linuxkit.yml}\n")
    wanted = settings_file.load(home.path / "box.yml")
    building = asyncio.create_task(build(wanted, home, home.path / "boot", lambda text: None))
    async with asyncio.timeout(LIMIT_S):
        while not pid.exists():  # noqa: ASYNC110  # it happens in another process
            await asyncio.sleep(0.01)
    building.cancel()
    with pytest.raises(asyncio.CancelledError):
        await building
    assert started(int(pid.read_text())) is None
    assert [path.name for path in (cache / "pyvpnkit" / "build").iterdir()] == ["resolved"]
