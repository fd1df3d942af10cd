"""`vpnkit` and `gvproxy` as people have them: a symlink of that name to the console script."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def program(directory: Path, name: str = "vpnkit") -> str:
    """The path of a program `name` in `directory`, which runs this checkout."""
    script, link = directory / "script", directory / name
    if not link.exists():
        lines = (
            f"#!{sys.executable}",
            "import sys",
            f"sys.path.insert(0, {str(ROOT)!r})",
            "from pyvpnkit.entry import run",
        )
        script.write_text("\n".join((*lines, "run()\n")))
        script.chmod(0o755)
        link.symlink_to(script)
    return str(link)
