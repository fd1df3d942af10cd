"""Fixtures of drill tests; a `conftest.py` imports them. A test that fails leaves its frames as a pcap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.drill import Drill, Flow, failed_path

DIRECTIONS = ("guest-open", "forward")


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "call" and report.failed:
        for number, drill in enumerate(getattr(item, "drills", ())):
            path = failed_path(f"{item.name}{f'-{number}' if number else ''}")
            drill.save(path)
            report.sections.append(("frames", f"saved to {path}"))


@pytest.fixture
def drill(request: pytest.FixtureRequest) -> Iterator[Callable[..., Drill]]:
    """Makes drills: `d = drill(mtu=1500, offload=False)`. At the end each is closed, and nothing may be left of it."""
    made: list[Drill] = []
    request.node.drills = made

    def make(**options: Any) -> Drill:
        made.append(Drill(**options))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def d(drill: Callable[..., Drill]) -> Drill:
    """One drill with the defaults: an ordinary link of MTU 1500."""
    return drill()


@pytest.fixture(params=DIRECTIONS)
def direction(request: pytest.FixtureRequest) -> str:
    """Rows that hold whoever opened the connection run with both."""
    return str(request.param)


@pytest.fixture
def established(d: Drill, direction: str) -> Callable[..., Flow]:
    """`established(mss=1000)`: a flow whose handshake is done, in the direction of this run."""

    def make(**options: Any) -> Flow:
        return (d.open if direction == "guest-open" else d.forward)(**options)

    return make
