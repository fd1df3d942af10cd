"""`/v1/dns`: why a name leads where it does, what was asked last, and how the host's resolvers do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from netstack.errors import ConfigError
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.routing import Answer, Call, Operation, Reply
from pyvpnkit.api.schema import Schema, array, count, integer, record, text

MAX_AT_ONCE: Final = 16
"""Explanations under way; each may ask servers for seconds."""
MAX_LOG: Final = 256

_NUMBER: Final[Schema] = {"type": "number"}
_PROBLEM: Final[Schema] = {"$ref": "#/components/schemas/Problem"}


def _maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


EXPLANATION: Final[Schema] = record(
    {
        "name": text(),
        "type": text(),
        "source": text(
            description="`names`, `leases`, `zones`, `hosts`, `filter` (AAAA without IPv6) or `server`: answered here; "
            "`rule`, `zone` or `resolvers`: relayed."
        ),
        "route": _maybe(text(description="Which rule or zone; null when answered here.")),
        "servers": array(
            record({"server": text(), "order": integer(-(1 << 31), 1 << 31), "offline": {"type": "boolean"}}),
            description="Who may be asked, in this order; those of one order together.",
        ),
        "cache": _maybe(
            record(
                {
                    "by": text(description="Who gave the answer."),
                    "age_s": _NUMBER,
                    "left_s": _NUMBER,
                },
                description="The remembered answer; null where there was none.",
            )
        ),
        "tries": array(
            record(
                {
                    "server": text(),
                    "result": text(description="What it answered, `timeout` or `unreachable`."),
                    "took_ms": _maybe(_NUMBER),
                }
            ),
            description="Who was asked for this explanation, in the order of results.",
        ),
        "by": text(description="Who gave the answer: a source, a server, `cache` or `nobody`."),
        "rcode": text(),
        "records": array(text(), description="The answer section: name, seconds to live, type, data."),
        "took_ms": _NUMBER,
    },
    description="Where an answer comes from.",
)
QUERY: Final[Schema] = record(
    {
        "time": {"type": "number", "description": "Seconds since 1970."},
        "guest": text(),
        "name": text(),
        "type": text(),
        "over": text(enum=["udp", "tcp"]),
        "by": text(description="Who answered: a source, a server, `cache` or `nobody`."),
        "rcode": text(),
        "answers": count("Records in the answer section."),
        "octets": count("Of the answer."),
        "took_ms": _NUMBER,
    },
    description="A query of a guest that was answered.",
)
UPSTREAM: Final[Schema] = record(
    {
        "server": text(),
        "zones": count("How many it has; none: any name."),
        "order": integer(-(1 << 31), 1 << 31),
        "asked": count("Queries sent, repetitions included."),
        "answered": count("Answers."),
        "timeouts": count("Tries without an answer in time."),
        "errors": count("Tries that failed at once: port closed, no route."),
        "failures": count("SERVFAIL and REFUSED among the answers."),
        "offline": {"type": "boolean", "description": "It is not waited for until it answers again."},
        "last_ms": {"type": "number", "description": "How long its last answer took."},
    },
    description="A resolver of the host's.",
)


class Resolver(Protocol):
    """What is needed of `dns.server.Server`."""

    async def explain(self, name: str, qtype: str) -> dict[str, Any]: ...
    def log(self) -> list[dict[str, Any]]: ...
    def upstreams(self) -> list[dict[str, Any]]: ...


class DnsApi:
    """The operations on the DNS server that `resolver()` returns; a reload may put another one there."""

    def __init__(self, resolver: Callable[[], Resolver]) -> None:
        self._resolver = resolver
        self._explaining = 0
        self.operations: tuple[Operation, ...] = (
            Operation(
                method="GET",
                path="/v1/dns/explain",
                summary="What a guest gets for a name now, and from where; servers are really asked.",
                handler=self.explain,
                query={
                    "name": {**text(minLength=1, maxLength=1024, description="Such as www.example.org."), **_REQUIRED},
                    "type": text(minLength=1, maxLength=16, description="`AAAA`, `MX`, `TYPE65280`; `A` unless given."),
                },
                replies={
                    200: Reply("What answered.", EXPLANATION),
                    429: Reply("Too many are under way.", _PROBLEM),
                },
            ),
            Operation(
                method="GET",
                path="/v1/dns/log",
                summary="The last queries of guests, the newest first.",
                handler=self.log,
                query={"limit": integer(0, MAX_LOG, description=f"How many at most; {MAX_LOG} unless given.")},
                replies={200: Reply("Queries.", record({"queries": array(QUERY)}))},
            ),
            Operation(
                method="GET",
                path="/v1/dns/upstreams",
                summary="The host's resolvers and those of rules, with their counters.",
                handler=self.upstreams,
                replies={200: Reply("Resolvers.", record({"upstreams": array(UPSTREAM)}))},
            ),
        )
        """In the order of the document."""

    async def explain(self, call: Call) -> Answer:
        if self._explaining >= MAX_AT_ONCE:
            raise ApiError(429, f"{MAX_AT_ONCE} explanations are under way; ask again later")
        self._explaining += 1
        try:
            return Answer(await self._resolver().explain(call.query["name"], call.query.get("type", "A")))
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        finally:
            self._explaining -= 1

    async def log(self, call: Call) -> Answer:
        return Answer({"queries": self._resolver().log()[: call.query.get("limit", MAX_LOG)]})

    async def upstreams(self, call: Call) -> Answer:
        return Answer({"upstreams": self._resolver().upstreams()})


_REQUIRED: Final[Schema] = {"x-required": True}
