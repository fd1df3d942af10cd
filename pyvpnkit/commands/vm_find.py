"""Which machine somebody means, and how it is talked to."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from portfwd.spec import PublishSpec
from pyvpnkit.commands.client import Client
from vm import settings_file
from vm.settings import VmSettings
from vm.supervisor import home as homes
from vm.supervisor.home import Home

STARTS_S: Final = 10.0
"""How long a supervisor may take from its lock to its socket, on a busy host."""


def load(file: Path) -> VmSettings:
    """What a file says; raises `ConfigError` with all complaints."""
    return settings_file.load(file, check_publish=PublishSpec.parse)


def _name_of(file: Path) -> str:
    return load(file).name


def find(parsed: argparse.Namespace) -> tuple[Home, Path | None]:
    """The directory of the machine that the command line names, and its file. Raises `ConfigError`."""
    word = parsed.machine
    if word is None:
        word = _guess(parsed.state_dir)
    home, file = homes.find(word, parsed.state_dir, _name_of)
    if not home.exists and file is None:
        raise ConfigError(f"there is no machine {word!r}{_known(word)}")
    return home, file


def _guess(state_dir: Path | None) -> str:
    if state_dir is not None:
        return state_dir.name
    if Path("vm.yml").exists():
        return "./vm.yml"
    known = names()
    if len(known) == 1:
        return known[0]
    raise ConfigError(
        f"which machine? Name its file{', or one of: ' + ', '.join(known) if known else ', such as vm.yml'}"
    )


def names() -> list[str]:
    """Those that were started at some time, with their directories in the usual place."""
    try:
        return sorted(path.name for path in homes.base().iterdir() if (path / "machine.json").exists())
    except OSError:
        return []


def _known(word: str) -> str:
    hint = f"; is it a file? Write ./{word}" if os.path.exists(word) else ""
    return hint or f"; there are: {', '.join(names()) or 'none'}"


def running(home: Home) -> Client | None:
    """The supervisor's API; `None` where none runs. Raises `HostError` where it does not answer."""
    if not home.holder():
        return None
    until = time.monotonic() + STARTS_S
    while not home.state.control.is_socket():  # it has only begun, or has nearly ended
        if not home.holder():
            return None
        if time.monotonic() > until:
            raise HostError(
                f"the supervisor (process {home.holder()}) does not answer; see {home.state.log('supervisor')}"
            )
        time.sleep(0.02)
    return Client(str(home.state.control))


def needed(home: Home) -> Client:
    """The same; raises `HostError` where none runs."""
    client = running(home)
    if client is None:
        raise HostError(f"{home.path.name} is not up; `pyvpnkit vm up` starts it")
    return client


def status(home: Home) -> dict[str, Any]:
    """As the supervisor says; of a machine without one, what became of it."""
    client = running(home)
    if client is not None:
        try:
            found: dict[str, Any] = client.get("/v1/status")
            return found
        except HostError:
            if home.holder():
                raise
    kept = home.read("machine")
    return {
        "name": kept.get("name", home.path.name),
        "file": kept.get("file", ""),
        "state": "stopped",
        **home.read("result"),
    }


def size_of(path: Path) -> int:
    """In octets; 0 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def tail(path: Path, lines: int, most: int = 256 << 10, *, after: int = 0) -> list[str]:
    """The last lines of a log, of those that came when it had `after` octets; of all where it has been cut since."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - most, after if after <= size else 0))
            octets = file.read(most)
    except OSError:
        return []
    return octets.decode(errors="replace").splitlines()[-lines:] if lines > 0 else []
