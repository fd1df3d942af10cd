"""The supervisor as a process of its own: `python -m vm.supervisor FILE --state-dir DIR [--report-fd N] [--foreground]`.

`pyvpnkit vm up` starts it. On `--report-fd` it writes what happens, a JSON object a line, until the machine is ready or will not
be; then it closes it. SIGTERM and SIGINT take the machine down, the second time without asking the guest.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import logging.handlers
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError, HostError, NetstackError
from vm import settings_file
from vm.hypervisors import registry
from vm.settings import VmSettings
from vm.sidecar import more_descriptors
from vm.supervisor.building import build, disagreements
from vm.supervisor.control import serving
from vm.supervisor.home import Home
from vm.supervisor.journal import Entry
from vm.supervisor.lifecycle import State
from vm.supervisor.supervisor import Supervisor

MAX_LOG: Final = 1 << 20
FULL_S: Final = 0.1
"""After which somebody who does not read is tried again."""
TOLD_S: Final = 1.0
"""How long he may hold up the end."""
FINAL: Final = (State.READY.value, State.STOPPED.value, State.FAILED.value)
_FORMAT: Final = "%(asctime)s %(levelname)s %(message)s"


class _Lines(logging.Formatter):
    """What is said stays in its line, whatever a guest puts in."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "".join(char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text)


class Report:
    """Says to a parent, or to a person, what happens until the machine is ready or down."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_blocking(descriptor, False)

    async def tell(self, entry: dict[str, Any]) -> None:
        """Who waited for it may be gone, or stopped, which holds up nothing but this."""
        left = self._write(_line(entry))
        while left:
            await asyncio.sleep(FULL_S)
            left = self._write(left)

    def say(self, entry: dict[str, Any]) -> None:
        """The same at once, or never."""
        self._write(_line(entry))

    def _write(self, octets: bytes) -> bytes:
        """What is left of them."""
        if self._descriptor is None:
            return b""
        try:
            return octets[os.write(self._descriptor, octets) :]
        except BlockingIOError:
            return octets
        except OSError:
            self.close()
            return b""

    def close(self) -> None:
        """Harmless when repeated."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


async def supervise(home: Home, wanted: VmSettings, report: Report) -> State:
    """With the lock held: until the machine is down. Raises `ConfigError`."""
    left = home.reclaim()
    home.write("result", {"state": State.FAILED.value, "reason": "the supervisor was killed"})  # unless it says better
    home.keep(home.identity())
    home.write("machine", {"name": wanted.name, "file": str(wanted.file), "driver": wanted.hypervisor.driver})
    supervisor = Supervisor(wanted, home, registry.load(wanted.hypervisor.driver), build=build)
    if left:
        supervisor.journal.add("reclaimed", f"ended what a killed supervisor left: {', '.join(left)}")
    for complaint in disagreements(wanted):
        supervisor.journal.add("warning", complaint, level=logging.WARNING)
    loop = asyncio.get_running_loop()
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        supervisor.down(kill=len(asked) > 1)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ask)
    telling = asyncio.create_task(_tell(supervisor, report))
    try:
        async with serving(supervisor):
            return await supervisor.run()
    finally:
        await asyncio.wait([telling], timeout=TOLD_S)
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def _tell(supervisor: Supervisor, report: Report) -> None:
    async with contextlib.aclosing(supervisor.journal.read()) as entries:
        async for entry in entries:
            await report.tell(_with_degraded(entry, supervisor))
            if entry.get("state") in FINAL:
                report.close()


def _with_degraded(entry: Entry, supervisor: Supervisor) -> Entry:
    if entry.get("state") == State.READY.value:
        return {
            **entry,
            "degraded": dict(supervisor.degraded),
            "published": list(supervisor.published.held.values()),
            "docker_socket": str(supervisor.docker.path) if supervisor.docker is not None else "",
        }
    return entry


def main(argv: Sequence[str] | None = None) -> int:
    """0: it was taken down or its guest powered off. 1: it failed. 2: what was asked is wrong."""
    parser = argparse.ArgumentParser(prog="python -m vm.supervisor", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--state-dir", type=Path, required=True)
    parser.add_argument("--report-fd", type=int)
    parser.add_argument("--foreground", action="store_true")
    parsed = parser.parse_args(argv)
    report = Report(parsed.report_fd)
    if parsed.report_fd is not None:
        os.set_inheritable(parsed.report_fd, False)
    home = Home(parsed.state_dir)
    more_descriptors()  # two for each client of docker.sock
    try:
        home.prepare()
        held = home.lock()
        if held is None:
            raise HostError(_taken(home, parsed.file))
        # It is held to the very end of the process: who finds it free finds nothing of us.
        _log_to(home, foreground=parsed.foreground)
        wanted = settings_file.load(parsed.file)
        state = asyncio.run(supervise(home, wanted, report))
    except NetstackError as error:
        report.say({"kind": "error", "text": str(error), "status": 2 if isinstance(error, ConfigError) else 1})
        if parsed.report_fd is None:
            print(f"pyvpnkit: {error}", file=sys.stderr)
        logging.getLogger("vm.supervisor").error("%s", error)
        return 2 if isinstance(error, ConfigError) else 1
    finally:
        report.close()
    return 0 if state is State.STOPPED else 1


def _taken(home: Home, file: Path) -> str:
    """Two files may give one name to what they describe."""
    other = home.read("machine").get("file")
    another = other is not None and other != str(file.absolute())
    text = f"it is up already{f', as {other} says' if another else ''} (supervisor {home.holder()}); `pyvpnkit vm down` stops it"
    return text + (", or give this one another `name`" if another else "")


def _log_to(home: Home, *, foreground: bool) -> None:
    os.umask(0o077)
    handlers: list[logging.Handler] = [
        logging.handlers.RotatingFileHandler(home.state.log("supervisor"), maxBytes=MAX_LOG, backupCount=1)
    ]
    if foreground:
        handlers.append(logging.StreamHandler())
    for handler in handlers:
        handler.setFormatter(_Lines(_FORMAT))
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in handlers:
        root.addHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
