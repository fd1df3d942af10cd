"""File-sharing companions by a share's `kind`, and what all shares of a machine come to."""

from __future__ import annotations

from collections import Counter
from typing import Final

from vm.api import FILESYSTEMS, Caps, Endpoint, FileShare, ShareKind, StateDir, VmSpec
from vm.plugins import Plugins

KINDS: Final[Plugins[FileShare]] = Plugins(
    "kind of share",
    FILESYSTEMS,
    {
        "9p-local": "vm.filesystems.qemu9p:SHARE",
        "9p-socket": "vm.filesystems.ninep_share:SOCKET",
        "9p-vsock": "vm.filesystems.ninep_share:VSOCK",
        "virtiofs": "vm.filesystems.virtiofsd:SHARE",
    },
    ("kind", "owners", "plan"),
)


def names() -> list[str]:
    """All that there are."""
    return KINDS.names()


def load(kind: str) -> FileShare:
    """Raises `ConfigError`."""
    return KINDS.load(kind)


def endpoints(spec: VmSpec, state: StateDir, caps: Caps) -> tuple[Endpoint, ...]:
    """Each share of the machine as it is served, in order. Raises `ConfigError`, `Unsupported`.

    What the hypervisor serves itself has no server of ours.
    """
    counts: Counter[ShareKind] = Counter()
    made = []
    for share in spec.shares:
        if share.kind == "virtiofs" and caps.serves_virtiofs:
            made.append(Endpoint(share=share))
        else:
            made.append(load(share.kind).plan(share, state, counts[share.kind]))
        counts[share.kind] += 1
    return tuple(made)
