"""The command line as people meet it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pyvpnkit import cli
from pyvpnkit.config import OPTIONS


def test_help_shows_what_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for expected in ("pyvpnkit shell", "--link qemu:", "check-config", "192.168.65.2", "-netdev stream"):
        assert expected in text


def test_help_of_run_explains_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for option in OPTIONS:
        assert option.flags[-1] in text, option.key
    assert "[16384]" in text and "127.0.0.1 alone" in text and "lowest leased address" in text


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        pytest.param([], "COMMAND", id="nothing"),
        pytest.param(["rnu"], "rnu", id="command"),
        pytest.param(["run", "--gatway-ip", "10.0.0.1"], "did you mean '--gateway-ip'?", id="flag"),
        pytest.param(["shell", "--pool-frist", "10.0.0.9"], "did you mean '--pool-first'?", id="flag of shell"),
        pytest.param(["run", "--mtu", "12", "-p", "x"], "--publish: publish: 'x'", id="two bad values"),
        pytest.param(["run", "--ready-fd", "x"], "--ready-fd", id="descriptor"),
        pytest.param(["check-config", "/nonexistent"], "No such file", id="no file"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text


def test_check_config_says_what_is_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vm.yaml"
    path.write_text("publish: [8080:80]\nntp: off\nnetwork:\n  host_alias: off\n")
    assert cli.main(["check-config", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: fine",
        "  publish: tcp:127.0.0.1:8080:80",
        "  ntp: off",
        "  network.host_alias: off",
    ]


def test_version_names_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert "Python 3." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        pytest.param(["shell"], [], id="a shell"),
        pytest.param(["shell", "--", "ls", "-la"], ["ls", "-la"], id="after two dashes"),
        pytest.param(["shell", "ls", "--mtu", "3"], ["ls", "--mtu", "3"], id="flags of the command stay its own"),
        pytest.param(
            ["shell", "--mtu", "9000", "-p", "1:1", "--", "sh", "-c", "exit 3"],
            ["sh", "-c", "exit 3"],
            id="ours before",
        ),
    ],
)
def test_shell_takes_a_command(argv: list[str], command: list[str]) -> None:
    arguments = cli.arguments(argv)
    assert arguments.command == command
    if "-p" in argv:
        assert cli.given(arguments) == {"network.mtu": ["9000"], "publish": ["1:1"]}


@pytest.mark.parametrize("command", ["shell", "demo", "check-config"])
def test_no_flag_of_another_command_is_suggested(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--usr", *(["file"] if command == "check-config" else [])]) == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --usr" in said and "--user" not in said
    assert f"usage: pyvpnkit {command}" in said


def test_a_reader_who_has_had_enough_is_no_mistake() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        words = [sys.executable, "-m", "pyvpnkit", "version"]
        done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
