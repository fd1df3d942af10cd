"""Lists of hosts: VPNKit's `exclude` and `allow`, and `no_proxy` (spec vpnkit 6.1).

    mit.edu              the name itself and all names below it
    .mit.edu  *.mit.edu  names below it only
    w*w is no pattern: `*` stands for one whole label, at any place (`mirror.*.edu`); alone it matches everything
    10.1.2.3  10.0.0.0/8 fd00::/8   addresses; never names, for nothing is looked up here
    mit.edu:8080         any of these at one port only

Names are compared without regard to case and to a dot at the end, as DNS does (RFC 4343), unlike VPNKit.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from netstack.errors import ConfigError

MAX_PATTERNS: Final = 4096
_SEPARATORS: Final = re.compile(r"[,\s]+")
_PORT: Final = re.compile(r"(.*):([0-9]{1,5})", re.ASCII)
_LABELS: Final = re.compile(r"(\*|[A-Za-z0-9_-]{1,63})(\.(\*|[A-Za-z0-9_-]{1,63}))*", re.ASCII)
_LEGACY: Final = re.compile(r"[0-9A-Fa-fxX.]+", re.ASCII)

Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
Prefix: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def literal(host: str) -> Address | None:
    """The address that `host` is, if it is one in any spelling that the host's resolver takes: also `127.1` and `0x7f000001`."""
    try:
        return ipaddress.ip_address(host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host)
    except ValueError:
        pass
    if _LEGACY.fullmatch(host):
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            pass
    return None


@dataclass(frozen=True, slots=True)
class Pattern:
    """One entry. Of `labels` and `prefix` one is set; `labels` are lower case, from left to right."""

    text: str
    labels: tuple[str, ...] = ()
    below: bool = False
    """Names below, and not the name itself."""
    prefix: Prefix | None = None
    port: int = 0
    """0: any."""

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Raises `ConfigError`."""
        port = 0
        rest = text
        found = _PORT.fullmatch(text)
        if found and (":" not in found[1] or found[1][:1] + found[1][-1:] == "[]"):
            rest, port = found[1], int(found[2])
            if not 1 <= port <= 65535:
                raise ConfigError(f"{text!r}: a port is a number from 1 to 65535")
        try:
            bare = rest[1:-1] if rest[:1] + rest[-1:] == "[]" else rest
            return cls(text, prefix=ipaddress.ip_network(bare, strict=False), port=port)
        except ValueError:
            pass
        name = rest.lower().removesuffix(".")
        below = name.startswith(".") or name.startswith("*.")
        name = name.removeprefix("*").removeprefix(".") if below else name
        if not _LABELS.fullmatch(name):
            raise ConfigError(f"{text!r}: write a name (a.b, .a.b, *.a.b), an address, or a prefix such as 10.0.0.0/8")
        return cls(text, labels=tuple(name.split(".")), below=below, port=port)

    def matches(self, labels: tuple[str, ...], address: Address | None, port: int) -> bool:
        """`labels` of a name, or the `address` that the host is; with the port."""
        if self.port and self.port != port:
            return False
        if self.labels == ("*",) and not self.below:
            return True
        if address is not None:
            return self.prefix is not None and self.prefix.version == address.version and address in self.prefix
        if self.prefix is not None or len(labels) < len(self.labels) + self.below:
            return False
        tail = labels[-len(self.labels) :]
        return all(mine in ("*", its) for mine, its in zip(self.labels, tail, strict=True))


class Patterns:
    """A list of them, in the order given."""

    def __init__(self, patterns: Iterable[Pattern] = ()) -> None:
        self._patterns = tuple(patterns)

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Patterns:
        """Each text is one pattern, or several between commas and white space. Raises `ConfigError` with all complaints."""
        found, complaints = [], []
        for word in (word for text in texts for word in _SEPARATORS.split(text) if word):
            try:
                found.append(Pattern.parse(word))
            except ConfigError as error:
                complaints.append(str(error))
        if len(found) > MAX_PATTERNS:
            complaints.append(f"{len(found)} patterns; at most {MAX_PATTERNS} are taken")
        if complaints:
            raise ConfigError("\n".join(complaints[:20]))
        return cls(found)

    def matches(self, host: str, port: int) -> bool:
        """Whether any of them means this host: a name, or an address in any spelling."""
        if not self._patterns:
            return False
        address = literal(host)
        labels = () if address is not None else tuple(host.lower().removesuffix(".").split("."))
        return any(pattern.matches(labels, address, port) for pattern in self._patterns)

    @property
    def texts(self) -> list[str]:
        """As they were written."""
        return [pattern.text for pattern in self._patterns]

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patterns) and self._patterns == other._patterns

    def __hash__(self) -> int:
        return hash(self._patterns)

    def __repr__(self) -> str:
        return f"Patterns({', '.join(self.texts)})"
