"""`pyvpnkit ports`, `expose` and `unexpose`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import Any

from netstack.errors import ConfigError, NetstackError
from pyvpnkit.commands.client import Client, control_path, with_query
from pyvpnkit.commands.table import clean, print_json, print_table


def ports(parsed: argparse.Namespace) -> int:
    """List what is published."""
    found = Client(control_path(parsed.control)).get("/v1/forwards")
    forwards, failed = found["forwards"], found["failed"]
    if parsed.json:
        print_json(forwards)
    elif forwards:
        rows = [(one["id"], one["spec"], one["owner"], one["accepted"]) for one in forwards]
        print_table(("ID", "SPEC", "OWNER", "CLIENTS"), rows)
    elif not failed:
        print("nothing is published; `pyvpnkit expose 8080:80` leads port 8080 here to port 80 of the guest")
    for one in failed:
        print(f"pyvpnkit: since the restart not published: {clean(one['message'])}", file=sys.stderr)
    return 0


def expose(parsed: argparse.Namespace) -> int:
    """Publish each spec; 1 when one of them could not be."""
    client = Client(control_path(parsed.control))
    return _each(parsed, parsed.specs, lambda spec: client.call("POST", "/v1/forwards", {"spec": spec}))


def unexpose(parsed: argparse.Namespace) -> int:
    """Remove by text or id; 1 when one of them was not there."""
    if bool(parsed.specs) == parsed.all:
        raise ConfigError("unexpose: name what to remove as `pyvpnkit ports` lists it, or give --all")
    client = Client(control_path(parsed.control))
    wanted = parsed.specs
    if parsed.all:
        found = client.get("/v1/forwards")
        wanted = [str(one["id"]) for one in found["forwards"] if one["owner"] == "hand"]
        wanted += [one["spec"] for one in found["failed"]]

    def remove(word: str) -> Any:
        # A number alone is no spec, so it is an id.
        if word.isascii() and word.isdecimal():
            return client.call("DELETE", f"/v1/forwards/{word}")
        return client.call("DELETE", with_query("/v1/forwards", {"spec": word}))

    return _each(parsed, wanted, remove)


def _each(parsed: argparse.Namespace, words: Iterable[str], do: Callable[[str], Any]) -> int:
    """Do it for every word, whatever became of the others."""
    done, status = [], 0
    for word in words:
        try:
            done.append(do(word))
        except NetstackError as error:
            print(f"pyvpnkit: {clean(error)}", file=sys.stderr)
            status = max(status, 2 if isinstance(error, ConfigError) else 1)
            continue
        if not parsed.json:
            print(clean(done[-1]["spec"]), flush=True)
    if parsed.json:
        print_json(done)
    return status
