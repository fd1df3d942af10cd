"""What a console said is kept, and there is a bound to it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import stat
from pathlib import Path

import pytest

from vm.console_log import ConsoleLog, LogKeeper, last_lines, older, trim

MOST = 1000


def lines(first: int, last: int) -> bytes:
    return b"".join(b"%06d\n" % number for number in range(first, last))


def kept(path: Path) -> bytes:
    return (older(path).read_bytes() if older(path).exists() else b"") + path.read_bytes()


def test_the_newest_is_kept_and_the_files_stay_within_their_bound(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, MOST)
    for number in range(1000):
        log.write(b"%06d\n" % number)
        assert len(kept(path)) <= MOST
    log.close()
    assert lines(0, 1000).endswith(kept(path))
    assert len(kept(path)) >= MOST // 2
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(older(path).stat().st_mode) == 0o600


def test_a_log_goes_on_where_an_earlier_one_ended(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    for number in range(200):
        log = ConsoleLog(path, MOST)
        log.write(b"%06d\n" % number)
        log.close()
    assert lines(0, 200).endswith(kept(path))
    assert MOST // 2 <= len(kept(path)) <= MOST


def test_a_piece_longer_than_the_log_loses_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    log = ConsoleLog(path, MOST)
    log.write(lines(0, 1000))
    log.close()
    assert kept(path) == lines(0, 1000)[-MOST // 2 :]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "console.log").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        ConsoleLog(tmp_path / "console.log")
    assert not (tmp_path / "victim").exists()


def test_a_full_disk_costs_what_is_said_and_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = ConsoleLog(tmp_path / "console.log")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        log.write(b"first\n")
        log.write(b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    log.write(b"third\n")
    log.close()
    assert log.lost == len(b"first\nsecond\n")
    assert (tmp_path / "console.log").read_bytes() == b"third\n"
    assert len(caplog.records) == 1


async def test_a_log_that_another_program_appends_to_is_trimmed(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    keeper = LogKeeper(path, MOST, every_s=0.001)
    fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    said = 0
    async with asyncio.timeout(20):
        while not older(path).exists() or said < 1000:
            os.write(fd, lines(said, said + 10))
            said += 10
            await asyncio.sleep(0.002)
    await keeper.close()
    os.close(fd)
    assert len(kept(path)) < 3 * MOST
    assert lines(0, said).endswith(kept(path))


async def test_a_full_disk_is_freed_of_a_log_that_has_filled_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"x" * MOST)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        keeper = LogKeeper(path, MOST, every_s=0.001)
        async with asyncio.timeout(20):
            while path.stat().st_size:  # noqa: ASYNC110  # what is waited for is in the file system
                await asyncio.sleep(0.001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert len(caplog.records) == 1 and os.listdir(tmp_path) == ["console.log"]
    path.write_bytes(lines(0, 1000))
    async with asyncio.timeout(20):
        while not older(path).exists():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    await keeper.close()
    assert lines(0, 1000).endswith(kept(path))


def test_a_short_or_absent_log_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    assert not trim(path, MOST)
    path.write_bytes(b"x" * (MOST // 2))
    assert not trim(path, MOST)
    assert path.read_bytes() == b"x" * (MOST // 2)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        pytest.param(0, b"", id="none"),
        pytest.param(2, lines(8, 10), id="of the newer half"),
        pytest.param(7, lines(3, 10), id="of both"),
        pytest.param(99, lines(0, 10), id="more than there are"),
    ],
)
def test_the_last_lines_are_found_across_both_halves(tmp_path: Path, count: int, expected: bytes) -> None:
    path = tmp_path / "console.log"
    older(path).write_bytes(lines(0, 5))
    path.write_bytes(lines(5, 10))
    assert last_lines(path, count) == expected


def test_one_endless_line_is_shown_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"a" * 5000 + b"b" * 100)
    assert last_lines(path, 10, most=100) == b"b" * 100
