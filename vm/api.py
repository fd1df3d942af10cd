"""What a virtual machine is made of, and what each companion offers (spec companions, section 5).

    VmSpec --Hypervisor.plan--> Plan --Hypervisor.start--> Machine
      |                          |
      |                          +-- Sidecar: programs that must run beside it (our network, vsock, virtiofsd, a bridge)
      +-- Share --FileShare.plan--> Endpoint: what the hypervisor is told, what the guest is to mount

`plan` is pure: it opens and starts nothing, so what a driver does can be read and tested word for word. A companion that cannot do
what is asked raises `Unsupported`, which says who could. Companions of others register by the entry point groups `HYPERVISORS`
and `FILESYSTEMS` (an object that is a `Hypervisor` or a `FileShare`, or a class of one without arguments).

All paths are absolute. Sockets of Unix have at most 107 octets of path, so a `StateDir` checks them before anything starts.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, Literal, Protocol
from uuid import UUID

from netstack.errors import ConfigError

HYPERVISORS: Final = "pyvpnkit.companions"
"""Entry point group; names are those of `hypervisor.driver`."""
FILESYSTEMS: Final = "pyvpnkit.companions.filesystems"
"""Entry point group; names are those of a share's `kind`."""

NicKind = Literal["vmnet", "qemu-stream", "qemu-dgram", "unixgram", "vhost-user", "tap", "none"]
ShareKind = Literal["9p-local", "9p-socket", "9p-vsock", "virtiofs"]
Owner = Literal["passthrough", "squash", "mapped", "requester"]
VsockKind = Literal["hyperkit", "hybrid", "per-port", "kernel", "vhost-user"]
"""How the host reaches ports of the guest (spec companions 1.2): HyperKit's `connect`; CONNECT and OK on one socket; one socket for
each port; AF_VSOCK; our own device, which has the first two."""

MAX_SOCKET_PATH: Final = 107


class Unsupported(ConfigError):
    """A companion cannot do what is asked. `able` are the names of those that could."""

    def __init__(self, driver: str, what: str, able: Sequence[str] = ()) -> None:
        could = f"; {', '.join(able)} could" if able else ""
        super().__init__(f"{driver}: {what}{could}")
        self.driver = driver
        self.what = what
        self.able = tuple(able)


# What is wanted.


@dataclass(frozen=True, slots=True, kw_only=True)
class Nic:
    """One network card. `socket` is the link's, whichever side listens; `tap` names a TAP for kind `tap`."""

    kind: NicKind
    socket: Path | None = None
    uuid: UUID | None = None
    """VMN3T's: who has the same again gets the same address again."""
    mac: str | None = None
    mtu: int = 1500
    preferred_ip: IPv4Address | None = None
    tap: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """`size` in octets: what an absent file is made with; `None`: it must be there."""

    path: Path
    size: int | None = None
    format: Literal["raw", "qcow2"] = "raw"
    readonly: bool = False
    discard: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A directory of the host. `target` is where the guest has it; `uid` and `gid` are for `owner` squash."""

    tag: str
    source: Path
    target: str
    kind: ShareKind
    owner: Owner = "mapped"
    uid: int = 0
    gid: int = 0
    readonly: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockSpec:
    """`ports` are those that the host may dial, by what they are for; `directory` has the Unix sockets."""

    cid: int = 3
    ports: Mapping[str, int] = field(default_factory=dict)
    served: Mapping[str, int] = field(default_factory=dict)
    """Those that the host serves and the guest dials at CID 2; only a hypervisor with a socket for each port has to know them."""
    directory: Path
    socket: Path | None = None
    """The vhost-user device's control socket, where it is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSpec:
    """One virtual machine, wholly resolved: what is built is built, and every path is absolute."""

    name: str
    uuid: UUID
    cpus: int = 1
    memory_mib: int = 1024
    kernel: Path | None = None
    initrd: Path | None = None
    cmdline: str = ""
    disks: tuple[Disk, ...] = ()
    nics: tuple[Nic, ...] = ()
    shares: tuple[Share, ...] = ()
    vsock: VsockSpec | None = None
    ports_tree: Path | None = None
    """The socket of VPNKit's tree of ports, which a hypervisor with 9p-socket offers under the tag `port` (spec companions 3.2)."""
    accel: Literal["auto", "kvm", "hvf", "tcg"] = "auto"
    extra: tuple[str, ...] = ()
    """Words for the hypervisor's command line, as they are, at its end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """What a hypervisor can do."""

    nics: frozenset[NicKind]
    shares: frozenset[ShareKind] = frozenset()
    vsock: frozenset[VsockKind] = frozenset()
    pause: bool = False
    acpi: bool = False
    """The guest can be asked to power down."""
    shared_memory: bool = False
    pty: bool = False
    """It makes a pty for the console by itself."""
    serves_virtiofs: bool = False
    """It serves virtiofs shares itself: no server is to be started for them."""
    rejoins_network: bool = False
    """A guest goes on when the network daemon was restarted."""
    elf_kernel: bool = False
    """It starts a Linux that is not compressed, and that is up sooner."""
    cmdline: str = "console=ttyS0"
    """What Linux has to be told where nobody says: which device its console is, how it ends."""


class StateDir:
    """The directory of one machine, mode 0700, and the names of what is in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def socket(self, name: str) -> Path:
        """The path of a Unix socket; `ConfigError` where it is too long to be bound."""
        path = self.path / name
        octets = len(str(path).encode())
        if octets > MAX_SOCKET_PATH:
            raise ConfigError(
                f"state directory: {path} has {octets} octets, and a socket's path has at most {MAX_SOCKET_PATH}; "
                "choose a shorter one with --state-dir"
            )
        return path

    def log(self, name: str) -> Path:
        """Where the output of a program beside the machine goes."""
        return self.path / "log" / f"{name}.log"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def network(self) -> Path:
        """The link's socket."""
        return self.socket("net.sock")

    @property
    def network_control(self) -> Path:
        """The network daemon's control API."""
        return self.socket("network.sock")

    @property
    def control(self) -> Path:
        """The supervisor's own API."""
        return self.socket("vm.sock")

    @property
    def docker(self) -> Path:
        return self.socket("docker.sock")

    @property
    def monitor(self) -> Path:
        """QMP, or the hypervisor's REST API."""
        return self.socket("monitor.sock")

    @property
    def vsock(self) -> Path:
        """The directory of vsock's Unix sockets."""
        self.socket("vsock/00000003.00000000")  # the longest name there is in it
        return self.path / "vsock"

    @property
    def vsock_device(self) -> Path:
        """Our vhost-user-vsock device's control socket."""
        return self.socket("vsock.sock")

    @property
    def console(self) -> Path:
        """A symbolic link to a pty."""
        return self.path / "tty"

    @property
    def console_log(self) -> Path:
        return self.path / "console.log"

    def share(self, tag: str) -> Path:
        """The socket of a share's server."""
        return self.socket(f"share-{tag}.sock")


# What is done about it.


class Lost(Enum):
    """What the end of a sidecar means."""

    STOPS_MACHINE = "the machine is stopped: its guest cannot go on without"
    RESTART = "it is started again, and the guest goes on"
    DEGRADED = "the machine goes on without"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """A program that runs beside the machine, begins before it and ends after it."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Besides ours."""
    ready: Path | None = None
    """A socket that is there when it is ready; `None`: `{ready_fd}` in `argv` is the number of a descriptor, which is closed or
    written to when it is. Neither: it is ready at once."""
    lost: Lost = Lost.DEGRADED
    after_machine: bool = False
    """It is started when the machine has its sockets, not before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RestCall:
    """One request on `StateDir.monitor`, in order, once it is there."""

    method: Literal["GET", "PUT", "POST", "PATCH"]
    path: str
    body: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All that starts a machine."""

    driver: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, bytes] = field(default_factory=dict)
    """What must be written before (mode 0600): a configuration, an empty variable store."""
    disks: tuple[Disk, ...] = ()
    """Those whose files are made where absent."""
    sidecars: tuple[Sidecar, ...] = ()
    rest: tuple[RestCall, ...] = ()
    sockets: tuple[Path, ...] = ()
    """What the hypervisor makes and nobody must have left there."""
    console: Literal["pty-log", "stdio", "printed", "link"] = "link"
    """How the console is reached: by a pty that the monitor names and the hypervisor logs; on its stdin and stdout, for which we
    make the pty; by a pty whose path it prints or tells by REST; by a link that it makes itself."""
    vsock: VsockKind | None = None
    mounts: tuple[str, ...] = ()
    """What the guest has to run to have the shares, a line each."""


class EventKind(Enum):
    STARTED = "started"
    PAUSED = "paused"
    RESUMED = "resumed"
    POWERDOWN = "powerdown"
    """The guest was asked to."""
    SHUTDOWN = "shutdown"
    RESET = "reset"
    PANIC = "panic"
    """Of the guest's kernel; or, as `text` says, the hypervisor cannot go on with it."""
    EXITED = "exited"


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    kind: EventKind
    by_guest: bool = False
    """For SHUTDOWN and RESET: the guest did it by itself."""
    status: int = 0
    """For EXITED: the exit status, negative for a signal."""
    text: str = ""


class Console(Protocol):
    """The machine's serial console. `path` is a symbolic link to a pty that nobody else may open; what it says is kept in a log."""

    path: Path
    log: Path

    async def attach(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Both ways, for one user; close the writer to let go. Raises `HostError`."""
        ...

    async def close(self) -> None: ...


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Serve = Callable[[socket.socket], Awaitable[None]]
"""Serves a connected, non-blocking socket, which is closed afterwards."""


class Listening(Protocol):
    async def close(self) -> None: ...


class Vsock(Protocol):
    """Streams between host and guest, however the hypervisor carries them."""

    async def connect(self, port: int, *, limit_s: float = 10.0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """To a port of the guest. Half-close crosses both ways. Raises `HostError` (refused, not there, too slow)."""
        ...

    async def dial(self, port: int, *, limit_s: float = 10.0) -> socket.socket:
        """The same as a non-blocking socket, for who only passes octets on."""
        ...

    async def listen(self, port: int, handler: Handler) -> Listening:
        """For what the guest dials at CID 2. Raises `ConfigError` when the place is taken."""
        ...

    async def serve(self, port: int, serve: Serve) -> Listening:
        """The same with sockets, for who only passes octets on."""
        ...


class Machine(Protocol):
    """A machine that was started. `events` is for one reader and ends after EXITED."""

    @property
    def pid(self) -> int:
        """0 where it is no process of its own."""
        ...

    console: Console | None

    def events(self) -> AsyncIterator[Event]: ...

    async def pause(self) -> None:
        """Raises `Unsupported`, `HostError`; so do the others."""
        ...

    async def resume(self) -> None: ...

    async def powerdown(self) -> None:
        """Ask the guest, as its power button does; returns at once."""
        ...

    async def kill(self) -> None:
        """As by a power cut; returns when it is gone."""
        ...

    async def wait(self) -> int:
        """Until it is gone; its exit status."""
        ...

    async def close(self) -> None:
        """Kill it if it runs, and let go of everything."""
        ...


class Hypervisor(Protocol):
    """A driver. It has no state; one object serves any number of machines."""

    name: str
    caps: Caps

    def plan(self, spec: VmSpec, state: StateDir) -> Plan:
        """Pure. Raises `Unsupported`."""
        ...

    async def start(self, plan: Plan, state: StateDir) -> Machine:
        """Sidecars run already. It is started held where `Caps.pause`, its console attached, then let go: so that nothing it says
        is lost. Raises `HostError`: not installed (with what to install), or its own complaint, or no monitor within 10 s."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A share as its server offers it."""

    share: Share
    sidecars: tuple[Sidecar, ...] = ()
    socket: Path | None = None
    mount: str = ""
    """What the guest has to run, as root."""


class FileShare(Protocol):
    """A file-sharing companion. How a hypervisor's command line names an endpoint is the hypervisor's to know."""

    kind: ShareKind
    owners: frozenset[Owner]

    def plan(self, share: Share, state: StateDir, index: int = 0) -> Endpoint:
        """Pure. `index` counts the machine's shares of this kind. Raises `Unsupported` for an owner policy that it has not, or what
        the server cannot do."""
        ...
