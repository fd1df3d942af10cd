"""`pyvpnkit events`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from pyvpnkit.commands.client import Client, Stream, control_path
from pyvpnkit.commands.table import clean


def events(parsed: argparse.Namespace) -> int:
    """Print events until the daemon ends or Ctrl-C."""
    client = Client(control_path(parsed.control))
    try:
        with client.stream("/v1/events", types=parsed.types or None) as stream:
            for name, fields in read(stream):
                if name == "lost":
                    lost = fields["lost"]
                    print(f"pyvpnkit: {'some' if lost is None else lost} events were lost", file=sys.stderr, flush=True)
                elif parsed.json:
                    print(json.dumps(fields), flush=True)
                else:
                    print(line(name, fields), flush=True)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        _drop_output()
    return 0


def read(stream: Stream) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and data of each server-sent event."""
    waiting = b""
    while octets := stream.read():
        waiting += octets
        while b"\n\n" in waiting:
            block, _, waiting = waiting.partition(b"\n\n")
            fields = dict(one.split(": ", 1) for one in block.decode().split("\n") if ": " in one and one[0] != ":")
            if "data" in fields:
                yield fields.get("event", ""), json.loads(fields["data"])


def line(name: str, fields: dict[str, Any]) -> str:
    """`12:30:01 LeaseGiven address=192.168.65.3 mac=...`."""
    when = time.strftime("%H:%M:%S", time.localtime(fields["time"]))
    rest = (f"{key}={value}" for key, value in fields.items() if key not in ("event", "time"))
    return clean(" ".join((when, name, *rest)))


def _drop_output() -> None:
    """Who read our output has left; Python would say so once more when it flushes at the end."""
    import os

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
