"""How a program that runs beside a machine tells that it is ready, and is told to end (`vm.api.Sidecar`).

It ends by SIGTERM or SIGINT, or when its standard input ends, if that is its starter's way: the end of a process ends its pipes,
however it came. SIGUSR1 has it say its counters.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

log = logging.getLogger("pyvpnkit")
_Made = TypeVar("_Made")


def run(program: Coroutine[Any, Any, _Made]) -> _Made:
    """Until it is done; on uvloop where it is installed, which takes half the time for each message."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(program)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(program)


def more_descriptors() -> None:
    """As many as may be had: guests open files and connections by the thousand, and the usual limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--ready-fd N` and `--end-with-stdin`."""
    ready = "descriptor that is written to and closed when it is ready"
    parser.add_argument("--ready-fd", type=int, metavar="N", help=ready)
    parser.add_argument("--end-with-stdin", action="store_true", help="end when standard input ends")


def hear(over: asyncio.Event, describe: Callable[[], Any]) -> None:
    """From now on signals set `over`, or ask for `describe`; before the first socket is there, so that none is left behind."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    loop.add_signal_handler(signal.SIGUSR1, lambda: log.info("%s", json.dumps(describe(), default=str)))


async def until_told(
    options: argparse.Namespace, describe: Callable[[], Any], over: asyncio.Event | None = None
) -> None:
    """Say that it is ready, and wait for the end, or for `over`. `options` are those of `add_options`."""
    loop = asyncio.get_running_loop()
    over = over or asyncio.Event()
    hear(over, describe)
    if options.end_with_stdin:
        threading.Thread(target=_read_to_end, args=(loop, over.set), daemon=True).start()
    if options.ready_fd is not None:
        with contextlib.suppress(OSError):
            os.write(options.ready_fd, b"\n")
        with contextlib.suppress(OSError):
            os.close(options.ready_fd)
    await over.wait()


def _read_to_end(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    """In a thread: standard input may be a file, which no loop can watch."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(end)
