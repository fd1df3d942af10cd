"""Settings: one definition for the YAML key, the flag, the line of `--help` and the paragraph of the manual.

The definition is a field of a frozen dataclass: its name is the key, its default the default, its docstring the text.
`OPTIONS` lists them all, each with its parser and an example. A value is text until its option has parsed it, whether it
comes from a flag or from the file: YAML 1.1's own ideas (`off` is false, `22:22` is 1342) never get a say.

`load` reads the file (with positions, so that every complaint is `file:line:column: what is wrong; what would be
accepted`), lays the flags over it, and raises one `ConfigErrors` with all complaints.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from netstack.errors import ConfigError
from netstack.settings import Limits, Network, Timeouts, parse_mac
from portfwd.spec import PublishSpec

if TYPE_CHECKING:
    import yaml

LOG_LEVELS: Final = ("error", "warning", "info", "debug")


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureSettings:
    """What is written for Wireshark."""

    file: str | None = None
    """Write every frame of every link to this pcapng file, both directions. A full disk stops the capture, not the network."""
    size: int = 0
    """Octets after which a new file is begun; 0 means one file without limit."""
    files: int = 2
    """How many files of `size` are kept, the current one included; the oldest goes first."""
    snaplen: int = 65535
    """Octets kept of each frame."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DnsSettings:
    """The resolver on the gateway."""

    servers: tuple[str, ...] = ()
    """Ask these servers instead of the host's own resolvers; `IP` or `IP:PORT`."""
    hosts_file: str | None = "/etc/hosts"
    """Names answered from this file of the host before any server is asked; `off` answers none."""
    resolv_conf: str = "/etc/resolv.conf"
    """Where the host's resolvers are listed; read again when it changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that `pyvpnkit run` can be told."""

    links: tuple[str, ...] = ()
    """Where guests attach, as `scheme:address`; the manual lists the schemes."""
    publish: tuple[PublishSpec, ...] = ()
    """Host ports that lead into a guest: `[tcp|udp:][IP:]PORT:[GUESTIP:]GUESTPORT`. Without IP the port
    is bound on 127.0.0.1 alone; without GUESTIP it goes to the guest with the lowest leased address; host port 0 picks a free
    one; `8000-8010:80-90` is a range."""
    network: Network = field(default_factory=Network)
    """The virtual network."""
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    """The capture file."""
    dns: DnsSettings = field(default_factory=DnsSettings)
    """Name resolution."""
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
    """When started as root: become this user once links and ports are open."""


class ConfigErrors(ConfigError):
    """All complaints about the settings, one line each."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


# --- values -----------------------------------------------------------------------------------------------------------

Parse = Callable[[str], Any]
_OFF: Final = ("off", "no", "none", "null", "~", "false", "")
_ON: Final = ("on", "yes", "true")
_SUFFIX: Final = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def _text(text: str) -> str:
    if not text:
        raise ConfigError("is empty; leave the key out for its default")
    return text


def _flag(text: str) -> bool:
    if text.lower() in _ON:
        return True
    if text.lower() in _OFF[:-1]:
        return False
    raise ConfigError(f"{text!r} is neither on nor off")


def _number(low: int, high: int | None = None) -> Parse:
    wanted = f"a whole number from {low} to {high}" if high is not None else f"a whole number of at least {low}"

    def parse(text: str) -> int:
        try:
            value = int(text.replace("_", ""))
        except ValueError:
            raise ConfigError(f"{text!r} is not a number; write {wanted}") from None
        if value < low or (high is not None and value > high):
            raise ConfigError(f"{text} is out of range; write {wanted}")
        return value

    return parse


def _octets(text: str) -> int:
    factor = _SUFFIX.get(text[-1:].lower(), 1)
    try:
        value = int(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        value = -1
    if value < 0:
        raise ConfigError(f"{text!r} is not a size; write octets, or a number with K, M or G such as 100M")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text.removesuffix("s"))
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise ConfigError(f"{text!r} is not a time; write seconds such as 5 or 0.5")
    return value


def _or_off(parse: Parse) -> Parse:
    return lambda text: None if text.lower() in _OFF else parse(text)


def _one_of(*choices: str) -> Parse:
    def parse(text: str) -> str:
        if text.lower() not in choices:
            raise ConfigError(f"{text!r} is unknown{meant(text.lower(), choices)}; write one of: {', '.join(choices)}")
        return text.lower()

    return parse


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        raise ConfigError(f"{text!r} is not an IPv4 address; write it as in 192.168.65.1") from None


def _prefix(text: str) -> str:
    try:
        return str(ipaddress.ip_network(text))
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a network ({error}); write it as in 10.1.0.0/16") from None


def _server(text: str) -> str:
    """`IP`, `IP:PORT`, `[IPv6]:PORT`."""
    address, port = text, "53"
    if text.startswith("["):
        address, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or "53"
    elif text.count(":") == 1:
        address, _, port = text.partition(":")
    try:
        ipaddress.ip_address(address)
        if not 1 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{text!r} is not a server; write IP or IP:PORT such as 9.9.9.9 or [2620:fe::fe]:53"
        ) from None
    return text


def _mac(text: str) -> str:
    return parse_mac(text).hex(":")


def _link(text: str) -> str:
    from netstack.link.spec import LinkSpec  # here, so that settings without links need no link code

    return str(LinkSpec.parse(text))


# --- options ----------------------------------------------------------------------------------------------------------


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
        for one in dataclasses.fields(SECTIONS[self.section]):
            if one.name == self.name:
                return one.default if one.default is not MISSING else one.default_factory()  # type: ignore[misc]
        raise KeyError(self.key)

    def parse_item(self, text: str) -> Any:
        """One value, or for a mapping one `KEY=VALUE`."""
        if not self.pairs:
            return self.parse(text)
        left, equals, right = text.partition("=")
        if not equals:
            raise ConfigError(f"{text!r}: write {self.metavar} such as {self.example}")
        return _mac(left), self.parse(right)

    def collect(self, texts: Iterable[str]) -> Any:
        """The value of a flag given once or several times."""
        if not (self.many or self.pairs):
            *_, last = texts
            return self.parse_item(last)
        items = [part for text in texts for part in (text.split(",") if self.commas else [text])]
        values = [self.parse_item(item) for item in items if item]
        return dict(values) if self.pairs else tuple(values)


SECTIONS: Final[Mapping[str, type[Any]]] = {
    "": Settings,
    "network": Network,
    "limits": Limits,
    "timeouts": Timeouts,
    "capture": CaptureSettings,
    "dns": DnsSettings,
}
"""Where a dotted key's dataclass is. `limits` and `timeouts` stand at the top of the file, and inside `Network` in memory."""


def _option(key: str, flags: str, metavar: str, parse: Parse, example: str, **more: bool) -> Option:
    return Option(key=key, flags=tuple(flags.split()), metavar=metavar, parse=parse, example=example, **more)


def _limit(name: str, example: str, parse: Parse | None = None, metavar: str = "N") -> Option:
    return _option(f"limits.{name}", f"--{name.replace('_', '-')}", metavar, parse or _number(1), example)


def _timeout(name: str, example: str, *, reload: bool = False) -> Option:
    flag = name.removesuffix("_s").replace("_", "-")
    return _option(f"timeouts.{name}", f"--{flag}", "SECONDS", _seconds, example, reload=reload)


OPTIONS: Final[tuple[Option, ...]] = (
    _option("links", "--link", "SCHEME:ADDRESS", _link, "qemu:/run/user/1000/net.sock", many=True, commas=False),
    _option("publish", "-p --publish", "SPEC", PublishSpec.parse, "8080:80", many=True, reload=True),
    _option("ntp", "--ntp", "on|off", _flag, "off"),
    _option("state_dir", "--state-dir", "DIR", _or_off(_text), "/var/lib/pyvpnkit"),
    _option("pid_file", "--pid-file", "FILE", _or_off(_text), "/run/pyvpnkit.pid"),
    _option("log_level", "--log-level", "LEVEL", _one_of(*LOG_LEVELS), "debug", reload=True),
    _option("user", "--user", "NAME", _or_off(_text), "nobody"),
    _option("network.subnet", "--subnet", "NETWORK", _prefix, "10.0.2.0/24"),
    _option("network.gateway", "--gateway-ip", "IP", _ipv4, "10.0.2.1"),
    _option("network.host_alias", "--host-alias --host-ip", "IP|off", _or_off(_ipv4), "10.0.2.2"),
    _option("network.pool_first", "--pool-first", "IP", _or_off(_ipv4), "192.168.65.100"),
    _option("network.pool_last", "--pool-last", "IP", _or_off(_ipv4), "192.168.65.199"),
    _option("network.gateway_mac", "--gateway-mac", "MAC", _mac, "02:00:00:00:00:01"),
    _option("network.mtu", "--mtu", "OCTETS", _number(576, 65520), "65520"),
    _option("network.domain", "--domain", "NAME|off", _or_off(_text), "vm.example"),
    _option("network.search", "--search", "NAME", _text, "corp.example", many=True),
    _option("network.dns_servers", "--dhcp-dns", "IP", _ipv4, "10.1.1.1", many=True),
    _option("network.ntp_servers", "--dhcp-ntp", "IP", _ipv4, "10.1.1.2", many=True),
    _option("network.gateway_names", "--gateway-names", "NAME", _text, "gateway.docker.internal", many=True),
    _option("network.host_names", "--host-names", "NAME", _text, "host.docker.internal", many=True),
    _option("network.static_leases", "--static-lease", "MAC=IP", _ipv4, "02:00:00:00:00:07=192.168.65.7", pairs=True),
    _option("network.lease_s", "--lease", "SECONDS", _number(60, 0xFFFFFFFF), "3600"),
    _option("network.routed", "--routed", "NETWORK", _prefix, "172.17.0.0/16", many=True),
    _option("network.strict_sources", "--strict-sources", "on|off", _flag, "on"),
    _option("network.udp_filtering", "--udp-filtering", "WHAT", _one_of("independent", "endpoint"), "endpoint"),
    _option("network.allow", "--allow", "NETWORK", _prefix, "169.254.169.254/32", many=True),
    _limit("max_flows", "4096"),
    _limit("max_udp_flows", "4096"),
    _limit("max_pings", "64"),
    _limit("max_neighbours", "64"),
    _limit("max_fragments", "16"),
    _limit("max_fragment_octets", "1M", _octets, "SIZE"),
    _limit("max_leases_per_port", "1"),
    _limit("flow_buffer", "256K", _octets, "SIZE"),
    _limit("descriptor_reserve", "128", _number(8)),
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
    _option("capture.file", "--capture", "FILE", _or_off(_text), "/tmp/guest.pcapng"),
    _option("capture.size", "--capture-size", "SIZE", _octets, "100M"),
    _option("capture.files", "--capture-files", "N", _number(1), "5"),
    _option("capture.snaplen", "--capture-snaplen", "OCTETS", _number(64, 1 << 18), "128"),
    _option("dns.servers", "--dns-server", "IP[:PORT]", _server, "9.9.9.9", many=True, reload=True),
    _option("dns.hosts_file", "--dns-hosts-file", "FILE|off", _or_off(_text), "off", reload=True),
    _option("dns.resolv_conf", "--dns-resolv-conf", "FILE", _text, "/run/systemd/resolve/resolv.conf", reload=True),
)

BY_KEY: Final[Mapping[str, Option]] = {option.key: option for option in OPTIONS}

GIVEN_BY_SUBNET: Final = ("network.gateway", "network.host_alias")
"""Follow a subnet of one's own as its first and second address, unless they are given themselves."""


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Given:
    """A value somebody gave, and where."""

    where: str
    """`file:line:column` or the flag."""
    value: Any


def load(path: str | None = None, flags: Mapping[str, Sequence[str]] | None = None) -> Settings:
    """Settings of the file at `path` (if any) with `flags` (option key -> texts) over it. Raises `ConfigErrors`."""
    complaints: list[str] = []
    given: dict[str, Given] = {}
    if path is not None:
        given.update(_read(path, complaints))
    for key, texts in (flags or {}).items():
        option = BY_KEY[key]
        flag = option.flags[-1]
        try:
            given[key] = Given(flag, option.collect(texts))
        except ConfigError as error:
            complaints.append(_complaint(flag, key, error))
    settings = _build(given, complaints)
    if complaints:
        raise ConfigErrors(complaints)
    return settings


def differences(old: Settings, new: Settings) -> list[Option]:
    """The options in which the two differ."""
    return [option for option in OPTIONS if value_of(old, option) != value_of(new, option)]


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


def _complaint(where: str, key: str, error: ConfigError) -> str:
    name = key.rpartition(".")[2]
    text = str(error).removeprefix(f"{name}: ")
    return f"{where}: {key}: {text}"


def meant(word: str, choices: Iterable[str]) -> str:
    """A question for who wrote `word`, or ""."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _read(path: str, complaints: list[str]) -> dict[str, Given]:
    """Every value of the file that can be read; what cannot becomes a complaint."""
    import yaml

    try:
        with Path(path).open("rb") as file:
            mode = Path(path).stat().st_mode
            root = yaml.compose(file, yaml.SafeLoader)
    except OSError as error:
        complaints.append(f"{path}: {error.strerror}; give --config a file that can be read")
        return {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        complaints.append(f"{where}: not YAML: {error.problem or error.context}")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        complaints.append(f"{path}: not YAML: {' '.join(str(error).split())}")
        return {}
    if mode & stat.S_IWOTH:
        complaints.append(f"{path}: everybody may write it, so anybody could open ports; run `chmod o-w {path}`")
    given: dict[str, Given] = {}
    if root is not None:
        _Reader(path, complaints, given).section(root, "")
    return given


class _Reader:
    """Walks the nodes of one file."""

    def __init__(self, path: str, complaints: list[str], given: dict[str, Given]) -> None:
        self._path = path
        self._complaints = complaints
        self._given = given

    def _where(self, node: yaml.Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _complain(self, node: yaml.Node, text: str) -> None:
        self._complaints.append(f"{self._where(node)}: {text}")

    def _items(self, node: yaml.Node, what: str) -> Iterable[tuple[str, yaml.Node, yaml.Node]]:
        """Keys (text and node) and values of a mapping; anything else, and a key given twice, is a complaint."""
        if node.id == "scalar" and node.tag == "tag:yaml.org,2002:null":
            return
        if node.id != "mapping":
            self._complain(node, f"{what} must be a mapping of keys to values")
            return
        seen: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            if key_node.id != "scalar":
                self._complain(key_node, f"{what}: a key must be a plain word")
                continue
            if (first := seen.get(key_node.value)) is not None:
                line = first.start_mark.line + 1
                self._complain(key_node, f"{key_node.value!r} is given twice (first on line {line}); keep one")
                continue
            seen[key_node.value] = key_node
            yield key_node.value, key_node, value

    def section(self, node: yaml.Node, name: str) -> None:
        known = [option.name for option in OPTIONS if option.section == name]
        if not name:
            known += [section for section in SECTIONS if section]
        for key, key_node, value in self._items(node, name or "the settings"):
            dotted = f"{name}.{key}" if name else key
            if not name and key in SECTIONS and key:
                self.section(value, key)
            elif (option := BY_KEY.get(dotted)) is not None:
                self._option(option, value)
            else:
                self._complain(key_node, self._unknown(key, name, known))

    @staticmethod
    def _unknown(key: str, section: str, known: Sequence[str]) -> str:
        elsewhere = [option.key for option in OPTIONS if option.name == key]
        where = f"in {section!r}" if section else "at the top"
        if elsewhere:
            return f"unknown key {key!r} {where}; it belongs at {elsewhere[0]}"
        meant = meant(key, known)
        return f"unknown key {key!r} {where}{meant}" + ("" if meant else f"; known are: {', '.join(sorted(known))}")

    def _option(self, option: Option, node: yaml.Node) -> None:
        where = self._where(node)
        try:
            if option.pairs:
                value: Any = self._mapping(option, node)
            elif option.many:
                value = self._sequence(option, node)
            elif node.id != "scalar":
                raise ConfigError(f"a single value is wanted, such as {option.example}")
            elif not node.value and node.style is None:
                value = option.default  # `key:` with nothing behind it
            else:
                value = option.parse(node.value)
        except ConfigError as error:
            self._complaints.append(_complaint(where, option.key, error))
            return
        self._given[option.key] = Given(where, value)

    def _each(self, option: Option, node: yaml.Node, text: str) -> list[Any]:
        try:
            return [option.parse_item(text)]
        except ConfigError as error:
            self._complaints.append(_complaint(self._where(node), option.key, error))
            return []

    def _sequence(self, option: Option, node: yaml.Node) -> tuple[Any, ...]:
        if node.id == "scalar":
            return () if node.tag == "tag:yaml.org,2002:null" else tuple(self._each(option, node, node.value))
        if node.id != "sequence":
            raise ConfigError(f"a list is wanted, such as [{option.example}]")
        values: list[Any] = []
        for item in node.value:
            if item.id == "scalar":
                values += self._each(option, item, item.value)
            else:
                self._complain(item, f"{option.key}: a single value is wanted, such as {option.example}")
        return tuple(values)

    def _mapping(self, option: Option, node: yaml.Node) -> dict[Any, Any]:
        pairs: list[tuple[Any, Any]] = []
        for key, key_node, value in self._items(node, option.key):
            text = value.value if value.id == "scalar" else ""
            pairs += self._each(option, key_node, f"{key}={text}")
        return dict(pairs)


def _build(given: Mapping[str, Given], complaints: list[str]) -> Settings:
    """The dataclasses; a value they refuse becomes a complaint and gives way to its default, so that the next is heard too."""
    left = dict(given)

    def of(section: str) -> dict[str, Any]:
        return {BY_KEY[key].name: one.value for key, one in left.items() if BY_KEY[key].section == section}

    while True:
        try:
            network = _network(of("network"), Limits(**of("limits")), Timeouts(**of("timeouts")))
            break
        except ConfigError as error:
            name = str(error).partition(":")[0]
            culprits = {"pool": ("pool_last", "pool_first", "subnet")}.get(name, (name, "subnet"))
            key = next((f"network.{one}" for one in culprits if f"network.{one}" in left), None)
            if key is None:
                complaints.append(str(error))
                network = Network()
                break
            complaints.append(_complaint(left.pop(key).where, key, error))
            if key == "network.subnet":
                # What lies in the subnet cannot be judged without it.
                for dependent in ("gateway", "host_alias", "pool_first", "pool_last", "static_leases"):
                    left.pop(f"network.{dependent}", None)
    top = of("")
    _overlaps(top.get("publish", ()), given, complaints)
    return Settings(network=network, capture=CaptureSettings(**of("capture")), dns=DnsSettings(**of("dns")), **top)


def _network(values: dict[str, Any], limits: Limits, timeouts: Timeouts) -> Network:
    if "subnet" in values:
        try:
            subnet = ipaddress.IPv4Network(values["subnet"])
        except ValueError:
            return Network(**values)  # which says what is wrong with it
        free = (str(subnet.network_address + number) for number in (1, 2, 3))
        taken = {values.get("gateway"), values.get("host_alias")}
        for name in ("gateway", "host_alias"):
            if name not in values:
                values[name] = next(address for address in free if address not in taken)
    return Network(limits=limits, timeouts=timeouts, **values)


def _overlaps(specs: Sequence[PublishSpec], given: Mapping[str, Given], complaints: list[str]) -> None:
    seen: dict[tuple[str, str, int], PublishSpec] = {}
    for spec in specs:
        for single in spec.each():
            if not single.port:
                continue
            first = seen.setdefault((single.protocol, single.bind, single.port), spec)
            if first is not spec:
                complaints.append(
                    f"{given['publish'].where}: publish: {spec} uses a host port of {first}; keep one of the two"
                )
                break


# --- words ------------------------------------------------------------------------------------------------------------


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
        return "off" if "off" in option.metavar or option.name in ("pid_file", "user", "file") else "automatic"
    if value is True or value is False:
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(str(one) for one in value) or "none"
    if isinstance(value, dict):
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)
