"""The supervisor as a process: one for each machine, and nothing left of it however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import ConfigError, HostError
from tests.support.vm_house import FAST, nothing_left, short_directory, write
from vm.api import StateDir
from vm.hypervisors.process import Record, started
from vm.supervisor.home import Home, find, mac_of

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0
ALONE = "network: none\n" + FAST


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as made:
        yield made


class Process:
    """`python -m vm.supervisor` for one machine."""

    def __init__(self, directory: Path, file: Path, *, unread: bool = False) -> None:
        self.home = Home(directory / "s")
        reading, writing = os.pipe()
        if unread:
            os.set_blocking(writing, False)
            with contextlib.suppress(BlockingIOError):
                while os.write(writing, bytes(4096)):
                    pass
            os.set_blocking(writing, True)
        self.child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vm.supervisor",
                str(file),
                "--state-dir",
                str(self.home.path),
                "--report-fd",
                str(writing),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            pass_fds=(writing,),
            start_new_session=True,
        )
        os.close(writing)
        self._report = open(reading, "rb")

    def report(self) -> list[dict[str, Any]]:
        """What it says until it is ready, or will not be."""
        return [json.loads(line) for line in self._report]

    def wait(self) -> tuple[int, str]:
        said = self.child.communicate(timeout=LIMIT_S)[1].decode()
        return self.child.returncode, said

    def pids(self) -> list[int]:
        """Of everything that runs for the machine."""
        records = [Record.read(path) for path in (self.home.path / "run").iterdir()]
        return [record.pid for record in records if record is not None]

    def close(self) -> None:
        self._report.close()
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        assert self.child.stderr is not None
        self.child.stderr.close()


@pytest.fixture
def supervisor(directory: Path) -> Iterator[Callable[..., Process]]:
    made: list[Process] = []

    def start(text: str = ALONE, *words: str, unread: bool = False) -> Process:
        made.append(Process(directory, write(directory, text, *words), unread=unread))
        return made[-1]

    yield start
    for one in made:
        one.close()
    until(lambda: not any(started(pid) for one in made for pid in one.pids()))


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_it_says_how_it_goes_until_it_is_ready_and_then_no_more(supervisor: Callable[..., Process]) -> None:
    one = supervisor()
    states = [entry["state"] for entry in one.report() if "state" in entry]
    assert states == ["sidecars", "created", "running", "ready"]
    one.child.send_signal(signal.SIGTERM)
    assert one.wait() == (0, "")
    assert nothing_left(one.home) == []
    assert one.home.read("result")["state"] == "stopped"


def test_a_parent_that_is_stopped_holds_up_neither_the_machine_nor_its_end(
    supervisor: Callable[..., Process],
) -> None:
    one = supervisor(unread=True)
    until(lambda: one.home.exists and " ready" in one.home.state.log("supervisor").read_text())
    one.child.send_signal(signal.SIGTERM)
    assert one.wait() == (0, "")
    assert nothing_left(one.home) == []


def test_a_second_one_is_refused_while_the_first_runs(supervisor: Callable[..., Process]) -> None:
    first = supervisor()
    first.report()
    second = supervisor()
    said = second.report()
    assert second.wait()[0] == 1
    assert said == [
        {
            "kind": "error",
            "text": f"it is up already (supervisor {first.child.pid}); `pyvpnkit vm down` stops it",
            "status": 1,
        }
    ]
    assert first.home.holder() == first.child.pid
    assert all(map(started, first.pids()))


def test_a_file_that_is_wrong_is_said_with_all_its_mistakes(supervisor: Callable[..., Process]) -> None:
    one = supervisor("cpus: 0\nmemory: x\n")
    (error,) = one.report()
    assert error["status"] == 2
    assert len(error["text"].splitlines()) == 2
    assert one.wait()[0] == 2


def test_a_state_directory_that_cannot_be_written_to_is_said(
    supervisor: Callable[..., Process], directory: Path
) -> None:
    (directory / "s" / "lock").mkdir(parents=True)
    one = supervisor()
    assert one.report() == [{"kind": "error", "text": f"{directory}/s/lock: Is a directory", "status": 1}]
    assert one.wait()[0] == 1


def test_a_second_signal_does_not_wait_for_the_guest(supervisor: Callable[..., Process]) -> None:
    one = supervisor(ALONE, "powerdown=ignore")
    one.report()
    one.child.send_signal(signal.SIGTERM)
    until(lambda: "asked to power down" in one.home.state.log("supervisor").read_text())
    one.child.send_signal(signal.SIGTERM)
    assert one.wait()[0] == 0
    assert nothing_left(one.home) == []


def test_of_a_supervisor_that_is_killed_no_process_is_left_and_the_next_finds_the_rest(
    supervisor: Callable[..., Process],
) -> None:
    text = "network: {kind: vhost-user}\nready: none\ndocker_socket: docker.sock\npublish: ['0:80']\n" + FAST
    first = supervisor(text, "serve=2376:docker")
    first.report()
    pids = first.pids()
    assert len(pids) == 2  # the network and the hypervisor
    first.child.kill()
    first.wait()
    until(lambda: not any(map(started, pids)))
    assert first.home.read("result")["reason"] == "the supervisor was killed"
    assert nothing_left(first.home)  # sockets, which nobody serves
    second = supervisor(text, "serve=2376:docker")
    assert [entry["state"] for entry in second.report() if "state" in entry][-1] == "ready"
    second.child.send_signal(signal.SIGTERM)
    assert second.wait() == (0, "")
    assert nothing_left(second.home) == []


def test_a_supervisor_whose_parent_went_away_goes_on(supervisor: Callable[..., Process]) -> None:
    one = supervisor(ALONE + "ready: vsock:1024\n", "serve=1024:hold", "boot=0.5")
    one._report.close()
    until(
        lambda: (
            one.home.state.log("supervisor").exists() and "INFO ready" in one.home.state.log("supervisor").read_text()
        )
    )
    one.child.send_signal(signal.SIGTERM)
    assert one.wait() == (0, "")


# The directory itself.


def test_only_processes_that_are_still_those_that_were_recorded_are_ended(directory: Path) -> None:
    home = Home(directory)
    home.prepare()
    with (
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as ours,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"]) as strangers,
    ):
        home.record("ours", ours.pid)
        # Of a number that was somebody else's then.
        Record(strangers.pid, "another-boot-1").write(directory / "run" / "strangers.pid")
        # A child of ours is a zombie until it is waited for, which counts as gone.
        assert home.reclaim() == ["ours"]
        assert ours.wait(LIMIT_S) == -signal.SIGTERM
        assert strangers.poll() is None
        strangers.kill()
    assert nothing_left(home) == []


def test_who_does_not_end_is_killed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vm.supervisor.home.REAP_S", 0.2)
    home = Home(directory)
    home.prepare()
    script = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(1000)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        home.record("stubborn", child.pid)
        assert home.reclaim() == ["stubborn"]
        assert child.wait(LIMIT_S) == -signal.SIGKILL


def test_who_cannot_be_killed_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REAP_S", "KILL_S"):
        monkeypatch.setattr(f"vm.supervisor.home.{name}", 0.1)
    monkeypatch.setattr(Record, "signal", lambda self, number: True)
    home = Home(directory)
    home.prepare()
    home.record("immortal", os.getpid())
    with pytest.raises(HostError, match=f"does not end \\(process {os.getpid()}\\)"):
        home.reclaim()


def test_a_supervisor_has_descriptors_for_its_clients(supervisor: Callable[..., Process]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        one = supervisor()
        one.report()
        assert resource.prlimit(one.child.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    one.child.terminate()
    assert one.wait() == (0, "")


def test_files_of_a_person_are_left_where_they_are(directory: Path) -> None:
    home = Home(directory)
    home.prepare()
    (directory / "net.sock").write_text("mine")
    (directory / "tty").symlink_to("/dev/null")
    home.sweep()
    assert (directory / "net.sock").read_text() == "mine"
    assert not (directory / "tty").is_symlink()


def test_a_machine_has_the_same_identity_each_time(directory: Path) -> None:
    home = Home(directory)
    home.prepare()
    before = home.identity()
    home.keep(before)
    assert Home(directory).identity() == before
    assert int(before.mac[:2], 16) & 3 == 2  # local, and for one card alone
    assert before.mac == mac_of(before.uuid)
    (directory / "identity.json").write_text("{broken")
    assert home.identity() == before


def test_a_directory_that_is_a_link_is_refused(directory: Path) -> None:
    (directory / "s").symlink_to("/tmp")
    with pytest.raises(ConfigError, match="not this user's"):
        Home(directory / "s").prepare()


def test_a_directory_of_somebody_elses_things_is_refused_and_left_as_it_is(directory: Path) -> None:
    directory.chmod(0o755)
    (directory / "link").symlink_to("/tmp")
    with pytest.raises(ConfigError, match="has other things in it, such as 'link'"):
        Home(directory).prepare()
    assert directory.stat().st_mode & 0o777 == 0o755 and os.listdir(directory) == ["link"]


def test_a_path_that_is_too_long_for_sockets_is_said_at_once() -> None:
    with pytest.raises(ConfigError, match="--state-dir"):
        _ = StateDir(Path("/" + "x" * 100)).control


def test_a_lock_is_held_by_one(directory: Path) -> None:
    home = Home(directory)
    home.prepare()
    assert home.holder() == 0
    held = home.lock()
    assert held is not None
    assert home.lock() is None
    assert home.holder() == os.getpid()
    held.close()
    held.close()
    assert home.holder() == 0


def test_a_machine_is_found_by_its_file_and_by_its_name(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(directory))
    home, file = find("./a.yml", None, lambda path: path.stem)
    assert home.path == directory / "pyvpnkit" / "vm" / "a"
    home.prepare()
    home.write("machine", {"name": "a", "file": str(file)})
    assert find("a", None, lambda path: path.stem)[1] == file
    assert find("a", directory / "other", lambda path: path.stem)[0].path == directory / "other"
