"""`pyvpnkit vm up`, with everything at once: the example's machine, built from Debian's packages, and all that is beside it.

What Docker for Mac is made of, by the real programs: QEMU with a card and a vsock device in shared rings, two folders of the host,
a console, an HTTP server behind docker.sock, a program in the guest that publishes a port, and the power button.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from tests.support.netns import require, wait_until

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
UP_S: Final = 240.0
"""Downloads, builds and boots; a quarter of it where all is there."""
TALK_S: Final = 60.0
DOWN_S: Final = 5.0

ENGINE: Final = """\
import os
import socketserver
from http.server import BaseHTTPRequestHandler


class Engine(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def version_string(self):
        return "Docker/1 (a stand-in)"

    def address_string(self):
        return "vsock"

    def log_message(self, *words):
        pass

    def do_GET(self):
        self.answer(b"OK" if self.path == "/_ping" else self.path.encode())

    def do_POST(self):  # to the end of what is sent, as `docker attach` has it
        self.close_connection = True
        octets = self.rfile.read()
        self.send_response(101)
        self.end_headers()
        self.wfile.write(octets[::-1])

    def answer(self, octets):
        self.send_response(200)
        self.send_header("Content-Length", str(len(octets)))
        self.end_headers()
        self.wfile.write(octets)


if os.path.exists("/var/run/docker.sock"):
    os.unlink("/var/run/docker.sock")
socketserver.ThreadingUnixStreamServer("/var/run/docker.sock", Engine).serve_forever()
"""


class Vm:
    """The command, for one machine in `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = directory / "all.yml"
        self.state = directory / "s" / "pyvpnkit" / "vm" / "all"
        self.share = directory / "share"
        self.ours = directory / "ours"
        self.environment = {**os.environ, "XDG_STATE_HOME": str(directory / "s"), "PYTHONPATH": str(EXAMPLES.parent)}

    def words(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "pyvpnkit", "vm", *words]

    def run(self, *words: str, limit_s: float = TALK_S, check: bool = True, say: str = "") -> str:
        """What one command prints."""
        done = subprocess.run(
            self.words(*words),
            env=self.environment,
            input=say,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}\n{self.logs()}"
        return done.stdout

    def logs(self) -> str:
        files = [self.state / "console.log", *sorted((self.state / "log").glob("*"))]
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-4000:]}" for path in files if path.exists()
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.run("status", "all", "--json", check=False))
        return found

    def processes(self) -> dict[int, str]:
        """Those whose command line names the machine's directory, and their names."""
        found = {}
        for one in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (one / "cmdline").read_bytes()
                if str(self.directory).encode() in words and int(one.name) != os.getpid():
                    found[int(one.name)] = words.replace(b"\0", b" ").decode()
        return found


class Typing:
    """A person at the machine's console."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        self._said = ""
        self._number = 0

    def close(self) -> None:
        os.close(self._fd)

    def _hears(self, pattern: str, limit_s: float) -> re.Match[str] | None:
        end = time.monotonic() + limit_s
        while not (found := re.search(pattern, self._said, re.DOTALL)):
            left = end - time.monotonic()
            if left <= 0:
                return None
            if select.select([self._fd], [], [], left)[0]:
                self._said += os.read(self._fd, 65536).decode(errors="replace")
        self._said = self._said[found.end() :]
        return found

    def quiet(self) -> None:
        """No prompt, and nothing of what is typed comes back. While getty changes hands it is lost, and so typed again."""
        end = time.monotonic() + TALK_S
        while True:
            os.write(self._fd, b'\nstty -echo; PS1=; echo "so "quiet\n')
            if self._hears(r"so quiet\r\n", 2.0):
                return
            assert time.monotonic() < end, f"no shell: {self._said[-2000:]!r}"

    def run(self, command: str, limit_s: float = TALK_S) -> str:
        """What a line of shell prints; it must succeed."""
        self._number += 1
        tag = self._number
        os.write(self._fd, f"echo @begin{tag}; ({command}) 2>&1; echo @end{tag} $?\n".encode())
        found = self._hears(rf"@begin{tag}\r\n(.*?)@end{tag} (\d+)\r\n", limit_s)
        assert found is not None, f"{command}: {self._said[-2000:]!r}"
        assert found[2] == "0", f"{command}: {found[0]}"
        return found[1].replace("\r\n", "\n").strip()


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    require("qemu-system-x86_64", "dpkg-deb", "apt-get")
    made = Vm(tmp_path_factory.mktemp("vm"))
    write_files(made)
    try:
        yield made
    finally:
        made.run("down", "all", "--kill", check=False)
        shutil.rmtree(made.directory / "s", ignore_errors=True)


def write_files(vm: Vm) -> None:
    """The example with another engine, and what it has not: a folder served by ourselves, the control API."""
    kit = yaml.safe_load((EXAMPLES / "tiny-linuxkit.yml").read_text())
    services = {service["name"]: service for service in kit["services"]}
    kit["init"].append(services["forwarder"]["image"])  # Python in the machine itself
    services["engine"] |= {
        "image": services["web"]["image"],
        "command": ["chroot", "/host", "python3.11", "/etc/engine.py"],
    }
    services["engine"] |= {"binds": ["/:/host", "/dev:/host/dev", "/run:/host/run"], "capabilities": ["all"]}
    kit["services"] = list(services.values())
    for entry in kit["files"]:
        if entry["path"] == "etc/engine.py":
            entry["contents"] = ENGINE
        if "source" in entry:
            entry["source"] = str((EXAMPLES / entry["source"]).resolve())
    (vm.directory / "kit.yml").write_text(yaml.safe_dump(kit, sort_keys=False))
    host = yaml.safe_load((EXAMPLES / "tiny.yml").read_text())
    host |= {
        "name": "all",
        "boot": {"linuxkit": "kit.yml"},
        "publish": ["0:80"],
        "vsock": {"ports": {"docker": 2376, "forwarder": 62373, "timesync": 62372, "control": 4098}},
        "ready": {"probe": "docker", "limit": int(UP_S)},
    }
    host["shares"].append(
        {"tag": "ours", "source": "./ours", "target": "/var/ours", "kind": "9p-vsock", "owner": "requester"}
    )
    vm.file.write_text(yaml.safe_dump(host, sort_keys=False))
    vm.share.mkdir()
    vm.ours.mkdir()
    (vm.share / "from-host").write_text("of the host\n")
    (vm.ours / "from-host").write_text("of the host\n")


@pytest.fixture(scope="module")
def up(vm: Vm) -> Vm:
    said = vm.run("up", str(vm.file), limit_s=UP_S)
    assert "all is ready after" in said
    assert "degraded" not in said, said
    return vm


@pytest.fixture
def shell(up: Vm) -> Iterator[Typing]:
    typing = Typing(up.state / "tty")
    typing.quiet()
    yield typing
    typing.close()


def test_status_says_how_everything_is_reached(up: Vm) -> None:
    status = up.status()
    assert status["state"] == "ready"
    assert not status["degraded"]
    assert {part["name"] for part in status["parts"]} >= {"network", "vsock"}
    assert [one["address"] for one in status["addresses"]] == ["192.168.65.3"]
    assert {share["tag"] for share in status["shares"]} == {"share", "ours"}


def test_its_port_is_reached_from_the_host(up: Vm) -> None:
    port = published(up)
    assert fetch(port) == b"a tiny machine\n"


def test_a_person_logs_in_at_the_console(up: Vm, shell: Typing) -> None:
    where = up.state / "tty"
    assert stat.S_ISLNK(where.lstat().st_mode)
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    assert shell.run("id -u") == "0"
    assert shell.run("cat /etc/hostname") == "tiny"
    assert "192.168.65.3" in shell.run("ip -4 -o addr show dev eth0")
    said = up.run("console", "all", say='echo "by the "command; exit\n')
    assert "by the command" in said


def test_an_owner_of_the_guest_stays_in_the_guest(up: Vm, shell: Typing) -> None:
    assert shell.run("cat /var/share/from-host") == "of the host"
    shell.run(
        "cd /var/share; echo mine >file; chown 1234:2345 file; chmod 4755 file; ln -s file link; mknod null c 1 3"
    )
    assert shell.run("stat -c %u:%g:%a /var/share/file") == "1234:2345:4755"
    found = (up.share / "file").stat()
    assert (up.share / "file").read_text() == "mine\n"
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (os.getuid(), os.getgid(), 0o600)
    assert struct.unpack("<I", os.getxattr(up.share / "file", "user.virtfs.uid")) == (1234,)
    assert stat.S_ISREG((up.share / "null").lstat().st_mode), "no device is made on the host"


def test_a_folder_by_our_own_server_belongs_to_whoever_asks(up: Vm, shell: Typing) -> None:
    """osxfs's rule, over vsock (spec companions 2.1): no network is asked for it."""
    mount = next(line for line in up.status()["mounts"] if "/var/ours" in line)
    shell.run(mount.replace("mount9p", "python3.11 -m vm.guest.mount9p", 1))
    asks = "python3.11 -c 'import os; os.setgid({0}); os.setuid({0}); print(os.stat(\"/var/ours/from-host\").st_uid)'"
    assert [shell.run(asks.format(user)) for user in (0, 1000, 7)] == ["0", "1000", "7"]
    shell.run("cd /var/ours; echo mine >file; chown 1234:2345 file; mkdir folder; mv file folder/file")
    assert shell.run("stat -c %u:%g /var/ours/folder/file") == "1234:2345"
    assert (up.ours / "folder" / "file").read_text() == "mine\n"
    assert (up.ours / "folder" / "file").stat().st_uid == os.getuid()


def test_a_program_in_the_guest_publishes_a_port_of_the_host(up: Vm, shell: Typing) -> None:
    """Through the control API on vsock, and back through the multiplexer, to an address that only the guest has."""
    port = free_port()
    shell.run("ip addr add 10.9.8.7/32 dev lo; mkdir -p /tmp/w; echo container >/tmp/w/index.html")
    shell.run("httpd -p 10.9.8.7:8000 -h /tmp/w")
    expose = (
        "python3.11 -m portfwd.invm.expose_port -control 2/4098 -proto tcp "
        f"-host-ip 127.0.0.1 -host-port {port} -container-ip 10.9.8.7 -container-port 8000 -no-local-ip -i"
    )
    shell.run(f"{expose} >/tmp/expose.log & echo $! >/tmp/expose.pid")
    wait_until(lambda: answers(port), TALK_S, up.logs)
    assert fetch(port) == b"container\n"
    shell.run("kill $(cat /tmp/expose.pid)")
    wait_until(lambda: not answers(port), TALK_S, up.logs)


def test_docker_sock_leads_to_the_engine(up: Vm) -> None:
    with unix(up.state / "docker.sock") as sock:
        assert stat.S_IMODE((up.state / "docker.sock").stat().st_mode) == 0o600
        sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\r\n")
        answer = read_all(sock)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"\r\nServer: Docker/1" in answer
    with unix(up.state / "docker.sock") as sock:  # half-close, as `docker attach` does it
        sock.sendall(b"POST /attach HTTP/1.1\r\nHost: docker\r\n\r\n" + b"0123456789" * 20000)
        sock.shutdown(socket.SHUT_WR)
        answer = read_all(sock)
    assert answer.endswith(b"9876543210" * 20000)


def test_the_clock_is_set_when_the_host_asks(up: Vm, shell: Typing) -> None:
    shell.run("date -s '2001-02-03 04:05:06'")
    with unix(up.state / "vsock" / "connect") as sock:
        sock.sendall(b"%08x.%08x\n" % (3, 62372))
        assert read_all(sock) == b""
    assert abs(int(shell.run("date +%s")) - time.time()) < 10


def test_the_network_is_killed_under_the_machine(up: Vm, shell: Typing) -> None:
    before = up.status()
    network = next(part["pid"] for part in before["parts"] if part["name"] == "network")
    os.kill(network, signal.SIGKILL)

    def again() -> bool:
        now = up.status()
        pids = [part["pid"] for part in now["parts"] if part["name"] == "network"]
        return now["state"] == "ready" and bool(pids) and pids[0] not in (0, network) and not now["degraded"]

    wait_until(again, TALK_S, up.logs)
    assert up.status()["pid"] == before["pid"], "the machine itself went on"
    shell.run("ping -c 1 -W 5 192.168.65.1")
    wait_until(lambda: answers(published(up)), TALK_S, up.logs)
    assert fetch(published(up)) == b"a tiny machine\n"


def test_down_takes_everything_away(up: Vm) -> None:
    port = published(up)
    assert any("qemu-system" in words for words in up.processes().values())
    began = time.monotonic()
    up.run("down", "all")
    took = time.monotonic() - began
    assert took < DOWN_S, up.logs()
    assert not up.processes()
    left = [path for path in up.state.rglob("*") if path.is_socket() or path.is_symlink()]
    assert not left
    assert not answers(port)
    assert up.status()["state"] == "stopped"
    assert "Traceback" not in up.logs(), up.logs()


def test_the_supervisor_is_killed_and_nothing_is_left(vm: Vm) -> None:
    """Its parts go with it; the next `up` finds a clean place, and nothing to build."""
    vm.run("up", str(vm.file), limit_s=UP_S)
    os.kill(vm.status()["supervisor"], signal.SIGKILL)
    wait_until(lambda: not vm.processes(), TALK_S, lambda: str(vm.processes()))
    assert vm.status()["state"] != "ready"
    said = vm.run("up", str(vm.file), limit_s=UP_S)
    assert "all is ready after" in said
    assert fetch(published(vm)) == b"a tiny machine\n"
    vm.run("down", "all")
    assert not vm.processes()


# What a client of the host does.


def published(vm: Vm) -> int:
    found = re.search(r"127\.0\.0\.1:(\d+)", json.dumps(vm.status()["published"]))
    assert found is not None, vm.status()
    return int(found[1])


def fetch(port: int) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TALK_S)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read()
    finally:
        connection.close()


def answers(port: int) -> bool:
    try:
        fetch(port)
    except (OSError, http.client.HTTPException):
        return False
    return True


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


@contextlib.contextmanager
def unix(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(TALK_S)
        sock.connect(str(path))
        yield sock


def read_all(sock: socket.socket) -> bytes:
    octets = b""
    while piece := sock.recv(65536):
        octets += piece
    return octets
