"""vsock between a real guest and the host: QEMU with our device beside it, a program of its own.

The guest's kernel is Debian's ordinary one, and a small Python of Debian's speaks AF_VSOCK in it (`tests/support/vsock_guest.py`).
On the host there are Unix sockets only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvpnkit import machine as qemu
from pyvpnkit.boot import SMALL, Kind, Parts
from pyvpnkit.machine import Card, Machine
from tests.support import machine
from tests.support.netns import require

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
        self._control = at / "S"
        self.device: subprocess.Popen[str]
        self.start_device()
        memory = "memory-backend-memfd,id=mem,size=256M,share=on"
        chardev = [
            "-device",
            "pcie-root-port,id=port0",
            "-qmp",
            f"unix:{at}/qmp,server=on,wait=off",
            "-chardev",
            f"socket,id=vs,path={self._control}",
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
        words = [sys.executable, "-m", "vm.vsock", "--vhost-user", str(self._control), "--directory", str(self.vsock)]
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


def read_all(sock: socket.socket) -> bytes:
    found = []
    while piece := sock.recv(1 << 18):
        found.append(piece)
    return b"".join(found)


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
