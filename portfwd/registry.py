"""All published ports of one network: add, remove, list, and bring in line with a changed settings file.

A spec with a range is one forward: it is bound as a whole or not at all. Ports may be bound before there is a stack to hand
connections to (`add` before `start`), so that a port in the way is reported before anything else happens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from netstack.api import Clock, Dialer
from netstack.errors import ConfigError, HostError, NetstackError
from netstack.observe.events import EventBus, ForwardAdded, ForwardRemoved
from portfwd.listeners import FindGuest, Listener, TcpListener, UdpListener, bound_socket
from portfwd.spec import PublishSpec

MAX_FORWARDS: Final = 1024
"""Ports published at once (threats-and-faults L5)."""


@dataclass(frozen=True, slots=True)
class Forward:
    """A published spec and its listeners."""

    asked: PublishSpec
    listeners: tuple[Listener, ...]

    @property
    def spec(self) -> PublishSpec:
        """`asked`, with the host port the operating system chose where 0 was asked for."""
        return replace(self.asked, port=self.listeners[0].spec.port)

    def __str__(self) -> str:
        return str(self.spec)


class Registry:
    """Holds the forwards; `close` frees every port."""

    def __init__(
        self,
        find_guest: FindGuest,
        *,
        events: EventBus | None = None,
        clock: Clock = time.monotonic,
        max_forwards: int = MAX_FORWARDS,
    ) -> None:
        self._find_guest = find_guest
        self._events = events
        self._clock = clock
        self._max = max_forwards
        self._forwards: list[Forward] = []
        self._dialer: Dialer | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def __iter__(self) -> Iterator[Forward]:
        return iter(tuple(self._forwards))

    def __len__(self) -> int:
        return sum(forward.asked.count for forward in self._forwards)

    def start(self, dialer: Dialer, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to hand connections on, for the ports bound so far and those added later."""
        self._dialer, self._loop = dialer, loop
        for forward in self._forwards:
            for listener in forward.listeners:
                listener.start(dialer, loop)

    def add(self, spec: PublishSpec) -> Forward:
        """Publish `spec`; raises `HostError` when a port cannot be bound and `ConfigError` when it is published already."""
        if spec.port and any(_overlap(spec, forward.spec) for forward in self._forwards):
            raise ConfigError(f"publish: {spec} is published already; remove it first")
        if len(self) + spec.count > self._max:
            raise ConfigError(f"publish: {spec} would exceed {self._max} published ports; remove some first")
        listeners: list[Listener] = []
        try:
            for single in spec.each():
                sock = bound_socket(single)
                actual = replace(single, port=sock.getsockname()[1])
                kind = TcpListener if spec.protocol == "tcp" else UdpListener
                listeners.append(kind(actual, sock, self._find_guest))
            if self._dialer is not None and self._loop is not None:
                for listener in listeners:
                    listener.start(self._dialer, self._loop)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        forward = Forward(spec, tuple(listeners))
        self._forwards.append(forward)
        if self._events is not None:
            self._events.emit(ForwardAdded(time=self._clock(), forward=str(forward)))
        return forward

    def remove(self, forward: Forward) -> None:
        """Free the ports of `forward`; flows that came through them go on. Harmless when it was removed before."""
        if forward not in self._forwards:
            return
        self._forwards.remove(forward)
        for listener in forward.listeners:
            listener.close()
        if self._events is not None:
            self._events.emit(ForwardRemoved(time=self._clock(), forward=str(forward)))

    def find(self, spec: PublishSpec) -> Forward:
        """The forward asked for as `spec` or bound as `spec`; raises `ConfigError` when there is none."""
        for forward in self._forwards:
            if spec in (forward.asked, forward.spec):
                return forward
        raise ConfigError(f"publish: {spec} is not published")

    def sync(self, specs: Iterable[PublishSpec]) -> list[NetstackError]:
        """Publish exactly `specs`: what is unchanged keeps its socket. Returns what could not be published."""
        wanted = list(specs)
        for forward in tuple(self._forwards):
            if forward.asked in wanted:
                wanted.remove(forward.asked)
            else:
                self.remove(forward)
        failures: list[NetstackError] = []
        for spec in wanted:
            try:
                self.add(spec)
            except (HostError, ConfigError) as error:
                failures.append(error)
        return failures

    def retarget(self) -> None:
        """A lease was given or ended: specs without GUESTIP may mean another guest now."""
        for forward in self._forwards:
            for listener in forward.listeners:
                listener.retarget()

    def close(self) -> None:
        """Free every port."""
        for forward in tuple(self._forwards):
            self.remove(forward)


def _overlap(one: PublishSpec, other: PublishSpec) -> bool:
    return (
        (one.protocol, one.bind) == (other.protocol, other.bind)
        and one.port < other.port + other.count
        and other.port < one.port + one.count
    )
