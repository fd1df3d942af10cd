"""A daemon whose ways out follow a file: `python way_out_daemon.py FILE PYTHON -m pyvpnkit run ...` (see `Daemon.wrap`).

The file holds the arguments of `WaysOut.replace` as a JSON object.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from typing import Any

from netstack.errors import ConfigError
from netstack.host.outward import WaysOut
from portfwd.watch import FileWatch
from pyvpnkit import cli
from pyvpnkit.doors import Doors

log = logging.getLogger("pyvpnkit")


def main(path: str, argv: list[str]) -> int:
    inner = Doors._outgoing

    def outgoing(self: Doors, undo: contextlib.AsyncExitStack) -> None:
        inner(self, undo)
        ways = WaysOut(self._service.stack)
        undo.callback(ways.close)
        number = 0

        def changed(content: Any) -> None:
            nonlocal number
            number += 1
            try:
                ways.replace(**json.loads(content))
            except (ConfigError, TypeError, ValueError) as error:
                log.error("%s", error)
            log.warning("ways out %d: %s", number, json.dumps(ways.status()))

        ways.start(asyncio.get_running_loop())
        watch = FileWatch(path, changed, every_s=0.05)
        undo.callback(watch.close)
        watch.start(asyncio.get_running_loop())

    Doors._outgoing = outgoing  # type: ignore[method-assign]
    return cli.main(argv)


if __name__ == "__main__":
    # FILE PYTHON -m pyvpnkit ...
    sys.exit(main(sys.argv[1], sys.argv[5:]))
