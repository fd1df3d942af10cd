"""The programs as processes, and a played host for them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.portfwd.invm.played import PlayedHost, Tool


@pytest.fixture
def host(tmp_path: Path) -> Iterator[PlayedHost]:
    made = PlayedHost(tmp_path / "control.sock")
    yield made
    made.stop()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Tool]]:
    """`start("expose_port", "-proto", "tcp", ..., parent=True)`; what still runs at the end is killed."""
    made: list[Tool] = []

    def run(module: str, *arguments: str | Path, **more: Any) -> Tool:
        made.append(Tool.start(module, *arguments, cwd=more.pop("cwd", tmp_path), **more))
        return made[-1]

    yield run
    for tool in made:
        tool.clean()
