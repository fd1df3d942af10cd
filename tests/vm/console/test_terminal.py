"""A person at the console: what reaches the machine, what is shown, and what becomes of the terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tty
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from netstack.errors import HostError
from vm.terminal import Left, interact

LIMIT_S = 30.0
RUN = """\
import sys
from pathlib import Path
from vm.terminal import interact
print(interact(Path(sys.argv[1]), log=Path(sys.argv[2]), lines=2, quiet_s=0.3).name, file=sys.stderr)
"""


@dataclass
class Console:
    path: Path
    log: Path
    machine: int

    def heard(self, octets: int) -> bytes:
        found = b""
        deadline = time.monotonic() + LIMIT_S
        while len(found) < octets and time.monotonic() < deadline:
            try:
                found += os.read(self.machine, 65536)
            except OSError:  # nobody has it open yet
                time.sleep(0.005)
        return found


def until(fd: int, enough: object) -> bytes:
    """What `fd` says until `enough` of it, or its end."""
    found = b""
    deadline = time.monotonic() + LIMIT_S
    while not enough(found):  # type: ignore[operator]
        assert select.select([fd], [], [], deadline - time.monotonic())[0], f"only {found!r} came"
        try:
            more = os.read(fd, 65536)
        except OSError:  # a terminal whose other end is closed
            more = b""
        if not more:
            break
        found += more
    return found


@pytest.fixture
def console() -> Iterator[Console]:
    with tempfile.TemporaryDirectory(prefix="con") as name:
        machine, slave = os.openpty()
        tty.setraw(slave)
        path = Path(name) / "tty"
        path.symlink_to(os.ttyname(slave))
        made = Console(path, Path(name) / "console.log", machine)
        made.log.write_bytes(b"one\ntwo\nlogin: ")
        os.close(slave)  # it stays raw
        yield made
        with contextlib.suppress(OSError):
            os.close(machine)


class Person:
    """At a terminal of their own, in which `interact` runs."""

    def __init__(self, console: Console) -> None:
        self.screen, self.slave = os.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [sys.executable, "-c", RUN, console.path, console.log],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
        )

    def sees(self, text: bytes) -> bytes:
        return until(self.screen, lambda found: text in found)

    def presses(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def leaves(self) -> int:
        status = self.process.wait(LIMIT_S)
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.slave)
        os.close(self.screen)
        return status


def test_keys_reach_the_machine_as_they_are_and_the_one_to_leave_leaves(console: Console) -> None:
    person = Person(console)
    shown = person.sees(b"login: ")
    assert b"press Ctrl-] to leave" in shown
    assert b"leave\r\ntwo\nlogin: " in shown  # of three lines the last two were wanted
    assert not termios.tcgetattr(person.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)
    person.presses(b"root\r\x03\x1a")
    assert console.heard(7) == b"root\r\x03\x1a"
    os.write(console.machine, b"\x1b[1mWelcome\x1b[0m\r\n")
    person.sees(b"\x1b[1mWelcome\x1b[0m\r\n")
    person.presses(b"\x1d")
    person.sees(b"ESCAPE")
    assert person.leaves() == 0


def test_a_machine_that_takes_no_key_can_be_left(console: Console) -> None:
    person = Person(console)
    person.sees(b"login: ")
    for _ in range(32):  # more than a pty holds
        person.presses(b"k" * 1024)
    person.presses(b"\x1d")
    person.sees(b"ESCAPE")
    assert person.leaves() == 0


def test_the_end_of_the_machine_is_the_end_of_it(console: Console) -> None:
    person = Person(console)
    person.sees(b"login: ")
    os.close(console.machine)
    assert b"the machine's console has ended" in person.sees(b"CONSOLE_ENDED")
    assert person.leaves() == 0


def test_a_terminals_answer_to_a_machine_that_has_gone_is_not_typed_into_the_shell(console: Console) -> None:
    person = Person(console)
    person.sees(b"login: ")
    person.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, person.process.pid, os.WSTOPPED | os.WNOWAIT)
    os.close(console.machine)
    person.presses(b"\x1b]lsomething evil\n")
    person.process.send_signal(signal.SIGCONT)
    person.sees(b"CONSOLE_ENDED")
    person.process.wait(LIMIT_S)
    assert fcntl.ioctl(person.slave, termios.FIONREAD, bytes(4)) == bytes(4)
    assert person.leaves() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_the_terminal_as_it_was(console: Console, number: signal.Signals) -> None:
    person = Person(console)
    person.sees(b"login: ")
    person.process.send_signal(number)
    assert person.leaves() == -number


def test_a_second_person_is_told_of_the_first(console: Console) -> None:
    first = Person(console)
    first.sees(b"login: ")
    second = Person(console)
    assert f"(pid {first.process.pid})" in second.sees(b"login: ").decode()
    for person in (second, first):
        person.presses(b"\x1d")
        assert person.leaves() == 0


def test_a_script_says_something_and_reads_what_comes_back(console: Console) -> None:
    script = subprocess.Popen(
        [sys.executable, "-c", RUN, console.path, console.log],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert script.stdin is not None
    script.stdin.write(b"poweroff\n\x1d")  # without a terminal no key is special
    script.stdin.close()
    script.stdin = None
    assert console.heard(10) == b"poweroff\n\x1d"
    os.write(console.machine, b"reboot: Power down\r\n")
    said, complained = script.communicate(timeout=LIMIT_S)
    assert said == b"two\nlogin: reboot: Power down\r\n"
    assert complained == b"INPUT_ENDED\n"


def test_much_input_of_a_script_arrives_whole(console: Console) -> None:
    sent = os.urandom(100_000)
    into, out = os.pipe()
    heard: list[bytes] = []
    machine = threading.Thread(target=lambda: heard.append(console.heard(len(sent))))
    writer = threading.Thread(target=lambda: (os.write(out, sent), os.close(out)))
    machine.start()
    writer.start()
    with open(os.devnull, "wb") as nothing:
        assert interact(console.path, stdin=into, stdout=nothing.fileno(), quiet_s=0.01) is Left.INPUT_ENDED
    machine.join(LIMIT_S)
    writer.join(LIMIT_S)
    os.close(into)
    assert heard == [sent]


def test_no_console_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="there is no console; does the machine run"):
        interact(tmp_path / "tty")
