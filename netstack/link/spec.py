"""Link URLs: `scheme:address[,option=value...]`, the one text form of a link on the command line and in YAML.

    vhost-user:/run/net.sock        listen for QEMU -netdev vhost-user, cloud-hypervisor, crosvm: the shared ring
    qemu:/run/net.sock              listen for QEMU -netdev stream (unix); also vmnet:, unixgram:, bess:
    qemu:tcp:127.0.0.1:1234         the same over TCP (also vmnet:)
    qemu:connect:/run/net.sock      dial, and dial again when the connection ends (also connect:tcp:HOST:PORT; for
                                    vhost-user also written vhost-user:/run/net.sock,mode=client)
    vmnet:fd:3                      a socket that was inherited, listening or connected
    fd:3[,kind=vmnet]               the same; the kind is found out when it is not given
    tap:netns=NAME tap:pid=PID      a TAP device inside a network namespace (also packet:)
    tap:fd=N                        the same, the namespace given as an open descriptor
    tap:NAME                        a TAP device NAME in our own namespace
    stdio:                          standard input and output, pipes or one socket: gvforwarder's frames (u16 little-endian)

Options: `mtu=N`, `name=TEXT` (shown instead of the URL); for qemu, bess and unixgram links that listen `once=on` (the first guest
is the only one, and the link is over with it); for tap, packet and vhost-user `mac=AA:BB:...` (of the guest's end)
and `offload=on|off`; for tap and packet `ifname=NAME` (default eth0) and `userns=PATH` (a user
namespace to enter first; by default that of the process, with pid=); for vhost-user `mode=server|client` and `config=on|off`
(offer a configuration space: crosvm needs it, QEMU warns of it). A comma inside an address is written twice.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import stat
from dataclasses import dataclass, replace
from os import fstat
from typing import Any, Final, Literal, TypeAlias

from netstack.errors import ConfigError
from netstack.settings import format_mac, parse_mac

How: TypeAlias = Literal["unix", "tcp", "fd", "netns", "pid", "device", "inherited", "stdio"]
"""What `where` is: a socket's path, `HOST:PORT`, a namespace (descriptor, name, process), a device, an open link; or nothing."""

Kind: TypeAlias = Literal["vhost-user", "qemu", "vmnet", "unixgram", "bess", "tap", "packet", "stdio"]

SOCKETS: Final = ("vhost-user", "qemu", "vmnet", "unixgram", "bess")
STREAMS: Final = ("qemu", "vmnet")
ON_STREAM_SOCKETS: Final = (*STREAMS, "vhost-user")
DEVICES: Final = ("tap", "packet")
ONE_GUEST: Final = ("qemu", "bess", "unixgram")
WITH_OFFLOADS: Final = (*DEVICES, "vhost-user")
SCHEMES: Final = (*SOCKETS, *DEVICES, "fd", "stdio")
_ON_DESCRIPTORS: Final = (*SOCKETS, *DEVICES)
_FORMS: Final = {
    "vhost-user": "vhost-user:/PATH, vhost-user:/PATH,mode=client or vhost-user:fd:N",
    "qemu": "qemu:/PATH, qemu:tcp:HOST:PORT, qemu:connect:/PATH, qemu:connect:tcp:HOST:PORT or qemu:fd:N",
    "vmnet": "vmnet:/PATH, vmnet:tcp:HOST:PORT, vmnet:connect:/PATH or vmnet:fd:N",
    "unixgram": "unixgram:/PATH or unixgram:fd:N",
    "bess": "bess:/PATH, bess:connect:/PATH or bess:fd:N",
    "tap": "tap:netns=NAME, tap:pid=PID, tap:fd=N or tap:DEVICE",
    "packet": "packet:netns=NAME, packet:pid=PID, packet:fd=N or packet:DEVICE",
    "fd": "fd:N or fd:N,kind=" + "|".join(_ON_DESCRIPTORS),
    "stdio": "stdio:",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkSpec:
    """One link as it was asked for; `parse` and `str` are inverses. Checked at construction (`ConfigError`)."""

    kind: Kind | None
    """None: an inherited descriptor whose kind is found out when it is used."""
    how: How
    where: str
    connect: bool = False
    """Dial instead of listen."""
    mtu: int | None = None
    """IP MTU, instead of the network's."""
    name: str | None = None
    ifname: str | None = None
    """Name of the guest's interface (tap, packet)."""
    userns: str | None = None
    """Path of the user namespace that is entered first (tap and packet in a network namespace)."""
    mac: str | None = None
    """MAC address of the guest's interface (tap, packet; vhost-user where the front-end asks for one)."""
    offload: bool = True
    """Checksum and segmentation offload (tap, packet, vhost-user)."""
    config: bool = True
    """Offer the configuration space (vhost-user), which crosvm asks for and QEMU complains of."""
    once: bool = False
    """The first guest is the only one; the link is over with it (qemu, bess and unixgram that listen)."""

    def __post_init__(self) -> None:
        if self.mtu is not None and not 576 <= self.mtu <= 65520:
            raise ConfigError(f"link {self}: mtu={self.mtu} is outside 576..65520")
        if self.mac is not None and parse_mac(self.mac)[0] & 1:
            raise ConfigError(f"link {self}: mac={self.mac} is a group address; the first octet must be even")
        if self.ifname is not None and not re.fullmatch(r"[^\s/,]{1,15}", self.ifname):
            raise ConfigError(
                f"link {self}: ifname={self.ifname!r} is no interface name (1 to 15 characters, no slash)"
            )
        if self.ifname and self.kind not in (*DEVICES, None):
            raise ConfigError(f"link {self}: ifname is for tap and packet links only")
        if self.userns and (self.kind not in DEVICES or self.how not in ("netns", "pid", "fd")):
            raise ConfigError(f"link {self}: userns is for tap and packet links in a network namespace")
        if (self.mac or not self.offload) and self.kind not in (*WITH_OFFLOADS, None):
            raise ConfigError(f"link {self}: mac and offload are for tap, packet and vhost-user links only")
        if not self.config and self.kind not in ("vhost-user", None):
            raise ConfigError(f"link {self}: config is for vhost-user links only")
        if self.once and (self.kind not in ONE_GUEST or self.connect or self.how not in ("unix", "tcp")):
            raise ConfigError(f"link {self}: once is for qemu, bess and unixgram links that listen")

    @classmethod
    def parse(cls, text: str) -> LinkSpec:
        """The link that `text` names. Raises `ConfigError` that says what would be accepted."""
        scheme, colon, rest = text.partition(":")
        if not colon or scheme not in SCHEMES or "\0" in text:
            raise ConfigError(
                f"link {text!r}: write SCHEME:ADDRESS with one of the schemes {', '.join(SCHEMES)}; "
                "for example qemu:/run/user/1000/net.sock"
            )
        parts = [part.replace("\0", ",") for part in rest.replace(",,", "\0").split(",")]
        where, options = parts[0], _options(text, parts[1:])
        if scheme == "fd":
            kind = options.pop("kind", None)
            if kind is not None and kind not in _ON_DESCRIPTORS:
                raise ConfigError(f"link {text!r}: kind={kind!r}; use one of {', '.join(_ON_DESCRIPTORS)}")
            how: How = "inherited"
            connect = False
        else:
            kind = scheme
            how, where, connect = _place(scheme, where)
        if not _plausible(scheme, how, where, connect):
            raise ConfigError(f"link {text!r}: write {_FORMS[scheme]}")
        if "mode" in options:
            mode = options.pop("mode")
            if kind != "vhost-user" or how != "unix" or mode not in ("server", "client"):
                raise ConfigError(f"link {text!r}: mode={mode}; mode=server or mode=client is for vhost-user:/PATH")
            if connect and mode == "server":
                raise ConfigError(f"link {text!r}: connect: and mode=server contradict each other; leave one out")
            connect = mode == "client"
        spec = cls(kind=kind, how=how, where=where, connect=connect)  # type: ignore[arg-type]
        return replace(spec, **_typed(text, options))

    def __str__(self) -> str:
        connect = "connect:" if self.connect else ""
        where = self.where.replace(",", ",,")
        match self.how:
            case "unix" | "device":
                text = f"{self.kind}:{connect}{where}"
            case "tcp":
                text = f"{self.kind}:{connect}tcp:{where}"
            case "inherited" if self.kind is None or self.kind in DEVICES:
                text = f"fd:{where}" + (f",kind={self.kind}" if self.kind else "")
            case "inherited":
                text = f"{self.kind}:fd:{where}"
            case "stdio":
                text = "stdio:"
            case _:
                text = f"{self.kind}:{self.how}={where}"
        options = {
            "mtu": self.mtu,
            "name": None if self.name is None else self.name.replace(",", ",,"),
            "ifname": self.ifname,
            "userns": None if self.userns is None else self.userns.replace(",", ",,"),
            "mac": self.mac,
            "offload": None if self.offload else "off",
            "config": None if self.config else "off",
            "once": "on" if self.once else None,
        }
        return text + "".join(f",{key}={value}" for key, value in options.items() if value is not None)

    @property
    def label(self) -> str:
        """What people see: the given name, or the URL without its options."""
        return self.name or str(
            replace(self, mtu=None, ifname=None, userns=None, mac=None, offload=True, config=True, once=False)
        )

    @property
    def endpoint(self) -> tuple[str, int]:
        """Host and port of a TCP link."""
        host, _, port = self.where.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def descriptor(self) -> int:
        """The number of an inherited descriptor."""
        return int(self.where)


def _options(text: str, parts: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or not value or key in options:
            raise ConfigError(f"link {text!r}: {part!r} should be one option=value (a comma in a path is written ,,)")
        options[key] = value
    return options


def _typed(text: str, options: dict[str, str]) -> dict[str, Any]:
    typed: dict[str, Any] = {}
    for key, value in options.items():
        match key:
            case "mtu" if _number(value, 9):
                typed[key] = int(value)
            case "mtu":
                raise ConfigError(f"link {text!r}: mtu={value!r}; write octets such as mtu=1500")
            case "name" | "ifname" | "userns":
                typed[key] = value
            case "mac":
                typed[key] = format_mac(parse_mac(value))
            case "offload" | "config" | "once" if value in ("on", "off"):
                typed[key] = value == "on"
            case "offload" | "config" | "once":
                raise ConfigError(f"link {text!r}: {key}={value!r}; use on or off")
            case _:
                raise ConfigError(
                    f"link {text!r}: unknown option {key!r}; there are mtu, name, ifname, userns, mac, offload, mode, config, once"
                )
    return typed


def _place(scheme: str, text: str) -> tuple[How, str, bool]:
    """How, where and whether to dial, of what stands between the scheme and the options."""
    if scheme in DEVICES:
        key, equals, value = text.partition("=")
        if not equals:
            return "device", text, False
        return (key, value, False) if key in ("netns", "pid", "fd") else ("device", "", False)  # type: ignore[return-value]
    if scheme == "stdio":
        return "stdio", text, False
    if text.startswith("fd:"):
        return "inherited", text[3:], False
    connect = text.startswith("connect:")
    text = text.removeprefix("connect:")
    if text.startswith("tcp:"):
        return "tcp", text[4:], connect
    if text.startswith("///"):  # the URL habit: unixgram:///path
        text = text[2:]
    return "unix", text, connect


def _plausible(scheme: str, how: How, where: str, connect: bool) -> bool:
    match how:
        case "inherited" | "fd" | "pid":
            return _number(where, 10) and int(where) < 1 << 31  # what the system takes
        case "unix":
            return "/" in where and not (connect and scheme == "unixgram")
        case "tcp":
            return scheme in STREAMS and _host_and_port(where)
        case "netns":
            return bool(where)
        case "stdio":
            return not where
        case "device":
            return re.fullmatch(r"[^\s/=]{1,15}", where) is not None


def _number(text: str, most: int) -> bool:
    """Whether `text` is a number of at most so many digits; `int` raises where there are thousands."""
    return text.isascii() and text.isdigit() and len(text) <= most


def _host_and_port(where: str) -> bool:
    host, _, port = where.rpartition(":")
    if not (_number(port, 5) and int(port) <= 65535):
        return False
    try:
        version = ipaddress.ip_address(host.strip("[]")).version
    except ValueError:
        return host == "localhost"
    return (version == 6) == (host.startswith("[") and host.endswith("]"))


def detect(fd: int) -> tuple[Kind, bool]:
    """What an inherited descriptor is, and whether it is a listening socket. Raises `ConfigError`.

    A listening stream socket is VPNKit's habit (vmnet), a connected one QEMU's; datagrams are vfkit's. A character device
    can only be a TAP.
    """
    try:
        mode = fstat(fd).st_mode
    except OSError as error:
        raise ConfigError(f"fd:{fd}: {error.strerror}; the parent must leave the descriptor open across exec") from None
    if stat.S_ISCHR(mode):
        return "tap", False
    if not stat.S_ISSOCK(mode):
        raise ConfigError(f"fd:{fd} is neither a socket nor a TAP device; pass one of these")
    probe = socket.socket(fileno=fd)
    try:
        kind = probe.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE)
        listening = bool(probe.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        packet = probe.family == getattr(socket, "AF_PACKET", None)
    finally:
        probe.detach()
    if packet:
        return "packet", False
    if kind == socket.SOCK_STREAM:
        return ("vmnet" if listening else "qemu"), listening
    if kind == socket.SOCK_DGRAM:
        return "unixgram", False
    if kind == getattr(socket, "SOCK_SEQPACKET", None):
        return "bess", listening
    raise ConfigError(f"fd:{fd} is a socket of type {kind}; a stream, datagram, seqpacket or packet socket is needed")
