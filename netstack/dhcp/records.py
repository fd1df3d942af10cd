"""Leases as they are kept across a restart: a JSON document, checked field by field when it comes back.

The file may be an old one, another program's, or cut short by a full disk, so nothing of it is believed: `read_state`
returns a whole and plausible state or raises `Malformed`. Times in it are wall clock seconds since 1970, because the
monotonic clock begins anew with the machine.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from netstack.errors import Malformed

FORMAT: Final = "pyvpnkit leases"
VERSION: Final = 1
MAX_RECORDS: Final = 65536
"""More leases or reservations than this were not written by us."""
MAX_CLIENT_ID: Final = 255
"""Octets of a client identifier worth remembering (RFC 2132 section 9.14 gives it one option)."""
MAX_IDENTITY: Final = 64
"""Characters of a reservation's identity; a UUID has 36."""

_HOSTNAME = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?)?")
_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedLease:
    address: bytes
    mac: bytes
    client_id: bytes
    hostname: str
    expires: float
    """Wall clock seconds; when it ended, for a lease that is not active."""
    active: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedReservation:
    identity: str
    address: bytes
    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedStatic:
    """A static lease that was given while the network ran; those of the settings are not saved."""

    address: bytes
    mac: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    counter: int
    leases: tuple[SavedLease, ...]
    reservations: tuple[SavedReservation, ...]
    statics: tuple[SavedStatic, ...] = ()


def clean_hostname(text: bytes) -> str:
    """What is kept of the name a client gives itself: its first label, letters, digits and inner hyphens, at most 63.

    `_` and blanks become hyphens; all else, above all control characters, goes. May be empty.
    """
    label = text.split(b".", 1)[0].replace(b"_", b"-").replace(b" ", b"-")
    kept = re.sub(rb"[^A-Za-z0-9-]", b"", label)
    return kept.strip(b"-")[:63].rstrip(b"-").decode("ascii")


def write_state(state: SavedState) -> dict[str, object]:
    """The JSON document; `read_state` is its inverse."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "counter": state.counter,
        "leases": [
            {
                "address": str(ipaddress.IPv4Address(lease.address)),
                "mac": lease.mac.hex(":"),
                "client_id": lease.client_id.hex(),
                "hostname": lease.hostname,
                "expires": lease.expires,
                "active": lease.active,
            }
            for lease in state.leases
        ],
        "reservations": [
            {
                "identity": item.identity,
                "address": str(ipaddress.IPv4Address(item.address)),
                "mac": item.mac.hex(":"),
            }
            for item in state.reservations
        ],
        "statics": [
            {"address": str(ipaddress.IPv4Address(item.address)), "mac": item.mac.hex(":")} for item in state.statics
        ],
    }


def read_state(document: object) -> SavedState:
    """The state in a JSON document; raises `Malformed` that says what is wrong with it."""
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise Malformed("not a lease file of pyvpnkit")
    if document.get("version") != VERSION:
        raise Malformed(f"lease file of version {document.get('version')!r}; this program reads version {VERSION}")
    try:
        counter = _integer(document["counter"])
        if not 0 <= counter < 2**32:
            raise ValueError("counter is out of range")
        return SavedState(
            counter=counter,
            leases=_records(document["leases"], _read_lease),
            reservations=_records(document["reservations"], _read_reservation),
            statics=_records(document.get("statics", []), _read_static),  # older files have none
        )
    except KeyError as error:
        raise Malformed(f"lease file: {error} is missing") from None
    except (ValueError, OverflowError) as error:
        raise Malformed(f"lease file: {error}") from None


def _records(items: object, read: Callable[[dict[str, Any]], _Record]) -> tuple[_Record, ...]:
    if not isinstance(items, list) or len(items) > MAX_RECORDS or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"records are not a list of at most {MAX_RECORDS} objects")
    return tuple(read(item) for item in items)


def _read_lease(item: dict[str, Any]) -> SavedLease:
    expires = item["expires"]
    if isinstance(expires, bool) or not isinstance(expires, int | float) or not math.isfinite(expires):
        raise ValueError("expires is no number")
    if not isinstance(item["active"], bool):
        raise ValueError("active is neither true nor false")
    hostname = _text(item["hostname"])
    if not _HOSTNAME.fullmatch(hostname):
        raise ValueError("hostname has odd characters")
    return SavedLease(
        address=_address(item["address"]),
        mac=_mac(item["mac"]),
        client_id=_octets(item["client_id"], MAX_CLIENT_ID),
        hostname=hostname,
        expires=float(expires),
        active=item["active"],
    )


def _read_reservation(item: dict[str, Any]) -> SavedReservation:
    identity = _text(item["identity"])
    if not 0 < len(identity) <= MAX_IDENTITY:
        raise ValueError(f"identity is not 1 to {MAX_IDENTITY} characters")
    return SavedReservation(identity=identity, address=_address(item["address"]), mac=_mac(item["mac"]))


def _read_static(item: dict[str, Any]) -> SavedStatic:
    return SavedStatic(address=_address(item["address"]), mac=_mac(item["mac"]))


def _integer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is no whole number")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


def _octets(value: object, limit: int) -> bytes:
    octets = bytes.fromhex(_text(value).replace(":", ""))
    if len(octets) > limit:
        raise ValueError(f"{value!r} is too long")
    return octets


def _mac(value: object) -> bytes:
    octets = _octets(value, 6)
    if len(octets) != 6:
        raise ValueError(f"{value!r} is no MAC address")
    return octets


def _address(value: object) -> bytes:
    return ipaddress.IPv4Address(_text(value)).packed
