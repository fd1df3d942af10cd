"""A design in words for a person, and in values of JSON for programs: `pyvpnkit vm plan`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any

from vm.api import Lost, Sidecar
from vm.settings import VmSettings
from vm.supervisor.design import Design


def as_json(settings: VmSettings, design: Design) -> dict[str, Any]:
    """Everything that would be started, written and published."""
    plan = design.plan
    return {
        "name": design.spec.name,
        "driver": plan.driver,
        "argv": list(plan.argv),
        "env": dict(plan.env),
        "files": {str(path): octets.decode(errors="replace") for path, octets in plan.files.items()},
        "disks": [{"path": str(disk.path), "size": disk.size, "format": disk.format} for disk in plan.disks],
        "network": _sidecar(design.network) if design.network is not None else None,
        "sidecars": [_sidecar(one) for one in design.sidecars],
        "rest": [{"method": one.method, "path": one.path, "body": one.body} for one in plan.rest],
        "sockets": [str(path) for path in plan.sockets],
        "console": plan.console,
        "vsock": plan.vsock,
        "mounts": list(design.mounts),
        "ready": settings.probe,
        "publish": list(settings.publish),
        "rejoins_network": design.rejoins,
    }


def _sidecar(one: Sidecar) -> dict[str, Any]:
    return {"name": one.name, "argv": list(one.argv), "env": dict(one.env), "lost": one.lost.name.lower()}


def lines(settings: VmSettings, design: Design) -> Iterator[str]:
    """The same to be read: what runs, in order, as it could be typed."""
    plan = design.plan
    yield f"# {design.spec.name}: {plan.driver}, {design.spec.cpus} CPU, {design.spec.memory_mib} MiB"
    for path, octets in plan.files.items():
        yield f"\n# written before: {path} ({len(octets)} octets)"
    for disk in plan.disks:
        if disk.size is not None:
            yield f"\n# made where absent: {disk.path} ({disk.size >> 20} MiB, {disk.format})"
    before = [one for one in (design.network, *design.sidecars) if one is not None and not one.after_machine]
    for one in before:
        yield from _words(one, "" if one is not design.network or design.rejoins else ", and the machine with it")
    yield "\n# the machine"
    yield _command(plan.argv, plan.env)
    for one in design.sidecars:
        if one.after_machine:
            yield from _words(one, "")
    if plan.rest:
        yield "\n# then told"
        for call in plan.rest:
            body = f" {json.dumps(call.body)}" if call.body is not None else ""
            yield f"{call.method} {call.path}{body}"
    yield f"\n# ready: {settings.probe}, within {settings.ready.limit_s:g} s"
    if settings.publish:
        yield "\n# published when it is ready"
        yield from settings.publish
    if design.mounts:
        yield "\n# for the guest to run, as root"
        yield from design.mounts


_LOST = {
    Lost.STOPS_MACHINE: "the machine is stopped when it is lost",
    Lost.RESTART: "started again when it is lost",
    Lost.DEGRADED: "the machine goes on without",
}


def _words(one: Sidecar, more: str) -> Iterator[str]:
    yield f"\n# {one.name}: {_LOST[one.lost]}{more}"
    yield _command(one.argv, one.env)


def _command(argv: tuple[str, ...], env: Any) -> str:
    """One option a line, with what belongs to it."""
    words = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
    words += [shlex.quote(word) for word in argv]
    text = words[0] if words else ""
    for word in words[1:]:
        text += (" \\\n    " if word.startswith("-") else " ") + word
    return text
