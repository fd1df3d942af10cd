"""`pyvpnkit vm down`, `rm`, `status`, `list`, `events`, `pause`, `resume` and `restart`: what the supervisor is asked."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any, Final

from netstack.errors import ConfigError, HostError
from pyvpnkit.commands import vm_find
from pyvpnkit.commands.client import Client
from pyvpnkit.commands.table import clean, print_json, print_table, seconds
from vm.supervisor import home as homes
from vm.supervisor.home import Home

UP: Final = ("running", "ready")
_LOOK_S: Final = 0.02


def down(parsed: argparse.Namespace) -> int:
    """0 when nothing of it is left."""
    home, _ = vm_find.find(parsed)
    client = vm_find.running(home)
    if client is None:
        left = _reclaim(home)
        print(f"{home.path.name} is not up" + (f"; ended what was left of it: {', '.join(left)}" if left else ""))
        return 0
    began = time.monotonic()
    _ask(home, {"kill": parsed.kill})
    killed = parsed.kill
    while home.holder():
        if not killed and parsed.limit is not None and time.monotonic() - began > parsed.limit:
            killed = True
            _ask(home, {"kill": True})
        time.sleep(_LOOK_S)
    print(f"{home.path.name} is down after {time.monotonic() - began:.1f} s")
    return 0


def _ask(home: Home, body: dict[str, Any]) -> None:
    client = vm_find.running(home)
    try:
        if client is not None:
            client.call("POST", "/v1/down", body)
    except HostError:
        if home.holder():  # else it has just ended
            raise


def _reclaim(home: Home) -> list[str]:
    if not home.exists:
        return []
    lock = home.lock()
    if lock is None:
        return []
    with contextlib.closing(lock):
        return home.reclaim()


def remove(parsed: argparse.Namespace) -> int:
    """0 when it is gone, 1 when something that is not ours stays in its directory."""
    home, _ = vm_find.find(parsed)
    name = home.path.name
    if not home.exists:
        raise ConfigError(f"there is no machine at {home.path}")
    lock = home.lock()
    if lock is None:
        raise HostError(f"{name} is up; take it down first: pyvpnkit vm down {name}")
    with contextlib.closing(lock):
        home.reclaim()
        left = home.remove()
    if left:
        print(
            f"{name} is removed, but {home.path} stays, for this is not of the machine's: {', '.join(map(clean, left))}"
        )
        return 1
    print(f"{name} is removed; its file and its disks stay")
    return 0


def status(parsed: argparse.Namespace) -> int:
    """1 when it is not up."""
    home, _ = vm_find.find(parsed)
    found = vm_find.status(home)
    if parsed.json:
        print_json(found)
    else:
        for label, value in _rows(found):
            print(f"{label:<12}{clean(' '.join(value.split()))}")
    return 0 if found["state"] in UP else 1


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    state = found["state"] + (" (paused)" if found.get("paused") else "")
    if isinstance(since := found.get("since"), int | float):
        state += f" for {seconds(max(0.0, time.time() - since))}"
    rows = [("name", found["name"]), ("state", state + (f": {found['reason']}" if found.get("reason") else ""))]
    rows.append(("file", found.get("file", "")))
    if "supervisor" not in found:
        return rows
    rows.append(("hypervisor", f"{found['driver']}, process {found['pid'] or '-'}; supervisor {found['supervisor']}"))
    if found["restarts"]:
        rows.append(("restarts", str(found["restarts"])))
    rows += [
        (
            "part",
            f"{one['name']}, process {one['pid'] or '-'}"
            + (f", {one['restarts']} restarts" if one["restarts"] else ""),
        )
        for one in found["parts"]
    ]
    rows += [
        ("address", f"{one['address']} {one['mac']} {one.get('hostname', '')}".rstrip()) for one in found["addresses"]
    ]
    rows += [("port", one) for one in found["published"]]
    rows += [
        ("share", f"{one['source']} at {one['target']} ({one['kind']}, owner {one['owner']})")
        for one in found["shares"]
    ]
    rows += [("mount", one) for one in found["mounts"]]
    if found["docker_socket"]:
        rows.append(("docker", f"unix://{found['docker_socket']}"))
    rows.append(("console", found["console"]))
    rows += [("degraded", f"{name}: {why}") for name, why in found["degraded"].items()]
    return rows


def machines(parsed: argparse.Namespace) -> int:
    """A line each."""
    found = []
    for name in vm_find.names():
        home = Home(homes.base() / name)
        try:
            found.append(vm_find.status(home))
        except HostError as error:
            found.append({"name": name, "state": "unknown", "reason": str(error)})
    if parsed.json:
        print_json(found)
    elif found:
        print_table(("NAME", "STATE", "FILE"), [(one["name"], one["state"], one.get("file", "")) for one in found])
    else:
        print("there is no machine; `pyvpnkit vm up FILE` makes one")
    return 0


def pause(parsed: argparse.Namespace) -> int:
    """Stop its time."""
    return _tell(parsed, "pause", "is paused")


def resume(parsed: argparse.Namespace) -> int:
    """Let it go on."""
    return _tell(parsed, "resume", "goes on")


def restart(parsed: argparse.Namespace) -> int:
    """Down and up; returns when it is ready again, 1 when it is not to be."""
    home, _ = vm_find.find(parsed)
    client = vm_find.needed(home)
    after = client.get("/v1/status")["last_event"]
    client.call("POST", "/v1/restart", {})
    for entry in _entries(client, after):
        if entry.get("state") in ("ready", "stopped", "failed"):
            print(f"{home.path.name} is {clean(entry['text'])}")
            return 0 if entry["state"] == "ready" else 1
    raise HostError(f"{home.path.name}: its supervisor has ended; see {home.state.log('supervisor')}")


def _tell(parsed: argparse.Namespace, order: str, done: str) -> int:
    home, _ = vm_find.find(parsed)
    vm_find.needed(home).call("POST", f"/v1/{order}", {})
    print(f"{home.path.name} {done}")
    return 0


def events(parsed: argparse.Namespace) -> int:
    """Until Ctrl-C, or the supervisor's end."""
    home, _ = vm_find.find(parsed)
    with contextlib.suppress(KeyboardInterrupt):
        for entry in _entries(vm_find.needed(home), 0):
            when = time.strftime("%H:%M:%S", time.localtime(entry["time"]))
            print(json.dumps(entry) if parsed.json else f"{when}  {clean(' '.join(entry['text'].split()))}", flush=True)
    return 0


def _entries(client: Client, after: int) -> Iterator[dict[str, Any]]:
    """What happens, to the supervisor's end."""
    rest = b""
    with client.stream("/v1/events", after=after) as stream:
        while octets := stream.read():
            *lines, rest = (rest + octets).split(b"\n")
            yield from map(json.loads, lines)
