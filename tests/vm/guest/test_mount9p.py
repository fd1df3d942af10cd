"""What is asked of the kernel, and what the server sees, when a machine mounts over a Unix socket in place of vsock."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm.guest import mount9p

LIMIT_S = 30.0


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="m9") as made:
        yield Path(made)


class Kernel:
    """Does as mount(2): speaks on the descriptor that the options name."""

    def __init__(self, number: int = 0) -> None:
        self.asked: list[tuple[str, str, int, str]] = []
        self._number = number

    def __call__(self, source: str, target: str, flags: int, data: str, fd: int) -> None:
        self.asked.append((source, target, flags, data.replace(f"={fd},", "=FD,")))
        if self._number:
            raise OSError(self._number, os.strerror(self._number))
        os.write(fd, b"Tversion")


def serve_once(path: Path, heard: list[bytes]) -> threading.Thread:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def run() -> None:
        with listening, listening.accept()[0] as peer:
            heard.append(peer.recv(64))

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_server_is_dialled_and_the_kernel_handed_the_connection(place: Path) -> None:
    heard: list[bytes] = []
    server = serve_once(place / "port", heard)
    kernel = Kernel()
    assert mount9p.main(["-port", str(place / "port"), str(place / "mnt")], mount=kernel) == 0
    server.join(LIMIT_S)
    assert heard == [b"Tversion"]
    data = "trans=fd,rfdno=FD,wfdno=FD,version=9p2000.L,msize=262144,access=user"
    assert kernel.asked == [(f"vsock:{place / 'port'}", str(place / "mnt"), 0, data)]
    assert (place / "mnt").is_dir()


def test_options_of_the_command_line_reach_the_kernel(place: Path) -> None:
    server = serve_once(place / "port", [])
    kernel = Kernel()
    argv = ["--port", str(place / "port"), "--read-only", "-aname", "/home", "-msize", "65536", "-access", "any"]
    assert mount9p.main([*argv, "-o", "cache=loose", str(place / "mnt")], mount=kernel) == 0
    server.join(LIMIT_S)
    data = "trans=fd,rfdno=FD,wfdno=FD,version=9p2000.L,msize=65536,access=any,aname=/home,cache=loose"
    assert kernel.asked == [(f"vsock:{place / 'port'}", str(place / "mnt"), mount9p.MS_RDONLY, data)]


def test_a_server_that_comes_later_is_waited_for(place: Path) -> None:
    heard: list[bytes] = []
    later: list[threading.Thread] = []
    timer = threading.Timer(0.3, lambda: later.append(serve_once(place / "port", heard)))
    timer.start()
    assert mount9p.main(["-port", str(place / "port"), "-wait", str(LIMIT_S), str(place / "mnt")], mount=Kernel()) == 0
    timer.join(LIMIT_S)
    later[0].join(LIMIT_S)
    assert heard == [b"Tversion"]


def test_the_host_may_dial_instead(place: Path) -> None:
    status: list[int] = []
    argv = ["-listen", "-port", str(place / "port"), "-wait", str(LIMIT_S), str(place / "mnt")]
    guest = threading.Thread(target=lambda: status.append(mount9p.main(argv, mount=Kernel())))
    guest.start()
    deadline = time.monotonic() + LIMIT_S
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        while True:
            try:
                host.connect(str(place / "port"))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                assert time.monotonic() < deadline
                time.sleep(0.005)
        assert host.recv(64) == b"Tversion"
    guest.join(LIMIT_S)
    assert status == [0]
    assert not (place / "port").exists()


def test_a_host_that_is_not_there_is_said(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for listen in ([], ["-listen"]):
        argv = [*listen, "-port", str(place / "port"), "-wait", "0.01", str(place / "mnt")]
        assert mount9p.main(argv, mount=Kernel()) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"mount9p: {place / 'port'}: No such file or directory"
    assert second == f"mount9p: {place / 'port'}: timed out"


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENODEV, "modprobe 9p"), (errno.EINVAL, "modprobe 9pnet_fd"), (errno.EPERM, "it takes root")],
)
def test_what_the_kernel_lacks_is_said(place: Path, capsys: pytest.CaptureFixture[str], number: int, hint: str) -> None:
    server = serve_once(place / "port", [])
    assert mount9p.main(["-port", str(place / "port"), str(place / "mnt")], mount=Kernel(number)) == 1
    server.join(LIMIT_S)
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "complaint"), [(["-port", "x", "/m"], "-port 'x'"), (["-aname", "a,uid=0", "/m"], "comma")]
)
def test_a_wrong_command_line_says_what_would_be_right(
    capsys: pytest.CaptureFixture[str], argv: list[str], complaint: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        mount9p.main(argv, mount=Kernel())
    assert complaint in capsys.readouterr().err


def test_without_ctypes_the_tool_mounts(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = place / "bin" / "mount"
    tool.parent.mkdir()
    tool.write_text(
        f'#!/bin/bash\necho "$@" > {place}/asked\nfd=$(echo "$@" | sed "s/.*rfdno=//;s/,.*//")\necho spoken >&$fd\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "ctypes", None)
    ours, theirs = socket.socketpair()
    number = ours.fileno()
    with ours, theirs:
        mount9p.mount("vsock:564", "/mnt", mount9p.MS_RDONLY, f"trans=fd,rfdno={number},x=y", number)
        assert theirs.recv(16) == b"spoken\n"
        tool.write_text("#!/bin/sh\necho mount: no such >&2\nexit 32\n")
        with pytest.raises(OSError, match="mount: no such"):
            mount9p.mount("vsock:564", "/mnt", 0, "trans=fd", number)
    assert (place / "asked").read_text() == f"-t 9p -o ro,trans=fd,rfdno={number},x=y vsock:564 /mnt\n"
