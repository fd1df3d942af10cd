"""docs/vm.md has every key of a machine's file and every command; README's five lines are those of the example."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvpnkit.commands import vm
from vm import settings, settings_file
from vm.linuxkit.fields import NO_KEY

ROOT = Path(__file__).parents[2]


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def keys(kind: Any) -> Iterator[str]:
    """Of a dataclass of settings, and of those inside it."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = field.metadata["key"]
        if name == NO_KEY:
            continue
        yield name
        for inner in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(inner):
                yield from keys(inner)


def test_every_key_of_a_machines_file_is_in_the_table() -> None:
    table = section((ROOT / "docs/vm.md").read_text(), "The file")
    missing = [name for name in keys(settings.VmSettings) if not re.search(rf"\b{re.escape(name)}\b", table)]
    assert not missing
    assert len(list(keys(settings.VmSettings))) > 50


@pytest.mark.parametrize("action", vm.RUN_BY)
def test_every_command_is_in_the_table(action: str) -> None:
    assert re.search(rf"\| .*`(?:vm )?{re.escape(action)}\b", (ROOT / "docs/vm.md").read_text())


def test_the_five_lines_are_about_the_example() -> None:
    lines = section((ROOT / "README.md").read_text(), "A whole machine with one command")
    example = settings_file.load(ROOT / "examples/tiny.yml")
    assert "pyvpnkit vm up examples/tiny.yml" in lines
    assert f"pyvpnkit vm down {example.name}\n" in lines
    assert example.publish == ("8080:80",) and "http://127.0.0.1:8080/" in lines
    assert f"/pyvpnkit/vm/{example.name}/docker.sock" in lines and example.docker is not None
    (share,) = example.shares
    assert f"examples/{share.source.name} is {share.target}" in lines


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([a-z_./-]+\.(?:md|yml))\)", page.read_text()):
        assert (page.parent / target).exists(), target
