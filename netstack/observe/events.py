"""Typed events: what is worth knowing, once. Log lines, metrics and the control API are subscribers.

Addresses are text here, because events are for people and for JSON; nothing on the per-frame path makes one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

log = logging.getLogger("pyvpnkit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base; `time` is seconds on the stack's clock."""

    time: float

    @property
    def name(self) -> str:
        return type(self).__name__

    def __str__(self) -> str:
        fields = " ".join(
            f"{key}={value!r}" if isinstance(value, str) and not value.isprintable() else f"{key}={value}"
            for key, value in asdict(self).items()
            if key != "time"
        )
        return f"{self.name} {fields}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkUp(Event):
    link: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkLost(Event):
    link: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseGiven(Event):
    address: str
    mac: str
    hostname: str
    lease_s: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseReleased(Event):
    address: str
    mac: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowOpened(Event):
    protocol: str
    guest: str
    remote: str
    direction: str
    """`outbound` (guest opened) or `inbound` (a published port)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowClosed(Event):
    protocol: str
    guest: str
    remote: str
    reason: str
    octets_outbound: int
    octets_inbound: int
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowRefused(Event):
    protocol: str
    guest: str
    remote: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardAdded(Event):
    forward: str
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRemoved(Event):
    forward: str
    owner: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureStopped(Event):
    path: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostNetworkChanged(Event):
    """The host's own network: a VPN came or went, a cable was pulled, the machine slept."""

    reasons: tuple[str, ...]
    """Of `addresses`, `routes`, `egress`, `ipv6`, `resolvers`, `slept`, `stopped`, `clock set`."""
    appeared: tuple[str, ...] = ()
    """Addresses that are new."""
    vanished: tuple[str, ...] = ()
    new_routes: tuple[str, ...] = ()
    """Some of them, where they are many."""
    lost_routes: tuple[str, ...] = ()
    interface: str = ""
    """Which leads out now; empty for none."""
    mtu: int = 0
    missed_s: float = 0.0
    """Time that went by unseen; for `clock set` the step."""
    flows_reset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Contained(Event):
    """A bug of ours ended one flow; the traceback is in the log once."""

    where: str
    error: str


FLOW_EVENTS = (FlowOpened, FlowClosed, FlowRefused)
"""Those of single flows, made only when somebody listens: there may be thousands in a second."""


class EventBus:
    """Passes each event to every subscriber; one that raises is dropped, so that no observer can harm the network."""

    def __init__(self) -> None:
        self._subscribers: dict[Callable[[Event], None], bool] = {}
        """Whether it wants the events of flows too."""
        self.wanted = False
        """Whether anyone listens to the events of flows; who would make one may skip it otherwise."""

    def subscribe(self, subscriber: Callable[[Event], None], *, flows: bool = True) -> Callable[[], None]:
        """Add a subscriber, for all events or for all but those of `FLOW_EVENTS`; returns the function that removes it.

        A second call for the same subscriber changes its mind about flows.
        """
        self._subscribers[subscriber] = flows
        self._count()

        def unsubscribe() -> None:
            self._subscribers.pop(subscriber, None)
            self._count()

        return unsubscribe

    def _count(self) -> None:
        self.wanted = any(self._subscribers.values())

    def emit(self, event: Event) -> None:
        of_a_flow = isinstance(event, FLOW_EVENTS)
        for subscriber, flows in tuple(self._subscribers.items()):
            if of_a_flow and not flows:
                continue
            try:
                subscriber(event)
            except Exception:  # an observer's fault must not reach the network
                log.exception("event subscriber %r failed and is removed", subscriber)
                self._subscribers.pop(subscriber, None)
                self._count()


def as_dict(event: Event) -> dict[str, Any]:
    """JSON form: the fields, and `event` with the type's name."""
    return {"event": event.name, **asdict(event)}
