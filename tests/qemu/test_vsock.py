"""vsock between a real guest and the host: QEMU with our device beside it, a program of its own.

The guest's kernel is Debian's ordinary one, and a small Python of Debian's speaks AF_VSOCK in it (`tests/support/vsock_guest.py`).
On the host there are Unix sockets only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvpnkit import machine as qemu
from pyvpnkit.boot import SMALL, Kind, Parts
from pyvpnkit.machine import Card, Machine
from tests.support import machine
from tests.support.netns import require
from tests.support.webhost import exactly, read_all

pytestmark = [pytest.mark.qemu]

KIND = Kind(
    "linux-image-amd64",
    (*SMALL.modules, "vsock", "vmw_vsock_virtio_transport"),
    "machine-vsock-1",
    ("python3.11-minimal", "libpython3.11-minimal", "libexpat1", "zlib1g"),
    (
        "usr/bin/python3.11",
        "usr/lib/python3.11",
        "lib/x86_64-linux-gnu/libexpat.so.1",
        "lib/x86_64-linux-gnu/libz.so.1",
    ),
)
AGENT = "/usr/bin/python3.11 -B /agent.py"
ECHO, OTHER = 5000, 2376
LIMIT_S = 60.0
MIB = 1 << 20
CID = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    require("setpriv", "qemu-system-x86_64")
    agent = (ROOT / "tests/support/vsock_guest.py").read_bytes()
    return machine.parts(tmp_path_factory.mktemp("machine"), KIND, [("agent.py", 0o100644, agent)])


class Place:
    """A machine with our device, in the directory `at`, whose path is short."""

    def __init__(self, at: Path, made_of: Parts, *options: str) -> None:
        self.at = at
        self.vsock = at / "v"
        self.control = at / "S"
        self.device: subprocess.Popen[str]
        self.start_device()
        memory = "memory-backend-memfd,id=mem,size=256M,share=on"
        chardev = [
            "-device",
            "pcie-root-port,id=port0",
            "-qmp",
            f"unix:{at}/qmp,server=on,wait=off",
            "-chardev",
            f"socket,id=vs,path={self.control}",
        ]
        words = [
            "-object",
            memory,
            "-machine",
            "memory-backend=mem",
            *chardev,
            "-device",
            "vhost-user-vsock-pci,id=vsock,chardev=vs,bus=port0",
        ]
        self.machine = Machine(qemu.command(made_of, Card("user,id=n,restrict=on", "", tuple(words))))
        try:
            self.machine.wait_up()
            self.serve()
        except BaseException:
            self.close()
            raise

    def serve(self) -> None:
        self.machine.run(
            f"({AGENT} serve {ECHO} {OTHER} >/tmp/served 2>&1 &); until grep -q serving /tmp/served; do usleep 50000; done"
        )

    def start_device(self) -> None:
        reading, writing = os.pipe()
        words = [sys.executable, "-m", "vm.vsock", "--vhost-user", str(self.control), "--directory", str(self.vsock)]
        words += ["--cid", str(CID), "--forward", str(OTHER), "--ready-fd", str(writing), "--end-with-stdin"]
        self.device = subprocess.Popen(
            words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=[writing], cwd=ROOT
        )
        os.close(writing)
        with open(reading, "rb") as ready:
            assert ready.read() == b"\n"

    def agent(self, *words: object, limit_s: float = LIMIT_S) -> str:
        return self.machine.run(f"{AGENT} {' '.join(map(str, words))}", limit_s=limit_s)

    def hyperkit(self, port: int, cid: int = CID) -> socket.socket:
        return dial(self.vsock / "connect", b"%08x.%08x\n" % (cid, port))

    def hybrid(self, port: int) -> socket.socket:
        return dial(self.vsock / "vsock", b"CONNECT %d\n" % port)

    def forward(self, port: int) -> socket.socket:
        return dial(self.vsock / f"guest.{port:08x}", b"")

    def close(self) -> None:
        if hasattr(self, "machine"):
            self.machine.kill()
        if self.device.poll() is None:
            self.device.send_signal(signal.SIGTERM)
        _, said = self.device.communicate(timeout=LIMIT_S)
        assert "Traceback" not in said, said
        assert self.device.returncode == 0, said


def dial(path: Path, line: bytes) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(LIMIT_S)
    sock.connect(str(path))
    sock.sendall(line)
    return sock


def read_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        octet = sock.recv(1)
        if not octet:
            break
        line += octet
    return line


def pattern(octets: int) -> bytes:
    block = b"".join(number.to_bytes(4, "big") for number in range(1 << 14))
    return (block * (octets // len(block) + 1))[:octets]


def sum_of(octets: bytes) -> str:
    return hashlib.sha256(octets).hexdigest()


@contextlib.contextmanager
def service(path: Path, serve: Callable[[socket.socket], None], backlog: int = 512) -> Iterator[None]:
    """A service of the host, a thread for each connection."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(backlog)

        def one(sock: socket.socket) -> None:
            with sock:
                serve(sock)

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=one, args=[sock], daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()
            path.unlink()


@contextlib.contextmanager
def place(made_of: Parts) -> Iterator[Place]:
    with tempfile.TemporaryDirectory(prefix="vs") as directory:
        made = Place(Path(directory), made_of)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture(scope="module")
def here(parts: Parts) -> Iterator[Place]:
    with place(parts) as made:
        yield made


@pytest.mark.parametrize("how", ["hyperkit", "hybrid", "forward"])
def test_the_host_reaches_a_service_of_the_guest_by_each_convention(here: Place, how: str) -> None:
    with getattr(here, how)(OTHER) as sock:
        if how == "hybrid":
            assert read_line(sock).startswith(b"OK 1")
        sock.sendall(b"sum\nsome octets")
        sock.shutdown(socket.SHUT_WR)  # and the answer still comes
        assert read_all(sock).decode() == sum_of(b"some octets")


@pytest.mark.parametrize("name", ["00000002.%08x", "vsock_%d"])
def test_the_guest_reaches_a_service_of_the_host_by_either_name(here: Place, name: str) -> None:
    def answer(sock: socket.socket) -> None:
        said = read_all(sock)  # the guest has ended, and the answer still comes
        sock.sendall(said[::-1])

    with service(here.vsock / (name % 7000), answer):
        assert here.agent("talk", 7000, "desserts") == "stressed"


def test_16_mib_each_way_arrive_as_they_were_sent(here: Place) -> None:
    data = pattern(16 * MIB)
    with here.hybrid(ECHO) as sock:
        read_line(sock)
        sock.sendall(b"sum\n" + data)
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).decode() == sum_of(data)
    with here.hyperkit(ECHO) as sock:
        sock.sendall(b"give %d\n" % len(data))
        assert sum_of(read_all(sock)) == sum_of(data)


def test_16_mib_each_way_over_connections_of_the_guest(here: Place) -> None:
    def count(sock: socket.socket) -> None:
        sock.sendall(sum_of(read_all(sock)).encode())

    def give(sock: socket.socket) -> None:
        sock.sendall(pattern(int(read_line(sock))))

    expected = sum_of(pattern(16 * MIB))
    with service(here.vsock / "00000002.00001b58", count), service(here.vsock / "vsock_7001", give):
        assert here.agent("up", 7000, 16 * MIB).split()[:2] == [expected, expected]
        assert here.agent("down", 7001, 16 * MIB) == expected


def test_echoes_of_1_mib_on_8_connections_at_once(here: Place) -> None:
    """Both directions of each are busy together, so credit runs out in both."""
    data = pattern(MIB)

    def echo(found: list[bytes]) -> None:
        with here.forward(OTHER) as sock:
            sock.sendall(b"echo\n")
            sender = threading.Thread(target=lambda: (sock.sendall(data), sock.shutdown(socket.SHUT_WR)))
            sender.start()
            found.append(read_all(sock))
            sender.join()

    found: list[bytes] = []
    threads = [threading.Thread(target=echo, args=[found]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)
    assert [one == data for one in found] == [True] * 8


def test_200_connections_at_once_each_way(here: Place) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(here.hybrid(ECHO)) for _ in range(200)]
        for sock in socks:
            assert read_line(sock).startswith(b"OK ")
            sock.sendall(b"hold\n")
        assert [read_line(sock) for sock in socks] == [b"held\n"] * 200

        def echo(sock: socket.socket) -> None:
            sock.sendall(read_all(sock))

        with service(here.vsock / "00000002.00001b58", echo):
            assert here.agent("many", 7000, 200) == "200"


def test_what_nobody_listens_on_is_refused(here: Place) -> None:
    for refused in (here.hyperkit(99), here.hybrid(99), here.hyperkit(OTHER, cid=4)):
        with refused:
            assert refused.recv(1) == b""
    assert here.agent("refused", 99) == "ECONNRESET"


def listen_and_stay(here: Place) -> None:
    """A program of the guest that has connected to port 7000 and waits; what it says is in /tmp/heard."""
    here.machine.run(
        f"rm -f /tmp/heard; {AGENT} hear 7000 stay >/tmp/heard 2>&1 & echo $! >/tmp/pid; "
        "until grep -q connected /tmp/heard; do usleep 50000; done",
        limit_s=LIMIT_S,
    )


def test_what_the_guest_ends_ends_for_the_host_and_the_other_way_round(here: Place) -> None:
    gone = threading.Event()

    def hear(sock: socket.socket) -> None:
        read_line(sock)
        sock.close()

    with service(here.vsock / "vsock_7000", hear):
        assert here.agent("hear", 7000, "go").split("\n")[0] == "connected"

    def wait(sock: socket.socket) -> None:
        read_all(sock)
        gone.set()

    with service(here.vsock / "vsock_7000", wait):
        listen_and_stay(here)
        here.machine.run("kill -9 $(cat /tmp/pid)")
        assert gone.wait(LIMIT_S)


def test_a_machine_that_pauses_loses_nothing(here: Place) -> None:
    with here.hybrid(ECHO) as sock:
        read_line(sock)
        sock.sendall(b"echo\nbefore")
        assert exactly(sock, 6) == b"before"
        with qmp(here) as ask:
            ask("stop")
            sock.sendall(b"meanwhile")
            ask("cont")
        assert exactly(sock, 9) == b"meanwhile"


def test_a_guest_that_reboots_ends_what_was_open_and_comes_back(here: Place) -> None:
    with here.hybrid(ECHO) as sock:
        read_line(sock)
        sock.sendall(b"hold\n")
        assert read_line(sock) == b"held\n"
        here.machine.send("reboot -f")
        assert read_all(sock) == b""
    here.machine.wait_up()
    here.serve()
    with here.hybrid(ECHO) as sock:
        read_line(sock)
        sock.sendall(b"sum\n")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock).decode() == sum_of(b"")


@contextlib.contextmanager
def qmp(here: Place) -> Iterator[Callable[..., Any]]:
    """`ask(command, **arguments)`; with `until="EVENT"` that is waited for."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(LIMIT_S)
        sock.connect(str(here.at / "qmp"))
        stream = sock.makefile("rw")
        json.loads(stream.readline())
        events: list[str] = []

        def ask(command: str, *, until: str = "", **arguments: Any) -> Any:
            stream.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
            stream.flush()
            answer = None
            while answer is None or (until and until not in events):
                said = json.loads(stream.readline())
                if "event" in said:
                    events.append(said["event"])
                else:
                    assert "return" in said, said
                    answer = said["return"]
            return answer

        with stream:
            ask("qmp_capabilities")
            yield ask


def test_the_device_is_killed_and_restarted_under_a_living_guest(parts: Parts) -> None:
    """QEMU's vhost-user-vsock never takes a new connection, so the card is pulled and plugged in; the guest's kernel goes on."""
    with place(parts) as here:
        boot = here.machine.run("cat /proc/sys/kernel/random/boot_id")
        ended = threading.Event()

        def wait(sock: socket.socket) -> None:
            with contextlib.suppress(ConnectionResetError):
                read_all(sock)
            ended.set()

        with service(here.vsock / "vsock_7000", wait):
            listen_and_stay(here)
            here.device.kill()
            here.device.communicate()
            assert ended.wait(LIMIT_S)
        with qmp(here) as ask:
            ask("device_del", until="DEVICE_DELETED", id="vsock")
            ask("chardev-remove", id="vs")
            here.start_device()
            backend = {
                "type": "socket",
                "data": {"server": False, "addr": {"type": "unix", "data": {"path": str(here.control)}}},
            }
            ask("chardev-add", id="vs", backend=backend)
            ask("device_add", driver="vhost-user-vsock-pci", id="vsock", chardev="vs", bus="port0")
        here.machine.run("until grep -q ECONNRESET /tmp/heard; do usleep 50000; done")
        here.machine.run(
            "until [ -d /sys/bus/virtio/drivers/vmw_vsock_virtio_transport/virtio* ]; do usleep 50000; done"
        )
        assert here.machine.run("cat /proc/sys/kernel/random/boot_id") == boot
        with here.hybrid(ECHO) as sock:
            assert read_line(sock).startswith(b"OK ")
            sock.sendall(b"sum\nagain")
            sock.shutdown(socket.SHUT_WR)
            assert read_all(sock).decode() == sum_of(b"again")
