"""Relays queries to the host's resolvers and brings their answers back, as they are.

Theory of operation. `ask` takes one query; an object for it stays in `_asked` until its answer, a failure, or the end of its
time. The first server is asked at once. Each time it has kept quiet for `server_s`, the next is asked as well, round and round;
sockets of earlier tries stay open, so a slow answer is as good as a quick one. A server that fails at once (port closed, no
route) or says SERVFAIL or REFUSED is struck from this query's list and the next asked without waiting; when all have, the last
such answer is passed on, because it says more than ours. When `TOTAL_S` is over, or nobody is left to ask, the answer is
SERVFAIL: a guest is never left in the dark, and within the 5 s its own resolver waits (threats N2, F12).

Three unanswered tries in a row make a server *silent*: it is asked last for `SILENT_S`, so that a dead server costs a few
queries a second and a half and not each of them. One slow name does not do that, since other answers of the server reset it.

One loop timer serves all queries: it is set to the earliest deadline, and when it fires the at most `MAX_IN_FLIGHT` queries
are looked through. HOT PATH: `ask` and `_readable`, once per query: one socket, one reader, no task.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, TypeAlias

from dns import codec
from dns.system import Resolvers, Upstream
from dns.upstream import RandomId, accept, ask_tcp, better_asked_elsewhere, open_udp
from netstack.api import Clock, Reply
from netstack.errors import HostError

MAX_IN_FLIGHT: Final = 512  # threats G23, as VPNKit per server
TOTAL_S: Final = 4.8  # SERVFAIL must be back before the asker's own 5 s (resolv.conf(5)) are over
SILENT_AFTER: Final = 3
SILENT_S: Final = 15.0
MAX_TRIES: Final = 16
"""Sockets one query may use, whatever `attempts` and the number of servers are."""
DATAGRAM: Final = 65535


def random_id() -> bytes:
    """Two octets of the system's random source."""
    return os.urandom(2)


_Try: TypeAlias = tuple[socket.socket, bytes, Upstream]


class _Asked:
    """One query over UDP on its way."""

    __slots__ = (
        "end",
        "failure",
        "give_up_at",
        "next_at",
        "order",
        "query",
        "reply",
        "resolvers",
        "struck",
        "tries",
        "waited",
    )

    def __init__(self, query: bytes, end: int, reply: Reply, resolvers: Resolvers, give_up_at: float) -> None:
        self.query = query
        self.end = end
        self.reply = reply
        self.resolvers = resolvers
        self.order: Iterator[Upstream] = iter(())
        self.struck: set[Upstream] = set()
        self.failure: bytes | None = None
        self.give_up_at = give_up_at
        self.next_at = 0.0
        self.tries: dict[int, _Try] = {}
        self.waited: _Try | None = None


class Forwarder:
    """`resolvers()` says whom to ask at this moment; it is called for each query and must be cheap.

    Used from one event loop only. `counters` is shared with the caller.
    """

    def __init__(
        self,
        resolvers: Callable[[], Resolvers],
        counters: Counter[str],
        *,
        clock: Clock = time.monotonic,
        new_id: RandomId = random_id,
        max_in_flight: int = MAX_IN_FLIGHT,
        total_s: float = TOTAL_S,
    ) -> None:
        self._resolvers = resolvers
        self._counters = counters
        self._clock = clock
        self._new_id = new_id
        self._max_in_flight = max_in_flight
        self._total_s = total_s
        self._asked: set[_Asked] = set()
        self._streams = 0
        self._unanswered: Counter[Upstream] = Counter()
        self._silent: dict[Upstream, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._buffer = memoryview(bytearray(DATAGRAM))
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def in_flight(self) -> int:
        """Queries on their way, UDP and TCP."""
        return len(self._asked) + self._streams

    def forget_silence(self) -> None:
        """The network changed: what servers did before says nothing."""
        self._silent.clear()
        self._unanswered.clear()

    def close(self) -> None:
        """Drop all queries over UDP without an answer."""
        for asked in tuple(self._asked):
            self._drop(asked)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # Choosing

    def _order(self, resolvers: Resolvers) -> Iterator[Upstream]:
        """Servers in the order of asking, rounds included; silent ones at the end of the round."""
        servers = resolvers.servers
        if self._silent:
            now = self._clock()
            servers = tuple(sorted(servers, key=lambda server: self._silent.get(server, now) > now))
        rounds = resolvers.attempts or MAX_TRIES
        return (server for _ in range(rounds) for server in servers)

    def _answered(self, server: Upstream) -> None:
        if self._unanswered:
            self._unanswered.pop(server, None)
            self._silent.pop(server, None)

    def _kept_quiet(self, server: Upstream) -> None:
        self._counters["upstream_timeout"] += 1
        self._unanswered[server] += 1
        if self._unanswered[server] >= SILENT_AFTER:
            self._silent[server] = self._clock() + SILENT_S

    def _refusal(self, query: bytes, end: int, resolvers: Resolvers) -> bytes | None:
        """The SERVFAIL for a query that nobody can be asked."""
        if not resolvers.servers:
            self._counters["no_resolver"] += 1
        elif self.in_flight >= self._max_in_flight:
            self._counters["over_limit"] += 1
        else:
            self._counters["forwarded"] += 1
            return None
        return codec.failure(query, codec.SERVFAIL, end)

    # UDP

    def ask(self, query: bytes, end: int, reply: Reply) -> None:
        """Relay `query`, whose question ends at `end`, and call `reply` once with an answer of any size; SERVFAIL at worst."""
        resolvers = self._resolvers()
        refusal = self._refusal(query, end, resolvers)
        if refusal is not None:
            reply(refusal)
            return
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        now = self._clock()
        total_s = self._total_s
        if resolvers.attempts:
            total_s = min(total_s, resolvers.attempts * len(resolvers.servers) * resolvers.server_s)
        asked = _Asked(query, end, reply, resolvers, now + total_s)
        asked.order = self._order(resolvers)
        self._asked.add(asked)
        self._try_next(asked, now)

    def _try_next(self, asked: _Asked, now: float) -> None:
        """Ask the next server, or give the query up when nobody is left and no answer is awaited."""
        resolvers = self._resolvers()
        if resolvers is not asked.resolvers and resolvers.servers:  # a VPN came or went while this query waited
            asked.resolvers = resolvers
            asked.order = self._order(resolvers)
            asked.struck.clear()
        if len(asked.tries) < MAX_TRIES:
            for server in asked.order:
                if server not in asked.struck:
                    if self._send(asked, server):
                        asked.next_at = min(now + asked.resolvers.server_s, asked.give_up_at)
                        self._arm(asked.next_at)
                        return
                    asked.struck.add(server)
                elif len(asked.struck) >= len(asked.resolvers.servers):
                    break
        if asked.tries:
            asked.next_at = asked.give_up_at
            self._arm(asked.next_at)
        else:
            self._give_up(asked)

    def _send(self, asked: _Asked, server: Upstream) -> bool:
        assert self._loop is not None
        try:
            sock = open_udp(server)
        except OSError:  # no route, or no descriptor left
            self._counters["upstream_error"] += 1
            return False
        query_id = self._new_id()
        try:
            sock.send(query_id + asked.query[2:])
        except BlockingIOError:
            pass  # as good as lost on the way
        except OSError:
            sock.close()
            self._counters["upstream_error"] += 1
            return False
        fd = sock.fileno()
        asked.tries[fd] = sock, query_id, server
        self._loop.add_reader(fd, self._readable, asked, fd)
        return True

    def _readable(self, asked: _Asked, fd: int) -> None:
        found = asked.tries.get(fd)
        if found is None:
            return
        sock, query_id, server = found
        try:
            octets = sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # ICMP said that nobody listens there, or that it cannot be reached
            self._counters["upstream_error"] += 1
            self._strike(asked, fd, server)
            return
        answer = accept(asked.query, asked.end, query_id, bytes(self._buffer[:octets]))
        if answer is None:
            self._counters["upstream_mismatch"] += 1
            return
        self._answered(server)
        if better_asked_elsewhere(answer):
            asked.failure = answer
            self._strike(asked, fd, server)
            return
        self._drop(asked)
        asked.reply(answer)

    def _strike(self, asked: _Asked, fd: int, server: Upstream) -> None:
        self._close_try(asked, fd)
        asked.struck.add(server)
        self._try_next(asked, self._clock())

    def _close_try(self, asked: _Asked, fd: int) -> None:
        assert self._loop is not None
        sock, _, _ = asked.tries.pop(fd)
        self._loop.remove_reader(fd)
        sock.close()

    def _drop(self, asked: _Asked) -> None:
        for fd in tuple(asked.tries):
            self._close_try(asked, fd)
        self._asked.discard(asked)

    def _give_up(self, asked: _Asked) -> None:
        self._drop(asked)
        self._counters["servfail"] += 1
        asked.reply(asked.failure or codec.failure(asked.query, codec.SERVFAIL, asked.end))

    # The timer

    def _arm(self, at: float) -> None:
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        assert self._loop is not None
        self._timer_at = at
        self._timer = self._loop.call_later(max(0.0, at - self._clock()), self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = max(self._timer_at, self._clock())  # a loop timer may fire a hair early
        for asked in tuple(self._asked):
            if asked.next_at > now:
                continue
            if asked.tries and asked.waited is not (newest := next(reversed(asked.tries.values()))):
                asked.waited = newest
                self._kept_quiet(newest[2])
            if asked.give_up_at <= now:
                self._give_up(asked)
            else:
                self._try_next(asked, now)
        if self._asked:
            self._arm(min(asked.next_at for asked in self._asked))

    # TCP

    async def ask_stream(self, query: bytes, end: int) -> bytes:
        """The answer to a query that came over TCP, got over TCP; SERVFAIL at worst. Never raises."""
        resolvers = self._resolvers()
        refusal = self._refusal(query, end, resolvers)
        if refusal is not None:
            return refusal
        self._streams += 1
        failure: bytes | None = None
        servers = tuple(self._order(Resolvers(servers=resolvers.servers, attempts=1)))
        try:
            async with asyncio.timeout(self._total_s):
                for server in servers:
                    try:  # the last one may take all the time that is left
                        async with asyncio.timeout(None if server is servers[-1] else resolvers.server_s):
                            answer = await ask_tcp(server, query, end, self._new_id)
                    except (HostError, TimeoutError) as error:
                        quiet = isinstance(error, TimeoutError)
                        self._counters["upstream_timeout" if quiet else "upstream_error"] += 1
                        continue
                    if not better_asked_elsewhere(answer):
                        return answer
                    failure = answer
        except TimeoutError:
            pass
        finally:
            self._streams -= 1
        self._counters["servfail"] += 1
        return failure or codec.failure(query, codec.SERVFAIL, end)
