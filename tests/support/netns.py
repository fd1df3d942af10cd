"""Guests and a host that are Linux kernels of their own: network namespaces, as root, with a daemon between them.

    guest namespace: eth0 ---- link ---- pyvpnkit run in the host's namespace: 127.0.0.1, and what a test adds

The host is a namespace too: its ports, routes, resolvers and `ping_group_range` are the test's own, and nothing here
reaches a real network. Programs run by `Namespace.run`; sockets of the test's own process are made by `Namespace.socket`,
since only the moment of creation decides to which namespace a socket belongs.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GATEWAY, HOST = "192.168.65.1", "192.168.65.2"
LIMIT_S = 20.0
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def require(*programs: str) -> None:
    """Skip where namespaces cannot be made; a program that is missing on a machine that has them is a failure."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("expected: network namespaces with names need Linux and root")
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        pytest.skip("expected: /dev/net/tun may not be opened here")
    made = subprocess.run(["unshare", "--net", "--mount", "true"], check=False, capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"expected: namespaces may not be made here: {made.stderr.strip()}")
    missing = [program for program in programs if shutil.which(program) is None]
    assert not missing, f"not installed: {', '.join(missing)} (packages.txt, `make packages`)"


@contextlib.contextmanager
def inside(path: str) -> Iterator[None]:
    """This thread's new sockets belong to the network namespace at `path`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(path) as there:
        if libc.setns(there.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), _CLONE_NEWNET):
                os.abort()  # lost in a namespace: nothing that follows could be believed


class Namespace:
    """A network namespace with loopback up, a host name of its own, and an /etc of its own that programs may write to."""

    def __init__(self, label: str) -> None:
        self.name = f"pvk{os.getpid()}{label}{next(_numbers)}"
        self.path = f"/run/netns/{self.name}"
        self._children: list[subprocess.Popen[str]] = []
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        self.ip("link", "set", "lo", "up")
        # One process holds the mounts; /etc/resolv.conf must be a file, for a link would lead out of here.
        script = (
            "hostname guest; cp -a /etc /run/etc-copy && mount --bind /run/etc-copy /etc && "
            "rm -f /etc/resolv.conf && : >/etc/resolv.conf && echo ready && exec sleep infinity"
        )
        script = f"mount -t tmpfs none /run && {script}"
        self._holder = subprocess.Popen(
            ["nsenter", f"--net={self.path}", "unshare", "--mount", "--uts", "sh", "-c", script],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"
        self.sysctl("net.ipv4.ip_local_port_range", "10000 60000")

    def close(self) -> None:
        for child in self._children:
            if child.poll() is None:
                child.kill()
            child.communicate()
        self._holder.kill()
        self._holder.communicate()
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True)

    def ip(self, *words: str) -> str:
        done = subprocess.run(["ip", "-n", self.name, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
        return done.stdout

    def sysctl(self, key: str, value: str) -> None:
        with inside(self.path), open(f"/proc/sys/{key.replace('.', '/')}", "w") as file:
            file.write(value)

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` in here; the process keeps its id."""
        pid = self._holder.pid
        return ["nsenter", f"--net={self.path}", f"--mount=/proc/{pid}/ns/mnt", f"--uts=/proc/{pid}/ns/uts", *words]

    def run(self, *words: str, limit_s: float = LIMIT_S, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=limit_s, check=False, cwd="/"
        )
        said = f"{' '.join(words)}: status {done.returncode}\n{done.stdout}{done.stderr}"
        assert not check or done.returncode == 0, said
        return done

    def start(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """A program that goes on; ended with the namespace at the latest."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": "/"} | options
        child: subprocess.Popen[str] = subprocess.Popen(self.command(*words), **options)
        self._children.append(child)
        return child

    def read(self, path: str) -> str:
        """A file as programs in here see it."""
        return self.run("cat", path).stdout

    def socket(self, kind: int = socket.SOCK_STREAM, protocol: int = 0, *, limit_s: float = LIMIT_S) -> socket.socket:
        with inside(self.path):
            made = socket.socket(socket.AF_INET, kind, protocol)
        made.settimeout(limit_s)
        return made

    def connect(self, address: str, port: int, **options: Any) -> socket.socket:
        made = self.socket(**options)
        try:
            made.connect((address, port))
        except BaseException:
            made.close()
            raise
        return made

    def listen(self, address: str = "127.0.0.1", port: int = 0, backlog: int = 128) -> socket.socket:
        made = self.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(backlog)
        return made

    def datagrams(self, address: str = "127.0.0.1", port: int = 0) -> socket.socket:
        made = self.socket(socket.SOCK_DGRAM)
        made.bind((address, port))
        return made

    def address(self, interface: str = "eth0") -> str:
        """The IPv4 address of `interface`, or nothing."""
        words = self.ip("-4", "-o", "addr", "show", "dev", interface).split()
        return words[words.index("inet") + 1].partition("/")[0] if "inet" in words else ""

    def udhcpc(self, *options: str, interface: str = "eth0") -> str:
        """A lease by busybox and the script that Debian gives it; the address."""
        self.ip("link", "set", interface, "up")
        words = ["busybox", "udhcpc", "-i", interface, "-s", str(udhcpc_script())]
        words += ["-n", "-q", "-f", "-t", "20", "-T", "1"]
        self.run(*words, *options)
        return self.address(interface)


def udhcpc_script() -> Path:
    """What configures the interface for udhcpc: the distribution's, or ours where it has none."""
    debian = Path("/etc/udhcpc/default.script")
    return debian if debian.exists() else ROOT / "pyvpnkit" / "udhcpc.script"


class Daemon:
    """`pyvpnkit run` in the host's namespace, ready for guests; what it says goes to `directory/log`.

    `wrap` is a command that executes what follows it (prlimit, unshare), so that the process stays the daemon.
    """

    def __init__(
        self,
        host: Namespace,
        directory: Path,
        *options: str,
        pass_fds: Sequence[int] = (),
        wrap: Sequence[str] = (),
    ) -> None:
        self.log = directory / "log"
        ready, ready_in_child = os.pipe()
        resolv_conf, hosts = directory / "resolv.conf", directory / "hosts"
        for path in (resolv_conf, hosts):
            path.touch()
        argv = [sys.executable, "-m", "pyvpnkit", "run", "--ready-fd", str(ready_in_child), *options]
        for flag, value in (
            ("--state-dir", "off"),
            ("--dns-resolv-conf", str(resolv_conf)),
            ("--dns-hosts-file", str(hosts)),
        ):
            if flag not in options:
                argv += [flag, value]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", f"--net={host.path}", *wrap, *argv],
                stderr=log,
                pass_fds=(ready_in_child, *pass_fds),
                cwd=ROOT,
            )
        os.close(ready_in_child)
        readable, _, _ = select.select([ready], [], [], LIMIT_S)
        said = os.read(ready, 10) if readable else b"nothing"
        if said == b"1":
            os.read(ready, 1)  # the end: the daemon has closed it, and nobody counts it among the descriptors
        os.close(ready)
        if said != b"1":
            self.close()
            raise AssertionError(f"ready: {said!r}\n{self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_said(self, words: str, limit_s: float = LIMIT_S) -> None:
        wait_until(lambda: words in self.said(), limit_s, lambda: f"never said {words!r}:\n{self.said()}")

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def wait_descriptors(self, at_most: int, limit_s: float = LIMIT_S) -> None:
        """Until no more than `at_most` descriptors are open."""
        wait_until(lambda: self.descriptors() <= at_most, limit_s, lambda: f"{self._open()}")

    def _open(self) -> dict[str, str]:
        folder = f"/proc/{self.process.pid}/fd"
        return {name: os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}

    def rss_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024

    def stop(self, limit_s: float = LIMIT_S) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(limit_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def wait_until(true: Callable[[], bool], limit_s: float = LIMIT_S, why: Callable[[], str] = lambda: "") -> None:
    """Look every few milliseconds, for what another process does."""
    end = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end, why()
        time.sleep(0.01)


class World:
    """The namespaces, daemons and relays of some tests; everything ends with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()
        self.host = self.namespace("host")
        self.host.sysctl("net.ipv4.ping_group_range", "0 2147483647")

    def close(self) -> None:
        self._stack.close()

    def namespace(self, label: str = "guest") -> Namespace:
        made = Namespace(label)
        self._stack.callback(made.close)
        return made

    def daemon(self, *options: str, **more: Any) -> Daemon:
        made = Daemon(self.host, self.directory, *options, **more)
        self._stack.callback(made.close)
        return made

    def socket_path(self, name: str = "net.sock") -> str:
        return str(self.directory / name)

    def relay(self, guest: Namespace, link: str, *options: str, **more: Any) -> Relay:
        made = Relay(guest, link, *options, **more)
        self._stack.callback(made.close)
        return made

    def defer(self, close: Callable[[], object]) -> None:
        self._stack.callback(close)


class Relay:
    """`relay.py` in the guest's namespace: eth0 is a TAP of its own, its frames go to a socket link of the daemon."""

    def __init__(self, guest: Namespace, link: str, *options: str, pass_fds: Sequence[int] = ()) -> None:
        script = str(Path(__file__).with_name("relay.py"))
        words = guest.command(sys.executable, script, link, *options)
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds, cwd="/")
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        assert said.startswith("ready"), f"relay: {said!r}"
        self.mac = said.split()[1]

    def stop(self) -> str:
        """End it; what it counted, as one line."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
        return self.process.communicate(timeout=LIMIT_S)[0]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def world(directory: Path) -> Iterator[World]:
    made = World(directory)
    try:
        yield made
    finally:
        made.close()
