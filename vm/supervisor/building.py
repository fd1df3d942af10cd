"""What `boot.linuxkit` names is built into `STATE/boot` before the machine starts."""

from __future__ import annotations

from vm.settings import VmSettings
from vm.supervisor.home import Home


async def build(settings: VmSettings, home: Home) -> None:
    """Raises `ConfigError`, `HostError`."""
    raise NotImplementedError
