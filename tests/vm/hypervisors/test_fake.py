"""The fake hypervisor behaves as it is told, so that those who look after machines can be tested with it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError, HostError
from tests.support import golden, machines
from tests.support.machines import LIMIT_S, history, kinds, until
from tests.support.specs import full, minimal
from vm.api import EventKind, Machine, StateDir, VmSpec, VsockSpec
from vm.hypervisors import fake
from vm.vsock.api.kinds import vsock_for

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def state() -> Iterator[StateDir]:
    with tempfile.TemporaryDirectory(prefix="vm") as made:
        state = StateDir(Path(made))
        state.vsock.mkdir(mode=0o700)
        yield state


def spec_of(state: StateDir, *words: str) -> VmSpec:
    return minimal(extra=words, vsock=VsockSpec(directory=state.vsock))


def started(state: StateDir, *words: str) -> contextlib.AbstractAsyncContextManager[Machine]:
    return machines.started(fake.DRIVER, spec_of(state, *words), state)


async def line_with(reader: asyncio.StreamReader, part: bytes) -> None:
    async with asyncio.timeout(LIMIT_S):
        while part not in await reader.readline():
            pass


async def order(state: StateDir, **order: Any) -> Any:
    """As any process may, by the monitor's socket."""
    reader, writer = await asyncio.open_unix_connection(state.monitor)
    writer.write(json.dumps(order).encode() + b"\n")
    try:
        async with asyncio.timeout(LIMIT_S):
            while "event" in (answer := json.loads(await reader.readline())):
                pass
        return answer
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("case", "spec"),
    [
        ("fake-minimal", minimal()),
        ("fake-full", full("vhost-user", ("9p-socket",), extra=("boot=signal", "vsock=hyperkit"))),
    ],
)
def test_its_plan(case: str, spec: VmSpec) -> None:
    golden.check(GOLDEN / f"{case}.txt", golden.text_of(fake.DRIVER.plan(spec, golden.STATE)))


@pytest.mark.parametrize(
    "word", ["boot=maybe", "crash-after=soon", "serve=7:tea", "serve=x:echo", "vsock=kernel", "nonsense"]
)
def test_a_word_that_it_does_not_know_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=f"fake: .*{word}.*there are"):
        fake.DRIVER.plan(minimal(extra=(word,)), golden.STATE)


async def test_it_boots_at_once_and_powers_down_when_asked(state: StateDir) -> None:
    async with started(state) as machine:
        await until(lambda: b"docker login: " in state.console_log.read_bytes())
        await machine.powerdown()
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 0
        events = await history(machine)
        assert [event.kind for event in events] == [
            EventKind.STARTED,
            EventKind.POWERDOWN,
            EventKind.SHUTDOWN,
            EventKind.EXITED,
        ]
        assert not events[2].by_guest


async def test_it_may_ignore_the_power_button(state: StateDir) -> None:
    async with started(state, "powerdown=ignore") as machine:
        await machine.powerdown()
        assert (await order(state, order="console"))["return"], "it still answers"
        await machine.kill()
        assert await kinds(machine) == [EventKind.STARTED, EventKind.POWERDOWN, EventKind.EXITED]


async def test_it_may_take_its_time_to_power_down(state: StateDir) -> None:
    async with started(state, "shutdown=0.5") as machine:
        begun = time.monotonic()
        await machine.powerdown()
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 0
        assert time.monotonic() - begun >= 0.5


@pytest.mark.parametrize(("words", "status"), [(("crash-status=3",), 3), (("crash-status=-11",), -signal.SIGSEGV)])
async def test_it_may_crash(words: tuple[str, ...], status: int, state: StateDir) -> None:
    async with started(state, "crash-after=0.05", *words) as machine:
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == status
        last = (await history(machine))[-1]
        assert (last.kind, last.status) == (EventKind.EXITED, status)
        assert "crashes, as it was told" in last.text


async def test_it_may_crash_in_its_first_lives_only(state: StateDir) -> None:
    for _ in range(2):
        async with started(state, "crash-after=0", "crash-times=2") as machine:
            assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 1
    async with started(state, "crash-after=0", "crash-times=2") as machine:
        await until(lambda: b"login: " in state.console_log.read_bytes())
        await machine.powerdown()
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 0


async def test_it_may_fail_to_start(state: StateDir) -> None:
    with pytest.raises(HostError, match=r"(?s)ended with status 1.*does not start, as it was told"):
        async with started(state, "start=fails"):
            pass


async def test_it_may_hang_before_it_has_a_monitor(state: StateDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "LIMIT_S", 0.5)
    with pytest.raises(HostError, match=r"no monitor at .* within"):
        async with started(state, "start=hangs"):
            pass


async def test_it_may_be_missing(state: StateDir) -> None:
    with pytest.raises(HostError, match="no-such-hypervisor is not installed"):
        async with started(state, "binary=no-such-hypervisor"):
            pass


async def test_what_is_typed_comes_back_and_a_guest_powers_off_by_itself(state: StateDir) -> None:
    async with started(state) as machine:
        assert machine.console is not None
        reader, writer = await machine.console.attach()
        writer.write(b"hello\r")
        await line_with(reader, b"echo: hello")
        writer.write(b"reboot\r")
        await line_with(reader, b"restarts")
        writer.write(b"poweroff\r")
        assert await asyncio.wait_for(machine.wait(), LIMIT_S) == 0
        writer.close()
        events = await history(machine)
        assert [(event.kind, event.by_guest) for event in events[1:]] == [
            (EventKind.RESET, True),
            (EventKind.SHUTDOWN, True),
            (EventKind.EXITED, False),
        ]


async def test_another_process_makes_it_panic_and_crash(state: StateDir) -> None:
    async with started(state) as machine:
        assert await order(state, order="panic") == {"return": None}
        await order(state, order="crash", status=7)
        assert await kinds(machine) == [EventKind.STARTED, EventKind.PANIC, EventKind.EXITED]
        assert await machine.wait() == 7


@pytest.mark.parametrize("sent", [{"order": "dance"}, {"order": "dial"}, {"order": "dial", "port": 1}])
async def test_an_order_that_cannot_be_carried_out_is_answered_with_why(sent: dict[str, Any], state: StateDir) -> None:
    async with started(state):
        assert list(await order(state, **sent)) == ["error"]


async def test_while_it_is_paused_nobody_is_served(state: StateDir) -> None:
    async with started(state, "serve=7:echo") as machine:
        await until(lambda: b"login: " in state.console_log.read_bytes())
        reader, writer = await vsock_for("hybrid", VsockSpec(directory=state.vsock)).connect(7)
        await machine.pause()
        writer.write(b"x")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.readexactly(1), 0.3)
        await machine.resume()
        assert await asyncio.wait_for(reader.readexactly(1), LIMIT_S) == b"x"
        writer.close()
        await writer.wait_closed()
        await machine.kill()
        assert await kinds(machine) == [EventKind.STARTED, EventKind.PAUSED, EventKind.RESUMED, EventKind.EXITED]


@pytest.mark.parametrize("kind", ["hybrid", "hyperkit"])
async def test_its_ports_are_reached_and_it_reaches_ours(kind: str, state: StateDir) -> None:
    words = (f"vsock={kind}", "serve=7:echo", "serve=2376:docker", "serve=62372:eof")
    spec = spec_of(state, *words)
    plan = fake.DRIVER.plan(spec, state)
    assert plan.vsock == kind
    assert spec.vsock is not None
    vsock = vsock_for(plan.vsock, spec.vsock)

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"you said " + await reader.read())
        await writer.drain()

    listening = await vsock.listen(4098, greet)
    async with started(state, *words):
        await until(lambda: b"login: " in state.console_log.read_bytes())
        assert await said_by(vsock, 7, b"hello") == b"hello"
        assert b"Server: Docker/" in await said_by(vsock, 2376, b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await said_by(vsock, 62372, b"") == b""
        assert await order(state, order="dial", port=4098, send="hi") == {"return": "you said hi"}
    await listening.close()


async def said_by(vsock: Any, port: int, octets: bytes) -> bytes:
    reader, writer = await vsock.connect(port)
    writer.write(octets)
    if octets:
        writer.write_eof()
    found = await asyncio.wait_for(reader.read(), LIMIT_S)
    writer.close()
    await writer.wait_closed()
    return bytes(found)


@pytest.mark.parametrize("how", ["signal", "order"])
async def test_its_ports_are_closed_until_it_has_booted(how: str, state: StateDir) -> None:
    async with started(state, "boot=signal", "serve=7:echo") as machine:
        vsock = vsock_for("hybrid", VsockSpec(directory=state.vsock))
        with pytest.raises(HostError):
            await vsock.connect(7)
        if how == "signal":
            os.kill(machine.pid, signal.SIGUSR1)
        else:
            await order(state, order="boot")
        await until(lambda: b"login: " in state.console_log.read_bytes())
        assert await said_by(vsock, 7, b"hello") == b"hello"


async def test_it_may_boot_later_or_never(state: StateDir) -> None:
    async with started(state, "boot=0.2"):
        await until(lambda: b"login: " in state.console_log.read_bytes())
    async with started(state, "boot=never", "serve=7:echo"):
        with pytest.raises(HostError):
            await vsock_for("hybrid", VsockSpec(directory=state.vsock)).connect(7)


async def test_it_does_not_outlive_who_started_it(state: StateDir) -> None:
    starter = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from uuid import UUID\n"
        "from vm.api import StateDir, VmSpec\n"
        "from vm.hypervisors.fake import DRIVER\n"
        "async def main():\n"
        "    state = StateDir(Path(sys.argv[1]))\n"
        "    plan = DRIVER.plan(VmSpec(name='x', uuid=UUID(int=1), kernel=Path('/k')), state)\n"
        "    machine = await DRIVER.start(plan, state)\n"
        "    print(machine.pid, flush=True)\n"
        "    await machine.wait()\n"
        "asyncio.run(main())\n"
    )
    words = (sys.executable, "-c", starter, str(state.path))
    process = await asyncio.create_subprocess_exec(*words, stdout=subprocess.PIPE, cwd=Path(__file__).parents[3])
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    os.kill(pid, 0)
    process.kill()
    await process.wait()
    await until(lambda: gone(pid))


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
