"""Two multiplexers and a wire between them that cuts octets anywhere; the users of both keep what they are told."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import Any

from portfwd.carriers import Destination
from portfwd.mux.engine import (
    CLOSED,
    CREDIT,
    DEFAULT,
    ENDED,
    OCTETS,
    OPENED,
    OVERRUN,
    REFUSED,
    Flow,
    Limits,
    Multiplexer,
    Role,
)
from portfwd.mux.frames import Frame, emit

TARGET = Destination("tcp", bytes((10, 0, 0, 1)), 80)


class End:
    """One side's user: writes what it has to say when there is credit, takes what comes, answers an end with an end."""

    def __init__(self, role: Role, *, handshake: bool = True, limits: Limits = DEFAULT, greedy: bool = True) -> None:
        self.mux = Multiplexer(role=role, handshake=handshake, limits=limits)
        self.greedy = greedy
        """Consume at once; else only when told."""
        self.accept = True
        self.opened: list[Flow] = []
        self.received: dict[int, bytes] = defaultdict(bytes)
        self.events: list[tuple[int, int]] = []
        self.refused: set[int] = set()
        self._to_say: dict[int, tuple[Flow, memoryview, bool]] = {}

    def open(self, target: Destination = TARGET) -> Flow:
        return self.mux.open(target)

    def say(self, flow: Flow, octets: bytes, *, end: bool = False) -> None:
        """Send as far as credit allows, the rest as it comes; then shut down."""
        self._to_say[flow.id] = (flow, memoryview(octets), end)
        self._go_on(flow)

    def left(self, flow: Flow) -> int:
        return len(self._to_say[flow.id][1]) if flow.id in self._to_say else 0

    def _go_on(self, flow: Flow) -> None:
        if flow.id not in self._to_say:
            return
        _, octets, end = self._to_say[flow.id]
        while octets and (limit := min(self.mux.sendable(flow), 50_000)):
            self.mux.send(flow, octets[:limit])
            octets = octets[limit:]
        self._to_say[flow.id] = (flow, octets, end)
        if not octets:
            del self._to_say[flow.id]
            if end:
                self.mux.shutdown(flow)

    def hear(self, octets: bytes) -> None:
        for event, flow, view in self.mux.receive(memoryview(octets)):
            self.events.append((event, flow.id))
            if event == OPENED:
                self.opened.append(flow)
                if self.accept:
                    self.mux.accept(flow)
            elif event == OCTETS:
                self.received[flow.id] += view
                if self.greedy:
                    self.mux.consumed(flow, len(view))
            elif event == CREDIT:
                self._go_on(flow)
            elif event == CLOSED:
                if view is REFUSED:
                    self.refused.add(flow.id)
                self.mux.close(flow)
            else:
                assert event in (ENDED, OVERRUN)

    def take(self, most: int = 1 << 30) -> bytes:
        """Octets of the queue, as a transport would take them."""
        octets = b"".join(self.mux.gather(1 << 20))[:most]
        self.mux.sent(len(octets))
        while (flow := self.mux.next_in_line()) is not None:
            self._go_on(flow)
        return octets

    def count(self, event: int, flow: Flow) -> int:
        return self.events.count((event, flow.id))


def run(one: End, other: End, rng: random.Random | None = None) -> None:
    """Carry octets both ways until nobody says any more; with `rng`, in pieces of any size and in any order of the ends."""
    while one.mux.queued or other.mux.queued:
        sender, hearer = (one, other) if rng is None or rng.random() < 0.5 else (other, one)
        most = 1 << 30 if rng is None else rng.choice([1, 2, 5, 11, 100, 3000, 70_000, 200_000])
        hearer.hear(sender.take(most))
        if rng is None:
            one.hear(other.take())


def pair(*, handshake: bool = True, limits: Limits = DEFAULT, **other: Any) -> tuple[End, End]:
    """A host that connected and a VM that listened, greeted."""
    host = End(Role.CONNECTOR, handshake=handshake, limits=limits)
    vm = End(Role.LISTENER, handshake=handshake, limits=limits, **other)
    run(host, vm)
    return host, vm


def said(*frames: Frame | bytes) -> bytes:
    """Frames and payloads as octets."""
    return b"".join(frame if isinstance(frame, bytes) else emit(frame) for frame in frames)
