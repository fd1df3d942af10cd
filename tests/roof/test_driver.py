"""The loop turns a stack when there is something to do, and at no other time."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator

import pytest
import uvloop

from pyvpnkit.driver import Driver


class Toy:
    """A stack whose input is a pipe and whose deadline is a number."""

    def __init__(self) -> None:
        self.readable, self.writable = os.pipe()
        os.set_blocking(self.readable, False)
        self.turns: list[float] = []
        self.more = 0
        self.due: float | None = None

    def fileno(self) -> int:
        return self.readable

    def turn(self) -> bool:
        now = time.monotonic()
        self.turns.append(now)
        try:
            os.read(self.readable, 100)
        except BlockingIOError:
            pass
        if self.due is not None and now >= self.due:
            self.due = None
        if self.more:
            self.more -= 1
            return True
        return False

    def deadline(self) -> float | None:
        return self.due


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def driven(request: pytest.FixtureRequest) -> Iterator[Callable[..., Toy]]:
    """Runs a scene with a driven toy in either loop."""

    def run(*scenes: Callable[[Toy, Driver], None], pauses_s: float = 0.05, more: int = 0) -> Toy:
        toy = Toy()
        toy.more = more

        async def main() -> None:
            driver = Driver(toy, asyncio.get_running_loop())
            driver.start()
            for scene in scenes:
                await asyncio.sleep(pauses_s)
                scene(toy, driver)
            await asyncio.sleep(pauses_s)
            driver.close()
            os.write(toy.writable, b"late")
            count = len(toy.turns)
            await asyncio.sleep(0.02)
            assert len(toy.turns) == count, "turned after close"

        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())
        os.close(toy.readable)
        os.close(toy.writable)
        return toy

    yield run


def test_nothing_to_do_nothing_done(driven: Callable[..., Toy]) -> None:
    assert len(driven(pauses_s=0.2).turns) == 1


def test_input_is_a_turn(driven: Callable[..., Toy]) -> None:
    toy = driven(lambda toy, driver: os.write(toy.writable, b"x") and None)
    assert len(toy.turns) == 2


def test_more_work_is_done_at_once(driven: Callable[..., Toy]) -> None:
    toy = driven(more=50)
    assert len(toy.turns) == 51
    assert toy.turns[-1] - toy.turns[0] < 0.05


def test_wishes_for_a_turn_are_one_turn(driven: Callable[..., Toy]) -> None:
    toy = driven(lambda toy, driver: [driver.wake() for _ in range(10)] and None)
    assert len(toy.turns) == 2


def test_a_deadline_is_met_and_not_spun_upon(driven: Callable[..., Toy]) -> None:
    wanted: list[float] = []

    def scene(toy: Toy, driver: Driver) -> None:
        toy.due = time.monotonic() + 0.03
        wanted.append(toy.due)
        driver.wake()

    toy = driven(scene, pauses_s=0.1)
    assert toy.due is None
    assert wanted[0] <= toy.turns[-1] < wanted[0] + 0.05
    assert len(toy.turns) <= 5


def test_a_nearer_deadline_replaces_a_far_one(driven: Callable[..., Toy]) -> None:
    def far(toy: Toy, driver: Driver) -> None:
        toy.due = time.monotonic() + 3600
        driver.wake()

    def near(toy: Toy, driver: Driver) -> None:
        toy.due = time.monotonic() + 0.01
        driver.wake()

    assert driven(far, near, pauses_s=0.1).due is None
