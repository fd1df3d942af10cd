"""LinuxKit's YAML as frozen dataclasses, in the order it is processed (spec companions 3.1).

`kernel`, `init` (unpacked into the root), `volumes`, `onboot` (one after the other, each must end), `onshutdown`, `services`
(side by side, no order) and `files`. `None` is a field that was not given, so that the image's label may speak
(`vm.linuxkit.merge`). Keys, texts and checks are the fields' own (`vm.linuxkit.fields`); `load` reads, `render` writes.
"""

# ruff: noqa: RUF009  # `key` and `place` make a `dataclasses.field` each
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from netstack.errors import ConfigError
from vm.linuxkit import values
from vm.linuxkit.fields import key, place
from vm.yaml_lines import Mark

_UINT = values.whole(0, (1 << 64) - 1)
_INT = values.whole(-(1 << 63), (1 << 63) - 1)
_MAJOR = values.whole(-1, 0xFFF)  # -1 is any, in resources; makedev(3) of Linux has 12 bits for the major
_MINOR = values.whole(-1, 0xFFFFF)
DEFAULT_MODE = 0o600


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """The image with the kernel, and its command line."""

    image: str | None = key(check=values.image)
    cmdline: str | None = key()
    binary: str | None = key(check=values.text)
    """The kernel's file in the image; `kernel` when not given."""
    tar: str | None = key()
    """The modules' archive in the image; `kernel.tar` when not given, `none` for none."""
    ucode: str | None = key()
    """The archive of CPU microcode in the image."""
    mark: Mark = place()


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A directory that containers share by binding its name; from an image, or empty."""

    name: str = key(required=True, check=values.name)
    image: str | None = key(check=values.image)
    readonly: bool | None = key()
    format: str | None = key(check=values.one_of("filesystem", "oci"))
    platforms: tuple[str, ...] | None = key(check=values.text)
    mark: Mark = place()


@dataclass(frozen=True, slots=True, kw_only=True)
class IdMapping:
    """Of a user namespace."""

    host_id: int = key("hostID", required=True, check=values.whole(0, values.MAX_ID))
    container_id: int = key("containerID", required=True, check=values.whole(0, values.MAX_ID))
    size: int = key(required=True, check=values.whole(1, 1 << 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount in full."""

    type: str | None = key()
    source: str | None = key()
    destination: str | None = key(check=values.path)
    options: tuple[str, ...] | None = key(check=values.text)
    uid_mappings: tuple[IdMapping, ...] | None = key("uidmappings")
    gid_mappings: tuple[IdMapping, ...] | None = key("gidmappings")
    mark: Mark = place()

    def __post_init__(self) -> None:
        if not self.kind:
            raise ConfigError("type is missing; only for a known source, such as proc, it may be left out")
        if not self.point:
            kinds = ", ".join(values.MOUNT_POINTS)
            raise ConfigError(f"destination is missing; without it the type must be one of: {kinds}")

    @property
    def kind(self) -> str:
        """The type, also when only the source or the destination tells."""
        if self.type:
            return self.type
        if self.source in values.MOUNT_POINTS:
            return self.source
        return "tmpfs" if self.destination == "/dev" else ""

    @property
    def point(self) -> str:
        """Where it goes, also when only the type tells."""
        return self.destination or values.MOUNT_POINTS.get(self.kind, "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device node of a container."""

    path: str = key(required=True, check=values.text)
    type: str = key(required=True, check=values.one_of("b", "c", "u", "p", "a"))
    major: int | None = key(check=_MAJOR)
    minor: int | None = key(check=_MINOR)
    mode: str | None = key(check=values.text)
    """Octal bits, or what the container may do such as `rwm`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCgroup:
    allow: bool | None = key()
    type: str | None = key()
    major: int | None = key(check=_MAJOR)
    minor: int | None = key(check=_MINOR)
    access: str | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Octets."""

    limit: int | None = key(check=_INT)
    reservation: int | None = key(check=_INT)
    swap: int | None = key(check=_INT)
    kernel: int | None = key(check=_INT)
    kernel_tcp: int | None = key("kernelTCP", check=_INT)
    swappiness: int | None = key(check=_UINT)
    disable_oom_killer: bool | None = key("disableOOMKiller")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Times in microseconds."""

    shares: int | None = key(check=_UINT)
    quota: int | None = key(check=_INT)
    period: int | None = key(check=_UINT)
    realtime_runtime: int | None = key(check=_INT)
    realtime_period: int | None = key(check=_UINT)
    cpus: str | None = key()
    mems: str | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Pids:
    limit: int = key(required=True, check=_INT)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightDevice:
    major: int = key(required=True, check=_MAJOR)
    minor: int = key(required=True, check=_MINOR)
    weight: int | None = key(check=values.whole(0, 1000))
    leaf_weight: int | None = key(check=values.whole(0, 1000))


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleDevice:
    """`rate` in octets or operations a second."""

    major: int = key(required=True, check=_MAJOR)
    minor: int = key(required=True, check=_MINOR)
    rate: int = key(required=True, check=_UINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIo:
    weight: int | None = key(check=values.whole(0, 1000))
    leaf_weight: int | None = key(check=values.whole(0, 1000))
    weight_device: tuple[WeightDevice, ...] | None = key()
    throttle_read_bps_device: tuple[ThrottleDevice, ...] | None = key()
    throttle_write_bps_device: tuple[ThrottleDevice, ...] | None = key()
    throttle_read_iops_device: tuple[ThrottleDevice, ...] | None = key("throttleReadIOPSDevice")
    throttle_write_iops_device: tuple[ThrottleDevice, ...] | None = key("throttleWriteIOPSDevice")


@dataclass(frozen=True, slots=True, kw_only=True)
class HugepageLimit:
    page_size: int = key(required=True, check=_UINT)
    limit: int = key(required=True, check=_UINT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Priority:
    name: str = key(required=True, check=values.text)
    priority: int = key(required=True, check=values.whole(0, 0xFFFFFFFF))


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkClass:
    class_id: int | None = key("classID", check=values.whole(0, 0xFFFFFFFF))
    priorities: tuple[Priority, ...] | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """Limits of a container's control group."""

    devices: tuple[DeviceCgroup, ...] | None = key()
    memory: Memory | None = key()
    cpu: Cpu | None = key()
    pids: Pids | None = key()
    block_io: BlockIo | None = key("blockio")
    hugepage_limits: tuple[HugepageLimit, ...] | None = key()
    network: NetworkClass | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network interface to move or `add` (with its link type) into a container's network."""

    name: str | None = key(check=values.text)
    add: str | None = key(check=values.text)
    create_in_root: bool | None = key()
    peer: str | None = key(check=values.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class BindNamespaces:
    """Paths on which a container's namespaces are to be kept."""

    cgroup: str | None = key(check=values.path)
    ipc: str | None = key(check=values.path)
    mnt: str | None = key(check=values.path)
    net: str | None = key(check=values.path)
    pid: str | None = key(check=values.path)
    user: str | None = key(check=values.path)
    uts: str | None = key(check=values.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What is done around a container, before its process starts."""

    cgroups: tuple[str, ...] | None = key(check=values.text)
    mounts: tuple[Mount, ...] | None = key()
    mkdir: tuple[str, ...] | None = key(check=values.path)
    interfaces: tuple[Interface, ...] | None = key()
    bind_ns: BindNamespaces | None = key("bindNS")
    namespace: str | None = key(check=values.text)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What may also stand in an image's label `org.mobyproject.config`."""

    capabilities: tuple[str, ...] | None = key(check=values.capability)
    capabilities_add: tuple[str, ...] | None = key("capabilities.add", check=values.capability)
    ambient: tuple[str, ...] | None = key(check=values.capability)
    mounts: tuple[Mount, ...] | None = key()
    binds: tuple[str, ...] | None = key(check=values.bind)
    binds_add: tuple[str, ...] | None = key("binds.add", check=values.bind)
    tmpfs: tuple[str, ...] | None = key(check=values.tmpfs)
    command: tuple[str, ...] | None = key()
    env: tuple[str, ...] | None = key(check=values.variable)
    cwd: str | None = key(check=values.path)
    net: str | None = key(check=values.namespace)
    ipc: str | None = key(check=values.namespace)
    uts: str | None = key(check=values.namespace)
    pid: str | None = key(check=values.namespace)
    userns: str | None = key(check=values.namespace)
    readonly: bool | None = key()
    masked_paths: tuple[str, ...] | None = key(check=values.path)
    readonly_paths: tuple[str, ...] | None = key(check=values.path)
    uid: int | str | None = key(check=values.identity)
    gid: int | str | None = key(check=values.identity)
    additional_gids: tuple[int | str, ...] | None = key(check=values.identity)
    no_new_privileges: bool | None = key()
    hostname: str | None = key(check=values.text)
    oom_score_adj: int | None = key(check=values.whole(-1000, 1000))
    rootfs_propagation: str | None = key(check=values.one_of(*values.PROPAGATIONS))
    cgroups_path: str | None = key(check=values.text)
    resources: Resources | None = key()
    sysctl: Mapping[str, str] | None = key()
    rlimits: tuple[str, ...] | None = key(check=values.rlimit)
    uid_mappings: tuple[IdMapping, ...] | None = key()
    gid_mappings: tuple[IdMapping, ...] | None = key()
    annotations: Mapping[str, str] | None = key()
    devices: tuple[Device, ...] | None = key()
    runtime: Runtime | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class Image(ImageConfig):
    """A container: `onboot`, `onshutdown` or a service."""

    name: str = key(required=True, check=values.name)
    image: str = key(required=True, check=values.image)
    mark: Mark = place()


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file, directory or symbolic link of the root. Exactly one of the sources says what is in it."""

    path: str = key(required=True, check=values.file_path)
    directory: bool | None = key()
    symlink: str | None = key(check=values.text)
    """What the link leads to."""
    contents: str | None = key()
    source: str | None = key(check=values.text)
    """A file of the host; relative to where the build runs."""
    metadata: str | None = key(check=values.one_of("yaml"))
    """`yaml`: the configuration itself is the contents."""
    optional: bool | None = key()
    """Without `source` there is no file, instead of an error."""
    mode: str | None = key(check=values.mode)
    uid: int | str | None = key(check=values.identity)
    gid: int | str | None = key(check=values.identity)
    mark: Mark = place()

    def __post_init__(self) -> None:
        ways = ("symlink", "contents", "source", "metadata")
        given = [way for way in ways if getattr(self, way) is not None]
        if self.directory:
            given.insert(0, "directory")
        if len(given) != 1:
            words = " and ".join(given) if given else "none of them"
            raise ConfigError(f"{self.path}: give one of directory, {', '.join(ways)}; given is {words}")

    @property
    def bits(self) -> int:
        """The mode; 0600 and for a directory 0700 when not given."""
        if self.mode is not None:
            return int(self.mode.removeprefix("0o"), 8)
        return DEFAULT_MODE | 0o100 if self.directory else DEFAULT_MODE


@dataclass(frozen=True, slots=True, kw_only=True)
class Trust:
    """Of older files; nothing here fetches from a registry, so nothing is verified by it."""

    image: tuple[str, ...] | None = key()
    org: tuple[str, ...] | None = key()


@dataclass(frozen=True, slots=True, kw_only=True)
class LinuxKit:
    """One machine."""

    kernel: Kernel | None = key()
    init: tuple[str, ...] = key(check=values.image, default=())
    volumes: tuple[Volume, ...] = key(default=())
    onboot: tuple[Image, ...] = key(default=())
    onshutdown: tuple[Image, ...] = key(default=())
    services: tuple[Image, ...] = key(default=())
    files: tuple[File, ...] = key(default=())
    trust: Trust | None = key()

    @property
    def containers(self) -> tuple[Image, ...]:
        """All of them, in the order of the file's sections."""
        return self.onboot + self.onshutdown + self.services
