"""May a guest's packet leave, and to where: the one decision point of flow creation.

Asked once per new flow (TCP connect, UDP association, ping), with the final numeric address and never a name, so that a
DNS answer or a literal in another notation cannot lead around it (spec threats G25, G26). The answer is a value:

- `Allow`: use the host's own socket towards this address;
- `Rewrite(endpoint)`: the host alias, by which the guest means the host's loopback, or a port of the gateway that leads
  elsewhere (`netstack.policy.gateway_forwards`);
- `Tunnel(path, endpoint)`: TCP alone; a program on the host takes the connection (`netstack.policy.tunnels`);
- `Outward(proxy, endpoint, name)`: TCP alone; through a proxy (`netstack.policy.ways_out`);
- `Deny(reason, answer)`: no socket is opened; `answer` says how the guest is told.

Rules, first match wins (DESIGN 9, threats 3.6). An IPv6 address that carries an IPv4 address (mapped, translated,
compatible, NAT64, 6to4, Teredo, ISATAP) must pass the rules as that IPv4 address too.

1. The network's own addresses: gateway (its forwards; services were asked before), host alias, subnet, routed prefixes.
2. Addresses that name nobody a flow can be made with: broadcast and multicast.
3. `network.allow` prefixes are exempt from what follows (and may admit multicast).
4. The host's loopback in any notation, unspecified, link-local, metadata, reserved.
5. The host's own addresses, where `refuse` was told of any.

A tunnel is no way around this: a rule for a wide prefix takes only what may leave, and the rest stays refused. A rule for one
single address is the operator's word that guests may speak to it, as `allow` is, so it takes metadata services, link-local
and own addresses too; never loopback in the guest's own notation, and nothing of the virtual network.

Ways out are asked about what may leave, and nothing else.
"""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from netstack.api import Endpoint, Way
from netstack.errors import ConfigError
from netstack.policy.gateway_forwards import GatewayForwards
from netstack.policy.tunnels import Tunnels
from netstack.policy.ways_out import Outward, Ways
from netstack.settings import Network

LOOPBACK: Final = bytes((127, 0, 0, 1))


class Answer(enum.Enum):
    """How a refused guest is told: TCP by RST, others by this code of ICMP unreachable (RFC 792, RFC 1812 5.2.7.1)."""

    REFUSED = 3
    """Port unreachable: the address is ours, nothing listens."""
    PROHIBITED = 13
    """Communication administratively prohibited."""
    UNREACHABLE = 1
    """Host unreachable: an address of the virtual network that nobody has."""
    SILENT = -1
    """Nothing: RFC 1122 3.2.2 forbids errors about broadcast and multicast."""


@dataclass(frozen=True, slots=True)
class Allow:
    """Use a host socket towards the address the guest named."""


@dataclass(frozen=True, slots=True)
class Deny:
    """Open no socket. `reason` is for people and counters."""

    reason: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Use a host socket towards `endpoint` in place of what the guest named."""

    endpoint: Endpoint
    where: tuple[str, int] = field(init=False)
    """The endpoint as a socket wants it."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "where", (self.endpoint.text, self.endpoint.port))


@dataclass(frozen=True, slots=True)
class Tunnel:
    """Speak to the program at the unix socket `path` about `endpoint`, in place of a connection to it."""

    path: str
    endpoint: Endpoint


Decision: TypeAlias = Allow | Deny | Rewrite
Prefix: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

ALLOW: Final = Allow()

_NO_SERVICE: Final = Deny("no service on the gateway at this port", Answer.REFUSED)
_SUBNET: Final = Deny("an address of the virtual network is not on the host", Answer.UNREACHABLE)
_ROUTED: Final = Deny("a prefix routed to a guest is not on the host", Answer.UNREACHABLE)
_BROADCAST: Final = Deny("broadcast does not leave the virtual network", Answer.SILENT)
_MULTICAST: Final = Deny("multicast does not leave the virtual network", Answer.SILENT)
_OWN: Final = Deny("the host's own address", Answer.PROHIBITED)
_WAY_REFUSES: Final = Deny("a way-out rule refuses it", Answer.REFUSED)
_NO_WAY_OUT: Final = Deny("a way-out rule refuses it", Answer.PROHIBITED)
_NO_DATAGRAMS: Final = Deny("the proxy on the way out carries TCP alone", Answer.PROHIBITED)
_TCP: Final = 6


def _deny(reason: str) -> Deny:
    return Deny(reason, Answer.PROHIBITED)


_RULES: Final[tuple[tuple[Prefix, Deny], ...]] = tuple(
    (ipaddress.ip_network(prefix), _deny(reason))
    for prefix, reason in (
        ("0.0.0.0/8", "unspecified address"),  # Linux connects 0.0.0.0 to its own loopback
        ("127.0.0.0/8", "the host's loopback"),
        ("169.254.0.0/16", "link-local address"),  # holds 169.254.169.254, the metadata service of most clouds
        ("168.63.129.16/32", "metadata service"),  # Azure
        ("100.100.100.200/32", "metadata service"),  # Alibaba
        ("192.0.0.192/32", "metadata service"),  # Oracle
        ("240.0.0.0/4", "reserved address"),  # RFC 1112 4, class E
        ("::/128", "unspecified address"),
        ("::1/128", "the host's loopback"),
        ("fe80::/10", "link-local address"),
        ("fec0::/10", "site-local address"),  # RFC 3879: deprecated, must not be treated as global
        ("fd00:ec2::254/128", "metadata service"),  # Amazon
        ("fd20:ce::254/128", "metadata service"),  # Google
    )
)
_LIMITED_BROADCAST: Final = b"\xff\xff\xff\xff"

_TEREDO: Final = bytes.fromhex("20010000")  # RFC 4380 4: server, flags, port and client address, the last two inverted
_SIXTOFOUR: Final = b"\x20\x02"  # RFC 3056 2
_NAT64: Final = bytes.fromhex("0064ff9b")  # RFC 6052 2.1 (::/96), RFC 8215 (1::/48)
_ISATAP: Final = (bytes.fromhex("00005efe"), bytes.fromhex("02005efe"))  # RFC 5214 6.1


def embedded_ipv4(address: bytes) -> tuple[bytes, ...]:
    """The IPv4 addresses (4 octets each) that a 16-octet IPv6 address leads to by a standard embedding; often none.

    RFC 4291 2.5.5 (compatible, mapped), RFC 2765 2.1 (translated), RFC 6052 2.2 and RFC 8215 (NAT64), RFC 3056 (6to4),
    RFC 4380 (Teredo: server and client), RFC 5214 (ISATAP).
    """
    found: list[bytes] = []
    tail = address[12:]
    if address[:12] == bytes(12) and int.from_bytes(tail, "big") > 1:
        found.append(tail)
    elif address[:10] == bytes(10) and address[10:12] == b"\xff\xff":
        found.append(tail)
    elif address[:8] == bytes(8) and address[8:12] == b"\xff\xff\x00\x00":
        found.append(tail)
    elif address[:4] == _NAT64:
        if address[4:6] == b"\x00\x01":  # RFC 6052 2.2: with a /48 prefix the octets lie around the zero octet 8
            found.append(address[6:8] + address[9:11])
        found.append(tail)
    elif address[:2] == _SIXTOFOUR:
        found.append(address[2:6])
    elif address[:4] == _TEREDO:
        found.append(address[4:8])
        found.append(bytes(octet ^ 0xFF for octet in tail))
    if address[8:12] in _ISATAP:
        found.append(tail)
    return tuple(found)


def _prefixes(setting: str, texts: Iterable[str]) -> tuple[Prefix, ...]:
    prefixes = []
    for text in texts:
        try:
            prefixes.append(ipaddress.ip_network(text))
        except ValueError as error:
            raise ConfigError(f"{setting}: {text!r} ({error}); write a prefix such as 10.0.0.0/8") from None
    return tuple(prefixes)


def _within(address: bytes, prefixes: Iterable[Prefix]) -> bool:
    parsed = ipaddress.ip_address(address)
    return any(parsed.version == prefix.version and parsed in prefix for prefix in prefixes)


class Egress:
    """The rules of one network. Pure: the same question has the same answer until the rules are replaced.

    Raises `ConfigError` when `network.allow` or `network.routed` holds something that is no prefix.
    """

    CACHE: Final = 4096
    """Verdicts kept, one per destination address; a guest that scans more makes us think again, nothing else."""

    def __init__(self, network: Network) -> None:
        self._gateway = network.gateway_bytes
        self._alias = network.host_alias_bytes
        self._gateway_aliases = frozenset(network.gateway_aliases_bytes)
        self._subnet = network.network
        self._allowed = _prefixes("allow", network.allow)
        self._routed = _prefixes("routed", network.routed)
        self._own: frozenset[bytes] = frozenset()
        self._verdicts: dict[bytes, Allow | Deny] = {}
        self._rewrites: dict[int, Rewrite] = {}
        self.gateway_forwards = GatewayForwards()
        self.tunnels = Tunnels()
        self.ways_out = Ways()

    def refuse(self, addresses: Iterable[bytes]) -> None:
        """Deny these destinations too (4 or 16 octets each), in place of those given before: the host's own."""
        self._own = frozenset(addresses)
        self._verdicts.clear()

    def decide(self, protocol: int, destination: bytes, port: int) -> Decision:
        """The verdict on one new flow. HOT PATH: once per TCP connect and UDP association.

        `protocol` is the IP protocol number, `destination` the numeric address in network order, `port` 0 where the
        protocol has none.
        """
        decision = self._decide(protocol, destination, port)
        if self.ways_out and protocol != _TCP and not isinstance(decision, Deny):
            way = self._way(decision, destination, port)
            if way is Way.REFUSE or (isinstance(way, Outward) and not self.ways_out.datagrams):
                return _NO_WAY_OUT if way is Way.REFUSE else _NO_DATAGRAMS
        return decision

    def _decide(self, protocol: int, destination: bytes, port: int) -> Decision:
        verdict = self._verdicts.get(destination)
        if verdict is not None:
            return verdict
        if destination == self._gateway:
            # Not among the remembered verdicts, which are the same for all ports.
            elsewhere = self.gateway_forwards.find(protocol, port)
            if elsewhere is not None:
                return Rewrite(elsewhere)
            if destination != self._alias:
                return _NO_SERVICE
        if destination == self._alias:
            rewrite = self._rewrites.get(port)
            if rewrite is None:
                rewrite = self._rewrites[port] = Rewrite(Endpoint(LOOPBACK, port))
            return rewrite
        verdict = self._judge(destination)
        if len(self._verdicts) >= self.CACHE:
            self._verdicts.clear()
        self._verdicts[bytes(destination)] = verdict
        return verdict

    def overrides(self, protocol: int, destination: bytes, port: int) -> bool:
        """Whether a service of ours there stands back for a gateway forward."""
        return destination == self._gateway and self.gateway_forwards.find(protocol, port) is not None

    def led(self, destination: bytes, port: int) -> Decision | Tunnel | Outward:
        """As `decide` for a TCP connection, where there are tunnels or ways out. A tunnel goes first."""
        decision = self._tunnelled(destination, port)
        if not self.ways_out or isinstance(decision, Deny | Tunnel):
            return decision
        way = self._way(decision, destination, port)
        if way is Way.REFUSE:
            return _WAY_REFUSES
        return decision if way is Way.DIRECT else way

    def _way(self, decision: Allow | Rewrite, destination: bytes, port: int) -> Outward | Way:
        endpoint = decision.endpoint if isinstance(decision, Rewrite) else Endpoint(bytes(destination), port)
        return self.ways_out.find(endpoint)

    def _tunnelled(self, destination: bytes, port: int) -> Decision | Tunnel:
        decision = self._decide(_TCP, destination, port)
        endpoint = decision.endpoint if isinstance(decision, Rewrite) else Endpoint(bytes(destination), port)
        rule = self.tunnels.find(endpoint) if self.tunnels else None
        if rule is None:
            return decision
        if isinstance(decision, Deny):
            single = rule.prefix.prefixlen == rule.prefix.max_prefixlen
            if decision.answer is not Answer.PROHIBITED or not single or destination[0] in (0, 127):
                return decision
        return Tunnel(rule.path, endpoint)

    def _judge(self, destination: bytes) -> Allow | Deny:
        verdict = self._judge_one(destination)
        if verdict is ALLOW and len(destination) == 16 and not _within(destination, self._allowed):
            for inner in embedded_ipv4(destination):
                verdict = self._judge_one(inner) if inner != self._alias else _SUBNET
                if verdict is not ALLOW:
                    return verdict
        return verdict

    def _judge_one(self, destination: bytes) -> Allow | Deny:
        if len(destination) not in (4, 16):
            return _deny(f"an address of {len(destination)} octets")
        if destination == self._gateway or destination in self._gateway_aliases:
            return _NO_SERVICE
        address = ipaddress.ip_address(destination)
        if destination == _LIMITED_BROADCAST or address == self._subnet.broadcast_address:
            return _BROADCAST
        if address.version == 4 and address in self._subnet:
            return _SUBNET
        if _within(destination, self._routed):
            return _ROUTED
        if _within(destination, self._allowed):
            return ALLOW
        if address.is_multicast:
            return _MULTICAST
        for prefix, verdict in _RULES:
            if address.version == prefix.version and address in prefix:
                return verdict
        if destination in self._own:
            return _OWN
        return ALLOW
