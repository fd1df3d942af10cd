"""The commands as processes, beside a network with its control server."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.roof.api.conftest import Control, control_server
from tests.roof.api.conftest import guest as guest  # the fixture, for tests here too

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0


@dataclass
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str


async def start(control: str, *argv: str, stdin: int = asyncio.subprocess.DEVNULL) -> asyncio.subprocess.Process:
    """`pyvpnkit ARGV` against the control socket at `control`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYVPNKIT_CONTROL": control, "COLUMNS": "200"}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pyvpnkit", *argv),
        env=environment,
        stdin=stdin,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def end(process: asyncio.subprocess.Process) -> Done:
    """Wait for it."""
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    found = Done(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    assert "Traceback" not in found.err, found.err
    return found


async def pyvpnkit(control: Control | str, *argv: str) -> Done:
    """Run a command to its end."""
    return await end(await start(control if isinstance(control, str) else control.path, *argv))


@pytest.fixture
async def control(tmp_path: Path) -> AsyncIterator[Control]:
    async with control_server(tmp_path) as made:
        yield made
