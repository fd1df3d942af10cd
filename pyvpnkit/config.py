"""Settings: one definition for the YAML key, the flag, the line of `--help` and the paragraph of the manual.

The definition is a field of a frozen dataclass: its name is the key, its default the default, its docstring the text.
`OPTIONS` lists them all, each with its parser and an example. `pyvpnkit.loader` reads files and lays flags over them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Final

from netstack.errors import ConfigError
from netstack.link.spec import LinkSpec
from netstack.settings import Limits, Network, Timeouts
from portfwd import spec
from portfwd.spec import PublishSpec
from pyvpnkit import values
from pyvpnkit.values import Parse

DNS_SOURCES: Final = ("auto", "resolv.conf", "resolved", "scutil", "file", "getaddrinfo")
LOG_LEVELS: Final = ("error", "warning", "info", "debug")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSettings:
    """What is written for Wireshark."""

    file: str | None = None
    """Write every frame of every link to this pcapng file, both directions. A full disk stops the capture, not the network."""
    size: int = 256 << 20
    """Octets after which the file becomes FILE.1 and a new one is begun; at least 64K, or 0 for one file without limit."""
    files: int = 2
    """How many files of `size` are kept, the current one included; the oldest goes first."""
    snaplen: int = 65535
    """Octets kept of each frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsSettings:
    """The resolver on the gateway."""

    servers: tuple[str, ...] = ()
    """Ask these servers instead of the host's own resolvers; `IP`, `IP:PORT` or `tls://IP[:PORT]#NAME` (DNS over TLS)."""
    tls_ca: str | None = None
    """A PEM file with the authorities to trust for DNS over TLS, in place of the host's."""
    resolvers: str = "auto"
    """Where the host's resolvers come from: `resolv.conf`, `resolved` (systemd-resolved, with its links' domains), `scutil`
    (macOS), `file` (the one of `dns.file`), `getaddrinfo` (the host's library is asked, as VPNKit's Host mode), or `auto`."""
    file: str | None = None
    """A file of resolvers in VPNKit's form (`nameserver IP#PORT`, `zone`, `order`, `timeout`, `search`), followed while it
    changes; it may come later."""
    records: Mapping[str, str] = field(default_factory=dict)
    """Addresses of names that are answered here, one of IPv4, of IPv6, or both: `www.corp.example: 10.0.0.5`,
    `"*.apps.example": 192.168.65.3`. Other names of the same domain are asked for elsewhere."""
    rules: Mapping[str, str] = field(default_factory=dict)
    """Servers for a domain and all names below it, before all others: `corp.example: 10.0.0.53 10.0.0.54`, or `refuse`."""
    aaaa: str = "auto"
    """Whether queries for IPv6 addresses are asked: `on`, `off` (there are none), or `auto`: while the host has a way to IPv6."""
    hosts_file: str | None = "/etc/hosts"
    """Names answered from this file of the host before any server is asked; `off` answers none."""
    resolv_conf: str = "/etc/resolv.conf"
    """Where the host's resolvers are listed; read again when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpProxySettings:
    """A proxy of the host's network that guests' HTTP goes through. With any of these the gateway is an HTTP proxy itself, at
    ports 3128 (for http) and 3129 (for https)."""

    http: str | None = None
    """Proxy for HTTP, `http://[USER:PASSWORD@]HOST:PORT`: connections of guests to port 80 are taken, and carried on by it."""
    https: str | None = None
    """Proxy for HTTPS: connections to port 443 go through it by CONNECT."""
    exclude: tuple[str, ...] = ()
    """Hosts that are reached without it: names with all below them, `*.corp.example`, addresses, prefixes."""
    environment: bool = False
    """Take http_proxy, https_proxy and no_proxy of the daemon's environment, where nothing else is said."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """Who may look in and change things while the daemon runs."""

    socket: str | None = "auto"
    """Unix socket of the HTTP API, for this user and root only; `auto` is control.sock in the state directory, `off` makes
    none."""
    listen: tuple[str, ...] = ()
    """Where the same API is to be had besides: `unix:/PATH`, as clients of gvproxy want it, or `tcp:IP:PORT`. Beyond this
    host's loopback only with a token."""
    token_file: str | None = None
    """A file that holds the bearer token which requests on TCP must carry; readable by its owner only."""
    users: tuple[int, ...] = ()
    """Numbers of other users who may use the Unix sockets."""
    guest_api: bool = False
    """Serve gvproxy's forwarder API (expose, unexpose, all) to guests at port 80 of the gateway, as podman machine wants it. A
    guest sees and removes only what it made."""
    guest_bind: str = "loopback"
    """Where guests may publish by it: on this host's `loopback` (who asks for every address gets 127.0.0.1; ports from 1024 on), or
    on `any` address and port they ask for, as with gvproxy: other machines may then reach what a guest publishes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VpnkitSettings:
    """VPNKit's own sockets and files, as its flags name them."""

    port: tuple[str, ...] = ()
    """Unix sockets of VPNKit's 9P port control, for programs inside the VM (vpnkit-expose-port of before 2019, a mount at
    /port); HTTP is answered there too. `/PATH`, or `fd:N` for a listening socket that was inherited."""
    introspection: tuple[str, ...] = ()
    """Unix sockets of a read-only 9P tree: connections, flows, endpoints, ports and captures."""
    diagnostics: tuple[str, ...] = ()
    """Unix sockets that give each client a tar of that tree."""
    pcap: tuple[str, ...] = ()
    """Unix sockets that give each client a live capture in the classic pcap format."""
    pcap_snaplen: int = 128
    """Octets kept of each frame in that capture."""
    gateway_forwards: str | None = None
    """A JSON file of ports of the gateway that lead elsewhere, followed while it changes."""
    tcpv4_forwards: tuple[str, ...] = ()
    """TCP ports of the gateway that lead elsewhere: `PORT:IP:PORT`, the IP as this host sees it. Before all others."""
    udpv4_forwards: tuple[str, ...] = ()
    """The same for UDP."""
    http: str | None = None
    """A JSON file of HTTP proxies (VPNKit's http_proxy.json), followed while it changes."""
    http_api: tuple[str, ...] = ()
    """Unix sockets where that document can be had and set (`GET` and `POST /http_proxy.json`)."""
    forwards: str | None = None
    """A JSON file of prefixes whose TCP connections are carried through a program at a Unix socket, followed while it
    changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that `pyvpnkit run` can be told."""

    links: tuple[LinkSpec, ...] = ()
    """Where guests attach, as `scheme:address`: vhost-user, qemu, vmnet, unixgram, bess, tap, packet or fd; the manual has
    their forms."""
    publish: tuple[PublishSpec, ...] = ()
    """Host ports that lead into a guest: `[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT`. Without IP the port
    is bound on 127.0.0.1 alone; without GUESTIP it goes to the guest with the lowest leased address; host port 0 picks a free
    one; `8000-8010:80-90` is a range. `unix:/PATH` in place of the host port is a Unix socket, a path in place of the guest
    port one in the guest. Options follow: `,source=client` `,proxy=v1` `,proxy=v2` `,via=forwarder` (docs/ports.md)."""
    allowed_bind_addresses: tuple[str, ...] = ("0.0.0.0", "::")
    """Host addresses that may be published on by the control API and by programs in the VM; 0.0.0.0 and :: stand for all of
    their family. What the settings publish is not asked."""
    allowed_socket_directories: tuple[str, ...] = ()
    """Directories in which programs in the VM may have Unix sockets published; with none, those of the `vpnkit.port` sockets."""
    forwarder: str | None = None
    """How VPNKit's forwarder in the VM is reached, for what only the VM reaches (containers, its loopback, paths in it):
    `hyperkit:/PATH/connect`, `connect:/PATH`, `unix:/PATH`, `listen:/PATH` or `fd:N`, with options such as
    `,port=62373,generation=2` (docs/ports.md). A path alone is VPNKit's `--vsock-path`: HyperKit's, generation 2."""
    network: Network = field(default_factory=Network)
    """The virtual network."""
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    """The capture file."""
    dns: DnsSettings = field(default_factory=DnsSettings)
    """Name resolution."""
    http_proxy: HttpProxySettings = field(default_factory=HttpProxySettings)
    """The HTTP proxy."""
    way_out: tuple[str, ...] = ()
    """By which way guests' TCP leaves the host, the first rule that matches: `MATCH[:PORT] -> WAY`. MATCH is `*`, an address, a
    prefix or a domain; WAY is `direct`, `refuse`, `socks5://[USER:PASSWORD@]HOST:PORT`, `socks5h://...` (the proxy looks names
    up) or `http://...` (CONNECT). Without a match: directly."""
    way_out_fail: str = "closed"
    """When a proxy of `way_out` cannot be reached: connections fail (`closed`), or go directly (`open`)."""
    way_out_udp: str = "auto"
    """UDP and ping where a rule names a proxy, which carries neither: `refuse`, `direct`, or `auto`: as `way_out_fail` says."""
    control: ControlSettings = field(default_factory=ControlSettings)
    """The control API."""
    vpnkit: VpnkitSettings = field(default_factory=VpnkitSettings)
    """VPNKit's sockets and files."""
    ntp: bool = True
    """Answer time requests on the gateway's port 123."""
    state_dir: str | None = "auto"
    """Where leases are kept across restarts; `auto` is $STATE_DIRECTORY, else $XDG_STATE_HOME/pyvpnkit, else
    ~/.local/state/pyvpnkit; `off` keeps them in memory."""
    pid_file: str | None = None
    """Holds the process id while the daemon runs; locked, so that a second one with the same file refuses to start."""
    log_level: str = "info"
    """How much is said on standard error: error, warning, info or debug (each flow)."""
    user: str | None = None
    """When started as root: become this user once the published ports are bound; links, state and capture are then opened as
    that user."""


def _at_commas(text: str) -> list[str]:
    return text.split(",")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One setting, wherever it is written."""

    key: str
    """Dotted place in the file: `limits.max_flows`."""
    flags: tuple[str, ...]
    metavar: str
    parse: Parse
    """Text to value; raises `ConfigError` without the option's name."""
    example: str
    """A value, as text."""
    many: bool = False
    """A list: repeat the flag, or separate by commas; a YAML sequence in the file."""
    pairs: bool = False
    """A mapping: `--flag KEY=VALUE`; a YAML mapping in the file."""
    reload: bool = False
    """Takes effect on SIGHUP."""
    commas: bool = True
    parse_key: Parse = values.mac
    """Of a mapping's keys."""
    split: Callable[[str], list[str]] = _at_commas
    """Takes a list apart, where its items are separated by commas."""

    @property
    def dest(self) -> str:
        """Name in argparse's namespace."""
        return self.key.replace(".", "__")

    @property
    def section(self) -> str:
        """`limits` of `limits.max_flows`, "" at the top."""
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def default(self) -> Any:
        """The value when nobody says anything."""
        one = next(one for one in dataclasses.fields(SECTIONS[self.section]) if one.name == self.name)
        return one.default if one.default_factory is MISSING else one.default_factory()

    def parse_item(self, text: str) -> Any:
        """One value, or for a mapping one `KEY=VALUE`."""
        if not self.pairs:
            return self.parse(text)
        left, equals, right = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: write {self.metavar} such as {self.example}")
        return self.parse_key(left), self.parse(right)

    def collect(self, texts: Iterable[str]) -> Any:
        """The value of a flag given once or several times."""
        if not (self.many or self.pairs):
            *_, last = texts
            return self.parse_item(last)
        items = [part for text in texts for part in (self.split(text) if self.commas else [text])]
        found = [self.parse_item(item) for item in items if item]
        return dict(found) if self.pairs else tuple(found)


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "": Settings,
    "network": Network,
    "limits": Limits,
    "timeouts": Timeouts,
    "capture": CaptureSettings,
    "dns": DnsSettings,
    "http_proxy": HttpProxySettings,
    "control": ControlSettings,
    "vpnkit": VpnkitSettings,
}
"""Where a dotted key's dataclass is. `limits` and `timeouts` stand at the top of the file, and inside `Network` in memory."""


def _option(key: str, flags: str, metavar: str, parse: Parse, example: str, **more: Any) -> Option:
    return Option(key=key, flags=tuple(flags.split()), metavar=metavar, parse=parse, example=example, **more)


def _limit(name: str, example: str, parse: Parse | None = None, metavar: str = "N") -> Option:
    return _option(f"limits.{name}", f"--{name.replace('_', '-')}", metavar, parse or values.number(1), example)


def _timeout(name: str, example: str, *, reload: bool = False) -> Option:
    flag = name.removesuffix("_s").replace("_", "-")
    return _option(f"timeouts.{name}", f"--{flag}", "SECONDS", values.seconds, example, reload=reload)


OPTIONS: Final[tuple[Option, ...]] = (
    _option("links", "--link", "URL", values.link, "qemu:/run/user/1000/net.sock", many=True, commas=False),
    _option("publish", "-p --publish", "SPEC", PublishSpec.parse, "8080:80", many=True, reload=True, split=spec.split),
    _option(
        "allowed_bind_addresses", "--allowed-bind-addresses", "IP", values.address, "127.0.0.1", many=True, reload=True
    ),
    _option(
        "allowed_socket_directories",
        "--allowed-socket-directories",
        "DIR",
        values.directory,
        "/run/vm",
        many=True,
        reload=True,
    ),
    _option(
        "forwarder",
        "--forwarder --vsock-path --port-forwards",
        "HOW",
        values.or_off(values.forwarder),
        "hyperkit:/var/run/vm/connect",
    ),
    _option("ntp", "--ntp", "on|off", values.flag, "off"),
    _option("state_dir", "--state-dir", "DIR", values.or_off(values.text), "/var/lib/pyvpnkit"),
    _option("pid_file", "--pid-file", "FILE", values.or_off(values.text), "/run/pyvpnkit.pid"),
    _option("log_level", "--log-level", "LEVEL", values.one_of(*LOG_LEVELS), "debug", reload=True),
    _option("user", "--user", "NAME", values.or_off(values.text), "nobody"),
    _option("network.subnet", "--subnet", "NETWORK|auto", values.subnet, "10.0.2.0/24"),
    _option("network.gateway", "--gateway-ip", "IP", values.ipv4, "10.0.2.1"),
    _option("network.host_alias", "--host-alias --host-ip", "IP|off", values.or_off(values.ipv4), "10.0.2.2"),
    _option("network.gateway_aliases", "--gateway-alias", "IP", values.ipv4, "192.168.65.250", many=True),
    _option("network.pool_first", "--pool-first", "IP", values.or_off(values.ipv4), "192.168.65.100"),
    _option("network.pool_last", "--pool-last", "IP", values.or_off(values.ipv4), "192.168.65.199"),
    _option("network.gateway_mac", "--gateway-mac", "MAC", values.mac, "02:00:00:00:00:01"),
    _option("network.mtu", "--mtu", "OCTETS|auto", values.mtu, "65520"),
    _option("network.domain", "--domain", "NAME|off", values.or_off(values.text), "vm.example", reload=True),
    _option("network.search", "--search", "NAME", values.text, "corp.example", many=True, reload=True),
    _option("network.dns_servers", "--dhcp-dns", "IP", values.ipv4, "10.1.1.1", many=True),
    _option("network.ntp_servers", "--dhcp-ntp", "IP", values.ipv4, "10.1.1.2", many=True),
    _option("network.gateway_names", "--gateway-names", "NAME", values.text, "gateway.docker.internal", many=True),
    _option("network.host_names", "--host-names", "NAME", values.text, "host.docker.internal", many=True),
    _option(
        "network.static_leases", "--static-lease", "MAC=IP", values.ipv4, "02:00:00:00:00:07=192.168.65.7", pairs=True
    ),
    _option("network.lease_s", "--lease", "SECONDS", values.number(60, 0xFFFFFFFF), "3600"),
    _option("network.routed", "--routed", "NETWORK", values.prefix, "172.17.0.0/16", many=True),
    _option("network.strict_sources", "--strict-sources", "on|off", values.flag, "on"),
    _option("network.udp_filtering", "--udp-filtering", "WHAT", values.one_of("independent", "endpoint"), "endpoint"),
    _option("network.allow", "--allow", "NETWORK", values.prefix, "169.254.169.254/32", many=True),
    _limit("max_flows", "4096"),
    _limit("max_udp_flows", "4096"),
    _limit("max_pings", "64"),
    _limit("max_neighbours", "64"),
    _limit("max_fragments", "16"),
    _limit("max_fragment_octets", "1M", values.octets, "SIZE"),
    _limit("max_leases_per_port", "1"),
    _limit("flow_buffer", "256K", values.octets, "SIZE"),
    _limit("max_memory", "64M", values.octets, "SIZE"),
    _limit("descriptor_reserve", "128", values.number(8)),
    _timeout("tcp_connect_s", "30"),
    _timeout("tcp_idle_s", "7200"),
    _timeout("tcp_user_s", "300"),
    _timeout("tcp_fin_wait_s", "20"),
    _timeout("tcp_time_wait_s", "1"),
    _timeout("udp_idle_s", "180"),
    _timeout("udp_short_s", "10"),
    _timeout("ping_idle_s", "10"),
    _timeout("reassembly_s", "15"),
    _timeout("grace_s", "30", reload=True),
    _option("capture.file", "--capture", "FILE", values.or_off(values.text), "/tmp/guest.pcapng"),
    _option("capture.size", "--capture-size", "SIZE", values.file_size, "100M"),
    _option("capture.files", "--capture-files", "N", values.number(1), "5"),
    _option("capture.snaplen", "--capture-snaplen", "OCTETS", values.number(64, 1 << 18), "128"),
    _option("dns.servers", "--dns-server", "IP[:PORT]", values.server, "9.9.9.9", many=True, reload=True),
    _option("dns.hosts_file", "--dns-hosts-file", "FILE|off", values.or_off(values.text), "off", reload=True),
    _option(
        "dns.resolv_conf", "--dns-resolv-conf", "FILE", values.text, "/run/systemd/resolve/resolv.conf", reload=True
    ),
    _option("dns.tls_ca", "--dns-tls-ca", "FILE", values.or_off(values.text), "/etc/ssl/corp.pem", reload=True),
    _option("dns.resolvers", "--dns-resolvers", "WHAT", values.one_of(*DNS_SOURCES), "resolved", reload=True),
    _option("dns.file", "--dns --dns-file", "FILE", values.or_off(values.text), "/run/vm/resolv.conf", reload=True),
    _option(
        "dns.records",
        "--dns-record",
        "NAME=IP",
        values.addresses,
        "www.corp.example=10.0.0.5",
        pairs=True,
        reload=True,
        parse_key=values.record_name,
    ),
    _option(
        "dns.rules",
        "--dns-rule",
        "DOMAIN=SERVERS",
        values.dns_rule,
        "corp.example=10.0.0.53",
        pairs=True,
        reload=True,
        parse_key=values.text,
    ),
    _option("dns.aaaa", "--dns-aaaa", "on|off|auto", values.one_of("on", "off", "auto"), "off", reload=True),
    _option(
        "http_proxy.http", "--http-proxy", "URL", values.or_off(values.proxy), "http://proxy.example:3128", reload=True
    ),
    _option(
        "http_proxy.https",
        "--https-proxy",
        "URL",
        values.or_off(values.proxy),
        "http://proxy.example:3128",
        reload=True,
    ),
    _option("http_proxy.exclude", "--no-proxy", "HOST", values.text, "intranet.example", many=True, reload=True),
    _option("http_proxy.environment", "--proxy-from-environment", "on|off", values.flag, "on", reload=True),
    _option(
        "way_out",
        "--way-out",
        "RULE",
        values.way_out,
        "corp.example -> socks5h://10.0.0.1:1080",
        many=True,
        reload=True,
        commas=False,
    ),
    _option("way_out_fail", "--way-out-fail", "WHAT", values.one_of("closed", "open"), "open", reload=True),
    _option(
        "way_out_udp",
        "--way-out-udp",
        "WHAT",
        values.one_of("auto", "refuse", "direct"),
        "direct",
        reload=True,
    ),
    _option("vpnkit.http", "--http", "FILE", values.or_off(values.text), "/run/vm/http_proxy.json"),
    _option("vpnkit.http_api", "--http-api-path", "PATH", values.text, "/run/vm/http_api.sock", many=True),
    _option("control.socket", "--control-socket", "PATH|off", values.or_off(values.text), "/run/vm/control.sock"),
    _option("control.listen", "--control-listen", "WHERE", values.text, "unix:/run/vm/api.sock", many=True),
    _option("control.token_file", "--control-token-file", "FILE", values.or_off(values.text), "/etc/pyvpnkit/token"),
    _option("control.users", "--control-users", "UID", values.number(0), "1001", many=True),
    _option("control.guest_api", "--guest-api", "on|off", values.flag, "on"),
    _option("control.guest_bind", "--guest-bind", "WHERE", values.one_of("loopback", "any"), "any"),
    _option("vpnkit.port", "--port", "PATH", values.text, "/run/vm/port.sock", many=True),
    _option("vpnkit.introspection", "--introspection", "PATH", values.text, "/run/vm/introspection.sock", many=True),
    _option("vpnkit.diagnostics", "--diagnostics", "PATH", values.text, "/run/vm/diagnostics.sock", many=True),
    _option("vpnkit.pcap", "--pcap", "PATH", values.text, "/run/vm/pcap.sock", many=True),
    _option("vpnkit.pcap_snaplen", "--pcap-snaplen", "OCTETS", values.number(1, 65535), "1500"),
    _option(
        "vpnkit.gateway_forwards", "--gateway-forwards", "FILE", values.or_off(values.text), "/run/vm/forwards.json"
    ),
    _option(
        "vpnkit.tcpv4_forwards",
        "--tcpv4-forwards",
        "PORT:IP:PORT",
        values.gateway_forward("tcp"),
        "8888:127.0.0.1:80",
        many=True,
    ),
    _option(
        "vpnkit.udpv4_forwards",
        "--udpv4-forwards",
        "PORT:IP:PORT",
        values.gateway_forward("udp"),
        "5353:127.0.0.1:53",
        many=True,
    ),
    _option("vpnkit.forwards", "--forwards", "FILE", values.or_off(values.text), "/run/vm/tunnels.json"),
)

BY_KEY: Final[Mapping[str, Option]] = {option.key: option for option in OPTIONS}


_OFF_BY_DEFAULT: Final = (
    "pid_file",
    "user",
    "file",
    "token_file",
    "gateway_forwards",
    "forwards",
    "forwarder",
    "http",
    "https",
    "tls_ca",
)
"""`None` is off for these; for others it is chosen."""


def value_of(settings: Settings, option: Option) -> Any:
    """The value of `option` in `settings`."""
    holder: Any = settings
    match option.section:
        case "limits" | "timeouts" as inside:
            holder = getattr(settings.network, inside)
        case "":
            pass
        case section:
            holder = getattr(settings, section)
    return getattr(holder, option.name)


def differences(old: Settings, new: Settings) -> list[Option]:
    """The options in which the two differ."""
    return [option for option in OPTIONS if value_of(old, option) != value_of(new, option)]


def with_values(settings: Settings, source: Settings, options: Iterable[Option]) -> Settings:
    """`settings` with the values that `options` have in `source`."""
    for option in options:
        value = {option.name: value_of(source, option)}
        match option.section:
            case "":
                settings = dataclasses.replace(settings, **value)
            case "limits" | "timeouts" as inside:
                part = dataclasses.replace(getattr(settings.network, inside), **value)
                settings = dataclasses.replace(
                    settings, network=dataclasses.replace(settings.network, **{inside: part})
                )
            case section:
                part = dataclasses.replace(getattr(settings, section), **value)
                settings = dataclasses.replace(settings, **{section: part})
    return settings


def documentation(option: Option) -> str:
    """What `option` means: the docstring of its field. Reads the source, so only `--help` and tests should ask."""
    return _docstrings(SECTIONS[option.section])[option.name]


_known_docstrings: dict[type[Any], dict[str, str]] = {}


def _docstrings(kind: type[Any]) -> dict[str, str]:
    if kind not in _known_docstrings:
        import ast
        import inspect

        body = ast.parse(inspect.getsource(kind)).body[0]
        assert isinstance(body, ast.ClassDef)
        found: dict[str, str] = {}
        for before, after in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
                and isinstance(after.value.value, str)
            ):
                found[before.target.id] = " ".join(after.value.value.split())
        _known_docstrings[kind] = found
    return _known_docstrings[kind]


def default_text(option: Option) -> str:
    """The default as one would write it."""
    value = option.default
    if value is None:
        return "off" if "off" in option.metavar or option.name in _OFF_BY_DEFAULT else "automatic"
    if value is True or value is False:
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(one) for one in value) or "none"
    if isinstance(value, dict):
        return "none"
    if option.metavar == "SIZE" and value and not value % (1 << 10):
        return f"{value >> 20}M" if not value % (1 << 20) else f"{value >> 10}K"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
