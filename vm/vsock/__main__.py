"""The vsock device of a virtual machine, as a program beside its hypervisor.

    python -m vm.vsock --vhost-user S --directory DIR --cid 3 [--forward 2376 ...]

It ends by SIGTERM or SIGINT, or with `--end-with-stdin` when its standard input ends, as it does with whoever started it. SIGUSR1
has it say its counters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from netstack.errors import NetstackError
from vm.sidecar import more_descriptors
from vm.vsock.engine import LIMIT
from vm.vsock.service import VsockService

log = logging.getLogger("pyvpnkit")


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
    parser.add_argument(
        "--ready-fd", type=int, metavar="N", help="descriptor that is written to and closed when it is ready"
    )
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input ends")
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
        asyncio.run(_run(service, options.ready_fd, options.end_with_stdin))
    except NetstackError as error:
        print(f"vm.vsock: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(service: VsockService, ready_fd: int | None, end_with_stdin: bool) -> None:
    loop = asyncio.get_running_loop()
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: log.info("%s", json.dumps(service.describe(), default=str)))
    async with service:
        with _until_end(over.set) if end_with_stdin else contextlib.nullcontext():
            if ready_fd is not None:
                with contextlib.suppress(OSError):
                    os.write(ready_fd, b"\n")
                with contextlib.suppress(OSError):
                    os.close(ready_fd)
            await over.wait()


@contextlib.contextmanager
def _until_end(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` when standard input ends. A thread reads it: it may be a file, which no loop can watch."""

    def read() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(end)

    loop = asyncio.get_running_loop()
    threading.Thread(target=read, daemon=True).start()
    yield


if __name__ == "__main__":
    sys.exit(main())
