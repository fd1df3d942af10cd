"""Throughput in virtual time over loss and buffer: the table that `test_throughput` compares with.

`python -m tests.sim.throughput` measures again and writes `throughput.json`; a diff of that file shows what a change of the
TCP did. The link: 1 Gbit/s, 0.5 ms one way, a queue of 1,000 frames. Values are Mbit/s, the median of several seeds.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from tests.support.drill import pattern
from tests.support.simulation import Faults, Simulation

STORED = Path(__file__).with_name("throughput.json")
LOSSES = (0.0, 0.001, 0.01, 0.05)
BUFFERS = (16_000, 64_000, 256_000)
SEEDS = range(5)
OCTETS = 1_000_000
_DATA = pattern(OCTETS)


def measure(direction: str, loss: float, buffer: int, seed: int) -> float:
    """Mbit/s of one transfer: `down` to the guest, whose receive buffer is `buffer`, or `up` from it."""
    sim = Simulation(seed=seed, faults=Faults(loss=loss, rate=125e6), check=False)
    guest, host = sim.connect(buffer=buffer)
    begin = sim.clock.now
    if direction == "down":
        host.send(_DATA)
        done = sim.run(lambda: len(guest.received) >= OCTETS, 600.0)
    else:
        guest.peer_limit = buffer
        guest.send(_DATA, begin)
        done = sim.run(lambda: len(host.received) >= OCTETS, 600.0)
    assert done, f"{direction} at {loss} with {buffer} does not end"
    return OCTETS * 8 / 1e6 / (sim.clock.now - begin)


def cell(direction: str, loss: float, buffer: int) -> float:
    seeds = SEEDS if loss else (0,)
    return round(statistics.median(measure(direction, loss, buffer, seed) for seed in seeds), 1)


def cells() -> list[tuple[str, str, float, int]]:
    return [
        (f"{direction}, loss {loss:g}, buffer {buffer}", direction, loss, buffer)
        for direction in ("down", "up")
        for loss in LOSSES
        for buffer in BUFFERS
    ]


def main() -> None:
    table = {name: cell(direction, loss, buffer) for name, direction, loss, buffer in cells()}
    STORED.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    for name, value in table.items():
        print(f"{name:40} {value:8.1f} Mbit/s")


if __name__ == "__main__":
    main()
