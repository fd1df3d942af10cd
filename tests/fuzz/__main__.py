"""`python -m tests.fuzz --seconds 60 [--target NAME] [--seed N]`: fuzz until the time is over or something breaks."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter

from tests.fuzz.targets import TARGETS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for how long (default 60)")
    parser.add_argument("--target", choices=sorted(TARGETS), action="append", help="only this target (repeatable)")
    parser.add_argument("--seed", type=int, help="one case with this seed, as a failure names it")
    options = parser.parse_args(arguments)
    names = options.target or list(TARGETS)
    if options.seed is not None:
        for name in names:
            TARGETS[name](random.Random(options.seed))
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
            TARGETS[name](random.Random(seed))
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
