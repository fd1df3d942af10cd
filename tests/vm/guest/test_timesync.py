"""The machine's clock as its host has it set; a Unix path stands in place of vsock's port, and nothing sets the real clock."""

from __future__ import annotations

import calendar
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm.guest import timesync

PROGRAM = Path(__file__).parents[3] / "vm/guest/timesync.py"
LIMIT_S = 30.0


@pytest.fixture
def at() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ts") as made:
        yield f"{made}/port"


def ask(at: str) -> bytes:
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.connect(at)
        return host.recv(16)


def rtc_time(*tm: int) -> bytes:
    return struct.pack("9i", *tm, 0, 0, 0)


def test_who_connects_has_the_clock_set_and_then_reads_the_end(at: str) -> None:
    set_to: list[float] = []
    listening = timesync.listener(at, timesync.ANY_CID)
    assert os.stat(at).st_mode & 0o777 == 0o600
    threading.Thread(target=timesync.serve, args=(listening, lambda: 1.7e9, set_to.append), daemon=True).start()
    assert ask(at) == b""
    assert ask(at) == b""
    assert set_to == [1.7e9, 1.7e9]


def test_a_clock_that_cannot_be_set_ends_that_call_only(at: str, capfd: pytest.CaptureFixture[str]) -> None:
    tried = []

    def refuse(now: float) -> None:
        tried.append(now)
        raise PermissionError(1, "Operation not permitted")

    listening = timesync.listener(at, timesync.ANY_CID)
    threading.Thread(target=timesync.serve, args=(listening, lambda: 1.0, refuse), daemon=True).start()
    assert [ask(at), ask(at)] == [b"", b""]
    assert tried == [1.0, 1.0]
    assert "the clock is not set: [Errno 1] Operation not permitted" in capfd.readouterr().err


def test_the_hardware_clock_is_taken_as_utc() -> None:
    assert timesync.seconds(rtc_time(56, 34, 12, 29, 1, 124)) == calendar.timegm((2024, 2, 29, 12, 34, 56))
    with pytest.raises(ValueError, match="year 1969"):
        timesync.seconds(rtc_time(59, 59, 23, 31, 11, 69))


def test_the_programs_clock_is_left_alone_where_there_is_no_hardware_clock(at: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-I", str(PROGRAM), "-port", at, "-rtc", "/nowhere/rtc0"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + LIMIT_S
    while not os.path.exists(at) and time.monotonic() < deadline:
        time.sleep(0.01)
    while True:
        try:
            assert ask(at) == b""
            break
        except ConnectionRefusedError:  # bound, and not listening yet
            assert time.monotonic() < deadline
    process.terminate()
    _, said = process.communicate(timeout=LIMIT_S)
    assert "the clock is not set: [Errno 2] No such file or directory: '/nowhere/rtc0'" in said
    assert process.returncode == 0


def test_a_port_that_is_none_says_what_would_be() -> None:
    done = subprocess.run([sys.executable, str(PROGRAM), "-port", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "write a vsock port such as 0xf3a4" in done.stderr
