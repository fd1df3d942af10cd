"""The tree of ports mounted by Linux: what its 9P client makes of what a shell does, and what our server makes of that.

The server is a task of this process, in the last test the daemon; the guest reaches it as it would any server on the host's
loopback. The cloud kernel of the other tests has no 9P, so this is Debian's ordinary one.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import re
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import dpkt
import pytest

from portfwd.ninep.client import Client
from portfwd.ninep.introspect import TreeFiles
from portfwd.ninep.listen import port_server, tree_server
from portfwd.ninep.ports import README
from pyvpnkit import machine as qemu
from pyvpnkit.boot import Parts
from tests.portfwd.ninep.site import Site as Ports
from tests.qemu.site import Site
from tests.support.machine import Machine
from tests.support.netns import HOST, inside, require, wait_until, world
from tests.support.webhost import read_all

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

MOUNT_S = 30.0
LONG = "".join(f"line {number}\n" for number in range(5000))


class Server:
    """Both trees on the host's loopback, in a thread that belongs to the host's namespace, as its listeners do."""

    def __init__(self, place: Site) -> None:
        self.host = place.host
        self.ports = Ports()
        self.port = self.tree_port = 0
        self._path = place.host.path
        self._ready, self._end = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(MOUNT_S)

    def _run(self) -> None:
        with inside(self._path):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        self.port, self.tree_port = (listener.getsockname()[1] for listener in listeners)
        self.ports.registry.start(self.ports.guests, asyncio.get_running_loop())
        tree = TreeFiles({"flows": lambda: "TCP\n", "capture": {"all.pcap": lambda: LONG}})
        async with (
            port_server(listeners[0], self.ports.table.connect, lambda sock: sock.close()),
            tree_server(listeners[1], lambda: tree),
        ):
            self._ready.set()
            await asyncio.to_thread(self._end.wait)
        self.ports.close()

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def published(self) -> list[str]:
        return [str(forward.spec) for forward in self.ports.registry]

    def reached(self, port: int) -> bool:
        """Whether a client on the host is accepted."""
        with contextlib.suppress(ConnectionRefusedError), self.host.connect("127.0.0.1", port):
            return True
        return False

    def wait_published(self, count: int) -> None:
        wait_until(lambda: len(self.published()) == count, why=lambda: str(self.published()))


@pytest.fixture(scope="module")
def server(place: Site) -> Iterator[Server]:
    made = Server(place)
    yield made
    made.close()


def by_tcp(version: str) -> Callable[[Machine, int, str], str]:
    """The kernel connects."""

    def mount(guest: Machine, port: int, where: str) -> str:
        options = f"trans=tcp,port={port},version={version},msize=8192,dfltuid=1001,dfltgid=50"
        return guest.run(f"mkdir -p {where}; mount -t 9p -o {options} {HOST} {where}", limit_s=MOUNT_S)

    return mount


def by_descriptor(guest: Machine, port: int, where: str) -> str:
    """A program connects and hands the descriptor to mount, as vpnkit-9pmount-vsock does (spec vpnkit 1.4)."""
    options = "trans=fd,dfltuid=1001,dfltgid=50,version=9p2000,msize=4096,rfdno=0,wfdno=1"
    guest.run(f"mkdir -p {where}; nc {HOST} {port} -e /bin/mount -t 9p -o {options} port {where}", limit_s=MOUNT_S)
    return guest.run(f"until grep -q ' {where} 9p ' /proc/mounts; do usleep 10000; done", limit_s=MOUNT_S)


@pytest.fixture(
    params=[by_tcp("9p2000"), by_tcp("9p2000.u"), by_descriptor],
    ids=["9P2000", "9P2000.u", "a descriptor"],
)
def guest(request: pytest.FixtureRequest, place: Site, server: Server) -> Iterator[Machine]:
    """With the ports mounted at /port."""
    made = place.machine()
    request.param(made, server.port, "/port")
    yield made
    made.run("killall sleep; umount /port || umount -l /port", check=False, limit_s=MOUNT_S)
    server.wait_published(0)


_numbers = itertools.count(1)


def hold(guest: Machine, how: str) -> str:
    """A process of its own runs `how`, and then waits with what it has opened; its id."""
    mark = f"/tmp/holds{next(_numbers)}"
    guest.run(
        f"sh -c '{how}; touch {mark}; exec sleep 1000' & echo $! >/tmp/pid; until [ -e {mark} ]; do usleep 10000; done"
    )
    return guest.run("cat /tmp/pid")


REQUEST = "tcp:127.0.0.1:0:tcp:192.168.65.3:80"


def host_port(server: Server) -> int:
    (spec,) = server.published()
    found = re.fullmatch(r"tcp:127\.0\.0\.1:(\d+):192\.168\.65\.3:80", spec)
    assert found is not None, spec
    return int(found[1])


def test_what_is_there(guest: Machine) -> None:
    assert guest.run("ls -a /port").split() == [".", "..", "README"]
    assert guest.run("cat /port/README") == README.rstrip("\n")
    assert guest.run("stat -c '%s %Y %a' /port/README") == "0 1146711721 444"


def test_a_port_lives_and_dies_with_a_process(guest: Machine, server: Server) -> None:
    name = f"/port/{REQUEST}"
    guest.run(f"mkdir {name}")
    assert guest.run(f"ls {name}") == "ctl"
    assert guest.run(f"cat {name}/ctl") == "ERROR no request received. Please read the README."
    assert server.published() == []
    pid = hold(guest, f"exec 3<>{name}/ctl; echo -n {REQUEST} >&3")
    port = host_port(server)
    assert server.reached(port)
    canonical = f"tcp:127.0.0.1:{port}:tcp:192.168.65.3:80"
    for _ in range(3):  # each opens and closes ctl
        assert guest.run(f"cat {name}/ctl") == f"OK {canonical}"
    guest.run(f"ls -la /port {name}", check=False)
    assert server.published(), "looking does not end it"
    guest.run(f"kill -9 {pid}")
    server.wait_published(0)
    assert not server.reached(port)
    assert guest.run("ls /port") == "README"


def test_closing_ctl_is_enough(guest: Machine, server: Server) -> None:
    guest.run("mkdir /port/web")
    gone = "until [ ! -e /port/web ]; do usleep 10000; done"
    said = guest.run(f"exec 3<>/port/web/ctl; echo -n {REQUEST} >&3; cat /port/web/ctl; exec 3>&-; {gone}")
    assert re.fullmatch(r"OK tcp:127\.0\.0\.1:\d+:tcp:192\.168\.65\.3:80", said)
    assert server.published() == []


def test_a_shell_that_truncates(guest: Machine, server: Server) -> None:
    guest.run("mkdir /port/web")
    guest.run(f"echo {REQUEST} >/port/web/ctl")  # open, truncate, write, close
    server.wait_published(0)
    assert guest.run("ls /port") == "README"
    guest.run("mkdir /port/web")
    pid = hold(guest, f"exec >/port/web/ctl; echo {REQUEST}")
    host_port(server)
    guest.run(f"kill -9 {pid}")
    server.wait_published(0)


def test_errors_are_the_kernels_own(guest: Machine, server: Server, place: Site) -> None:
    guest.run("mkdir /port/web")
    for command, words in (
        ("mkdir /port/web", "File exists"),
        ("mkdir /port/README", "File exists"),
        ("cat /port/nothing", "No such file or directory"),
        ("cat /port/web/nothing", "No such file or directory"),
        ("touch /port/file", "Permission denied"),
        ("mkdir /port/web/dir", "Permission denied"),
        ("chmod 777 /port/web/ctl", "Permission denied"),
        ("mv /port/web /port/www", "Permission denied"),
        ("rm /port/README", "Permission denied"),
    ):
        assert words in guest.run(command, check=False), command
    with place.host.listen() as taken:
        port = taken.getsockname()[1]
        pid = hold(guest, f"exec 3<>/port/web/ctl; echo -n tcp:127.0.0.1:{port}:tcp:192.168.65.3:80 >&3")
        assert guest.run("cat /port/web/ctl") == f"ERROR Bind for 127.0.0.1:{port} failed: port is already allocated"
    assert "Permission denied" in guest.run(f"echo -n {REQUEST} >>/port/web/ctl", check=False), "there is one request"
    guest.run(f"kill -9 {pid}")
    guest.run("until [ ! -e /port/web ]; do usleep 10000; done")


def test_removing_the_directory_ends_the_port(guest: Machine, server: Server) -> None:
    guest.run("mkdir /port/web")
    pid = hold(guest, f"exec 3<>/port/web/ctl; echo -n {REQUEST} >&3")
    host_port(server)
    guest.run("rmdir /port/web")
    server.wait_published(0)
    guest.run(f"kill -9 {pid}")


def test_another_mount_sees_a_file_and_its_own_looking_harms_nobody(guest: Machine, server: Server) -> None:
    by_tcp("9p2000.u")(guest, server.port, "/other")
    guest.run("mkdir /port/web")
    pid = hold(guest, f"exec 3<>/port/web/ctl; echo -n {REQUEST} >&3")
    port = host_port(server)
    assert guest.run("ls /other").split() == ["README", "web"]
    assert guest.run("cat /other/web") == f"tcp:127.0.0.1:{port}:tcp:192.168.65.3:80"
    guest.run("umount /other")
    assert server.published()
    guest.run(f"kill -9 {pid}")
    server.wait_published(0)


def test_unmounting_ends_what_is_left(guest: Machine, server: Server) -> None:
    guest.run("mkdir /port/web /port/never")
    hold(guest, f"exec 3<>/port/web/ctl; echo -n {REQUEST} >&3")
    guest.run("killall sleep; umount /port || umount -l /port")
    server.wait_published(0)
    wait_until(lambda: not server.ports.table.entries, why=lambda: str(server.ports.table.entries))


@pytest.mark.parametrize("version", ["9p2000", "9p2000.u"])
def test_the_tree_for_looking_in(place: Site, server: Server, version: str) -> None:
    guest = place.machine()
    by_tcp(version)(guest, server.tree_port, "/look")
    try:
        assert guest.run("find /look").split() == ["/look", "/look/flows", "/look/capture", "/look/capture/all.pcap"]
        assert guest.run("cat /look/flows") == "TCP"
        assert guest.run("wc -c </look/capture/all.pcap") == str(len(LONG))
        assert "Read-only file system" in guest.run("echo >/look/flows", check=False)
        assert "No such file or directory" in guest.run("cat /look/nothing", check=False)
        assert "Operation not permitted" in guest.run("rm /look/flows", check=False)
    finally:
        guest.run("umount /look")


def test_a_guest_publishes_its_web_server_with_the_daemon(ninep_parts: Parts, tmp_path: Path) -> None:
    """By the tree of `--port` alone; meanwhile the host looks in."""
    require("curl")
    with world(tmp_path) as place, place.host.listen() as listener:
        link, number = place.socket_path(), listener.fileno()
        looking = {flag: place.socket_path(flag) for flag in ("introspection", "diagnostics", "pcap")}
        options = [word for flag, path in looking.items() for word in (f"--{flag}", path)]
        daemon = place.daemon("--link", f"qemu:{link}", "--port", f"fd:{number}", *options, pass_fds=[number])
        guest = Machine(place.namespace("qemu"), ninep_parts, qemu.stream(link))
        place.defer(guest.kill)
        guest.run("mkdir -p /www && echo hello >/www/index.html && httpd -h /www -p 80")
        by_tcp("9p2000")(guest, listener.getsockname()[1], "/port")
        guest.run("mkdir /port/web")
        pid = hold(guest, f"exec 3<>/port/web/ctl; echo -n {REQUEST} >&3")
        found = re.fullmatch(r"OK tcp:127\.0\.0\.1:(\d+):tcp:192\.168\.65\.3:80", guest.run("cat /port/web/ctl"))
        assert found is not None
        fetch = ("curl", "-sS", f"http://127.0.0.1:{found[1]}/")
        assert place.host.run(*fetch).stdout == "hello\n"

        with Client(_dial(looking["introspection"])) as client:
            assert re.search(
                rf"^TCP 192\.168\.65\.3:\d+ > {HOST}:\d+ socket = open", client.load("flows").decode(), re.M
            )
            assert b"192.168.65.3" in client.load("ports")
        with _dial(looking["diagnostics"]) as sock, tarfile.open(fileobj=io.BytesIO(read_all(sock))) as tar:
            assert "capture/all.pcap" in tar.getnames() and "flows" in tar.getnames()
        with _dial(looking["pcap"]) as sock:
            captured = sock.makefile("rb")
            assert any(b"GET / HTTP" in frame for _, frame in dpkt.pcap.Reader(captured)), "in the ring or live"
            captured.close()

        guest.run(f"kill -9 {pid}")
        guest.run("until [ ! -e /port/web ]; do usleep 10000; done")
        assert place.host.run(*fetch, check=False).returncode == 7, "curl: could not connect"
        guest.run("umount /port")
        guest.kill()
        assert daemon.stop() == 0, daemon.said()
        assert "Traceback" not in daemon.said(), daemon.said()


def _dial(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(MOUNT_S)
    sock.connect(path)
    return sock
