"""`pyvpnkit vm console`, `logs`, `plan`, `build` and `link-docker-sock`."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import time
from pathlib import Path
from typing import Final

from netstack.errors import ConfigError, HostError
from pyvpnkit.commands import vm_find
from pyvpnkit.commands.table import clean, print_json
from vm import docker_socket
from vm.hypervisors import registry
from vm.supervisor import services, showing
from vm.supervisor.design import design
from vm.supervisor.home import Home

_LOOK_S: Final = 0.1
_MAX_LINE: Final = 64 << 10
"""Octets; a guest may never end a line."""


def console(parsed: argparse.Namespace) -> int:
    """Until Ctrl-], or the machine's end."""
    from vm.terminal import interact

    home, _ = vm_find.find(parsed)
    if not home.holder() or not home.state.console.exists():
        raise HostError(f"{home.path.name} has no console now; `pyvpnkit vm status {home.path.name}` says why")
    interact(home.state.console, log=home.state.console_log, lines=parsed.lines)
    return 0


def logs(parsed: argparse.Namespace) -> int:
    """The end of a log, and what comes."""
    home, _ = vm_find.find(parsed)
    part = parsed.part if parsed.part != "hypervisor" else str(home.read("machine").get("driver", parsed.part))
    path = home.state.console_log if part == "console" else home.state.log(part)
    if "/" in part or not path.exists():
        raise ConfigError(
            f"{home.path.name} has no log {parsed.part!r}; there are: {', '.join(_logs(home)) or 'none yet'}"
        )
    for line in vm_find.tail(path, parsed.lines):
        print(clean(line))
    if parsed.follow:
        with contextlib.suppress(KeyboardInterrupt):
            _follow(path)
    return 0


def _logs(home: Home) -> list[str]:
    parts = sorted(path.stem for path in (home.path / "log").glob("*.log"))
    return [*(["console"] if home.state.console_log.exists() else []), *parts]


def _follow(path: Path) -> None:
    """Lines as they come; a log that is begun anew is followed there."""
    file = path.open("rb")
    try:
        file.seek(0, 2)
        rest = b""
        while True:
            if octets := file.read(65536):
                *lines, rest = (rest + octets).split(b"\n")
                if len(rest) > _MAX_LINE:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    print(clean(line.decode(errors="replace").rstrip("\r")), flush=True)
                continue
            time.sleep(_LOOK_S)
            with contextlib.suppress(OSError):
                now = path.stat()
                if now.st_ino != os.fstat(file.fileno()).st_ino:
                    fresh = path.open("rb")
                    file.close()
                    file = fresh
                elif now.st_size < file.tell():
                    file.seek(0)
    finally:
        file.close()


def plan(parsed: argparse.Namespace) -> int:
    """Starts nothing, and looks for nothing but programs whose place decides."""
    home, file = vm_find.find(parsed)
    if file is None:
        raise ConfigError(f"{home.path}: it is not known from which file it was made; name the file")
    wanted = vm_find.load(file)
    if parsed.hypervisor is not None:
        hypervisor = dataclasses.replace(wanted.hypervisor, driver=parsed.hypervisor)
        wanted = dataclasses.replace(wanted, hypervisor=hypervisor)
    found = design(wanted, home, registry.load(wanted.hypervisor.driver))
    if parsed.json:
        print_json(showing.as_json(wanted, found))
    else:
        print("\n".join(showing.lines(wanted, found)))
    return 0


def build(parsed: argparse.Namespace) -> int:
    """The paths of what was made are printed."""
    from vm.supervisor import building

    file = parsed.file.absolute()
    linuxkit = file
    if building.is_machine(file):
        named = vm_find.load(file).boot.linuxkit
        if named is None:
            raise ConfigError(f"{file}: boot: names no linuxkit file, so there is nothing to build")
        linuxkit = named
    built = building.make(
        linuxkit,
        parsed.output.absolute(),
        say=lambda text: print(clean(text), file=sys.stderr, flush=True),
        compression=parsed.compress,
        refresh=parsed.refresh,
    )
    print(f"{built.kernel}\n{built.initrd}")
    return 0


def link_docker_sock(parsed: argparse.Namespace) -> int:
    """Replaces a link, or a socket that nobody serves; anything else is somebody's."""
    home, file = vm_find.find(parsed)
    wanted = vm_find.load(file) if file is not None else None
    if wanted is None or wanted.docker is None:
        raise ConfigError(f"{home.path.name} has no docker_socket in its file; add `docker_socket: docker.sock`")
    target = services.docker_path(wanted, home.state)
    # Root's own machines are others.
    words = ["vm", "link-docker-sock", home.path.name, "--state-dir", str(home.path), "--path", str(parsed.path)]
    docker_socket.link_docker_sock(target, parsed.path, hint=f"sudo {shlex.join(['pyvpnkit', *words])}")
    print(f"{parsed.path} -> {target}")
    return 0
