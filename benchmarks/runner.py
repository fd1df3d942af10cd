"""Runs the cases: guests that stay up from their first case on, rounds interleaved so that each comparison is within seconds.

The order is case, round, guest: a slow minute of the machine hits every back-end of a case alike. Start-up and memory cases
get a fresh back-end each.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import namespaces
from benchmarks.build import PROGRAMS, SetupError, build
from benchmarks.cases import Case, CaseFailed, Conditions, Metrics, wait_reachable
from benchmarks.guest import Guest
from benchmarks.load import Servers
from benchmarks.processes import end

PORT = 5000
IPERF_PORT = 5201

Say = Callable[[str], None]


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What came out: metrics per case, guest and round; complaints where there are none."""

    runs: dict[str, dict[str, list[Metrics]]] = field(default_factory=dict)
    complaints: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def complain(self, case: str, guest: str, text: str) -> None:
        self.complaints.setdefault(case, {}).setdefault(guest, []).append(text)


@contextlib.contextmanager
def conditions(seconds: float, *, idle_s: float, flows: int) -> Iterator[Conditions]:
    """The host namespace with its servers: load generator, DNS answers, iperf3. Removed at the end."""
    namespaces.require()
    namespaces.remove_stale()
    for name in PROGRAMS:
        build(name)  # before anything is measured
    program = str(build("netload"))
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pvkbench")))
        host = namespaces.HostNamespace()
        stack.callback(host.delete)

        def server(*command: str, announces: bool) -> None:
            child = subprocess.Popen(
                host.inside(*command),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            stack.callback(end, child)
            assert child.stdout is not None
            if announces and not (line := child.stdout.readline()).startswith("{"):
                raise SetupError(f"{' '.join(command)}: {line.strip()}")

        server(program, "serve", "0.0.0.0", str(PORT), announces=True)
        server(program, "dns-serve", "0.0.0.0", "53", announces=True)
        server("iperf3", "-s", "-p", str(IPERF_PORT), "--logfile", str(directory / "iperf3.log"), announces=False)
        yield Conditions(
            host=host,
            directory=directory,
            seconds=seconds,
            servers=Servers(netload=PORT, iperf3=IPERF_PORT),
            idle_s=idle_s,
            flows=flows,
        )


def measure(
    outcome: Outcome, cases: Sequence[Case], kinds: Sequence[type[Guest]], rounds: int, at: Conditions, say: Say
) -> None:
    """All cases with all guests, `rounds` times, into `outcome`. A guest that cannot be started is left out and named."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Guest] = {}

        def start(kind: type[Guest]) -> None:
            guest = kind(at.host, at.directory, kind.name)
            stack.callback(guest.stop)
            try:
                guest.start()
                wait_reachable(guest, at)
            except SetupError as error:
                outcome.unavailable[kind.name] = str(error)
                say(f"{kind.name} is left out: {error}")
            else:
                running[kind.name] = guest

        for case in cases:
            taking_part = [kind for kind in kinds if takes_part(kind, case)]
            for kind in taking_part:
                if not case.fresh and kind.name not in running and kind.name not in outcome.unavailable:
                    start(kind)
            for number in range(rounds):
                for kind in taking_part:
                    if not case.fresh and kind.name not in running:
                        continue
                    outcome.runs.setdefault(case.name, {}).setdefault(kind.name, [])
                    try:
                        if case.fresh:
                            metrics = _fresh(case, kind, number, at)
                        else:
                            metrics = case.run(running[kind.name], at)
                    except (CaseFailed, SetupError, ProcessLookupError) as error:
                        outcome.complain(case.name, kind.name, str(error))
                        say(f"{case.name} {number + 1}/{rounds} {kind.name}: {error}")
                        continue
                    outcome.runs[case.name][kind.name].append(metrics)
                    short = ", ".join(f"{key} {value:.4g}" for key, value in list(metrics.items())[:3])
                    say(f"{case.name} {number + 1}/{rounds} {kind.name}: {short}")


def takes_part(kind: type[Guest], case: Case) -> bool:
    """Whether the case can be run in such a guest."""
    return not (
        case.machine != kind.is_machine
        or (case.needs_backend and kind.name in ("loopback", "veth"))
        or (kind.only_lasting and not case.lasting)
        or (case.needs_dhcp and not kind.offers_dhcp)
        or (case.published and not kind.publishes)
    )


def _fresh(case: Case, kind: type[Guest], number: int, at: Conditions) -> Metrics:
    guest = kind(at.host, at.directory, f"{kind.name}-{case.name}{number}")
    try:
        return case.run(guest, at)
    finally:
        guest.stop()


def load(path: Path) -> list[dict[str, Any]]:
    """The records of a stored run: the `cases` of a document, or JSON lines."""
    text = path.read_text()
    try:
        document = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    if isinstance(document, dict) and "cases" in document:
        found: list[dict[str, Any]] = document["cases"]
        return found
    return [document]
