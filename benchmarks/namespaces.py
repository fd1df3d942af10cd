"""Network namespaces of one run, named by its process id, and the host side of the measurement.

The "host" of a run is a namespace too: servers may listen on any address and use any port there, nothing reaches the real
network, and its resolver is ours (`ip netns exec` binds /etc/netns/NAME/resolv.conf over /etc/resolv.conf).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from benchmarks.build import SetupError

_PREFIX = "pvkbench"
_RUN = Path("/run/netns")
_ETC = Path("/etc/netns")


def run(*command: str) -> str:
    """Run to the end and return standard output; raises `SetupError` with what the command said."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def require() -> None:
    """Raises `SetupError` where namespaces cannot be made."""
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            raise SetupError(f"{tool} is missing (apt-get install iproute2 util-linux)")
    if os.geteuid() != 0:
        raise SetupError("the benchmarks make network namespaces and TAP devices for every back-end: run them as root")


def remove_stale() -> None:
    """Remove what a killed run left behind."""
    for path in (*_RUN.glob(f"{_PREFIX}*"), *_ETC.glob(f"{_PREFIX}*")):
        owner = re.match(rf"{_PREFIX}(\d+)-", path.name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            if path.parent == _ETC:
                shutil.rmtree(path, ignore_errors=True)
            else:
                subprocess.run(["ip", "netns", "delete", path.name], capture_output=True)


class Namespace:
    """One network namespace, with loopback up and the whole port range for clients."""

    def __init__(self, label: str) -> None:
        self.name = f"{_PREFIX}{os.getpid()}-{label}"
        self.path = str(_RUN / self.name)
        run("ip", "netns", "add", self.name)
        self.ip("link", "set", "lo", "up")
        for setting in ("net.ipv4.ip_local_port_range=1024 65000", "net.ipv6.conf.all.disable_ipv6=1"):
            with contextlib.suppress(SetupError):  # a kernel without IPv6 has no such setting
                run(*self.inside("sysctl", "-qw", setting))

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` in the namespace; the process id stays that of the command."""
        return ["nsenter", f"--net={self.path}", "--", *command]

    def ip(self, *arguments: str) -> str:
        return run("ip", "-n", self.name, *arguments)

    def has(self, interface: str) -> bool:
        """Whether the interface exists."""
        return f" {interface}:" in self.ip("-o", "link", "show").replace("@", ": @")

    def octets(self, interface: str) -> tuple[int, int]:
        """Received and sent by the interface so far."""
        [link] = json.loads(self.ip("-s", "-j", "link", "show", "dev", interface))
        return link["stats64"]["rx"]["bytes"], link["stats64"]["tx"]["bytes"]

    def configure(self, interface: str, address: str, gateway: str, mtu: int | None = None) -> None:
        """Address, MTU and default route by hand, as a DHCP client would set them."""
        self.ip("link", "set", interface, "up", *(["mtu", str(mtu)] if mtu else []))
        self.ip("address", "replace", address, "dev", interface)
        self.ip("route", "replace", "default", "via", gateway, "dev", interface)

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "delete", self.name], capture_output=True)


class HostNamespace(Namespace):
    """Where the servers and the back-ends run: a default route over a dummy interface, a resolver at 127.0.0.1."""

    address = "198.51.100.2"
    gateway = "198.51.100.1"

    def __init__(self) -> None:
        super().__init__("host")
        self._etc = _ETC / self.name
        self._etc.mkdir(parents=True)
        (self._etc / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        try:
            self.ip("link", "add", "up0", "type", "dummy")
        except SetupError:  # no dummy driver: one end of a veth serves as well
            self.ip("link", "add", "up0", "type", "veth", "peer", "name", "up1")
            self.ip("link", "set", "up1", "up")
        self.configure("up0", f"{self.address}/24", self.gateway)

    def inside(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *command]

    def delete(self) -> None:
        super().delete()
        shutil.rmtree(self._etc, ignore_errors=True)
        with contextlib.suppress(OSError):
            _ETC.rmdir()
