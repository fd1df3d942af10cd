"""The same in uvloop, which the daemon uses where it is installed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

from tests.portfwd.mux import test_datagrams, test_plane, test_session


@pytest.mark.parametrize(
    "scenario",
    [
        lambda path: test_plane.test_a_client_reaches_a_server_behind_the_vm("hyperkit", 1, path),
        lambda path: test_plane.test_a_client_reaches_a_server_behind_the_vm("connect", 3, path),
        lambda path: test_plane.test_the_forwarder_may_connect_to_us(2, path),
        lambda path: test_plane.test_a_thousand_clients_at_once(path),
        lambda path: test_session.test_when_the_connection_dies_all_clients_are_reset("nonsense"),
        lambda path: test_session.test_both_sides_open_twenty_at_once(),
        lambda path: test_datagrams.test_datagrams_of_all_sizes_come_back_to_who_sent_them(1, "127.0.0.1", path),
        lambda path: test_datagrams.test_datagrams_of_all_sizes_come_back_to_who_sent_them(3, "127.0.0.1", path),
    ],
    ids=["own connection", "greeted", "listen", "thousand", "death", "cross opening", "udp 1", "udp 3"],
)
def test_the_same_holds_in_uvloop(scenario: Callable[[Path], Coroutine[Any, Any, None]], tmp_path: Path) -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario(tmp_path))
