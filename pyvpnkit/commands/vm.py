"""`pyvpnkit vm ...`: virtual machines with everything beside them (docs/vm.md).

A machine is called by its file or by its name. Each command's work is in a module of its own that is imported only then.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

Command = Callable[..., argparse.ArgumentParser]

RUN_BY: Final = {
    "up": "vm_up:up",
    "down": "vm_talk:down",
    "rm": "vm_talk:remove",
    "status": "vm_talk:status",
    "list": "vm_talk:machines",
    "pause": "vm_talk:pause",
    "resume": "vm_talk:resume",
    "restart": "vm_talk:restart",
    "events": "vm_talk:events",
    "console": "vm_look:console",
    "logs": "vm_look:logs",
    "plan": "vm_look:plan",
    "build": "vm_look:build",
    "link-docker-sock": "vm_look:link_docker_sock",
}
"""Action -> the module here, and its function."""

EXAMPLES: Final = """\
examples:
  pyvpnkit vm up examples/tiny.yml           start a machine and all it needs; returns when it is ready
  pyvpnkit vm status tiny                    state, addresses, ports, shares, what is degraded
  pyvpnkit vm console tiny                   its serial console; Ctrl-] leaves it
  pyvpnkit vm logs tiny network -f           what its network says, as it comes
  pyvpnkit vm plan --hypervisor vfkit vm.yml what would be started, on any system; starts nothing
  pyvpnkit vm down tiny                      ask the guest to power down, and take everything away

MACHINE is a file, or the name of a machine; left out it is vm.yml here, or the only machine there is."""


def add(command: Command) -> None:
    """Register `vm` among the commands, by `command(name, help, **more)` of `pyvpnkit.cli`."""
    register(command("vm", "virtual machines: up, down, rm, status, console, logs, plan, build", epilog=EXAMPLES))


def register(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands to the parser of `vm`."""
    actions = parser.add_subparsers(dest="vm_action", metavar="ACTION", required=True)

    def one(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        return actions.add_parser(name, help=help, description=help, allow_abbrev=False, **more)

    def machine(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made.add_argument(
            "--state-dir",
            metavar="DIR",
            type=Path,
            help="directory of this machine; default: $XDG_STATE_HOME/pyvpnkit/vm/NAME, else below ~/.local/state",
        )
        made.add_argument("machine", metavar="MACHINE", nargs="?", help="its file or its name")
        return made

    def json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="for programs")

    made = machine(one("up", "start a machine and all it needs; returns when it is ready"))
    made.add_argument("--foreground", action="store_true", help="stay, log here, and take it down on Ctrl-C")
    made.add_argument("--no-wait", action="store_true", help="return as soon as the supervisor runs")

    made = machine(one("down", "ask the guest to power down, wait, and take everything away"))
    made.add_argument("--kill", action="store_true", help="as by a power cut, without asking the guest")
    made.add_argument(
        "--limit", type=float, metavar="SECONDS", help="kill it when it takes longer [stop.grace of its file]"
    )

    machine(one("rm", "forget a machine that is down: its addresses, logs, what was built; not its file and its disks"))
    json(machine(one("status", "how a machine does; exit status 1 when it is not up")))
    json(one("list", "the machines there are"))
    machine(one("pause", "stop a guest's time"))
    machine(one("resume", "let a guest go on"))
    machine(one("restart", "down and up again, under the same supervisor"))
    json(machine(one("events", "what happens to a machine, a line each, until Ctrl-C")))

    made = machine(one("console", "a machine's serial console; Ctrl-] leaves it"))
    made.add_argument(
        "--lines", type=int, default=10, metavar="N", help="show the last N lines that were said before [10]"
    )

    made = machine(one("logs", "what a machine's parts have said"))
    made.add_argument(
        "part",
        metavar="PART",
        nargs="?",
        default="console",
        help="console, supervisor, network, hypervisor, ... [console]",
    )
    made.add_argument("-f", "--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    made.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="begin with the last N lines [100]")

    made = machine(one("plan", "everything that `up` would start, write and publish; starts nothing"))
    made.add_argument("--hypervisor", metavar="NAME", help="with this one instead of the file's")
    json(made)

    made = one("build", "a kernel and an initramfs from LinuxKit's YAML, or from that which a machine's file names")
    made.add_argument("file", metavar="FILE", type=Path)
    made.add_argument("-o", "--output", metavar="DIR", type=Path, default=Path(), help="where they go [here]")
    made.add_argument(
        "--compress", choices=("none", "gzip", "xz"), default="none", help="the initramfs; it boots later for it [none]"
    )
    made.add_argument(
        "--refresh", action="store_true", help="ask apt for the packages anew; else they stay as they were"
    )

    made = machine(one("link-docker-sock", "make /var/run/docker.sock a link to the machine's; needs the right to"))
    made.add_argument(
        "--path",
        type=Path,
        default=Path("/var/run/docker.sock"),
        metavar="PATH",
        help="the link [/var/run/docker.sock]",
    )


def vm(parsed: argparse.Namespace) -> int:
    """Run the command in `parsed.vm_action`; returns the exit status. Raises `ConfigError` and `HostError`."""
    module, _, function = RUN_BY[parsed.vm_action].partition(":")
    return int(getattr(importlib.import_module(f"pyvpnkit.commands.{module}"), function)(parsed))
