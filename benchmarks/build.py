"""The native load generators and the bridges, compiled when their source is newer than the program."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

NATIVE = Path(__file__).resolve().parent / "native"
PROGRAMS = ("netload", "framebridge", "ringbridge", "ringload")


class SetupError(Exception):
    """The benchmark cannot run here; the text says what is missing and what to do."""


def build(name: str) -> Path:
    """Path of the program `name` (one of `PROGRAMS`), compiled with `$CC` or `cc`. Raises `SetupError`."""
    source, program = NATIVE / f"{name}.c", NATIVE / "bin" / name
    changed = max(path.stat().st_mtime for path in (source, *NATIVE.glob("*.h")))
    if program.exists() and program.stat().st_mtime > changed:
        return program
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise SetupError(
            "no C compiler: the load generator is C. Install one (apt-get install gcc libc6-dev) or set CC"
        )
    program.parent.mkdir(exist_ok=True)
    fresh = program.with_name(f"{name}.{os.getpid()}")
    command = [compiler, "-O2", "-std=gnu11", "-Wall", "-Wextra", "-pthread", "-o", str(fresh), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SetupError(f"{' '.join(command)} failed:\n{done.stderr}")
    fresh.replace(program)  # at once: another run may use it
    return program
