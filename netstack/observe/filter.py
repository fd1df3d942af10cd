"""Filters for live captures, in the words of tcpdump (pcap-filter(7)); compiled to a function of one frame.

    expression = term { (and | or) (term | id) }        and, or: equal in rank, from left to right, as libpcap has it
    term       = not term | ( expression ) | word | qualifiers id
    word       = arp rarp ip ip6 tcp udp sctp icmp icmp6 dns dhcp
    qualifiers = [arp rarp ip ip6 ether | tcp udp sctp] [src | dst | src or dst | src and dst] [host net | port portrange]
    id         = ADDRESS | CIDR | MAC | NUMBER | LOW-HIGH | ( id { (and | or) id } )

`&&`, `||` and `!` are `and`, `or` and `not`. A value without qualifiers has those of the term before it (`port 80 or 443`, `host A
and (B or C)`). Two terms side by side are an error, as with tcpdump. Nothing at all lets every frame through.

Apart from tcpdump: `dns` (TCP or UDP port 53) and `dhcp` (UDP ports 67 and 68) are words; names of hosts and services are not
looked up; VLAN tags (802.1Q, 802.1ad; two of them) are looked behind without being asked to. As there: ports are seen in first
fragments only and, of IPv6, without extension headers; `host` and `net` are also about ARP's addresses. What is cut off a frame
matches nothing.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from struct import Struct
from typing import Final, NamedTuple, NoReturn, TypeAlias

from netstack.errors import ConfigError

MAX_TEXT: Final = 4096
MAX_DEPTH: Final = 64
"""Of parentheses and negations."""

IPV4: Final = 0x0800
ARP: Final = 0x0806
RARP: Final = 0x8035
IPV6: Final = 0x86DD
_TAGS: Final = frozenset((0x8100, 0x88A8))
_FRAGMENT: Final = 44  # IPv6's fragment header (RFC 8200 4.5)
_WITH_PORTS: Final = frozenset((6, 17, 132))
_PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132}
_FAMILIES: Final = {"arp": ARP, "rarp": RARP, "ip": IPV4, "ip6": IPV6}
_ROLES: Final = frozenset(("src", "dst"))
_KINDS: Final = frozenset(("host", "net", "port", "portrange"))
_ACCEPTED: Final = (
    "host, net, port, portrange, each with src or dst; ether host; arp, ip, ip6, tcp, udp, sctp, icmp, icmp6, dns, dhcp; "
    "and, or, not, ( )"
)
_TOKEN: Final = re.compile(r"\s*(\(|\)|!|&&|\|\||[^\s()!&|]+|\S)")
_MAC: Final = re.compile(r"[0-9A-Fa-f]{1,2}([:.-][0-9A-Fa-f]{1,2}){5}")
_RANGE: Final = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")
_ADDRESSES: Final = Struct("!II").unpack_from
_SHORT: Final = Struct("!H").unpack_from
_PORTS: Final = Struct("!HH").unpack_from


class Fields(NamedTuple):
    """What filters ask of a frame; -1 for what it does not have. Addresses are numbers."""

    frame: bytes | memoryview
    kind: int
    source: int
    destination: int
    protocol: int
    """The header behind IP's own."""
    inner: int
    """The same, or what an IPv6 fragment header has behind it."""
    source_port: int
    destination_port: int


Test: TypeAlias = Callable[[Fields], bool]


def fields(frame: bytes | memoryview) -> Fields:
    """Look at an Ethernet frame of any length."""
    length = len(frame)
    kind = source = destination = protocol = inner = source_port = destination_port = -1
    if length >= 14:
        at = 14
        (kind,) = _SHORT(frame, 12)
        for _ in range(2):
            if kind in _TAGS and length >= at + 4:
                (kind,) = _SHORT(frame, at + 2)
                at += 4
        ports_at = 0
        if kind == IPV4 and length >= at + 20:
            protocol = inner = frame[at + 9]
            source, destination = _ADDRESSES(frame, at + 12)
            if not _SHORT(frame, at + 6)[0] & 0x1FFF:
                ports_at = at + ((frame[at] & 15) << 2)
        elif kind == IPV6 and length >= at + 40:
            protocol = inner = frame[at + 6]
            source = int.from_bytes(frame[at + 8 : at + 24], "big")
            destination = int.from_bytes(frame[at + 24 : at + 40], "big")
            if protocol == _FRAGMENT and length > at + 40:
                inner = frame[at + 40]
            ports_at = at + 40
        elif kind in (ARP, RARP) and length >= at + 28:
            source = int.from_bytes(frame[at + 14 : at + 18], "big")
            destination = int.from_bytes(frame[at + 24 : at + 28], "big")
        if protocol in _WITH_PORTS and ports_at and length >= ports_at + 4:
            source_port, destination_port = _PORTS(frame, ports_at)
    return Fields(frame, kind, source, destination, protocol, inner, source_port, destination_port)


class Filter:
    """Call it with an Ethernet frame: whether the frame passes. `text` is what it was made of."""

    __slots__ = ("_test", "text")

    def __init__(self, text: str, test: Test | None) -> None:
        self.text = text
        self._test = test

    def __call__(self, frame: bytes | memoryview) -> bool:
        return self._test is None or self._test(fields(frame))

    def __str__(self) -> str:
        return self.text


def compile_filter(text: str) -> Filter:
    """See the module. Raises `ConfigError` that says where the text goes wrong and what is accepted there."""
    if len(text) > MAX_TEXT:
        raise ConfigError(f"filter: {len(text)} characters are too many; {MAX_TEXT} are accepted")
    parser = _Parser(text)
    return Filter(text, parser.whole() if parser.token else None)


class _Qualifiers(NamedTuple):
    protocol: str
    role: str
    kind: str


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = [(match[1], match.start(1)) for match in _TOKEN.finditer(text)]
        self._tokens.append(("", len(text)))
        self._next = 0
        self._depth = 0
        self._last: _Qualifiers | None = None
        """Of the term before, for values that stand alone; `None` where that was a word."""

    @property
    def token(self) -> str:
        return self._tokens[self._next][0]

    def _ahead(self, by: int) -> str:
        return self._tokens[min(self._next + by, len(self._tokens) - 1)][0]

    def _take(self) -> str:
        token = self.token
        self._next += 1
        return token

    def _fail(self, expected: str, at: int | None = None) -> NoReturn:
        token, position = self._tokens[self._next if at is None else at]
        found = repr(token) if token else "the end"
        raise ConfigError(f"filter: {self._text!r}, character {position + 1}: {found}; expected {expected}")

    # Expressions.

    def whole(self) -> Test:
        test = self._expression(self._term, may_repeat=True)
        if self.token:
            self._fail("'and', 'or' or the end")
        return test

    def _expression(self, part: Callable[[], Test], *, may_repeat: bool) -> Test:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"at most {MAX_DEPTH} parentheses and negations around it")
        first = part()
        rest: list[tuple[bool, Test]] = []
        while (word := self.token) in ("and", "&&", "or", "||"):
            self._take()
            alone = may_repeat and self._last is not None and self._is_value()
            test = self._identifier(self._last) if alone and self._last is not None else part()
            rest.append((word in ("and", "&&"), test))
        self._depth -= 1
        return _chain(first, rest) if rest else first

    def _is_value(self) -> bool:
        """Whether what comes is a value, or parentheses that begin with one."""
        ahead = 0
        while self._ahead(ahead) in ("(", "not", "!"):
            ahead += 1
        token = self._ahead(ahead)
        return bool(token) and (token[0].isdigit() or ":" in token)

    def _term(self) -> Test:
        token = self.token
        if token in ("not", "!"):
            self._take()
            return _opposite(self._nested(self._negated))
        if token == "(":
            if self._last is not None and self._is_value():
                return self._identifier(self._last)
            self._take()
            test = self._expression(self._term, may_repeat=True)
            self._close()
            return test
        if token in _WORDS and self._ahead(1) not in _ROLES | _KINDS:
            self._take()
            self._last = None
            return _WORDS[token]
        return self._qualified()

    def _negated(self) -> Test:
        """What follows `not`: a value too, if there is something it can be of."""
        return self._identifier(self._last) if self._last is not None and self._is_value() else self._term()

    def _nested(self, part: Callable[[], Test]) -> Test:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self._fail(f"at most {MAX_DEPTH} parentheses and negations around it")
        test = part()
        self._depth -= 1
        return test

    def _close(self) -> None:
        if self.token != ")":
            self._fail("'and', 'or' or ')'")
        self._take()

    def _qualified(self) -> Test:
        begin = self._next
        protocol = role = kind = ""
        if self.token in _FAMILIES or self.token in _PROTOCOLS or self.token == "ether":
            protocol = self._take()
        if self.token in _ROLES:
            role = self._take()
            if self.token in ("or", "and") and {role, self._ahead(1)} == _ROLES:
                role = "" if self._take() == "or" else "both"
                self._take()
        if self.token in _KINDS:
            kind = self._take()
        if self._next == begin:
            self._fail(_ACCEPTED)
        if protocol in _PROTOCOLS and kind not in ("port", "portrange"):
            self._fail(f"'port' or 'portrange', which is what {protocol} has")
        if protocol in _FAMILIES and kind in ("port", "portrange"):
            self._fail(f"'host' or 'net', which is what {protocol} has", self._next - 1)
        if protocol == "ether" and not (kind == "host" or (kind == "" and self._next > begin + 1)):
            self._fail("'host', 'src' or 'dst' and a MAC address", None if kind == "" else self._next - 1)
        self._last = _Qualifiers(protocol, role, kind or "host")
        return self._identifier(self._last)

    # Values.

    def _identifier(self, qualifiers: _Qualifiers) -> Test:
        if self.token in ("not", "!"):
            self._take()
            return _opposite(self._nested(lambda: self._identifier(qualifiers)))
        if self.token == "(":
            self._take()
            test = self._expression(lambda: self._identifier(qualifiers), may_repeat=False)
            self._close()
            return test
        protocol, role, kind = qualifiers
        if protocol == "ether":
            return _on(role, *_hardware(self._mac()))
        if kind in ("port", "portrange"):
            low, high = self._ports(kind)
            number = _PROTOCOLS.get(protocol, -1)
            return _on(
                role,
                lambda f: low <= f.source_port <= high and number in (-1, f.protocol),
                lambda f: low <= f.destination_port <= high and number in (-1, f.protocol),
            )
        network = self._network() if kind == "net" else self._address()
        kinds = frozenset((IPV4, ARP, RARP) if network.version == 4 else (IPV6,))
        if protocol:
            if _FAMILIES[protocol] not in kinds:
                self._fail(f"an address of {protocol}", self._next - 1)
            kinds = frozenset((_FAMILIES[protocol],))
        first, last = int(network.network_address), int(network.broadcast_address)
        return _on(
            role,
            lambda f: first <= f.source <= last and f.kind in kinds,
            lambda f: first <= f.destination <= last and f.kind in kinds,
        )

    def _mac(self) -> bytes:
        if not _MAC.fullmatch(self.token):
            self._fail("a MAC address such as 02:50:00:00:00:01")
        return bytes(int(part, 16) for part in re.split("[:.-]", self._take()))

    def _ports(self, kind: str) -> tuple[int, int]:
        match = _RANGE.fullmatch(self.token)
        first = int(match[1]) if match else 65536
        last = int(match[2]) if match and match[2] else first
        if max(first, last) > 65535 or (match and match[2] and kind == "port"):
            self._fail("a port, 0 to 65535" if kind == "port" else "ports such as 8000-8010")
        self._take()
        return min(first, last), max(first, last)

    def _address(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        try:
            address = ipaddress.ip_address(self.token)
        except ValueError:
            self._fail("an address such as 192.168.65.3 (for a network write 'net')")
        self._take()
        return ipaddress.ip_network(address)

    def _network(self) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
        text, slash, length = self.token.partition("/")
        if ":" not in text and 1 <= text.count(".") + 1 < 4 and not text.endswith("."):
            parts = text.count(".") + 1  # `net 192.168` is short for 192.168.0.0/16
            text += ".0" * (4 - parts)
            length = length if slash else str(8 * parts)
            slash = "/"
        try:
            network = ipaddress.ip_network(text + slash + length)
        except ValueError as error:
            try:
                loose = ipaddress.ip_network(text + slash + length, strict=False)
            except ValueError:
                self._fail("a network such as 192.168.65.0/24")
            self._fail(f"{loose} ({error})")
        self._take()
        return network


def _hardware(mac: bytes) -> tuple[Test, Test]:
    return lambda f: f.frame[6:12] == mac, lambda f: f.frame[:6] == mac


def _on(role: str, source: Test, destination: Test) -> Test:
    match role:
        case "src":
            return source
        case "dst":
            return destination
        case "both":
            return _both(source, destination)
        case _:
            return _either(source, destination)


def _both(one: Test, other: Test) -> Test:
    return lambda f: one(f) and other(f)


def _either(one: Test, other: Test) -> Test:
    return lambda f: one(f) or other(f)


def _chain(first: Test, rest: list[tuple[bool, Test]]) -> Test:
    """From left to right, each with whether it is an `and`; in a loop, since a chain may be longer than calls may nest."""

    def test(f: Fields) -> bool:
        found = first(f)
        for both, other in rest:
            if found is both:
                found = other(f)
        return found

    return test


def _opposite(test: Test) -> Test:
    return lambda f: not test(f)


_DHCP_PORTS: Final = frozenset((67, 68))
_WORDS: Final[dict[str, Test]] = {
    "arp": lambda f: f.kind == ARP,
    "rarp": lambda f: f.kind == RARP,
    "ip": lambda f: f.kind == IPV4,
    "ip6": lambda f: f.kind == IPV6,
    "tcp": lambda f: f.inner == 6,
    "udp": lambda f: f.inner == 17,
    "sctp": lambda f: f.inner == 132,
    "icmp": lambda f: f.protocol == 1 and f.kind == IPV4,
    "icmp6": lambda f: f.inner == 58 and f.kind == IPV6,
    "dns": lambda f: f.protocol in (6, 17) and 53 in (f.source_port, f.destination_port),
    "dhcp": lambda f: f.protocol == 17 and (f.source_port in _DHCP_PORTS or f.destination_port in _DHCP_PORTS),
}
