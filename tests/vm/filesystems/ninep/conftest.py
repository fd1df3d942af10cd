"""A folder served as it is, and a client of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site


@pytest.fixture
def export(tmp_path: Path) -> Path:
    made = tmp_path / "export"
    made.mkdir()
    return made


@pytest.fixture
def place(export: Path) -> Iterator[Site]:
    with site(export) as made:
        yield made


@pytest.fixture
def client(place: Site) -> Client:
    return place.client()
