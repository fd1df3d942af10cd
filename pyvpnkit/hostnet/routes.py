"""The state of the host's network at one moment, and what follows from it: which subnet is free, which MTU holds."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from netstack.errors import ConfigError, HostError, Malformed

if TYPE_CHECKING:
    from pyvpnkit.hostnet import netlink

Destination: TypeAlias = IPv4Network | IPv6Network

MIN_MTU: Final = 576
"""What an IPv4 guest can always be told (RFC 791 3.1; `Network.mtu`'s least)."""
WIDE: Final = 8
"""Routes for more addresses than this prefix length has are ways to everywhere (VPN clients split the default route in two),
and no network that could clash."""
SOMEWHERE: Final = bytes((45, 0, 0, 1))
SOMEWHERE_6: Final = ipaddress.IPv6Address("2600::1").packed
"""Addresses of the Internet that nobody makes a special route for. No packet is sent there."""
_NEITHER: Final = (ipaddress.ip_network("fe80::/10"), ipaddress.ip_network("ff00::/8"))
"""Routes every interface has, and loses with each container that ends."""
_PRIVATE: Final = tuple(IPv4Network(text) for text in ("192.168.0.0/16", "172.16.0.0/12", "10.0.0.0/8"))  # RFC 1918 3
_FIRST_TRIED: Final = 65
"""Third octet of the subnets tried first: as VPNKit's, and not those of home routers (0, 1, 2, 178, 188)."""


class Route(NamedTuple):
    """One route of the host."""

    destination: Destination
    interface: str
    metric: int = 0

    def __str__(self) -> str:
        return f"{self.destination} on {self.interface}" if self.interface else f"{self.destination}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Egress:
    """The way out of this host."""

    interface: str
    mtu: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The host's network at one moment."""

    addresses: frozenset[bytes] = frozenset()
    """Of all interfaces, loopback too; 4 or 16 octets."""
    routes: frozenset[Route] = frozenset()
    egress: Egress | None = None
    """`None` while there is no IPv4 default route."""
    ipv6_route: bool = False
    """Whether the IPv6 Internet can be reached as far as this host knows."""


def snapshot() -> Snapshot:
    """Look now; a millisecond on an ordinary Linux host, two programs on macOS. Raises `HostError`."""
    if sys.platform == "darwin":
        from pyvpnkit.hostnet import darwin

        return darwin.snapshot()
    from pyvpnkit.hostnet import netlink

    try:
        with netlink.Asker() as asker:
            interfaces = {link.number: link for link in asker.links()}
            return Snapshot(
                addresses=frozenset(one.octets for one in asker.addresses()),
                routes=frozenset(_routes(asker.routes(), interfaces)),
                egress=_egress(asker.way_to(SOMEWHERE), interfaces),
                ipv6_route=_leads_out(asker.way_to(SOMEWHERE_6), interfaces),
            )
    except (Malformed, OSError) as error:
        raise HostError(f"the host's network cannot be read: {error}") from None


def _routes(entries: Iterable[netlink.RouteEntry], interfaces: dict[int, netlink.Interface]) -> Iterator[Route]:
    from pyvpnkit.hostnet import netlink

    for entry in entries:
        if entry.cloned or entry.table == netlink.TABLE_LOCAL:
            continue
        if entry.kind not in (netlink.UNICAST, netlink.BLACKHOLE, netlink.UNREACHABLE, netlink.PROHIBIT):
            continue
        link = interfaces.get(entry.interface)
        if entry.kind != netlink.UNICAST and link is not None and link.name == "lo" and not entry.prefix:
            continue  # the kernel's own "no default route" of IPv6
        yield from made(entry.destination, entry.prefix, link.name if link is not None else "", entry.metric)


def made(destination: bytes, prefix: int, interface: str, metric: int = 0) -> Iterator[Route]:
    """The route, unless it is one of those that come and go with any interface."""
    network: Destination
    if len(destination) == 4:
        network = IPv4Network((destination, prefix), strict=False)
    else:
        network = IPv6Network((destination, prefix), strict=False)
        if any(isinstance(one, IPv6Network) and network.subnet_of(one) for one in _NEITHER):
            return
    yield Route(destination=network, interface=interface, metric=metric)


def _egress(way: netlink.RouteEntry | None, interfaces: dict[int, netlink.Interface]) -> Egress | None:
    link = interfaces.get(way.interface) if way is not None else None
    if way is None or link is None:
        return None
    return Egress(interface=link.name, mtu=way.mtu or link.mtu)


def _leads_out(way: netlink.RouteEntry | None, interfaces: dict[int, netlink.Interface]) -> bool:
    link = interfaces.get(way.interface) if way is not None else None
    return link is not None and link.name != "lo"


def ipv6_route() -> bool:
    """Whether this host has a way to the IPv6 Internet now; False where that cannot be known."""
    with contextlib.suppress(HostError):
        return snapshot().ipv6_route
    return False


def guest_mtu(egress: Egress | None, highest: int) -> int:
    """What `mtu: auto` tells guests: the way out's MTU, at least 576 and at most `highest`, that of the virtual link."""
    return highest if egress is None else max(MIN_MTU, min(egress.mtu, highest))


# Subnets.


def clashes(subnet: str, routes: Iterable[Route]) -> list[Route]:
    """Routes of the host to addresses that guests take for their own network's, the narrowest first. Guests cannot reach what
    is there, and where the route is the host's own LAN, its resolvers may be among it."""
    network = IPv4Network(subnet)
    found = [route for route in routes if _overlap(network, route)]
    return sorted(found, key=lambda route: (-route.destination.prefixlen, str(route.destination), route.interface))


def _overlap(network: IPv4Network, route: Route) -> bool:
    destination = route.destination
    return (
        isinstance(destination, IPv4Network) and destination.prefixlen >= WIDE and bool(destination.overlaps(network))
    )


def free_subnet(routes: Iterable[Route]) -> str:
    """A private /24 that no route of the host leads to, if possible 192.168.65.0/24 as VPNKit's; `routes` hold the host's own
    networks too.

    The same routes give the same subnet. Where all of RFC 1918 is routed (a VPN that takes everything), it is one that only
    the widest of those routes cover: nothing is known to be there. Raises `ConfigError` when even that is not to be had.
    """
    taken = [route.destination for route in routes if isinstance(route.destination, IPv4Network)]
    taken = [network for network in taken if network.prefixlen >= WIDE]
    for avoided in (taken, [network for network in taken if network.prefixlen > 16]):
        numbers = {number for network in ipaddress.collapse_addresses(avoided) for number in _numbers(network)}
        for number in _candidates():
            if number not in numbers:
                return str(IPv4Network((number << 8, 24)))
    raise ConfigError("subnet: auto: every private network has a route on this host; name one, such as 198.18.65.0/24")


def auto_subnet() -> str:
    """What `subnet: auto` is on this host now. Raises `ConfigError` when nothing is free, or the host cannot be read."""
    try:
        return free_subnet(snapshot().routes)
    except HostError as error:
        raise ConfigError(f"subnet: auto: {error}; name a network, such as 192.168.65.0/24") from None


def _numbers(network: IPv4Network) -> range:
    """The /24 networks that it touches, each by its first 24 bits."""
    return range(int(network.network_address) >> 8, (int(network.broadcast_address) >> 8) + 1)


def _candidates() -> Iterator[int]:
    """Private /24 networks by their first 24 bits, the default first."""
    thirds = [*range(_FIRST_TRIED, 255), *range(3, _FIRST_TRIED)]
    for private in _PRIVATE:
        first = int(private.network_address) >> 16
        # Networks of clouds and containers begin at the low end of 10/8 and 172.16/12, so that comes last.
        for second in reversed(range(first, first + (1 << (16 - private.prefixlen)))):
            yield from (second << 8 | third for third in thirds)
