"""`pyvpnkit top`: what guests transfer, as a live table."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from netstack.errors import ConfigError
from pyvpnkit.commands.client import Client, control_path
from pyvpnkit.commands.table import clean, octets, print_json, print_table, seconds

HEADS: Final = ("PROTO", "GUEST", "", "REMOTE", "STATE", "OUT/s", "IN/s", "OUT", "IN", "AGE")
MAX_FLOWS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Rate:
    """A flow, and its octets in a second."""

    flow: Mapping[str, Any]
    outbound: float
    inbound: float

    def row(self) -> tuple[str, ...]:
        one = self.flow
        return (
            one["protocol"],
            clean(one["guest"]),
            "->" if one["direction"] == "outbound" else "<-",
            clean(one["remote"]),
            one["state"],
            octets(self.outbound),
            octets(self.inbound),
            octets(one["octets_outbound"]),
            octets(one["octets_inbound"]),
            seconds(one["age_s"]),
        )


class Rates:
    """Turns totals into octets per second."""

    def __init__(self) -> None:
        self._before: dict[str, tuple[int, int]] = {}
        self._at: float | None = None

    def update(self, flows: list[dict[str, Any]], now: float) -> list[Rate]:
        """The busiest first. A flow that was not there before is as old as it says."""
        past = None if self._at is None else now - self._at
        found = []
        for one in flows:
            before = self._before.get(one["id"])
            span = past if before is not None else min(one["age_s"], past or one["age_s"])
            outbound, inbound = before or (0, 0)
            span = max(span or 0.0, 0.001)
            found.append(
                Rate(one, (one["octets_outbound"] - outbound) / span, (one["octets_inbound"] - inbound) / span)
            )
        self._before = {one["id"]: (one["octets_outbound"], one["octets_inbound"]) for one in flows}
        self._at = now
        return sorted(found, key=lambda rate: (-rate.outbound - rate.inbound, rate.flow["age_s"]))


def top(parsed: argparse.Namespace) -> int:
    """Until q or Ctrl-C; with `--once`, one table."""
    if not 0.1 <= parsed.interval <= 3600:
        raise ConfigError(f"--interval {parsed.interval:g}: 0.1 to 3600 seconds")
    client = Client(control_path(parsed.control))
    rates = Rates()
    found = rates.update(client.get("/v1/flows", limit=MAX_FLOWS)["flows"], time.monotonic())
    if parsed.once or parsed.json:
        time.sleep(parsed.interval)
        found = rates.update(client.get("/v1/flows", limit=MAX_FLOWS)["flows"], time.monotonic())
        if parsed.json:
            print_json([{**rate.flow, "outbound_s": rate.outbound, "inbound_s": rate.inbound} for rate in found])
        else:
            print_table(HEADS, [rate.row() for rate in found])
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _live(client, rates, found, parsed.interval)
    return 0


def _live(client: Client, rates: Rates, found: list[Rate], interval_s: float) -> None:
    from rich.console import Console
    from rich.live import Live

    console = Console()
    with _keys(), Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            live.update(_table(found, client.path, max(1, console.height - 5)), refresh=True)
            if _pressed_q(interval_s):
                return
            found = rates.update(client.get("/v1/flows", limit=MAX_FLOWS)["flows"], time.monotonic())


def _table(found: list[Rate], path: str, height: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    outbound, inbound = sum(rate.outbound for rate in found), sum(rate.inbound for rate in found)
    title = f"{len(found)} flows, {octets(outbound)}/s out, {octets(inbound)}/s in"
    table = Table(title=Text(title), caption=Text(f"{clean(path)}; q ends"), box=None, pad_edge=False, expand=True)
    for head in HEADS:
        table.add_column(
            head, justify="right" if head in ("OUT/s", "IN/s", "OUT", "IN", "AGE") else "left", no_wrap=True
        )
    for rate in found[:height]:
        table.add_row(*map(Text, rate.row()))
    return table


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Keys come at once and are not shown, where there is a keyboard."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def _pressed_q(limit_s: float) -> bool:
    """Wait for the next look; whether it was ended by q."""
    end = time.monotonic() + limit_s
    if not sys.stdin.isatty():
        time.sleep(limit_s)
        return False
    while (left := end - time.monotonic()) > 0:
        if select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q", b""):
            return True
    return False
