"""A folder of the host for virtual machines, as a program: 9P2000.L on a Unix socket.

    python -m vm.filesystems.ninep --socket PATH --export DIR [--owner mapped] [--read-only]

It ends by SIGTERM or SIGINT, or with `--end-with-stdin` when its standard input ends, as it does with whoever started it.
SIGUSR1 has it say its counters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from netstack.errors import ConfigError, NetstackError
from netstack.link.listening import UnixSocket
from vm import sidecar
from vm.filesystems.ninep.limits import Limits
from vm.filesystems.ninep.listen import FileServer
from vm.filesystems.ninep.owners import ACCEPTED, parse_owner
from vm.filesystems.ninep.share import Share

log = logging.getLogger("pyvpnkit")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vm.filesystems.ninep", description="a folder for virtual machines, by 9P2000.L"
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket", metavar="PATH", help="Unix socket to listen on, mode 0600")
    where.add_argument("--serve-fd", type=int, metavar="N", help="connected stream socket to serve, and end with")
    parser.add_argument("--export", type=Path, required=True, metavar="DIR", help="the folder")
    parser.add_argument("--owner", default="mapped", help=f"whose files are: {ACCEPTED} (%(default)s)")
    parser.add_argument("--read-only", action="store_true", help="nothing of it can be changed")
    parser.add_argument("--msize", type=int, default=Limits.msize, help="octets of the longest message (%(default)s)")
    sidecar.add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run until told to end: 0; 1 where it cannot begin, 2 for a bad command line."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as end:
        return int(end.code or 0)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        sidecar.more_descriptors()
        limits = Limits(msize=options.msize)
        share = Share(options.export, parse_owner(options.owner), read_only=options.read_only, limits=limits)
        with contextlib.ExitStack() as stack:
            stack.callback(share.close)
            listeners = (
                [] if options.socket is None else [UnixSocket(options.socket, socket.SOCK_STREAM, setting="--socket")]
            )
            connected = None if options.serve_fd is None else _connected(options.serve_fd)
            stack.pop_all()
        sidecar.run(_run(FileServer(share, listeners), connected, options))
    except NetstackError as error:
        print(f"vm.filesystems.ninep: {error}", file=sys.stderr)
        return 1
    return 0


def _connected(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        sock.getpeername()
    except OSError as error:
        raise ConfigError(f"--serve-fd: {fd}: {error.strerror}; it must be a connected stream socket") from None
    return sock


async def _run(server: FileServer, connected: socket.socket | None, options: argparse.Namespace) -> None:
    over = asyncio.Event()
    sidecar.hear(over, server.describe)
    async with server, asyncio.TaskGroup() as group:
        serving = None if connected is None else group.create_task(server.serve(connected))
        if serving is not None:
            serving.add_done_callback(lambda _: over.set())
        await sidecar.until_told(options, server.describe, over)
        if serving is not None:
            serving.cancel()


if __name__ == "__main__":
    sys.exit(main())
