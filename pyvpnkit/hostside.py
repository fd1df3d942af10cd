"""What follows the host, so that the guest's network goes on working through its VPN: resolvers, network changes, proxies.

    resolv.conf, resolved, --dns FILE --> HostResolvers --> DNS server; search domains to DHCP
    netlink, sleep                    --> Follow        --> caches forgotten, flows over vanished addresses reset, MTU
    http_proxy.json, environment      --> HttpProxy     --> gateway:3128 and 3129, intercepted ports
    way_out rules                     --> WaysOut       --> SOCKS5 and CONNECT for guests' TCP, by the names DNS gave out

`HostSide` joins them for one network. It is made with the stack, starts once there is a loop, and takes new settings while it runs.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from dns.askers import askers
from dns.follow import HostResolvers
from dns.rules import Rules
from dns.server import Server as DnsServer
from dns.servers import Resolvers, Server, Upstream
from dns.stream_asker import Connect
from dns.zones import Zone, ZoneRecord, Zones
from netstack.api import Clock, Endpoint, Way
from netstack.dhcp.leases import Leases
from netstack.errors import ConfigError
from netstack.host.outward import WaysOut
from netstack.policy.names import Names
from netstack.stack import Stack
from pyvpnkit.config import DnsSettings, Settings
from pyvpnkit.hostnet.follow import Follow
from pyvpnkit.values import AutoMtu

if TYPE_CHECKING:
    from pyvpnkit.proxy.service import HttpProxy

_SOURCE: Final = ("resolvers", "file", "resolv_conf")
"""Settings that decide where resolvers come from."""


class HostSide:
    """See the module. Raises `ConfigError` for settings that make no sense."""

    def __init__(self, stack: Stack, settings: Settings, zones: Zones, clock: Clock) -> None:
        self._stack = stack
        self._settings = settings
        self._zones = zones
        self._clock = clock
        zones.set_static(fixed_zones(settings.dns.records))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: HostResolvers | None = None
        """Those that wake up by themselves."""
        self.names = Names(clock)
        """Those that DNS gave out, by address, for rules by domain."""
        self.resolvers = self._new_resolvers(settings.dns)
        self.follow = Follow(
            stack,
            self.forget,
            mtu=isinstance(settings.network.mtu, AutoMtu),
            files=tuple(filter(None, (settings.dns.resolv_conf, settings.dns.file))),
        )
        self.ways_out = WaysOut(
            stack,
            settings.way_out,
            fail=settings.way_out_fail,
            datagrams=settings.way_out_udp,
            names=self.names,
            connect_s=settings.network.timeouts.tcp_connect_s,
        )
        self.proxy: HttpProxy | None = None
        self.dns = self.new_dns(settings)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on the host is followed."""
        self._loop = loop
        self._start_resolvers(loop)
        self.follow.start(loop)
        self.ways_out.start(loop)
        if wants_proxy(self._settings):
            self.start_proxy()

    def start_proxy(self) -> HttpProxy:
        """The HTTP proxy, started by now: what is posted to it may switch it on."""
        if self.proxy is None:
            from pyvpnkit.proxy.service import HttpProxy  # where it is used: most networks have none

            self.proxy = HttpProxy(self._stack, self._settings.network, **_proxy_settings(self._settings))
            self.proxy.start()
        return self.proxy

    async def close(self) -> None:
        """Follow no more. Harmless when repeated."""
        self._loop = None
        self.follow.close()
        self.resolvers.close()
        self.ways_out.close()
        self.dns.close()
        proxy, self.proxy = self.proxy, None
        if proxy is not None:
            await proxy.close()

    def forget(self) -> None:
        """The host's network is another one, or may be: what it said before does not count."""
        self.resolvers.network_changed()
        if self._loop is not None:
            self._start_resolvers(self._loop)  # resolv.conf may name a stub by now
        self.dns.network_changed()
        self.ways_out.refresh()

    def _new_resolvers(self, dns: DnsSettings) -> HostResolvers:
        return HostResolvers(
            dns.resolvers,
            resolv_conf=dns.resolv_conf,
            dns_file=dns.file,
            changed=self._resolvers_changed,
            clock=self._clock,
        )

    def _start_resolvers(self, loop: asyncio.AbstractEventLoop) -> None:
        if self.resolvers.needs_start:
            if self._running is not self.resolvers:
                self._running = self.resolvers
                self.resolvers.start(loop)  # wakes up once a second
        else:
            self.resolvers()  # looks at its files when a query asks, and when `follow` sees that one has changed

    def _resolvers_changed(self, found: Resolvers) -> None:
        if not self._settings.network.search:
            self._stack.dhcp.search = found.search
        if self._loop is not None:
            self.follow.watch.resolvers_changed()

    def new_dns(self, settings: Settings) -> DnsServer:
        """A server by these settings, with the sources there are."""
        network = settings.network
        names: dict[str, list[bytes]] = {name: [network.gateway_bytes] for name in network.gateway_names}
        if network.host_alias_bytes is not None:
            names |= {name: [network.host_alias_bytes] for name in network.host_names}
        return DnsServer(
            names=names,
            domain=network.domain,
            lease_address=lambda name: _lease_address(self._stack.leases, name, self._clock()),
            lease_name=lambda address: _lease_name(self._stack.leases, address, self._clock()),
            zones=self._zones,
            hosts_path=settings.dns.hosts_file,
            upstreams=settings.dns.servers,
            source=None if settings.dns.servers else self.resolvers,
            rules=Rules.parse({domain: _rule(what) for domain, what in settings.dns.rules.items()}),
            asker_for=askers(self.resolvers.resolv_conf, cafile=settings.dns.tls_ca, way_to=self._way_to),
            aaaa=settings.dns.aaaa,  # type: ignore[arg-type]  # one of the words, by its parser
            ipv6_route=self.follow.ipv6_route,
            learn=self.names.learn if any(rule_is_by_domain(rule) for rule in settings.way_out) else None,
            clock=self._clock,
        )

    def _way_to(self, server: Server) -> Connect | None:
        """How to connect to a name server that a rule has behind a proxy: what guests ask leaves by the way that they have."""
        upstream = server.upstream
        if not self._stack.ways_out.all:
            return None
        there = Endpoint.of(upstream.address, upstream.port)
        if self._stack.ways_out.find(there) is Way.DIRECT:
            return None

        async def connect(_upstream: Upstream) -> socket.socket:
            return await self.ways_out.connect(there)

        return connect

    # While it runs.

    def reload_dns(self, settings: Settings) -> None:
        """Have these settings. Raises `ConfigError`, and those before hold on."""
        before = self._settings.dns
        moved = any(getattr(before, name) != getattr(settings.dns, name) for name in _SOURCE)
        old_resolvers, old = self.resolvers, self.dns
        if moved:
            self.resolvers = self._new_resolvers(settings.dns)
        try:
            self.dns = self.new_dns(settings)
        except BaseException:
            self.resolvers = old_resolvers
            raise
        self._zones.set_static(fixed_zones(settings.dns.records))
        self._settings = settings
        old.close()
        if moved:
            old_resolvers.close()
            if self._loop is not None:
                self._start_resolvers(self._loop)

    def reload_names(self, settings: Settings) -> None:
        """The same for the domain and the search list that guests are told."""
        self._stack.dhcp.rename(settings.network)
        self.reload_dns(settings)
        if not settings.network.search:
            self._stack.dhcp.search = self.resolvers().search

    def reload_ways_out(self, settings: Settings) -> None:
        """The same for ways out."""
        self.ways_out.replace(settings.way_out, fail=settings.way_out_fail, datagrams=settings.way_out_udp)
        self._settings = settings
        self.reload_dns(settings)  # which may have to tell names now

    def reload_proxy(self, settings: Settings) -> None:
        """The same for the HTTP proxy."""
        self._settings = settings
        if self.proxy is not None:
            wanted = _proxy_settings(settings)
            self.proxy.reload(wanted["settings"], wanted["environment"])
        elif wants_proxy(settings):
            self.start_proxy()

    def status(self) -> Mapping[str, Any]:
        """Plain values."""
        resolvers = self.resolvers()
        return {
            "resolvers": [str(server.upstream) for server in resolvers.servers],
            "resolvers_from": str(self.resolvers.origin) if not self._settings.dns.servers else "settings",
            "host_changes": self.follow.changes,
            "way_out": self.ways_out.status() if self._settings.way_out else "direct",
            "http_proxy": "off"
            if self.proxy is None
            else {
                "on": self.proxy.config is not None,
                "problem": self.proxy.problem,
                **{str(name): count for name, count in self.proxy.counters.items()},
            },
        }


def wants_proxy(settings: Settings) -> bool:
    """Whether anything of the settings may switch the HTTP proxy on."""
    proxy = settings.http_proxy
    return bool(proxy.http or proxy.https or proxy.environment or settings.vpnkit.http or settings.vpnkit.http_api)


def _proxy_settings(settings: Settings) -> dict[str, Any]:
    proxy = settings.http_proxy
    document = {"http": proxy.http, "https": proxy.https, "exclude": ",".join(proxy.exclude) or None}
    return {
        "path": settings.vpnkit.http,
        "settings": document if any(document.values()) else None,
        "environment": dict(os.environ) if proxy.environment else None,
    }


def fixed_zones(records: Mapping[str, str]) -> tuple[Zone, ...]:
    """Zones that have just these names (`*.DOMAIN` is all below), and let others fall through. Raises `ConfigError`."""
    found: dict[str, Zone] = {}
    for name, text in records.items():
        label, dot, parent = name.rstrip(".").lower().partition(".")
        if not dot:
            raise ConfigError(f"dns.records: {name!r} has no domain; write a name such as www.corp.example")
        before = found.get(parent, Zone(name=parent))
        for address in (Endpoint.of(one, 0).address for one in text.split()):
            if label == "*":
                if before.default is not None:
                    raise ConfigError(f"dns.records: {name!r} can have one address only")
                before = dataclasses.replace(before, default=address)
            else:
                before = dataclasses.replace(before, records=(*before.records, ZoneRecord(name=label, address=address)))
        found[parent] = before
    return tuple(found.values())


def _rule(what: str) -> str | list[str]:
    return what if what == "refuse" else what.split()


def rule_is_by_domain(text: str) -> bool:
    """Whether a way-out rule needs names, or tells them to its proxy."""
    from netstack.policy.ways_out import parse

    rule = parse(text)
    return bool(rule.domain) or getattr(rule.way, "by_name", False)


def _lease_address(leases: Leases, name: str, now: float) -> bytes | None:
    lease = leases.named(name, now)
    return None if lease is None else lease.address


def _lease_name(leases: Leases, address: bytes, now: float) -> str | None:
    lease = leases.at(address, now)
    return None if lease is None else lease.hostname or None
