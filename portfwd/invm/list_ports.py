"""`pyvpnkit list-ports`: VPNKit's `vpnkit-list-ports`, the ports that are exposed, one a line (spec vpnkit 1.4)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Final

from netstack.errors import ConfigError, NetstackError
from portfwd.invm import flags
from portfwd.invm.control import HttpControl
from portfwd.invm.transport import FORMS, Address

PROGRAM: Final = "pyvpnkit list-ports"
FLAGS: Final = {
    "control": flags.Flag(value="ADDRESS", help="of the HTTP control API"),
    "debug": flags.Flag(help="also the last events of the host's multiplexer, on standard error"),
}
WHAT: Final = f"""\
List the ports that are exposed on the host, one a line.
ADDRESS: {FORMS}."""


def main(argv: Sequence[str]) -> int:
    """Returns the exit status: 0, 1 where something outside failed, 2 for the command line."""
    try:
        given = flags.parse(argv, FLAGS)
        if given.help:
            print(flags.usage(PROGRAM, WHAT, FLAGS))
            return 0
        if given.rest:
            raise ConfigError(f"{given.rest[0]!r} is no flag; write -control {given.rest[0]}")
        if not given.text("control"):
            raise ConfigError(f"give -control ADDRESS ({FORMS}): where the HTTP control API is")
        return asyncio.run(_run(HttpControl(Address.parse(given.text("control"))), given.on("debug")))
    except NetstackError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


async def _run(control: HttpControl, debug: bool) -> int:
    for port in await control.list():
        print(port)
    sys.stdout.flush()
    if debug:
        sys.stderr.write(await control.dump())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
