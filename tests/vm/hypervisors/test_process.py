"""What is started with us ends with us, is heard, and is never taken for another."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from netstack.errors import HostError
from vm.hypervisors import process
from vm.hypervisors.process import Record, spawn


async def until_gone(pid: int, limit_s: float = 20.0) -> None:
    async with asyncio.timeout(limit_s):
        while process.started(pid) is not None:  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.01)


def comm(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


async def test_it_becomes_the_program_with_the_same_pid(tmp_path: Path) -> None:
    made = await spawn(["sh", "-c", "echo $$ $0 $MORE"], {"MORE": "more"}, log=tmp_path / "log" / "it.log")
    assert await made.wait() == 0
    assert made.said() == f"{made.pid} sh more"
    assert made.log.read_text() == f"{made.pid} sh more\n"
    assert made.log.stat().st_mode & 0o777 == 0o600
    await made.close()


async def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no-such-program is not installed; apt install it"):
        await spawn(["no-such-program"], log=tmp_path / "log", install="apt install it")


async def test_what_cannot_be_executed_says_so(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF nothing")
    broken.chmod(0o700)
    made = await spawn([str(broken)], log=tmp_path / "log")
    assert await made.wait() == 127
    assert made.said() == f"{broken}: Exec format error"
    await made.close()


async def test_a_signal_is_a_negative_status(tmp_path: Path) -> None:
    made = await spawn(["sleep", "100"], log=tmp_path / "log")
    made.kill()
    assert await made.wait() == made.returncode == -signal.SIGKILL
    assert str(await process.ended(made)).startswith("sleep ended by SIGKILL; it said nothing")
    made.kill()  # nobody is hit
    await made.close()


async def test_pipes_and_descriptors_are_handed_on(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    made = await spawn(
        ["sh", "-c", f"read line; echo got $line; echo heard >&2; echo ready >/dev/fd/{writer}"],
        log=tmp_path / "log",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[writer],
    )
    os.close(writer)
    assert made.stdin is not None and made.stdout is not None
    made.stdin.write(b"a line\n")
    assert await made.stdout.readline() == b"got a line\n"
    assert await made.wait() == 0
    assert made.said() == "heard"
    with os.fdopen(reader, "rb") as ready:
        assert ready.read() == b"ready\n"
    await made.close()


async def test_the_log_has_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "MAX_LOG", 10_000)
    made = await spawn(["seq", "1", "20000"], log=tmp_path / "log")
    assert await made.wait() == 0
    older = tmp_path / "log.1"
    assert made.log.stat().st_size <= 10_000 and older.stat().st_size <= 10_000
    assert (older.read_bytes() + made.log.read_bytes()).endswith(b"19999\n20000\n")
    await made.close()


async def test_a_grandchild_that_keeps_talking_does_not_hold_us_up(tmp_path: Path) -> None:
    made = await spawn(["sh", "-c", "sleep 100 & echo $!"], log=tmp_path / "log")
    assert await made.wait() == 0
    await made.close()
    await until_gone(int(made.said()))


async def test_what_it_has_started_ends_with_it(tmp_path: Path) -> None:
    made = await spawn(["sh", "-c", "sleep 1000 & echo $!; wait"], log=tmp_path / "log")
    async with asyncio.timeout(20):
        while not made.said():  # noqa: ASYNC110  # it is said in another process
            await asyncio.sleep(0.01)
    await made.close()
    await until_gone(int(made.said()))


@pytest.mark.skipif(sys.platform != "linux", reason="expected: the kernel's rule is Linux's")
async def test_it_dies_with_its_parent_however_that_dies(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        textwrap.dedent(
            """
            import asyncio, pathlib, sys
            from vm.hypervisors.process import spawn

            async def main():
                made = await spawn(["sleep", "1000"], log=pathlib.Path(sys.argv[1]))
                print(made.pid, flush=True)
                await made.wait()

            asyncio.run(main())
            """
        ),
        str(tmp_path / "log"),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    async with asyncio.timeout(20):
        while comm(child) != "sleep":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    parent.kill()
    await parent.wait()
    await until_gone(child)


async def test_a_record_finds_its_process_and_no_other(tmp_path: Path) -> None:
    made = await spawn(["sleep", "100"], log=tmp_path / "log")
    found = Record.of(made.pid)
    assert found is not None
    found.write(tmp_path / "pid")
    assert (tmp_path / "pid").stat().st_mode & 0o777 == 0o600
    assert Record.read(tmp_path / "pid") == found
    assert found.runs()
    another = Record(made.pid, "another-time")
    assert not another.runs() and not another.signal(signal.SIGKILL)
    assert made.returncode is None
    assert found.signal(signal.SIGKILL)
    assert await made.wait() == -signal.SIGKILL
    assert not found.runs() and not found.signal(signal.SIGKILL)
    assert Record.of(made.pid) is None
    await made.close()


@pytest.mark.parametrize("text", ["", "12", "x y", "1 init", "-1 all", "12 a b", "\udcff"])
def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "pid").write_text(text, errors="surrogateescape")
    assert Record.read(tmp_path / "pid") is None
    assert Record.read(tmp_path / "absent") is None


async def test_waiting_for_what_it_is_to_do(tmp_path: Path) -> None:
    talks = await spawn(["sh", "-c", "echo no such device >&2; exit 3"], log=tmp_path / "talks.log")
    with pytest.raises(HostError, match=r"(?s)sh ended with status 3:\nno such device"):
        await process.until(lambda: False, talks, 20, "socket")
    sleeps = await spawn(["sleep", "100"], log=tmp_path / "sleeps.log")
    with pytest.raises(HostError, match="sleep: no socket within 0 s"):
        await process.until(lambda: False, sleeps, 0.05, "socket")
    await process.until(lambda: True, sleeps, 0, "socket")
    await talks.close()
    await sleeps.close()


async def test_modules_in_a_persons_directory_are_not_taken_for_ours(tmp_path: Path) -> None:
    for name in ("vm/__init__.py", "asyncio.py", "argparse.py"):
        path = tmp_path / "strange" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("import os\nos.write(2, b'stranger\\n')\n")
    made = await spawn([sys.executable, "-m", "vm.vsock", "--help"], log=tmp_path / "it.log", cwd=tmp_path / "strange")
    assert await made.wait() == 0
    assert "stranger" not in made.said() and "--vhost-user" in made.log.read_text()
    await made.close()
