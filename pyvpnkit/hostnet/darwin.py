"""macOS: its addresses and routes from what `ifconfig -a` and `netstat -rn` print. The parsing works, and is tested, anywhere.

macOS tells of changes by routing sockets and SCNetworkReachability; reading these two every few seconds needs neither ctypes
nor PyObjC, and sees the same a little later.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import subprocess
from collections.abc import Iterator
from typing import Final

from netstack.errors import HostError
from pyvpnkit.hostnet.routes import SOMEWHERE, SOMEWHERE_6, Egress, Route, Snapshot, made

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
    four, six = (_way_to(one, routes) for one in (SOMEWHERE, SOMEWHERE_6))
    # Services of macOS have utun interfaces with IPv6 routes that lead nowhere: without a global address nothing would come back.
    has_global = any(len(one) == 16 and one[0] & 0xE0 == 0x20 for one in addresses)  # 2000::/3
    return Snapshot(
        addresses=frozenset(addresses),
        routes=frozenset(routes),
        egress=Egress(interface=four, mtu=mtus[four]) if four in mtus else None,
        ipv6_route=has_global and six in mtus,
    )


def _way_to(address: bytes, routes: list[Route]) -> str:
    """The interface of the longest prefix, of equals the first as netstat lists them; empty for none."""
    found = [route for route in routes if ipaddress.ip_address(address) in route.destination]
    best = max(found, key=lambda route: route.destination.prefixlen, default=None)
    return "" if best is None or best.interface.startswith("lo") else best.interface


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
            except (OSError, ValueError, IndexError):  # ValueError: a NUL in it
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
                if network is not None and (
                    network[1] or "I" not in flags
                ):  # RTF_IFSCOPE: for who binds to that interface
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
