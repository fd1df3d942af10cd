"""Which convention a machine's vsock follows."""

from __future__ import annotations

from typing import assert_never

from vm.api import Vsock, VsockKind, VsockSpec
from vm.vsock.api.hybrid import HybridVsock
from vm.vsock.api.hyperkit import HyperKitVsock
from vm.vsock.api.kernel import KernelVsock
from vm.vsock.api.per_port import PerPortVsock


def vsock_for(kind: VsockKind, spec: VsockSpec) -> Vsock:
    """The vsock of a machine. Opens nothing yet.

    The sockets are in `spec.directory`: `vsock` is the one of `hybrid` (of our own device too), `connect` HyperKit's.
    """
    match kind:
        case "hyperkit":
            return HyperKitVsock(spec.directory, spec.cid)
        case "hybrid" | "vhost-user":  # of our device's two ways the one which tells that a port is refused
            return HybridVsock(spec.directory / "vsock")
        case "per-port":
            return PerPortVsock.of(spec)
        case "kernel":
            return KernelVsock(spec.cid)
    assert_never(kind)
