"""What is published: the text form `[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT` and its value.

`8000-8010:80-90` publishes a range, one port to one. An IPv6 address stands in brackets. Host port 0 asks the operating
system for a free one. Without IP the port is bound on 127.0.0.1 alone, so nothing outside this host reaches it; without
GUESTIP it goes to the guest with the lowest leased address (the only guest, as a rule).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from netstack.errors import ConfigError

FORM: Final = "[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT"
DEFAULT_BIND: Final = "127.0.0.1"

_PART: Final = re.compile(r"\[([^\]]*)\]|([^:\[\]]+)")
_PORTS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def _wrong(text: str, why: str) -> ConfigError:
    return ConfigError(f"publish: {text!r}: {why}; write {FORM}, such as 8080:80 or udp:0.0.0.0:53:192.168.65.3:53")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSpec:
    """One published port, or `count` consecutive ones. Checked at construction (`ConfigError`)."""

    protocol: str = "tcp"
    bind: str = DEFAULT_BIND
    """Host address to listen on, IPv4 or IPv6, as text."""
    port: int
    """Host port; 0 lets the operating system choose."""
    guest: str | None = None
    """Guest address; `None` is the guest with the lowest leased address."""
    guest_port: int
    count: int = 1
    """Ports in the range, counted from `port` and `guest_port`."""

    def __post_init__(self) -> None:
        text = str(self)
        if self.protocol not in ("tcp", "udp"):
            raise _wrong(text, f"protocol {self.protocol!r} is neither tcp nor udp")
        try:
            ipaddress.ip_address(self.bind)
        except ValueError:
            raise _wrong(text, f"{self.bind!r} is not an IP address of this host") from None
        if self.guest is not None:
            try:
                ipaddress.IPv4Address(self.guest)
            except ValueError:
                raise _wrong(text, f"{self.guest!r} is not the IPv4 address of a guest") from None
        if self.count < 1:
            raise _wrong(text, "a range ends before it begins")
        if not 0 <= self.port <= 65536 - self.count:
            raise _wrong(text, f"host port {self.port + self.count - 1} is outside 0..65535")
        if not 1 <= self.guest_port <= 65536 - self.count:
            raise _wrong(text, f"guest port {self.guest_port + self.count - 1} is outside 1..65535")
        if self.count > 1 and self.port == 0:
            raise _wrong(text, "a range needs a first host port, 0 stands alone")

    @classmethod
    def parse(cls, text: str) -> PublishSpec:
        """The inverse of `str`; raises `ConfigError` that says what is wrong and shows the form."""
        parts: list[str] = []
        position = 0
        while True:
            match = _PART.match(text, position)
            if match is None:
                raise _wrong(text, "an empty part" if text else "nothing is given")
            parts.append(match[1] if match[1] is not None else match[2])
            position = match.end()
            if position == len(text):
                break
            if text[position] != ":":
                raise _wrong(text, f"{text[position]!r} is not expected after {parts[-1]!r}")
            position += 1
        protocol = parts.pop(0).lower() if parts[0].isalpha() else "tcp"
        bind: str = DEFAULT_BIND
        guest: str | None = None
        if parts and not _PORTS.fullmatch(parts[0]):
            bind = parts.pop(0)
        if not parts or not (host_ports := _PORTS.fullmatch(parts.pop(0))):
            raise _wrong(text, "the host port is missing or no number")
        if len(parts) == 2:
            guest = parts.pop(0)
        if len(parts) != 1 or not (guest_ports := _PORTS.fullmatch(parts[0])):
            raise _wrong(text, "the guest port is missing or no number")
        port, last = int(host_ports[1]), int(host_ports[2] or host_ports[1])
        guest_port, guest_last = int(guest_ports[1]), int(guest_ports[2] or guest_ports[1])
        if last < port or guest_last < guest_port:
            raise _wrong(text, "a range ends before it begins")
        if last - port != guest_last - guest_port:
            raise _wrong(text, f"{last - port + 1} host ports for {guest_last - guest_port + 1} guest ports")
        return cls(protocol=protocol, bind=bind, port=port, guest=guest, guest_port=guest_port, count=last - port + 1)

    def __str__(self) -> str:
        bind = f"[{self.bind}]" if ":" in self.bind else self.bind
        ports, guest_ports = str(self.port), str(self.guest_port)
        if self.count > 1:
            ports += f"-{self.port + self.count - 1}"
            guest_ports += f"-{self.guest_port + self.count - 1}"
        guest = "" if self.guest is None else f"{self.guest}:"
        return f"{self.protocol}:{bind}:{ports}:{guest}{guest_ports}"

    def each(self) -> Iterator[PublishSpec]:
        """The single ports of the range, in order."""
        for offset in range(self.count):
            yield replace(self, port=self.port + offset, guest_port=self.guest_port + offset, count=1)
