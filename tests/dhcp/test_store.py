"""The lease file: whole or not at all, and never in the way of the network."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from netstack.dhcp.leases import Leases
from netstack.dhcp.store import Store
from netstack.settings import Network

MAC = b"\x02\x00\x00\x00\x00\x01"
ADDRESS = bytes((192, 168, 65, 3))


def with_a_lease() -> Leases:
    leases = Leases(Network())
    assert leases.commit(MAC, ADDRESS, port=1, lease_s=3600, now=10.0, hostname="one") is not None
    return leases


def test_leases_are_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "leases.json")
    leases = with_a_lease()
    assert leases.dirty
    assert store.save(leases, now=10.0, now_wall=1.7e9)
    assert not leases.dirty
    fresh = Leases(Network())
    assert Store(tmp_path / "leases.json").load(fresh, now=0.0, now_wall=1.7e9 + 600)
    lease = fresh.at(ADDRESS, 0.0)
    assert lease is not None
    assert (lease.mac, lease.hostname, lease.expires) == (MAC, "one", 3000.0)
    assert not fresh.dirty


def test_file_is_for_its_owner_only_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "leases.json"
    path.write_text("old")
    path.chmod(0o644)
    assert Store(path).save(with_a_lease(), now=10.0, now_wall=1.7e9)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["leases.json"]


def test_without_a_file_the_table_begins_empty_and_nothing_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert not Store(tmp_path / "leases.json").load(Leases(Network()), now=0.0, now_wall=0.0)
    assert not caplog.records


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b'{"format": "pyvpnkit le', id="cut short"),
        pytest.param(b"\x00\xff\xfe" * 100, id="not text"),
        pytest.param(json.dumps({"leases": {}}).encode(), id="another program's"),
        pytest.param(b"[" * 100_000, id="nested without end"),
    ],
)
def test_a_file_that_is_not_ours_is_kept_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "leases.json"
    path.write_bytes(content)
    leases = Leases(Network())
    store = Store(path)
    assert not store.load(leases, now=0.0, now_wall=0.0)
    assert "leases.json.bad" in caplog.text
    assert (tmp_path / "leases.json.bad").read_bytes() == content
    assert not path.exists()
    assert store.save(leases, now=0.0, now_wall=0.0)


def test_a_file_that_cannot_be_read_is_left_where_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    os.mkfifo(tmp_path / "leases.json")
    assert not Store(tmp_path / "leases.json").load(Leases(Network()), now=0.0, now_wall=0.0)
    assert "cannot be read" in caplog.text
    (tmp_path / "directory").mkdir()
    assert not Store(tmp_path / "directory").load(Leases(Network()), now=0.0, now_wall=0.0)
    assert (tmp_path / "directory").is_dir()


def test_a_failure_to_save_is_logged_once_and_keeps_the_old_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "leases.json"
    store = Store(path)
    leases = with_a_lease()
    assert store.save(leases, now=10.0, now_wall=1.7e9)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    leases.dirty = True
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert not store.save(leases, now=20.0, now_wall=1.7e9)
        assert not store.save(leases, now=20.0, now_wall=1.7e9)
    assert leases.dirty
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["leases.json"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "No space left on device" in caplog.text
    assert store.save(leases, now=20.0, now_wall=1.7e9)
    assert not leases.dirty


def test_a_directory_that_is_missing_does_not_stop_the_network(tmp_path: Path) -> None:
    assert not Store(tmp_path / "none" / "leases.json").save(with_a_lease(), now=10.0, now_wall=1.7e9)


def test_what_a_killed_process_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / f".leases.json.{os.getpid()}").write_text("half")
    assert Store(tmp_path / "leases.json").save(with_a_lease(), now=10.0, now_wall=1.7e9)
    assert os.listdir(tmp_path) == ["leases.json"]
