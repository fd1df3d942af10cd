"""Names we answer ourselves: the gateway's and the host's, DHCP leases, and the host's hosts file.

A source is a function of a name and a type. `None` says that the name is not its own, and the next source is asked (in the
end the host's resolvers); an empty answer says that the name exists without such a record. So a name with only an IPv4 address
answers AAAA with NOERROR and no records: NXDOMAIN there makes dual-stack resolvers give up the name (spec vpnkit 4.1, Q04).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from dns import codec
from dns.codec import AAAA, ANY, HTTPS, PTR, SVCB, A, Record
from dns.hosts import Hosts, address_of_reverse, reverse_name
from dns.watch import WatchedFile
from netstack.errors import ConfigError, Malformed

TTL_S: Final = 0  # as VPNKit: a lease or a line of the hosts file may be another the next moment

Source: TypeAlias = Callable[[bytes, int], Sequence[Record] | None]
"""`source(key, qtype)`; `key` is the name in wire form and lower case, the class is IN."""

LeaseAddress: TypeAlias = Callable[[str], bytes | None]
"""Address (4 or 16 octets) leased to a host name, which is one label in lower case."""

LeaseName: TypeAlias = Callable[[bytes], str | None]
"""Host name, one label, that holds a leased address."""


def addresses(found: Sequence[bytes], qtype: int) -> list[Record]:
    """The A or AAAA records of a name with these addresses; both for ANY, none for another type."""
    wanted = {A: (4,), AAAA: (16,), ANY: (4, 16)}.get(qtype, ())
    return [Record(A if len(address) == 4 else AAAA, TTL_S, address) for address in found if len(address) in wanted]


def pointer(name: bytes, qtype: int) -> list[Record]:
    return [Record(PTR, TTL_S, name)] if qtype in (PTR, ANY) else []


def _configured(text: str) -> bytes:
    try:
        return codec.wire_name(text)
    except Malformed as error:
        raise ConfigError(f"name {text!r} cannot be answered ({error}); write one such as host.internal") from None


def built_in(names: Mapping[str, Sequence[bytes]]) -> Source:
    """The source of fixed names. The first name of an address is what its PTR record says.

    These names are ours alone, so other types than addresses have no records either. Raises `ConfigError`.
    """
    forward: dict[bytes, list[bytes]] = {}
    reverse: dict[bytes, bytes] = {}
    for text, found in names.items():
        wire = _configured(text)
        forward.setdefault(wire, []).extend(found)
        for address in found:
            reverse.setdefault(reverse_name(address), wire)

    def find(key: bytes, qtype: int) -> Sequence[Record] | None:
        if (known := forward.get(key)) is not None:
            return addresses(known, qtype)
        if (name := reverse.get(key)) is not None:
            return pointer(name, qtype)
        return None

    return find


def leases(domain: str | None, address_of: LeaseAddress | None, name_of: LeaseName | None) -> Source:
    """The source of `NAME.domain` for the host names that DHCP clients gave, and of PTR records for their addresses.

    Raises `ConfigError` for a domain that cannot be one.
    """
    suffix = _configured(domain or ".")

    def find(key: bytes, qtype: int) -> Sequence[Record] | None:
        label_end = 1 + key[0]
        if key[label_end:] == suffix and address_of is not None:
            address = address_of(key[1:label_end].decode("latin-1"))
            return None if address is None else addresses([address], qtype)
        if name_of is not None and key.endswith(b"\x04arpa\0"):
            leased = address_of_reverse(key)
            name = None if leased is None else name_of(leased)
            if name is not None:
                try:
                    return pointer(codec.wire_name(f"{name}.{domain}" if domain else name), qtype)
                except Malformed:  # a guest may call itself anything
                    return None
        return None

    return find


_OVERRIDDEN: Final = frozenset({A, AAAA, SVCB, HTTPS, ANY})
"""What a line of the hosts file decides. SVCB and HTTPS records carry addresses too and would lead around it."""


def hosts_file(hosts: WatchedFile[Hosts]) -> Source:
    """The source of the host's hosts file; other types than addresses of a name in it are left to the resolvers."""

    def find(key: bytes, qtype: int) -> Sequence[Record] | None:
        table = hosts.current()
        if qtype in _OVERRIDDEN and (known := table.addresses.get(key)) is not None:
            return addresses(known, qtype)
        if qtype == PTR and (address := address_of_reverse(key)) is not None:
            name = table.names.get(address)
            return None if name is None else pointer(name, qtype)
        return None

    return find
