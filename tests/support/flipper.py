"""A program that changes octets of a shared file as fast as it can, to race with whoever reads them (threats G4).

    python flipper.py FILE-DESCRIPTOR COUNTER-DESCRIPTOR SEED OFFSET:LENGTH...

It puts something else in a place, and what was there back, without end. How often it did is the first u64 of the second file.
It imports nothing of the project, so that it starts quickly and does nothing else.
"""

from __future__ import annotations

import mmap
import os
import random
import sys


def main() -> None:
    memory = memoryview(mmap.mmap(int(sys.argv[1]), 0))
    counter = memoryview(mmap.mmap(int(sys.argv[2]), 8)).cast("Q")
    rng = random.Random(int(sys.argv[3]))
    ranges = [tuple(map(int, text.split(":"))) for text in sys.argv[4:]]
    places = [
        (at + rng.randrange(length), rng.choice([0, 1, 2, 4, 0x7F, 0x80, 0xFF, rng.randrange(256)]))
        for at, length in rng.choices(ranges, k=5000)
    ]
    parent = os.getppid()
    while os.getppid() == parent:
        for at, value in places:
            before = memory[at]
            memory[at] = value
            memory[at] = before
        counter[0] += len(places)
        rng.shuffle(places)


if __name__ == "__main__":
    main()
