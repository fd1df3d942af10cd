"""What to do so that the host has the ports that the Services want. No I/O.

It is told of Services as an informer tells (a full list, then each change) and, whenever there is something to do, what the host
has exposed. It compares: nothing is remembered about the host, so ports that came or went by other hands, or a restart on either
side, are put right at the next comparison.

* Ports that carry our annotation and that nobody wants are closed, before any is opened.
* A port is not opened where the host has another one of its protocol and number, whoever made it. Of several Services that want the
  same, the one that has it keeps it, else the oldest gets it.
* A LoadBalancer with a port on the host is told to be at `localhost`.
* What the host refused is not asked for again before `resync`, unless the Service wants another.

Trouble is said once per Service and wording, and again only after it was over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from portfwd.invm.ports import Port
from pyvpnkit.kube.services import Service

ANNOTATION: Final = "vpnkit-k8s-controller"  # spec vpnkit 7.8
RESYNC_S: Final = 30.0  # spec vpnkit 7.8
ANY: Final = "0.0.0.0"
LOCALHOST: Final = "localhost"
TAKEN: Final = "PortTaken"
REFUSED: Final = "PortRefused"
MAX_SERVICES: Final = 50_000
"""That are kept; the host has 65,535 ports of a kind. Those beyond are not looked at and counted."""


@dataclass(frozen=True, slots=True)
class Want:
    """A port that a Service wants."""

    service: Service
    port: Port


@dataclass(frozen=True, slots=True)
class Trouble:
    """What a person should see at a Service; `reason` is a word as events of Kubernetes have one."""

    service: Service
    reason: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """In this order."""

    close: tuple[Port, ...]
    open: tuple[Want, ...]
    troubles: tuple[Trouble, ...]


class Engine:
    """The Services as they were last told."""

    def __init__(self, *, annotation: str = ANNOTATION, bind: str = ANY) -> None:
        self.annotation = annotation
        self.bind = bind
        self.overflow = 0
        """Services that were not looked at."""
        self._services: dict[str, Service] = {}
        self._refused: dict[Port, str] = {}
        self._said: dict[str, frozenset[str]] = {}

    def __len__(self) -> int:
        return len(self._services)

    def replace(self, services: Iterable[Service]) -> None:
        """All there are."""
        self._services.clear()
        for service in services:
            self.apply(service)

    def apply(self, service: Service) -> None:
        """Added or changed."""
        if service.key not in self._services and len(self._services) >= MAX_SERVICES:
            self.overflow += 1
            return
        self._services[service.key] = service

    def delete(self, key: str) -> None:
        """Gone, if it was there; by `Service.key`."""
        self._services.pop(key, None)

    def resync(self) -> None:
        """Time to ask again for what was refused."""
        self._refused.clear()

    def plan(self, exposed: Sequence[Port]) -> Plan:
        """What to do about the host, which has `exposed`."""
        winners, losers = self._winners(set(exposed))
        close = tuple(dict.fromkeys(port for port in exposed if self._ours(port) and port not in winners))
        closing = set(close)
        there = {(port.proto, port.out_port): port for port in exposed if port not in closing}
        opened, troubles = [], [self._taken(want, winner.port, winner.service) for want, winner in losers]
        for port, want in winners.items():
            holder = there.get((port.proto, port.out_port))
            if holder == port:
                continue
            if holder is not None:
                troubles.append(self._taken(want, holder, None))
            elif port in self._refused:
                troubles.append(self._refusal(want))
            else:
                opened.append(want)
        self._refused = {port: words for port, words in self._refused.items() if port in winners}
        return Plan(close=close, open=tuple(opened), troubles=tuple(troubles))

    def refused(self, want: Want, words: str) -> Trouble:
        """The host would not open it."""
        self._refused[want.port] = words
        return self._refusal(want)

    def ingress(self, exposed: Sequence[Port]) -> tuple[Service, ...]:
        """Load balancers with a port on the host whose status does not tell so yet."""
        there = set(exposed)
        return tuple(
            service
            for service in self._services.values()
            if service.is_load_balancer
            and service.hostnames != (LOCALHOST,)
            and any(port in there for port in service.wanted(self.annotation, self.bind))
        )

    def withdraw(self, exposed: Sequence[Port]) -> tuple[Port, ...]:
        """What to close when we go: our own, and no other."""
        return tuple(port for port in exposed if self._ours(port))

    def news(self, troubles: Iterable[Trouble]) -> tuple[Trouble, ...]:
        """Those of all current troubles that have not been said."""
        now: dict[str, set[str]] = {}
        fresh = []
        for trouble in troubles:
            said = self._said.get(trouble.service.key, frozenset())
            seen = now.setdefault(trouble.service.key, set())
            if trouble.message not in said and trouble.message not in seen:
                fresh.append(trouble)
            seen.add(trouble.message)
        self._said = {key: frozenset(words) for key, words in now.items()}
        return tuple(fresh)

    def _ours(self, port: Port) -> bool:
        return port.annotation == self.annotation

    def _winners(self, exposed: set[Port]) -> tuple[Mapping[Port, Want], list[tuple[Want, Want]]]:
        """Who gets each port, and who does not because of whom."""
        by_number: dict[tuple[str, int], list[Want]] = {}
        for service in sorted(self._services.values(), key=lambda one: (one.created, one.key)):
            for port in service.wanted(self.annotation, self.bind):
                by_number.setdefault((port.proto, port.out_port), []).append(Want(service, port))
        winners: dict[Port, Want] = {}
        losers: list[tuple[Want, Want]] = []
        for wants in by_number.values():
            winner = next((want for want in wants if want.port in exposed), wants[0])
            winners[winner.port] = winner
            losers += [(want, winner) for want in wants if want is not winner]
        return winners, losers

    def _taken(self, want: Want, holder: Port, by: Service | None) -> Trouble:
        whose = f"Service {by.key}" if by is not None else f"`{holder}`"
        words = f"{want.port.proto} port {want.port.out_port} of the host is taken by {whose}"
        return Trouble(want.service, TAKEN, words)

    def _refusal(self, want: Want) -> Trouble:
        words = f"the host refused {want.port.proto} port {want.port.out_port}: {self._refused[want.port]}"
        return Trouble(want.service, REFUSED, words)
