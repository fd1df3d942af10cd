"""What every guest of the benchmarks has in common: its namespace, its back-end's process, and the command lines of the load."""

from __future__ import annotations

import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import load
from benchmarks.build import SetupError, build
from benchmarks.load import Moved, Servers
from benchmarks.namespaces import HostNamespace, Namespace
from benchmarks.processes import Cpu, end, tree_cpu_seconds, tree_rss_mib
from benchmarks.published import WayIn, free_ports


class Guest(ABC):
    """One guest and its back-end. `start`, measure, `stop`; a stopped one is not started again."""

    name: str
    server: str
    """Where the guest finds servers that listen on the host's loopback."""
    resolver: str
    """Where the guest asks for names; the answers come from the run's own server on the host."""
    offers_dhcp = False
    only_lasting = False
    """Nothing but TCP over connections that stay can be run in it."""
    is_machine = False
    """It has cases of its own, and can run nothing else; nor can any other guest run those."""
    interface = "eth0"
    """Of the guest."""
    publishes = False
    """Whether the host's clients get to servers in the guest, at `published_at` and the ports `published`."""
    published_at = HostNamespace.address

    def __init__(self, host: HostNamespace, directory: Path, label: str) -> None:
        self.host = host
        self.directory = directory
        self.label = label
        self.backend: subprocess.Popen[str] | None = None
        self.log = directory / f"{label}.log"
        self._children: list[subprocess.Popen[str]] = []
        self.namespace: Namespace | None = None
        self.published = free_ports()
        """The same at the host and in the guest."""
        self._way_in: WayIn | None = None

    @classmethod
    def missing(cls) -> str | None:
        """Why this back-end cannot be measured here, or None."""
        return None

    def start(self) -> None:
        """Start the back-end and give the guest its network."""
        self.make_namespace()
        self.launch()
        self.attach()

    def make_namespace(self) -> None:
        self.namespace = Namespace(self.label)

    @property
    def guest(self) -> Namespace:
        if self.namespace is None:
            raise SetupError(f"{self.label} has no namespace yet")
        return self.namespace

    def inside(self, *command: str) -> list[str]:
        """The command line that runs `command` in the guest."""
        return self.guest.inside(*command)

    @abstractmethod
    def launch(self, *, bare: bool = False) -> None:
        """Exec the back-end; `bare` leaves the guest's interface unconfigured, for a DHCP client."""

    @abstractmethod
    def attach(self) -> None:
        """Wait for the link and configure the guest."""

    def dhcp_client(self, seconds: float) -> list[str]:
        """The command line that prints when the first DHCP offer came; started before `launch`."""
        return self.inside(str(build("netload")), "dhcp-tap", self.interface, str(seconds))

    def probe(self, servers: Servers, limit_s: float) -> list[str]:
        """The command line that ends well once the guest got an answer of the server on the host."""
        return self.inside(*load.netload("probe", self.server, servers.netload, limit_s))

    def bulk(self, servers: Servers, *, streams: int, down: bool, seconds: float) -> list[str]:
        """The command line that moves octets over TCP, from the host when `down`, and prints JSON for `moved`."""
        return self.inside(
            *load.iperf3(self.server, servers.iperf3, streams=streams, from_server=down, seconds=seconds)
        )

    def moved(self, report: Mapping[str, Any]) -> Moved:
        return load.moved(report)

    def operations(self, verb: str, servers: Servers, *, connections: int, seconds: float) -> list[str]:
        """The command line for round trips, `verb` (of `netload.c`), that prints JSON as `netload` does."""
        return self.inside(*load.netload(verb, self.server, servers.netload, connections, seconds))

    def way_in(self) -> WayIn:
        """The guest's servers, started when first asked for, and how the host's clients get to them."""
        if self._way_in is None:
            log = self.directory / f"{self.label}.iperf3"
            log.touch()
            iperf3 = ("iperf3", "-s", "-p", str(self.published.iperf3), "--forceflush", "--logfile", str(log))
            self.spawn(*self.inside(*iperf3))
            self.spawn(*self.inside(*load.netload("serve", "0.0.0.0", self.published.netload)))
            self.wait_for("iperf3 in the guest", lambda: "listening" in log.read_text())
            self._way_in = WayIn(
                host=self.host,
                guest=self.guest,
                interface=self.interface,
                address=self.published_at,
                ports=self.published,
            )
        return self._way_in

    def counted(self, report: Mapping[str, Any]) -> Mapping[str, int]:
        """As `counters`, of the client's run alone, where the client itself is the network card."""
        return {}

    def spawn(self, *command: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=cwd
            )
        self._children.append(child)
        return child

    def run_backend(self, *command: str, cwd: Path | None = None) -> None:
        self.backend = self.spawn(*self.host.inside(*command), cwd=cwd)

    def wait_for(self, what: str, ready: Callable[[], object], limit_s: float = 15.0) -> None:
        """Poll until `ready()` is true; raises `SetupError` with the end of the log."""
        end_at = time.monotonic() + limit_s
        while not ready():
            if self.backend is not None and self.backend.poll() is not None:
                raise SetupError(f"{self.label} ended with status {self.backend.returncode}:\n{self.log_tail()}")
            if time.monotonic() > end_at:
                raise SetupError(f"{self.label}: {what} did not come up in {limit_s:g} s:\n{self.log_tail()}")
            time.sleep(0.01)

    def log_tail(self) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if "syslog" not in line]
        return "\n".join(lines[-12:])

    @property
    def measured(self) -> bool:
        """Whether there is a back-end process whose CPU and memory can be told."""
        return self.backend is not None

    def cpu_seconds(self) -> Cpu:
        """CPU time of the back-end's processes so far; raises `ProcessLookupError` when it has ended."""
        return tree_cpu_seconds(self.backend.pid) if self.backend else Cpu(0.0, 0.0)

    def counters(self) -> dict[str, int]:
        """What the guest's network card has counted so far, by name; empty where nothing counts."""
        return {}

    def rss_mib(self) -> float:
        return tree_rss_mib(self.backend.pid) if self.backend else 0.0

    def stop(self) -> None:
        for child in reversed(self._children):
            end(child)
        if self.namespace is not None:
            self.namespace.delete()
