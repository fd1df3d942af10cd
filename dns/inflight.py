"""What the forwarder keeps: of each server, and of each question on its way."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeAlias

from dns.rules import Route
from dns.servers import Asker, Server
from dns.stream_asker import StreamAsker

NOBODY: Final = "nobody"
CACHE: Final = "cache"

Answered: TypeAlias = Callable[[bytes, str], None]
"""Called once with the answer and who gave it: a server, `CACHE`, `NOBODY`, or the rule that refuses."""


class ServerState:
    """What is known of one server while it is among those that may be asked."""

    __slots__ = (
        "answered",
        "asked",
        "asker",
        "errors",
        "failures",
        "misses",
        "name",
        "offline",
        "probe_at",
        "server",
        "stream",
        "timeouts",
        "took_s",
    )

    def __init__(self, server: Server, asker: Asker | None) -> None:
        self.server = server
        self.name = str(server)
        self.asker = asker
        self.stream: StreamAsker | None = None
        self.asked = self.answered = self.timeouts = self.errors = self.failures = self.misses = 0
        self.took_s = 0.0
        """Of the last answer."""
        self.offline = False
        self.probe_at = 0.0

    def close(self) -> None:
        for asker in (self.asker, self.stream):
            if asker is not None:
                asker.close()

    def document(self) -> dict[str, Any]:
        """Counters of this server, as JSON's values."""
        return {
            "server": self.name,
            "zones": len(self.server.zones),
            "order": self.server.order,
            "asked": self.asked,
            "answered": self.answered,
            "timeouts": self.timeouts,
            "errors": self.errors,
            "failures": self.failures,
            "offline": self.offline,
            "last_ms": round(self.took_s * 1000, 3),
        }


Try: TypeAlias = tuple[socket.SocketType, bytes, ServerState, float]
Waiting: TypeAlias = tuple[bytes, int, Answered]


class Asked:
    """One question on its way, for all who wait for its answer. HOT PATH: most keep the values that the class has."""

    group = -1
    """Of `route.groups`, the last one asked."""
    worth = -1
    """Of `best`; see `dns.upstream.worth`."""
    best: bytes | None = None
    """The best answer so far that could still be bettered."""
    best_by = NOBODY
    best_group = -1
    desperate = False
    """Servers that are offline are asked, because nobody else is left."""
    moved = False
    """The network changed: ask again, and blame nobody."""
    trace: list[tuple[ServerState, str, bytes, float]] | None = None
    """What came of each try, for `explain`: server, result, answer, seconds since it was asked."""
    tasks: Mapping[asyncio.Task[None], ServerState] = {}  # never changed, only replaced
    """Questions over connections, and to askers of other kinds."""

    def __init__(
        self,
        query: bytes,
        end: int,
        route: Route[ServerState],
        waiting: list[Waiting],
        give_up_at: float,
        key: bytes | None,
        stream: bool,
    ) -> None:
        self.query = query
        self.end = end
        self.route = route
        self.waiting = waiting
        self.give_up_at = give_up_at
        self.key = key
        self.stream = stream
        self.next_at = give_up_at
        self.hold_at = give_up_at
        self.pending: dict[ServerState, tuple[float, int]] = {}
        """Servers that are waited for: until when, and their group."""
        self.tries: dict[int, Try] = {}
