"""`vm.yml`: one virtual machine as its user describes it (spec companions, section 5).

The dataclasses below are the one definition of keys, defaults and checks; `load` says everything that is wrong with a file at once,
each with its line and with what would be accepted. Paths are relative to the file, and `~` is the user's home. Nothing is looked up
here: whether a file is there is asked when the machine goes up, so that a plan can be made for a machine elsewhere.

The smallest file says what to boot:

    boot: {kernel: vmlinuz, initrd: initrd.img}
"""

# ruff: noqa: RUF009  # `key` makes a `dataclasses.field` each

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final, Literal
from uuid import UUID

from netstack.errors import ConfigError
from vm.api import Disk, NicKind, Owner, Share, ShareKind
from vm.linuxkit.fields import Check, Reader, key
from vm.yaml_lines import TRUTH, Complaints, Items, Mark, Table, Text, Value, meant, parse, quoted, read

NIC_KINDS: Final = ("auto", "vhost-user", "qemu-stream", "qemu-dgram", "unixgram", "vmnet", "tap", "none")
SHARE_KINDS: Final = ("auto", "9p-local", "9p-socket", "9p-vsock", "virtiofs")
OWNERS: Final = ("mapped", "passthrough", "squash", "requester")
ACCELS: Final = ("auto", "kvm", "hvf", "tcg")
PROBES: Final = ("none", "lease", "docker", "tcp", "vsock", "console")

DOCKER_PORT: Final = 2376
FORWARDER_PORT: Final = 62373
TIMESYNC_PORT: Final = 62372
CONTROL_PORT: Final = 4098
KNOWN_PORTS: Final = {
    "docker": DOCKER_PORT,
    "forwarder": FORWARDER_PORT,
    "timesync": TIMESYNC_PORT,
    "control": CONTROL_PORT,
}
"""What the supervisor itself uses, and the ports of Docker for Mac's machine (spec companions 1.2)."""

MAX_SHARES: Final = 16
MAX_DISKS: Final = 16
MAX_PUBLISH: Final = 256
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")
_SIZES: Final = {"": 1 << 20, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


# From text to values.


def name(text: str) -> str:
    """A name that may stand in paths of sockets."""
    if not _NAME.fullmatch(text):
        raise ConfigError(
            f"{quoted(text)} cannot be a name; write up to 32 letters, digits, - _ and ., a letter or digit first"
        )
    return text


def whole(low: int, high: int) -> Check:
    """A whole number of a range."""

    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ConfigError(f"{quoted(text)}: write a whole number from {low} to {high}")
        return int(text)

    return check


def octets(text: str) -> int:
    """A size; without a letter in MiB."""
    found = re.fullmatch(r"([0-9]{1,12}) ?([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not int(found[1]):
        raise ConfigError(f"{quoted(text)} is no size; write MiB, or a number with K, M, G or T such as 4G")
    return int(found[1]) * _SIZES[found[2].upper()]


def memory(text: str) -> int:
    """MiB."""
    mib = octets(text) >> 20
    if not 32 <= mib <= 1 << 22:
        raise ConfigError(f"{quoted(text)}: write from 32 MiB to 4 TiB, such as 1024 (MiB) or 2G")
    return mib


def seconds(text: str) -> float:
    """A time of at most a day."""
    found = re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,6})?) ?(s|m|min|h)?", text)
    value = float(found[1]) * {"m": 60, "min": 60, "h": 3600}.get(found[2] or "", 1) if found else -1.0
    if not 0 <= value <= 86400:
        raise ConfigError(
            f"{quoted(text)} is no time; write seconds such as 30 or 0.5, or minutes such as 5m; a day at most"
        )
    return value


def one_of(*choices: str) -> Check:
    """One of some words."""

    def check(text: str) -> str:
        if text not in choices:
            raise ConfigError(f"{quoted(text)} is unknown{meant(text, choices)}; write one of: {', '.join(choices)}")
        return text

    return check


def truth(text: str) -> bool:
    """On or off."""
    if text not in TRUTH:
        raise ConfigError(f"{quoted(text)} is neither on nor off")
    return TRUTH[text]


def uuid(text: str) -> UUID | None:
    """`None` for `auto`."""
    if text == "auto":
        return None
    try:
        return UUID(text)
    except ValueError:
        raise ConfigError(f"{quoted(text)} is no UUID; write auto, or one such as `uuidgen` prints") from None


def mac(text: str) -> str:
    """Lower case, with colons; empty for `auto`."""
    if text == "auto":
        return ""
    bare = text.lower().replace("-", ":")
    if not re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", bare) or int(bare[:2], 16) & 1 or bare == "00:00:00:00:00:00":
        raise ConfigError(
            f"{quoted(text)} is no address of a card; write auto, or one such as 5a:94:ef:e4:0c:ee (second digit even)"
        )
    return bare


def ipv4(text: str) -> IPv4Address:
    """A dotted address."""
    try:
        return IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{quoted(text)} is not an IPv4 address; write it as in 192.168.65.3") from None


def target(text: str) -> str:
    """An absolute path in the guest."""
    if not text.startswith("/") or ".." in text.split("/") or re.search(r"[\s\x00-\x1f]", text):
        raise ConfigError(f"{quoted(text)}: write an absolute path of the guest without blanks, such as /mnt/src")
    return text


def published(text: str) -> str:
    """A forward in the form of `pyvpnkit expose`; a protocol at the end, as Docker has it, is moved to the front."""
    found = re.fullmatch(r"(.+)/(tcp|udp)", text)
    spec = f"{found[2]}:{found[1]}" if found else text
    if re.search(r"[\s\x00-\x1f]", spec) or ":" not in spec:
        raise ConfigError(f"{quoted(text)}: write [tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT, such as 8080:80")
    return spec


def probe(text: str) -> str:
    """Kind, and behind a colon what it needs."""
    kind, _, rest = text.partition(":")
    one_of(*PROBES)(kind)
    if kind in ("tcp", "vsock"):
        whole(1, 65535 if kind == "tcp" else (1 << 32) - 2)(rest)
    elif kind == "console":
        try:
            re.compile(rest)
        except re.error as error:
            raise ConfigError(
                f"{quoted(text)}: {error}; write a regular expression of Python's behind console:"
            ) from None
        if not rest:
            raise ConfigError("console: write what a line has to say, such as console:login:")
    elif rest:
        raise ConfigError(f"{quoted(text)}: nothing may stand behind {kind}")
    return text


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ConfigError("is empty; write a path")
    return Path(text)


# What a file says.


@dataclass(frozen=True, slots=True, kw_only=True)
class HypervisorSettings:
    """Which hypervisor, and how."""

    driver: str = key("driver", check=name, default="qemu")
    accel: Literal["auto", "kvm", "hvf", "tcg"] = key("accel", check=one_of(*ACCELS), default="auto")
    binary: Path | None = key("binary", check=_path)
    """Instead of the one in PATH."""
    extra: tuple[str, ...] = key("extra", default=())
    """Words for its command line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BootSettings:
    """What is booted: something to build, or a kernel."""

    linuxkit: Path | None = key("linuxkit", check=_path)
    kernel: Path | None = key("kernel", check=_path)
    initrd: Path | None = key("initrd", check=_path)
    cmdline: str | None = key("cmdline")


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """The network card, and the network behind it: `pyvpnkit run` with `config` and `options`."""

    kind: Literal["auto"] | NicKind = key("kind", check=one_of(*NIC_KINDS), default="auto")
    uuid: UUID | None = key("uuid", check=uuid)
    mac: str = key("mac", check=mac, default="")
    mtu: int = key("mtu", check=whole(576, 65520), default=1500)
    preferred_ip: IPv4Address | None = key("preferred_ip", check=ipv4)
    tap: str = key("tap", check=name, default="")
    config: Path | None = key("config", check=_path)
    options: tuple[str, ...] = key("options", default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class VsockSettings:
    """Streams between host and guest. `ports`: what listens in the guest, and `control`, which listens on the host."""

    cid: int = key("cid", check=whole(3, (1 << 32) - 2), default=3)
    ports: Mapping[str, int] | None = key("ports", check=whole(1, (1 << 32) - 2))
    forwarder_generation: int = key("forwarder_generation", check=whole(1, 3), default=3)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSettings:
    """A disk; made with `size` where it is not there."""

    path: Path = key("path", check=_path, required=True)
    size: int | None = key("size", check=octets)
    format: Literal["raw", "qcow2"] = key("format", check=one_of("raw", "qcow2"), default="raw")
    readonly: bool = key("readonly", check=truth, default=False)
    discard: bool = key("discard", check=truth, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShareSettings:
    """A directory of the host in the guest."""

    source: Path = key("source", check=_path, required=True)
    target: str = key("target", check=target, required=True)
    tag: str = key("tag", check=name, default="")
    kind: Literal["auto"] | ShareKind = key("kind", check=one_of(*SHARE_KINDS), default="auto")
    owner: Owner = key("owner", check=one_of(*OWNERS), default="mapped")
    uid: int = key("uid", check=whole(0, (1 << 32) - 2), default=0)
    gid: int = key("gid", check=whole(0, (1 << 32) - 2), default=0)
    readonly: bool = key("readonly", check=truth, default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleSettings:
    """Further names of the console's pty and of its log; those in the state directory are there always."""

    path: Path | None = key("path", check=_path)
    log: Path | None = key("log", check=_path)


@dataclass(frozen=True, slots=True, kw_only=True)
class DockerSettings:
    """A socket of the host that leads to the guest's: by vsock at `port`, or to `tcp`, a port of its network."""

    path: Path | None = key("path", check=_path)
    port: int | None = key("port", check=whole(1, (1 << 32) - 2))
    tcp: int | None = key("tcp", check=whole(1, 65535))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadySettings:
    """When the machine is ready; `None`: docker where there is its socket, else a lease where there is a network."""

    probe: str | None = key("probe", check=probe)
    limit_s: float = key("limit", check=seconds, default=120.0)
    every_s: float = key("every", check=seconds, default=0.25)


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartSettings:
    """What happens after a crash. Waits double from `backoff_s` to `backoff_most_s`; after `stable_s` they begin anew."""

    policy: Literal["on-failure", "never"] = key("policy", check=one_of("on-failure", "never"), default="on-failure")
    max: int = key("max", check=whole(0, 1000), default=5)
    backoff_s: float = key("backoff", check=seconds, default=1.0)
    backoff_most_s: float = key("backoff_most", check=seconds, default=30.0)
    stable_s: float = key("stable", check=seconds, default=60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSettings:
    """How long the guest may take to power down."""

    grace_s: float = key("grace", check=seconds, default=30.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class VmSettings:
    """All of a file."""

    name: str = key("name", check=name, default="")
    hypervisor: HypervisorSettings = key("hypervisor", default=HypervisorSettings())
    cpus: int = key("cpus", check=whole(1, 256), default=1)
    memory_mib: int = key("memory", check=memory, default=1024)
    boot: BootSettings = key("boot", default=BootSettings())
    network: NetworkSettings = key("network", default=NetworkSettings())
    vsock: VsockSettings | None = key("vsock")
    disks: tuple[DiskSettings, ...] = key("disks", default=())
    shares: tuple[ShareSettings, ...] = key("shares", default=())
    console: ConsoleSettings = key("console", default=ConsoleSettings())
    publish: tuple[str, ...] = key("publish", check=published, default=())
    docker: DockerSettings | None = key("docker_socket")
    ready: ReadySettings = key("ready", default=ReadySettings())
    restart: RestartSettings = key("restart", default=RestartSettings())
    stop: StopSettings = key("stop", default=StopSettings())
    timesync: bool = key("timesync", check=truth, default=True)
    file: Path = dataclasses.field(default=Path("vm.yml"), metadata={"key": "(file)"})

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


SHORT: Final[Mapping[type, str]] = {
    HypervisorSettings: "driver",
    NetworkSettings: "kind",
    DockerSettings: "path",
    ReadySettings: "probe",
    RestartSettings: "policy",
    StopSettings: "grace",
    ConsoleSettings: "path",
    BootSettings: "linuxkit",
}
"""What a single word in place of a mapping stands for."""


class _Reader(Reader):
    """Reads `vm.yml`: scalars are text that each key's check understands, and a word may stand for a mapping or a list."""

    def _value(self, hint: Any, value: Value, what: str, check: Check | None) -> Any:
        if isinstance(value, Text):
            if (short := SHORT.get(hint)) is not None:
                value = Table(((Text(short, value.mark), value),), value.mark)
            elif typing.get_origin(hint) is tuple:
                value = Items((value,), value.mark)
        return super()._value(hint, value, what, check)

    @staticmethod
    def _converted(hint: Any, value: Text) -> Any:
        return value.text


def load(path: Path, *, check_publish: Callable[[str], object] | None = None) -> VmSettings:
    """The settings of the file at `path`, its paths absolute. Raises `ConfigError` with every complaint.

    `check_publish` is asked about each forward, by who knows more of them than their shape.
    """
    return of_text(read(path), path, check_publish=check_publish)


def of_text(text: str, path: Path, *, check_publish: Callable[[str], object] | None = None) -> VmSettings:
    """The settings in `text`, as if it stood in the file at `path`."""
    complaints = Complaints()
    root = parse(text, str(path), complaints)
    found: VmSettings | None = None
    if root is not None:
        found = _Reader(complaints).build(VmSettings, root, "")
        if found is not None and isinstance(root, Table):
            _Judge(root, complaints).settings(found, check_publish)
    elif not complaints:
        complaints.add(Mark(str(path)), "is empty; write at least `boot: {kernel: FILE, initrd: FILE}`")
    complaints.raise_any()
    assert found is not None
    return _absolute(found, path)


class _Judge:
    """What only shows when the parts are looked at together."""

    def __init__(self, root: Table, complaints: Complaints) -> None:
        self._root = root
        self._complaints = complaints

    def _at(self, *path: str | int) -> Mark:
        """Where a key stands, or the nearest thing around it."""
        value: Value = self._root
        for step in path:
            inner: Value | None = None
            if isinstance(value, Table):
                inner = next((one for word, one in value.entries if word.text == step), None)
            elif not isinstance(value, Text) and isinstance(step, int) and step < len(value.values):
                inner = value.values[step]
            if inner is None:
                break
            value = inner
        return value.mark

    def _whole(self, what: str, count: int) -> bool:
        """Whether all entries of a list could be read."""
        value = next((one for word, one in self._root.entries if word.text == what), None)
        return not isinstance(value, Items) or len(value.values) == count

    def settings(self, found: VmSettings, check_publish: Callable[[str], object] | None) -> None:
        """Complain about all of it."""
        boot = found.boot
        if boot.linuxkit is not None and (boot.kernel is not None or boot.initrd is not None):
            self._complaints.add(self._at("boot"), "boot: linuxkit builds the kernel and initrd; keep it, or the two")
        if boot.initrd is not None and boot.kernel is None and boot.linuxkit is None:
            self._complaints.add(self._at("boot"), "boot: an initrd without a kernel; name the kernel too")
        if boot.linuxkit is None and boot.kernel is None and not found.disks:
            self._complaints.add(
                self._at("boot"),
                "boot: there is nothing to boot; write linuxkit: FILE.yml, or kernel: and initrd:, or disks",
            )
        if found.network.kind == "tap" and not found.network.tap:
            self._complaints.add(self._at("network"), "network: tap needs the name of the TAP; write tap: NAME")
        if found.network.kind == "none":
            for what, given in (
                ("publish", bool(found.publish)),
                ("docker_socket", bool(found.docker and found.docker.tcp)),
            ):
                if given:
                    self._complaints.add(self._at(what), f"{what}: needs a network, and network is none")
        if found.docker is not None and found.docker.port and found.docker.tcp:
            self._complaints.add(
                self._at("docker_socket"), "docker_socket: port is vsock's; give port or tcp, not both"
            )
        if found.ready.probe == "docker" and found.docker is None:
            self._complaints.add(
                self._at("ready"), "ready: docker asks through docker_socket; add it, or another probe"
            )
        if found.ready.probe in ("lease",) or (found.ready.probe or "").startswith("tcp:"):
            if found.network.kind == "none":
                self._complaints.add(self._at("ready"), "ready: needs a network, and network is none; try console:TEXT")
        if found.restart.backoff_s > found.restart.backoff_most_s:
            self._complaints.add(self._at("restart"), "restart: backoff is longer than backoff_most")
        self._lists(found, check_publish)

    def _lists(self, found: VmSettings, check_publish: Callable[[str], object] | None) -> None:
        for what, entries, most in (
            ("shares", found.shares, MAX_SHARES),
            ("disks", found.disks, MAX_DISKS),
            ("publish", found.publish, MAX_PUBLISH),
        ):
            if len(entries) > most:
                self._complaints.add(self._at(what), f"{what}: {len(entries)} are more than {most}")
        if not self._whole("shares", len(found.shares)) or not self._whole("publish", len(found.publish)):
            return  # what was left out would shift the places
        tags: dict[str, int] = {}
        targets: dict[str, int] = {}
        for number, share in enumerate(found.shares):
            for seen, word, label in ((tags, tag_of(share, number), "tag"), (targets, share.target, "target")):
                if word in seen:
                    self._complaints.add(
                        self._at("shares", number),
                        f"shares: {label} {quoted(word)} is that of share {seen[word] + 1} too",
                    )
                seen.setdefault(word, number)
            if len(tag_of(share, number)) > 31:
                self._complaints.add(self._at("shares", number, "tag"), "shares: a tag has at most 31 characters")
            if share.owner != "squash" and (share.uid or share.gid):
                self._complaints.add(self._at("shares", number), "shares: uid and gid are for owner: squash")
        for number, spec in enumerate(found.publish):
            try:
                if check_publish is not None:
                    check_publish(spec)
            except ConfigError as error:
                self._complaints.add(self._at("publish", number), f"publish: {str(error).removeprefix('publish: ')}")


def tag_of(share: ShareSettings, number: int) -> str:
    """A share's tag: its own, or `share` and its number."""
    return share.tag or f"share{number}"


def _absolute(found: VmSettings, file: Path) -> VmSettings:
    file = file.absolute()
    base = file.parent

    def of(path: Path | None) -> Path | None:
        if path is None:
            return None
        try:
            return base / path.expanduser()
        except RuntimeError:
            raise ConfigError(f"{file}: {path}: this user has no home directory; write the whole path") from None

    def tidy(path: Path) -> Path:
        # `..` stays where it stands: what is before it may be a link.
        return Path(*[part for part in (of(path) or path).parts if part != "."])

    boot, hypervisor, network = found.boot, found.hypervisor, found.network
    binary = hypervisor.binary
    return dataclasses.replace(
        found,
        file=file,
        name=found.name or _default_name(file),
        boot=dataclasses.replace(boot, linuxkit=of(boot.linuxkit), kernel=of(boot.kernel), initrd=of(boot.initrd)),
        # A bare word is looked for in PATH.
        hypervisor=dataclasses.replace(hypervisor, binary=of(binary) if binary and len(binary.parts) > 1 else binary),
        network=dataclasses.replace(network, config=of(network.config)),
        disks=tuple(dataclasses.replace(disk, path=tidy(disk.path)) for disk in found.disks),
        shares=tuple(dataclasses.replace(share, source=tidy(share.source)) for share in found.shares),
    )


def _default_name(file: Path) -> str:
    """The file's own name, or its directory's where that says nothing."""
    word = file.parent.name if file.stem in ("vm", "machine") else file.stem
    return re.sub(r"[^A-Za-z0-9_.-]", "-", word)[:32].lstrip("-_.") or "vm"


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
