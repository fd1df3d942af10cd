"""`pyvpnkit status`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from pyvpnkit.commands.client import Client, control_path
from pyvpnkit.commands.table import clean, octets, print_json, print_table, seconds


def status(parsed: argparse.Namespace) -> int:
    """What a person wants to know at a glance."""
    found = Client(control_path(parsed.control)).get("/v1/status")
    if parsed.json:
        print_json(found)
        return 0
    counters = found["counters"]
    print(f"pyvpnkit {clean(found['version'])}, process {found['pid']}, up {seconds(found['uptime_s'])}")
    if found.get("listening"):
        print(f"guests attach at {clean(', '.join(found['listening']))}")
    print(
        f"{found['tcp_flows']} TCP and {found['udp_flows']} UDP flows, {found['forwards']} published ports; "
        f"{octets(counters['octets_in'])} from guests, {octets(counters['octets_out'])} to them"
    )
    if drops := counters.get("drops"):
        shown = sorted(drops.items(), key=lambda item: -item[1])
        print(f"dropped: {clean(', '.join(f'{count} {reason}' for reason, count in shown))}")
    if counters.get("contained") or found["control"].get("contained"):
        print("contained: faults of pyvpnkit's own; its log has them, please report them")
    if guests := found["guests"]:
        print()
        names = {lease["address"]: lease["hostname"] for lease in found.get("leases", ())}
        print_table(("GUEST", "MAC", "NAME", "LINK"), [_guest(guest, names) for guest in guests])
    return 0


def _guest(guest: Mapping[str, Any], names: Mapping[str, str]) -> tuple[str, str, str, str]:
    return guest["address"], guest["mac"], names.get(guest["address"]) or "-", guest["link"] or "gone"
