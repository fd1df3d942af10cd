"""Words of command lines that several drivers have in common."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from netstack.errors import ConfigError
from vm.api import Share, VmSpec

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


def mounts(spec: VmSpec) -> tuple[str, ...]:
    """What the guest has to run for the shares on virtio devices."""
    return tuple(_mount(share) for share in spec.shares if share.kind in ("virtiofs", "9p-socket"))


def _mount(share: Share) -> str:
    options = ["ro"] if share.readonly else []
    if share.kind == "virtiofs":
        kind = "virtiofs"
    else:
        kind, options = "9p", ["trans=virtio,version=9p2000.L", *options]
    words = ["mount", "-t", kind, *(["-o", ",".join(options)] if options else []), share.tag, share.target]
    return shlex.join(words)
