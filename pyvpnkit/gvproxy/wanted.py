"""What gvproxy's flags and its YAML file ask for, in one form (spec gvproxy 1.1, 1.2).

Flags are laid over the file, one by one. A file is read for its known keys only: a newer one has keys that nobody here knows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from netstack.errors import ConfigError
from portfwd.invm import flags
from portfwd.invm.flags import Flag, Given

DEVICE_MAC: Final = "5a:94:ef:e4:0c:ee"
GATEWAY_MAC: Final = "5a:94:ef:e4:0c:dd"
SUBNET: Final = "192.168.127.0/24"
MTU: Final = 1500
UUID: Final = "c3d68012-0208-11ea-9fd7-f2189899ab08"
"""Of the machine that has `DEVICE_MAC` on a vpnkit link."""
SSH_PORT: Final = 2222
LINKS: Final = ("vpnkit", "qemu", "bess", "stdio", "vfkit")
MAX_FILE: Final = 1 << 20

FLAGS: Final[Mapping[str, Flag]] = {
    "config": Flag(value="FILE", help="YAML; flags go before it"),
    "listen": Flag(value="URL", help="serve the API there, unix:///PATH or tcp://IP:PORT; repeatable"),
    "services": Flag(value="URL", help="the same"),
    "listen-qemu": Flag(value="URL", help="a machine on QEMU's stream, unix:///PATH or tcp://IP:PORT"),
    "listen-bess": Flag(value="URL", help="a machine on a seqpacket socket, unixpacket:///PATH"),
    "listen-vfkit": Flag(value="URL", help="machines of vfkit or krunkit, unixgram:///PATH"),
    "listen-vpnkit": Flag(value="URL", help="machines of HyperKit, unix:///PATH"),
    "listen-stdio": Flag(value="ANY", help="a machine on standard input and output"),
    "mtu": Flag(value="N", help=f"of the virtual network; 0 and without it {MTU}"),
    "ssh-port": Flag(value="N", help=f"port of 127.0.0.1 that leads to the machine's 22; -1: none [{SSH_PORT}]"),
    "subnet": Flag(value="CIDR", help=f"the virtual network [{SUBNET}]"),
    "gatewayIP": Flag(value="IP", help="router, DNS and DHCP server [the first address]"),
    "deviceIP": Flag(value="IP", help="of the machine [the second]"),
    "hostIP": Flag(value="IP", help="stands for 127.0.0.1 of this host [the last]"),
    "pcap": Flag(value="FILE", help="capture all frames to it, as pcapng"),
    "forward-sock": Flag(value="PATH", help="a socket here that leads to one in the machine, by ssh; repeatable"),
    "forward-dest": Flag(value="PATH", help="the one in the machine"),
    "forward-user": Flag(value="USER", help="who logs in there"),
    "forward-identity": Flag(value="FILE", help="with this key"),
    "pid-file": Flag(value="FILE", help="holds the process id"),
    "log-file": Flag(value="FILE", help="the log goes there"),
    "notification": Flag(value="URL", help="unix:///PATH: who listens there is told of readiness and of machines"),
    "ec2-metadata-access": Flag(help="guests may reach 169.254.0.0/16"),
    "debug": Flag(help="log each flow"),
    "version": Flag(help="the version"),
}

_STACK: Final[Mapping[str, type]] = {
    "debug": bool,
    "capture-file": str,
    "mtu": int,
    "subnet": str,
    "gatewayIP": str,
    "deviceIP": str,
    "hostIP": str,
    "gatewayMacAddress": str,
    "dns": list,
    "dnsSearchDomains": list,
    "forwards": dict,
    "nat": dict,
    "gatewayVirtualIPs": list,
    "dhcpStaticLeases": dict,
    "vpnKitUUIDMacAddresses": dict,
    "ec2MetadataAccess": bool,
}
_TOP: Final[Mapping[str, type]] = {
    "listen": list,
    "services": str,
    "log-level": str,
    "log-file": str,
    "pid-file": str,
    "notification": str,
    "ec2-metadata-access": bool,
    "interfaces": dict,
    "forwards": list,
    "stack": dict,
}
_FROM_FLAG: Final[Mapping[str, str]] = {
    "subnet": "subnet",
    "gatewayIP": "gatewayIP",
    "deviceIP": "deviceIP",
    "hostIP": "hostIP",
    "pcap": "capture-file",
}


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A Unix socket here that leads to `dest` in the machine, by ssh."""

    socket: str
    dest: str
    user: str
    identity: str


@dataclass(slots=True, kw_only=True)
class Wanted:
    """Texts as they were written; `stack` has the keys of the file's section."""

    listen: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    """Kind, one of `LINKS`, -> URL."""
    tunnels: list[Tunnel] = field(default_factory=list)
    stack: dict[str, Any] = field(default_factory=dict)
    notification: str = ""
    pid_file: str = ""
    log_file: str = ""
    log_level: str = "info"
    ec2: bool = False
    notes: list[str] = field(default_factory=list)
    """What is to be said in the log."""


def wanted(given: Given) -> Wanted:
    """Of a command line. Raises `ConfigError`."""
    if given.rest:
        raise ConfigError(f"{given.rest[0]!r}: only flags are wanted; -help lists them")
    has_file = bool(given.text("config"))
    found = read(given.text("config")) if has_file else _by_default()
    every = given.every
    if "listen" in every or "services" in every:
        found.listen = [*every.get("listen", ()), *every.get("services", ())[-1:]]
    for kind in LINKS:
        if url := given.text(f"listen-{kind}"):
            found.links[kind] = url
    for name, key in _FROM_FLAG.items():
        if name in every and not (has_file and name == "pcap"):
            found.stack[key] = given.text(name)
    if "mtu" in every:
        found.stack["mtu"] = flags.number(given, "mtu", least=0, most=65520)
    if tunnels := _tunnels(every):
        found.tunnels = tunnels
    found.notification = given.text("notification") or found.notification
    found.pid_file = given.text("pid-file") or found.pid_file
    found.log_file = given.text("log-file") or found.log_file
    found.ec2 = found.ec2 or given.on("ec2-metadata-access")
    if given.on("debug"):
        found.log_level = "debug"
    if has_file:
        found.notes += [
            f"-{name} is passed over: with -config it is the file's" for name in ("ssh-port", "pcap") if name in every
        ]
    else:
        port = flags.number(given, "ssh-port", least=-1, most=65535) if "ssh-port" in every else SSH_PORT
        if port != -1 and port < 1024:
            raise ConfigError(f"flag -ssh-port: {port}; give a port from 1024 to 65535, or -1 for none")
        if port != -1:
            found.stack["forwards"] = {f"127.0.0.1:{port}": ":22"}
    return found


def _by_default() -> Wanted:
    """Without a file; `{gateway}` and `{host}` are addresses that are known later."""
    records = [{"name": "gateway", "ip": "{gateway}"}, {"name": "host", "ip": "{host}"}]
    zones = [{"name": zone, "records": records} for zone in ("containers.internal.", "docker.internal.")]
    return Wanted(
        stack={
            "dns": zones,
            "dhcpStaticLeases": {"{device}": DEVICE_MAC},
            "vpnKitUUIDMacAddresses": {UUID: DEVICE_MAC},
        }
    )


def _tunnels(every: Mapping[str, Sequence[str]]) -> list[Tunnel]:
    names = ("forward-sock", "forward-dest", "forward-user", "forward-identity")
    columns = [every.get(name, ()) for name in names]
    if len({len(column) for column in columns}) > 1:
        counts = ", ".join(f"-{name} {len(column)}" for name, column in zip(names, columns, strict=True))
        raise ConfigError(f"each tunnel has all four flags, but they are given so often: {counts}")
    return [Tunnel(*row) for row in zip(*columns, strict=True)]


# The file.


def read(path: str) -> Wanted:
    """The YAML file at `path`. Raises `ConfigError`."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            octets = file.read(MAX_FILE + 1)
    except OSError as error:
        raise ConfigError(f"-config {path}: {error.strerror}; give a file that can be read") from None
    if len(octets) > MAX_FILE:
        raise ConfigError(f"-config {path}: longer than {MAX_FILE} octets; is it another file?")
    try:
        root = yaml.safe_load(octets)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"-config {path}: not YAML: {' '.join(str(error).split())}") from None
    found = Wanted()
    top = _section(path, "", root, _TOP, found)
    stack = _section(path, "stack", top.get("stack"), _STACK, found)
    links = top.get("interfaces", {})
    found.links = {kind: _text(path, f"interfaces.{kind}", links[kind]) for kind in LINKS if links.get(kind)}
    found.notes += [
        f"-config {path}: interfaces.{kind} is not known and passed over" for kind in links if kind not in LINKS
    ]
    found.listen = [_text(path, "listen", url) for url in top.get("listen", ())]
    if services := top.get("services"):
        found.listen.append(services)
    for one in top.get("forwards", ()):
        words = one if isinstance(one, dict) else {}
        found.tunnels.append(
            Tunnel(*(_text(path, f"forwards.{key}", words.get(key)) for key in ("socket", "dest", "user", "identity")))
        )
    found.notification = top.get("notification", "")
    found.pid_file = top.get("pid-file", "")
    found.log_file = top.get("log-file", "")
    found.log_level = "debug" if stack.get("debug") else _level(top.get("log-level", "info"))
    found.ec2 = bool(top.get("ec2-metadata-access") or stack.get("ec2MetadataAccess"))
    found.stack = stack
    return found


def _section(path: str, name: str, node: object, known: Mapping[str, type], found: Wanted) -> dict[str, Any]:
    """The known keys of a mapping, each of its type."""
    dotted = f"{name}." if name else ""
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise ConfigError(f"-config {path}: {name or 'the file'} must be a mapping of keys to values")
    values: dict[str, Any] = {}
    for key, value in node.items():
        kind = known.get(key) if isinstance(key, str) else None
        if kind is None:
            found.notes.append(f"-config {path}: {dotted}{str(key)[:60]} is not known and passed over")
        elif value is not None:
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                words = {bool: "true or false", int: "a number", str: "a text", list: "a list", dict: "a mapping"}
                raise ConfigError(f"-config {path}: {dotted}{key}: {str(value)[:60]!r} is not {words[kind]}")
            values[key] = value
    return values


def _text(path: str, key: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"-config {path}: {key}: a text is wanted, not {str(value)[:60]!r}")
    return value


def _level(text: str) -> str:
    """logrus' levels by ours."""
    return {"panic": "error", "fatal": "error", "warn": "warning", "trace": "debug"}.get(text, text)
