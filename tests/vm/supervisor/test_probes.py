"""What a guest may say on its console while somebody waits for a word of it."""

from __future__ import annotations

import time
from pathlib import Path

from vm.supervisor.probes import MAX_CONSOLE, MAX_LINE, ConsoleLog


def probed(path: Path, pattern: str) -> ConsoleLog:
    made = ConsoleLog(path, pattern)
    made.begin()
    return made


async def test_a_line_without_end_does_not_stop_us(tmp_path: Path) -> None:
    """As a whole it would take minutes."""
    log = tmp_path / "console.log"
    console = probed(log, r"\w+ login: $")
    log.write_bytes(b"a" * MAX_CONSOLE)
    began = time.monotonic()
    assert not await console.probe()
    assert time.monotonic() - began < 5
    with log.open("ab") as file:
        file.write(b" login: ")
    assert await console.probe()


async def test_what_is_said_in_pieces_is_found_once(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    log.write_bytes(b"box login: \n")
    console = probed(log, "^box login: $")
    assert not await console.probe()
    for piece in (b"x" * (MAX_LINE + 1) + b"\nbox lo", b"gin: "):
        with log.open("ab") as file:
            file.write(piece)
        found = await console.probe()
    assert found
    log.write_bytes(b"new\n")
    assert not await console.probe()


async def test_much_is_looked_at_a_piece_at_a_time(tmp_path: Path) -> None:
    log = tmp_path / "console.log"
    console = probed(log, "here")
    log.write_bytes(b"\n" * 2 * MAX_CONSOLE + b"here\n")
    assert [await console.probe() for _ in range(3)] == [False, False, True]
