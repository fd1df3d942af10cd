"""In CI a test that does not run is a failure, unless that was to be expected on this kind of machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("reason", "ci", "status"),
    [
        pytest.param("no QEMU here", "true", 1, id="CI, unexpected"),
        pytest.param("no QEMU here", "", 0, id="somebody's machine"),
        pytest.param("expected: not Linux", "true", 0, id="CI, expected"),
    ],
)
@pytest.mark.parametrize("how", ["mark", "call", "module"])
def test_a_skip_in_ci(tmp_path: Path, reason: str, ci: str, status: int, how: str) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    test = {
        "mark": f"@pytest.mark.skipif(True, reason={reason!r})\ndef test_it(): pass\n",
        "call": f"def test_it(): pytest.skip({reason!r})\n",
        "module": f"pytest.skip({reason!r}, allow_module_level=True)\n",
    }[how]
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_runs(): pass\n{test}")
    if how == "module":
        (tmp_path / "test_other.py").write_text("def test_runs(): pass\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stdout
    assert ("which CI does not allow" in run.stdout) == (status == 1)
    assert (reason in run.stdout) or status == 0
