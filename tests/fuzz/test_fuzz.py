"""A short run of each fuzz target with fixed seeds; `make fuzz` runs longer with seeds of the moment."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.__main__ import main
from tests.fuzz.targets import TARGETS

CASES = {"z1_parsers": 1500, "z2_stack": 120, "z4_fragments": 1500, "z5_receiver": 150}


@pytest.mark.parametrize("target", TARGETS)
def test_g13_z1_z2_z4_z5_fuzz_targets_hold(target: str) -> None:
    for seed in range(CASES[target]):
        try:
            TARGETS[target](random.Random(seed))
        except Exception as error:
            raise AssertionError(f"python -m tests.fuzz --target {target} --seed {seed}: {error}") from error


def test_the_command_runs_and_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "0.3"]) == 0
    assert "z2_stack" in capsys.readouterr().out
    assert main(["--target", "z1_parsers", "--seed", "5"]) == 0
