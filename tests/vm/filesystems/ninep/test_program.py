"""The server as a program: its command line, its socket, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ninep_client import Client
from vm.filesystems.ninep.__main__ import main

ROOT = Path(__file__).parents[4]
PATIENCE_S = 30


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's."""
    with tempfile.TemporaryDirectory(prefix="9p") as made:
        yield Path(made)


class Program:
    """Ready when it is made."""

    def __init__(self, *words: str) -> None:
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vm.filesystems.ninep", *words, "--ready-fd", str(writing)],
            cwd=ROOT,
            pass_fds=[writing],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        os.close(writing)
        with open(reading, "rb") as ready:
            assert ready.read() == b"\n"

    def end(self, number: int | None) -> str:
        """By a signal, or by the end of its standard input; what it said."""
        if number is not None:
            self.process.send_signal(number)
            said = self.process.communicate(timeout=PATIENCE_S)[1]
        else:
            said = self.process.communicate("", timeout=PATIENCE_S)[1]
        assert self.process.returncode == 0, said
        return said


def dial(path: Path) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return Client(sock)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, None], ids=["SIGTERM", "SIGINT", "end of input"])
def test_a_folder_is_served_until_the_end(short: Path, export: Path, number: int | None) -> None:
    path = short / "s"
    stdin = ["--end-with-stdin"] if number is None else []
    program = Program("--socket", str(path), "--export", str(export), "--owner", "squash:1:2", *stdin)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    client, other = dial(path), dial(path)
    client.store("file", b"data")
    assert other.load("file") == b"data" and other.stat("file").uid == 1
    program.process.send_signal(signal.SIGUSR1)
    assert program.process.stderr is not None
    counters = json.loads(program.process.stderr.readline())
    assert counters["connections"] == 2 and counters["owner"] == "squash:1:2"
    assert "Traceback" not in program.end(number)
    assert not path.exists()
    with pytest.raises((EOFError, OSError)):
        client.list()
    client.close()
    other.close()


def test_a_read_only_folder_on_a_descriptor(export: Path) -> None:
    (export / "file").write_bytes(b"data")
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vm.filesystems.ninep",
                "--serve-fd",
                str(fd),
                "--export",
                str(export),
                "--read-only",
            ],
            cwd=ROOT,
            pass_fds=[fd],
        )
    client = Client(ours)
    assert client.load("file") == b"data"
    with pytest.raises(OSError, match="Read-only"):
        client.create("new")
    client.close()
    assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        pytest.param(["--export", "/no/where"], "--export: /no/where: No such file", id="no folder"),
        pytest.param(
            ["--export", "/", "--owner", "me"], "--owner: 'me' is none; what is accepted: passthrough", id="no owner"
        ),
        pytest.param(
            ["--export", "/", "--owner", "passthrough", "--msize", "1"], "--msize: 1 octets; from 4096", id="msize"
        ),
    ],
)
def test_what_cannot_be_served_is_said(
    short: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str
) -> None:
    assert main(["--socket", str(short / "s"), *words]) == 1
    assert text in capsys.readouterr().err and not (short / "s").exists()


def test_a_socket_that_cannot_be_had(export: Path, short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (short / "file").touch()
    for path, text in ((short / "none" / "s", "does not exist"), (short / "file", "not a socket")):
        assert main(["--socket", str(path), "--export", str(export), "--owner", "passthrough"]) == 1
        assert f"--socket: {path}" in (said := capsys.readouterr().err) and text in said


@pytest.mark.parametrize("words", [[], ["--export", "/"], ["--socket", "s", "--serve-fd", "1", "--export", "/"]])
def test_command_lines_that_are_none(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage" in capsys.readouterr().err


def test_a_descriptor_that_is_no_socket(export: Path, tmp_path: Path) -> None:
    with open(tmp_path / "file", "w") as file:
        words = ["--serve-fd", str(file.fileno()), "--export", str(export), "--owner", "passthrough"]
        done = subprocess.run(
            [sys.executable, "-m", "vm.filesystems.ninep", *words],
            cwd=ROOT,
            pass_fds=[file.fileno()],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
    assert done.returncode == 1 and "must be a connected stream socket" in done.stderr
    assert "Traceback" not in done.stderr
