"""One network at work: the stack in the loop, and everything around it, from settings.

    Attachments --links--> Stack <--datagrams, streams-- DNS, NTP
                             ^ \\
      published ports --dial-+  +-- events --> log, lease file, default guest of published ports

`Service` is an async context manager. Entering it binds the published ports first (what is in the way is heard before
anything else happens), then opens the links. Leaving resets what is left and removes sockets. `drain` lets flows
finish before that. `reload` takes over new settings as far as that goes without a restart. It knows nothing of
signals, standard error or process ids: `pyvpnkit.daemon` does, `pyvpnkit.shell` and the demo use it as it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import netstack  # noqa: F401  # first: it makes our `dns` importable beside dnspython's
from dns.server import Server as DnsServer
from dns.zones import Zones
from netstack.api import Clock, Endpoint, Link, Reply
from netstack.errors import ConfigError
from netstack.link.attach import Attachments
from netstack.link.capture import CaptureLink
from netstack.observe.events import (
    FLOW_EVENTS,
    CaptureStopped,
    Event,
    EventBus,
    FlowClosed,
    ForwardAdded,
    ForwardRemoved,
    LeaseGiven,
    LeaseReleased,
)
from netstack.observe.pcap import PcapWriter
from netstack.stack import Stack
from ntp.server import Server as NtpServer
from portfwd.carriers import Carriers
from portfwd.inherited import Inherited
from portfwd.owners import SETTINGS, Owner
from portfwd.registry import Registry
from pyvpnkit import config
from pyvpnkit.config import Option, Settings
from pyvpnkit.doors import Doors
from pyvpnkit.driver import Driver
from pyvpnkit.hostside import HostSide
from pyvpnkit.state import State
from pyvpnkit.wording import line

log = logging.getLogger("pyvpnkit")

DNS_PORT: Final = 53
NTP_PORT: Final = 123
FLUSH_S: Final = 1.0
"""How long a captured frame may wait to be seen in the file. The only periodic work, and only while capturing."""
UNLIMITED: Final = 1 << 62

_WORTH_KNOWING: Final = (LeaseGiven, LeaseReleased, ForwardAdded, ForwardRemoved)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reloaded:
    """What a reload came to, by option: changed now, waiting for a restart, not possible (the log says why)."""

    now: list[Option]
    later: list[Option]
    failed: list[Option]


class Service:
    """A running network. Raises `ConfigError` or `HostError` on entering when a link or a port cannot be had."""

    def __init__(self, settings: Settings, *, clock: Clock = time.monotonic, events: EventBus | None = None) -> None:
        self.settings = settings
        self.events = events if events is not None else EventBus()
        self.stack = Stack(settings.network, clock=clock, events=self.events)
        self._inherited = Inherited.from_environment()
        self.plane = _plane(settings)
        """The way to VPNKit's forwarder, where one is configured."""
        self.registry = Registry(
            carriers=Carriers(self.default_guest, plane=self.plane, may_show=self._may_be_seen, is_guest=self.is_guest),
            allowed=settings.allowed_bind_addresses,
            inherit=self._inherited,
            events=self.events,
            clock=clock,
        )
        self.registry.socket_directories = _socket_directories(settings)
        self._clock = clock
        self.began = time.monotonic()
        self.state_directory: Path | None = None
        """Where leases, forwards made by hand and control.sock are; set it before entering."""
        self.state: State | None = None
        self.doors: Doors | None = None
        self.zones = Zones()
        """Names that were added while this runs."""
        self.host = HostSide(self.stack, settings, self.zones, clock)
        """What follows the host: resolvers, network changes, proxies."""
        self._ntp = NtpServer()
        self._capture: PcapWriter | None = None
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._draining = False
        self._published = False
        self._unsubscribe = self.listen()
        self._resources = contextlib.AsyncExitStack()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._driver: Driver | None = None
        self._closed_a_flow = asyncio.Event()
        self.attachments = Attachments(
            settings.links,
            mtu=settings.network.mtu,
            attach=self.stack.attach,
            detach=self.stack.detach,
            reserve=self._reserve,
            release=lambda identity: self.stack.leases.detach(str(identity)),
            wrap=self._wrap,
            counters=self.stack.counters,
            events=self.events,
            clock=clock,
        )
        self.stack.on_detached = self.attachments.detached

    # -- life

    async def __aenter__(self) -> Service:
        self._loop = asyncio.get_running_loop()
        settings = self.settings
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(self._unsubscribe)
            undo.callback(self._inherited.close)
            undo.callback(self.registry.close)
            self.publish()
            if settings.capture.file is not None:
                self._capture = self._open_capture(settings)
                undo.callback(self._capture.close)
            if self.state_directory is not None:
                self.state = State(
                    self.state_directory, self.stack.leases, self.registry, clock=self._clock, loop=self._loop
                )
                self.stack.leases.on_static = self.state.leases_changed
                undo.push_async_callback(self.state.close)
            undo.callback(self._cancel_timers)
            self._driver = Driver(self.stack, self._loop, clock=self._clock)
            self.stack.on_work = self._driver.wake
            undo.callback(self._reset_all)
            self._serve()
            undo.push_async_callback(self.host.close)
            self.host.start(self._loop)
            self._driver.start()
            await undo.enter_async_context(self.attachments)
            if self.plane is not None:
                undo.push_async_callback(self.plane.close)
                self.plane.start(self._loop)
            self.registry.start(self.stack, self._loop)
            self.doors = await undo.enter_async_context(Doors(self))
            self._resources = undo.pop_all()
        if self._capture is not None:
            self._again("flush", FLUSH_S, self._flush)
        return self

    def attach(self, link: Link) -> None:
        """Take a link that the caller opened; the service closes it. Raises `ConfigError` when it cannot be had."""
        self.attachments.adopt(link)

    @property
    def dns(self) -> DnsServer:
        """The name server of this moment; a reload may put another one there."""
        return self.host.dns

    @property
    def capture(self) -> PcapWriter | None:
        """The capture file, where there is one."""
        return self._capture

    def publish(self) -> None:
        """Bind the published ports, if that was not done before: it may need a privilege that the rest does not."""
        if self._published:
            return
        self._published = True
        for spec in self.settings.publish:
            try:
                self.registry.add(spec)
            except BaseException:
                self.registry.close()
                raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Flows are reset while there are still links to say so on.
        self.stop_accepting()
        self._reset_all()
        await self._resources.aclose()

    def _reset_all(self) -> None:
        self.host.dns.close()
        if self._driver is not None:
            self._driver.close()
        self.stack.close()

    def stop_accepting(self) -> None:
        """No new links, clients or flows from now on; those there are go on."""
        if self.state is not None:
            self.state.freeze()
        if self.doors is not None:
            self.doors.stop_accepting()
        self.registry.close()
        self.attachments.stop_accepting()
        self.stack.drain()

    async def drain(self, grace_s: float) -> bool:
        """Stop accepting, and wait until the last TCP flow has ended, at most `grace_s`. Whether all ended by themselves."""
        self.stop_accepting()
        self._draining = True
        self.listen()
        try:
            async with asyncio.timeout(grace_s):
                while self._tcp_flows():
                    self._closed_a_flow.clear()
                    await self._closed_a_flow.wait()
        except TimeoutError:
            return False
        return True

    def _tcp_flows(self) -> int:
        return sum(flow.protocol == "tcp" for flow in self.stack.flows())

    # -- what joins the parts

    def _serve(self) -> None:
        network = self.settings.network

        # Not the bound method: a reload puts another server there.
        def ask(payload: bytes, source: Endpoint, reply: Reply) -> None:
            self.host.dns.datagram(payload, source, reply)

        async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: Endpoint) -> None:
            await self.host.dns.stream(reader, writer, source)

        for address in (network.gateway_bytes, *network.gateway_aliases_bytes):
            self.stack.serve_datagrams(address, DNS_PORT, ask)
            self.stack.serve_streams(address, DNS_PORT, converse)
            if self.settings.ntp:
                self.stack.serve_datagrams(address, NTP_PORT, self._ntp.datagram)

    def default_guest(self) -> bytes:
        """The guest of published ports that name none: the lowest leased address, before any lease the pool's first."""
        leased = [lease.address for lease in self.stack.leases.active(self._clock())]
        return min(leased) if leased else self.settings.network.pool[0].packed

    def is_guest(self, address: str) -> bool:
        """Whether an address of the virtual network, so that our own TCP and UDP get there."""
        found = ipaddress.ip_address(address)
        return found.version == 4 and found in self.settings.network.network

    def _may_be_seen(self, address: bytes) -> bool:
        """Whether a guest may see a client of a published port under this address of its own."""
        found = ipaddress.IPv4Address(address)
        return found not in self.settings.network.network and not (found.is_multicast or found.is_unspecified)

    def _reserve(self, identity: uuid.UUID, preferred: bytes | None) -> tuple[bytes, bytes]:
        reservation = self.stack.leases.reserve(str(identity), preferred, None, self._clock())
        if self.state is not None:
            self.state.leases_changed()
        return reservation.address, reservation.mac

    def _open_capture(self, settings: Settings) -> PcapWriter:
        capture = settings.capture
        assert capture.file is not None
        return PcapWriter(
            capture.file,
            limit=capture.size or UNLIMITED,
            files=capture.files,
            snaplen=capture.snaplen,
            events=self.events,
        )

    def _wrap(self, link: Link) -> Link:
        return link if self._capture is None else CaptureLink(link, self._capture)

    # -- events and what they start

    def listen(self) -> Callable[[], None]:
        """Hear of single flows only while somebody reads of them, or waits for their end: each costs microseconds."""
        return self.events.subscribe(self._event, flows=self._draining or log.isEnabledFor(logging.DEBUG))

    def _event(self, event: Event) -> None:
        if isinstance(event, FLOW_EVENTS):
            if isinstance(event, FlowClosed):
                self._closed_a_flow.set()
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s", line(event))
        elif isinstance(event, _WORTH_KNOWING):
            log.info("%s", line(event))
            if isinstance(event, LeaseGiven | LeaseReleased):
                if self.state is not None:
                    self.state.leases_changed()
                if isinstance(event, LeaseReleased):
                    self.registry.release(Owner("guest", event.address))  # who has the address next made none of them
                self.registry.retarget()
        elif isinstance(event, CaptureStopped):
            log.warning("capture %s stopped: %s; the network goes on", event.path, event.reason)

    def _again(self, name: str, after_s: float, function: Any) -> None:
        """One timer per name: a second wish before it fires is the same wish."""
        if name not in self._timers and self._loop is not None:
            self._timers[name] = self._loop.call_later(after_s, self._fire, name, function)

    def _fire(self, name: str, function: Any) -> None:
        self._timers.pop(name, None)
        function()

    def _cancel_timers(self) -> None:
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._loop = None

    def _flush(self) -> None:
        if self._capture is not None and self._capture.stopped is None:
            self._capture.flush()
            self._again("flush", FLUSH_S, self._flush)

    # -- while it runs

    def reload(self, new: Settings) -> Reloaded:
        """Take over what can be taken over without a restart. What failed is logged, and tried again the next time."""
        changed = config.differences(self.settings, new)
        later = [option for option in changed if not option.reload]
        failed: set[str] = set()
        # Whether the setting changed or not: a port that was taken the last time may be free by now.
        before = [forward.asked for forward in self.registry.of(SETTINGS)]
        for failure in self.registry.sync(new.publish):
            log.error("%s", failure)
            failed.add("publish")
        moved = {"publish"} if before != [forward.asked for forward in self.registry.of(SETTINGS)] else set()
        self.registry.allowed = frozenset(new.allowed_bind_addresses)
        self.registry.socket_directories = _socket_directories(new)
        if self.state is not None:
            self.state.forwards.retry(self.registry)
        failed |= self._reload_host_side(new, [option for option in changed if option.reload])
        self.host.forget()
        done = {option.key for option in changed if option.reload} | moved
        # What did not come about is no setting that holds: the next reload finds it changed again.
        now = [option for option in config.OPTIONS if option.key in done - failed]
        self.settings = config.with_values(self.settings, new, now)
        return Reloaded(now=now, later=later, failed=[one for one in config.OPTIONS if one.key in failed])

    def _reload_host_side(self, new: Settings, changed: Sequence[Option]) -> set[str]:
        """Group by group, so that a mistake in one leaves the others; returns the keys of those that could not be had."""
        groups: tuple[tuple[Callable[[Option], bool], Callable[[Settings], None]], ...] = (
            (lambda option: option.section == "dns", self.host.reload_dns),
            (lambda option: option.section == "network", self.host.reload_names),
            (lambda option: option.key.startswith("way_out"), self.host.reload_ways_out),
            (lambda option: option.section == "http_proxy", self.host.reload_proxy),
        )
        failed: set[str] = set()
        holds = self.settings
        for belongs, reload in groups:
            options = list(filter(belongs, changed))
            if not options:
                continue
            wanted = config.with_values(holds, new, options)
            try:
                reload(wanted)
            except ConfigError as error:
                log.error("%s", error)
                failed |= {option.key for option in options}
            else:
                holds = wanted
        return failed

    def status(self, *, flows: bool = True) -> Mapping[str, Any]:
        """What a person wants to know at a glance; text, numbers, lists and mappings only.

        Without `flows` it takes no time, however many there are.
        """
        return {
            **self.stack.status(),
            "listening": self.attachments.listening,
            "published": [str(forward) for forward in self.registry],
            "not_published": [f"{spec}: {why}" for spec, why in self.state.forwards.failed.items()]
            if self.state is not None
            else [],
            "control": self.doors.where if self.doors is not None else [],
            "forwarder": self.plane.status() if self.plane is not None else "off",
            **({"flows": [dataclasses.asdict(flow) for flow in self.stack.flows()]} if flows else {}),
            "capture": "off"
            if self._capture is None
            else f"{self._capture.path}: {self._capture.frames} frames, {self._capture.stopped or 'running'}",
            "host": self.host.status(),
            "dns": self.host.dns.counters,
            "ntp": self._ntp.counters,
        }


def _socket_directories(settings: Settings) -> frozenset[str]:
    """Where programs in the VM may have sockets made."""
    ports = (os.path.dirname(path) or "." for path in settings.vpnkit.port if not path.startswith("fd:"))
    return frozenset(map(os.path.realpath, settings.allowed_socket_directories or ports))


def _plane(settings: Settings) -> Any:
    """The data plane to VPNKit's forwarder, or `None`."""
    if settings.forwarder is None:
        return None
    from portfwd.mux.plane import Plane  # where it is used: few have a forwarder
    from portfwd.mux.where import Where

    return Plane(Where.parse(settings.forwarder))
