"""The command lines of the load, and what its programs report. Where a command is run is the caller's to say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.build import build


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Ports of the servers that a client talks to."""

    netload: int
    iperf3: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """What a bulk transfer amounted to."""

    bits_per_second: float
    octets: float
    """From the first to the last; what CPU is charged to."""


def iperf3(address: str, port: int, *, streams: int, from_server: bool, seconds: float) -> list[str]:
    """Octets over TCP; prints JSON for `moved`."""
    # Whole seconds are all that this version of iperf3 takes.
    options = ["-t", str(max(1, round(seconds))), "-P", str(streams), "-C", "cubic", "-J"]
    return ["iperf3", "-c", address, "-p", str(port), *options, *(["-R"] if from_server else [])]


def moved(report: Mapping[str, Any]) -> Moved:
    total = report["end"]["sum_received"]
    return Moved(bits_per_second=total["bits_per_second"], octets=total["bytes"])


def netload(verb: str, address: str, port: int, *arguments: object) -> list[str]:
    """`verb` of `netload.c` against a server; prints JSON."""
    return [str(build("netload")), verb, address, str(port), *map(str, arguments)]
