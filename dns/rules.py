"""Which servers are asked for a name: rules of the settings, then zones of the host's resolvers, then the others.

* A rule is for a domain and all names below it: servers, or `refuse`. The longest domain that fits decides, and before any zone.
* Then the servers that have a zone the name is in: those with the longest such zone, and no others, even when they fail. So
  names of a VPN are never told to servers of the world.
* Else the servers without zones. The others are not asked, so the servers of a VPN do not learn what else is looked up.

A domain is compared by labels and without regard to case: `corp.example` fits itself and `a.Corp.example`, not `xcorp.example`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from dns import codec
from dns.servers import Resolvers, Server, after_each_other
from netstack.errors import ConfigError, Malformed

REFUSE: Final = "refuse"
MAX_RULES: Final = 1024

Asked = TypeVar("Asked")


@dataclass(frozen=True, slots=True)
class Rule:
    """What holds for `domain` (wire form, lower case) and below; no servers: refused."""

    domain: bytes
    servers: tuple[Server, ...] = ()


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of the settings, in any order."""

    rules: tuple[Rule, ...] = ()

    @classmethod
    def parse(cls, wanted: Mapping[str, str | Sequence[str]]) -> Rules:
        """`{"corp.example": ["10.0.0.53"], "ads.example": "refuse"}`. Servers are asked in turn. Raises `ConfigError`."""
        if len(wanted) > MAX_RULES:
            raise ConfigError(f"dns.rules: more than {MAX_RULES} domains")
        found: dict[bytes, Rule] = {}
        for text, what in wanted.items():
            try:
                domain = codec.wire_name(text.removeprefix("*.").removeprefix("."))
            except Malformed as error:
                raise ConfigError(f"dns.rules: {text!r} is no domain ({error}); write it as in corp.example") from None
            if domain in found:
                raise ConfigError(f"dns.rules: {text!r} is there twice")
            found[domain] = Rule(domain, _servers(text, what))
        return cls(tuple(found.values()))


def _servers(domain: str, what: str | Sequence[str]) -> tuple[Server, ...]:
    if what == REFUSE:
        return ()
    texts = [what] if isinstance(what, str) else list(what)
    if not texts:
        raise ConfigError(f"dns.rules: {domain!r} has no server; name one, as in 10.0.0.53, or write {REFUSE}")
    try:
        return after_each_other(map(Server.parse, texts))
    except ConfigError as error:
        raise ConfigError(f"dns.rules: {domain!r}: {error}; or write {REFUSE}") from None


@dataclass(frozen=True, slots=True, eq=False)
class Route(Generic[Asked]):
    """Where a name leads. `groups` are asked one after the other, the servers of a group together; none: nobody is asked."""

    why: str
    """`rule corp.example`, `zone corp.example` or `resolvers`, for people."""
    groups: tuple[tuple[Asked, ...], ...] = ()
    refused: bool = False
    private: bool = False
    """Of a rule or a zone: not to be asked elsewhere."""
    sole: Asked | None = None
    """The server, where there is one only."""


class Routes(Generic[Asked]):
    """All routes at one moment; `state` is what the forwarder keeps of a server."""

    def __init__(self, rules: Rules, resolvers: Resolvers, state: Mapping[Server, Asked]) -> None:
        self.resolvers = resolvers
        self._rules: dict[bytes, Route[Asked]] = {}
        for rule in rules.rules:
            self._rules[rule.domain] = _route(f"rule {text_name(rule.domain)}", rule.servers, state, private=True)
        zoned: dict[bytes, list[Server]] = {}
        for server in resolvers.servers:
            for zone in dict.fromkeys(server.zones):
                zoned.setdefault(zone, []).append(server)
        self._zones = {
            zone: _route(f"zone {text_name(zone)}", servers, state, private=True) for zone, servers in zoned.items()
        }
        self._others = _route("resolvers", [server for server in resolvers.servers if not server.zones], state)
        self._simple = not (self._rules or self._zones)

    def find(self, query: bytes, end: int) -> Route[Asked]:
        """The route of the name in the question that ends at `end`. HOT PATH: without rules and zones nothing is looked at."""
        if self._simple:
            return self._others
        name = query[codec.HEADER : end - 4].lower()
        return _longest(self._rules, name) or _longest(self._zones, name) or self._others


def _longest(table: Mapping[bytes, Route[Asked]], name: bytes) -> Route[Asked] | None:
    if table:
        at = 0
        while True:
            found = table.get(name[at:])
            if found is not None:
                return found
            if not name[at]:
                break
            at += name[at] + 1
    return None


def _route(why: str, servers: Iterable[Server], state: Mapping[Server, Asked], private: bool = False) -> Route[Asked]:
    groups: dict[int, list[Asked]] = {}
    for server in dict.fromkeys(servers):
        groups.setdefault(server.order, []).append(state[server])
    ordered = tuple(tuple(groups[order]) for order in sorted(groups))
    sole = ordered[0][0] if len(ordered) == 1 == len(ordered[0]) else None
    return Route(why, ordered, refused=private and not ordered, private=private, sole=sole)


def text_name(wire: bytes) -> str:
    """A name in wire form as people write it; octets that are no visible ASCII as `\\ddd` (RFC 1035 5.1)."""
    labels, at = [], 0
    while at < len(wire) and wire[at]:
        label = wire[at + 1 : at + 1 + wire[at]]
        labels.append("".join(chr(one) if 0x21 <= one < 0x7F and one not in b".\\" else f"\\{one:03}" for one in label))
        at += wire[at] + 1
    return ".".join(labels) or "."
