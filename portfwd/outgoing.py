"""Guests' flows that are led elsewhere: VPNKit's gateway forwards and its tunnels for outgoing TCP, as files and options.

    --tcpv4-forwards, --udpv4-forwards   LPORT:IPV4:RPORT,...      for ever
    --gateway-forwards FILE              JSON, followed     --+--> `netstack.api.Outgoing` (the stack) decides per new flow
    --forwards FILE                      JSON, followed     --+

What a file says holds a second or so after it was written (`portfwd.watch`), for flows that begin then; those that exist go
on. A file that is not there says nothing. One that cannot be read says nothing either, and the log says why. One that cannot
be understood changes nothing: what held before holds on, and the log has every complaint about it.

Documents (spec vpnkit, appendix B):

    [{"protocol": "tcp", "external_port": 80, "internal_ip": "127.0.0.1", "internal_port": 8080}]
    [{"protocol": "tcp", "dst_prefix": "10.0.0.0/8", "dst_port": 443, "path": "/run/tunnel.sock"}]      port 0: any
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

from netstack.api import Endpoint, GatewayForward, TunnelRule
from netstack.api import Outgoing as Network
from netstack.errors import ConfigError
from portfwd.watch import EVERY_S, Content, FileWatch

log = logging.getLogger("pyvpnkit.portfwd")

MAX_ENTRIES: Final = 4096
MAX_PATH: Final = 107 if sys.platform.startswith("linux") else 103
"""Octets of a unix socket's path (unix(7): 108 with the zero)."""
_COMPLAINTS: Final = 20
"""So many are told of one file."""

Value = TypeVar("Value")


class _Entry:
    """One object of a document, and what is wrong with it; each method returns a value to go on with."""

    def __init__(self, where: str, fields: Mapping[str, Any], complaints: list[str]) -> None:
        self._where = where
        self._fields = fields
        self._complaints = complaints

    def field(self, name: str, kind: type[Value], fallback: Value, wanted: str) -> Value:
        if name not in self._fields:
            self.complain(f"{name} is missing: {wanted}")
            return fallback
        value = self._fields[name]
        if not isinstance(value, kind) or isinstance(value, bool):
            self.complain(f"{name} {_shown(value)}: {wanted}")
            return fallback
        return value

    def port(self, name: str, lowest: int) -> int:
        wanted = f"a number from {lowest} to 65535"
        port = self.field(name, int, 1, wanted)
        if not lowest <= port <= 65535:
            self.complain(f"{name} {_shown(port)}: {wanted}")
        return port

    def protocol(self) -> str:
        wanted = 'write "tcp" or "udp"'
        protocol = self.field("protocol", str, "tcp", wanted)
        if protocol not in ("tcp", "udp"):
            self.complain(f"protocol {_shown(protocol)}: {wanted}")
        return protocol

    def complain(self, text: str) -> None:
        self._complaints.append(f"{self._where}: {text}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _entries(document: object, build: Callable[[_Entry], Value]) -> tuple[Value, ...]:
    """`build` of every object; raises `ConfigError` with all complaints, a line each."""
    if document is None:
        return ()  # what Go writes for a list without elements
    if not isinstance(document, list):
        raise ConfigError(f"a list of objects is expected, not {_shown(document)}")
    if len(document) > MAX_ENTRIES:
        raise ConfigError(f"{len(document)} entries; at most {MAX_ENTRIES} are taken")
    complaints: list[str] = []
    values = []
    for number, fields in enumerate(document, 1):
        if isinstance(fields, dict):
            values.append(build(_Entry(f"entry {number}", fields, complaints)))
        else:
            complaints.append(f"entry {number}: an object is expected, not {_shown(fields)}")
    if len(complaints) > _COMPLAINTS:
        complaints[_COMPLAINTS:] = [f"and {len(complaints) - _COMPLAINTS} more"]
    if complaints:
        raise ConfigError("\n".join(complaints))
    return tuple(values)


def gateway_forwards(document: object) -> tuple[GatewayForward, ...]:
    """The values of a document, decoded already. Raises `ConfigError` with all complaints, a line each."""

    def build(entry: _Entry) -> GatewayForward:
        protocol = entry.protocol()
        port = entry.port("external_port", 1)
        text = entry.field("internal_ip", str, "127.0.0.1", "an IPv4 address; 127.0.0.1 is the host itself")
        address = bytes(4)
        try:
            address = _ipv4(text)
        except ConfigError as error:
            entry.complain(f"internal_ip {error}")
        return GatewayForward(protocol, port, Endpoint(address, entry.port("internal_port", 1)))

    return _entries(document, build)


def tunnels(document: object) -> tuple[TunnelRule, ...]:
    """The values of a document, decoded already; rules for UDP, which nobody carries, are left out. Raises as above."""
    carried: list[TunnelRule] = []
    left_out = 0

    def build(entry: _Entry) -> None:
        nonlocal left_out
        protocol = entry.protocol()
        text = entry.field("dst_prefix", str, "0.0.0.0/0", "a prefix such as 10.0.0.0/8")
        prefix: ipaddress.IPv4Network | ipaddress.IPv6Network = ipaddress.IPv4Network("0.0.0.0/0")
        try:
            prefix = ipaddress.ip_network(text, strict=False)
        except ValueError:
            entry.complain(f"dst_prefix {_shown(text)}: write a prefix such as 10.0.0.0/8")
        port = entry.port("dst_port", 0)
        path = entry.field("path", str, "-", "the path of a unix socket")
        try:
            octets = os.fsencode(path)
        except ValueError:
            octets = b""
        if not octets or b"\0" in octets:
            entry.complain(f"path {_shown(path)}: the path of a unix socket is expected")
        elif len(octets) > MAX_PATH:
            entry.complain(
                f"path {_shown(path)}: at most {MAX_PATH} octets are possible; give a shorter name or a symlink"
            )
        if protocol == "tcp":
            carried.append(TunnelRule(prefix, port, path))
        else:
            left_out += 1

    _entries(document, build)
    if left_out:
        log.warning("tunnels: %d for udp left out: only tcp is carried through tunnels", left_out)
    return tuple(carried)


def decoded(content: bytes) -> object:
    """The document in a file. Raises `ConfigError` that says where it ceases to be JSON."""
    try:
        return json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ConfigError(f"no JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except UnicodeDecodeError:
        raise ConfigError("no JSON: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"no JSON that is understood: {error}") from None


def parse_static(protocol: str, text: str) -> tuple[GatewayForward, ...]:
    """`LPORT:IPV4:RPORT,...` of `--tcpv4-forwards` or `--udpv4-forwards`; nothing for an empty text.

    Raises `ConfigError` with all complaints, a line each.
    """
    forwards, complaints = [], []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            forwards.append(_static(protocol, part))
        except ConfigError as error:
            complaints.append(f"{protocol}v4_forwards: {error}")
    if complaints:
        raise ConfigError("\n".join(complaints))
    return tuple(forwards)


def _static(protocol: str, text: str) -> GatewayForward:
    words = text.split(":")
    if len(words) != 3:
        raise ConfigError(f"{text!r}; write LPORT:IPV4:RPORT, such as 8080:127.0.0.1:80, several with commas between")
    try:
        return GatewayForward(protocol, _port(words[0]), Endpoint(_ipv4(words[1]), _port(words[2])))
    except ConfigError as error:
        raise ConfigError(f"{text!r}: {error}") from None


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise ConfigError(f"port {text!r}: a number from 1 to 65535 is expected")
    return int(text)


def _ipv4(text: str) -> bytes:
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError:
        raise ConfigError(f"{_shown(text)}: an IPv4 address is expected") from None
    if address.is_unspecified:
        raise ConfigError(f"{text!r} is nobody; write 127.0.0.1 for the host itself")
    return address.packed


class Outgoing:
    """Keeps a network told of all of it, from `start` to `close`.

    `static` is what the options say, for TCP and UDP together; it goes before what `gateway_file` says. Either file may be
    `None`, need not exist, and may come later.
    """

    def __init__(
        self,
        network: Network,
        *,
        static: Sequence[GatewayForward] = (),
        gateway_file: str | None = None,
        tunnels_file: str | None = None,
        every_s: float = EVERY_S,
    ) -> None:
        self.static = tuple(static)
        self.dynamic: tuple[GatewayForward, ...] = ()
        """What `gateway_file` says."""
        self.tunnels: tuple[TunnelRule, ...] = ()
        self.problems: dict[str, str] = {}
        """By file: why its content is not what holds now."""
        self._network = network
        self._watches = []
        if gateway_file is not None:
            self._watches.append(FileWatch(gateway_file, self._gateway_changed, every_s=every_s))
        if tunnels_file is not None:
            self._watches.append(FileWatch(tunnels_file, self._tunnels_changed, every_s=every_s))
        self._gateway_file, self._tunnels_file = gateway_file or "", tunnels_file or ""

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """What the options and the files say holds when this returns; never raises for what is in a file."""
        self._tell_gateway()
        self._network.tunnel(())
        for watch in self._watches:
            watch.start(loop)

    def look(self) -> None:
        """Look at the files now."""
        for watch in self._watches:
            watch.look()

    def close(self) -> None:
        """Follow the files no more; what holds goes on to hold. Harmless when repeated."""
        for watch in self._watches:
            watch.close()

    def _tell_gateway(self) -> None:
        self._network.forward_gateway(self.static + self.dynamic)

    def _gateway_changed(self, content: Content) -> None:
        found = self._understood("gateway forwards", self._gateway_file, content, gateway_forwards, self.dynamic)
        if found != self.dynamic:
            self.dynamic = found
            self._tell_gateway()

    def _tunnels_changed(self, content: Content) -> None:
        found = self._understood("tunnels", self._tunnels_file, content, tunnels, self.tunnels)
        if found != self.tunnels:
            self.tunnels = found
            self._network.tunnel(found)

    def _understood(
        self,
        what: str,
        path: str,
        content: Content,
        values: Callable[[object], tuple[Value, ...]],
        before: tuple[Value, ...],
    ) -> tuple[Value, ...]:
        """What is to hold now (spec vpnkit 7.6)."""
        self.problems.pop(path, None)
        if content is None:
            if before:
                log.info("%s: %s is gone, and what it said no longer holds", what, path)
            return ()
        try:
            if isinstance(content, OSError):
                raise content
            found = values(decoded(content))
        except OSError as error:
            self.problems[path] = f"cannot be read: {error.strerror or error}"
            log.error("%s: %s %s; it is taken for empty", what, path, self.problems[path])
            return ()
        except ConfigError as error:
            self.problems[path] = str(error)
            log.error("%s: %s: %s; the %d of before stay", what, path, error, len(before))
            return before
        log.info("%s: %d in %s", what, len(found), path)
        return found
