"""`pyvpnkit flows`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

from pyvpnkit.commands.client import Client, control_path
from pyvpnkit.commands.table import clean, octets, print_json, print_table, seconds

HEADS: Final = ("ID", "PROTO", "GUEST", "", "REMOTE", "HOST SOCKET", "STATE", "OUT", "IN", "AGE")


def flows(parsed: argparse.Namespace) -> int:
    """List, or reset with `--reset`."""
    client = Client(control_path(parsed.control))
    if parsed.reset:
        done = [client.call("DELETE", f"/v1/flows/{quote(name, safe='')}") for name in parsed.reset]
        if parsed.json:
            print_json(done)
        return 0
    found = client.get("/v1/flows", guest=parsed.guest, protocol=parsed.protocol, limit=parsed.limit)
    if parsed.json:
        print_json(found["flows"])
        return 0
    shown = found["flows"]
    print_table(HEADS, [row(one) for one in shown])
    if found["total"] > len(shown):
        print(f"and {found['total'] - len(shown)} more; --limit shows them")
    return 0


def row(one: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of a flow under `HEADS`."""
    arrow = "->" if one["direction"] == "outbound" else "<-"
    ends = [end for end in (one["host_local"], one["host_remote"]) if end]
    transferred = octets(one["octets_outbound"]), octets(one["octets_inbound"])
    return (
        clean(one["id"]),
        one["protocol"],
        clean(one["guest"]),
        arrow,
        clean(one["remote"]),
        clean(f" {arrow} ".join(ends)) or "-",
        one["state"],
        *transferred,
        seconds(one["age_s"]),
    )
