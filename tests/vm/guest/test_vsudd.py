"""A machine's Unix socket as its host finds it behind vsudd; Unix paths stand in place of vsock's ports."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vm.guest.vsudd import Inport, Vsudd, inport

LIMIT_S = 30.0
PROGRAM = Path(__file__).parents[3] / "vm/guest/vsudd.py"


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vu") as made:
        yield Path(made)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Service:
    """What listens at `docker.sock`: `talk` with each connection."""

    def __init__(self, path: Path, talk: Callable[[socket.socket], None]) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(str(path))
        self._sock.listen()
        self._talk = talk
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self._sock.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(peer,)).start()

    def _one(self, peer: socket.socket) -> None:
        with peer:
            self._talk(peer)

    def close(self) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
        self._thread.join(LIMIT_S)


def whole(sock: socket.socket) -> bytes:
    found = b""
    while more := sock.recv(65536):
        found += more
    return found


def echo_after_the_end(peer: socket.socket) -> None:
    peer.sendall(whole(peer))


def call(at: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.settimeout(LIMIT_S)
    made.connect(str(at))
    return made


class Running:
    """The program as a process."""

    def __init__(self, place: Path, *more: str) -> None:
        self.at = place / "port"
        argv = [sys.executable, "-I", str(PROGRAM), "-inport", f"{self.at}:unix:{place / 'docker.sock'}", *more]
        self.process = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        assert "serving" in self.process.stderr.readline()

    def stop(self) -> str:
        self.process.send_signal(signal.SIGTERM)
        _, said = self.process.communicate(timeout=LIMIT_S)
        assert self.process.returncode == 0
        return said


def test_octets_and_half_close_cross_both_ways(place: Path) -> None:
    service = Service(place / "docker.sock", echo_after_the_end)
    vsudd = Running(place, "-pidfile", str(place / "pid"))
    assert (place / "pid").read_text() == f"{vsudd.process.pid}\n"
    assert stat.S_IMODE(vsudd.at.stat().st_mode) == 0o600
    sent = os.urandom(1 << 20)
    with call(vsudd.at) as host:
        host.sendall(sent)
        host.shutdown(socket.SHUT_WR)
        assert whole(host) == sent
    assert vsudd.stop() == ""
    assert os.listdir(place) == ["docker.sock"]
    service.close()


def test_the_target_may_end_first_and_still_hear(place: Path) -> None:
    heard: list[bytes] = []

    def talk(peer: socket.socket) -> None:
        peer.sendall(b"bye")
        peer.shutdown(socket.SHUT_WR)
        heard.append(whole(peer))

    service = Service(place / "docker.sock", talk)
    vsudd = Running(place)
    with call(vsudd.at) as host:
        assert whole(host) == b"bye"
        host.sendall(b"one more thing")
        host.shutdown(socket.SHUT_WR)
        until(lambda: heard == [b"one more thing"])
    vsudd.stop()
    service.close()


def test_a_socket_that_comes_later_is_served_then(place: Path) -> None:
    vsudd = Running(place)
    with call(vsudd.at) as early:
        assert whole(early) == b""
    service = Service(place / "docker.sock", echo_after_the_end)
    with call(vsudd.at) as host:
        host.sendall(b"now")
        host.shutdown(socket.SHUT_WR)
        assert whole(host) == b"now"
    assert "docker.sock: No such file or directory" in vsudd.stop()
    service.close()


def test_callers_beyond_the_limit_are_closed_and_room_is_used_again(place: Path) -> None:
    service = Service(place / "docker.sock", echo_after_the_end)
    vsudd = Vsudd([Inport(str(place / "port"), str(place / "docker.sock"))], limit=2)
    threading.Thread(target=vsudd.run, daemon=True).start()
    held = [call(place / "port") for _ in range(2)]
    until(lambda: vsudd.accepted == 2)
    with call(place / "port") as third:
        assert whole(third) == b""
    assert vsudd.over_limit == 1
    for host in held:
        host.sendall(b"fine")
        host.shutdown(socket.SHUT_WR)
        assert whole(host) == b"fine"
        host.close()

    def served() -> bool:
        with call(place / "port") as host:
            host.shutdown(socket.SHUT_WR)
            before = vsudd.over_limit
            whole(host)
            return vsudd.over_limit == before

    until(served)
    service.close()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2376:unix:/var/run/docker.sock", Inport(2376, "/var/run/docker.sock")),
        ("00000948-FACB-11E6-BD58-64006A7986D3:unix:/d.sock", Inport(2376, "/d.sock")),
        ("unix:/tmp/a:unix:/tmp/b", Inport("/tmp/a", "/tmp/b")),
    ],
)
def test_an_inport_is_a_port_a_guid_or_a_path(text: str, expected: Inport) -> None:
    assert inport(text) == expected


@pytest.mark.parametrize(
    "text", ["2376", "2376:tcp:80", "x:unix:/a", "4294967295:unix:/a", ":unix:/a", "1:unix:", "٣:unix:/a"]
)
def test_what_is_no_inport_says_what_would_be(text: str) -> None:
    with pytest.raises(ValueError, match=r"write PORT:unix:PATH|is no vsock port"):
        inport(text)


@pytest.mark.parametrize(("flag", "why"), [("-detach", "as a service"), ("-syslog", "standard error")])
def test_what_is_not_offered_says_what_to_do(flag: str, why: str) -> None:
    argv = [sys.executable, str(PROGRAM), flag, "-inport", "/nowhere/a:unix:/b"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert why in done.stderr


def test_a_place_that_is_taken_is_said(place: Path) -> None:
    (place / "port").write_text("precious")
    argv = [sys.executable, str(PROGRAM), "-inport", f"{place / 'port'}:unix:/b"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"vsudd: cannot listen at {place / 'port'}: Address already in use\n")
    assert (place / "port").read_text() == "precious"
