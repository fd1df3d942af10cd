"""What only Linux has is not needed to start elsewhere, and what needs it says so (`tests/roof/darwin.py` hides it)."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from netstack.host.io import READ, WRITE, KqueueIO
from tests.roof import darwin
from tests.roof.guest import GATEWAY, HOST, Daemon, StreamGuest, daemon
from tests.support import packets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expected: there is nothing to hide elsewhere")

ROOT = Path(__file__).parents[2]
PACKAGES = ("netstack", "dns", "ntp", "portfwd", "pyvpnkit", "vm")


@pytest.fixture
def mac(tmp_path: Path) -> dict[str, str]:
    """Environment of a Python that takes itself to be on macOS."""
    (tmp_path / "sitecustomize.py").write_text("import tests.roof.darwin\ntests.roof.darwin.pretend()\n")
    (tmp_path / "tmp").mkdir()
    return {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "TMPDIR": str(tmp_path / "tmp"),
        "NOTIFY_SOCKET": str(tmp_path / "nobody-listens"),
    }


def run(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )


def test_every_module_can_be_imported(mac: dict[str, str]) -> None:
    names = sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__main__.py"
    )
    assert len(names) > 80
    script = "import importlib, sys\nassert sys.platform == 'darwin'\nfor name in sys.argv[1:]: importlib.import_module(name)"
    done = run(mac, "-c", script, "netstack", *names)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_help_and_check_config(mac: dict[str, str], tmp_path: Path) -> None:
    done = run(mac, "-m", "pyvpnkit", "--help")
    assert done.returncode == 0 and "check-config" in done.stdout, done.stderr
    settings = tmp_path / "vm.yaml"
    settings.write_text("links: ['unixgram:/tmp/vfkit.sock', 'tap:eth0']\npublish: ['8080:80']\n")
    done = run(mac, "-m", "pyvpnkit", "check-config", str(settings))
    assert done.returncode == 0 and "fine" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        pytest.param(("run", "--link", "tap:eth9"), 2, "tap links need Linux; here there are qemu", id="tap"),
        pytest.param(("run", "--link", "packet:netns=x"), 2, "packet links need Linux", id="packet"),
        pytest.param(("run", "--link", "tap:pid=1"), 2, "tap links need Linux", id="process"),
        pytest.param(("shell", "true"), 1, "needs Linux (namespaces); attach a machine", id="shell"),
        pytest.param(("demo",), 1, "needs Linux (namespaces); attach a machine", id="demo"),
    ],
)
def test_what_needs_linux_says_so(
    mac: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], status: int, said: str
) -> None:
    state = ("--state-dir", "off") if arguments[0] == "run" else ()
    done = run(mac, "-m", "pyvpnkit", *arguments[:1], *state, *arguments[1:])
    assert (done.returncode, done.stdout) == (status, ""), done.stderr
    assert said in done.stderr and "Traceback" not in done.stderr
    assert not any((tmp_path / "tmp").iterdir()), "nothing is left behind"


@pytest.fixture
def queue(monkeypatch: pytest.MonkeyPatch) -> Iterator[KqueueIO]:
    for name, value in {**vars(darwin), "kqueue": darwin.Kqueue, "kevent": darwin.Kevent}.items():
        if name.startswith(("KQ_", "kqueue", "kevent")):
            monkeypatch.setattr(select, name, value, raising=False)
    monkeypatch.setattr(sys, "platform", "darwin")
    made = KqueueIO()
    yield made
    made.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs:
        yield ours, theirs


def masks(queue: KqueueIO) -> list[int]:
    found = []
    for ready, mask in queue.poll():
        ready(mask)
        found.append(mask)
    return sorted(found)


def test_a_link_on_kqueue_waits_for_room_and_stops_waiting(
    queue: KqueueIO, pair: tuple[socket.socket, socket.socket]
) -> None:
    fd = pair[0].fileno()
    queue.want_write(fd, False)  # not watched
    queue.watch(fd, lambda _mask: None, edge=False)
    queue.want_write(fd, False)  # no filter to take away: kqueue says ENOENT
    assert masks(queue) == []
    for _ in range(2):
        queue.want_write(fd, True)
        assert masks(queue) == masks(queue) == [WRITE]
        queue.want_write(fd, False)
        queue.want_write(fd, False)
        assert masks(queue) == []
    pair[1].send(b"frame")
    assert masks(queue) == masks(queue) == [READ]


def test_a_socket_that_outlives_its_watch_leaves_kqueue_quiet(
    queue: KqueueIO, pair: tuple[socket.socket, socket.socket]
) -> None:
    """The shared socket of a `unixgram` link stays open when a peer goes, and serves the next one."""
    fd = pair[0].fileno()
    pair[1].send(b"frame")
    for edge in (False, True):
        queue.watch(fd, lambda _mask: None, edge=edge)
        if edge:
            queue.watch_write(fd)
        else:
            queue.want_write(fd, True)
        assert masks(queue) == [READ, WRITE]
        queue.unwatch(fd)
        queue.unwatch(fd)
        with select.epoll() as loop:  # what the asyncio loop would be woken by, again and again
            loop.register(queue.fileno(), select.EPOLLIN)
            assert loop.poll(0) == []
    queue.watch(fd, lambda _mask: None, edge=False)
    assert masks(queue) == [READ], "room is not asked for any more"


def test_a_closed_descriptor_whose_number_comes_again_begins_anew(queue: KqueueIO) -> None:
    for _ in range(2):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with ours, theirs:
            queue.watch(ours.fileno(), lambda _mask: None, edge=False)
            queue.want_write(ours.fileno(), False)
            queue.want_write(ours.fileno(), True)
            assert masks(queue) == [WRITE]
            queue.forget(ours.fileno())
    queue.unwatch(1 << 20)  # never seen


@pytest.fixture
def running(mac: dict[str, str], tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "-p", "0:80", environment=mac) as made:
        yield made


def test_a_guest_is_served_through_kqueue(running: Daemon) -> None:
    """Lease, DNS, and a connection whose octets go both ways and end both ways."""
    guest = StreamGuest(running.link)
    assert socket.inet_ntoa(guest.lease()) == "192.168.65.3"
    question = b"\0\7\1\0\0\1\0\0\0\0\0\0\4host\10internal\0\0\1\0\1"
    guest.send_ip(GATEWAY, packets.UDP, packets.udp(guest.address, GATEWAY, 5000, 53, question))
    answer = next(packet for packet in guest.packets(packets.UDP) if packet.payload[2:4] == (5000).to_bytes(2, "big"))
    assert answer.payload.endswith(HOST)
    with socket.create_server(("127.0.0.1", 0)) as server:
        seen = []

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                seen.append(connection.recv(100))
                connection.sendall(bytes(100_000))
                connection.shutdown(socket.SHUT_WR)
                seen.append(connection.recv(100))

        thread = threading.Thread(target=serve)
        thread.start()
        connection = guest.connect(HOST, server.getsockname()[1])
        assert connection is not None
        connection.send(packets.ACK | packets.PSH, b"question")
        assert connection.ended_by() == "FIN"
        connection.send(packets.ACK | packets.FIN)
        thread.join(10)
        assert seen == [b"question", b""]
    guest.close()
    assert running.stop() == 0, running.said()
    assert "sitecustomize" not in running.said(), "it ran as macOS"
    assert "Traceback" not in running.said() and "contained" not in running.said()
