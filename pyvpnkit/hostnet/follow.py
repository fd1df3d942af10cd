"""What a network does when the host's changes: the join of `HostWatch`, the stack, and whoever asks the host's resolvers.

On any change: resolvers are read again and what they said is forgotten (`forget`), TCP flows over an address that is gone are
reset, the way out's MTU is taken over where guests are to follow it, and an event tells of it all. UDP mappings and pings need
nothing: their sockets are not bound, so each datagram takes the route there is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence

from netstack.observe import wake
from netstack.observe.events import HostNetworkChanged
from netstack.stack import Stack
from pyvpnkit.hostnet.changes import DEBOUNCE_S, Change, HostWatch, shown
from pyvpnkit.hostnet.routes import Route, guest_mtu

log = logging.getLogger("pyvpnkit.hostnet")

ROUTES_TOLD = 16
"""Of each kind in an event; a VPN may bring hundreds."""


class Follow:
    """See the module. `forget` is called on each change; it must not raise.

    With `mtu` (the setting `mtu: auto`) guests are told the way out's MTU.
    """

    def __init__(
        self,
        stack: Stack,
        forget: Callable[[], object],
        *,
        mtu: bool = False,
        files: Sequence[str] = ("/etc/resolv.conf",),
        debounce_s: float = DEBOUNCE_S,
        every_s: float = wake.EVERY_S,
    ) -> None:
        self._stack = stack
        self._forget = forget
        self._mtu = mtu
        self.watch = HostWatch(self.changed, files=files, debounce_s=debounce_s, every_s=every_s)
        self.changes = 0

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Take over how the host's network is, and follow it."""
        self.watch.start(loop)
        self._take_over()

    def close(self) -> None:
        """Harmless when repeated."""
        self.watch.close()

    def ipv6_route(self) -> bool:
        """Whether answers with IPv6 addresses are of use to anybody."""
        return self.watch.ipv6_route()

    def changed(self, change: Change) -> None:
        """The host's network is another one now."""
        self.changes += 1
        now = change.now
        reset = self._take_over()
        event = HostNetworkChanged(
            time=self._stack.clock(),
            reasons=change.reasons,
            appeared=shown(change.appeared),
            vanished=shown(change.vanished),
            new_routes=_some(change.new_routes),
            lost_routes=_some(change.lost_routes),
            interface=now.egress.interface if now.egress is not None else "",
            mtu=now.egress.mtu if now.egress is not None else 0,
            missed_s=round(change.missed.seconds, 1) if change.missed is not None else 0.0,
            flows_reset=reset,
        )
        log.info("%s", words(event))
        self._stack.events.emit(event)
        self._forget()

    def _take_over(self) -> int:
        now = self.watch.snapshot
        if self._mtu:
            self._stack.egress_mtu(guest_mtu(now.egress, self._stack.network.mtu))
        if not now.addresses:
            return 0  # it could not be read: nothing is known to be gone
        return self._stack.host_changed(now.addresses)


def _some(routes: Iterable[Route]) -> tuple[str, ...]:
    return tuple(sorted(map(str, routes))[:ROUTES_TOLD])


def words(event: HostNetworkChanged) -> str:
    """One line for the log."""
    parts = [f"the host's network has changed ({', '.join(event.reasons)})"]
    if event.missed_s:
        parts.append(f"{event.missed_s:g} s missed")
    for label, values in (
        ("new", event.appeared),
        ("gone", event.vanished),
        ("routes", event.new_routes),
        ("routes gone", event.lost_routes),
    ):
        if values:
            parts.append(f"{label}: {', '.join(values[:4])}{', ...' if len(values) > 4 else ''}")
    parts.append(f"out by {event.interface} (MTU {event.mtu})" if event.interface else "no way out")
    if event.flows_reset:
        parts.append(f"{event.flows_reset} TCP flows reset")
    return "; ".join(parts)
