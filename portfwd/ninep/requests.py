"""The text of a port request on VPNKit's control file system (spec vpnkit 7.1): one `parse`, one `__str__`.

`tcp:LIP:LPORT:tcp:RIP:RPORT`, `udp:LIP:LPORT:udp:RIP:RPORT` or `unix:BASE64(path):unix:BASE64(path)`: the host's side, then the
side in the VM. Both streams, so tcp and unix may be mixed; IPv6 addresses cannot be written, for their colons.
"""

from __future__ import annotations

import base64
import binascii
import errno
import ipaddress
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from netstack.errors import ConfigError, NetstackError
from portfwd.errors import AlreadyPublished, BindFailed, NotAllowed
from portfwd.spec import PublishSpec

GRAMMAR: Final = (
    "tcp:<local IP>:<local port>:tcp:<remote IP>:<remote port> or udp:<local IP>:<local port>:udp:<remote IP>:<remote port> "
    "or unix:<base64 of local path>:unix:<base64 of remote path>"
)
LONGEST: Final = 1024
"""Octets of a request; two socket paths of the longest kind are 300 in base64."""
LONGEST_PATH: Final = 107
"""Octets of a path that fits a socket address (unix(7))."""

Via: TypeAlias = Callable[[str], str]
"""`stack` or `forwarder` (`PublishSpec.via`) for a target's address in the VM."""

_NUMBER: Final = re.compile(r"[0-9]{1,5}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Side:
    """One end: an address and a port, or for `unix` a path."""

    protocol: str
    """`tcp`, `udp` or `unix`."""
    address: str = ""
    port: int = 0
    path: str = ""

    @property
    def where(self) -> str:
        """`IP:PORT`, or the path: as Docker names it in errors."""
        return self.path if self.protocol == "unix" else f"{self.address}:{self.port}"

    def __str__(self) -> str:
        if self.protocol == "unix":
            return f"unix:{base64.b64encode(self.path.encode()).decode()}"
        return f"{self.protocol}:{self.address}:{self.port}"


@dataclass(frozen=True, slots=True)
class PortRequest:
    """What is asked for: connections to `local` on the host lead to `remote` in the VM."""

    local: Side
    remote: Side

    @classmethod
    def parse(cls, text: str) -> PortRequest:
        """The inverse of `str`; a line feed at the end, as `echo` writes it, is no part of it. Raises `ConfigError`."""
        asked = text.removesuffix("\n")
        parts = asked.split(":")
        if not 4 <= len(parts) <= 6:
            raise ConfigError(f"Failed to parse request [{printable(asked)}], expected {GRAMMAR}")
        middle = 2 if len(parts) == 4 or (len(parts) == 5 and parts[0].lower() == "unix") else 3
        request = cls(_side(parts[:middle]), _side(parts[middle:]))
        if (
            "udp" in (request.local.protocol, request.remote.protocol)
            and request.local.protocol != request.remote.protocol
        ):
            raise ConfigError(
                f"a {request.local.protocol} port cannot lead to {request.remote.protocol}: udp goes with udp alone"
            )
        return request

    def __str__(self) -> str:
        return f"{self.local}:{self.remote}"

    def spec(self, via: Via) -> PublishSpec:
        """As the registry takes it. Raises `ConfigError` for what can be written here and not published."""
        local, remote = self.local, self.remote
        host: dict[str, Any] = {"bind": local.address, "port": local.port}
        if local.protocol == "unix":
            host = {"path": local.path}
        if remote.protocol == "unix":  # only a forwarder in the VM can go there
            return PublishSpec(protocol=local.protocol, **host, guest_path=remote.path, via="forwarder")
        return PublishSpec(
            protocol=local.protocol,
            **host,
            guest=remote.address,
            guest_port=remote.port,
            via=via(remote.address),
        )


def failure(request: PortRequest, error: NetstackError | OSError) -> str:
    """Why a port was not published, in the words that Docker looks for."""
    where = request.local.where
    match error:
        case AlreadyPublished():
            return f"Bind for {where} failed: port is already allocated"
        case NotAllowed():
            return f"Bind for {where} failed: permission denied"
        case BindFailed(number=errno.EADDRINUSE):
            return f"Bind for {where} failed: port is already allocated"
        case BindFailed(number=errno.EADDRNOTAVAIL):
            return f"listen {request.local.protocol} {where}: bind: cannot assign requested address"
        case BindFailed(number=errno.EACCES | errno.EPERM):
            return f"Bind for {where} failed: permission denied"
        case BindFailed():
            return f"Bind for {where}: unexpected error {error.strerror}"
        case _:
            return f"Bind for {where}: unexpected error {printable(str(error))}"


def printable(text: str) -> str:
    """On one line, whatever somebody wrote."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _side(parts: list[str]) -> Side:
    written = printable(":".join(parts))
    protocol = parts[0].lower()
    match parts:
        case [_, path] if protocol == "unix":
            return Side("unix", path=_path(path, written))
        case [_, address, port] if protocol in ("tcp", "udp"):
            try:
                ipaddress.IPv4Address(address)
            except ValueError:
                raise _no_port(written) from None
            if not _NUMBER.fullmatch(port) or int(port) > 65535:
                raise _no_port(written)
            return Side(protocol, address, int(port))
        case [_, _, _] if protocol != "unix":
            raise ConfigError("unknown protocol: should be tcp or udp")
        case _:
            raise ConfigError("port should be of the form proto:IP:port or unix:path")


def _path(text: str, written: str) -> str:
    try:
        octets = base64.b64decode(text, validate=True)
        path = octets.decode()
    except (binascii.Error, ValueError):
        raise _no_port(written) from None
    if not path or "\0" in path or len(octets) > LONGEST_PATH:
        raise _no_port(written)
    return path


def _no_port(written: str) -> ConfigError:
    return ConfigError(f"port is not a proto:IP:port or unix:path: '{written}'")
