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

STAND_INS: Final = {
    "vpnkit": "pyvpnkit.vpnkit",
    "gvproxy": "pyvpnkit.gvproxy.command",
    "slirp4netns": "pyvpnkit.slirp4netns.command",
}
"""Other programs' own command lines; also by a symlink of that name."""

OTHERS: Final = {**IN_VM, **STAND_INS}
"""All that read their command line themselves."""


def main(argv: Sequence[str]) -> int:
    """Run the command line `argv` and return the exit status."""
    _fill_standard_descriptors()
    if argv and argv[0] in OTHERS:
        return int(importlib.import_module(OTHERS[argv[0]]).main(argv[1:]))
    from pyvpnkit import cli

    return cli.main(argv)


def _fill_standard_descriptors() -> None:
    """Who starts us may have closed some of the first three. Anything else of that number would be written to, and libuv ends
    the process that closes one."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # our children are to have them, too
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:  # `sys.__stdin__` and so on stay None, for who wants to know
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))


def run() -> None:
    """The console script; by the name of one of `STAND_INS`, as a symlink gives it, it is that one's command line."""
    called = os.path.basename(sys.argv[0])
    sys.exit(main([called, *sys.argv[1:]] if called in STAND_INS else sys.argv[1:]))
