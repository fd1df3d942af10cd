"""What each hypervisor can do, and the one check of a machine against it.

The table is the drivers' documentation as spec companions 1 and 2.2 have it. `check` turns a machine into wishes, and a wish that a
hypervisor does not grant is `Unsupported` with the names of those in the table that would grant it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, get_args

from netstack.errors import ConfigError
from vm.api import Caps, Nic, Owner, Share, ShareKind, Unsupported, VmSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """A hypervisor's `caps`, and what is too particular for them. The defaults deny nothing."""

    caps: Caps
    disks: frozenset[str] = frozenset({"raw", "qcow2"})
    accels: frozenset[str] = frozenset({"kvm", "hvf", "tcg"})
    boots_disk: bool = True
    """It boots a disk's own loader where no kernel is given."""
    initrd: bool = True
    readonly_disks: bool = True
    dialled_ports: int | None = None
    """So many vsock ports that the host dials."""
    owners: frozenset[Owner] = frozenset({"passthrough", "mapped", "squash"})
    """Of its virtiofs: virtiofsd's, unless it serves that itself."""
    readonly_shares: bool = True
    """Of its virtiofs."""


_RAW: Final = frozenset({"raw"})
_KVM: Final = frozenset({"kvm"})
_HVF: Final = frozenset({"hvf"})

TABLE: Final[Mapping[str, Traits]] = {
    "qemu": Traits(
        caps=Caps(
            nics=frozenset({"qemu-stream", "qemu-dgram", "unixgram", "vhost-user", "tap", "none"}),
            shares=frozenset({"9p-local", "9p-vsock", "virtiofs"}),
            vsock=frozenset({"vhost-user", "kernel"}),
            pause=True,
            acpi=True,
            shared_memory=True,
            pty=True,
            rejoins_network=True,
            elf_kernel=True,
        ),
    ),
    "hyperkit": Traits(
        caps=Caps(
            nics=frozenset({"vmnet", "none"}),
            shares=frozenset({"9p-socket", "9p-vsock"}),
            vsock=frozenset({"hyperkit"}),
            pause=True,
            acpi=True,
            pty=True,
        ),
        accels=_HVF,
        boots_disk=False,
        dialled_ports=4,  # spec companions 1.2: guest_forwards has room for four
    ),
    "vfkit": Traits(
        caps=Caps(
            nics=frozenset({"unixgram", "none"}),
            shares=frozenset({"9p-vsock", "virtiofs"}),
            vsock=frozenset({"per-port"}),
            pause=True,
            acpi=True,
            pty=True,
            serves_virtiofs=True,
            cmdline="console=hvc0",
        ),
        disks=_RAW,
        accels=_HVF,
        readonly_disks=False,
        owners=frozenset({"passthrough"}),
        readonly_shares=False,
    ),
    "cloud-hypervisor": Traits(
        caps=Caps(
            nics=frozenset({"vhost-user", "tap", "none"}),
            shares=frozenset({"9p-vsock", "virtiofs"}),
            vsock=frozenset({"hybrid"}),
            pause=True,
            acpi=True,
            shared_memory=True,
            pty=True,
            elf_kernel=True,
        ),
        accels=_KVM,
        boots_disk=False,
    ),
    "firecracker": Traits(
        caps=Caps(
            nics=frozenset({"tap", "none"}),
            shares=frozenset({"9p-vsock"}),
            vsock=frozenset({"hybrid"}),
            pause=True,
            acpi=True,
            rejoins_network=True,
            elf_kernel=True,
            cmdline="console=ttyS0 reboot=k panic=1",  # a reset by the keyboard's controller is how its guest ends
        ),
        disks=_RAW,
        accels=_KVM,
        boots_disk=False,
    ),
    "crosvm": Traits(
        caps=Caps(
            nics=frozenset({"vhost-user", "tap", "none"}),
            shares=frozenset({"9p-vsock", "virtiofs"}),
            vsock=frozenset({"kernel", "vhost-user"}),
            pause=True,
            acpi=True,
            shared_memory=True,
            serves_virtiofs=True,
        ),
        accels=_KVM,
        boots_disk=False,
        owners=frozenset({"passthrough"}),
        readonly_shares=False,
    ),
}


def caps_of(driver: str) -> Caps:
    return TABLE[driver].caps


def able(grants: Callable[[Traits], bool]) -> list[str]:
    """The names of those that grant it."""
    return [name for name, traits in TABLE.items() if grants(traits)]


def cannot(driver: str, what: str, grants: Callable[[Caps], bool]) -> Unsupported:
    """To be raised by a machine that is asked for what its hypervisor has not."""
    return Unsupported(driver, what, able(lambda traits: grants(traits.caps)))


def check(driver: str, caps: Caps, spec: VmSpec) -> None:
    """Whether `driver` can run `spec`. Raises `Unsupported` for the first thing it cannot do, `ConfigError` for what nobody could.

    A driver that is not in the table is held to its `caps` alone.
    """
    own = TABLE.get(driver) or Traits(caps=caps)
    for wish in _wishes(spec):
        if not wish.granted(own):
            raise Unsupported(driver, wish.what(own), able(wish.granted))
    for nic in spec.nics:
        _complete(driver, nic)
    for share in spec.shares:
        if share.kind == "9p-vsock" and spec.vsock is None:
            raise ConfigError(
                f"{driver}: share {share.tag}: 9p-vsock goes over vsock, and the machine has none; add vsock"
            )


@dataclass(frozen=True, slots=True)
class _Wish:
    what: Callable[[Traits], str]
    granted: Callable[[Traits], bool]


def _wishes(spec: VmSpec) -> Iterator[_Wish]:
    for nic in spec.nics:
        yield _nic(nic)
    if spec.vsock is not None:
        yield _Wish(lambda _: "it has no vsock", lambda has: bool(has.caps.vsock))
        yield _ports(len(spec.vsock.ports))
    for share in spec.shares:
        yield _share(share)
        if share.kind == "virtiofs":
            yield from _virtiofs(share)
    for disk in spec.disks:
        yield _disk(str(disk.path), disk.format)
        if disk.readonly:
            yield _readonly(str(disk.path))
    if spec.accel != "auto":
        yield _accel(spec.accel)
    if spec.kernel is None:
        yield _Wish(lambda _: "it boots a kernel only, and none is given", lambda has: has.boots_disk)


def _nic(nic: Nic) -> _Wish:
    return _Wish(
        lambda has: f"a network card of kind {nic.kind}: it has {_list(has.caps.nics - {'none'})}",
        lambda has: nic.kind == "none" or nic.kind in has.caps.nics,
    )


def _ports(wanted: int) -> _Wish:
    return _Wish(
        lambda has: f"{wanted} vsock ports for the host to dial: it has at most {has.dialled_ports}",
        lambda has: bool(has.caps.vsock) and (has.dialled_ports is None or wanted <= has.dialled_ports),
    )


def _share(share: Share) -> _Wish:
    """Those of other packages want nothing of a hypervisor: guests have them by vsock, or by the network."""
    return _Wish(
        lambda has: f"share {share.tag} of kind {share.kind}: it has {_list(has.caps.shares)}",
        lambda has: share.kind in has.caps.shares or share.kind not in get_args(ShareKind),
    )


def _virtiofs(share: Share) -> Iterator[_Wish]:
    yield _Wish(
        lambda has: f"share {share.tag}: owner {share.owner}: its virtiofs has {_list(has.owners)}, and 9p-vsock any",
        lambda has: "virtiofs" in has.caps.shares and share.owner in has.owners,
    )
    if share.readonly:
        yield _Wish(
            lambda _: f"share {share.tag}: its virtiofs has no read-only shares",
            lambda has: "virtiofs" in has.caps.shares and has.readonly_shares,
        )


def _disk(path: str, format: str) -> _Wish:
    return _Wish(
        lambda has: f"disk {path} of format {format}: it has {_list(has.disks)}",
        lambda has: format in has.disks,
    )


def _readonly(path: str) -> _Wish:
    return _Wish(lambda _: f"disk {path}: it has no read-only disks", lambda has: has.readonly_disks)


def _accel(accel: str) -> _Wish:
    return _Wish(lambda has: f"accelerator {accel}: it has {_list(has.accels)}", lambda has: accel in has.accels)


def _list(names: frozenset[str] | frozenset[Owner]) -> str:
    return ", ".join(sorted(names)) or "none"


def _complete(driver: str, nic: Nic) -> None:
    """A card that nobody could attach: its kind lacks what it hangs on."""
    if nic.kind == "tap" and not nic.tap:
        raise ConfigError(f"{driver}: a network card of kind tap needs the name of a TAP device, for instance tap0")
    if nic.kind not in ("tap", "none") and nic.socket is None:
        raise ConfigError(f"{driver}: a network card of kind {nic.kind} needs the socket of its link")
