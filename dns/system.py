"""Which resolvers the host uses: `/etc/resolv.conf` (resolv.conf(5)), followed while it changes.

A VPN client, NetworkManager, systemd-resolved and macOS's configd all write this file, so following it is how the guest's
names follow the host's. Loopback resolvers such as 127.0.0.53 are fine: it is a process of the host that asks them.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from dns.watch import WatchedFile
from netstack.api import Clock
from netstack.errors import ConfigError

log = logging.getLogger("pyvpnkit.dns")

PORT: Final = 53
MAX_SERVERS: Final = 8
"""More than the 3 of the C library; more cannot be asked within the time a query is given."""
SERVER_S: Final = 1.5
"""How long one server is waited for before the next is asked too: threats N2 allows 2 s, F12 wants the next one's answer
within 2 s. A late answer still counts."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A resolver: numeric address, port, and for IPv6 the scope (interface index)."""

    address: str
    port: int = PORT
    scope: int = 0

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET6 if ":" in self.address else socket.AF_INET

    @property
    def sockaddr(self) -> tuple[str, int] | tuple[str, int, int, int]:
        if ":" in self.address:
            return self.address, self.port, 0, self.scope
        return self.address, self.port

    def __str__(self) -> str:
        address = f"{self.address}%{self.scope}" if self.scope else self.address
        return f"[{address}]:{self.port}" if ":" in address else f"{address}:{self.port}"

    @classmethod
    def parse(cls, text: str) -> Upstream:
        """`1.1.1.1`, `1.1.1.1#5353`, `1.1.1.1:5353`, `::1`, `[::1]:5353` or `fe80::1%eth0`. Raises `ConfigError`."""
        address, hash_mark, port_text = text.partition("#")
        if not hash_mark:
            if address.startswith("["):
                address, _, rest = address[1:].partition("]")
                port_text = rest.removeprefix(":")
            elif address.count(":") == 1:
                address, _, port_text = address.partition(":")
        address, _, scope_text = address.partition("%")
        try:
            socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            port = int(port_text) if port_text else PORT
            scope = 0
            if scope_text:
                scope = int(scope_text) if scope_text.isdecimal() else socket.if_nametoindex(scope_text)
        except (OSError, ValueError):
            port = scope = 0
        if not (0 < port < 65536 and scope < 1 << 32):
            raise ConfigError(
                f"DNS server {text!r}: write an address, as in 192.0.2.53, 192.0.2.53#5353 or [2001:db8::53]:53"
            )
        return cls(address, port, scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolvers:
    """What to ask, in this order, and how patiently."""

    servers: tuple[Upstream, ...] = ()
    search: tuple[str, ...] = ()
    server_s: float = SERVER_S
    attempts: int = 0
    """Rounds through the list; 0: as many as fit the time of a query."""

    @classmethod
    def of(cls, servers: Sequence[str]) -> Resolvers:
        """A list somebody configured. Raises `ConfigError`."""
        return cls(servers=tuple(Upstream.parse(server) for server in servers))


def _option(text: str, lowest: int, highest: int) -> int | None:
    number = text.partition(":")[2]
    return min(max(int(number), lowest), highest) if number.isdecimal() and len(number) < 9 else None


def parse_resolv_conf(text: str) -> Resolvers:
    """Read resolv.conf(5). Never raises: a line that cannot be understood is passed over, as the C library does."""
    servers: list[Upstream] = []
    search: tuple[str, ...] = ()
    server_s = SERVER_S
    attempts = 0
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
                        server_s = min(SERVER_S, _option(option, 1, 30) or SERVER_S)
                    elif option.startswith("attempts:"):
                        attempts = _option(option, 1, 5) or attempts
    return Resolvers(servers=tuple(servers), search=search, server_s=server_s, attempts=attempts)


def watch(path: str | None, clock: Clock) -> WatchedFile[Resolvers]:
    """The resolvers named in the file at `path`, followed; `None` for no resolvers."""
    return WatchedFile(path, parse_resolv_conf, clock)
