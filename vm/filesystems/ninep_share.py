"""9P by our own server, on a socket for a hypervisor (HyperKit's virtio-9p) or over vsock for any (spec companions 2.2, 4.4).

The server is `python -m vm.filesystems.ninep`, one for each share. Over vsock it listens where the guest's calls to CID 2 are led,
`VSOCKDIR/00000002.%08x`, from port 564 (9P's own) on; the guest dials and hands the connection to `mount`.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final

from vm.api import Endpoint, Owner, Share, ShareKind, Sidecar, StateDir
from vm.filesystems.mounts import MSIZE, mount

FIRST_PORT: Final = 564
GUEST_MOUNT: Final = "mount9p"
"""What a guest runs: `vm.guest.mount9p` under the name it has there."""
ALL: Final[frozenset[Owner]] = frozenset({"passthrough", "squash", "mapped", "requester"})


def port(index: int) -> int:
    """The vsock port of a machine's share of kind 9p-vsock with this number, from 0."""
    return FIRST_PORT + index


class NinepShare:
    owners: frozenset[Owner] = ALL

    def __init__(self, kind: ShareKind) -> None:
        self.kind: ShareKind = kind

    def plan(self, share: Share, state: StateDir, index: int = 0) -> Endpoint:
        if self.kind == "9p-socket":
            socket = state.share(share.tag)
            how = mount("9p", share.tag, share, "trans=virtio", "version=9p2000.L", f"msize={MSIZE}")
        else:
            socket = state.vsock / f"00000002.{port(index):08x}"
            readonly = ["--read-only"] if share.readonly else []
            how = shlex.join([GUEST_MOUNT, "--port", str(port(index)), *readonly, share.target])
        return Endpoint(share=share, sidecars=(server(share, socket),), socket=socket, mount=how)


def server(share: Share, socket: Path) -> Sidecar:
    """What serves it at `socket`."""
    words = [sys.executable, "-m", "vm.filesystems.ninep", "--socket", str(socket), "--export", str(share.source)]
    words += ["--owner", f"squash:{share.uid}:{share.gid}" if share.owner == "squash" else share.owner]
    if share.readonly:
        words.append("--read-only")
    return Sidecar(name=f"share-{share.tag}", argv=(*words, "--ready-fd", "{ready_fd}"))


SOCKET: Final = NinepShare("9p-socket")
VSOCK: Final = NinepShare("9p-vsock")
