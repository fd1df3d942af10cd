"""The programs of `vm/guest` in a real guest with a minimal Python, and the host's edges towards them: by vsock, on our device.

On the host there are Unix sockets only.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from netstack.errors import HostError
from pyvpnkit.boot import Parts
from tests.qemu.test_vsock import KIND, ROOT, Place
from tests.support import machine
from tests.support.netns import require
from vm.api import VsockSpec
from vm.docker_socket import DOCKER, PING, DockerSocket
from vm.http_probe import answers
from vm.timesync import TimeSync
from vm.vsock.api.kinds import vsock_for

pytestmark = [pytest.mark.qemu]

GUESTS = replace(KIND, modules=(*KIND.modules, "9p", "9pnet_fd"), stored="machine-guest-1")
PYTHON = "/usr/bin/python3.11 -B"
DOCKER_PORT, TIMESYNC_PORT, NINEP_PORT = 2376, 62372, 564
LIMIT_S = 60.0

DOCKERD = b"""\
import os, socket, threading
listener = socket.socket(socket.AF_UNIX)
listener.bind("/docker.sock")
listener.listen()
def serve(peer):
    asked = peer.recv(4096)
    if asked.startswith(b"GET /_ping "):
        peer.sendall(b"HTTP/1.1 200 OK\\r\\nServer: Docker/25.0 (linux)\\r\\nContent-Length: 2\\r\\n\\r\\nOK")
    else:
        while more := peer.recv(65536):
            asked += more
        peer.sendall(asked)
    peer.close()
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],)).start()
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    require("setpriv", "qemu-system-x86_64")
    ours = [
        (f"{name}.py", 0o100644, (ROOT / f"vm/guest/{name}.py").read_bytes())
        for name in ("vsudd", "timesync", "mount9p")
    ]
    return machine.parts(tmp_path_factory.mktemp("machine"), GUESTS, [*ours, ("dockerd.py", 0o100644, DOCKERD)])


class Guest(Place):
    """A machine that serves what Docker for Mac's does: docker.sock behind vsudd, and the clock."""

    def serve(self) -> None:
        self.machine.run(
            f"({PYTHON} /vsudd.py -inport {DOCKER_PORT}:unix:/docker.sock -pidfile /vsudd.pid 2>/tmp/vsudd &)"
        )
        self.machine.run(f"({PYTHON} /timesync.py -port {TIMESYNC_PORT:#x} 2>/tmp/timesync &)")
        self.machine.run("until grep -q serving /tmp/vsudd; do usleep 50000; done", limit_s=LIMIT_S)


@pytest.fixture(scope="module")
def guest(parts: Parts) -> Iterator[Guest]:
    with tempfile.TemporaryDirectory(prefix="gp") as directory:
        made = Guest(Path(directory), parts)
        try:
            yield made
        finally:
            made.close()


async def test_docker_is_not_ready_and_then_answers_and_octets_cross_with_half_close(guest: Guest) -> None:
    vsock = vsock_for("vhost-user", VsockSpec(directory=guest.vsock))
    docker = DockerSocket(guest.at / "docker.sock", lambda: vsock.dial(DOCKER_PORT))
    assert not await answers(lambda: vsock.dial(DOCKER_PORT), PING, server=DOCKER)
    guest.machine.run(f"({PYTHON} /dockerd.py &); until [ -S /docker.sock ]; do usleep 50000; done", limit_s=LIMIT_S)
    async with asyncio.timeout(LIMIT_S):
        assert await answers(lambda: vsock.dial(DOCKER_PORT), PING, server=DOCKER)
        sent = os.urandom(1 << 20)
        reader, writer = await asyncio.open_unix_connection(guest.at / "docker.sock")
        writer.write(sent)
        writer.write_eof()
        assert await reader.read() == sent
        writer.close()
        await writer.wait_closed()
    await docker.close()


async def test_a_port_that_no_program_of_the_guest_serves_is_an_error(guest: Guest) -> None:
    vsock = vsock_for("vhost-user", VsockSpec(directory=guest.vsock))
    with pytest.raises(HostError, match="port 9: the guest refused"):
        await vsock.connect(9)


@pytest.mark.parametrize("kind", ["vhost-user", "hyperkit"])
async def test_a_clock_that_stood_still_is_set(guest: Guest, kind: str) -> None:
    vsock = vsock_for("hyperkit" if kind == "hyperkit" else "vhost-user", VsockSpec(directory=guest.vsock))
    guest.machine.run("date -u -s '2001-02-03 04:05:06'")
    keeper = TimeSync(lambda: vsock.dial(TIMESYNC_PORT), limit_s=LIMIT_S)
    keeper.woke(3600.0)
    async with asyncio.timeout(LIMIT_S):
        while not keeper.done:  # noqa: ASYNC110  # it sets no event
            await asyncio.sleep(0.05)
    await keeper.close()
    assert abs(int(guest.machine.run("date -u +%s")) - time.time()) < LIMIT_S
    assert "the clock is moved by +" in guest.machine.run("cat /tmp/timesync")


async def test_the_guest_dials_a_service_of_the_host_in_this_process(guest: Guest) -> None:
    heard: list[bytes] = []

    async def control(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read())
        writer.write(b"said")

    dial = "import socket; s = socket.socket(socket.AF_VSOCK); s.connect((2, 4098)); s.sendall(b'hello'); s.shutdown(1)"
    for kind in ("vhost-user", "hyperkit"):
        vsock = vsock_for("hyperkit" if kind == "hyperkit" else "vhost-user", VsockSpec(directory=guest.vsock))
        server = await vsock.listen(4098, control)
        said = await asyncio.to_thread(guest.machine.run, f'{PYTHON} -c "{dial}; print(s.recv(9))"', limit_s=LIMIT_S)
        assert said.strip() == "b'said'"
        await server.close()
    assert heard == [b"hello", b"hello"]


@pytest.mark.parametrize("readonly", [False, True])
def test_a_folder_of_the_host_is_mounted_over_vsock(guest: Guest, tmp_path: Path, readonly: bool) -> None:
    (tmp_path / "from-host").write_text("hello guest\n")
    at = guest.vsock / f"00000002.{NINEP_PORT:08x}"
    words = [
        sys.executable,
        "-m",
        "vm.filesystems.ninep",
        "--socket",
        str(at),
        "--export",
        str(tmp_path),
        "--owner",
        "mapped",
    ]
    server = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        flag = "--read-only " if readonly else ""
        guest.machine.run(f"{PYTHON} /mount9p.py --port {NINEP_PORT} -wait {LIMIT_S:g} {flag}/mnt", limit_s=2 * LIMIT_S)
        assert guest.machine.run("cat /mnt/from-host").strip() == "hello guest"
        guest.machine.run("echo hello host >/mnt/from-guest; true")
        assert (tmp_path / "from-guest").exists() is not readonly
        if not readonly:
            assert (tmp_path / "from-guest").read_text() == "hello host\n"
        guest.machine.run("umount /mnt")
        assert " /mnt " not in guest.machine.run("cat /proc/mounts")
    finally:
        server.terminate()
        server.communicate(timeout=LIMIT_S)


def test_too_long_a_wait_for_the_host_says_so(guest: Guest) -> None:
    said = guest.machine.run(f"{PYTHON} /mount9p.py --port 7 -wait 0.1 /mnt 2>&1; true", limit_s=LIMIT_S)
    assert "mount9p: 7: " in said


def test_vsudd_ends_by_a_signal_and_takes_its_pidfile_along(guest: Guest) -> None:
    guest.machine.run("kill $(cat /vsudd.pid); while [ -e /vsudd.pid ]; do usleep 50000; done", limit_s=LIMIT_S)
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.connect(str(guest.vsock / "vsock"))
        host.sendall(b"CONNECT %d\n" % DOCKER_PORT)
        assert host.recv(64) == b""
