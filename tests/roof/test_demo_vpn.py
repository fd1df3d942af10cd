"""`pyvpnkit demo --vpn`, as root and as an ordinary user."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

import pytest

from tests.roof.embedded import World

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="expected: not Linux")

STEPS = ["lease", "home", "vpn up", "route", "proxy", "vpn down", "still"]


@pytest.mark.parametrize("user", ["root", "ordinary"])
def test_a_vpn_comes_and_goes(user: str) -> None:
    with tempfile.TemporaryDirectory(prefix="pyvpnkit-test-") as name:
        directory = Path(name)
        directory.chmod(0o1777)
        done = World(user=user).run("demo", "--vpn", TMPDIR=name, COLUMNS="20", http_proxy="http://192.0.2.1:1")
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        lines = dict(re.findall(r"^ok +(vpn \w+|\w+) +(.*)$", done.stdout, re.MULTILINE))
        assert list(lines) == STEPS
        for step in ("vpn up", "proxy", "vpn down"):
            took = re.search(r"(\d+\.\d+) s", lines[step])
            assert took is not None and float(took[1]) <= 2.0, lines[step]
        assert "Hello from the intranet" in lines["route"] and "still there" in lines["still"]
        assert not list(directory.iterdir()), "nothing is left"
