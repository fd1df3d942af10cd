"""A short run of each fuzz target with fixed seeds; `make fuzz` runs longer with seeds of the moment."""

from __future__ import annotations

import random

import pytest

from tests.fuzz.__main__ import Chosen, main
from tests.fuzz.targets import TARGETS

CASES = {
    "z1_parsers": 1500,
    "z2_stack": 120,
    "z4_fragments": 1500,
    "z5_receiver": 150,
    "z6_rings": 400,
    "z7_messages": 25,
    "z8_streams": 250,
    "z9_names": 3000,
    "z10_services": 400,
    "z12_texts": 600,
    "z13_ninep": 300,
    "z14_mux": 300,
    "z15_ports": 2500,
    "z16_hostside": 2000,
    "z17_companions": 250,
}


@pytest.mark.parametrize("target", TARGETS)
def test_g13_z1_z2_z4_z5_z6_z7_z8_z9_z10_z12_z13_z14_z15_z16_z17_fuzz_targets_hold(target: str) -> None:
    for seed in range(CASES[target]):
        try:
            TARGETS[target](random.Random(seed))
        except Exception as error:
            raise AssertionError(f"python -m tests.fuzz --target {target} --seed {seed}: {error}") from error


def test_the_command_runs_and_says_what_it_did(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seconds", "0.3"]) == 0
    assert "z2_stack" in capsys.readouterr().out
    assert main(["--target", "z1_parsers", "--seed", "5"]) == 0
    assert main(["--target", "z0"]) == 2


def test_chosen_octets_decide_a_case() -> None:  # what atheris changes must change what happens
    first, second, third = (Chosen(octets) for octets in (b"\1" * 40, b"\1" * 40, b"\1" * 39 + b"\2"))
    assert first.randbytes(40) == second.randbytes(40) != third.randbytes(40)
    assert first.random() == second.random()  # and when they are used up it goes on, the same way
    for target in TARGETS.values():
        target(Chosen(bytes(range(256))))
