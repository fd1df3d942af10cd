"""What `vm.yml` says: one virtual machine as its user describes it (spec companions, section 5).

The dataclasses below are the one definition of keys, defaults and checks; `vm.settings_file` reads them. Nothing is looked up here:
whether a file is there is asked when the machine goes up, so that a plan can be made for a machine elsewhere.
"""

# ruff: noqa: RUF009  # `key` makes a `dataclasses.field` each

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

from vm import settings_values as values
from vm.api import Disk, NicKind, Owner, Share, ShareKind
from vm.filesystems import registry
from vm.linuxkit.fields import NO_KEY, key

NIC_KINDS: Final = ("auto", "vhost-user", "qemu-stream", "qemu-dgram", "unixgram", "vmnet", "tap", "none")
SHARE_KINDS: Final = ("auto", "9p-local", "9p-socket", "9p-vsock", "virtiofs")
OWNERS: Final = ("mapped", "passthrough", "squash", "requester")
ACCELS: Final = ("auto", "kvm", "hvf", "tcg")
DOCKER_PORT: Final = 2376
"""Of Docker for Mac's machine (spec companions 1.2)."""


def _share_kind(text: str) -> str:
    """Ours, or that of another package."""
    return str(values.one_of("auto", *registry.names())(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorSettings:
    """Which hypervisor, and how."""

    driver: str = key("driver", check=values.name, default="qemu")
    accel: Literal["auto", "kvm", "hvf", "tcg"] = key("accel", check=values.one_of(*ACCELS), default="auto")
    binary: Path | None = key("binary", check=values.path)
    """Instead of the one in PATH."""
    extra: tuple[str, ...] = key("extra", default=())
    """Words for its command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSettings:
    """What is booted: something to build, or a kernel."""

    linuxkit: Path | None = key("linuxkit", check=values.path)
    kernel: Path | None = key("kernel", check=values.path)
    initrd: Path | None = key("initrd", check=values.path)
    cmdline: str | None = key("cmdline")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """The network card, and the network behind it: `pyvpnkit run` with `config` and `options`."""

    kind: Literal["auto"] | NicKind = key("kind", check=values.one_of(*NIC_KINDS), default="auto")
    uuid: UUID | None = key("uuid", check=values.uuid)
    mac: str = key("mac", check=values.mac, default="")
    mtu: int = key("mtu", check=values.whole(576, 65520), default=1500)
    preferred_ip: IPv4Address | None = key("preferred_ip", check=values.ipv4)
    tap: str = key("tap", check=values.name, default="")
    config: Path | None = key("config", check=values.path)
    options: tuple[str, ...] = key("options", default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockSettings:
    """Streams between host and guest. `ports`: what listens in the guest, and `control`, which listens on the host."""

    cid: int = key("cid", check=values.whole(3, (1 << 32) - 2), default=3)
    ports: Mapping[str, int] | None = key("ports", check=values.whole(1, (1 << 32) - 2))
    forwarder_generation: int = key("forwarder_generation", check=values.whole(1, 3), default=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """A disk; made with `size` where it is not there."""

    path: Path = key("path", check=values.path, required=True)
    size: int | None = key("size", check=values.octets)
    format: Literal["raw", "qcow2"] = key("format", check=values.one_of("raw", "qcow2"), default="raw")
    readonly: bool = key("readonly", check=values.truth, default=False)
    discard: bool = key("discard", check=values.truth, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSettings:
    """A directory of the host in the guest."""

    source: Path = key("source", check=values.path, required=True)
    target: str = key("target", check=values.target, required=True)
    tag: str = key("tag", check=values.name, default="")
    kind: Literal["auto"] | ShareKind = key("kind", check=_share_kind, default="auto")
    owner: Owner = key("owner", check=values.one_of(*OWNERS), default="mapped")
    uid: int = key("uid", check=values.whole(0, (1 << 32) - 2), default=0)
    gid: int = key("gid", check=values.whole(0, (1 << 32) - 2), default=0)
    readonly: bool = key("readonly", check=values.truth, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleSettings:
    """Further names of the console's pty and of its log; those in the state directory are there always."""

    path: Path | None = key("path", check=values.path)
    log: Path | None = key("log", check=values.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerSettings:
    """A socket of the host that leads to the guest's: by vsock at `port`, or to `tcp`, a port of its network."""

    path: Path | None = key("path", check=values.path)
    port: int | None = key("port", check=values.whole(1, (1 << 32) - 2))
    tcp: int | None = key("tcp", check=values.whole(1, 65535))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadySettings:
    """When the machine is ready; `None`: docker where there is its socket, else a lease where there is a network."""

    probe: str | None = key("probe", check=values.probe)
    limit_s: float = key("limit", check=values.seconds, default=120.0)
    every_s: float = key("every", check=values.seconds, default=0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """What happens after a crash. Waits double from `backoff_s` to `backoff_most_s`; after `stable_s` they begin anew."""

    policy: Literal["on-failure", "never"] = key(
        "policy", check=values.one_of("on-failure", "never"), default="on-failure"
    )
    max: int = key("max", check=values.whole(0, 1000), default=5)
    backoff_s: float = key("backoff", check=values.seconds, default=1.0)
    backoff_most_s: float = key("backoff_most", check=values.seconds, default=30.0)
    stable_s: float = key("stable", check=values.seconds, default=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSettings:
    """How long the guest may take to power down."""

    grace_s: float = key("grace", check=values.seconds, default=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """All of a file."""

    name: str = key("name", check=values.name, default="")
    hypervisor: HypervisorSettings = key("hypervisor", default=HypervisorSettings())
    cpus: int = key("cpus", check=values.whole(1, 256), default=1)
    memory_mib: int = key("memory", check=values.memory, default=1024)
    boot: BootSettings = key("boot", default=BootSettings())
    network: NetworkSettings = key("network", default=NetworkSettings())
    vsock: VsockSettings | None = key("vsock")
    disks: tuple[DiskSettings, ...] = key("disks", default=())
    shares: tuple[ShareSettings, ...] = key("shares", default=())
    console: ConsoleSettings = key("console", default=ConsoleSettings())
    publish: tuple[str, ...] = key("publish", check=values.published, default=())
    docker: DockerSettings | None = key("docker_socket")
    ready: ReadySettings = key("ready", default=ReadySettings())
    restart: RestartSettings = key("restart", default=RestartSettings())
    stop: StopSettings = key("stop", default=StopSettings())
    timesync: bool = key("timesync", check=values.truth, default=True)
    file: Path = dataclasses.field(default=Path("vm.yml"), metadata={"key": NO_KEY})

    @property
    def vsock_ports(self) -> dict[str, int]:
        """Those of the file, and what its other parts need."""
        ports = dict((self.vsock.ports if self.vsock is not None else None) or {})
        if self.docker is not None and self.docker.tcp is None:
            ports["docker"] = self.docker.port or ports.get("docker", DOCKER_PORT)
        return ports

    @property
    def wants_vsock(self) -> bool:
        """Whether anything needs it."""
        return (
            self.vsock is not None
            or bool(self.vsock_ports)
            or self.probe.startswith("vsock:")
            or any(share.kind == "9p-vsock" for share in self.shares)
        )

    @property
    def probe(self) -> str:
        """What tells that the machine is ready."""
        if self.ready.probe is not None:
            return self.ready.probe
        if self.docker is not None:
            return "docker"
        return "none" if self.network.kind == "none" else "lease"


def tag_of(share: ShareSettings, number: int) -> str:
    """A share's tag: its own, or `share` and its number."""
    return share.tag or f"share{number}"


def disks_of(found: VmSettings) -> tuple[Disk, ...]:
    """As hypervisors want them."""
    return tuple(
        Disk(path=one.path, size=one.size, format=one.format, readonly=one.readonly, discard=one.discard)
        for one in found.disks
    )


def shares_of(found: VmSettings, kind: Callable[[ShareSettings], ShareKind]) -> tuple[Share, ...]:
    """As hypervisors want them; `kind` chooses where the file leaves it open."""
    return tuple(
        Share(
            tag=tag_of(one, number),
            source=one.source,
            target=one.target,
            kind=kind(one),
            owner=one.owner,
            uid=one.uid,
            gid=one.gid,
            readonly=one.readonly,
        )
        for number, one in enumerate(found.shares)
    )
