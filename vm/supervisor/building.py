"""What `boot.linuxkit` names is built into `STATE/boot` before the machine starts.

It is done by a program of its own, `python -m vm.supervisor.building FILE --output DIR`: unpacking takes seconds in which the
supervisor has to hear, and a machine that is taken down meanwhile does not wait for it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from netstack.errors import ConfigError, HostError, NetstackError
from vm.build import cpio
from vm.build.build import Built
from vm.build.build import build as build_machine
from vm.hypervisors.process import spawn
from vm.linuxkit import vsock_table
from vm.linuxkit.load import load
from vm.settings import VmSettings
from vm.supervisor.home import Home
from vm.yaml_lines import Complaints, Table, parse, read

NAME = "build"
ENDS_S = 2.0


async def build(settings: VmSettings, home: Home, out: Path, say: Callable[[str], None]) -> None:
    """Make the kernel and the initrd in `out`. Raises `HostError` with what the builder complains of."""
    assert settings.boot.linuxkit is not None
    words = [sys.executable, "-m", "vm.supervisor.building", str(settings.boot.linuxkit), "--output", str(out)]
    process = await spawn(words, log=home.state.log(NAME), stdout=subprocess.PIPE)
    try:
        home.record(NAME, process.pid)
        assert process.stdout is not None
        async for line in process.stdout:
            say(line.decode(errors="replace").rstrip())
        if await process.wait():
            raise HostError(process.said().removeprefix("pyvpnkit: ") or "the build failed")
    finally:
        process.terminate()  # what it has begun in the cache it takes away
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), ENDS_S)
        await process.close()
        home.forget(NAME)


def make(
    linuxkit: Path,
    out: Path,
    *,
    say: Callable[[str], None],
    compression: cpio.Compression = "none",
    refresh: bool = False,
) -> Built:
    """The same here and now. Raises `ConfigError`, `HostError`."""
    machine = load(linuxkit)
    built = build_machine(
        machine, out, base_directory=linuxkit.parent, compression=compression, refresh=refresh, progress=say
    )
    for warning in built.warnings:
        say(f"{warning}")
    return built


def command_line(linuxkit: Path) -> str | None:
    """The kernel's command line, where the file is there and has one. Raises `ConfigError`."""
    if not linuxkit.is_file():
        return None
    kernel = load(linuxkit).kernel
    return kernel.cmdline if kernel is not None else None


def disagreements(settings: VmSettings) -> tuple[str, ...]:
    """Ports of vsock that its services do not take, as far as their command lines show. Raises `ConfigError`."""
    if settings.boot.linuxkit is None:
        return ()
    return vsock_table.check(vsock_table.derive(load(settings.boot.linuxkit)), settings.vsock_ports)


def is_machine(file: Path) -> bool:
    """Whether a file describes a machine rather than what is in one. Raises `ConfigError`."""
    root = parse(read(file), str(file), Complaints())
    return isinstance(root, Table) and any(key.text == "boot" for key, _ in root.entries)


def main(argv: Sequence[str] | None = None) -> int:
    """Progress is a line each on standard output; 1 with a complaint on standard error."""
    parser = argparse.ArgumentParser(prog="python -m vm.supervisor.building", allow_abbrev=False)
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parsed = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        make(parsed.file, parsed.output, say=lambda text: print(text, flush=True))
    except NetstackError as error:
        print(f"pyvpnkit: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
