"""The servers that may be asked at this moment: how they did so far, and which routes lead to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

from dns.inflight import ServerState
from dns.rules import Routes, Rules
from dns.servers import AskerFor, Resolvers, Server, Source

PROBE_S: Final = 1.0
"""How often an offline server is sent a query to see whether it is back."""


class KnownServers:
    """`resolvers()` says whom to ask; `changed()` is called when it is not the same any more.

    A server keeps its state for as long as it is among them, whatever becomes of the others.
    """

    def __init__(self, resolvers: Source, rules: Rules, asker_for: AskerFor, changed: Callable[[], None]) -> None:
        self._resolvers = resolvers
        self._rules = rules
        self._asker_for = asker_for
        self._changed = changed
        self._states: dict[Server, ServerState] = {}
        self._routes: Routes[ServerState] = Routes(Rules(), Resolvers(), {})
        self._seen: Resolvers | None = None

    def __contains__(self, state: ServerState) -> bool:
        return self._states.get(state.server) is state

    def routes(self) -> Routes[ServerState]:
        """Those of now. HOT PATH: as long as the same object is handed out, nothing is looked at."""
        resolvers = self._resolvers()
        if resolvers is self._seen:
            return self._routes
        changed = self._seen is None or resolvers != self._routes.resolvers
        self._seen = resolvers
        if changed:
            self._take(resolvers)
        return self._routes

    def _take(self, resolvers: Resolvers) -> None:
        of_rules = [server for rule in self._rules.rules for server in rule.servers]
        wanted = dict.fromkeys((*of_rules, *resolvers.servers))
        for server in [known for known in self._states if known not in wanted]:
            self._states.pop(server).close()
        for server in wanted:
            if server not in self._states:
                self._states[server] = ServerState(server, self._asker_for(server))
        self._routes = Routes(self._rules, resolvers, self._states)
        self._changed()

    def missed(self, states: Iterable[ServerState], now: float) -> None:
        """These have not answered a try in time."""
        after = self._routes.resolvers.offline_after
        for state in states:
            state.timeouts += 1
            state.misses += 1
            if state.misses >= after and not state.offline:
                state.offline = True
                state.probe_at = now + PROBE_S

    def forgive(self) -> None:
        """The network changed: what servers did before says nothing."""
        for state in self._states.values():
            state.offline, state.misses = False, 0
            for asker in (state.stream, state.asker):
                if asker is not None:
                    asker.renew()

    def documents(self) -> list[dict[str, Any]]:
        """Counters of each, as JSON's values."""
        self.routes()
        return [state.document() for state in self._states.values()]

    def close(self) -> None:
        """End the connections to them."""
        for state in self._states.values():
            state.close()
        self._states.clear()
        self._seen = None
