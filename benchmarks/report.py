"""Medians, ratios, requirements and tables. Pure functions over the runs; nothing here measures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import Any, Final, TypeAlias

Runs: TypeAlias = Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]
"""`runs[case][guest]` is what each round measured, by metric."""

UNITS: Final = {
    "gbit_s": "Gbit/s",
    "cpu_s_per_gib": "CPU-s/GiB",
    "rss_mib": "MiB",
    "per_s": "1/s",
    "p50_us": "us",
    "p99_us": "us",
    "cpu_us_per_op": "CPU-us/op",
    "errors": "errors",
    "kpps": "kpacket/s",
    "loss_at_20k_pct": "% lost at 20k/s",
    "cpu_us_per_packet": "CPU-us/packet",
    "wrong": "wrong",
    "lost": "lost",
    "user_pct": "% of CPU in user mode",
    "offer_s": "s",
    "cpu_pct": "% CPU",
    "kib_per_flow": "KiB/flow",
    "opens_per_s": "opened/s",
    "frames_per_kick": "frames/kick",
}
"""The metrics, in the order in which they are shown."""

ONLY_IN_JSON: Final = frozenset({"user_pct", "p50_us", "p99_us", "opens_per_s"})
ONLY_WHEN_NOT_ZERO: Final = frozenset({"errors", "wrong", "lost"})
REFERENCES: Final = ("veth", "pasta", "slirp4netns", "slirp4netns-65520")
FAST_VETH_GBIT_S: Final = 20.0


class Status(StrEnum):
    PASS = "pass"
    FAIL = "FAIL"
    NOT_MEASURED = "not measured"
    NOT_APPLICABLE = "not applicable"


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A bound on the median of one metric, in units of `reference`'s median where that is given."""

    guest: str
    case: str
    metric: str
    at_least: float | None = None
    at_most: float | None = None
    reference: str | None = None
    where_veth_is_fast: bool = False
    """Holds only where veth reached 20 Gbit/s in the same case."""

    @property
    def text(self) -> str:
        factor = self.at_least if self.at_least is not None else self.at_most
        of = f" x {self.reference}" if self.reference else f" {UNITS[self.metric]}"
        return f"{'>=' if self.at_least is not None else '<='} {factor:g}{of}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    requirement: Requirement
    value: float | None
    bound: float | None
    status: Status


def _requirements() -> tuple[Requirement, ...]:
    tap, qemu, jumbo = "pyvpnkit-tap", "pyvpnkit-qemu", "pyvpnkit-qemu-65520"
    ring, ring_tcp = "pyvpnkit-ring", "pyvpnkit-ring-tcp"  # `ring` shares two processors with its bridge
    found: list[Requirement] = []

    def need(guest: str, case: str, metric: str, **bound: Any) -> None:
        found.append(Requirement(guest=guest, case=case, metric=metric, **bound))

    for direction, over_slirp, cpu in (("up", 3.0, 0.65), ("down", 1.5, 0.8)):
        for streams in (1, 4):
            case = f"tcp_{direction}_{streams}"
            need(tap, case, "gbit_s", at_least=0.4, reference="veth")
            need(tap, case, "gbit_s", at_least=1.0, reference="pasta")
            need(tap, case, "gbit_s", at_least=over_slirp, reference="slirp4netns-65520")
            need(tap, case, "cpu_s_per_gib", at_most=cpu)
    for direction, over_slirp, gbit_s in (("up", 3.0, 6.0), ("down", 1.0, 4.0)):
        for streams in (1, 4):
            case = f"tcp_{direction}_{streams}"
            need(qemu, case, "gbit_s", at_least=over_slirp, reference="slirp4netns")
            need(jumbo, case, "gbit_s", at_least=gbit_s, where_veth_is_fast=True)
    for direction, of_tap, cpu in (("up", 0.9, 0.45), ("down", 0.8, 0.65)):
        for streams in (1, 4):
            case = f"tcp_{direction}_{streams}"
            need(ring_tcp, case, "gbit_s", at_least=of_tap, reference=tap)
            need(ring_tcp, case, "cpu_s_per_gib", at_most=cpu)
            need(ring, case, "gbit_s", at_least=1.0, reference="passt-ring")
            if direction == "up":
                need(ring, case, "frames_per_kick", at_least=8.0)
    for case in ("rr_16", "crr_16"):
        need(tap, case, "per_s", at_least=0.9, reference="pasta")
    need(ring_tcp, "rr_16", "per_s", at_least=0.9, reference=tap)
    need(ring, "rr_16", "per_s", at_least=0.8, reference=tap)
    need(ring, "crr_16", "per_s", at_least=0.9, reference=tap)
    for direction in ("up", "down"):
        for size in (64, 1400):
            case = f"udp_{direction}_{size}"
            need(tap, case, "kpps", at_least=0.5, reference="pasta")
            need(tap, case, "loss_at_20k_pct", at_most=0.0)
    for case in ("pub_1", "pub_4", "pub_up_1", "pub_up_4"):
        need(tap, case, "gbit_s", at_least=1.0, reference="pasta")
        need(tap, case, "gbit_s", at_least=2.0, reference="slirp4netns")
        need(tap, case, "gbit_s", at_least=1.0, reference="slirp4netns-65520")
    for case, rate in (("dns", 8000.0), ("dns_cache", 10_000.0)):
        need(tap, case, "per_s", at_least=rate)
        need(tap, case, "p99_us", at_most=15_000.0)
    need(tap, "idle", "rss_mib", at_most=60.0)
    need(tap, "idle", "cpu_pct", at_most=0.2)  # "0 %": one tick of the kernel's account in five seconds
    need(tap, "startup", "offer_s", at_most=0.5)
    need(qemu, "startup", "offer_s", at_most=0.5)
    need(tap, "flows", "rss_mib", at_most=120.0)
    need("pyvpnkit-vm", "vm_down", "gbit_s", at_least=1.0, reference="pyvpnkit-vm-stream")
    return tuple(found)


REQUIREMENTS: Final = _requirements()


def median_of(runs: Runs, case: str, guest: str, metric: str) -> float | None:
    """Median over the rounds that gave this metric; None when no round did."""
    values = [run[metric] for run in runs.get(case, {}).get(guest, ()) if metric in run]
    return median(values) if values else None


def ratio(value: float | None, reference: float | None) -> float | None:
    """`value / reference`, or None where one is missing or the reference is nothing."""
    return value / reference if value is not None and reference else None


def judge(runs: Runs, requirements: Iterable[Requirement] = REQUIREMENTS) -> list[Verdict]:
    """One verdict per requirement whose guest took part in its case."""
    verdicts = []
    for one in requirements:
        if one.guest not in runs.get(one.case, {}):
            continue
        value = median_of(runs, one.case, one.guest, one.metric)
        bound = one.at_least if one.at_least is not None else one.at_most
        assert bound is not None
        missing = False
        if one.reference is not None:
            reference = median_of(runs, one.case, one.reference, one.metric)
            missing = reference is None
            bound *= reference or 0.0
        status = Status.FAIL
        if one.where_veth_is_fast:
            veth = median_of(runs, one.case, "veth", one.metric)
            if veth is None:
                missing = True
            elif veth < FAST_VETH_GBIT_S:
                status = Status.NOT_APPLICABLE
        if value is None:
            status = Status.FAIL  # every round of our own back-end failed
        elif missing:
            status = Status.NOT_MEASURED
        elif status is not Status.NOT_APPLICABLE:
            met = value >= bound if one.at_least is not None else value <= bound
            status = Status.PASS if met else Status.FAIL
        verdicts.append(Verdict(requirement=one, value=value, bound=None if missing else bound, status=status))
    return verdicts


def records(runs: Runs) -> list[dict[str, Any]]:
    """One flat record per case, guest and metric: name, unit, median, runs, ratios to the references."""
    found = []
    for case, guests in runs.items():
        for guest, rounds in guests.items():
            for metric in _metrics(rounds):
                value = median_of(runs, case, guest, metric)
                ratios = {
                    reference: round(quotient, 4)
                    for reference in REFERENCES
                    if reference != guest
                    and (quotient := ratio(value, median_of(runs, case, reference, metric))) is not None
                }
                found.append(
                    {
                        "name": f"{case}.{metric}",
                        "guest": guest,
                        "unit": UNITS[metric],
                        "median": value,
                        "runs": [run[metric] for run in rounds if metric in run],
                        "ratios": ratios,
                    }
                )
    return found


def _metrics(rounds: Sequence[Mapping[str, float]]) -> list[str]:
    return [metric for metric in UNITS if any(metric in run for run in rounds)]


def figure(value: float | None) -> str:
    """Three significant digits, thousands whole, a dash for nothing."""
    if value is None:
        return "-"
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3f}"


def layout(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in plain text: first column to the left, the rest to the right; `-` breaks a head of several words."""
    rows = [list(row) for row in rows]
    heads = [title.split("-") if index else [title] for index, title in enumerate(head)]
    depth = max(len(words) for words in heads)
    top = [
        [words[line - depth + len(words)] if line >= depth - len(words) else "" for words in heads]
        for line in range(depth)
    ]
    widths = [max(len(row[index]) for row in (*top, *rows)) for index in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (*top, ["-" * width for width in widths], *rows)
    ]
    return "\n".join(line.rstrip() for line in lines)


def main_table(runs: Runs, guests: Sequence[str]) -> str:
    """Medians: a row per case and metric, a column per guest; empty without figures."""
    rows = []
    for case, by_guest in runs.items():
        for metric in UNITS:
            values = {guest: median_of(runs, case, guest, metric) for guest in guests if guest in by_guest}
            shown = [value for value in values.values() if value is not None]
            if not shown or metric in ONLY_IN_JSON or (metric in ONLY_WHEN_NOT_ZERO and not any(shown)):
                continue
            rows.append([f"{case}  {UNITS[metric]}", *(figure(values.get(guest)) for guest in guests)])
    return layout(["median", *guests], rows) if rows else ""


def ratio_table(runs: Runs, guests: Sequence[str]) -> str:
    """Our back-ends' first metric of each case as a multiple of each reference's."""
    rows = []
    for guest in guests:
        if not guest.startswith("pyvpnkit"):
            continue
        for case, by_guest in runs.items():
            metric = next(iter(_metrics(by_guest.get(guest, ()))), None)
            if metric is None:
                continue
            value = median_of(runs, case, guest, metric)
            ratios = [ratio(value, median_of(runs, case, reference, metric)) for reference in REFERENCES]
            if any(one is not None for one in ratios):
                rows.append([f"{guest}  {case}  {UNITS[metric]}", *map(figure, (value, *ratios))])
    return layout(["ratio", "median", *(f"x-{reference}" for reference in REFERENCES)], rows) if rows else ""


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Each requirement with its bound in figures."""
    rows = [
        [
            f"{one.requirement.guest}  {one.requirement.case}  {UNITS[one.requirement.metric]}",
            one.requirement.text,
            figure(one.bound),
            figure(one.value),
            str(one.status),
        ]
        for one in verdicts
    ]
    return layout(["required", "", "bound", "median", "verdict"], rows) if rows else ""


def against_baseline(lines: Iterable[Mapping[str, Any]], baseline: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The records, each with `ratio_to_baseline` where the baseline has one of that name (and guest) with a median."""
    known = {(one["name"], one.get("guest")): one["median"] for one in baseline}
    found = []
    for line in lines:
        quotient = ratio(line["median"], known.get((line["name"], line.get("guest"))))
        found.append({**line, **({} if quotient is None else {"ratio_to_baseline": round(quotient, 4)})})
    return found


def baseline_table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Records that have a ratio to a baseline; empty when none has."""
    rows = [
        [one["name"], one.get("guest", ""), figure(one["median"]), one["unit"], f"{one['ratio_to_baseline']:.2f}"]
        for one in lines
        if "ratio_to_baseline" in one
    ]
    return layout(["against the baseline", "", "median", "unit", "x"], rows) if rows else ""
