"""Outgoing TCP through a proxy, for one connection: SOCKS5 (RFC 1928, 1929) or HTTP CONNECT (RFC 9110 9.3.6).

In place of a connect to the destination the flow's socket is connected to the proxy, both say what `netstack.host.socks5` or
`netstack.host.http_connect` has them say, and from there on the flow is like any other. How the handshake and the guest go
together is told in `netstack.host.handshake`.

A refusal by the proxy is told to the guest as that of a direct connect, where the proxy says so much (SOCKS5 replies 2 to 6);
all else is RST: a proxy that cannot be reached, leaves, answers another protocol, wants other credentials.

Fail closed: nothing of a guest goes directly where a rule names a proxy, also before the proxy's name is resolved. With
`fail_open` a proxy that cannot be *connected to* is gone around; one that refuses is not.

States: RESOLVING (looked at again every `RETRY_S`), CONNECTING (each address in turn, `ATTEMPT_S` each where there is another
way), TALKING, and the end. `tcp_connect_s` bounds all of it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from netstack.api import OutwardProxy
from netstack.host.handshake import Exchange, Handshake, Refused
from netstack.host.http_connect import HttpConnect
from netstack.host.io import ERROR, HANGUP, WRITE
from netstack.host.socks5 import Socks5
from netstack.host.tcp_flow import TcpFlow
from netstack.host.tcp_forwards import prepare
from netstack.policy.ways_out import Outward, octets_of

if TYPE_CHECKING:
    from netstack.host.tcp_proxy import TcpProxy

ATTEMPT_S: Final = 5.0
"""One address of a proxy may take so long to be connected to, before the next is tried or it is gone around."""
SILENT_S: Final = 30.0
"""A proxy that did not answer so is not waited for so long, where it may be gone around."""
RETRY_S: Final = 0.1
MAX_ADDRESSES: Final = 8
"""Of one proxy; further ones are not tried."""
IN_PROGRESS: Final = frozenset((errno.EINPROGRESS, errno.EALREADY, errno.EINTR))
CONNECTED: Final = frozenset((0, errno.EISCONN))

Where: TypeAlias = tuple[int, tuple[str, int]]
"""Family and address, as sockets want them."""


def exchange(outward: Outward) -> Exchange:
    """What is to be said to the proxy of `outward`."""
    proxy = outward.proxy
    kind = HttpConnect if proxy.scheme == "http" else Socks5
    return kind(outward.endpoint, outward.name, octets_of(proxy.user), octets_of(proxy.password))


def numeric(host: str) -> bool:
    """Whether `host` is an address."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False


@dataclass(slots=True, eq=False)
class Upstream:
    """One proxy as it is now."""

    proxy: OutwardProxy
    addresses: tuple[Where, ...] = ()
    """In the order of preference; empty until its name is resolved."""
    resolving: bool = False
    carried: int = 0
    """Connections that it accepted."""
    refused: int = 0
    """Connections that it answered with a refusal."""
    failed: int = 0
    """Connections that failed at the proxy itself: not resolved, not connected, another protocol, silence."""
    last_error: str = ""
    silent_until: float = field(default=0.0, repr=False)

    def use(self, hosts: Iterable[str]) -> None:
        """Its host has these numeric addresses."""
        port = self.proxy.port
        self.addresses = tuple(
            (socket.AF_INET6 if ":" in host else socket.AF_INET, (host, port)) for host in dict.fromkeys(hosts)
        )[:MAX_ADDRESSES]


class Upstreams:
    """The proxies that rules name. `on_unreachable` is told of each that could not be connected to."""

    def __init__(self) -> None:
        self._all: dict[OutwardProxy, Upstream] = {}
        self.on_unreachable: Callable[[Upstream], None] = lambda upstream: None

    def keep(self, proxies: Iterable[OutwardProxy]) -> None:
        """Have these; what is known of those that were there before is kept."""
        before, self._all = self._all, {}
        for proxy in proxies:
            upstream = self._all[proxy] = before.get(proxy) or Upstream(proxy)
            if not upstream.addresses and numeric(proxy.host):
                upstream.use((proxy.host,))

    def all(self) -> list[Upstream]:
        return list(self._all.values())

    def of(self, proxy: OutwardProxy) -> Upstream:
        """The state of a proxy that a rule names."""
        return self._all[proxy]


class OutwardHandshake(Handshake):
    """See the module."""

    def __init__(self, proxy: TcpProxy, flow: TcpFlow, outward: Outward) -> None:
        super().__init__(proxy, flow, exchange(outward))
        self._outward = outward
        self._upstream = proxy.upstreams.of(outward.proxy)
        self._fail_open = proxy.egress.ways_out.fail_open
        self._family: int = socket.AF_INET
        self._fresh = True
        """The socket was not used yet."""
        self._left: list[Where] | None = None
        """Addresses that were not tried yet; `None` while they are not known."""
        self._talking = False
        self._until = proxy.now + proxy.timeouts.tcp_connect_s
        self._error = "its name is not resolved"
        flow.on_close = self._over

    def start(self, now: float) -> None:
        """Connect to the first address of the proxy that takes it."""
        upstream = self._upstream
        if not upstream.addresses and not upstream.resolving:
            self._proxy.upstreams.on_unreachable(upstream)
        if self._fail_open and now < upstream.silent_until:
            self._left, self._error = [], "it was silent a moment ago"
        elif upstream.addresses or not upstream.resolving:
            self._left = list(upstream.addresses)
        else:
            self._arm(now + RETRY_S)
            return
        self._next(now)

    def timer(self, now: float) -> None:
        if self._flow.end:
            return
        if now >= self._until:
            words = "no answer" if self._talking else self._error if self._left is None else "it cannot be connected to"
            self._upstream.failed += 1
            self._end(errno.ETIMEDOUT, f"{words} within {self._proxy.timeouts.tcp_connect_s:g} s")
        elif self._left is None:
            self.start(now)
        elif not self._talking:
            self._upstream.silent_until = now + SILENT_S
            if self._left or self._fail_open:
                self._error = os.strerror(errno.ETIMEDOUT)
                self._next(now)
            else:
                self._proxy.upstreams.on_unreachable(self._upstream)
                self._arm(self._until)

    def ready(self, mask: int) -> None:
        if self._flow.end:
            return
        if not self._talking:
            number = self._flow.socket_error()
            if number or (mask & (ERROR | HANGUP) and not mask & WRITE):
                self._error = os.strerror(number or errno.ECONNREFUSED)
                self._next(self._proxy.now)
                return
            if not mask & WRITE:
                return
            self._connected()
        super().ready(mask)

    def _next(self, now: float) -> None:
        """The next address; when there is none, around the proxy or the end."""
        while self._left:
            family, where = self._left.pop(0)
            try:
                self._renew(family)
                prepare(self._sock)
                number = self._proxy.connect(self._sock, where)
                if number in CONNECTED or number in IN_PROGRESS:
                    self._watch(write=True)
            except OSError as error:
                number = error.errno or errno.EIO
            if number in IN_PROGRESS:
                self._arm(now + ATTEMPT_S)
                return
            if number in CONNECTED:
                self._connected()
                super().ready(WRITE)
                return
            self._error = os.strerror(number)
        self._unreachable()

    def _renew(self, family: int) -> None:
        """A socket that was not used yet. Raises `OSError`."""
        if not self._fresh or family != self._family:
            sock = self._proxy.io.socket(family, socket.SOCK_STREAM)
            self._unwatch()
            self._sock.close()
            self._sock = self._flow.sock = sock
            self._family = family
        self._fresh = False

    def _connected(self) -> None:
        self._talking = True
        self._upstream.silent_until = 0.0
        self._arm(self._until)

    def _unreachable(self) -> None:
        """No address of the proxy could be connected to."""
        self._upstream.failed += 1
        self._upstream.last_error = self._error
        self._proxy.upstreams.on_unreachable(self._upstream)
        if not self._fail_open:
            self._end(0, self._error)
            return
        try:
            self._renew(socket.AF_INET)
        except OSError as error:
            self._proxy.connect_failed(self._flow, error.errno or errno.EIO)
            return
        self._quit()
        endpoint = self._outward.endpoint
        self._proxy.dial(self._flow, (endpoint.text, endpoint.port), self._flow.quoted)

    def _failed(self, error: Exception) -> None:
        """The conversation failed."""
        words = error.strerror or str(error) if isinstance(error, OSError) else str(error)
        if isinstance(error, Refused):
            self._upstream.refused += 1
        else:
            self._upstream.failed += 1
        self._end(error.number if isinstance(error, Refused) else 0, words)

    def _end(self, number: int, words: str) -> None:
        self._upstream.last_error = words
        self._proxy.connect_failed(self._flow, number, f"way out {self._upstream.proxy}: {words}")

    def _begun(self) -> None:
        self._upstream.carried += 1
        self._upstream.last_error = ""
        self._quit()
        super()._begun()

    def _arm(self, when: float) -> None:
        self._proxy.timers.arm(min(when, self._until), self)

    def _quit(self) -> None:
        """The flow goes on without us."""
        self._flow.on_close = None
        self._proxy.timers.forget(self)

    def _over(self, reason: str) -> None:
        """The flow has ended."""
        self._proxy.timers.forget(self)
