"""Look-ups by the host's library: shared, bounded, and never in the loop's way."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections import Counter

import pytest

from pyvpnkit.proxy import names
from pyvpnkit.proxy.names import MAX_LOOKUPS, Names

LOOPBACK = bytes((127, 0, 0, 1))


async def test_a_name_of_the_host_and_one_that_nobody_has() -> None:
    looked_up = Names()
    assert LOOPBACK in await looked_up.look_up("localhost")
    for nobody in ("nobody.invalid", "x" * 70 + ".test", "a..b"):
        with pytest.raises((OSError, UnicodeError)):
            await looked_up.look_up(nobody)


async def test_equal_names_share_a_look_up_and_others_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, asked = threading.Event(), Counter[str]()

    def slow(name: str) -> list[bytes]:
        asked[name] += 1
        go_on.wait(20)
        if name == "n0":
            raise socket.gaierror(socket.EAI_AGAIN, "later")
        return [LOOPBACK]

    monkeypatch.setattr(names, "getaddrinfo", slow)
    looked_up = Names()
    wanted = [f"n{number % (2 * MAX_LOOKUPS)}" for number in range(4 * MAX_LOOKUPS)]
    tasks = [asyncio.create_task(looked_up.look_up(name)) for name in wanted]
    async with asyncio.timeout(20):
        while len(asked) < MAX_LOOKUPS:  # noqa: ASYNC110  # threads begin
            await asyncio.sleep(0.002)
    assert len(asked) == MAX_LOOKUPS
    tasks[1].cancel()
    go_on.set()
    async with asyncio.timeout(20):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(found[0], socket.gaierror) and isinstance(found[1], asyncio.CancelledError)
    assert found[2:64] == [[LOOPBACK]] * 62
    assert set(asked.values()) <= {1, 2} and len(asked) == 2 * MAX_LOOKUPS
