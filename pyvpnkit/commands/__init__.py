"""Commands that talk to a running daemon through its control socket.

`add` registers them on the command line and `run` runs one; each is imported only then, because `pyvpnkit run` starts by the same
command line.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any, Final

Command = Callable[..., argparse.ArgumentParser]
"""`command(name, help, **more)` makes the parser of one command, as in `pyvpnkit.cli`."""

MODULES: Final = {
    "ports": "ports",
    "expose": "ports",
    "unexpose": "ports",
    "status": "status",
    "flows": "flows",
    "top": "top",
    "capture": "capture",
    "events": "events",
    "dns": "dns",
    "doctor": "doctor",
}
"""Command -> the module here whose function of the command's name runs it."""

DNS_EXAMPLES: Final = """\
examples:
  pyvpnkit dns explain www.corp.example      which rule and server answers guests, and what
  pyvpnkit dns explain mail.example MX
  pyvpnkit dns log --limit 20                the last queries of guests
  pyvpnkit dns upstreams                     which resolvers there are, and how they do"""

SPEC_HELP: Final = (
    "[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT, or unix:/PATH:[GUESTIP:]GUESTPORT; "
    "without IP the port is bound on 127.0.0.1 alone"
)
EXPOSE_EXAMPLES: Final = """\
examples:
  pyvpnkit expose 8080:80                    port 8080 of this host, loopback only, to port 80 of the guest
  pyvpnkit expose 0.0.0.0:8080:80            for other hosts too
  pyvpnkit expose 0:192.168.65.4:22          a free port, which is printed, to a certain guest
  pyvpnkit expose udp:5000-5010:5000-5010    a range
  pyvpnkit expose unix:/tmp/vm.sock:2375     a Unix socket of this host"""
CAPTURE_EXAMPLES: Final = """\
examples:
  pyvpnkit capture | wireshark -k -i -
  pyvpnkit capture tcp port 80 | tcpdump -n -r -
  pyvpnkit capture -w /tmp/dns.pcapng -c 100 'udp port 53 and not host 192.168.65.4'"""
FILTER_HELP: Final = "in the words of tcpdump, such as: host 192.168.65.3 and tcp port 80"


def add(command: Command) -> None:
    """Register all commands of `MODULES`."""

    def one(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        made = command(name, help, **more)
        made.add_argument(
            "--control",
            metavar="PATH",
            help="control socket of the daemon; default: $PYVPNKIT_CONTROL, else control.sock in the state directory",
        )
        return made

    def json(made: argparse.ArgumentParser) -> None:
        made.add_argument("--json", action="store_true", help="for programs")

    json(one("ports", "list the ports that are published"))

    made = one(
        "expose", "publish ports of the host that lead into a guest; they stay until `unexpose`, over restarts too"
    )
    made.add_argument("specs", metavar="SPEC", nargs="+", help=SPEC_HELP)
    json(made)

    made = one("unexpose", "no longer publish ports")
    made.add_argument("specs", metavar="SPEC|ID", nargs="*", help="as `pyvpnkit ports` lists them")
    made.add_argument("--all", action="store_true", help="all that were published by `expose` or /v1")
    json(made)

    json(one("status", "the network at a glance"))

    made = one("flows", "what guests have open")
    made.add_argument("--guest", metavar="IP", help="of one guest")
    made.add_argument("--protocol", choices=("tcp", "udp", "icmp"))
    made.add_argument("--limit", type=int, default=1000, metavar="N", help="show N at most [1000]")
    made.add_argument(
        "--reset", metavar="ID", action="append", help="end this flow instead of listing; may be repeated"
    )
    json(made)

    made = one("top", "a live table of what guests transfer; q ends it")
    made.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between two looks [1]")
    made.add_argument("--once", action="store_true", help="print one table over one interval, and end")
    json(made)

    made = one(
        "capture", "frames of all links as pcapng, as they pass, for Wireshark and tcpdump", epilog=CAPTURE_EXAMPLES
    )
    made.add_argument("-w", "--write", metavar="FILE", help="to this file; - is standard output [standard output]")
    made.add_argument("-c", "--count", type=int, metavar="N", help="end after N frames")
    made.add_argument("-s", "--snaplen", type=int, metavar="OCTETS", help="octets kept of each frame [all]")
    made.add_argument("filter", metavar="FILTER", nargs="*", help=FILTER_HELP)

    made = one("events", "what happens, a line each, until Ctrl-C")
    made.add_argument("--types", metavar="NAME[,NAME]...", default="", help="only events of these names")
    json(made)

    made = one("dns", "why a name leads where it does, and what guests asked last", epilog=DNS_EXAMPLES)
    actions = made.add_subparsers(dest="dns_action", metavar="ACTION", required=True)
    action = actions.add_parser("explain", help="what a guest gets for a name now, and from where")
    action.add_argument("name", metavar="NAME")
    action.add_argument("type", metavar="TYPE", nargs="?", default="A", help="of records: A, AAAA, MX, TYPE65280 [A]")
    json(action)
    action = actions.add_parser("log", help="the last queries of guests, the newest last")
    action.add_argument("--limit", type=int, default=256, metavar="N", help="show N at most [256]")
    json(action)
    json(actions.add_parser("upstreams", help="resolvers and their counters"))

    made = one("doctor", "what on this host may be in the way of guests, and what to do; needs no daemon")
    made.add_argument("--config", metavar="FILE", help="look with the settings of this file")
    made.add_argument("--subnet", metavar="NETWORK", help="is this network free here, instead of the settings'")
    json(made)


def run(parsed: argparse.Namespace) -> int:
    """Run the command in `parsed.command_name`; returns the exit status. Raises `ConfigError` and `HostError`."""
    module = importlib.import_module(f"{__name__}.{MODULES[parsed.command_name]}")
    return int(getattr(module, parsed.command_name)(parsed))
