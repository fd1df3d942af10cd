"""The command line. `main(argv)` returns an exit status and never exits itself.

0  done        1  something outside failed        2  the command line or the settings are wrong
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

import netstack  # noqa: F401  # first: it makes our `dns` importable beside dnspython's
from netstack.errors import ConfigError, NetstackError
from pyvpnkit import commands as commands_of_control
from pyvpnkit import config, entry, loader, values
from pyvpnkit.commands import vm
from pyvpnkit.config import OPTIONS, Option, Settings
from pyvpnkit.kube import command as kube

OVERVIEW: Final = """\
The network of a virtual machine as one unprivileged process: DHCP, DNS, NTP, and every connection of the guest carried on
by an ordinary socket of this user, so the host's routes, VPN, firewall and name resolution apply to the guest as well."""

EXAMPLES: Final = """\
examples:
  pyvpnkit shell
      a shell whose only network is pyvpnkit; no VM, no root
  pyvpnkit shell -p 8080:80 -- python3 -m http.server 80
      a server in there, reached as http://127.0.0.1:8080 here
  pyvpnkit run --link qemu:/tmp/net.sock
      then: qemu-system-x86_64 ... -device virtio-net-pci,netdev=n
                               -netdev stream,id=n,server=off,addr.type=unix,addr.path=/tmp/net.sock
  pyvpnkit run --config vm.yaml --capture /tmp/vm.pcapng
      settings from a file, the capture switched on by hand
  pyvpnkit expose 8080:80; pyvpnkit ports; pyvpnkit top; pyvpnkit capture tcp port 80 | wireshark -k -i -
      while it runs: publish a port, list them, see who transfers what, look at the packets
  pyvpnkit vm up examples/tiny.yml; pyvpnkit vm console tiny; pyvpnkit vm down tiny
      a whole machine: network, shares, console, docker.sock
  pyvpnkit check-config vm.yaml
      every mistake with its line, and what would be accepted

Each command has its own --help; the manual (docs/manual.md) has every setting with an example.
In the guest: gateway, DNS and NTP are 192.168.65.1; this host is 192.168.65.2 (host.internal)."""

SIGNALS: Final = """\
signals:
  TERM, INT  stop: no new connections, --grace seconds for those there are, then exit; a second one exits at once
  HUP        read --config again; what needs a restart is named in the log,
             and so is what could not be had: the next HUP tries it again
  USR1       print a summary of links, leases, flows and counters on standard error

Lists (such as -p) replace the list of the file. Sizes take K, M or G."""

TITLES: Final = {
    "": "links, ports, process",
    "network": "the network as guests see it",
    "limits": "limits",
    "timeouts": "times, in seconds",
    "capture": "capture",
    "dns": "name resolution",
    "http_proxy": "HTTP proxy",
    "control": "control API",
    "vpnkit": "VPNKit's sockets and files",
}

IN_VM: Final = {
    "forwarder": "carry what the host sends on published ports (VPNKit's vpnkit-forwarder)",
    "expose-port": "publish a port on the host while this runs (vpnkit-expose-port; dockerd's userland proxy)",
    "list-ports": "the ports that are published on the host (vpnkit-list-ports)",
    "vsudd": "Unix sockets of the VM, such as Docker's, to the host over vsock (LinuxKit's vsudd)",
    "timesync": "set the clock from the VM's RTC when the host asks (LinuxKit's host-timesync-daemon)",
    "mount9p": "mount a folder that the host serves over vsock (vpnkit-9pmount-vsock)",
}

NOT_IN_SHELL: Final = frozenset({"links", "pid_file", "user"})
"""Settings that make no sense where the guest is a child of ours."""


class _Help(argparse.RawDescriptionHelpFormatter):
    """Takes each option's text from the docstring of its field, when somebody asks."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=min(120, _columns()))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{', '.join(action.option_strings)} {self._format_args(action, action.dest.upper())}"  # metavar once

    def _get_help_string(self, action: argparse.Action) -> str | None:
        option = config.BY_KEY.get(action.dest.replace("__", "."))
        if option is None or not action.option_strings:
            return action.help
        words = config.documentation(option).replace("`", "")
        default = "" if option.many or option.pairs else f" [{config.default_text(option)}]"
        return f"{words}{default}".replace("%", "%%")


class _Command(argparse.ArgumentParser):
    """Says which of its flags may have been meant. (By itself argparse leaves that to the parser of the whole line.)"""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            meant = values.meant(word, flags) if word.startswith("--") else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
        return found, unknown


def _columns() -> int:
    import shutil

    return shutil.get_terminal_size().columns - 2


def add_settings(parser: argparse.ArgumentParser, without: frozenset[str] = frozenset()) -> None:
    """One flag per setting, in groups. Nothing is converted here: `settings` does it, with all complaints at once."""
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings; flags override it")
    for section, title in TITLES.items():
        group = parser.add_argument_group(title)
        for option in OPTIONS:
            if option.section == section and option.key not in without:
                group.add_argument(
                    *option.flags, dest=option.dest, action="append", metavar=option.metavar, help=option.key
                )


def given(arguments: argparse.Namespace) -> dict[str, list[str]]:
    """Option key -> texts, of the flags that were given."""
    found = {option.key: getattr(arguments, option.dest, None) for option in OPTIONS}
    return {key: texts for key, texts in found.items() if texts is not None}


def settings(arguments: argparse.Namespace) -> Settings:
    """What file and flags say together; raises `ConfigErrors`."""
    return loader.load(arguments.config, given(arguments))


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="pyvpnkit", description=OVERVIEW, epilog=EXAMPLES, formatter_class=_Help, allow_abbrev=False
    )
    commands = top.add_subparsers(
        dest="command_name", metavar="COMMAND", required=True, title="commands", parser_class=_Command
    )

    def command(name: str, help: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, formatter_class=_Help, allow_abbrev=False, **more)
        assert isinstance(made, argparse.ArgumentParser)
        return made

    run = command(
        "run",
        "serve guests that attach to links",
        usage="pyvpnkit run [--config FILE] [--link URL]... [-p SPEC]... [--capture FILE] [OPTION]...",
        description="Serve guests that attach to links.",
        epilog=SIGNALS,
    )
    run.add_argument(
        "--ready-fd", type=int, metavar="N", help="write 1 to this descriptor and close it once guests can attach"
    )
    add_settings(run)

    shell = command(
        "shell",
        "a shell or command in a namespace behind the stack",
        usage="pyvpnkit shell [--mtu OCTETS] [-p SPEC]... [--capture FILE] [--config FILE] [OPTION]... [--] [CMD...]",
        description="Run a shell, or CMD, in a network namespace whose only way out is pyvpnkit. Needs Linux, not root.",
    )
    add_settings(shell, NOT_IN_SHELL)
    shell.add_argument("command", nargs=argparse.REMAINDER, metavar="CMD", help="what to run; default: $SHELL")

    demo = command("demo", "a minute's tour of everything, without a VM and without root")
    demo.add_argument(
        "--vm", action="store_true", help="with a virtual machine of QEMU's: boots Debian's kernel (x86-64)"
    )
    demo.add_argument("--vpn", action="store_true", help="a VPN of the host comes and goes under a working guest")

    commands_of_control.add(command)

    vm.add(command)
    kube.add_arguments(command("kube-forwarder", kube.HELP, epilog=kube.EXAMPLES))

    for name, whose in (("vpnkit", "VPNKit's"), ("gvproxy", "gvproxy's"), ("slirp4netns", "slirp4netns'")):
        command(name, f"{whose} own command line, for programs that start {name}", add_help=False).add_argument(
            "rest", nargs=argparse.REMAINDER
        )

    for name, help in IN_VM.items():
        command(name, f"inside a VM: {help}", add_help=False).add_argument("rest", nargs=argparse.REMAINDER)

    check = command("check-config", "look a settings file over")
    check.add_argument("file", metavar="FILE")
    command("version", "print versions")
    return top


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line taken apart; raises `SystemExit` as argparse does."""
    parsed = parser().parse_args(argv)
    if getattr(parsed, "command", None) and parsed.command[0] == "--":
        del parsed.command[0]
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's own) and return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in entry.OTHERS:
        return entry.main(argv)
    try:
        parsed = arguments(argv)
    except SystemExit as leaving:  # argparse has printed help or the mistake already
        return leaving.code if isinstance(leaving.code, int) else 2
    try:
        status = _dispatch(parsed)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head`, `| grep -q`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is for nobody
        return 128 + signal.SIGPIPE
    except ConfigError as error:
        print(f"pyvpnkit: {error}" if "\n" not in str(error) else str(error), file=sys.stderr)
        return 2
    except NetstackError as error:
        print(f"pyvpnkit: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _dispatch(parsed: argparse.Namespace) -> int:
    match parsed.command_name:
        case "run":
            loaded = settings(parsed)
            from pyvpnkit import daemon

            return daemon.main(loaded, ready_fd=parsed.ready_fd, reload=lambda: settings(parsed))
        case "shell":
            parsed.settings = settings(parsed)
            parsed.given = frozenset(given(parsed))
            from pyvpnkit import shell

            return int(shell.main(parsed))
        case "demo":
            from pyvpnkit import demo

            return int(demo.main(parsed))
        case name if name in commands_of_control.MODULES:
            return commands_of_control.run(parsed)
        case "vm":
            return vm.vm(parsed)
        case "kube-forwarder":
            return kube.run(parsed)
        case "check-config":
            return _check(parsed.file)
        case "version":
            return _version()
        case other:
            raise AssertionError(other)


def _check(path: str) -> int:
    loaded = loader.load(path)
    print(f"{path}: fine")
    for option in config.differences(Settings(), loaded):
        print(f"  {option.key}: {_shown(option, loaded)}")
    return 0


def _shown(option: Option, loaded: Settings) -> str:
    match config.value_of(loaded, option):
        case tuple() as many:
            return ", ".join(str(one) for one in many)
        case dict() as pairs:
            return ", ".join(f"{left}={right}" for left, right in pairs.items())
        case True:
            return "on"
        case False | None:
            return "off"
        case value:
            return str(value)


def _version() -> int:
    import platform
    from importlib import metadata

    def of(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "not installed"

    print(f"pyvpnkit {of('pyvpnkit')}")
    print(f"Python {platform.python_version()}, uvloop {of('uvloop')}, {platform.system()} {platform.release()}")
    return 0
