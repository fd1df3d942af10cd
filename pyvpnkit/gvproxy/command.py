"""`pyvpnkit gvproxy ...`: gvproxy's own command line (spec gvproxy 1.1), for programs that start `gvproxy` themselves.

    podman machine   gvproxy -mtu 1500 -ssh-port 20022 -listen-qemu unix:///run/vm.sock -forward-sock ... -pid-file ...
    by hand          gvproxy -listen unix:///tmp/network.sock -listen-vfkit unixgram:///tmp/vfkit.sock

A symlink `gvproxy` to the console script is this too. The network is gvproxy's (192.168.127.0/24, its names, its MAC addresses),
and nothing is kept on disk, so any number run side by side. As there, the process ends with the machine on a qemu or bess link.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

from netstack.errors import NetstackError
from portfwd.invm import flags
from pyvpnkit import process
from pyvpnkit.gvproxy import translate
from pyvpnkit.gvproxy.wanted import FLAGS, wanted

log = logging.getLogger("pyvpnkit")

LIKE: Final = "v0.8.9"


def main(argv: Sequence[str]) -> int:
    """Run gvproxy's command line `argv` (without the program's name) and return the exit status."""
    try:
        given = flags.parse(argv, FLAGS)
        if given.help:
            print(flags.usage("gvproxy", __doc__.partition("\n")[0], FLAGS))
            return 0
        if given.on("version"):
            from importlib import metadata

            print(f"gvproxy version {LIKE}+pyvpnkit.{metadata.version('pyvpnkit')}")
            return 0
        asked = wanted(given)
        loaded, said = translate.settings(asked)
        with contextlib.ExitStack() as files:
            if asked.log_file:
                _log_to(asked.log_file)
            if asked.pid_file:
                # Read by programs that take the whole file for a number.
                files.callback(process.PidFile(asked.pid_file, end=b"").close)
            from pyvpnkit import daemon
            from pyvpnkit.gvproxy.beside import beside

            daemon.start_log(loaded.log_level)
            for note in said.notes:
                log.warning("%s", note)
            return daemon.main(loaded, beside=functools.partial(beside, said.extra))
    except NetstackError as error:
        text = str(error)
        print(text if text.startswith("gvproxy: ") else f"gvproxy: {text}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


def _log_to(path: str) -> None:
    """Everything that is said goes to the file, which is begun anew. Raises `ConfigError`."""
    descriptor = process.open_own_file(path, os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 2)
    os.close(descriptor)
