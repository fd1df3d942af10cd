"""The DNS server of a virtual network, at the gateway's port 53 over UDP and TCP.

A query is answered from the sources in order (`dns.records`: built-in names, leases; `dns.zones`; the hosts file) and else
relayed (`dns.forwarder`: the cache; rules per domain; the host's resolvers). AAAA queries can be answered with no records instead,
while the host has no way to IPv6 (`aaaa`). What cannot be a query is passed over in silence, because an answer to an answer
makes two servers talk forever; a query that is broken gets FORMERR, an opcode we do not know NOTIMP, a zone transfer REFUSED.
Nothing a guest sends raises, and nothing waits for a thread.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

from dns import codec, explain, hosts, records, system
from dns.forwarder import MAX_IN_FLIGHT, Forwarder
from dns.learn import Learn, told
from dns.log import QueryLog
from dns.records import LeaseAddress, LeaseName
from dns.rules import Rules
from dns.servers import AskerFor, Resolvers, Source
from dns.zones import NO_SUCH_NAME, Zones
from netstack.api import Clock, Endpoint, Reply
from netstack.errors import Malformed

IDLE_S: Final = 30.0
"""A TCP connection is closed when a whole query has not come for so long (RFC 7766 6.2.3 leaves the length to us)."""
MAX_PIPELINED: Final = 64
"""Queries of one TCP connection on their way; then it is not read on."""
MAX_STREAMS: Final = 256
"""TCP connections at once; another is closed on arrival."""

_length = struct.Struct("!H")

_COUNTERS: Final = (
    "queries_udp",
    "queries_tcp",
    "ignored",
    "malformed",
    "not_implemented",
    "refused",
    "local",
    "aaaa_filtered",
    "cached",
    "coalesced",
    "forwarded",
    "no_resolver",
    "over_limit",
    "socket_limit",
    "truncated",
    "servfail",
    "upstream_timeout",
    "upstream_error",
    "upstream_mismatch",
    "streams",
    "streams_refused",
)


class Server:
    """One network's DNS server; its two handlers are `netstack.api.DatagramHandler` and `StreamHandler`.

    `names` maps names to addresses (4 or 16 octets). `domain` with `lease_address` and `lease_name` makes host names of DHCP
    clients known as `NAME.domain`. `zones` may change at any time. `hosts_path` and `resolv_conf` are files of the host that
    are followed, `None` for none. `upstreams` (`192.0.2.53`, `192.0.2.53#5353`, `[2001:db8::53]:53`) are asked instead of
    those of `resolv_conf`; a `source` says itself whom to ask, and both are passed over. `rules` are for names under their domains
    and come before all of these; `asker_for` knows servers that are not asked over plain UDP and TCP.

    `aaaa`: `on` relays queries for IPv6 addresses, `off` answers that there are none, `auto` does so while `ipv6_route()` is
    false, except for names of rules and zones: a VPN may have IPv6 of its own. It is asked for each such query and must be cheap.

    `learn` is told of every address that a name is said to have over UDP.

    Raises `ConfigError` for a name or a server that cannot be. Without any resolver the names above are still answered, all
    others SERVFAIL. Every method belongs to the event loop of the first query.
    """

    def __init__(
        self,
        *,
        names: Mapping[str, Sequence[bytes]] | None = None,
        domain: str | None = None,
        lease_address: LeaseAddress | None = None,
        lease_name: LeaseName | None = None,
        zones: Zones | None = None,
        hosts_path: str | None = "/etc/hosts",
        resolv_conf: str | None = "/etc/resolv.conf",
        upstreams: Sequence[str] = (),
        source: Source | None = None,
        rules: Rules = Rules(),  # noqa: B008  # it is a value
        asker_for: AskerFor = lambda server: None,
        aaaa: Literal["auto", "on", "off"] = "on",
        ipv6_route: Callable[[], bool] = lambda: True,
        learn: Learn | None = None,
        clock: Clock = time.monotonic,
        max_in_flight: int = MAX_IN_FLIGHT,
        idle_s: float = IDLE_S,
    ) -> None:
        self._hosts = hosts.watch(hosts_path, clock)
        self._system = system.watch(None if upstreams or source is not None else resolv_conf, clock)
        configured = Resolvers.of(upstreams)
        self._resolvers = source or ((lambda: configured) if upstreams else self._system.current)
        self._sources: tuple[tuple[str, records.Source], ...] = (
            ("names", records.built_in(names or {})),
            ("leases", records.leases(domain, lease_address, lease_name)),
            ("zones", (zones if zones is not None else Zones()).find),
            ("hosts", records.hosts_file(self._hosts)),
        )
        self._aaaa = aaaa
        self._ipv6_route = ipv6_route
        self._learn = learn
        self._clock = clock
        self._log = QueryLog()
        self._counters: Counter[str] = Counter()
        self._forwarder = Forwarder(
            self._resolvers,
            self._counters,
            rules=rules,
            asker_for=asker_for,
            clock=clock,
            max_in_flight=max_in_flight,
        )
        self._idle_s = idle_s
        self._streams: set[asyncio.StreamWriter] = set()
        self._closed = False

    @property
    def counters(self) -> dict[str, int]:
        """What was asked and what became of it, by name; `in_flight` relayed queries and `open_streams` are of this moment."""
        cache = self._forwarder.cache
        now = {
            "in_flight": self._forwarder.in_flight,
            "open_streams": len(self._streams),
            "cache_entries": len(cache),
            "cache_octets": cache.octets,
            "cache_evicted": cache.evicted,
            "cache_flushes": cache.flushes,
        }
        return {name: self._counters[name] for name in _COUNTERS} | now

    @property
    def resolvers(self) -> Resolvers:
        """Whom a query of this moment would be relayed to, and the host's search domains."""
        return self._resolvers()

    def upstreams(self) -> list[dict[str, Any]]:
        """Counters of each server that may be asked now, as JSON's values."""
        return self._forwarder.upstreams()

    def log(self) -> list[dict[str, Any]]:
        """The last queries (`dns.log`), the newest first, as JSON's values."""
        return self._log.documents(self._clock())

    async def explain(self, name: str, qtype: str = "A") -> dict[str, Any]:
        """What a guest gets for `name` now, and from where; see `dns.explain`. Raises `ConfigError` for no name or type."""
        return await explain.explain(name, qtype, self._own_answer, self._forwarder, self._clock())

    def network_changed(self) -> None:
        """Look at the host's files again now, forget all answers, trust each resolver anew, and ask again what is on its way."""
        self._hosts.expire()
        self._system.expire()
        self._forwarder.network_changed()

    def close(self) -> None:
        """Drop what is on its way, close TCP connections, and answer nothing more."""
        self._closed = True
        self._forwarder.close()
        for writer in tuple(self._streams):
            writer.close()

    def _own_answer(self, query: bytes) -> tuple[bytes | None, int, str]:
        """An answer that needs nobody else (`b""` is silence) or `None`, where the question ends, and who says so."""
        if len(query) < codec.HEADER or codec.is_response(query):
            self._counters["ignored"] += 1
            return b"", 0, ""
        if codec.opcode(query) != codec.QUERY:
            self._counters["not_implemented"] += 1
            return codec.failure(query, codec.NOTIMP), 0, "server"
        try:
            end = codec.question_end(query)
        except Malformed:
            self._counters["malformed"] += 1
            return codec.failure(query, codec.FORMERR), 0, "server"
        qtype, qclass = codec.question(query, end)
        if qclass == codec.IN:
            key = codec.key(query, end)
            for by, source in self._sources:
                found = source(key, qtype)
                if found is not None:
                    self._counters["local"] += 1
                    code = codec.NXDOMAIN if found is NO_SUCH_NAME else codec.NOERROR
                    return codec.answer(query, end, found, code=code), end, by
            if qtype == codec.AAAA and self._no_aaaa(query, end):
                self._counters["aaaa_filtered"] += 1
                return codec.answer(query, end, (), authoritative=False), end, "filter"
        if qtype in (codec.AXFR, codec.IXFR):  # many messages long, and no business of a stub's
            self._counters["refused"] += 1
            return codec.failure(query, codec.REFUSED, end), end, "server"
        return None, end, ""

    def _no_aaaa(self, query: bytes, end: int) -> bool:
        if self._aaaa == "auto":
            return not (self._ipv6_route() or self._forwarder.route(query, end).private)
        return self._aaaa == "off"

    def datagram(self, payload: bytes, source: Endpoint, reply: Reply) -> None:
        """One UDP datagram; `reply` is called at most once, now or later."""
        if self._closed:
            return
        self._counters["queries_udp"] += 1
        clock = self._clock
        began = clock()
        own, end, own_by = self._own_answer(payload)

        def answered(answer: bytes, by: str) -> None:
            # HOT PATH: EDNS is looked for only where the answer is longer than anybody takes.
            if len(answer) > codec.MIN_UDP:
                limit = codec.udp_limit(payload, end)
                if len(answer) > limit:
                    self._counters["truncated"] += 1
                    answer = codec.fit(answer, limit)
            reply(answer)
            now = clock()
            question = payload[codec.HEADER : end]
            counts = answer[3] & 0x0F, answer[6] << 8 | answer[7], len(answer)
            self._log.add((now, now - began, source, question, False, by, *counts))
            if self._learn is not None:
                for name, address, ttl in told(payload, end, answer):
                    self._learn(name, address, ttl)

        if own is None:
            self._forwarder.ask(payload, end, answered, now=began)
        elif own:
            answered(own, own_by)

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: Endpoint) -> None:
        """One TCP connection: messages behind two octets of length (RFC 1035 4.2.2), pipelined, answered as answers come.

        Ends, and closes `writer`, when the guest closes or keeps quiet for too long; its last answers still go out.
        """
        if self._closed or len(self._streams) >= MAX_STREAMS:
            self._counters["streams_refused"] += 1
            writer.close()
            return
        self._counters["streams"] += 1
        self._streams.add(writer)
        room = asyncio.Semaphore(MAX_PIPELINED)
        try:
            async with asyncio.TaskGroup() as answers:
                while True:
                    await room.acquire()
                    if writer.is_closing():
                        break
                    try:
                        async with asyncio.timeout(self._idle_s):
                            (octets,) = _length.unpack(await reader.readexactly(2))
                            query = await reader.readexactly(octets)
                    except (EOFError, OSError, TimeoutError):
                        break
                    answers.create_task(self._answer_stream(query, source, writer, room))
        finally:
            self._streams.discard(writer)
            writer.close()

    async def _answer_stream(
        self, query: bytes, source: Endpoint, writer: asyncio.StreamWriter, room: asyncio.Semaphore
    ) -> None:
        self._counters["queries_tcp"] += 1
        began = self._clock()
        try:
            answer, end, by = self._own_answer(query)
            if answer is None:
                answer, by = await self._forwarder.ask_stream(query, end)
            if answer:
                now = self._clock()
                counts = answer[3] & 0x0F, answer[6] << 8 | answer[7], len(answer)
                self._log.add((now, now - began, source, query[codec.HEADER : end], True, by, *counts))
            if answer and not writer.is_closing():
                writer.write(_length.pack(len(answer)) + answer)
                async with asyncio.timeout(self._idle_s):
                    await writer.drain()  # a guest that does not read its answers is not read from either
        except OSError:
            writer.transport.abort()  # it went away, or (TimeoutError is an OSError) takes nothing
        finally:
            room.release()
