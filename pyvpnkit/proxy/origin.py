"""Connections of the proxy to the outside, by the egress policy's leave.

`connect_out(address, port)` asks the egress policy about the final numeric address, as for a connection of the guest's own, so
that neither CONNECT nor a name that leads to the host's loopback or a metadata service goes around it (threats G25, G26):

    Allow      a socket to it               Rewrite    the host alias or a port of the gateway: a socket to what is meant
    Tunnel     the program of `--forwards`  Outward    the proxy on the way out (`netstack.policy.ways_out`), fail closed
    Deny       `Refusal` 403

The upstream proxies of `http_proxy.json` are the operator's word: `trusted` connects to them wherever they are, on the host's
own loopback too; tunnels and ways out hold for them as for all others.

Names are looked up by the host's `getaddrinfo` (`pyvpnkit.proxy.names`). The network's own (gateway, host alias) are known
without it.

Bounds: `LOOKUP_S` for a name, `CONNECT_S` for a connection in all, `MAX_ADDRESSES` tried of one name.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeAlias

from netstack.api import Endpoint, Way
from netstack.errors import HostError
from netstack.host.ways_out import exchange
from netstack.policy.egress import ALLOW, LOOPBACK, Answer, Decision, Deny, Egress, Rewrite, Tunnel
from netstack.policy.ways_out import Outward
from netstack.settings import Network
from pyvpnkit.proxy.config import Upstream
from pyvpnkit.proxy.connect import Sockets, agree, connect, is_here, through_program
from pyvpnkit.proxy.errors import Refusal
from pyvpnkit.proxy.names import Names
from pyvpnkit.proxy.patterns import literal

log = logging.getLogger("pyvpnkit.proxy")

LOOKUP_S: Final = 20.0
JUDGE_S: Final = 2.0
"""For a name that only the proxy may know: in many such networks the host's resolver knows no names outside."""
UNKNOWN_S: Final = 60.0
MAX_UNKNOWN: Final = 1024
HERE_S: Final = 5.0
"""How long it is believed that a proxy is on this host, or is not."""
_FEW: Final = 8
CONNECT_S: Final = 60.0
MAX_ADDRESSES: Final = 8
_TCP: Final = 6

Resolve: TypeAlias = Callable[[str], Awaitable[Sequence[bytes]]]
"""The addresses of a name, 4 or 16 octets each, best first. Raises `OSError`."""


class Outside:
    """See the module. `own` are the names of the network itself with their addresses, lower case."""

    def __init__(self, network: Network, egress: Egress, sockets: Sockets, *, resolve: Resolve | None) -> None:
        self._egress = egress
        self._sockets = sockets
        self._alias = network.host_alias_bytes
        self._own_addresses = network.own_addresses
        self._here: dict[Upstream, tuple[float, bool]] = {}
        self._unknown: dict[str, float] = {}
        """Names that the host's resolver did not know, and until when that is believed."""
        self.own = {name.lower().rstrip("."): network.gateway_bytes for name in network.gateway_names}
        if self._alias is not None:
            self.own |= {name.lower().rstrip("."): self._alias for name in network.host_names}
        self._resolve = resolve if resolve is not None else Names().look_up

    # What a host is.

    def is_own(self, host: str) -> bool:
        """Whether the network itself has this host, so that no proxy outside could reach it."""
        address = literal(host)
        if address is not None:
            return address.packed in self._own_addresses
        return host.lower().rstrip(".") in self.own

    async def addresses(self, host: str) -> Sequence[bytes]:
        """Of a name, or the address that the host is. Raises `Refusal` 503."""
        address = literal(host)
        if address is not None:
            return (address.packed,)
        own = self.own.get(host.lower().rstrip("."))
        if own is not None:
            return (own,)
        try:
            async with asyncio.timeout(LOOKUP_S):
                found = await self._resolve(host)
        except (OSError, UnicodeError, TimeoutError):
            found = ()
        if not found:
            raise Refusal(503, f"Failed to lookup host: {host}")
        return found[:MAX_ADDRESSES]

    async def judge(self, host: str, port: int, upstream: Upstream) -> None:
        """Before `host` is named to a proxy: what guests may not reach they may not reach through it. Raises `Refusal` 403.

        An address is judged whatever its spelling. Names are the proxy's to look up, in the network it is in; where that is
        this host, they are looked up here too, for its loopback is ours. (Whose name server answers the two of us differently
        is seen by that proxy alone, which should itself refuse its own host to others.)
        """
        if literal(host) is not None:
            found: Sequence[bytes] = (literal(host).packed,)  # type: ignore[union-attr]
        elif host.lower().rstrip(".").rpartition(".")[2] == "localhost":
            found = (LOOPBACK,)
        elif await self._is_here(upstream):
            found = await self._known_here(host)
        else:
            return
        for address in found:
            decision = self._egress.decide(_TCP, address, port)
            if isinstance(decision, Deny):
                raise Refusal(403, f"{host}: {decision.reason}")

    async def _is_here(self, upstream: Upstream) -> bool:
        """Whether a proxy is on this host."""
        now = asyncio.get_running_loop().time()
        until, here = self._here.get(upstream, (0.0, False))
        if now >= until:
            try:
                here = any(is_here(self._meant(each)) for each in await self.addresses(self._local(upstream.host)))
            except Refusal:
                here = False
            if len(self._here) >= _FEW:
                self._here.clear()
            self._here[upstream] = now + HERE_S, here
        return here

    async def _known_here(self, host: str) -> Sequence[bytes]:
        """The addresses of a name, as far as the host's resolver soon knows any; else it is the proxy's alone."""
        now = asyncio.get_running_loop().time()
        if self._unknown.get(host, 0.0) > now:
            return ()
        try:
            async with asyncio.timeout(JUDGE_S):
                return await self.addresses(host)
        except (Refusal, TimeoutError):
            if len(self._unknown) >= MAX_UNKNOWN:
                self._unknown.clear()
            self._unknown[host] = now + UNKNOWN_S
            return ()

    @staticmethod
    def _local(host: str) -> str:
        """The host's own name for itself needs no lookup."""
        return "127.0.0.1" if host.lower().rstrip(".") == "localhost" else host

    def _meant(self, address: bytes) -> bytes:
        return LOOPBACK if address == self._alias else address

    # Connections.

    async def server(self, host: str, port: int) -> socket.socket:
        """A connection to a guest's server. Raises `Refusal`."""
        denied: Refusal | None = None
        failed: Refusal | None = None
        for address in await self.addresses(host):
            try:
                return await self.connect_out(address, port, host)
            except Refusal as error:
                if error.status == 403:
                    denied = denied or Refusal(403, f"{host}: {error}")
                else:
                    failed = failed or Refusal(error.status, f"{error}. Do you need an HTTP proxy?")
        problem = failed or denied
        assert problem is not None
        raise problem

    async def proxy(self, upstream: Upstream) -> socket.socket:
        """A connection to a proxy. Raises `Refusal` 503."""
        where = ""
        for address in await self.addresses(self._local(upstream.host)):
            try:
                return await self.connect_out(address, upstream.port, trusted=True)
            except Refusal as error:
                where = where or str(error).removeprefix("unable to connect to ")
        raise Refusal(503, f"unable to connect to HTTP proxy {where}")

    async def connect_out(self, address: bytes, port: int, host: str = "", *, trusted: bool = False) -> socket.socket:
        """A connected, non-blocking socket, by the egress policy's decision. `host` is the name it came from.

        Raises `Refusal`: 403 with the policy's reason, 503 where the host cannot connect.
        """
        decision = self._decide(address, port, "" if literal(host) is not None else host, trusted)
        if isinstance(decision, Deny):
            raise Refusal(403, decision.reason)
        endpoint = decision.endpoint if isinstance(decision, Rewrite) else Endpoint(address, port)
        try:
            async with asyncio.timeout(CONNECT_S):
                if isinstance(decision, Tunnel):
                    return await through_program(self._sockets, decision)
                if isinstance(decision, Outward):
                    return await self._outward(decision)
                return await connect(self._sockets, endpoint)
        except (OSError, TimeoutError, HostError) as error:
            log.debug("proxy: %s: %s", endpoint, error)
            raise Refusal(503, f"unable to connect to {endpoint}") from error

    def _decide(self, address: bytes, port: int, host: str, trusted: bool) -> Decision | Tunnel | Outward:
        egress = self._egress
        decision = egress.led(address, port)
        if isinstance(decision, Tunnel):
            return decision
        if isinstance(egress.decide(_TCP, address, port), Deny):
            if not trusted:
                return decision
            rule = egress.tunnels.find(Endpoint(address, port))
            return ALLOW if rule is None else Tunnel(rule.path, Endpoint(address, port))
        if not egress.ways_out:
            return decision
        # Once more, by the name that is known here.
        endpoint = decision.endpoint if isinstance(decision, Rewrite) else Endpoint(address, port)
        way = egress.ways_out.find(endpoint, host)
        if way is Way.REFUSE:
            return Deny("a way-out rule refuses it", Answer.REFUSED)
        if isinstance(way, Way):
            return decision if isinstance(decision, Rewrite) else ALLOW
        return way

    async def _outward(self, outward: Outward) -> socket.socket:
        """Through the proxy on the way out; past it only where it cannot be reached and the rules say so."""
        failed: Exception = HostError("its name is not known")
        try:
            places = await self.addresses(self._local(outward.proxy.host))
        except Refusal:
            places = ()
        for place in places:
            try:
                sock = await connect(self._sockets, Endpoint(self._meant(place), outward.proxy.port))
            except OSError as error:
                failed = error
                continue
            return await agree(sock, exchange(outward))
        if self._egress.ways_out.fail_open:
            return await connect(self._sockets, outward.endpoint)
        raise failed
