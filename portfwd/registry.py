"""All forwards of one network, whoever made them: add, remove, list, and bring in line with a changed settings file.

Every front door (settings, command line, `/v1`, VPNKit's two APIs, gvproxy's) acts on this one table, so each sees what the
others made; the `Owner` of a forward says whose it is. A spec with a range is one forward: it is bound as a whole or not
at all. Ports may be bound before there is a stack to hand connections to (`add` before `start`), so that a port in the way is
reported before anything else happens. Used from the event loop's thread only.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from netstack.api import Clock, Dialer
from netstack.errors import ConfigError, HostError, NetstackError
from netstack.observe.events import EventBus, ForwardAdded, ForwardRemoved
from portfwd.carriers import Carriers, FindGuest, Way
from portfwd.errors import AlreadyPublished, NotAllowed, TooMany
from portfwd.listeners import Inherit, Listener, open_listener
from portfwd.owners import SETTINGS, Owner
from portfwd.spec import PublishSpec

MAX_FORWARDS: Final = 1024
"""Ports published at once (threats-and-faults L5)."""
ANY: Final = {"0.0.0.0": 4, "::": 6}
"""In the list of allowed addresses these stand for every address of the family, as in VPNKit."""


@dataclass(frozen=True, slots=True, eq=False)
class Forward:
    """A published spec and its listeners."""

    id: int
    """Never given to another one."""
    asked: PublishSpec
    owner: Owner
    listeners: tuple[Listener, ...]
    since: float
    """On the registry's clock."""
    way: Way | None = None
    """Where its connections go, when not by the registry's carriers."""

    @property
    def spec(self) -> PublishSpec:
        """`asked`, with the host port the operating system chose where 0 was asked for."""
        return replace(self.asked, port=self.listeners[0].spec.port)

    @property
    def accepted(self) -> int:
        """Connections taken so far, all ports of it together."""
        return sum(listener.accepted for listener in self.listeners)

    def __str__(self) -> str:
        return str(self.spec)


class Registry:
    """Holds the forwards; `close` frees every port."""

    def __init__(
        self,
        find_guest: FindGuest | None = None,
        *,
        carriers: Carriers | None = None,
        allowed: Iterable[str] = tuple(ANY),
        inherit: Inherit = lambda spec: None,
        events: EventBus | None = None,
        clock: Clock = time.monotonic,
        max_forwards: int = MAX_FORWARDS,
    ) -> None:
        self.carriers = carriers if carriers is not None else Carriers(find_guest or (lambda: bytes(4)))
        self.allowed = frozenset(allowed)
        """Host addresses that forwards may be bound on; what the settings themselves publish is not asked."""
        self.socket_directories: frozenset[str] | None = None
        """Where programs in the VM may have Unix sockets made, with all below; `None` is anywhere."""
        self.changed: Callable[[], None] = lambda: None
        """Called after each change."""
        self._inherit = inherit
        self._events = events
        self._clock = clock
        self._max = max_forwards
        self._forwards: dict[int, Forward] = {}
        self._numbers = itertools.count(1)
        self._loop: asyncio.AbstractEventLoop | None = None

    def __iter__(self) -> Iterator[Forward]:
        return iter(tuple(self._forwards.values()))

    def __len__(self) -> int:
        """Ports and paths published."""
        return sum(forward.asked.count for forward in self._forwards.values())

    def start(self, dialer: Dialer, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to hand connections on, for the ports bound so far and those added later."""
        self._loop = loop
        self.carriers.dialer = dialer
        for forward in self:
            for listener in forward.listeners:
                listener.start(loop)

    def add(self, spec: PublishSpec, owner: Owner = SETTINGS, *, way: Way | None = None) -> Forward:
        """Publish `spec` for `owner`; `way` gets its connections (streams only), and is closed when the forward is removed.

        Raises `AlreadyPublished` when one of ours is in the way, `NotAllowed`, `TooMany`, other `ConfigError`s, and
        `BindFailed` for what the operating system says.
        """
        self._check(spec, owner)
        listeners: list[Listener] = []
        try:
            for single in spec.each():
                listeners.append(open_listener(single, self.carriers, self._inherit, way))  # noqa: PERF401  # closed if one fails
            if self._loop is not None:
                for listener in listeners:
                    listener.start(self._loop)
        except BaseException:
            for listener in listeners:
                listener.close()
            raise
        forward = Forward(next(self._numbers), spec, owner, tuple(listeners), self._clock(), way)
        self._forwards[forward.id] = forward
        if self._events is not None:
            self._events.emit(ForwardAdded(time=self._clock(), forward=str(forward), owner=str(owner)))
        self.changed()
        return forward

    def _check(self, spec: PublishSpec, owner: Owner) -> None:
        if spec.port or spec.path:
            for forward in self._forwards.values():
                if _overlap(spec, forward.spec):
                    raise AlreadyPublished(spec, forward)
        if spec.protocol != "unix" and owner != SETTINGS and spec.bind not in self.allowed:
            if not any(
                family == (6 if ":" in spec.bind else 4) and any_ in self.allowed for any_, family in ANY.items()
            ):
                raise NotAllowed(
                    spec,
                    f"{spec.bind} is not among allowed_bind_addresses ({', '.join(sorted(self.allowed)) or 'none'})",
                )
        if spec.protocol == "unix" and owner.is_in_vm and self.socket_directories is not None:
            directory = os.path.realpath(os.path.dirname(spec.path))
            if not any(os.path.commonpath((directory, one)) == one for one in self.socket_directories):
                places = ", ".join(sorted(self.socket_directories)) or "none"
                raise NotAllowed(
                    spec, f"programs in the VM may have sockets made in allowed_socket_directories only ({places})"
                )
        if len(self) + spec.count > self._max:
            raise TooMany(f"publish: {spec} would exceed {self._max} published ports; remove some first")
        self.carriers.check(spec)

    def remove(self, forward: Forward) -> None:
        """Free the ports of `forward`; flows that came through them go on. Harmless when it was removed before."""
        if self._forwards.pop(forward.id, None) is None:
            return
        for listener in forward.listeners:
            listener.close()
        if forward.way is not None:
            forward.way.close()
        if self._events is not None:
            self._events.emit(ForwardRemoved(time=self._clock(), forward=str(forward), owner=str(forward.owner)))
        self.changed()

    def remove_named(self, forward: Forward, name: str) -> None:
        """Remove it for a client whose API knows it, or one port of it, by `name`. Raises `ConfigError` when that cannot be."""
        if forward.owner == SETTINGS:
            raise ConfigError(f"{forward} is in the settings: remove it there, and reload")
        if forward.spec.count > 1:
            raise ConfigError(f"{name} is one of {forward}, which can only be removed as a whole")
        self.remove(forward)

    def release(self, owner: Owner) -> None:
        """Remove all that `owner` made."""
        for forward in self.of(owner):
            self.remove(forward)

    def of(self, owner: Owner) -> list[Forward]:
        """What `owner` made, oldest first."""
        return [forward for forward in self if forward.owner == owner]

    def by_id(self, number: int) -> Forward | None:
        """The forward with that `id`."""
        return self._forwards.get(number)

    def find(self, spec: PublishSpec) -> Forward:
        """The forward asked for as `spec` or bound as `spec`; raises `ConfigError` when there is none."""
        for forward in self:
            if spec in (forward.asked, forward.spec):
                return forward
        raise ConfigError(f"publish: {spec} is not published")

    def sync(self, specs: Iterable[PublishSpec], owner: Owner = SETTINGS) -> list[NetstackError]:
        """Publish exactly `specs` for `owner`: what is unchanged keeps its socket. Returns what could not be published."""
        wanted = list(specs)
        for forward in self.of(owner):
            if forward.asked in wanted:
                wanted.remove(forward.asked)
            else:
                self.remove(forward)
        failures: list[NetstackError] = []
        for spec in wanted:
            try:
                self.add(spec, owner)
            except (HostError, ConfigError) as error:
                failures.append(error)
        return failures

    def retarget(self) -> None:
        """A lease was given or ended: specs without GUESTIP may mean another guest now."""
        for forward in self:
            for listener in forward.listeners:
                listener.retarget()

    def close(self) -> None:
        """Free every port."""
        for forward in self:
            self.remove(forward)


def _overlap(one: PublishSpec, other: PublishSpec) -> bool:
    if "unix" in (one.protocol, other.protocol):
        return one.protocol == other.protocol and one.path == other.path
    return (
        (one.protocol, one.bind) == (other.protocol, other.bind)
        and one.port < other.port + other.count
        and other.port < one.port + one.count
    )
