"""Words of command lines that several drivers have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from netstack.errors import ConfigError
from vm.api import Caps, StateDir, VmSpec
from vm.filesystems.mounts import mount
from vm.filesystems.registry import endpoints

HYBRID: Path = Path("vsock")
"""The socket that takes CONNECT, in the directory of vsock's sockets (spec companions 1.2, 4.2)."""


def plain(driver: str, setting: str, value: str | Path, forbidden: str = ",") -> str:
    """`value` as a part of a word that `driver` divides at `forbidden`, without a way to write those. Raises `ConfigError`."""
    text = str(value)
    for one in forbidden:
        if one in text:
            raise ConfigError(f"{setting}: {text}: {driver} cannot be told a value with {one!r} in it; choose another")
    return text


def flagged(flag: str, values: Iterable[str]) -> Iterator[str]:
    """`flag` before each of `values`."""
    for value in values:
        yield flag
        yield value


def mounts(spec: VmSpec, state: StateDir, offers: Caps) -> tuple[str, ...]:
    """What the guest has to run for its shares, where the hypervisor serves virtiofs itself."""
    return tuple(
        endpoint.mount or mount("virtiofs", endpoint.share.tag, endpoint.share)
        for endpoint in endpoints(spec, state, offers)
    )


def named_both_ways(directory: Path) -> None:
    """For a hypervisor that dials `vsock_PORT`: what listens at HyperKit's names of CID 2, as shares of kind 9p-vsock do."""
    for path in directory.glob(f"{2:08x}.????????"):
        with contextlib.suppress(ValueError):
            name = directory / f"{HYBRID}_{int(path.suffix[1:], 16)}"
            if name.is_symlink() or not name.exists():
                name.unlink(missing_ok=True)
                name.symlink_to(path.name)
