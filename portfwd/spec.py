"""What is published: one text form and its value.

    [tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT       a port of the host leads to a port of a guest
    [tcp:][IP:]PORT:/GUEST/PATH                   ... to a Unix socket in the guest, by the forwarder that runs there
    unix:/HOST/PATH:[GUESTIP:]GUESTPORT           a Unix socket of the host leads to a port of a guest
    unix:/HOST/PATH:/GUEST/PATH                   ... to a Unix socket in the guest

`8000-8010:80-90` publishes a range, one port to one. An IPv6 address stands in brackets. Host port 0 asks the operating
system for a free one. Without IP the port is bound on 127.0.0.1 alone, so nothing outside this host reaches it; without
GUESTIP it goes to the guest with the lowest leased address (the only guest, as a rule).

Options follow behind commas: `via=stack|forwarder` (by our own TCP and UDP, or by VPNKit's forwarder in the VM, for addresses
that only the VM reaches), `source=gateway|client` (whom the guest sees as the client), `proxy=v1|v2` (PROXY protocol),
`annotation=TEXT`. In paths and annotations `%`, `:`, `,`, brackets and control characters are
written `%XX`.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final
from urllib.parse import unquote

from netstack.errors import ConfigError

FORM: Final = "[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT or unix:/PATH:[GUESTIP:]GUESTPORT"
DEFAULT_BIND: Final = "127.0.0.1"
MAX_ANNOTATION: Final = 256
MAX_PATH: Final = 1024
"""Octets; a socket's own limit is lower, and found out when it is bound."""

_PART: Final = re.compile(r"\[([^\]]*)\]|([^:\[\]]+)")
_PORTS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)
_ESCAPED: Final = re.compile(r"[%:,\[\]\x00-\x1f\x7f]")
_OPTION: Final = re.compile(r"[a-z]+=")
_VIAS: Final = ("stack", "forwarder")
_SOURCES: Final = ("gateway", "client")


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"publish: {text!r}: {why}; write {FORM}, such as 8080:80 or udp:0.0.0.0:53:192.168.65.3:53")


def _escape(text: str) -> str:
    return _ESCAPED.sub(lambda found: f"%{ord(found[0]):02X}", text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSpec:
    """One published port or socket, or `count` consecutive ports. Checked at construction (`ConfigError`)."""

    protocol: str = "tcp"
    """`tcp` or `udp` of the host side; `unix` is a stream socket with a path."""
    bind: str = DEFAULT_BIND
    """Host address to listen on, IPv4 or IPv6, as text."""
    port: int = 0
    """Host port; 0 lets the operating system choose."""
    path: str = ""
    """Host path of a `unix` one, absolute."""
    guest: str | None = None
    """Guest address; `None` is the guest with the lowest leased address. IPv6 by the forwarder only."""
    guest_port: int = 0
    guest_path: str = ""
    """A Unix socket in the guest instead; by the forwarder only."""
    count: int = 1
    """Ports in the range, counted from `port` and `guest_port`."""
    via: str = "stack"
    """`stack` is our own TCP and UDP; `forwarder` VPNKit's, which runs in the guest."""
    source: str = "gateway"
    """Whom the guest sees: the `gateway`, or the `client` where it can be answered (IPv4, not this host's loopback)."""
    proxy: int = 0
    """Version of the PROXY protocol header in front of the client's octets; 0 for none."""
    annotation: str = ""
    """For people, and part of the name of a forward in VPNKit's API."""

    def __post_init__(self) -> None:
        text = str(self)
        if self.protocol not in ("tcp", "udp", "unix"):
            raise _wrong(text, f"protocol {self.protocol!r} is none of tcp, udp and unix")
        if self.via not in _VIAS:
            raise _wrong(text, f"via={self.via}: there is {' and '.join(_VIAS)}")
        if self.source not in _SOURCES:
            raise _wrong(text, f"source={self.source}: there is {' and '.join(_SOURCES)}")
        if self.proxy not in (0, 1, 2):
            raise _wrong(text, f"PROXY protocol has versions 1 and 2, not {self.proxy}")
        if self.count < 1:
            raise _wrong(text, "a range ends before it begins")
        if len(self.annotation) > MAX_ANNOTATION:
            raise _wrong(text, f"an annotation has at most {MAX_ANNOTATION} characters")
        self._check_host(text)
        self._check_guest(text)
        self._check_options(text)

    def _check_host(self, text: str) -> None:
        if self.protocol == "unix":
            _check_path(text, self.path, "of the host")
            if self.count > 1 or self.port or self.bind != DEFAULT_BIND:
                raise _wrong(text, "a Unix socket has neither address nor port")
            return
        if self.path:
            raise _wrong(text, f"a path of the host needs unix:, not {self.protocol}:")
        try:
            ipaddress.ip_address(self.bind)
        except ValueError:
            raise _wrong(text, f"{self.bind!r} is not an IP address of this host") from None
        if not 0 <= self.port <= 65536 - self.count:
            raise _wrong(text, f"host port {self.port + self.count - 1} is outside 0..65535")
        if self.count > 1 and self.port == 0:
            raise _wrong(text, "a range needs a first host port, 0 stands alone")

    def _check_guest(self, text: str) -> None:
        if self.guest_path:
            _check_path(text, self.guest_path, "in the guest")
            if self.guest is not None or self.guest_port or self.count > 1:
                raise _wrong(text, "a path in the guest has neither address nor port")
            if self.protocol == "udp":
                raise _wrong(text, "datagrams cannot be led to a path in the guest")
            return
        if self.guest is not None:
            try:
                address = ipaddress.ip_address(self.guest)
            except ValueError:
                raise _wrong(text, f"{self.guest!r} is not the address of a guest") from None
            if address.version == 6 and self.via == "stack":
                raise _wrong(text, f"{self.guest} can be reached by the forwarder only; add via=forwarder")
        elif self.via == "forwarder":
            raise _wrong(
                text, "via=forwarder needs GUESTIP: what the address means in the VM (127.0.0.1 is the VM itself)"
            )
        if not 1 <= self.guest_port <= 65536 - self.count:
            raise _wrong(text, f"guest port {self.guest_port + self.count - 1} is outside 1..65535")

    def _check_options(self, text: str) -> None:
        if self.guest_path and self.via == "stack":
            raise _wrong(text, "a path in the guest can be reached by the forwarder only; add via=forwarder")
        if self.via == "forwarder" and self.source == "client":
            raise _wrong(text, "the forwarder cannot show the client's address; use via=stack, or proxy=v2")
        if self.protocol == "unix" and self.source == "client":
            raise _wrong(text, "the client of a Unix socket has no address to show")
        if self.protocol == "udp" and self.proxy:
            raise _wrong(
                text, "there is no PROXY protocol for datagrams here; source=client shows the client's address"
            )

    @classmethod
    def parse(cls, text: str) -> PublishSpec:
        """The inverse of `str`; raises `ConfigError` that says what is wrong and shows the form."""
        ends, *options = text.split(",")
        parts = _parts(text, ends)
        found: dict[str, object] = _options(text, options)
        word = parts[0].lower()
        if word in ("tcp", "udp", "unix"):
            found["protocol"] = word
            del parts[0]
        elif word.isalpha():
            raise _wrong(text, f"protocol {parts[0]!r} is none of tcp, udp and unix")
        if parts and parts[-1].startswith("/") and (len(parts) > 1 or word != "unix"):
            found["guest_path"] = unquote(parts.pop())
            found.setdefault("via", "forwarder")  # there is no other way
            guest_first = guest_last = 0
        else:
            if not parts or not (ports := _PORTS.fullmatch(parts.pop())):
                raise _wrong(text, "the guest port is missing or no number")
            guest_first, guest_last = int(ports[1]), int(ports[2] or ports[1])
            found["guest_port"] = guest_first
            if len(parts) > 1 and not _PORTS.fullmatch(parts[-1]) and not parts[-1].startswith("/"):
                found["guest"] = parts.pop()
        if found.get("protocol") == "unix":
            if len(parts) != 1:
                raise _wrong(text, "a Unix socket of the host is written unix:/PATH")
            found["path"] = unquote(parts[0])
            first = last = guest_first if guest_first == guest_last else 0
        else:
            if not parts or not (ports := _PORTS.fullmatch(parts.pop())):
                raise _wrong(text, "the host port is missing or no number")
            first, last = int(ports[1]), int(ports[2] or ports[1])
            found["port"] = first
            if parts:
                found["bind"] = parts.pop()
            if parts:
                raise _wrong(text, f"{parts[0]!r} is not expected")
        if last < first or guest_last < guest_first:
            raise _wrong(text, "a range ends before it begins")
        count, guests = last - first + 1, guest_last - guest_first + 1
        if count != guests:
            raise _wrong(text, f"{count} host ports for {guests} guest ports")
        return cls(count=count, **found)  # type: ignore[arg-type]

    def __str__(self) -> str:
        if self.protocol == "unix":
            host = _escape(self.path)
        else:
            host = f"{_bracketed(self.bind)}:{_range(self.port, self.count)}"
        if self.guest_path:
            guest = _escape(self.guest_path)
        else:
            guest = "" if self.guest is None else f"{_bracketed(self.guest)}:"
            guest += _range(self.guest_port, self.count)
        options = ""
        if (self.via == "forwarder") != bool(self.guest_path):
            options += f",via={self.via}"
        if self.source != "gateway":
            options += f",source={self.source}"
        if self.proxy:
            options += f",proxy=v{self.proxy}"
        if self.annotation:
            options += f",annotation={_escape(self.annotation)}"
        return f"{self.protocol}:{host}:{guest}{options}"

    def each(self) -> Iterator[PublishSpec]:
        """The single ports of the range, in order."""
        if self.count == 1:
            yield self
            return
        for offset in range(self.count):
            yield replace(self, port=self.port + offset, guest_port=self.guest_port + offset, count=1)


def split(text: str) -> list[str]:
    """The specs of a comma-separated list: what is written `option=...` belongs to the one before it."""
    found: list[str] = []
    for part in text.split(","):
        if found and _OPTION.match(part):
            found[-1] += f",{part}"
        else:
            found.append(part)
    return found


def _check_path(text: str, path: str, where: str) -> None:
    if not path.startswith("/"):
        raise _wrong(text, f"the path {where} must begin with /")
    if "\0" in path or len(path.encode(errors="replace")) > MAX_PATH:
        raise _wrong(text, f"the path {where} holds a NUL or more than {MAX_PATH} octets")


def _parts(text: str, ends: str) -> list[str]:
    parts: list[str] = []
    position = 0
    while True:
        match = _PART.match(ends, position)
        if match is None:
            raise _wrong(text, "an empty part" if text else "nothing is given")
        parts.append(match[1] if match[1] is not None else match[2])
        position = match.end()
        if position == len(ends):
            return parts
        if ends[position] != ":":
            raise _wrong(text, f"{ends[position]!r} is not expected after {parts[-1]!r}")
        position += 1


def _options(text: str, options: Iterable[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals or name not in ("via", "source", "proxy", "annotation"):
            raise _wrong(text, f"unknown option {option!r}; there are via=, source=, proxy= and annotation=")
        if name in found:
            raise _wrong(text, f"{name}= is given twice")
        if name == "proxy":
            if value not in ("v1", "v2", "off"):
                raise _wrong(text, f"proxy={value}: write proxy=v1 or proxy=v2")
            found[name] = {"v1": 1, "v2": 2, "off": 0}[value]
        else:
            found[name] = unquote(value) if name == "annotation" else value
    return found


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _range(first: int, count: int) -> str:
    return f"{first}-{first + count - 1}" if count > 1 else str(first)
