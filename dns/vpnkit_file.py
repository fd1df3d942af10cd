"""The file of VPNKit's `--dns` (spec vpnkit 4.2), which programs around VPNKit rewrite when a VPN comes or goes.

    nameserver 10.0.0.2#5353      an address; a port after `#`
    zone corp.example eng.example names under these go to it, and to no other server
    order 1                       asked when those of a lower order fail or keep quiet; 0 without
    timeout 2000                  milliseconds its answer is awaited; 5000 without
    nameserver 8.8.8.8
    search corp.example lab       the first such line holds; they reach the guest by DHCP
    assume-offline-after 5        unanswered tries in a row, of any server

`zone`, `order` and `timeout` belong to the `nameserver` before them; a repeated `zone` adds, of the others the last holds. A line
that begins with another word says nothing, nor does what follows ` #`. A file with an error in it has no servers at all, as
in VPNKit, because half of a file could send names of a VPN to servers of the world; what is wrong is logged with its line.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Final

from dns import codec
from dns.servers import MAX_SERVERS, OFFLINE_AFTER, Resolvers, Server, Upstream
from netstack.errors import ConfigError, Malformed

log = logging.getLogger("pyvpnkit.dns")

MAX_ZONES: Final = 1024
"""Of all servers together."""
MAX_TIMEOUT_MS: Final = 3_600_000
MAX_SEARCH: Final = 32


def parse(text: str) -> Resolvers:
    """Read the file. Raises `ConfigError` with the number of the line that is wrong."""
    servers: list[Server] = []
    search: tuple[str, ...] | None = None
    offline_after = OFFLINE_AFTER
    zones = 0
    for number, line in enumerate(text.splitlines(), 1):
        keyword, *values = line.partition(" #")[0].split() or ("",)
        where = f"line {number}: "
        match keyword:
            case "nameserver":
                if len(servers) >= MAX_SERVERS:
                    raise ConfigError(f"{where}more than {MAX_SERVERS} name servers")
                try:
                    servers.append(Server(Upstream.parse(_one(values, where, "nameserver 192.0.2.53#53"))))
                except ConfigError as error:
                    raise ConfigError(f"{where}{str(error).removeprefix(where)}") from None
            case "zone" | "order" | "timeout":
                if not servers:
                    raise ConfigError(f"{where}{keyword} before the first nameserver it could belong to")
                last = servers[-1]
                if keyword == "zone":
                    zones += len(values)
                    if zones > MAX_ZONES:
                        raise ConfigError(f"{where}more than {MAX_ZONES} zones")
                    named = (_zone(value, where) for value in values)
                    servers[-1] = replace(last, zones=tuple(dict.fromkeys((*last.zones, *named))))
                elif keyword == "order":
                    servers[-1] = replace(last, order=_number(values, where, "order 1", -(1 << 31), 1 << 31))
                else:
                    timeout_ms = _number(values, where, "timeout 5000", 0, MAX_TIMEOUT_MS)
                    servers[-1] = replace(last, timeout_s=timeout_ms / 1000)
            case "search":
                if search is None:
                    search = tuple(value.rstrip(".") for value in values if value.rstrip("."))[:MAX_SEARCH]
            case "assume-offline-after":
                offline_after = _number(values, where, "assume-offline-after 5", 0, 1 << 31)
    return Resolvers(servers=tuple(servers), search=search or (), offline_after=offline_after)


def parse_or_none(text: str) -> Resolvers:
    """What `parse` says, or no servers when the file is wrong, which is logged."""
    try:
        return parse(text)
    except ConfigError as error:
        log.warning("DNS file: %s; going on without its servers", error)
        return Resolvers()


def _one(values: list[str], where: str, example: str) -> str:
    if len(values) != 1:
        raise ConfigError(f"{where}write one value, as in {example!r}")
    return values[0]


def _number(values: list[str], where: str, example: str, lowest: int, highest: int) -> int:
    text = _one(values, where, example)
    digits = text.removeprefix("-")
    number = int(text) if digits.isascii() and digits.isdecimal() and len(digits) < 12 else None
    if number is None or not lowest <= number <= highest:
        raise ConfigError(f"{where}{text!r} is no number of {lowest} to {highest}; write it as in {example!r}")
    return number


def _zone(text: str, where: str) -> bytes:
    try:
        return codec.wire_name(text)
    except Malformed as error:
        raise ConfigError(f"{where}zone {text!r}: {error}") from None
