"""Throughput over loss and buffer does not change unnoticed (F23: at least 1 % of the clean rate at 5 % loss)."""

from __future__ import annotations

import json

import pytest

from tests.sim.throughput import BUFFERS, STORED, cell, cells

TOLERANCE = 0.2
"""Of the stored value. More, in either direction: measure again (`python -m tests.sim.throughput`) and look at the diff."""

TABLE: dict[str, float] = json.loads(STORED.read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "direction", "loss", "buffer"), cells())
def test_throughput_is_what_the_table_says(name: str, direction: str, loss: float, buffer: int) -> None:
    assert cell(direction, loss, buffer) == pytest.approx(TABLE[name], rel=TOLERANCE)


@pytest.mark.parametrize("buffer", BUFFERS)
@pytest.mark.parametrize("direction", ["down", "up"])
def test_f23_at_5_percent_loss_at_least_1_percent_of_the_clean_rate_is_left(direction: str, buffer: int) -> None:
    clean = TABLE[f"{direction}, loss 0, buffer {buffer}"]
    assert TABLE[f"{direction}, loss 0.05, buffer {buffer}"] >= clean / 100
