"""The vsock device of a virtual machine, as a program beside its hypervisor.

    python -m vm.vsock --vhost-user S --directory DIR --cid 3 [--forward 2376 ...]

It ends by SIGTERM or SIGINT, or with `--end-with-stdin` when its standard input ends, as it does with whoever started it. SIGUSR1
has it say its counters.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from netstack.errors import NetstackError
from vm.sidecar import add_options, hear, more_descriptors, until_told
from vm.vsock.engine import LIMIT
from vm.vsock.service import VsockService


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to end: 0; 1 where it cannot begin, 2 for a bad command line."""
    parser = argparse.ArgumentParser(
        prog="vm.vsock", description="vsock for a virtual machine, without root or a kernel module"
    )
    parser.add_argument("--vhost-user", type=Path, required=True, metavar="PATH", help="socket for the hypervisor")
    parser.add_argument("--directory", type=Path, required=True, metavar="DIR", help="where the host's sockets are")
    parser.add_argument("--cid", type=int, default=3, help="the guest's address (%(default)s)")
    parser.add_argument(
        "--forward",
        type=int,
        action="append",
        default=[],
        metavar="PORT",
        help="DIR/guest.PORT for this port of the guest",
    )
    parser.add_argument("--limit", type=int, default=LIMIT, help="connections at once (%(default)s)")
    add_options(parser)
    try:
        options = parser.parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    more_descriptors()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        service = VsockService(
            vhost_user=options.vhost_user,
            directory=options.directory,
            cid=options.cid,
            forwards=options.forward,
            limit=options.limit,
        )
        asyncio.run(_run(service, options))
    except NetstackError as error:
        print(f"vm.vsock: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(service: VsockService, options: argparse.Namespace) -> None:
    over = asyncio.Event()
    hear(over, service.describe)
    async with service:
        await until_told(options, service.describe, over)


if __name__ == "__main__":
    sys.exit(main())
