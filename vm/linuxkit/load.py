"""Reading LinuxKit's YAML, several files as one, with every complaint at once; and writing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vm import yaml_lines
from vm.linuxkit.fields import Reader, known, render
from vm.linuxkit.merge import ids
from vm.linuxkit.schema import Kernel, LinuxKit, Trust
from vm.yaml_lines import Complaints, Mark, meant, quoted

__all__ = ["load", "load_all", "render"]


def load(source: Path | str, name: str = "") -> LinuxKit:
    """The machine of one file, or of a text, which `name` stands for in complaints.

    Raises `vm.yaml_lines.ConfigErrors` with `file:line:column: key: what is wrong; what would be accepted`, all of them.
    """
    return load_all([source], name)


def load_all(sources: Sequence[Path | str], name: str = "") -> LinuxKit:
    """Several files as one, as `linuxkit build` takes them: a later kernel's fields replace, everything else is appended."""
    complaints = Complaints()
    machine = LinuxKit()
    for source in sources:
        machine = appended(machine, _read(source, name, complaints))
    _check(machine, complaints)
    complaints.raise_any()
    return machine


def _read(source: Path | str, name: str, complaints: Complaints) -> LinuxKit:
    text = yaml_lines.read(source) if isinstance(source, Path) else source
    name = name or (str(source) if isinstance(source, Path) else "linuxkit.yml")
    before = len(complaints)
    value = yaml_lines.parse(text, name, complaints)
    if value is None:
        if len(complaints) == before:
            complaints.add(Mark(name), "is empty; write kernel, init and services at least")
        return LinuxKit()
    return Reader(complaints).build(LinuxKit, value, "") or LinuxKit()


def appended(first: LinuxKit, second: LinuxKit) -> LinuxKit:
    """Both as one machine."""
    return LinuxKit(
        kernel=_kernel(first.kernel, second.kernel),
        init=first.init + second.init,
        volumes=first.volumes + second.volumes,
        onboot=first.onboot + second.onboot,
        onshutdown=first.onshutdown + second.onshutdown,
        services=first.services + second.services,
        files=first.files + second.files,
        trust=_trust(first.trust, second.trust),
    )


def _kernel(first: Kernel | None, second: Kernel | None) -> Kernel | None:
    if first is None or second is None:
        return second or first
    later = {one.name: found for one in known(Kernel).values() if (found := getattr(second, one.name)) is not None}
    return replace(first, **later)


def _trust(first: Trust | None, second: Trust | None) -> Trust | None:
    if first is None or second is None:
        return second or first
    return Trust(image=(first.image or ()) + (second.image or ()), org=(first.org or ()) + (second.org or ()))


def _check(machine: LinuxKit, complaints: Complaints) -> None:
    """What only shows in the whole."""
    for what, named in (("service", machine.services), ("volume", machine.volumes)):
        seen: dict[str, Mark] = {}
        for one in named:
            first = seen.setdefault(one.name, one.mark)
            if first is not one.mark:
                complaints.add(one.mark, f"a {what} {one.name!r} is at {first} already; give each a name of its own")
    known_ids = ids(machine)
    volumes = [volume.name for volume in machine.volumes]
    for image in machine.containers:
        for bind in (image.binds or ()) + (image.binds_add or ()):
            source = bind.partition(":")[0]
            if not source.startswith("/") and source not in volumes:
                complaints.add(
                    image.mark, f"{image.name}: binds: no volume is named {quoted(source)}; write /{source}, or add it"
                )
        for field in ("uid", "gid", "additional_gids"):
            _ids(image.mark, f"{image.name}: {field}", getattr(image, field), known_ids, complaints)
    for file in machine.files:
        for field in ("uid", "gid"):
            _ids(file.mark, f"{file.path}: {field}", getattr(file, field), known_ids, complaints)


def _ids(mark: Mark, what: str, found: object, known_ids: Mapping[str, int], complaints: Complaints) -> None:
    for one in found if isinstance(found, tuple) else (found,):
        if isinstance(one, str) and one not in known_ids:
            complaints.add(mark, f"{what}: no container is named {quoted(one)}{meant(one, known_ids)}")
