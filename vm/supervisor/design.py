"""From what a file says to everything that will be started. Nothing is begun, made or asked; of files only the
LinuxKit one is read, for the kernel's command line.

What the file leaves open is chosen by what the hypervisor can do, the fastest first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from vm.api import (
    Caps,
    Hypervisor,
    Nic,
    NicKind,
    Owner,
    Plan,
    Share,
    ShareKind,
    Sidecar,
    StateDir,
    Unsupported,
    VmSpec,
    VsockSpec,
)
from vm.filesystems import ninep_share, registry
from vm.settings import SHARE_KINDS, ShareSettings, VmSettings, disks_of, shares_of
from vm.supervisor import building, network
from vm.supervisor.home import Home

NIC_ORDER: Final[tuple[NicKind, ...]] = ("vhost-user", "qemu-stream", "unixgram", "vmnet", "qemu-dgram", "tap")
SHARE_ORDER: Final[tuple[ShareKind, ...]] = ("9p-local", "virtiofs", "9p-vsock", "9p-socket")
OWNED_ORDER: Final[tuple[ShareKind, ...]] = ("9p-local", "9p-vsock", "9p-socket", "virtiofs")
"""Where owners are not those of the host: not every virtiofsd can do that, and our own server can."""

K = TypeVar("K", NicKind, ShareKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """A machine, wholly thought out."""

    spec: VmSpec
    plan: Plan
    caps: Caps
    network: Sidecar | None
    sidecars: tuple[Sidecar, ...]
    """All but the network: servers of shares, and what the hypervisor wants."""
    mounts: tuple[str, ...]
    """What the guest has to run, as root, to have the shares."""

    @property
    def rejoins(self) -> bool:
        """Whether its guest goes on when the network comes again."""
        return self.caps.rejoins_network and all(nic.kind in network.REJOINING for nic in self.spec.nics)


def built(state: StateDir) -> Path:
    """Where what is built of a LinuxKit file is kept."""
    return state.path / "boot"


def _choose(what: str, driver: Hypervisor, wanted: str, order: Sequence[K], able: frozenset[K]) -> K:
    found = next((kind for kind in order if (wanted in ("auto", kind)) and (kind in able or wanted == kind)), None)
    if found is None:
        raise Unsupported(driver.name, f"{what}: it has none that could be chosen; write kind:")
    return found


def spec_of(settings: VmSettings, home: Home, driver: Hypervisor) -> VmSpec:
    """The machine as the hypervisor is to see it. Raises `ConfigError`, `Unsupported`."""
    state, identity = home.state, home.identity()
    nics: tuple[Nic, ...] = ()
    wanted = settings.network
    if wanted.kind != "none":
        kind = _choose("network", driver, wanted.kind, NIC_ORDER, driver.caps.nics)
        nics = (
            Nic(
                kind=kind,
                socket=None if kind == "tap" else state.network,
                uuid=wanted.uuid or identity.uuid,
                mac=wanted.mac or identity.mac,
                mtu=wanted.mtu,
                preferred_ip=wanted.preferred_ip,
                # Names of interfaces have at most 15 octets.
                tap=(wanted.tap or f"vm-{settings.name}")[:15] if kind == "tap" else "",
            ),
        )
    assert set(SHARE_ORDER) == set(SHARE_KINDS) - {"auto"}

    def share_kind(share: ShareSettings) -> ShareKind:
        if share.kind != "auto" and share.kind not in SHARE_KINDS:
            return share.kind  # of another package
        able = frozenset(kind for kind in driver.caps.shares if share.owner in _owners(driver.caps, kind))
        order = SHARE_ORDER if share.owner == "passthrough" else OWNED_ORDER
        return _choose(f"shares: owner {share.owner}", driver, share.kind, order, able)

    shares = shares_of(settings, share_kind)
    vsock = None
    if settings.wants_vsock or any(share.kind == "9p-vsock" for share in shares):
        ports = settings.vsock_ports
        vsock = VsockSpec(
            cid=settings.vsock.cid if settings.vsock is not None else 3,
            ports={name: port for name, port in ports.items() if name != "control"},
            served=_served(ports, shares),
            directory=state.vsock,
            socket=state.vsock_device if "vhost-user" in driver.caps.vsock else None,
        )
    boot = settings.boot
    kernel, initrd = boot.kernel, boot.initrd
    if boot.linuxkit is not None:
        kernel = built(state) / ("vmlinux" if driver.caps.elf_kernel else "kernel")
        initrd = built(state) / "initrd.img"
    return VmSpec(
        name=settings.name,
        uuid=wanted.uuid or identity.uuid,
        cpus=settings.cpus,
        memory_mib=settings.memory_mib,
        kernel=kernel,
        initrd=initrd,
        cmdline=_command_line(settings, driver.caps),
        disks=disks_of(settings),
        nics=nics,
        shares=shares,
        vsock=vsock,
        ports_tree=_ports_tree(settings, state, driver.caps),
        accel=settings.hypervisor.accel,
        extra=settings.hypervisor.extra,
    )


def _owners(caps: Caps, kind: ShareKind) -> frozenset[Owner]:
    """What a kind of share can do about owners."""
    if kind == "virtiofs" and caps.serves_virtiofs:
        return frozenset({"passthrough"})
    return registry.load(kind).owners


def _ports_tree(settings: VmSettings, state: StateDir, caps: Caps) -> Path | None:
    """For a guest that may ask for ports at all, as Docker for Mac's older ones did."""
    asked = "control" in settings.vsock_ports and settings.network.kind != "none"
    return state.socket(network.PORTS) if asked and "9p-socket" in caps.shares else None


def _served(ports: Mapping[str, int], shares: Sequence[Share]) -> dict[str, int]:
    """What the host serves at CID 2: the control port, and 9P."""
    by_vsock = [share.tag for share in shares if share.kind == "9p-vsock"]
    files = {f"share-{tag}": ninep_share.port(number) for number, tag in enumerate(by_vsock)}
    return {name: port for name, port in ports.items() if name == "control"} | files


def _command_line(settings: VmSettings, caps: Caps) -> str:
    boot = settings.boot
    if boot.cmdline is not None:
        return boot.cmdline
    return (building.command_line(boot.linuxkit) if boot.linuxkit is not None else None) or caps.cmdline


def design(settings: VmSettings, home: Home, driver: Hypervisor) -> Design:
    """All of it. Raises `ConfigError`, `Unsupported`."""
    _check_paths(home.state)
    spec = spec_of(settings, home, driver)
    plan = driver.plan(spec, home.state)
    if settings.hypervisor.binary is not None and plan.argv:
        plan = dataclasses.replace(plan, argv=(str(settings.hypervisor.binary), *plan.argv[1:]))
    endpoints = registry.endpoints(spec, home.state, driver.caps)
    sidecars = {one.name: one for endpoint in endpoints for one in endpoint.sidecars}
    sidecars |= {one.name: one for one in plan.sidecars}
    sidecars.pop(network.NAME, None)
    mounts = plan.mounts or tuple(endpoint.mount for endpoint in endpoints if endpoint.mount)
    beside = network.sidecar(settings, spec.nics[0], home.state, plan.vsock) if spec.nics else None
    return Design(
        spec=spec, plan=plan, caps=driver.caps, network=beside, sidecars=tuple(sidecars.values()), mounts=mounts
    )


def _check_paths(state: StateDir) -> None:
    """All sockets can be bound; said before anything is begun."""
    for _ in (
        state.network,
        state.network_control,
        state.control,
        state.docker,
        state.monitor,
        state.vsock,
        state.vsock_device,
    ):
        pass
    state.socket(network.PORTS)


def missing(settings: VmSettings) -> list[str]:
    """What has to be there and is not, a complaint each."""
    complaints = []
    files = {
        "boot.linuxkit": settings.boot.linuxkit,
        "boot.kernel": settings.boot.kernel,
        "boot.initrd": settings.boot.initrd,
        "network.config": settings.network.config,
    }
    complaints += [
        f"{what}: {path} is no file" for what, path in files.items() if path is not None and not path.is_file()
    ]
    for share in settings.shares:
        if not share.source.is_dir():
            complaints.append(f"shares: {share.source} is no directory; make it, or name another as source")
    for disk in settings.disks:
        if not disk.path.exists():
            if disk.size is None:
                complaints.append(f"disks: {disk.path} is not there; give a size to have it made")
            elif not disk.path.parent.is_dir():
                complaints.append(f"disks: {disk.path.parent} is no directory")
    return [f"{settings.file}: {one}" for one in complaints]
