"""What `boot.linuxkit` names is built into `STATE/boot` before the machine starts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from netstack.errors import ConfigError
from vm.settings import VmSettings
from vm.supervisor.design import built
from vm.supervisor.home import Home
from vm.yaml_lines import Complaints, Table, parse, read


async def build(settings: VmSettings, home: Home) -> None:
    """Raises `ConfigError`, `HostError`."""
    assert settings.boot.linuxkit is not None
    await asyncio.to_thread(make, settings.boot.linuxkit, built(home.state))


def make(linuxkit: Path, out: Path, *, say: Callable[[str], None] = lambda _text: None) -> tuple[Path, ...]:
    """The kernel and the initrd of a LinuxKit file, in `out`. Raises `ConfigError`, `HostError`."""
    raise ConfigError("building is not there yet")


def is_machine(file: Path) -> bool:
    """Whether a file describes a machine rather than what is in one."""
    root = parse(read(file), str(file), Complaints())
    return isinstance(root, Table) and any(key.text == "boot" for key, _ in root.entries)
