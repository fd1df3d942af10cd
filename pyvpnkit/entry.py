"""The console script. The programs for inside a VM start without the daemon's imports, for they have small machines to run in."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

IN_VM: Final = {
    "forwarder": "portfwd.invm.forwarder",
    "expose-port": "portfwd.invm.expose_port",
    "list-ports": "portfwd.invm.list_ports",
    "vsudd": "vm.guest.vsudd",
    "timesync": "vm.guest.timesync",
    "mount9p": "vm.guest.mount9p",
}
"""Commands with flags as Go writes them, and the modules whose `main` they are."""

OTHERS: Final = {**IN_VM, "vpnkit": "pyvpnkit.vpnkit"}
"""All that read their command line themselves."""


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` and return the exit status."""
    if argv and argv[0] in OTHERS:
        return int(importlib.import_module(OTHERS[argv[0]]).main(argv[1:]))
    from pyvpnkit import cli

    return cli.main(argv)


def run() -> None:
    """The console script; by the name of `vpnkit`, as a symlink gives it, it is VPNKit's command line."""
    called = os.path.basename(sys.argv[0]) == "vpnkit"
    sys.exit(main(["vpnkit", *sys.argv[1:]] if called else sys.argv[1:]))
