"""Which way guests' connections leave the host: directly, not at all, or through a proxy.

    MATCH[:PORT] -> WAY         the first rule that matches wins; what no rule matches goes directly

    MATCH   *                   every destination
            10.0.0.0/8          an address or a prefix; of IPv6 in brackets where a port follows: [2001:db8::/32]:443
            corp.example        the domain and everything below; *.corp.example and .corp.example say the same
    WAY     direct              a socket of the host, as without rules
            refuse              RST for a connection, ICMP prohibited for others
            socks5://[USER:PASSWORD@]HOST:PORT      RFC 1928; the proxy is told the address
            socks5h://...                           the same; it is told the name, where one is known
            http://[USER:PASSWORD@]HOST:PORT        CONNECT (RFC 9110 9.3.6); it is told the name, where one is known

Rules are asked about the final numeric destination of what egress policy allows, so they open nothing that it refuses. Names
are those that our DNS gave out for the address (`netstack.policy.names`): a rule by domain matches if one of them is below it.

Datagrams and pings ask the same rules (a ping has no port, so only rules without one match it). No proxy here carries them:
where the rule names one they are refused, or go directly if so told. Pure.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote, unquote

from netstack.api import Endpoint, OutwardProxy, Way, WayOutRule
from netstack.errors import ConfigError
from netstack.policy.names import Names, NamesOf, host_name

SCHEMES: Final = ("socks5", "socks5h", "http")
MAX_RULES: Final = 1024
_FORM: Final = "MATCH[:PORT] -> direct | refuse | socks5://HOST:PORT | socks5h://HOST:PORT | http://HOST:PORT"
_DOMAIN: Final = re.compile(r"(?:\*?\.)?((?!-)[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*)\.?", re.ASCII)
_LOOPBACK: Final = bytes(15) + b"\1"
_HOST: Final = re.compile(r"[A-Za-z0-9_.-]{1,253}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Outward:
    """A decision: ask `proxy` for a connection to `endpoint`, by `name` where there is one."""

    proxy: OutwardProxy
    endpoint: Endpoint
    name: str = ""


def _shown(text: str) -> str:
    """`text` without what may be credentials, for messages."""
    scheme, separator, _rest = text.partition("://")
    shown = f"{scheme}://..." if separator else text.rpartition("@")[2]
    return repr(shown)


def parse(text: str) -> WayOutRule:
    """The rule in `text`, see the module. Raises `ConfigError`, whose text shows no credentials."""
    to, arrow, way = text.partition("->")
    if not arrow:
        raise ConfigError(f"way_out: {_shown(text)} has no ->; write {_FORM}")
    prefix, domain, port = _parse_match(to.strip(), text)
    return WayOutRule(prefix, domain, port, _parse_way(way.strip(), text))


def spelled(rule: WayOutRule) -> str:
    """The text that `parse` reads as `rule`, with its credentials; `str(rule)` has none."""
    return f"{rule.match} -> {rule.way.value if isinstance(rule.way, Way) else _spelled_proxy(rule.way)}"


def _spelled_proxy(proxy: OutwardProxy) -> str:
    if not proxy.user and not proxy.password:
        return str(proxy)
    return str(proxy).replace("//***@", f"//{quote(proxy.user, safe='')}:{quote(proxy.password, safe='')}@", 1)


def _parse_port(text: str, whole: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535):
        raise ConfigError(f"way_out: {_shown(whole)}: its port: write a number from 1 to 65535")
    return int(text)


def _parse_match(to: str, whole: str) -> tuple[ipaddress.IPv4Network | ipaddress.IPv6Network | None, str, int]:
    port = 0
    if to.startswith("["):
        to, bracket, rest = to[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ConfigError(f"way_out: {_shown(whole)}: write [ADDRESS/BITS] or [ADDRESS/BITS]:PORT for IPv6")
        if rest:
            port = _parse_port(rest[1:], whole)
    elif to.count(":") == 1:
        to, _, rest = to.partition(":")
        port = _parse_port(rest, whole)
    if to == "*":
        return None, "", port
    try:
        return ipaddress.ip_network(to), "", port
    except ValueError as error:
        domain = _DOMAIN.fullmatch(to.lower())
        # What ends in a number is an address with a mistake: no name of a host ends so (RFC 3696 2).
        if domain is None or re.fullmatch(r"[0-9/]+", domain[1].rpartition(".")[2]):
            raise ConfigError(
                f"way_out: {_shown(whole)}: {_shown(to)} is no prefix and no domain{'' if '@' in to else f' ({error})'}"
            ) from None
        return None, domain[1], port


def _parse_way(way: str, whole: str) -> OutwardProxy | Way:
    if way in ("direct", "refuse"):
        return Way(way)
    scheme, separator, rest = way.partition("://")
    if not separator or scheme not in SCHEMES:
        raise ConfigError(f"way_out: {_shown(whole)}: no such way out; write {_FORM}")
    credentials, at, where = rest.rpartition("@")
    user, _, password = credentials.partition(":")
    user, password = unquote(user, errors="surrogateescape"), unquote(password, errors="surrogateescape")
    where = where.removesuffix("/")
    host, colon, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f"way_out: {_shown(whole)}: no IPv6 address in the brackets") from None
    elif not colon or not _HOST.fullmatch(host):
        raise ConfigError(f"way_out: {_shown(whole)}: write the proxy as {scheme}://HOST:PORT")
    if at and not user:
        raise ConfigError(f"way_out: {_shown(whole)}: write credentials as USER:PASSWORD")
    if scheme == "http":
        if ":" in user or any(character < " " or character == "\x7f" for character in user + password):
            raise ConfigError(f"way_out: {_shown(whole)}: Basic credentials hold no colon in the user and no control")
    elif at and not (len(octets_of(user)) <= 255 and 1 <= len(octets_of(password)) <= 255):  # RFC 1929 2
        raise ConfigError(f"way_out: {_shown(whole)}: SOCKS5 wants a user and a password of 1 to 255 octets")
    return OutwardProxy(scheme, host, _parse_port(port, whole), user, password)


def octets_of(text: str) -> bytes:
    """A user or password as it is sent."""
    return text.encode("utf-8", "surrogateescape")


class Ways:
    """The rules of one network."""

    def __init__(self) -> None:
        self.all: tuple[WayOutRule, ...] = ()
        self.fail_open = False
        """Where a proxy cannot be reached, connections go directly."""
        self.datagrams = False
        """Datagrams and pings go directly where a rule names a proxy."""
        self.names: NamesOf = Names()
        self._compiled: tuple[tuple[int, int, int, str, int, WayOutRule], ...] = ()
        self._by_name = False

    def __bool__(self) -> bool:
        return bool(self._compiled)

    def replace(self, rules: Sequence[WayOutRule], *, fail_open: bool = False, datagrams: bool = False) -> None:
        """Have these, in place of those before."""
        self.all = tuple(rules)
        self.fail_open = fail_open
        self.datagrams = datagrams
        compiled = []
        for rule in rules:
            prefix = rule.prefix
            number = (0, 0, 0)
            if prefix is not None:
                number = (prefix.max_prefixlen // 8, int(prefix.netmask), int(prefix.network_address))
            compiled.append((*number, rule.domain, rule.port, rule))
        self._compiled = tuple(compiled)
        self._by_name = any(
            rule.domain or (isinstance(rule.way, OutwardProxy) and rule.way.by_name) for rule in self.all
        )

    def find(self, destination: Endpoint, name: str = "") -> Outward | Way:
        """The way to `destination`; `name` where the asker knows by which name it was found. Linear, once per connection.

        The host's own loopback is on this side of every proxy.
        """
        octets = len(destination.address)
        if destination.address[0] == 127 if octets == 4 else destination.address == _LOOPBACK:
            return Way.DIRECT
        number = int.from_bytes(destination.address, "big")
        name = host_name(name)
        names: Sequence[str] = (name,) if name else ()
        if not names and self._by_name:
            names = self.names.names_of(destination.address)
        for length, mask, network, domain, port, rule in self._compiled:
            if port not in (0, destination.port):
                continue
            known = names[0] if names else ""
            if domain:
                known = next((each for each in names if below(each, domain)), "")
                if not known:
                    continue
            elif length and (length != octets or number & mask != network):
                continue
            if isinstance(rule.way, Way):
                return rule.way
            return Outward(rule.way, destination, known if rule.way.by_name else "")
        return Way.DIRECT


def below(name: str, domain: str) -> bool:
    """Whether `name` is `domain` or in it."""
    return name.endswith(domain) and (len(name) == len(domain) or name[-len(domain) - 1] == ".")
