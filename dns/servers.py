"""Whom to ask: resolvers as values, and the seams between where they come from, how they are asked, and who asks them.

A `Source` (resolv.conf, systemd-resolved, scutil, VPNKit's `--dns` file, settings) says at any moment which `Resolvers` hold. The
forwarder asks it for each query, so it must be cheap, and should hand out the same object until something changes: a new object
makes the forwarder sort the servers again, an unequal one also empties the cache.

Servers with `zones` are asked for names under those zones only, and are the only ones asked for them; see `dns.forwarder`.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Protocol, TypeAlias

from dns import codec
from netstack.errors import ConfigError, Malformed

PORT: Final = 53
TLS_PORT: Final = 853  # RFC 7858 3.1
ANY_NAME: Final = "*"
"""In place of the name in a certificate: any will do."""
TIMEOUT_S: Final = 5.0  # spec vpnkit 4.2
OFFLINE_AFTER: Final = 5  # spec vpnkit 4.2
MAX_SERVERS: Final = 64
"""Of one `Resolvers`; those after are left out."""


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
        if self == HOST:
            return "getaddrinfo"
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


HOST: Final = Upstream("", 0)
"""No server: the host's own getaddrinfo(3), asked by an `Asker`."""


@dataclass(frozen=True, slots=True)
class Server:
    """One resolver and what it is asked for."""

    upstream: Upstream
    zones: tuple[bytes, ...] = ()
    """Suffixes in wire form and lower case (`codec.wire_name`); none: any name that is in no server's zone."""
    order: int = 0
    """Servers of the lowest order are asked at once and together, those of the next when these fail or keep quiet."""
    timeout_s: float = TIMEOUT_S
    """How long its answer to one query is awaited, repetitions (each second) included."""
    tls: str | None = None
    """Name in the server's certificate: it is asked over TLS (RFC 7858)."""

    def __str__(self) -> str:
        return f"{self.upstream} over TLS as {self.tls}" if self.tls else str(self.upstream)

    @classmethod
    def parse(cls, text: str) -> Server:
        """A server as people write it: `tls://192.0.2.53#dns.example`, with a port `tls://192.0.2.53:8853#dns.example`, with the
        name `*` for any certificate, and without a name for one that has the address; else as `Upstream.parse`, in clear.

        Raises `ConfigError`.
        """
        if not text.startswith("tls://"):
            return cls(Upstream.parse(text))
        address, _, name = text.removeprefix("tls://").partition("#")
        try:
            upstream = Upstream.parse(address)
            if name and name != ANY_NAME:
                codec.wire_name(name)
        except (ConfigError, Malformed) as error:
            raise ConfigError(f"DNS server {text!r}: {error}; over TLS write tls://192.0.2.53#dns.example") from None
        port = TLS_PORT if upstream.port == PORT else upstream.port
        return cls(replace(upstream, port=port), tls=name or upstream.address)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolvers:
    """Whom to ask at one moment."""

    servers: tuple[Server, ...] = ()
    search: tuple[str, ...] = ()
    """The host's search domains; they reach the guest by DHCP."""
    offline_after: int = OFFLINE_AFTER
    """A server that did not answer so many tries in a row is no longer waited for until it answers again."""

    @classmethod
    def of(cls, servers: Sequence[str]) -> Resolvers:
        """A list somebody configured, asked in its order. Raises `ConfigError`."""
        return cls(servers=after_each_other(map(Server.parse, servers)))


def in_turn(upstreams: Iterable[Upstream], timeout_s: float = TIMEOUT_S) -> tuple[Server, ...]:
    """Servers asked one after the other, as those of resolv.conf(5) are."""
    return tuple(Server(upstream, order=place, timeout_s=timeout_s) for place, upstream in enumerate(upstreams))


def after_each_other(servers: Iterable[Server]) -> tuple[Server, ...]:
    """The same servers, asked one after the other."""
    return tuple(replace(server, order=place) for place, server in enumerate(servers))


Source: TypeAlias = Callable[[], Resolvers]
"""Whom to ask now. Called for each query; never waits, never raises."""


class Asker(Protocol):
    """A way to put questions to one server other than plain UDP and TCP: TLS, getaddrinfo.

    It may keep connections and threads between questions; their number is its own to bound.
    """

    async def ask(self, query: bytes, end: int) -> bytes:
        """The answer to `query`, whose question ends at `end`, with any id; the caller has checked neither length nor content.

        Cancelled when nobody waits any longer. Raises `HostError` when the server cannot be asked.
        """
        ...

    def renew(self) -> None:
        """The network changed: connections from before are not used any more, questions on their way are asked again."""
        ...

    def close(self) -> None:
        """The server is not wanted any more; questions on their way fail with `HostError`."""
        ...


AskerFor: TypeAlias = Callable[[Server], Asker | None]
"""The way to ask a server, made once for each; `None` for plain UDP and TCP."""
