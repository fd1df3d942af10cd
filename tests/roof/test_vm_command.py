"""`pyvpnkit vm ...` as a person types it, over the fake hypervisor."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvpnkit.commands import vm_look
from tests.roof.commands.conftest import Done
from tests.support import golden
from tests.support.vm_house import nothing_left, short_directory
from vm.hypervisors.process import started
from vm.supervisor.home import Home

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
LIMIT_S = 60.0


class Shell:
    """A person in a directory, with machines of their own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "XDG_STATE_HOME": str(directory / "s"),
            "COLUMNS": "200",
            "TERM": "dumb",
        }
        (directory / "kernel").touch()

    def words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "pyvpnkit", "vm", *words]

    def __call__(self, *words: str, say: str = "") -> Done:
        done = subprocess.run(
            self.words(*words),
            cwd=self.directory,
            env=self.environment,
            input=say,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def start(self, *words: str, **more: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.words(*words),
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **more,
        )

    def write(self, text: str, name: str = "box", *behaviour: str) -> Path:
        file = self.directory / f"{name}.yml"
        extra = json.dumps(list(behaviour))
        file.write_text(f"hypervisor: {{driver: fake, extra: {extra}}}\nboot: {{kernel: kernel}}\n{text}")
        return file

    def home(self, name: str = "box") -> Home:
        return Home(self.directory / "s" / "pyvpnkit" / "vm" / name)


@pytest.fixture
def shell() -> Iterator[Shell]:
    with short_directory() as directory:
        made = Shell(directory)
        yield made
        for path in (directory / "s" / "pyvpnkit" / "vm").glob("*/machine.json"):
            made("down", "--kill", path.parent.name)
            assert nothing_left(Home(path.parent)) == []


ALONE = "network: none\nrestart: {backoff: 0.05}\n"


def until(true: Any) -> None:
    end = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_up_status_down(shell: Shell) -> None:
    shell.write(ALONE + "docker_socket: docker.sock\n", "box", "serve=2376:docker")
    up = shell("up", "box.yml")
    assert (up.status, up.err) == (0, "")
    assert re.search(r"^ +\d+\.\d  box is ready after \d+\.\d s$", up.out, re.MULTILINE)
    assert f"screen {shell.home().state.console}" in up.out
    assert f"DOCKER_HOST=unix://{shell.home().state.docker}" in up.out
    status = shell("status", "box")
    assert status.status == 0
    assert re.search(r"^state +ready for ", status.out, re.MULTILINE)
    found = json.loads(shell("status", "--json", "box.yml").out)
    assert (found["state"], found["driver"]) == ("ready", "fake")
    down = shell("down", "box")
    assert (down.status, down.err) == (0, "")
    assert "box is down after" in down.out
    after = shell("status", "box")
    assert after.status == 1
    assert re.search(r"^state +stopped for .*: asked to go down$", after.out, re.MULTILINE)
    assert nothing_left(shell.home()) == []
    assert shell("down", "box").out == "box is not up\n"


def test_up_by_its_name_a_second_time(shell: Shell) -> None:
    shell.write(ALONE)
    assert shell("up", "box.yml").status == 0
    again = shell("up", "box")
    assert again.status == 1
    assert "it is up already (" in again.err
    (shell.directory / "of another.yml").write_text("name: box\n" + (shell.directory / "box.yml").read_text())
    other = shell("up", "of another.yml")
    assert other.status == 1
    assert f"it is up already, as {shell.directory}/box.yml says (" in other.err
    assert "give this one another `name`" in other.err
    shell("down", "box")
    assert shell("up", "box").status == 0


def test_a_machine_that_fails_says_why_with_the_last_of_its_log(shell: Shell) -> None:
    shell.write(ALONE + "ready: {probe: 'console:never said', limit: 0.5}\n")
    up = shell("up", "box.yml")
    assert up.status == 1
    assert "box failed: not ready within 0.5 s (ready: console:never said)" in up.err
    assert "box boots" in up.out
    assert shell("status", "box").status == 1
    shell.write(ALONE, "box", "start=fails")
    again = shell("up", "box.yml")
    assert again.status == 1
    assert "box boots" not in again.out  # that was the one before


def test_a_file_that_is_wrong_starts_nothing(shell: Shell) -> None:
    shell.write("network: vhost-user\ncpus: 0\npublish: ['8080:x']\n")
    up = shell("up", "box.yml")
    assert up.status == 2
    lines = up.err.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["box.yml:4:7", "box.yml:5:11"], up.err
    assert not shell.home().path.exists()


@pytest.mark.parametrize("words", [["status", "n" * 300], ["up", "box.yml", "--state-dir", "n" * 300]])
def test_a_name_that_no_file_could_have_is_said(shell: Shell, words: list[str]) -> None:
    shell.write("")
    done = shell(*words)
    assert done.status == 2
    assert done.err.startswith(("pyvpnkit: there is no machine", "pyvpnkit: state directory: ")), done.err


def test_root_links_the_docker_sock_of_a_users_machine(shell: Shell) -> None:
    shell.write(ALONE + "docker_socket: docker.sock\n", "box", "serve=2376:docker")
    shell("up", "box.yml")
    at = shell.directory / "run.sock"
    words = ("link-docker-sock", "box", "--state-dir", str(shell.home().path), "--path", str(at))
    mine, shell.environment = shell.environment, {**shell.environment, "XDG_STATE_HOME": str(shell.directory / "roots")}
    done = shell(*words)
    shell.environment = mine
    assert (done.status, done.err) == (0, "")
    assert at.readlink() == shell.directory / "s" / "pyvpnkit" / "vm" / "box" / "docker.sock"


def test_a_reader_may_have_had_enough(shell: Shell) -> None:
    shell.write("")
    with shell.start("plan", "box.yml") as plan:
        assert plan.stdout is not None
        plan.stdout.close()  # long before it begins
        assert plan.wait(LIMIT_S) == 128 + signal.SIGPIPE


def test_what_a_hypervisor_cannot_do_is_said_with_those_that_could(shell: Shell) -> None:
    shell.write("network: vmnet\n")
    plan = shell("plan", "box.yml", "--hypervisor", "firecracker")
    assert plan.status == 2
    assert "firecracker" in plan.err
    assert "hyperkit could" in plan.err


@pytest.mark.parametrize("driver", ["fake", "qemu", "hyperkit", "vfkit", "cloud-hypervisor", "firecracker", "crosvm"])
def test_plan_is_the_same_word_for_word_and_starts_nothing(shell: Shell, driver: str) -> None:
    text = "vsock: {ports: {docker: 2376, control: 4098}}\npublish: ['8080:80']\n"
    text += "network: {uuid: 6f2b8a5e-0d0c-5c55-9d44-4f6d2b6f0a11, mac: 5a:94:ef:e4:0c:ee}\n"
    # Whether there is a KVM is this host's matter.
    accel = "hypervisor: {accel: tcg}\n" if driver == "qemu" else ""
    shell.write(text).write_text(f"name: box\nboot: {{kernel: kernel}}\n{accel}{text}")
    plan = shell("plan", "box.yml", "--hypervisor", driver, "--state-dir", "/run/box")
    assert plan.status == 0, plan.err
    told = plan.out.replace(str(shell.directory), "DIRECTORY").replace(sys.executable, "PYTHON")
    golden.check(GOLDEN / f"vm-plan-{driver}.txt", told)
    found = json.loads(shell("plan", "box.yml", "--hypervisor", driver, "--state-dir", "/run/box", "--json").out)
    assert found["driver"] == driver
    assert found["argv"]
    assert not (shell.directory / "s").exists()


DRIVERS = ["qemu", "hyperkit", "vfkit", "cloud-hypervisor", "firecracker", "crosvm"]


@pytest.mark.parametrize("driver", DRIVERS)
def test_the_example_can_be_planned_for_every_hypervisor(shell: Shell, driver: str) -> None:
    plan = shell("plan", "--hypervisor", driver, str(ROOT / "examples" / "tiny.yml"), "--json")
    assert plan.status == 0, plan.err
    found = json.loads(plan.out)
    assert found["driver"] == driver
    assert "/var/share" in found["mounts"][0]
    assert found["publish"] == ["8080:80"]
    devices = [word for word in found["argv"] if word.startswith("virtio-vsock,")]
    assert len(set(devices)) == len(devices)


def test_console_logs_events_and_list(shell: Shell) -> None:
    shell.write(ALONE)
    shell("up", "box.yml")
    typed = shell("console", "box", say="hello\n")
    assert typed.status == 0
    assert "echo: hello" in typed.out
    assert "echo: hello" in shell("logs", "box").out
    assert "ready" in shell("logs", "box", "supervisor").out
    assert shell("logs", "box", "hypervisor").status == 0
    wrong = shell("logs", "box", "nothing")
    assert wrong.status == 2
    assert "there are: console, " in wrong.err
    listed = shell("list")
    assert listed.out.splitlines()[1].split() == ["box", "ready", str(shell.directory / "box.yml")]
    assert [one["name"] for one in json.loads(shell("list", "--json").out)] == ["box"]
    with shell.start("events", "box") as events:
        assert events.stdout is not None
        first = events.stdout.readline()
        assert first.endswith("  sidecars\n"), first
        shell("down", "box")
        said = events.communicate(timeout=LIMIT_S)[0]
    assert "stopped: asked to go down" in said
    gone = shell("console", "box")
    assert gone.status == 1
    assert "has no console now" in gone.err


def test_logs_follow_what_comes(shell: Shell) -> None:
    shell.write(ALONE)
    shell("up", "box.yml")
    with shell.start("logs", "box", "-f", "-n", "0") as following:
        assert following.stdout is not None
        time.sleep(1.0)  # it must be past what is there; a line that comes too early is not shown, and the test fails
        shell("console", "box", say="later\n")
        line = ""
        while "echo: later" not in line:
            line = following.stdout.readline()
            assert line, "it has ended"
        following.send_signal(signal.SIGINT)
        assert following.wait(LIMIT_S) == 0


def test_a_line_that_never_ends_is_shown_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "console.log"
    log.touch()

    def sleep(_seconds: float) -> None:
        if log.stat().st_size:
            raise KeyboardInterrupt
        log.write_bytes(b"x" * 300_000)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        vm_look._follow(log)
    lines = capsys.readouterr().out.splitlines()
    assert 200_000 < sum(map(len, lines)) and max(map(len, lines)) < 140_000


def test_pause_resume_restart(shell: Shell) -> None:
    shell.write(ALONE)
    refused = shell("pause", "box.yml")
    assert refused.status == 1
    assert "box is not up" in refused.err
    shell("up", "box.yml")
    first = json.loads(shell("status", "--json", "box").out)["pid"]
    assert shell("pause", "box").out == "box is paused\n"
    assert "(paused)" in shell("status", "box").out
    assert shell("resume", "box").out == "box goes on\n"
    restart = shell("restart", "box")
    assert (restart.status, restart.out) == (0, "box is ready\n")
    assert json.loads(shell("status", "--json", "box").out)["pid"] != first


def test_no_wait_returns_while_it_starts(shell: Shell) -> None:
    shell.write(ALONE + "ready: 'console:never said'\n")
    up = shell("up", "--no-wait", "box.yml")
    assert up.status == 0
    assert "box is starting" in up.out
    assert shell("down", "box").status == 0


def test_ctrl_c_leaves_it_to_start_in_the_background(shell: Shell) -> None:
    shell.write(ALONE + "ready: 'console:never said'\n")
    with shell.start("up", "box.yml") as up:
        assert up.stdout is not None
        while "waiting until it is ready" not in up.stdout.readline():
            pass
        up.send_signal(signal.SIGINT)
        assert "it goes on in the background" in up.communicate(timeout=LIMIT_S)[0]
        assert up.returncode == 130
    assert shell("status", "box").status == 0
    assert shell("down", "box").status == 0


def test_in_the_foreground_ctrl_c_takes_it_down(shell: Shell) -> None:
    shell.write(ALONE)
    with shell.start("up", "--foreground", "box.yml") as up:
        assert up.stdout is not None
        while not up.stdout.readline().endswith("INFO ready\n"):
            pass
        up.send_signal(signal.SIGINT)
        said = up.communicate(timeout=LIMIT_S)[0]
        assert up.returncode == 0
    assert said.endswith("INFO stopped: asked to go down\n")
    assert nothing_left(shell.home()) == []


def test_down_kills_when_its_limit_is_over(shell: Shell) -> None:
    shell.write(ALONE, "box", "powerdown=ignore")
    shell("up", "box.yml")
    assert shell("down", "box", "--limit", "0.3").status == 0
    assert "killing the machine" in shell("logs", "box", "supervisor").out


def test_what_a_killed_supervisor_left_is_removed_by_down(shell: Shell) -> None:
    shell.write(ALONE + "docker_socket: docker.sock\n", "box", "serve=2376:docker")
    shell("up", "box.yml")
    os.kill(shell.home().holder(), signal.SIGKILL)
    until(lambda: not shell.home().holder())
    status = shell("status", "box")
    assert status.status == 1
    assert "the supervisor was killed" in status.out
    assert nothing_left(shell.home())
    assert shell("down", "box").status == 0
    assert nothing_left(shell.home()) == []


def test_a_machine_is_forgotten_when_it_is_down(shell: Shell) -> None:
    file = shell.write(ALONE)
    shell("up", "box.yml")
    home = shell.home()
    refused = shell("rm", "box")
    assert (refused.status, refused.err) == (1, "pyvpnkit: box is up; take it down first: pyvpnkit vm down box\n")
    assert shell("status", "box").status == 0
    shell("down", "box")
    (home.path / "disk.json").touch()
    kept = shell("rm", "box")
    assert kept.status == 1
    assert "disk.json" in kept.out
    assert os.listdir(home.path) == ["disk.json"]
    assert shell("rm", "box").status == 2  # there is none now
    assert shell("up", "box.yml").status == 2  # not into a directory with other things in it
    (home.path / "disk.json").unlink()
    assert shell("up", "box.yml").status == 0
    assert shell("down", "box").status == 0
    gone = shell("rm", "box.yml")
    assert (gone.status, gone.out) == (0, "box is removed; its file and its disks stay\n")
    assert not home.path.exists()
    assert file.exists()
    assert json.loads(shell("list", "--json").out) == []


def test_a_machine_whose_supervisor_was_killed_can_be_forgotten(shell: Shell) -> None:
    shell.write(ALONE)
    shell("up", "box.yml")
    os.kill(shell.home().holder(), signal.SIGKILL)
    until(lambda: not shell.home().holder())
    assert shell("rm", "box").status == 0
    assert not shell.home().path.exists()


def test_which_machine_is_asked_when_it_is_not_clear(shell: Shell) -> None:
    nothing = shell("status")
    assert nothing.status == 2
    assert "which machine?" in nothing.err
    unknown = shell("status", "tinny")
    assert unknown.status == 2
    assert "there is no machine 'tinny'; there are: none" in unknown.err
    shell.write(ALONE)
    shell("up", "box.yml")
    assert "box" in shell("status").out  # the only one there is
    shell.write(ALONE, "vm")
    assert shell("status", "--json").status == 1  # ./vm.yml goes first


def test_link_docker_sock_replaces_nothing_that_lives(shell: Shell) -> None:
    shell.write(ALONE + "docker_socket: docker.sock\n", "box", "serve=2376:docker")
    link = shell.directory / "docker.sock"
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(link))
        foreign.listen()
        refused = shell("link-docker-sock", "box.yml", "--path", str(link))
        assert refused.status == 2
        assert "another program serves there" in refused.err
    done = shell("link-docker-sock", "box.yml", "--path", str(link))
    assert done.status == 0, done.err
    assert link.readlink() == shell.home().state.docker


def test_a_file_without_docker_has_no_socket_to_link(shell: Shell) -> None:
    shell.write(ALONE)
    refused = shell("link-docker-sock", "box.yml", "--path", str(shell.directory / "x"))
    assert refused.status == 2
    assert "docker_socket" in refused.err


def test_build_wants_something_to_build(shell: Shell) -> None:
    shell.write(ALONE)
    refused = shell("build", "box.yml")
    assert refused.status == 2
    assert "names no linuxkit file" in refused.err


def test_on_a_terminal_the_progress_turns_and_stays(shell: Shell) -> None:
    shell.write(ALONE)
    shell.environment["TERM"] = "xterm"
    master, slave = pty.openpty()
    with subprocess.Popen(
        shell.words("up", "box.yml"),
        cwd=shell.directory,
        env=shell.environment,
        stdout=slave,
        stderr=slave,
        stdin=slave,
    ) as up:
        os.close(slave)
        said = b""
        while select.select([master], [], [], LIMIT_S)[0]:
            try:
                said += os.read(master, 4096)
            except OSError:  # EIO: all have closed it
                break
        assert up.wait(LIMIT_S) == 0
    os.close(master)
    assert b"box is ready after" in said
    assert b"\x1b[" in said


def test_when_down_returns_not_even_the_supervisor_is_left(shell: Shell) -> None:
    shell.write(ALONE)
    for _ in range(3):
        shell("up", "box.yml")
        supervisor = shell.home().holder()
        shell("down", "box")
        assert started(supervisor) is None
