"""Which resolvers the host uses: `/etc/resolv.conf` (resolv.conf(5)), followed while it changes.

A VPN client, NetworkManager, systemd-resolved and macOS's configd all write this file, so following it is how the guest's
names follow the host's. Loopback resolvers such as 127.0.0.53 are fine: it is a process of the host that asks them.
"""

from __future__ import annotations

import logging
from typing import Final

from dns.servers import PORT, TIMEOUT_S, Resolvers, Upstream, in_turn
from dns.watch import WatchedFile
from netstack.api import Clock
from netstack.errors import ConfigError

log = logging.getLogger("pyvpnkit.dns")

__all__ = ["MAX_SERVERS", "PORT", "Resolvers", "Upstream", "parse_resolv_conf", "watch"]

MAX_SERVERS: Final = 8
"""More than the 3 of the C library; more cannot be asked within the time a query is given."""


def _option(text: str, lowest: int, highest: int) -> int | None:
    number = text.partition(":")[2]
    return min(max(int(number), lowest), highest) if number.isdecimal() and len(number) < 9 else None


def parse_resolv_conf(text: str) -> Resolvers:
    """Read resolv.conf(5). Never raises: a line that cannot be understood is passed over, as the C library does."""
    servers: list[Upstream] = []
    search: tuple[str, ...] = ()
    timeout_s, attempts = 5, 2  # of the C library
    for line in text.splitlines():
        if line.startswith(("#", ";")):
            continue
        keyword, *values = line.split() or ("",)
        match keyword.lower():
            case "nameserver" if values:
                try:
                    server = Upstream.parse(values[0])
                except ConfigError as error:
                    log.warning("resolv.conf: %s", error)
                    continue
                if server not in servers and len(servers) < MAX_SERVERS:
                    servers.append(server)
            case "search" | "domain" if values:  # the last such line holds
                search = tuple(name.rstrip(".") for name in values if name != ".")
            case "options":
                for option in values:
                    if option.startswith("timeout:"):
                        timeout_s = _option(option, 1, 30) or timeout_s
                    elif option.startswith("attempts:"):
                        attempts = _option(option, 1, 5) or attempts
    return Resolvers(servers=in_turn(servers, min(float(timeout_s * attempts), TIMEOUT_S)), search=search)


def watch(path: str | None, clock: Clock) -> WatchedFile[Resolvers]:
    """The resolvers named in the file at `path`, followed; `None` for no resolvers."""
    return WatchedFile(path, parse_resolv_conf, clock)
