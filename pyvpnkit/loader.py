"""From a YAML file and flags to `Settings`, with every complaint at once.

A complaint is `file:line:column: key: what is wrong; what would be accepted` (or begins with the flag). Nodes of the YAML
file are read as text and parsed by their option, so a value means the same in the file and in a flag.
"""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from netstack.errors import ConfigError
from netstack.settings import Limits, Network, Timeouts
from portfwd.spec import PublishSpec
from pyvpnkit.config import BY_KEY, OPTIONS, SECTIONS, Option, Settings
from pyvpnkit.values import meant

Node: TypeAlias = Any
"""A `yaml.Node`; yaml is imported only where there is a file, and its stubs lack `id`."""


class ConfigErrors(ConfigError):
    """All complaints about the settings, one line each."""

    def __init__(self, complaints: Sequence[str]) -> None:
        super().__init__("\n".join(complaints))
        self.complaints = tuple(complaints)


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
        raise ConfigErrors(sorted(complaints, key=_position))
    return settings


def _position(complaint: str) -> tuple[int, int]:
    """Complaints about the file come in the order of its lines, then those about flags."""
    match = re.match(r"[^:]*:(\d+):(\d+): ", complaint)
    return (int(match[1]), int(match[2])) if match else (1 << 30, 0)


def _complaint(where: str, key: str, error: ConfigError) -> str:
    name = key.rpartition(".")[2]
    text = str(error).removeprefix(f"{name}: ")
    return f"{where}: {key}: {text}"


def _read(path: str, complaints: list[str]) -> dict[str, Given]:
    """Every value of the file that can be read; what cannot becomes a complaint."""
    import yaml

    source: yaml.SafeLoader | None = None
    try:
        with Path(path).open("rb") as file:
            mode = Path(path).stat().st_mode
            source = yaml.SafeLoader(file)
            root = source.get_single_node()
    except OSError as error:
        complaints.append(f"{path}: {error.strerror}; give --config a file that can be read")
        return {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        complaints.append(f"{where}: not YAML: {error.problem or error.context}")
        return {}
    except (yaml.YAMLError, RecursionError) as error:
        complaints.append(f"{path}: not YAML: {' '.join(str(error).split())}")
        return {}
    except (ValueError, OverflowError):  # of chr() and int(): "\UFFFFFFFF", or %YAML with 5000 digits
        mark = source.get_mark() if source else None
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else path
        complaints.append(f"{where}: not YAML: a number beyond what there is; characters end at \\U0010FFFF")
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

    def _where(self, node: Node) -> str:
        return f"{self._path}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def _complain(self, node: Node, text: str) -> None:
        self._complaints.append(f"{self._where(node)}: {text}")

    def _items(self, node: Node, what: str) -> Iterable[tuple[str, Node, Node]]:
        """Keys (text and node) and values of a mapping; anything else, and a key given twice, is a complaint."""
        if node.id == "scalar" and node.tag == "tag:yaml.org,2002:null":
            return
        if node.id != "mapping":
            self._complain(node, f"{what} must be a mapping of keys to values")
            return
        seen: dict[str, Node] = {}
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

    def section(self, node: Node, name: str) -> None:
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
        guess = meant(key, known)
        return f"unknown key {key!r} {where}{guess}" + ("" if guess else f"; known are: {', '.join(sorted(known))}")

    def _option(self, option: Option, node: Node) -> None:
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

    def _each(self, option: Option, node: Node, text: str) -> list[Any]:
        try:
            return [option.parse_item(text)]
        except ConfigError as error:
            self._complaints.append(_complaint(self._where(node), option.key, error))
            return []

    def _sequence(self, option: Option, node: Node) -> tuple[Any, ...]:
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

    def _mapping(self, option: Option, node: Node) -> dict[Any, Any]:
        pairs: list[tuple[Any, Any]] = []
        for key, key_node, value in self._items(node, option.key):
            text = _words(value)
            pairs += self._each(option, key_node, f"{key}={text}")
        return dict(pairs)


def _words(node: Node) -> str:
    """A scalar's text, or those of a sequence with blanks between."""
    if node.id == "sequence" and all(item.id == "scalar" for item in node.value):
        return " ".join(item.value for item in node.value)
    return node.value if node.id == "scalar" else ""


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
    parts = {
        name: kind(**of(name)) for name, kind in SECTIONS.items() if name not in ("", "network", "limits", "timeouts")
    }
    return Settings(network=network, **parts, **top)


def _network(values: dict[str, Any], limits: Limits, timeouts: Timeouts) -> Network:
    if "subnet" in values:
        try:
            first = ipaddress.IPv4Network(values["subnet"]).network_address
            free = iter([str(first + number) for number in (1, 2, 3)])
        except ValueError:  # no network, or one so small that the last address of all is too near
            return Network(**values)  # which says what is wrong with it
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
