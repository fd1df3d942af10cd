"""9P by QEMU itself (`-fsdev local`): nothing runs beside it (spec companions 2.2, 2.3).

Who owns what is its security model:

    mapped        mapped-xattr    owners, modes and kinds are kept in extended attributes `user.virtfs.*` of plain files, mode
                                  0600, all QEMU's user's. Needs no root. Host programs see neither modes nor links.
    passthrough   passthrough     as root: what the guest sets is what the host has
                  none            otherwise: what QEMU's user may not set fails (chown: EPERM)

QEMU 7.2 refuses fifos and device nodes with passthrough and none. The kernel of the guest needs 9p and 9pnet_virtio, which Debian's
cloud kernel lacks.
"""

from __future__ import annotations

import os
from typing import Final

from vm.api import Endpoint, Owner, Share, ShareKind, StateDir, Unsupported
from vm.filesystems.mounts import MSIZE, mount


class Qemu9p:
    kind: ShareKind = "9p-local"
    owners: frozenset[Owner] = frozenset({"mapped", "passthrough"})

    def plan(self, share: Share, state: StateDir, index: int = 0) -> Endpoint:
        if share.owner not in self.owners:
            what = f"share {share.tag}: QEMU's own 9P has no owner: {share.owner}"
            raise Unsupported(self.kind, what, ("9p-vsock", "9p-socket"))
        return Endpoint(
            share=share,
            mount=mount("9p", share.tag, share, "trans=virtio", "version=9p2000.L", f"msize={MSIZE}"),
        )


def security_model(owner: Owner, root: bool | None = None) -> str:
    """QEMU's word for it. `root`: QEMU runs as root; `None`: as we do."""
    if owner == "mapped":
        return "mapped-xattr"
    return "passthrough" if (os.geteuid() == 0 if root is None else root) else "none"


SHARE: Final = Qemu9p()
