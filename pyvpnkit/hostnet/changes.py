"""The host's network is followed: addresses, routes, the files that name resolvers, and sleep.

Theory of operation. Linux tells by rtnetlink that something has changed; `DEBOUNCE_S` later everything is read again and
compared with what was known, and if they differ who listens gets one `Change`. What the messages say is not used: they may be
lost (ENOBUFS), come in any order, and a VPN that comes up sends dozens. So a full read is the only truth, and the only path.
Where a read takes long (a host with thousands of routes), the next one waits twenty times as long: never more than 5 % of a
core. macOS is looked at each `POLL_S` seconds, in a thread, since that runs two programs.

One timer (`netstack.observe.wake`) looks for missed time, and at the status of `files`, each `every_s` seconds. An idle host
thus costs one wake-up in 5 s.

Changes of link-local addresses and of routes to them are not told: every container that starts or ends makes some.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from netstack.errors import HostError
from netstack.observe import wake
from netstack.observe.wake import Missed
from pyvpnkit.hostnet import routes
from pyvpnkit.hostnet.netlink import Listener
from pyvpnkit.hostnet.routes import Route, Snapshot

log = logging.getLogger("pyvpnkit.hostnet")

DEBOUNCE_S: Final = 0.2
POLL_S: Final = 3.0
_COST: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What became different, and how it is now."""

    before: Snapshot
    now: Snapshot
    resolvers: bool = False
    """A file that names resolvers has changed, or somebody said so."""
    missed: Missed | None = None
    """Time went by unseen: everything should be asked again."""

    @property
    def appeared(self) -> frozenset[bytes]:
        """Addresses of this host that are new."""
        return self.now.addresses - self.before.addresses

    @property
    def vanished(self) -> frozenset[bytes]:
        """Addresses this host no longer has."""
        return self.before.addresses - self.now.addresses

    @property
    def new_routes(self) -> frozenset[Route]:
        return self.now.routes - self.before.routes

    @property
    def lost_routes(self) -> frozenset[Route]:
        return self.before.routes - self.now.routes

    @property
    def reasons(self) -> tuple[str, ...]:
        """In words for events: of `addresses`, `routes`, `egress`, `ipv6`, `resolvers`, `slept`, `stopped`, `clock set`."""
        found = {
            "addresses": any(map(_matters, self.appeared | self.vanished)),
            "routes": self.now.routes != self.before.routes,
            "egress": self.now.egress != self.before.egress,
            "ipv6": self.now.ipv6_route != self.before.ipv6_route,
            "resolvers": self.resolvers,
        }
        words = tuple(word for word, true in found.items() if true)
        return words if self.missed is None else (*words, str(self.missed.kind))


def _matters(address: bytes) -> bool:
    return not (len(address) == 16 and address[0] == 0xFE and address[1] & 0xC0 == 0x80)  # fe80::/10


def shown(addresses: frozenset[bytes]) -> tuple[str, ...]:
    """As text, sorted, IPv4 first."""
    return tuple(str(ipaddress.ip_address(one)) for one in sorted(addresses, key=lambda one: (len(one), one)))


class HostWatch:
    """See the module. `on_change` must not raise.

    `files` are those whose content decides about resolvers; `read` and `listen` are where the state comes from and who tells
    of changes, for tests and other systems.
    """

    def __init__(
        self,
        on_change: Callable[[Change], None],
        *,
        files: Sequence[str] = ("/etc/resolv.conf",),
        debounce_s: float = DEBOUNCE_S,
        every_s: float = wake.EVERY_S,
        poll_s: float = POLL_S,
        read: Callable[[], Snapshot] = routes.snapshot,
        listen: Callable[[], Listener] | None = Listener if sys.platform == "linux" else None,
    ) -> None:
        self.snapshot = Snapshot()
        """As it was when last looked at."""
        self.looks = 0
        """How often everything was read."""
        self._on_change = on_change
        self._files = tuple(files)
        self._debounce_s = debounce_s
        self._poll_s = poll_s
        self._read = read
        self._listen = listen
        self._listener: Listener | None = None
        self._wake = wake.WakeWatch(self._tick, every_s=every_s)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._reading: asyncio.Future[Snapshot] | None = None
        self._status = self._look_at_files()
        self._resolvers = False
        self._missed: Missed | None = None
        self._read_s = 0.0
        self._complained = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look now, and from now on. Where the host does not tell, that is logged and what can be followed is."""
        self._loop = loop
        self._status, self._resolvers = self._look_at_files(), False  # what was before is no change
        # Before the first look: what changes in between is heard of.
        if self._listen is not None:
            try:
                self._listener = self._listen()
            except OSError as error:
                log.warning("changes of the host's network are not heard of (%s)", error.strerror)
            else:
                loop.add_reader(self._listener.fileno(), self._heard)
        try:
            self.snapshot = self._timed_read()
        except HostError as error:
            self._failed(error)
        self._wake.start(loop)
        if self._listen is None:
            self._timer = loop.call_later(self._poll_s, self._poll)

    def close(self) -> None:
        """Follow no more. Harmless when repeated."""
        self._wake.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        self._unlisten()
        self._loop = None

    def ipv6_route(self) -> bool:
        """Whether the host has a way to the IPv6 Internet; as of the last change, so it costs nothing to ask."""
        return self.snapshot.ipv6_route

    def resolvers_changed(self) -> None:
        """Who follows the resolvers has seen them change: tell the others."""
        self._resolvers = True
        self._soon()

    # What starts a look.

    def _heard(self) -> None:
        assert self._listener is not None
        try:
            if self._listener.heard():
                self._soon()
        except OSError as error:
            log.warning("changes of the host's network are no longer heard of (%s)", error.strerror)
            self._unlisten()

    def _tick(self, missed: Missed | None) -> None:
        self._missed = missed or self._missed
        status = self._look_at_files()
        if status != self._status:
            self._status = status
            self._resolvers = True
        if self._missed is not None or self._resolvers or (self._listener is None and self._listen is not None):
            self._soon()

    def _poll(self) -> None:
        """Elsewhere than on Linux: in a thread, as it runs programs."""
        self._timer = None
        if self._loop is None:
            return
        self._reading = self._loop.run_in_executor(None, self._timed_read)
        self._reading.add_done_callback(self._polled)

    def _polled(self, reading: asyncio.Future[Snapshot]) -> None:
        if self._loop is None or reading.cancelled():
            return
        self._reading = None
        self._timer = self._loop.call_later(max(self._poll_s, _COST * self._read_s), self._poll)
        try:
            self._compare(reading.result())
        except HostError as error:
            self._failed(error)

    def _soon(self) -> None:
        """A wish while one waits is the same wish, so constant change does not put the look off."""
        if self._loop is not None and self._timer is None and self._listen is not None:
            self._timer = self._loop.call_later(max(self._debounce_s, _COST * self._read_s), self._look)

    def _look(self) -> None:
        self._timer = None
        try:
            self._compare(self._timed_read())
        except HostError as error:
            self._failed(error)

    # The look.

    def _timed_read(self) -> Snapshot:
        began = time.perf_counter()
        try:
            return self._read()
        finally:
            self._read_s = time.perf_counter() - began
            self.looks += 1

    def _compare(self, now: Snapshot) -> None:
        status = self._look_at_files()
        change = Change(
            before=self.snapshot,
            now=now,
            resolvers=self._resolvers or status != self._status,
            missed=self._missed,
        )
        self.snapshot, self._status, self._resolvers, self._missed = now, status, False, None
        self._complained = False
        if change.reasons:
            self._on_change(change)

    def _look_at_files(self) -> tuple[tuple[int, ...] | None, ...]:
        return tuple(map(_status, self._files))

    def _failed(self, error: HostError) -> None:
        """What was known of addresses and routes holds on; the rest is told all the same."""
        if not self._complained:
            log.warning("%s; what was known of it stays", error)
        self._compare(self.snapshot)
        self._complained = True

    def _unlisten(self) -> None:
        if self._listener is not None:
            if self._loop is not None:
                self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None


def _status(path: str) -> tuple[int, ...] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_mtime_ns, found.st_ino, found.st_dev, found.st_size
