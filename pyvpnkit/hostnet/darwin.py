"""macOS: its addresses and routes from what `ifconfig -a` and `netstat -rn` print. The parsing works, and is tested, anywhere.

macOS tells of changes by routing sockets and SCNetworkReachability; reading these two every few seconds needs neither ctypes
nor PyObjC, and sees the same a little later.
"""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from typing import Final

from netstack.errors import HostError
from pyvpnkit.hostnet.routes import Egress, Route, Snapshot, made

_LIMIT_S: Final = 10.0
_MAX_LINES: Final = 20_000
_INTERFACE: Final = re.compile(r"^(\S+): flags=[0-9a-f]+<([^>]*)>(?:.* mtu (\d+))?")


def snapshot() -> Snapshot:
    """Look now. Raises `HostError`."""
    return read(_said("/sbin/ifconfig", "-a"), _said("/usr/sbin/netstat", "-rn"))


def _said(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, timeout=_LIMIT_S, check=True, env={"LC_ALL": "C"})
    except (OSError, subprocess.SubprocessError) as error:
        raise HostError(f"{words[0]}: {error}; the host's network cannot be read") from None
    return done.stdout.decode("utf-8", "replace")


def read(ifconfig: str, netstat: str) -> Snapshot:
    """What both programs said. A line that cannot be understood is passed over."""
    addresses, mtus = parse_ifconfig(ifconfig)
    routes = list(parse_netstat(netstat))
    defaults = [route for route in routes if not route.destination.prefixlen]
    out = next((route.interface for route in defaults if route.destination.version == 4), None)
    return Snapshot(
        addresses=frozenset(addresses),
        routes=frozenset(routes),
        egress=Egress(interface=out, mtu=mtus[out]) if out in mtus else None,
        ipv6_route=any(route.destination.version == 6 and _usable(route, addresses) for route in defaults),
    )


def _usable(route: Route, addresses: set[bytes]) -> bool:
    """utun interfaces of macOS's own services have link-local default routes, which lead nowhere without a global address."""
    has_global = any(len(one) == 16 and one[0] & 0xE0 == 0x20 for one in addresses)  # 2000::/3
    return has_global and not route.interface.startswith("lo")


def parse_ifconfig(text: str) -> tuple[set[bytes], dict[str, int]]:
    """All addresses, 4 or 16 octets, and the MTU of each interface that is up."""
    addresses: set[bytes] = set()
    mtus: dict[str, int] = {}
    for line in text.splitlines()[:_MAX_LINES]:
        if (head := _INTERFACE.match(line)) is not None:
            if head[3] is not None and "UP" in head[2].split(","):
                mtus[head[1]] = int(head[3][:6])
            continue
        kind, _, rest = line.strip().partition(" ")
        family = {"inet": socket.AF_INET, "inet6": socket.AF_INET6}.get(kind)
        if family is not None:
            try:
                addresses.add(socket.inet_pton(family, rest.split()[0].partition("%")[0]))
            except (OSError, IndexError):
                continue
    return addresses, mtus


def parse_netstat(text: str) -> Iterator[Route]:
    """The routes, of both families; those of single hosts that the kernel cloned (flag W) or knows as neighbours (L) left out."""
    columns: dict[str, int] = {}
    six = False
    for line in text.splitlines()[:_MAX_LINES]:
        words = line.split()
        match words:
            case ["Internet:"]:
                six = False
            case ["Internet6:"]:
                six = True
            case ["Destination", "Gateway", *_]:
                columns = {name: number for number, name in enumerate(words)}
            case [destination, _gateway, flags, *_] if columns:
                # Refs and Use are gone since macOS 10.15, so the column is found by its heading.
                at = columns.get("Netif", 3)
                if "W" in flags or "L" in flags or len(words) <= at:
                    continue
                network = _six(destination) if six else _four(destination)
                if network is not None:
                    yield from made(network[0], network[1], words[at])


def _four(text: str) -> tuple[bytes, int] | None:
    """`default`, `10`, `192.168.1`, `10.8/16`, `192.168.1.7/32`: trailing zero octets are left out (netstat(1))."""
    if text == "default":
        return bytes(4), 0
    address, slash, length = text.partition("/")
    parts = address.partition("%")[0].split(".")
    try:
        octets = bytes(int(part) for part in parts)
        prefix = int(length) if slash else len(parts) * 8
    except ValueError:
        return None
    return (octets.ljust(4, b"\0"), prefix) if 0 < len(octets) <= 4 and 0 <= prefix <= 32 else None


def _six(text: str) -> tuple[bytes, int] | None:
    if text == "default":
        return bytes(16), 0
    address, slash, length = text.partition("/")
    try:
        octets = socket.inet_pton(socket.AF_INET6, address.partition("%")[0])
        prefix = int(length) if slash else 128
    except (OSError, ValueError):
        return None
    return (octets, prefix) if 0 <= prefix <= 128 else None
