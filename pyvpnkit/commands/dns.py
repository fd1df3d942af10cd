"""`pyvpnkit dns`: explain a name, list the last queries, show how resolvers do."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any, Final

from pyvpnkit.commands.client import Client, control_path
from pyvpnkit.commands.table import clean, print_json, print_table

LOG_HEADS: Final = ("TIME", "GUEST", "NAME", "TYPE", "BY", "RCODE", "ANSWERS", "MS")
UPSTREAM_HEADS: Final = (
    "SERVER",
    "ORDER",
    "ZONES",
    "ASKED",
    "ANSWERED",
    "TIMEOUTS",
    "ERRORS",
    "FAILURES",
    "MS",
    "STATE",
)


def dns(parsed: argparse.Namespace) -> int:
    """`explain`, `log` or `upstreams`."""
    client = Client(control_path(parsed.control))
    match parsed.dns_action:
        case "explain":
            said = client.get("/v1/dns/explain", name=parsed.name, type=parsed.type)
            if parsed.json:
                print_json(said)
            else:
                for line in explanation(said):
                    print(clean(line))
        case "log":
            found = client.get("/v1/dns/log", limit=parsed.limit)["queries"][::-1]
            if parsed.json:
                print_json(found)
            else:
                print_table(LOG_HEADS, [query(one) for one in found])
        case _:
            known = client.get("/v1/dns/upstreams")["upstreams"]
            if parsed.json:
                print_json(known)
            else:
                print_table(UPSTREAM_HEADS, [upstream(one) for one in known])
    return 0


_SOURCES: Final = {
    "names": "a built-in name, answered here",
    "leases": "the name of a guest, answered here",
    "zones": "a zone of the settings or the API, answered here",
    "hosts": "the host's hosts file, answered here",
    "filter": "no IPv6 addresses, because the host has no way to IPv6 (dns.aaaa)",
    "server": "answered here",
    "resolvers": "the host's resolvers",
}


def explanation(said: Mapping[str, Any]) -> list[str]:
    """What `/v1/dns/explain` said, in lines for people."""
    lines = [
        f"name     {said['name']} {said['type']}",
        f"source   {_SOURCES.get(said['source'], said['route'])}",
    ]
    lines += [
        f"server   {one['server']}, order {one['order']}{', offline' if one['offline'] else ''}"
        for one in said["servers"]
    ]
    if (cache := said["cache"]) is not None:
        lines.append(f"cache    from {cache['by']} {cache['age_s']:.0f} s ago, holds for {cache['left_s']:.0f} s")
    elif said["route"] is not None:
        lines.append("cache    not there")
    for one in said["tries"]:
        took = "" if one["took_ms"] is None else f" after {one['took_ms']:.1f} ms"
        lines.append(f"asked    {one['server']}: {one['result']}{took}")
    lines.append(f"answer   {said['rcode']} by {said['by']}, {said['took_ms']:.1f} ms")
    return [*lines, *(f"         {line}" for line in said["records"])]


def query(one: Mapping[str, Any]) -> tuple[object, ...]:
    """The cells of a query under `LOG_HEADS`."""
    when = time.strftime("%H:%M:%S", time.localtime(one["time"]))
    took = f"{one['took_ms']:.1f}"
    return when, one["guest"], one["name"], one["type"], one["by"], one["rcode"], one["answers"], took


def upstream(one: Mapping[str, Any]) -> tuple[object, ...]:
    """The cells of a resolver under `UPSTREAM_HEADS`."""
    numbers = (one[name] for name in ("order", "zones", "asked", "answered", "timeouts", "errors", "failures"))
    return one["server"], *numbers, f"{one['last_ms']:.1f}", "offline" if one["offline"] else "ok"
