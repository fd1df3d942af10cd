"""`pyvpnkit vm up`: start the supervisor, and say how it goes until the machine is ready."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from netstack.errors import ConfigError
from pyvpnkit.commands import vm_find
from pyvpnkit.commands.table import clean
from vm.hypervisors import registry
from vm.hypervisors.process import SAFE
from vm.settings import VmSettings
from vm.supervisor.design import design
from vm.supervisor.home import Home

ENDS_S: Final = 10.0
SHOWN_LINES: Final = 15
MAX_LINE: Final = 1 << 20


def up(parsed: argparse.Namespace) -> int:
    """0 when it is ready, 1 when it failed, 2 when the file is wrong."""
    home, file = vm_find.find(parsed)
    if file is None:
        raise ConfigError(f"{home.path}: it is not known from which file it was made; name the file")
    settings = vm_find.load(file)
    design(
        settings, home, registry.load(settings.hypervisor.driver)
    )  # what cannot be is said here, before anything runs
    home.prepare()
    if parsed.foreground:
        from vm.supervisor import __main__ as supervisor

        return supervisor.main([str(file), "--state-dir", str(home.path), "--foreground"])
    began = time.monotonic()
    before = {path: vm_find.size_of(path) for path in _logs(settings, home).values()}
    reading, writing = os.pipe()
    with open(home.state.log("supervisor"), "ab", opener=_private) as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vm.supervisor",
                str(file),
                "--state-dir",
                str(home.path),
                "--report-fd",
                str(writing),
            ],
            env={**os.environ, **SAFE},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            start_new_session=True,
        )
    os.close(writing)
    with open(reading, "rb") as report, _progress() as progress:
        try:
            return _wait(_entries(report), settings, home, progress, began, before, wait=not parsed.no_wait)
        except KeyboardInterrupt:
            progress.line(f"it goes on in the background; `pyvpnkit vm down {settings.name}` stops it", bad=True)
            return 130
        finally:
            process.returncode = process.poll() or 0  # it is its own master now; nobody is to warn that it runs


def _private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _entries(report: Any) -> Iterator[dict[str, Any]]:
    while line := report.readline(MAX_LINE):
        found = json.loads(line)
        yield found


def _wait(
    entries: Iterator[dict[str, Any]],
    settings: VmSettings,
    home: Home,
    progress: Progress,
    began: float,
    before: Mapping[Path, int],
    *,
    wait: bool,
) -> int:
    for entry in entries:
        text, state = _lines(entry["text"]), entry.get("state")
        if entry["kind"] == "error":
            progress.line(_lines(entry["text"]), bad=True)
            return int(entry["status"])
        if state == "ready":
            progress.line(f"{settings.name} is ready after {time.monotonic() - began:.1f} s")
            _welcome(entry, settings, home, progress)
            return 0
        if state in ("failed", "stopped"):
            _ended(home)
            _epitaph(entry["text"], settings, home, progress, before)
            return 1
        if state in ("sidecars", "created"):
            if not wait:
                progress.line(f"{settings.name} is starting; `pyvpnkit vm status {settings.name}` says how it does")
                return 0
            continue
        progress.line(text, bad=entry["kind"] in ("lost", "degraded") or state == "stopping")
    progress.line(f"the supervisor has ended; see {home.state.log('supervisor')}", bad=True)
    for line in vm_find.tail(home.state.log("supervisor"), SHOWN_LINES):
        progress.line(f"  {clean(line)}")
    return 1


def _welcome(entry: dict[str, Any], settings: VmSettings, home: Home, progress: Progress) -> None:
    progress.line(f"  console    pyvpnkit vm console {settings.name}   (or: screen {home.state.console})")
    for spec in entry.get("published", ()):
        progress.line(f"  port       {clean(spec)}")
    if docker := entry.get("docker_socket"):
        progress.line(f"  docker     DOCKER_HOST=unix://{clean(docker)}")
    for name, why in entry.get("degraded", {}).items():
        progress.line(f"  degraded   {clean(name)}: {clean(why)}", bad=True)


def _ended(home: Home) -> None:
    """The supervisor has said its last; whoever comes next is to find its place free."""
    until = time.monotonic() + ENDS_S
    while home.holder() and time.monotonic() < until:
        time.sleep(0.02)


def _lines(text: str) -> str:
    return "\n        ".join(map(clean, text.splitlines()))


def _logs(settings: VmSettings, home: Home) -> dict[str, Path]:
    """Those that may say why it did not come up."""
    driver = settings.hypervisor.driver
    return {"console": home.state.console_log, driver: home.state.log(driver)}


def _epitaph(text: str, settings: VmSettings, home: Home, progress: Progress, before: Mapping[Path, int]) -> None:
    """With the last of its logs, but nothing that was in them `before`."""
    progress.line(f"{settings.name} {_lines(text)}", bad=True)
    for name, path in _logs(settings, home).items():
        lines = vm_find.tail(path, SHOWN_LINES, after=before[path])
        if lines:
            progress.line(f"the last of {path} ({name}):")
            for line in lines:
                progress.line(f"  {clean(line)}")


class Progress(Protocol):
    """Lines for a person."""

    def line(self, text: str, *, bad: bool = False) -> None: ...


class _Plain:
    """On anything but a terminal: a line each, with the seconds."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def __enter__(self) -> _Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def line(self, text: str, *, bad: bool = False) -> None:
        print(f"{time.monotonic() - self._began:6.1f}  {text}", file=sys.stderr if bad else sys.stdout, flush=True)


class _Fancy:
    """On a terminal: what is done stays, what is waited for turns."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._began = time.monotonic()
        self._status = self._console.status("")

    def __enter__(self) -> _Fancy:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def line(self, text: str, *, bad: bool = False) -> None:
        from rich.text import Text

        line = Text(f"{time.monotonic() - self._began:6.1f}  ", style="dim")
        line.append(text, style="red" if bad else "default")
        self._console.print(line)
        self._status.update(Text(text, style="dim"))


def _progress() -> _Plain | _Fancy:
    return _Fancy() if sys.stdout.isatty() else _Plain()
