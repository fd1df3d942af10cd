"""What the control API needs of the network it controls: `pyvpnkit.service.Service`, seen from here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from dns.server import Server as DnsServer
from netstack.observe.events import EventBus
from netstack.stack import Stack
from portfwd.registry import Registry
from pyvpnkit.state import State


class World(Protocol):
    """One network at work."""

    @property
    def stack(self) -> Stack: ...
    @property
    def registry(self) -> Registry: ...
    @property
    def events(self) -> EventBus: ...
    @property
    def dns(self) -> DnsServer: ...

    @property
    def state(self) -> State | None:
        """What outlives the daemon; `None` where nothing does."""
        ...

    def status(self, *, flows: bool = True) -> Mapping[str, Any]:
        """Plain values."""
        ...
