"""A machine's console as a person who opens its pty sees it, and as the machine does."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from netstack.errors import HostError
from vm.console import PtyConsole, holders, open_pty
from vm.console_log import older
from vm.pty_shim import STALL_S, ChildEnds, PtyShim

LIMIT_S = 30.0


@pytest.fixture
def state() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="con") as made:
        yield Path(made)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not true():  # noqa: ASYNC110  # of files and other programs, which set no event
            await asyncio.sleep(0.01)


class Machine:
    """What a hypervisor does with its stdin and stdout."""

    def __init__(self, ends: ChildEnds) -> None:
        self.ends = ends
        os.set_blocking(ends.stdin, False)
        os.set_blocking(ends.stdout, False)

    async def say(self, octets: bytes) -> None:
        async with asyncio.timeout(LIMIT_S):
            while octets:
                try:
                    octets = octets[os.write(self.ends.stdout, octets) :]
                except BlockingIOError:
                    await asyncio.sleep(0.001)

    async def heard(self, octets: int) -> bytes:
        found = b""
        async with asyncio.timeout(LIMIT_S):
            while len(found) < octets:
                try:
                    found += os.read(self.ends.stdin, 65536)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
        return found


class Person:
    """Opens the console as any program does."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)

    async def sees(self, octets: int) -> bytes:
        found = b""
        async with asyncio.timeout(LIMIT_S):
            while len(found) < octets:
                try:
                    found += os.read(self.fd, 65536)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
        return found

    def close(self) -> None:
        os.close(self.fd)


@asynccontextmanager
async def stdio(state: Path, most: int = 4 << 20) -> AsyncIterator[tuple[PtyShim, Machine]]:
    shim, ends = PtyShim.over_pipes(state / "tty", state / "console.log", most=most)
    with ends:
        yield shim, Machine(ends)
    await shim.close()


async def test_the_console_is_a_private_link_to_a_pty(state: Path) -> None:
    (state / "tty").symlink_to("/nowhere")  # left by an earlier machine
    async with stdio(state) as (shim, _):
        assert shim.path.is_symlink()
        found = shim.path.stat()
        assert stat.S_ISCHR(found.st_mode)
        assert stat.S_IMODE(found.st_mode) == 0o600
    assert not shim.path.is_symlink()


async def test_both_ways_as_they_are(state: Path) -> None:
    every = bytes(range(256)) * 300
    async with stdio(state) as (shim, machine):
        person = Person(shim.path)
        await asyncio.gather(machine.say(b"login: "), until(lambda: shim.said == 7))
        assert await person.sees(7) == b"login: "
        saying = asyncio.create_task(machine.say(every))
        assert await person.sees(len(every)) == every
        await saying
        os.write(person.fd, every[:1024])
        assert await machine.heard(1024) == every[:1024]
        person.close()
        assert (shim.said, shim.unseen, shim.typed) == (7 + len(every), 0, 1024)
    assert (state / "console.log").read_bytes() == b"login: " + every


async def test_what_the_machine_says_is_not_typed_back_to_it(state: Path) -> None:
    async with stdio(state) as (shim, machine):
        person = Person(shim.path)
        await machine.say(b"hello\r\n")
        assert await person.sees(7) == b"hello\r\n"
        os.write(person.fd, b"x")
        assert await machine.heard(1) == b"x"
        person.close()


async def test_with_nobody_there_the_machine_goes_on_and_the_log_has_it(state: Path) -> None:
    said = os.urandom(3 << 20)
    async with stdio(state) as (shim, machine):
        await machine.say(said)
        await until(lambda: shim.said == len(said))
        assert shim.unseen == len(said)
        assert older(state / "console.log").read_bytes() + (state / "console.log").read_bytes() == said
        person = Person(shim.path)
        await machine.say(b"now")
        assert await person.sees(3) == b"now"
        person.close()


async def test_the_log_has_a_bound(state: Path) -> None:
    async with stdio(state, most=64 << 10) as (shim, machine):
        await machine.say(b"x" * (1 << 20))
        await until(lambda: shim.said == 1 << 20)
        sizes = [path.stat().st_size for path in (state / "console.log", older(state / "console.log"))]
        assert sum(sizes) <= 64 << 10


async def test_a_slow_reader_misses_nothing(state: Path) -> None:
    said = os.urandom(400_000)
    async with stdio(state) as (shim, machine):
        person = Person(shim.path)
        saying = asyncio.create_task(machine.say(said))
        seen = b""
        while len(seen) < len(said):
            seen += await person.sees(1)
            await asyncio.sleep(0.001)
        await saying
        assert seen == said
        assert shim.unseen == 0
        person.close()


async def test_a_reader_that_stopped_holds_the_machine_up_for_a_moment_only(state: Path) -> None:
    said = os.urandom(1 << 20)
    async with stdio(state) as (shim, machine):
        person = Person(shim.path)
        began = asyncio.get_running_loop().time()
        await machine.say(said)
        await until(lambda: shim.said == len(said))
        assert asyncio.get_running_loop().time() - began < STALL_S + LIMIT_S / 2
        assert 0 < shim.unseen < len(said)
        missed = shim.unseen
        seen = await person.sees(len(said) - missed)
        assert said.startswith(seen)
        await machine.say(b"back again")
        assert await person.sees(10) == b"back again"
        assert shim.unseen == missed
        person.close()


async def test_who_comes_next_does_not_get_what_another_left_unread(state: Path) -> None:
    async with stdio(state) as (shim, machine):
        first = Person(shim.path)
        await machine.say(b"old")
        await until(lambda: shim.said == 3)
        assert bool(select.select([first.fd], [], [], LIMIT_S)[0])
        first.close()
        await machine.say(b"nobody")
        await until(lambda: shim.unseen >= 6)
        second = Person(shim.path)
        await machine.say(b"new")
        assert (await second.sees(3))[:3] == b"new"
        second.close()


async def test_what_is_typed_in_passing_reaches_the_machine(state: Path) -> None:
    async with stdio(state) as (shim, machine):
        shim.path.write_bytes(b"reboot\n")  # as the shell's `echo reboot > tty`: opened and closed at once
        assert await machine.heard(7) == b"reboot\n"


async def test_a_machine_that_does_not_listen_bounds_what_is_typed(state: Path) -> None:
    async with stdio(state) as (shim, machine):
        person = Person(shim.path)
        typed = 0
        quiet = 0
        while quiet < 50:  # until neither the pipe, nor the shim, nor the pty takes more
            try:
                typed += os.write(person.fd, b"k" * 4096)
                quiet = 0
            except BlockingIOError:
                quiet += 1
            await asyncio.sleep(0.002)
        assert typed < 1 << 20
        await machine.say(b"still here")
        assert await person.sees(10) == b"still here"
        assert await machine.heard(typed) == b"k" * typed
        person.close()


async def test_the_last_words_of_a_machine_are_read(state: Path) -> None:
    shim, ends = PtyShim.over_pipes(state / "tty", state / "console.log")
    person = Person(shim.path)
    with ends:
        await Machine(ends).say(b"reboot: Power down\r\n")
        await until(lambda: shim.said == 20)
    await shim.ended()
    assert await person.sees(20) == b"reboot: Power down\r\n"
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                assert os.read(person.fd, 1) == b""
                break
            except BlockingIOError:
                await asyncio.sleep(0.01)
            except OSError:
                break
    person.close()
    await shim.close()
    await shim.close()


async def test_a_pty_of_the_hypervisor_gets_a_log_and_a_link(state: Path) -> None:
    hypervisor, slave = os.openpty()
    name = Path(os.ttyname(slave))
    os.close(slave)
    shim = PtyShim.over_pty(state / "tty", state / "console.log", name)
    assert stat.S_IMODE(os.stat(name).st_mode) == 0o600
    os.write(hypervisor, b"Booting\n")
    await until(lambda: shim.said == 8)
    assert (state / "console.log").read_bytes() == b"Booting\n"
    person = Person(shim.path)
    os.write(person.fd, b"ls\r")
    await until(lambda: bool(select.select([hypervisor], [], [], 0)[0]))
    assert os.read(hypervisor, 100) == b"ls\r"
    person.close()
    os.close(hypervisor)
    await asyncio.wait_for(shim.ended(), LIMIT_S)
    await shim.close()


async def test_attached_streams_reach_the_machine(state: Path) -> None:
    async with stdio(state) as (shim, machine):
        reader, writer = await shim.attach()
        await machine.say(b"login: ")
        assert await asyncio.wait_for(reader.readexactly(7), LIMIT_S) == b"login: "
        writer.write(b"root\r")
        assert await machine.heard(5) == b"root\r"
        writer.close()
        await writer.wait_closed()


async def test_a_second_user_is_told_of_the_first(state: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with stdio(state) as (shim, _):
        assert holders(shim.path) == []
        person = Person(shim.path)
        first = await asyncio.create_subprocess_exec("sleep", "1000", stdin=person.fd)
        person.close()
        try:
            assert holders(shim.path) == [f"sleep (pid {first.pid})"]
            _, writer = await shim.attach()
            assert "is open in sleep" in caplog.text
            writer.close()
            await writer.wait_closed()
        finally:
            first.kill()
            await first.wait()


async def test_a_pty_that_the_hypervisor_logs_is_linked_and_its_log_trimmed(state: Path) -> None:
    hypervisor, slave = os.openpty()
    name = Path(os.ttyname(slave))
    os.close(slave)
    log = state / "console.log"
    log.write_bytes(b"x" * 3000)
    console = PtyConsole.linked(state / "tty", log, name, most=1000)
    reader, writer = await console.attach()
    writer.write(b"k")
    await until(lambda: bool(select.select([hypervisor], [], [], 0)[0]))
    assert os.read(hypervisor, 10) == b"k"
    os.write(hypervisor, b"answer")
    assert await asyncio.wait_for(reader.readexactly(6), LIMIT_S) == b"answer"
    writer.close()
    await writer.wait_closed()
    await until(lambda: log.stat().st_size == 0)
    await console.close()
    assert not console.path.is_symlink()
    os.close(hypervisor)


async def test_a_link_that_the_hypervisor_makes_is_waited_for_and_made_private(state: Path) -> None:
    hypervisor, slave = os.openpty()
    os.fchmod(slave, 0o666)
    waiting = asyncio.create_task(PtyConsole.found(state / "tty", state / "console.log"))
    await asyncio.sleep(0)
    (state / "tty").symlink_to(os.ttyname(slave))
    console = await waiting
    assert stat.S_IMODE(os.fstat(slave).st_mode) == 0o600
    await console.close()
    os.close(slave)
    os.close(hypervisor)
    with pytest.raises(HostError, match="has not made"):
        await PtyConsole.found(state / "tty", state / "console.log", limit_s=0.01)


def test_what_is_no_console_is_an_error_that_says_so(state: Path) -> None:
    with pytest.raises(HostError, match="does the machine run"):
        open_pty(state / "tty")
    (state / "tty").write_bytes(b"")
    with pytest.raises(HostError, match="is no terminal"):
        open_pty(state / "tty")


async def test_a_pty_that_is_none_is_refused(state: Path) -> None:
    with pytest.raises(HostError, match="/dev/null is no terminal"):
        PtyConsole.linked(state / "tty", state / "console.log", Path("/dev/null"))
    assert not (state / "tty").is_symlink()


async def test_screen_types_to_the_machine_and_shows_what_it_says(state: Path) -> None:
    if shutil.which("screen") is None:
        pytest.skip("screen is not installed")
    env = {**os.environ, "SCREENDIR": str(state / "screens"), "TERM": "xterm", "LC_ALL": "C"}
    (state / "screens").mkdir(mode=0o700)
    (state / "rc").write_text("")

    async def screen(*argv: str) -> None:
        process = await asyncio.create_subprocess_exec("screen", "-c", str(state / "rc"), "-S", "vm", *argv, env=env)
        assert await asyncio.wait_for(process.wait(), LIMIT_S) == 0

    async with stdio(state) as (shim, machine):
        await screen("-d", "-m", str(shim.path))
        await until(lambda: bool(holders(shim.path)))
        try:
            await screen("-X", "stuff", "root^M")
            assert await machine.heard(5) == b"root\r"
            await machine.say(b"Welcome to the machine\r\n")
            shown = state / "shown"
            async with asyncio.timeout(LIMIT_S):
                while "Welcome to the machine" not in (shown.read_text() if shown.exists() else ""):
                    await screen("-X", "hardcopy", str(shown))
                    await asyncio.sleep(0.05)
        finally:
            await screen("-X", "quit")


async def test_a_machine_that_is_a_process_talks_through_it(state: Path) -> None:
    shim, ends = PtyShim.over_pipes(state / "tty", state / "console.log")
    with ends:
        process = await asyncio.create_subprocess_exec("cat", stdin=ends.stdin, stdout=ends.stdout)
    person = Person(shim.path)
    os.write(person.fd, b"echoed")
    assert await person.sees(6) == b"echoed"
    process.kill()
    await process.wait()
    await asyncio.wait_for(shim.ended(), LIMIT_S)
    person.close()
    await shim.close()
