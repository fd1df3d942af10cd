"""Zones of names that we answer ourselves: of the settings, and as gvproxy's API adds them (spec gvproxy 1.3, 1.5).

A zone `crc.testing.` holds records whose `name` is what stands before the zone (`host`, or `a.b`) or is found by a pattern, and an
address for all other names. The zone's own name is not in it. The first zone in the list that fits a name decides.

* A and AAAA: the first record of each family that fits. A name with an address of one family only has no records of the other
  (NOERROR), where gvproxy asks the host's resolvers: they answer NXDOMAIN, and dual-stack resolvers give the name up (Q04).
  SVCB and HTTPS have no records either, for they would lead around the address.
* Other types are left to the next source, as gvproxy does.
* A name that nothing fits has `default`; without one it does not exist in a `closed` zone (gvproxy's), and is left to the
  next source in an open one (of the settings).

`add` merges: a zone of the same name keeps its place and its openness, new records come before old ones, `default` is replaced.
Names are compared without regard to case. Zones of the settings can be replaced, and what was added stays.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from dns import codec
from dns.codec import AAAA, ANY, HTTPS, SVCB, A, Record
from dns.patterns import Pattern
from dns.records import addresses
from netstack.errors import ConfigError, Malformed

MAX_ZONES: Final = 256
MAX_RECORDS: Final = 4096
"""Of all zones together."""
MAX_PATTERNS: Final = 256
"""Of all zones together: each is tried on every name of its zone."""

NO_SUCH_NAME: Final[Sequence[Record]] = []
"""What `Zones.find` says of a name that does not exist; known by identity."""

_OURS: Final = frozenset({A, AAAA, SVCB, HTTPS, ANY})


@dataclass(frozen=True, slots=True, kw_only=True)
class ZoneRecord:
    """An address (4 or 16 octets) of a name within its zone, or of all names that a pattern is found in."""

    name: str = ""
    regexp: str = ""
    address: bytes
    pattern: Pattern | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.regexp and self.pattern is None:
            object.__setattr__(self, "pattern", Pattern(self.regexp))


@dataclass(frozen=True, slots=True, kw_only=True)
class Zone:
    """One zone; `name` with or without the last dot. Raises `ConfigError` for a name that cannot be one."""

    name: str
    records: tuple[ZoneRecord, ...] = ()
    default: bytes | None = None
    """Address of all names that no record fits."""
    closed: bool = False
    """Names that nothing fits do not exist."""

    def __post_init__(self) -> None:
        _ = self.wire

    @property
    def wire(self) -> bytes:
        """The name in wire form, lower case."""
        try:
            return codec.wire_name(self.name)
        except Malformed as error:
            raise ConfigError(f"zone {self.name!r}: {error}; write one such as crc.testing.") from None

    @classmethod
    def parse(cls, document: Any) -> Zone:
        """Of gvproxy's JSON, whose keys may be in any case; the zone is `closed`. Raises `ConfigError`."""
        zone = _object(document, "zone")
        name = _text(zone, "Name")
        records = zone.get("records", [])
        if not isinstance(records, list):
            raise ConfigError(f"zone {name!r}: Records must be a list")
        if len(records) > MAX_RECORDS:
            raise ConfigError(f"zone {name!r}: more than {MAX_RECORDS} records")
        found = []
        for item in records:
            record = _object(item, f"zone {name!r}: a record")
            address = _address(record, "IP")
            if address is None:
                raise ConfigError(f"zone {name!r}: record {_text(record, 'Name')!r} has no IP")
            found.append(ZoneRecord(name=_text(record, "Name"), regexp=_text(record, "Regexp"), address=address))
        return cls(name=name, records=tuple(found), default=_address(zone, "DefaultIP"), closed=True)

    def document(self) -> dict[str, Any]:
        """The inverse of `parse`, as gvproxy writes it."""
        records = [
            {
                "Name": record.name,
                "IP": _written(record.address),
                **({"Regexp": record.regexp} if record.regexp else {}),
            }
            for record in self.records
        ]
        return {"Name": self.name, "Records": records or None, "DefaultIP": _written(self.default)}


class _Table:
    """A zone, ready to be asked."""

    def __init__(self, place: int, zone: Zone) -> None:
        self.place = place
        self.zone = zone
        self._names: dict[str, list[tuple[int, bytes]]] = {}
        self._patterns: list[tuple[Pattern, int, bytes]] = []
        for number, record in enumerate(zone.records):
            if record.name:
                self._names.setdefault(record.name.lower(), []).append((number, record.address))
            if record.pattern is not None:
                self._patterns.append((record.pattern, number, record.address))

    def find(self, label: str) -> list[bytes] | None:
        """At most one address of each family."""
        fitting = list(self._names.get(label, ()))
        fitting += [(number, address) for pattern, number, address in self._patterns if pattern.search(label)]
        if not fitting:
            return None if self.zone.default is None else [self.zone.default]
        first: dict[int, bytes] = {}
        for _, address in sorted(fitting):
            first.setdefault(len(address), address)
        return list(first.values())


class Zones:
    """All zones of one network; `find` is a `dns.records.Source` that may also say `NO_SUCH_NAME`."""

    def __init__(self, static: Iterable[Zone] = ()) -> None:
        self._static: tuple[Zone, ...] = ()
        self._added: dict[bytes, Zone] = {}
        self._tables: dict[bytes, _Table] = {}
        self.set_static(static)

    def __len__(self) -> int:
        return len(self._tables)

    def set_static(self, zones: Iterable[Zone]) -> None:
        """Have these zones of the settings, in place of those before; they come first. Raises `ConfigError`, changing nothing."""
        self._become(tuple(zones), self._added)

    def add(self, zone: Zone) -> None:
        """Take a zone in, or merge it into that of its name; see the module. Raises `ConfigError`, changing nothing."""
        added = dict(self._added)
        _merge(added, zone)
        self._become(self._static, added)

    def add_document(self, document: Any) -> None:
        """`add` of gvproxy's JSON."""
        self.add(Zone.parse(document))

    def documents(self) -> list[dict[str, Any]]:
        """All zones in order, as gvproxy lists them."""
        return [table.zone.document() for table in self._tables.values()]

    def _become(self, static: tuple[Zone, ...], added: dict[bytes, Zone]) -> None:
        zones: dict[bytes, Zone] = {}
        for zone in (*static, *added.values()):
            _merge(zones, zone)
        if len(zones) > MAX_ZONES:
            raise ConfigError(f"more than {MAX_ZONES} zones")
        records = [record for zone in zones.values() for record in zone.records]
        if len(records) > MAX_RECORDS:
            raise ConfigError(f"more than {MAX_RECORDS} records in all zones")
        if sum(record.pattern is not None for record in records) > MAX_PATTERNS:
            raise ConfigError(f"more than {MAX_PATTERNS} regular expressions in all zones")
        self._static, self._added = static, added
        self._tables = {wire: _Table(place, zone) for place, (wire, zone) in enumerate(zones.items())}

    def find(self, key: bytes, qtype: int) -> Sequence[Record] | None:
        """`key` is a name in wire form and lower case. Called for each query."""
        tables = self._tables
        if not tables or qtype not in _OURS or key == b"\0":
            return None
        best: tuple[_Table, int] | None = None
        at = 0
        while length := key[at]:
            at += length + 1
            table = tables.get(key[at:])
            if table is not None and (best is None or table.place < best[0].place):
                best = table, at
        if best is None:
            return None
        table, end = best
        found = table.find(_label(key, end))
        if found is not None:
            return addresses(found, qtype)
        return NO_SUCH_NAME if table.zone.closed else None


def _merge(zones: dict[bytes, Zone], zone: Zone) -> None:
    """`zone` into that of its name; what can never be found behind it is dropped, or it would grow with each repetition."""
    known = zones.get(zone.wire)
    if known is None:
        zones[zone.wire] = zone
        return
    new = {(record.name.lower(), record.regexp, len(record.address)) for record in zone.records}
    old = [one for one in known.records if (one.name.lower(), one.regexp, len(one.address)) not in new]
    zones[zone.wire] = replace(known, records=(*zone.records, *old), default=zone.default)


def _label(key: bytes, end: int) -> str:
    """The labels before `end`, as text."""
    labels, at = [], 0
    while at < end:
        length = key[at]
        labels.append(key[at + 1 : at + 1 + length].decode("latin-1"))
        at += length + 1
    return ".".join(labels)


def _object(document: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(document, Mapping):
        raise ConfigError(f"{what} must be a JSON object, not {document!r:.60}")
    return {str(name).lower(): value for name, value in document.items() if value is not None}


def _text(found: Mapping[str, Any], name: str) -> str:
    value = found.get(name.lower(), "")
    if not isinstance(value, str):
        raise ConfigError(f"zone: {name} must be a string, not {value!r:.60}")
    return value


def _address(found: Mapping[str, Any], name: str) -> bytes | None:
    text = _text(found, name)
    if not text:
        return None
    try:
        return ipaddress.ip_address(text).packed
    except ValueError:
        raise ConfigError(f"zone: {name}: invalid IP address: {text[:60]!r}") from None


def _written(address: bytes | None) -> str:
    return "" if address is None else str(ipaddress.ip_address(address))
