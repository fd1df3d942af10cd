"""`python -m benchmarks`: our back-ends beside pasta, slirp4netns, gvproxy, a veth pair and loopback on this machine."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import json
import signal
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType

from benchmarks import machine, report, runner
from benchmarks.build import SetupError
from benchmarks.cases import CASES, IDLE_FLOWS
from benchmarks.guests import BY_DEFAULT, GUESTS, _Pyvpnkit

EPILOG = """\
Peers and cases take shell patterns: --peers 'veth,pasta,pyvpnkit*' --cases 'tcp_*,rr_16'.
Exit status: 0 every requirement that could be judged is met; 1 one is not; 2 nothing could be measured.
Figures depend on the machine, its load and its interpreter (a distribution's Python is half as fast again as a plain
build): compare ratios of one run, never figures of two."""


def _chosen(patterns: str, known: Iterable[str], what: str) -> list[str]:
    """The known names that match, in their own order. Raises `SetupError` for a pattern that matches nothing."""
    known = list(known)
    found: set[str] = set()
    for pattern in patterns.split(","):
        matches = fnmatch.filter(known, pattern)
        if not matches:
            raise SetupError(f"no {what} {pattern!r}; there are {', '.join(known)}")
        found.update(matches)
    return [name for name in known if name in found]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="cases:\n" + "\n".join(f"  {case.name:15} {case.help}" for case in CASES.values())
        + "\n\npeers:\n" + "\n".join(f"  {name}" for name in GUESTS) + f"\n\n{EPILOG}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--cases", default="*", help="comma-separated names or patterns [all]")
    parser.add_argument("--peers", default=",".join(BY_DEFAULT), help="the same [all but pyvpnkit-packet]")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved runs of each case [3]")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one run; whole seconds for iperf3 [2]")
    parser.add_argument("--idle-seconds", type=float, default=5.0, help="length of the idle case [5]")
    parser.add_argument("--flows", type=int, default=IDLE_FLOWS, help=f"of the case of that name [{IDLE_FLOWS}]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, cases, verdicts and complaints")
    parser.add_argument("--baseline", type=Path, metavar="FILE", help="a stored --json of this machine: ratios to it")
    parser.add_argument("--python", default=sys.executable, help="interpreter of our daemon [this one]")
    parser.add_argument("--option", action="append", default=[], help="passed on to `pyvpnkit run` (repeat)")
    return parser.parse_args(argv)


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; returns the exit status."""
    arguments = _arguments(argv)
    signal.signal(signal.SIGTERM, _interrupted)  # so that namespaces and back-ends are cleared away
    _Pyvpnkit.python, _Pyvpnkit.options = arguments.python, tuple(arguments.option)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    outcome = runner.Outcome()
    interrupted = False
    try:
        cases = [CASES[name] for name in _chosen(arguments.cases, CASES, "case")]
        kinds = [GUESTS[name] for name in _chosen(arguments.peers, GUESTS, "peer")]
        kinds = [kind for kind in kinds if any(runner.takes_part(kind, case) for case in cases)]
        if not kinds:
            raise SetupError("none of these peers takes part in any of these cases")
        missing = {kind.name: reason for kind in kinds if (reason := kind.missing())}
        for name, reason in missing.items():
            say(f"{name} is left out: {reason}")
        kinds = [kind for kind in kinds if kind.name not in missing]
        about = machine.describe()
        if any(case.name.startswith(("tcp_", "pub_")) for case in cases) and about["iperf3"] is None:
            raise SetupError("iperf3 is missing (apt-get install iperf3)")
        print(machine.text(about), flush=True)
        with runner.conditions(arguments.seconds, idle_s=arguments.idle_seconds, flows=arguments.flows) as at:
            runner.measure(outcome, cases, kinds, arguments.rounds, at, say)
    except SetupError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say("interrupted: what there is")
        interrupted = True
    outcome.unavailable.update(missing)
    guests = [kind.name for kind in kinds if not kind.is_machine]
    machines = [kind.name for kind in kinds if kind.is_machine]
    verdicts = report.judge(outcome.runs)
    lines = report.records(outcome.runs)
    if arguments.baseline is not None:
        lines = report.against_baseline(lines, runner.load(arguments.baseline))
    for table in (
        report.main_table(outcome.runs, guests),
        report.main_table(outcome.runs, machines),
        report.ratio_table(outcome.runs, guests),
        report.verdict_table(verdicts),
        report.baseline_table(lines),
    ):
        if table:
            print(f"\n{table}")
    for case, complaints in outcome.complaints.items():
        for guest, texts in complaints.items():
            print(f"\n{case} {guest}: {len(texts)} of {arguments.rounds} gave no figure: {texts[0]}")
    if arguments.json is not None:
        document = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": about,
            "rounds": arguments.rounds,
            "seconds": arguments.seconds,
            "cases": lines,
            "requirements": [
                {
                    "guest": one.requirement.guest,
                    "name": f"{one.requirement.case}.{one.requirement.metric}",
                    "required": one.requirement.text,
                    "bound": one.bound,
                    "median": one.value,
                    "status": one.status,
                }
                for one in verdicts
            ],
            "complaints": outcome.complaints,
            "left_out": outcome.unavailable,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    if interrupted or not any(rounds for by_guest in outcome.runs.values() for rounds in by_guest.values()):
        return 2
    ours = [name for name in outcome.unavailable if name.startswith("pyvpnkit") and name not in missing]
    return 1 if ours or any(one.status is report.Status.FAIL for one in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
