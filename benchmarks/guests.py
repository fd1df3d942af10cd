"""A guest (a kernel in a network namespace) behind each back-end: ours and its peers, under one interface.

A back-end runs in the run's host namespace, started with the options its own documentation gives for the job and set up so
that the guest reaches the host's 127.0.0.1 at `server`. Nothing but DHCP is measured during set-up, so addresses are set by
hand or by the peer's own configure option.

pasta, started by root: it drops to nobody and then may not enter a namespace of root's, so `--runas 0`; the target is
given as a path (`--netns /run/netns/NAME`), which needs no user namespace; `-u none -T none -U none` and named ports with
`-t`, or its port scan runs during the measurement. The gateway's address of the host namespace is then the host's loopback.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.build import SetupError, build
from benchmarks.guest import Guest
from benchmarks.load import Moved, Servers
from benchmarks.namespaces import HostNamespace
from benchmarks.published import expose_with_slirp4netns
from netstack.errors import HostError
from pyvpnkit import boot
from pyvpnkit import machine as qemu

ROOT = Path(__file__).resolve().parent.parent
JUMBO = 65520


class Loopback(Guest):
    """No guest: the client beside the server. The upper limit of the machine."""

    name = "loopback"
    server = "127.0.0.1"
    resolver = "127.0.0.1"

    def make_namespace(self) -> None:
        """It lives in the host's."""

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net={self.host.path}", "--", *command]

    def launch(self, *, bare: bool = False) -> None:
        """Nothing to start."""

    def attach(self) -> None:
        """Nothing to configure."""


class Veth(Guest):
    """Kernel to kernel over a veth pair: what a guest could get without any user-mode back-end."""

    name = "veth"
    server = "10.111.0.1"
    resolver = "10.111.0.1"
    publishes = True
    published_at = "10.111.0.2"

    def launch(self, *, bare: bool = False) -> None:
        self.host.ip("link", "add", "ve0", "type", "veth", "peer", "name", "eth0", "netns", self.guest.name)

    def attach(self) -> None:
        self.host.ip("address", "add", f"{self.server}/24", "dev", "ve0")
        self.host.ip("link", "set", "ve0", "up")
        self.guest.configure("eth0", f"{self.published_at}/24", self.server)


class Pasta(Guest):
    """pasta over its TAP, as root in an existing namespace (see the module's text)."""

    name = "pasta"
    server = HostNamespace.gateway
    resolver = HostNamespace.gateway
    offers_dhcp = True
    publishes = True

    @classmethod
    def missing(cls) -> str | None:
        return None if shutil.which("pasta") else "pasta is not on PATH"

    def launch(self, *, bare: bool = False) -> None:
        ports = f"{self.published.netload},{self.published.iperf3}"
        forwards = ["-t", ports, "-u", "none", "-T", "none", "-U", "none"]
        configure = [] if bare else ["--config-net"]
        self.run_backend(
            "pasta",
            "-4",
            "-f",
            "-q",
            "--runas",
            "0",
            *configure,
            *forwards,
            "-I",
            self.interface,
            "--netns",
            self.guest.path,
        )

    def attach(self) -> None:
        self.wait_for(self.interface, lambda: "default" in self.guest.ip("route", "show"))


class Slirp4netns(Guest):
    """slirp4netns at its default MTU."""

    name = "slirp4netns"
    server = "10.0.2.2"
    resolver = "10.0.2.3"
    offers_dhcp = True
    interface = "tap0"
    mtu = 1500
    publishes = True

    @classmethod
    def missing(cls) -> str | None:
        return None if shutil.which("slirp4netns") else "slirp4netns is not on PATH"

    def launch(self, *, bare: bool = False) -> None:
        configure = [] if bare else ["--configure"]
        options = [f"--mtu={self.mtu}", f"--api-socket={self._api}", "--netns-type=path"]
        self.run_backend("slirp4netns", *configure, *options, self.guest.path, self.interface)

    def attach(self) -> None:
        self.wait_for(self.interface, lambda: "default" in self.guest.ip("route", "show"))
        self.wait_for("the API socket", self._api.exists)
        expose_with_slirp4netns(self._api, self.published)

    @property
    def _api(self) -> Path:
        return self.directory / f"{self.label}.api"


class Slirp4netnsJumbo(Slirp4netns):
    name = "slirp4netns-65520"
    mtu = JUMBO


class Bridged(Guest):
    """A kernel guest behind a QEMU-style stream socket, through `framebridge`."""

    mtu = 1500
    address: str
    gateway: str
    offers_dhcp = True
    bridge: subprocess.Popen[str] | None = None

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.label}.sock"

    def bridge_command(self) -> list[str]:
        return [str(build("framebridge")), self.interface, str(self.mtu), str(self.socket)]

    def start_bridge(self) -> None:
        """It waits for the back-end's socket by itself."""
        self.bridge = self.spawn(*self.inside(*self.bridge_command()))

    def require_bridge(self) -> subprocess.Popen[str]:
        """The bridge; raises `SetupError` when it has ended."""
        if self.bridge is None or self.bridge.poll() is not None:
            raise SetupError(f"{self.label} has no bridge:\n{self.log_tail()}")
        return self.bridge

    def attach(self) -> None:
        if self.bridge is None:
            self.start_bridge()
        self.wait_for(self.interface, lambda: self.require_bridge() and self.guest.has(self.interface))
        self.guest.configure(self.interface, self.address, self.gateway)

    def dhcp_client(self, seconds: float) -> list[str]:
        return [str(build("netload")), "dhcp-qemu", str(self.socket), str(seconds)]


class Ring(Bridged):
    """A kernel guest behind a vhost-user back-end: `ringbridge` has the guest's memory and its virtqueues.

    The bridge belongs to the guest and is started with it, so start-up includes the set-up of the rings.
    """

    @property
    def statistics(self) -> Path:
        return self.directory / f"{self.label}.stats"

    def bridge_command(self) -> list[str]:
        statistics = ("--stats", str(self.statistics))
        return [str(build("ringbridge")), *statistics, self.interface, str(self.mtu), str(self.socket)]

    def launch(self, *, bare: bool = False) -> None:
        self.launch_backend()
        self.start_bridge()

    @abstractmethod
    def launch_backend(self) -> None:
        """Exec the back-end, to listen on `socket`."""

    def dhcp_client(self, seconds: float) -> list[str]:
        return Guest.dhcp_client(self, seconds)

    def counters(self) -> dict[str, int]:
        """Frames, kicks and calls, from the bridge (`ringbridge.c`)."""
        self.statistics.unlink(missing_ok=True)
        self.require_bridge().send_signal(signal.SIGUSR1)
        self.wait_for("the bridge's statistics", self.statistics.exists)
        counted: dict[str, int] = json.loads(self.statistics.read_text())
        return counted


class _Pyvpnkit:
    """What our daemon's guests have in common."""

    server = "192.168.65.2"
    resolver = "192.168.65.1"
    address = "192.168.65.3/24"
    gateway = "192.168.65.1"
    offers_dhcp = True
    python = sys.executable
    options: tuple[str, ...] = ()

    @staticmethod
    def command(link: str, *options: str) -> list[str]:
        more = ["--state-dir", "off", "--log-level", "warning", *options, *_Pyvpnkit.options]
        return [_Pyvpnkit.python, "-m", "pyvpnkit", "run", "--link", link, *more]


class PyvpnkitTap(_Pyvpnkit, Guest):
    """Our daemon on a TAP with virtio-net header and offloads."""

    name = "pyvpnkit-tap"
    scheme = "tap"
    publishes = True

    def launch(self, *, bare: bool = False) -> None:
        ports = (self.published.netload, self.published.iperf3)
        guest = self.address.partition("/")[0]
        publish = [word for port in ports for word in ("--publish", f"0.0.0.0:{port}:{guest}:{port}")]
        self.run_backend(*self.command(f"{self.scheme}:netns={self.guest.name}", *publish), cwd=ROOT)

    def attach(self) -> None:
        self.wait_for(self.interface, lambda: self.guest.has(self.interface))
        self.guest.configure(self.interface, self.address, self.gateway)


class PyvpnkitPacket(PyvpnkitTap):
    """Our daemon on a packet socket: the way without /dev/net/tun."""

    name = "pyvpnkit-packet"
    scheme = "packet"


class PyvpnkitQemu(_Pyvpnkit, Bridged):
    """Our daemon behind a QEMU-style stream at MTU 1500: every frame and checksum by itself."""

    name = "pyvpnkit-qemu"

    def launch(self, *, bare: bool = False) -> None:
        self.run_backend(*self.command(f"qemu:{self.socket}", "--mtu", str(self.mtu)), cwd=ROOT)


class PyvpnkitQemuJumbo(PyvpnkitQemu):
    name = "pyvpnkit-qemu-65520"
    mtu = JUMBO


class PyvpnkitRing(_Pyvpnkit, Ring):
    """Our daemon on vhost-user, MTU 1500: mergeable receive buffers of a page, offloads as on the TAP."""

    name = "pyvpnkit-ring"

    def launch_backend(self) -> None:
        self.run_backend(*self.command(f"vhost-user:{self.socket}"), cwd=ROOT)


class PyvpnkitRingTcp(_Pyvpnkit, Guest):
    """The same link, and behind it a TCP in the memory of the rings: `ringload`, started anew for each run."""

    name = "pyvpnkit-ring-tcp"
    offers_dhcp = False
    only_lasting = True

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.label}.sock"

    def make_namespace(self) -> None:
        """It has no kernel."""

    def launch(self, *, bare: bool = False) -> None:
        self.run_backend(*self.command(f"vhost-user:{self.socket}"), cwd=ROOT)

    def attach(self) -> None:
        self.wait_for("the socket", self.socket.exists)

    def probe(self, servers: Servers, limit_s: float) -> list[str]:
        return self.bulk(servers, streams=1, down=False, seconds=0)

    def bulk(self, servers: Servers, *, streams: int, down: bool, seconds: float) -> list[str]:
        return self._ringload("down" if down else "up", servers, streams, seconds)

    def moved(self, report: Mapping[str, Any]) -> Moved:
        return Moved(bits_per_second=report["bits_per_second"], octets=report["total"])

    def operations(self, verb: str, servers: Servers, *, connections: int, seconds: float) -> list[str]:
        assert verb == "rr"
        return self._ringload(verb, servers, connections, seconds)

    def counted(self, report: Mapping[str, Any]) -> Mapping[str, int]:
        return {name: report[name] for name in ("frames_out", "kicks_out")}

    def _ringload(self, verb: str, servers: Servers, streams: int, seconds: float) -> list[str]:
        where = (str(self.socket), verb, self.server, str(servers.netload))
        return [str(build("ringload")), *where, str(streams), str(seconds)]


class PyvpnkitVm(_Pyvpnkit, Guest):
    """Our daemon on vhost-user, and a machine: QEMU without KVM, Debian's kernel, virtio-net, busybox (`pyvpnkit.boot`).

    It is told what to do on its console; no program of ours runs inside.
    """

    name = "pyvpnkit-vm"
    scheme = "vhost-user"
    is_machine = True
    machine: qemu.Machine | None = None

    @staticmethod
    def card(path: str) -> qemu.Card:
        return qemu.shared_ring(path)

    @classmethod
    def missing(cls) -> str | None:
        for program in (qemu.QEMU, "setpriv"):
            if shutil.which(program) is None:
                return f"{program} is not on PATH"
        try:
            with tempfile.TemporaryDirectory() as scratch:
                boot.parts(Path(scratch), boot.cache())  # downloads the kernel, the first time
        except HostError as error:
            return str(error)
        return None

    @property
    def socket(self) -> Path:
        return self.directory / f"{self.label}.sock"

    def launch(self, *, bare: bool = False) -> None:
        self.run_backend(*self.command(f"{self.scheme}:{self.socket}"), cwd=ROOT)

    def attach(self) -> None:
        """Boot, and wait for the lease that the machine takes."""
        self.wait_for("the socket", self.socket.exists)
        try:
            command = qemu.command(boot.parts(self.directory, boot.cache()), self.card(str(self.socket)))
            self.machine = qemu.Machine(self.inside(*command))
            self.machine.wait_up()
        except HostError as error:
            raise SetupError(f"{self.label}: {error}\n{self.log_tail()}") from None
        if not self.machine.address:
            raise SetupError(f"{self.label} has no lease:\n{self.machine.said()}\n{self.log_tail()}")

    def probe(self, servers: Servers, limit_s: float) -> list[str]:
        raise NotImplementedError("it is asked on its console")

    def shell(self, line: str, limit_s: float) -> str:
        """What a line of shell prints in the machine. Raises `pyvpnkit.machine.MachineError` where it fails."""
        if self.machine is None:
            raise SetupError(f"{self.label} was not booted")
        return self.machine.run(line, limit_s=limit_s)

    def fetch(self, servers: Servers, octets: int, file: str, limit_s: float = 60.0) -> None:
        """From the host's server into a file, all of it: wget fails where it ends early."""
        self.shell(f"wget -q -O {file} http://{self.server}:{servers.netload}/{octets}", limit_s)

    def post(self, servers: Servers, file: str, limit_s: float = 60.0) -> int:
        """A file to the host's server; how many octets that says it got. Not one with a NUL: wget takes it for a text."""
        return int(self.shell(f"wget -q -O - --post-file {file} http://{self.server}:{servers.netload}/", limit_s))

    def counters(self) -> dict[str, int]:
        """Frames and kicks, from the daemon's summary; empty where its link counts none."""
        assert self.backend is not None
        before = self.log.stat().st_size
        counted: list[dict[str, int]] = []

        def told() -> bool:
            found = link_counters(self.log.read_bytes()[before:].decode(errors="replace"))
            counted.extend([] if found is None else [found])
            return bool(counted)

        self.backend.send_signal(signal.SIGUSR1)
        self.wait_for("the daemon's summary", told)
        return counted[0]

    def stop(self) -> None:
        if self.machine is not None:
            self.machine.kill()
        super().stop()


class PyvpnkitVmStream(PyvpnkitVm):
    """The same machine, on a stream socket."""

    name = "pyvpnkit-vm-stream"
    scheme = "qemu"

    @staticmethod
    def card(path: str) -> qemu.Card:
        return qemu.stream(path)


def link_counters(summary: str) -> dict[str, int] | None:
    """Frames and kicks of the link in the summary that SIGUSR1 brings; empty where it counts none, or is not there; None while
    the summary has not come as far."""
    links = re.search(r"^links: \S+\n((?:  .*\n)*)(?=\S)", summary, re.MULTILINE)
    if links is None:
        return None
    told = re.search(r" frames_outbound=(\d+) kicks=(\d+) ", links[1])
    return {"frames_out": int(told[1]), "kicks_out": int(told[2])} if told else {}


class PasstRing(Ring):
    """passt on vhost-user, at the MTU that it gives its guests."""

    name = "passt-ring"
    server = HostNamespace.gateway
    resolver = HostNamespace.gateway
    address = f"{HostNamespace.address}/24"
    gateway = HostNamespace.gateway
    mtu = JUMBO

    @classmethod
    def missing(cls) -> str | None:
        if shutil.which("passt") is None:
            return "passt is not on PATH"
        told = subprocess.run(["passt", "--help"], capture_output=True, text=True)
        return None if "--vhost-user" in told.stdout + told.stderr else "this passt has no --vhost-user"

    def launch_backend(self) -> None:
        forwards = ["-t", "none", "-u", "none"]
        options = ["-4", "-q", "--runas", "0", *forwards]
        self.run_backend("passt", "--foreground", "--vhost-user", "-s", str(self.socket), *options)


class Gvproxy(Bridged):
    """gvproxy (gvisor-tap-vsock) behind the same bridge."""

    name = "gvproxy"
    server = "192.168.127.254"
    resolver = "192.168.127.1"
    address = "192.168.127.3/24"
    gateway = "192.168.127.1"

    @classmethod
    def missing(cls) -> str | None:
        return None if shutil.which("gvproxy") else "gvproxy is not on PATH"

    def launch(self, *, bare: bool = False) -> None:
        self.run_backend("gvproxy", "-listen-qemu", f"unix://{self.socket}", "-mtu", str(self.mtu), "-ssh-port", "-1")


GUESTS: dict[str, type[Guest]] = {
    kind.name: kind
    for kind in (
        Loopback,
        Veth,
        Pasta,
        Slirp4netns,
        Slirp4netnsJumbo,
        Gvproxy,
        PasstRing,
        PyvpnkitTap,
        PyvpnkitPacket,
        PyvpnkitRing,
        PyvpnkitRingTcp,
        PyvpnkitQemu,
        PyvpnkitQemuJumbo,
        PyvpnkitVm,
        PyvpnkitVmStream,
    )
}
BY_DEFAULT = tuple(name for name in GUESTS if name != PyvpnkitPacket.name)
