"""The way each server is asked, where that is not plain UDP and TCP (`dns.servers.AskerFor`)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from dns import codec
from dns.forwarder import Forwarder
from dns.host_mode import HostMode
from dns.servers import HOST, Asker, AskerFor, Server, Source
from dns.stream_asker import Connect, StreamAsker

if TYPE_CHECKING:
    from dns.tls import Certificates


class Relay:
    """A `dns.servers.Asker` of whoever `source` says at the moment; over TCP what is too long for UDP. Nothing is kept."""

    def __init__(self, source: Source, counters: Counter[str] | None = None) -> None:
        self._forwarder = Forwarder(source, Counter() if counters is None else counters)

    async def ask(self, query: bytes, end: int) -> bytes:
        answer, _, _ = await self._forwarder.trace(query, end)
        if answer and answer[2] & codec.TC:
            answer, _ = await self._forwarder.ask_stream(query, end)
        return answer

    def renew(self) -> None:
        self._forwarder.network_changed()

    def close(self) -> None:
        self._forwarder.close()


def askers(
    others: Source | None = None,
    *,
    cafile: str | None = None,
    counters: Counter[str] | None = None,
    way_to: Callable[[Server], Connect | None] = lambda server: None,
) -> AskerFor:
    """Servers with a name for TLS are asked over it, and `servers.HOST` is getaddrinfo(3). Those that `way_to` knows another way
    to (a proxy) are asked over TCP by that way.

    `others` says whom to ask what getaddrinfo cannot be asked (`HostResolvers.resolv_conf`). `cafile` has the authorities to trust
    instead of the host's. `counters` takes those of `HostMode`.
    """
    made: list[Certificates] = []

    def asker_for(server: Server) -> Asker | None:
        if server.upstream == HOST:
            return HostMode(counters, other=None if others is None else Relay(others))
        connect = way_to(server)
        if not server.tls:
            if connect is None:
                return None
            return StreamAsker(server.upstream, lambda: os.urandom(2), connect=connect)
        from dns.tls import Certificates, TlsAsker  # ssl is large, and few ask over TLS

        if not made:
            made.append(Certificates(cafile))
        return TlsAsker(server, made[0], connect=connect)

    return asker_for
