"""`python -m tests.fuzz --seconds 60 [--target NAME] [--seed N]`: fuzz until the time is over or something breaks.

`--atheris NAME [ARGUMENT...]` lets libFuzzer choose the cases by what code they reach, where atheris is installed
(`pip install atheris`); arguments are its own, such as a corpus directory, -max_total_time=60, or a file that failed.
"""

from __future__ import annotations

import argparse
import importlib
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

OURS = ["netstack", "dns", "ntp", "portfwd", "pyvpnkit"]


class Chosen(random.Random):
    """Chance that somebody chose: a case is the same for the same octets. Where they end, it goes on as seeded with them."""

    def __init__(self, octets: bytes) -> None:
        super().__init__(octets)
        self._octets = octets
        self._at = 0

    def getrandbits(self, k: int) -> int:
        octets = (k + 7) // 8
        part = self._octets[self._at : self._at + octets]
        if len(part) < octets:
            return super().getrandbits(k)
        self._at += octets
        return int.from_bytes(part, "big") >> (octets * 8 - k)

    def random(self) -> float:
        return self.getrandbits(16) / (1 << 16)


def guided(name: str, *arguments: str) -> int:
    """Fuzz one target with atheris; it ends the process itself."""
    try:
        atheris: Any = importlib.import_module("atheris")
    except ImportError:
        print("atheris is not installed here: pip install atheris", file=sys.stderr)
        return 2
    with atheris.instrument_imports(include=OURS, enable_loader_override=False):
        targets = _targets()
    if name not in targets:
        return _no_such(name)
    atheris.Setup(["tests.fuzz", *arguments], lambda octets: targets[name](Chosen(octets)))
    atheris.Fuzz()
    return 0


def _no_such(name: str) -> int:
    print(f"there is no target {name!r}; there are {', '.join(_targets())}", file=sys.stderr)
    return 2


def _targets() -> dict[str, Callable[[random.Random], None]]:
    # Not at the top: what is imported before atheris looks cannot be followed by it.
    from tests.fuzz.targets import TARGETS

    return TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default 60)")
    parser.add_argument("--target", metavar="NAME", action="append", help="only this target (repeatable)")
    parser.add_argument("--seed", type=int, help="one case with this seed, as a failure names it")
    parser.add_argument("--atheris", metavar="NAME", nargs=argparse.REMAINDER, help="guided by coverage, one target")
    options = parser.parse_args(arguments)
    if options.atheris:
        return guided(*options.atheris)
    targets = _targets()
    names = options.target or list(targets)
    if unknown := [name for name in names if name not in targets]:
        return _no_such(unknown[0])
    if options.seed is not None:
        for name in names:
            targets[name](random.Random(options.seed))
            print(f"{name} --seed {options.seed}: passed")
        return 0
    end = time.monotonic() + options.seconds
    spent: Counter[str] = Counter()
    cases: Counter[str] = Counter()
    while time.monotonic() < end:
        # Whoever had the least time is next, so that a fast target runs more cases, not a slow one more minutes.
        name = min(names, key=lambda each: spent[each])
        seed = random.SystemRandom().getrandbits(48)
        begin = time.perf_counter_ns()
        try:
            targets[name](random.Random(seed))
        except Exception:
            traceback.print_exc()
            print(f"\nfailed; again with: python -m tests.fuzz --target {name} --seed {seed}", file=sys.stderr)
            return 1
        spent[name] += time.perf_counter_ns() - begin
        cases[name] += 1
    print(", ".join(f"{name}: {cases[name]} cases" for name in names))
    return 0


if __name__ == "__main__":
    sys.exit(main())
