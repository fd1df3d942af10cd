"""What a virtual network can be told: plain frozen values with VPNKit's defaults.

`pyvpnkit.config` fills these from YAML and the command line; nothing here reads a file. Addresses are dotted text at this
edge and become 4-octet `bytes` (network order) inside the stack.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from netstack.errors import ConfigError

DEFAULT_GATEWAY_MAC = "f6:16:36:bc:f9:c6"


def parse_mac(text: str) -> bytes:
    """Six octets of `aa:bb:cc:dd:ee:ff` (also with `-`); raises `ConfigError` on anything else."""
    parts = text.replace("-", ":").split(":")
    try:
        octets = bytes(int(part, 16) for part in parts)
    except ValueError:
        octets = b""
    if len(parts) != 6 or len(octets) != 6:
        raise ConfigError(f"{text!r} is not a MAC address; write six hexadecimal octets such as 02:00:00:00:00:01")
    return octets


def format_mac(octets: bytes) -> str:
    """`aa:bb:cc:dd:ee:ff` of six octets."""
    return octets.hex(":")


def parse_ipv4(text: str, setting: str = "address") -> bytes:
    """Four octets of a dotted IPv4 address; raises `ConfigError` that names `setting`."""
    try:
        return ipaddress.IPv4Address(text).packed
    except ValueError:
        raise ConfigError(f"{setting}: {text!r} is not an IPv4 address; write it as in 192.168.65.1") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a guest can make us hold. What a bound turned away is counted among the drops (`netstack.observe.metrics`)."""

    max_flows: int = 16384
    """TCP flows of all guests together; a SYN beyond it is answered RST."""
    max_udp_flows: int = 1024
    """UDP mappings (one host socket each) of one guest; beyond it the one idle longest goes (VPNKit: 1024)."""
    max_pings: int = 256
    """Ping sockets (one per guest address and identifier)."""
    max_neighbours: int = 256
    """Guest addresses and MAC addresses learnt, per network."""
    max_fragments: int = 64
    """Datagrams being reassembled at once."""
    max_fragment_octets: int = 4 << 20
    """Octets held for reassembly, all datagrams together."""
    max_leases_per_port: int = 16
    """DHCP leases that one link may hold."""
    flow_buffer: int = 1 << 20
    """Octets held per TCP flow and direction before back-pressure stops the sender."""
    max_memory: int = 256 << 20
    """Octets that all TCP flows together may hold for hosts that do not read; from half of it on windows stop opening, a flow
    that would hold more than all of it is reset."""
    descriptor_reserve: int = 64
    """Descriptors kept free for listeners, DNS and control when guests use up the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Seconds. `0` for `tcp_idle_s` means never (the default)."""

    tcp_connect_s: float = 127.0
    """A host connect that takes longer is given up with ICMP host unreachable; the host's own limit usually comes first."""
    tcp_idle_s: float = 0.0
    """Reset a TCP flow idle this long; VPNKit's notorious 300 s is off by default."""
    tcp_user_s: float = 900.0
    """Data the guest leaves unacknowledged this long resets the flow (RFC 9293 3.8.3)."""
    tcp_fin_wait_s: float = 60.0
    """A half-closed flow whose host socket is gone waits this long for the guest's FIN."""
    tcp_time_wait_s: float = 10.0
    """How long a closed flow is remembered (TIME_WAIT); short, since the link is one hop."""
    udp_idle_s: float = 90.0
    """A UDP mapping unused in both directions."""
    udp_short_s: float = 5.0
    """A UDP mapping whose DNS or NTP exchange was answered."""
    ping_idle_s: float = 60.0
    """An ICMP echo identifier unused (VPNKit: 60 s)."""
    reassembly_s: float = 30.0
    """How long fragments wait for the rest of their datagram (RFC 791, RFC 1122 3.3.2)."""
    grace_s: float = 5.0
    """After SIGTERM: how long flows may finish."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """One virtual network as its guests see it. VPNKit's defaults; checked at construction (`ConfigError`)."""

    subnet: str = "192.168.65.0/24"
    """The network guests are in, /29 or larger. In another one gateway and host alias are its first two addresses."""
    gateway: str = "192.168.65.1"
    """Router, DHCP, DNS (53) and NTP (123) server."""
    host_alias: str | None = "192.168.65.2"
    """Address at which guests reach the host's 127.0.0.1; `off` (`None`) turns it off. It may be the gateway's, whose services go
    first then."""
    gateway_aliases: tuple[str, ...] = ()
    """Further addresses of the gateway, with its name and time services; addresses of the subnet."""
    pool_first: str | None = None
    """First address for guests; default: the first of the subnet after gateway and host alias."""
    pool_last: str | None = None
    """Last address for guests; default: the last usable one of the subnet."""
    gateway_mac: str = DEFAULT_GATEWAY_MAC
    """Hardware address of the gateway and the host alias."""
    mtu: int = 1500
    """IP MTU of the virtual link, announced by DHCP; frames are up to 14 octets longer."""
    domain: str | None = "internal"
    """Domain told to guests (DHCP option 15), and the domain of lease host names."""
    search: tuple[str, ...] = ()
    """Domains the guest searches (DHCP option 119)."""
    dns_servers: tuple[str, ...] = ()
    """DNS servers told to guests (DHCP option 6); empty means the gateway."""
    ntp_servers: tuple[str, ...] = ()
    """Time servers told to guests (DHCP option 42); empty means the gateway."""
    gateway_names: tuple[str, ...] = ("gateway.internal",)
    """Names that DNS answers with the gateway's address."""
    host_names: tuple[str, ...] = ("host.internal",)
    """Names that DNS answers with the host alias."""
    static_leases: Mapping[str, str] = field(default_factory=dict)
    """Addresses kept for certain guests: MAC address -> IPv4 address."""
    lease_s: int = 86400
    """DHCP lease time; renewals are answered from the stored table, also after a restart."""
    routed: tuple[str, ...] = ()
    """Networks behind guests that are accepted as source besides the subnet."""
    strict_sources: bool = False
    """Accept only leased addresses as source."""
    udp_filtering: str = "independent"
    """`independent` (any remote may answer, hole punching works) or `endpoint`."""
    allow: tuple[str, ...] = ()
    """Networks exempt from the built-in refusals (host loopback spellings, link-local, metadata)."""
    limits: Limits = field(default_factory=Limits)
    timeouts: Timeouts = field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        try:
            network = ipaddress.IPv4Network(self.subnet)
        except ValueError as error:
            raise ConfigError(f"subnet: {self.subnet!r} ({error}); write a network such as 192.168.65.0/24") from None
        if network.prefixlen > 29:
            raise ConfigError(
                f"subnet: {self.subnet!r} has no room for gateway, host alias and guests; use /29 or larger"
            )
        fixed: dict[str, str] = {"gateway": self.gateway}
        if self.host_alias is not None:
            fixed["host_alias"] = self.host_alias
        named = [*fixed.items(), *(("gateway_aliases", text) for text in self.gateway_aliases)]
        for name, text in named:
            address = ipaddress.IPv4Address(parse_ipv4(text, name))
            if address not in network or address in (network.network_address, network.broadcast_address):
                raise ConfigError(f"{name}: {text} is not a usable address of {self.subnet}")
        for text in self.gateway_aliases:
            if text in fixed.values():
                raise ConfigError(f"gateway_aliases: {text} is the gateway or the host alias already; leave it out")
        if not 576 <= self.mtu <= 65520:
            raise ConfigError(f"mtu: {self.mtu} is outside 576..65520")
        if self.udp_filtering not in ("independent", "endpoint"):
            raise ConfigError(f"udp_filtering: {self.udp_filtering!r}; use 'independent' or 'endpoint'")
        parse_mac(self.gateway_mac)
        for mac, address_text in self.static_leases.items():
            parse_mac(mac)
            if ipaddress.IPv4Address(parse_ipv4(address_text, "static_leases")) not in network:
                raise ConfigError(f"static_leases: {address_text} is not in {self.subnet}")
        first, last = self.pool
        if first > last:
            raise ConfigError(
                f"pool: {first} comes after {last}; give pool_first before pool_last inside {self.subnet}"
            )

    @cached_property
    def network(self) -> ipaddress.IPv4Network:
        return ipaddress.IPv4Network(self.subnet)

    @cached_property
    def gateway_bytes(self) -> bytes:
        return parse_ipv4(self.gateway)

    @cached_property
    def host_alias_bytes(self) -> bytes | None:
        return None if self.host_alias is None else parse_ipv4(self.host_alias)

    @cached_property
    def gateway_aliases_bytes(self) -> tuple[bytes, ...]:
        return tuple(map(parse_ipv4, self.gateway_aliases))

    @cached_property
    def own_addresses(self) -> frozenset[bytes]:
        """Gateway, its aliases and the host alias: those that are ours and never a guest's."""
        alias = self.host_alias_bytes
        return frozenset({self.gateway_bytes, *self.gateway_aliases_bytes, *([] if alias is None else [alias])})

    @cached_property
    def gateway_mac_bytes(self) -> bytes:
        return parse_mac(self.gateway_mac)

    @cached_property
    def pool(self) -> tuple[ipaddress.IPv4Address, ipaddress.IPv4Address]:
        """First and last address a guest may be given, both inclusive."""
        network = self.network
        taken = set(map(ipaddress.IPv4Address, self.own_addresses))
        if self.pool_first is not None:
            first = ipaddress.IPv4Address(parse_ipv4(self.pool_first, "pool_first"))
        else:
            first = network.network_address + 1
            while first in taken:
                first += 1
        if self.pool_last is not None:
            last = ipaddress.IPv4Address(parse_ipv4(self.pool_last, "pool_last"))
        else:
            last = network.broadcast_address - 1
        for name, address in (("pool_first", first), ("pool_last", last)):
            if address not in network:
                raise ConfigError(f"{name}: {address} is not in {self.subnet}")
        return first, last
