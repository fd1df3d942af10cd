"""Relays queries to the host's resolvers and brings their answers back, as they are.

Theory of operation. `ask` takes one query. What `dns.cache` has is answered at once; a question that is on its way already
waits for that answer (RFC 5452 5: many equal questions at once are what a forger wants). Else `dns.rules` says which groups of
servers may be asked, and an `Asked` stays in `_asked` until its answer, a failure, or the end of its time:

    ask -> group 0, all servers together -> records ----------------------------------------> answered
                |                            a denial: held `HOLD_S` for others of the group -> answered, with the best
                |-- all failed (closed port, SERVFAIL, REFUSED) -> group 1 at once -> ...    -> the last failure, else SERVFAIL
                `-- quiet for `RETRY_S` -> asked again, on a fresh port under a fresh id, and group 1 as well -> ...

Sockets of earlier tries stay open, so a slow answer is as good as a quick one. A server is given up for this query `timeout_s`
after it was first asked, the query itself after `TOTAL_S`: a guest is never left in the dark, and within the 5 s its own resolver
waits (threats N2, F12). NXDOMAIN and an empty answer hold for the group: the next group is for failures, not for other opinions.

`offline_after` unanswered tries in a row make a server *offline*: it is not waited for. Once in `PROBE_S` a copy of a query it
would have been asked is sent to it for nobody, and any answer brings it back. When all servers of a route are offline they
are asked as usual.

When `resolvers()` gives another object the routes are made anew, and if it is not equal to the last the cache is emptied and
queries on their way are asked again with their next try, under the new routes. One that was under way to the servers of a zone
or rule that is gone fails instead: its name is not for the others.

One loop timer serves all queries: it is set to the earliest deadline, and when it fires the at most `MAX_IN_FLIGHT` queries
are looked through. HOT PATH: `ask` and `_heard`, once per query: one socket, one reader, no task. TCP, and servers with an
`Asker` of their own, cost a task each.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from typing import Any, Final

from dns import cache, codec
from dns.cache import Cache
from dns.inflight import CACHE, NOBODY, Answered, Asked, ServerState
from dns.known import PROBE_S, KnownServers
from dns.rules import Route, Rules
from dns.servers import AskerFor, Source
from dns.tries import Tries
from dns.upstream import RandomId, random_ids, worth
from netstack.api import Clock
from netstack.errors import HostError

MAX_IN_FLIGHT: Final = 512  # threats G23, as VPNKit per server
TOTAL_S: Final = 4.8  # SERVFAIL must be back before the asker's own 5 s (resolv.conf(5)) are over
RETRY_S: Final = 1.0  # spec vpnkit 4.4; F12 wants the next server's answer within 2 s
HOLD_S: Final = 1.0
"""How long "no such name" waits for a better answer of another server of the group."""


class Forwarder:
    """`resolvers()` says whom to ask at this moment; it is called for each query and must be cheap.

    `rules` come before them; `asker_for` knows servers that are not asked over plain UDP and TCP. Used from one event loop only.
    `counters` is shared with the caller.
    """

    def __init__(
        self,
        resolvers: Source,
        counters: Counter[str],
        *,
        rules: Rules = Rules(),  # noqa: B008  # it is a value
        asker_for: AskerFor = lambda server: None,
        clock: Clock = time.monotonic,
        new_id: RandomId | None = None,
        max_in_flight: int = MAX_IN_FLIGHT,
        total_s: float = TOTAL_S,
        retry_s: float = RETRY_S,
    ) -> None:
        self._known = KnownServers(resolvers, rules, asker_for, self._start_anew)
        self._counters = counters
        self._clock = clock
        self._new_id = new_id or random_ids()
        self._max_in_flight = max_in_flight
        self._total_s = total_s
        self._retry_s = retry_s
        self.cache = Cache()
        self._asked: set[Asked] = set()
        self._flying: dict[bytes, Asked] = {}
        self._waiters = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tries: Tries | None = None

    @property
    def in_flight(self) -> int:
        """Askers that wait for an answer, UDP and TCP."""
        return self._waiters

    def upstreams(self) -> list[dict[str, Any]]:
        """Counters of each server that may be asked now."""
        return self._known.documents()

    def network_changed(self) -> None:
        """What servers did before says nothing, and answers may be others; what is on its way is asked again."""
        self._known.forgive()
        self._start_anew()

    def _start_anew(self) -> None:
        self.cache.flush()
        self._flying.clear()
        now = self._clock()
        for asked in self._asked:
            asked.next_at, asked.moved = now, True
        if self._asked:
            self._arm(now)

    def close(self) -> None:
        """Drop all queries without an answer (an empty one, where a guest's connection waits), and the connections to servers."""
        for asked in tuple(self._asked):
            self._drop(asked)
            if asked.stream:
                for _, _, answered in asked.waiting:
                    answered(b"", NOBODY)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tries is not None:
            self._tries.close()
            self._tries = None
        self._known.close()

    def route(self, query: bytes, end: int) -> Route[ServerState]:
        """Where the name of a query leads now."""
        return self._known.routes().find(query, end)

    # Asking

    def ask(
        self, query: bytes, end: int, answered: Answered, *, stream: bool = False, now: float | None = None
    ) -> None:
        """Relay `query`, whose question ends at `end`, and call `answered` once with an answer of any size; SERVFAIL at worst.

        With `stream` it is asked over TCP, for a guest that came over TCP. `now` is of this moment, if the caller knows it.
        """
        routes = self._known.routes()
        if now is None:
            now = self._clock()
        key = cache.key(query, end)
        if key is not None:
            found = self.cache.find(key, query, end, now)
            if found is not None:
                self._counters["cached"] += 1
                answered(found, CACHE)
                return
        route = routes.find(query, end)
        if route.refused:
            self._counters["refused"] += 1
            answered(codec.failure(query, codec.REFUSED, end), route.why)
            return
        if not route.groups or self._waiters >= self._max_in_flight:
            self._counters["over_limit" if route.groups else "no_resolver"] += 1
            answered(codec.failure(query, codec.SERVFAIL, end), NOBODY)
            return
        self._waiters += 1
        if key is not None:
            if stream:
                key += b"\1"  # what UDP brings may be truncated
            flying = self._flying.get(key)
            if flying is not None:
                self._counters["coalesced"] += 1
                flying.waiting.append((query, end, answered))
                return
        self._counters["forwarded"] += 1
        asked = Asked(query, end, route, [(query, end, answered)], now + self._total_s, key, stream)
        self._begin(asked, now)

    async def ask_stream(self, query: bytes, end: int) -> tuple[bytes, str]:
        """The answer, got over TCP, and who gave it; empty when the forwarder is closed."""
        done: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()
        self.ask(query, end, lambda answer, by: None if done.done() else done.set_result((answer, by)), stream=True)
        return await done

    async def trace(self, query: bytes, end: int) -> tuple[bytes, str, list[tuple[ServerState, str, bytes, float]]]:
        """Ask without regard to the cache, and say what came of each try; see `Asked.trace`. Raises `HostError` when closed."""
        done: asyncio.Future[tuple[bytes, str]] = asyncio.get_running_loop().create_future()
        route = self.route(query, end)
        if not route.groups or self._waiters >= self._max_in_flight:
            return codec.failure(query, codec.REFUSED if route.refused else codec.SERVFAIL, end), NOBODY, []
        now = self._clock()

        def answered(answer: bytes, by: str) -> None:
            if not done.done():
                done.set_result((answer, by))

        asked = Asked(query, end, route, [(query, end, answered)], now + self._total_s, None, False)
        asked.trace = []
        self._waiters += 1
        self._begin(asked, now)
        try:
            async with asyncio.timeout(self._total_s + 1):
                return *await done, asked.trace
        except TimeoutError:
            raise HostError("dns: the server was closed meanwhile") from None

    def _begin(self, asked: Asked, now: float) -> None:
        if self._tries is None:
            self._loop = self._loop or asyncio.get_running_loop()
            self._tries = Tries(self._loop, self._counters, self._new_id, self._heard, self._failed)
        self._asked.add(asked)
        if asked.key is not None:
            self._flying[asked.key] = asked
        sole = asked.route.sole
        if sole is not None and not sole.offline:  # as `_next_group`, in short
            asked.group = 0
            timeout_s = sole.server.timeout_s
            asked.pending[sole] = now + timeout_s, 0
            self._send(asked, sole, now)
            if asked.pending:
                asked.next_at = now + (timeout_s if timeout_s < self._retry_s else self._retry_s)
                if self._timer is None or self._timer_at > asked.next_at:
                    self._arm(asked.next_at)
                return
        self._next_group(asked, now)

    def _next_group(self, asked: Asked, now: float) -> None:
        """Ask the next group that has a server online; give the query up when there is none and nobody is waited for."""
        groups = asked.route.groups
        offline = False
        while asked.group + 1 < len(groups):
            asked.group += 1
            for state in groups[asked.group]:
                if state.offline == asked.desperate:
                    asked.pending[state] = now + state.server.timeout_s, asked.group
                    self._send(asked, state, now)
                elif state.offline:
                    offline = True
                    self._probe(asked, state, now)
            if asked.pending:
                break
            if offline and asked.group + 1 == len(groups):
                asked.desperate, asked.group, offline = True, -1, False  # nobody else is left
        if asked.pending:
            self._wait(asked, now)
        else:
            self._give_up(asked)

    def _wait(self, asked: Asked, now: float) -> None:
        retry_at = now + self._retry_s
        for until, _ in asked.pending.values():
            retry_at = min(retry_at, until)
        asked.next_at = min(retry_at, asked.give_up_at)
        self._arm(asked.next_at)

    def _send(self, asked: Asked, state: ServerState, now: float) -> None:
        """Ask one server that is pending. When that is not possible it is pending no longer."""
        assert self._tries is not None
        if not self._tries.send(asked, state, now):
            self._unreachable(asked, state)

    def _probe(self, asked: Asked, state: ServerState, now: float) -> None:
        """Find out whether a server is back, with a query that it would have been asked."""
        if now < state.probe_at:
            return
        state.probe_at = now + PROBE_S
        route = Route("probe", ((state,),))
        probe = Asked(asked.query, asked.end, route, [], now + PROBE_S, None, asked.stream)
        probe.desperate = True
        self._begin(probe, now)

    def _unreachable(self, asked: Asked, state: ServerState) -> None:
        self._counters["upstream_error"] += 1
        state.errors += 1
        asked.pending.pop(state, None)
        self._note(asked, state, "unreachable", b"")

    # Hearing

    def _failed(self, asked: Asked, state: ServerState) -> None:
        if state in self._known:  # else it was closed, and the next tick asks others
            self._unreachable(asked, state)
            self._settle(asked)

    def _heard(self, asked: Asked, state: ServerState, answer: bytes, sent_at: float) -> None:
        now = self._clock()
        state.answered += 1
        state.took_s = now - sent_at
        if state.misses:
            state.misses, state.offline = 0, False
        found = worth(answer)
        if asked.trace is not None:
            asked.trace.append((state, "answered", answer, now - sent_at))
        if found == 4 or (found and asked.route.sole is not None):
            self._finish(asked, answer, state.name, now)
            return
        assert self._tries is not None
        self._tries.end(asked, state)
        _until, group = asked.pending.pop(state, (0.0, -1))
        if found > asked.worth or found == asked.worth == 0:
            asked.best, asked.best_by, asked.best_group, asked.worth = answer, state.name, group, found
        if found == 0:
            state.failures += 1
            self._settle(asked)
        elif any(other == group for _, other in asked.pending.values()):
            asked.hold_at = min(asked.hold_at, now + HOLD_S)
            self._arm(asked.hold_at)
        else:
            self._give_up(asked)

    def _settle(self, asked: Asked) -> None:
        """A server failed: what now?"""
        if asked.worth > 0 and not any(group == asked.best_group for _, group in asked.pending.values()):
            self._give_up(asked)
        elif not asked.pending:
            self._next_group(asked, self._clock())

    def _note(self, asked: Asked, state: ServerState, what: str, answer: bytes) -> None:
        if asked.trace is not None:
            asked.trace.append((state, what, answer, 0.0))

    # Ending

    def _drop(self, asked: Asked) -> bool:
        """Let it go; whether it was the one that other askers of its question would have waited for."""
        assert self._tries is not None
        self._tries.drop(asked)
        if asked not in self._asked:
            return False
        self._asked.remove(asked)
        self._waiters -= len(asked.waiting)
        if asked.key is None or self._flying.get(asked.key) is not asked:
            return False
        del self._flying[asked.key]
        return True

    def _finish(self, asked: Asked, answer: bytes, by: str, now: float) -> None:
        key = asked.key
        if self._drop(asked) and key is not None:  # else of routes that hold no longer
            self.cache.keep(key[:-1] if asked.stream else key, asked.end, answer, now, by)
        waiting = asked.waiting
        if len(waiting) == 1:
            waiting[0][2](answer, by)
            return
        for query, end, answered in waiting:
            answered(cache.patched(query, end, answer), by)

    def _give_up(self, asked: Asked) -> None:
        if asked.worth <= 0:
            self._counters["servfail"] += len(asked.waiting)
        failure = asked.best or codec.failure(asked.query, codec.SERVFAIL, asked.end)
        self._finish(asked, failure, asked.best_by, self._clock())

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
            if asked in self._asked and min(asked.next_at, asked.hold_at) <= now:
                self._late(asked, now)
        if self._asked:
            self._arm(min(min(asked.next_at, asked.hold_at) for asked in self._asked))

    def _late(self, asked: Asked, now: float) -> None:
        """An answer has not come in time, or the network is another."""
        assert self._tries is not None
        if not asked.moved:
            self._counters["upstream_timeout"] += len(asked.pending)
            self._known.missed(asked.pending, now)
        asked.moved = False
        if asked.give_up_at <= now or asked.hold_at <= now:
            self._give_up(asked)
            return
        if not self._still_right(asked):
            return
        for state, (until, _) in tuple(asked.pending.items()):
            if until <= now:
                del asked.pending[state]
                self._tries.end(asked, state)
                self._note(asked, state, "timeout", b"")
            else:
                self._send(asked, state, now)
        if asked.worth <= 0 and (not asked.pending or asked.group + 1 < len(asked.route.groups)):
            self._next_group(asked, now)
        elif asked.pending:
            self._wait(asked, now)
        else:
            self._give_up(asked)

    def _still_right(self, asked: Asked) -> bool:
        """Follow the routes of now, if they are others since the query was asked; whether it can go on as it was."""
        if not asked.waiting:  # a probe
            return True
        route = self._known.routes().find(asked.query, asked.end)
        if route.groups == asked.route.groups:
            asked.route = route
            return True
        if not route.groups:
            if not asked.route.private and not route.refused:
                return True  # the file is being written: the old ones may still answer
            self._give_up(asked)
            return False
        if asked.route.private and not route.private:
            self._give_up(asked)
            return False
        assert self._tries is not None
        self._tries.drop(asked)
        asked.pending.clear()
        asked.route, asked.group, asked.desperate = route, -1, False
        asked.best, asked.best_by, asked.worth = None, NOBODY, -1
        if asked.key is not None:
            self._flying.setdefault(asked.key, asked)
        self._next_group(asked, self._clock())
        return False
