"""`pyvpnkit slirp4netns ...`: slirp4netns' own command line (spec gvproxy 2), for programs that start it themselves.

    podman       slirp4netns --disable-host-loopback --mtu=65520 --enable-sandbox --enable-seccomp -c -r 3 --netns-type=path P tap0
    rootlesskit  slirp4netns --mtu 65520 -r 3 --api-socket SOCK PID tap0
    by hand      slirp4netns -c PID tap0

A symlink `slirp4netns` to the console script is this too. The network is slirp4netns': gateway and host at the second address
of `--cidr`, names at the third, guests from the fifteenth, and the one that is configured here (`-c`) at the hundredth.
"""

from __future__ import annotations

import argparse
import functools
import logging
import os
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NoReturn

from netstack.errors import ConfigError, NetstackError
from netstack.settings import format_mac
from pyvpnkit import loader
from pyvpnkit.config import Settings

log = logging.getLogger("pyvpnkit")

LIKE: Final = "1.2.0"
CIDR: Final = "10.0.2.0/24"
LONGEST_PREFIX: Final = 25
"""The hundredth address is the guest's."""
MAX_MTU: Final = 65520


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help lists the options")


def parser() -> argparse.ArgumentParser:
    """The options, as slirp4netns has them; other programs look for their names in `--help`."""
    made = _Parser(
        prog="slirp4netns",
        usage="slirp4netns [OPTION]... PID|PATH [TAPNAME]",
        description=__doc__.partition("\n")[0],
        formatter_class=functools.partial(argparse.HelpFormatter, width=132, max_help_position=32),
    )
    made.add_argument("target", metavar="PID|PATH|FD", nargs="?", help="the network namespace")
    made.add_argument("tap", metavar="TAPNAME", nargs="?", default="tap0", help="the interface in it [tap0]")
    made.add_argument("-c", "--configure", action="store_true", help="bring up the interface, with address and route")
    made.add_argument("-e", "--exit-fd", type=int, metavar="FD", help="end when the other end of FD is closed")
    made.add_argument("-r", "--ready-fd", type=int, metavar="FD", help="write 1 to FD when the network is there")
    made.add_argument("-m", "--mtu", type=int, default=1500, metavar="MTU", help="576 to 65520 [1500]")
    made.add_argument("-6", "--enable-ipv6", action="store_true", help="passed over: there is IPv4 only")
    made.add_argument("-a", "--api-socket", metavar="PATH", help="serve the API there")
    made.add_argument("--cidr", default=CIDR, help=f"the virtual network [{CIDR}]")
    made.add_argument(
        "--disable-host-loopback", action="store_true", help="the gateway does not lead to the host's 127.0.0.1"
    )
    made.add_argument(
        "--netns-type", choices=("pid", "path", "tapfd"), default="pid", metavar="TYPE", help="pid, path or tapfd [pid]"
    )
    made.add_argument("--userns-path", metavar="PATH", help="user namespace to enter before")
    made.add_argument("--enable-sandbox", action="store_true", help="keep no capability but that of low ports")
    made.add_argument("--enable-seccomp", action="store_true", help="passed over")
    made.add_argument("--outbound-addr", metavar="IPv4", help="not had here")
    made.add_argument("--outbound-addr6", metavar="IPv6", help="not had here")
    made.add_argument("--disable-dns", action="store_true", help="no name server at the third address")
    made.add_argument("--macaddress", metavar="MAC", help="of the interface (with -c)")
    made.add_argument(
        "--target-type", choices=("netns", "bess"), default="netns", metavar="TYPE", help="netns or bess [netns]"
    )
    made.add_argument("-v", "--version", action="store_true", help="show the version")
    return made


def network_of(text: str) -> IPv4Network:
    """Raises `ConfigError`."""
    try:
        found = IPv4Network(text)
    except ValueError as error:
        raise ConfigError(f"--cidr: {text!r}: {error}; write a network such as {CIDR}") from None
    if found.prefixlen > LONGEST_PREFIX:
        raise ConfigError(f"--cidr: {text}: too small; it must be /{LONGEST_PREFIX} or larger")
    return found


def guest_of(network: IPv4Network) -> IPv4Address:
    """The address that `-c` gives, and where forwards lead that name none."""
    return network.network_address + 100


def settings(parsed: argparse.Namespace) -> Settings:
    """What a command line means. Raises `ConfigError`."""
    if parsed.target is None:
        raise ConfigError("PID or PATH is missing: whose network is it to be?")
    for option in ("outbound_addr", "outbound_addr6"):
        if getattr(parsed, option):
            raise ConfigError(f"--{option.replace('_', '-')}: cannot be had here; the host's routes choose the address")
    if parsed.macaddress and not parsed.configure:
        raise ConfigError("--macaddress: is for -c, which configures the interface")
    network = network_of(parsed.cidr)
    first = network.network_address
    gateway = first + 2
    given = {
        "links": [_link(parsed)],
        "state_dir": ["off"],
        "control.socket": ["off"],
        "timeouts.grace_s": ["0"],
        "network.subnet": [str(network)],
        "network.gateway": [str(gateway)],
        "network.host_alias": ["off" if parsed.disable_host_loopback else str(gateway)],
        "network.gateway_mac": [format_mac(b"\x52\x55" + gateway.packed)],
        "network.pool_first": [str(first + 15)],
        "network.pool_last": [str(first + 30)],
        "network.mtu": [str(min(parsed.mtu, MAX_MTU) if parsed.mtu <= MAX_MTU + 1 else parsed.mtu)],
        "network.domain": ["off"],
    }
    if not parsed.disable_dns:
        given["network.gateway_aliases"] = given["network.dns_servers"] = [str(first + 3)]
    return loader.load(None, given)


def _link(parsed: argparse.Namespace) -> str:
    target = parsed.target.replace(",", ",,")
    if parsed.target_type == "bess":
        return f"bess:{target if '/' in target else f'./{target}'}"
    if parsed.netns_type == "tapfd":
        return f"fd:{target},kind=tap"
    where = f"pid={target}" if parsed.netns_type == "pid" else f"netns={os.path.abspath(target)}"
    options = {"ifname": parsed.tap, "mac": parsed.macaddress, "userns": parsed.userns_path}
    said = (f",{key}={value.replace(',', ',,')}" for key, value in options.items() if value)
    return f"tap:{where}{''.join(said)}"


def main(argv: Sequence[str]) -> int:
    """Run slirp4netns' command line `argv` (without the program's name) and return the exit status."""
    try:
        parsed = parser().parse_args(argv)
        if parsed.version:
            from importlib import metadata

            print(f"slirp4netns version {LIKE}\npyvpnkit: {metadata.version('pyvpnkit')}")
            return 0
        loaded = settings(parsed)
        from pyvpnkit import daemon
        from pyvpnkit.slirp4netns.beside import beside

        daemon.start_log(loaded.log_level)
        if parsed.enable_ipv6:
            log.warning("--enable-ipv6 is passed over: there is IPv4 only")
        return daemon.main(loaded, ready_fd=parsed.ready_fd, beside=functools.partial(beside, parsed))
    except NetstackError as error:
        print(f"slirp4netns: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
