"""What a driver plans, as text that is kept beside the tests: a change of one word shows as a diff.

    golden.check(GOLDEN / "hyperkit-full.txt", golden.text_of(plan))

`PYVPNKIT_GOLDEN=write pytest tests/vm/hypervisors` writes the files anew; read the diff before you commit it. The paths in a plan
are made up (`STATE` below), for a plan opens nothing.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from netstack.errors import ConfigError
from vm.api import Plan, Sidecar, StateDir, Unsupported

WRITE: Final = "PYVPNKIT_GOLDEN"
STATE: Final = StateDir(Path("/run/vm"))
PYTHON: Final = "PYTHON"
"""Stands for the interpreter that runs the tests."""


def text_of(plan: Plan) -> str:
    """The plan, a word a line: argv first, then a section for each thing that is there."""
    return "\n".join(_lines(plan)).replace(sys.executable, PYTHON) + "\n"


def refusal(error: ConfigError) -> str:
    """A refusal, as `plan` raised it."""
    kind = "unsupported" if isinstance(error, Unsupported) else "wrong"
    return f"{kind}: {error}\n"


def check(path: Path, text: str) -> None:
    """Whether `text` is what `path` has; with `PYVPNKIT_GOLDEN=write` it is written there instead."""
    if os.environ.get(WRITE) == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    elif not path.exists():
        pytest.fail(f"{path.name} is not there; write it with {WRITE}=write and read it")
    assert text == path.read_text(), (
        f"another plan than in {path.name}; where it is meant, {WRITE}=write writes it anew"
    )


def _lines(plan: Plan) -> Iterator[str]:
    yield from plan.argv
    for name, value in sorted(plan.env.items()):
        yield f"\nenv {name}={value}"
    for call in plan.rest:
        yield f"\nrest {call.method} {call.path}"
        if call.body is not None:
            yield json.dumps(call.body, indent=2)
    for path, content in sorted(plan.files.items()):
        yield f"\nfile {path}"
        yield content.decode("utf-8", "backslashreplace").rstrip("\n")
    for sidecar in plan.sidecars:
        yield from _sidecar(sidecar)
    yield ""
    yield from (f"disk {disk.path}" for disk in plan.disks)
    yield from (f"socket {path}" for path in plan.sockets)
    yield f"console {plan.console}"
    yield f"vsock {plan.vsock}"
    yield from (f"mount {line}" for line in plan.mounts)


def _sidecar(sidecar: Sidecar) -> Iterator[str]:
    ready = sidecar.ready or ("descriptor" if any("{ready_fd}" in word for word in sidecar.argv) else "at once")
    when = " after the machine" if sidecar.after_machine else ""
    yield f"\nsidecar {sidecar.name}{when}, ready: {ready}, lost: {sidecar.lost.name}"
    yield from sidecar.argv
    yield from (f"env {name}={value}" for name, value in sorted(sidecar.env.items()))
