"""`vm.yml` read: everything that is wrong with a file is said at once, each with its line and with what would be accepted.

Paths are relative to the file, and `~` is the user's home.

The smallest file says what to boot:

    boot: {kernel: vmlinuz, initrd: initrd.img}
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError
from vm.filesystems.ninep_share import FIRST_PORT
from vm.linuxkit.fields import Check, Reader
from vm.settings import (
    BootSettings,
    ConsoleSettings,
    DockerSettings,
    HypervisorSettings,
    NetworkSettings,
    ReadySettings,
    RestartSettings,
    StopSettings,
    VmSettings,
    tag_of,
)
from vm.yaml_lines import Complaints, Items, Mark, Table, Text, Value, parse, quoted, read

MAX_SHARES: Final = 16
MAX_DISKS: Final = 16
MAX_PUBLISH: Final = 256

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
        self._ports(found.vsock_ports)
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

    def _ports(self, ports: Mapping[str, int]) -> None:
        """Of the guest; `control` is the host's."""
        names: dict[int, str] = {}
        shares = range(FIRST_PORT, FIRST_PORT + MAX_SHARES)
        if ports.get("control") in shares:
            self._complaints.add(
                self._at("vsock", "ports", "control"),
                f"vsock.ports.control: {shares[0]} to {shares[-1]} are those of shares by vsock; VPNKit's is 4098",
            )
        for name, port in ports.items():
            if name != "control" and (other := names.setdefault(port, name)) != name:
                self._complaints.add(
                    self._at("vsock", "ports", name),
                    f"vsock.ports.{name}: {port} is that of {other} too; one port is one service's",
                )

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


def _absolute(found: VmSettings, file: Path) -> VmSettings:
    file = file.absolute()
    base = file.parent

    def expanded(path: Path | None) -> Path | None:
        try:
            return path and path.expanduser()
        except RuntimeError:
            raise ConfigError(f"{file}: {path}: this user has no home directory; write the whole path") from None

    def of(path: Path | None) -> Path | None:
        found = expanded(path)
        return found and base / found

    def tidy(path: Path) -> Path:
        # `..` stays where it stands: what is before it may be a link.
        return Path(*[part for part in (of(path) or path).parts if part != "."])

    boot, hypervisor, network, console = found.boot, found.hypervisor, found.network, found.console
    binary = hypervisor.binary
    return dataclasses.replace(
        found,
        file=file,
        name=found.name or _default_name(file),
        boot=dataclasses.replace(boot, linuxkit=of(boot.linuxkit), kernel=of(boot.kernel), initrd=of(boot.initrd)),
        # A bare word is looked for in PATH.
        hypervisor=dataclasses.replace(hypervisor, binary=of(binary) if binary and len(binary.parts) > 1 else binary),
        network=dataclasses.replace(network, config=of(network.config)),
        # These are relative to the state directory.
        console=dataclasses.replace(console, path=expanded(console.path), log=expanded(console.log)),
        docker=found.docker and dataclasses.replace(found.docker, path=expanded(found.docker.path)),
        disks=tuple(dataclasses.replace(disk, path=tidy(disk.path)) for disk in found.disks),
        shares=tuple(dataclasses.replace(share, source=tidy(share.source)) for share in found.shares),
    )


def _default_name(file: Path) -> str:
    """The file's own name, or its directory's where that says nothing."""
    word = file.parent.name if file.stem in ("vm", "machine") else file.stem
    return re.sub(r"[^A-Za-z0-9_.-]", "-", word)[:32].lstrip("-_.") or "vm"
