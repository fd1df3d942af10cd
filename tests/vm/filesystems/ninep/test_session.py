"""A folder by 9P2000.L: what a client can do with its files."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.ninep_client import Client
from tests.vm.filesystems.ninep.site import Site, site
from vm.filesystems.ninep import messages as m


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


def test_a_file_is_made_written_and_read(client: Client, export: Path) -> None:
    fid = client.create("new", mode=0o640)
    assert client.write(fid, b"hello ") == 6
    assert client.write(fid, b"world", 6) == 5
    assert client.read(fid, 3, 5) == b"lo wo"
    client.clunk(fid)
    assert (export / "new").read_bytes() == b"hello world"
    assert stat.S_IMODE((export / "new").stat().st_mode) == 0o640
    assert client.load("new") == b"hello world"
