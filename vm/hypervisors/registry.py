"""Drivers of hypervisors by the name that `hypervisor.driver` has."""

from __future__ import annotations

from typing import Final

from vm.api import HYPERVISORS, Hypervisor
from vm.plugins import Plugins

NAMES: Final = ("qemu", "hyperkit", "vfkit", "cloud-hypervisor", "firecracker", "crosvm", "fake")
"""Ours."""

DRIVERS: Final[Plugins[Hypervisor]] = Plugins(
    "hypervisor",
    HYPERVISORS,
    {name: f"vm.hypervisors.{name.replace('-', '_')}:DRIVER" for name in NAMES},
    ("name", "caps", "plan", "start"),
)


def names() -> list[str]:
    """All that there are."""
    return DRIVERS.names()


def load(name: str) -> Hypervisor:
    """Raises `ConfigError`."""
    return DRIVERS.load(name)
