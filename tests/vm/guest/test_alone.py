"""Programs for the inside of a machine run when they are copied there alone, and need no more than a minimal Python."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vm.guest

PROGRAMS = sorted(path for path in Path(vm.guest.__path__[0]).glob("*.py") if path.name != "__init__.py")
MINIMAL = {
    *(
        "__future__",
        "argparse",
        "calendar",
        "collections",
        "errno",
        "fcntl",
        "os",
        "re",
        "selectors",
        "signal",
        "socket",
    ),
    *("struct", "subprocess", "sys", "threading", "time", "typing"),
}
"""Of Debian's python3.11-minimal."""
each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)


@each_program
def test_a_copy_runs_by_itself(tmp_path: Path, program: Path) -> None:
    copy = shutil.copy(program, tmp_path)
    done = subprocess.run([sys.executable, "-I", copy, "--help"], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(f"usage: {program.stem} ")


@each_program
def test_a_minimal_python_has_what_it_imports(program: Path) -> None:
    found = set()
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    found.discard("ctypes")  # tried only; without it the tool mounts
    assert found <= MINIMAL, found - MINIMAL
