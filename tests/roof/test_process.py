"""What a daemon does to its surroundings, where a whole daemon is not needed to see it."""

from __future__ import annotations

import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from netstack.errors import ConfigError
from pyvpnkit import process


def test_the_soft_descriptor_limit_becomes_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
        assert process.raise_descriptor_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["/path", "@abstract"])
def test_notification_reaches_path_and_abstract_sockets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = str(tmp_path / "notify") if name == "/path" else f"@pyvpnkit-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        try:
            manager.bind(address.replace("@", "\0", 1) if address.startswith("@") else address)
        except OSError:
            pytest.skip("expected: this system has no abstract sockets")
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert process.notify("READY=1", "STATUS=fine")
        assert manager.recv(100) == b"READY=1\nSTATUS=fine"


@pytest.mark.parametrize("value", ["", "relative", "/nonexistent/socket"])
def test_nobody_to_notify_is_no_error(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", value)
    assert process.notify("READY=1") is False


def test_ready_is_a_one_and_then_the_end(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process.say_ready(writer)
    assert os.read(reader, 10) == b"1"
    assert os.read(reader, 10) == b""
    os.close(reader)


class TestPidFile:
    def test_what_a_dead_process_left_is_taken_over(self, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        path.write_text("999999999\n")
        held = process.PidFile(str(path))
        assert path.read_text() == f"{os.getpid()}\n"
        held.close()
        assert not path.exists()

    def test_somebody_elses_new_file_is_left_alone(self, tmp_path: Path) -> None:
        path = tmp_path / "pid"
        held = process.PidFile(str(path))
        path.unlink()
        path.write_text("another")
        held.close()
        assert path.read_text() == "another"

    @pytest.mark.parametrize("what", ["directory", "link", "hard link", "fifo"])
    def test_only_a_plain_file_of_ours(self, tmp_path: Path, what: str) -> None:
        path = tmp_path / "pid"
        (tmp_path / "other").write_text("precious")
        match what:
            case "directory":
                path.mkdir()
            case "link":
                path.symlink_to(tmp_path / "other")
            case "hard link":
                path.hardlink_to(tmp_path / "other")
            case "fifo":
                os.mkfifo(path)
        with pytest.raises(ConfigError, match="choose another path"):
            process.PidFile(str(path))
        assert (tmp_path / "other").read_text() == "precious"


class TestStateDirectory:
    def test_it_is_made_private(self, tmp_path: Path) -> None:
        held = process.StateDirectory(tmp_path / "a" / "b")
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700
        held.close()
        process.StateDirectory(tmp_path / "a" / "b").close()

    def test_a_second_daemon_is_told_what_to_do(self, tmp_path: Path) -> None:
        held = process.StateDirectory(tmp_path)
        with pytest.raises(ConfigError, match="--state-dir"):
            process.StateDirectory(tmp_path)
        held.close()

    def test_a_directory_that_all_may_write_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o777)
        with pytest.raises(ConfigError, match="written by others"):
            process.StateDirectory(tmp_path)

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({"STATE_DIRECTORY": "/var/lib/a:/var/lib/b"}, "/var/lib/a"),
            ({"XDG_STATE_HOME": "/home/u/state"}, "/home/u/state/pyvpnkit"),
            ({"XDG_STATE_HOME": "relative", "HOME": "/home/u"}, "/home/u/.local/state/pyvpnkit"),
        ],
    )
    def test_where_it_is(self, environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("STATE_DIRECTORY", "XDG_STATE_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert str(process.StateDirectory.default()) == expected
