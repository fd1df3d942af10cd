"""Which names led a guest to an address: rules by domain, and proxies that want names, are asked about addresses only.

Fed with the answers of our own DNS server. A guest that asks another server, or keeps an address longer than we do, has no
name here: what rules by domain say is then not applied, so a rule that must hold whatever a guest does names addresses.

Bounds: `MAX_ADDRESSES` addresses, those whose answer is oldest go first (`evicted`), and `MAX_NAMES` names of each, the newest.
A name lives as long as its record, but at least `LEAST_S`: programs keep addresses longer than they should.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from typing import Final, Protocol

from netstack.api import Clock

MAX_ADDRESSES: Final = 16384
MAX_NAMES: Final = 4
LEAST_S: Final = 600.0
MOST_S: Final = 86400.0


_HOST_NAME: Final = re.compile(r"(?!.{254})[a-z0-9_-]{1,63}(?:\.[a-z0-9_-]{1,63})*", re.ASCII)
_NUMBER: Final = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.ASCII)


def host_name(name: str) -> str:
    """`name` in lower case and without a last dot; nothing where it is none of a host.

    Guests choose names and servers of their domains answer for them, so that a label may hold anything (RFC 2181 11): a line
    end that would begin a header of a request to a proxy, or what a proxy takes for an address.
    """
    name = name.removesuffix(".").lower()
    return name if _HOST_NAME.fullmatch(name) and not _NUMBER.fullmatch(name) else ""


class NamesOf(Protocol):
    """Who knows the names of addresses."""

    def names_of(self, address: bytes) -> Sequence[str]:
        """The names by which `address` (4 or 16 octets) was found, the newest first, in lower case and without a last dot."""
        ...


class Names:
    """See the module."""

    def __init__(self, clock: Clock = time.monotonic, *, most: int = MAX_ADDRESSES) -> None:
        self._clock = clock
        self._most = most
        self._table: dict[bytes, dict[str, float]] = {}
        """Address -> name -> until when; of both the newest last."""
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._table)

    def learn(self, name: str, address: bytes, ttl: float) -> None:
        """A guest was told that `name` (as it asked, in any case) is at `address`, for `ttl` seconds."""
        name = host_name(name)
        if not name:
            return
        until = self._clock() + min(max(ttl, LEAST_S), MOST_S)
        names = self._table.pop(address, None)
        if names is None:
            names = {}
            if len(self._table) >= self._most:
                del self._table[next(iter(self._table))]
                self.evicted += 1
        self._table[address] = names
        names.pop(name, None)
        if len(names) >= MAX_NAMES:
            del names[next(iter(names))]
        names[name] = until

    def names_of(self, address: bytes) -> Sequence[str]:
        """See `NamesOf`."""
        names = self._table.get(address)
        if names is None:
            return ()
        now = self._clock()
        found = [name for name, until in names.items() if until > now]
        if not found:
            del self._table[address]
        found.reverse()
        return found

    def name_of(self, address: bytes) -> str | None:
        """The newest name of `address`."""
        return next(iter(self.names_of(address)), None)

    def clear(self) -> None:
        """Forget all."""
        self._table.clear()
