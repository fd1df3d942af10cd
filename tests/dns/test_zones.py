"""Zones as guests and users of gvproxy's API see them (spec gvproxy 1.3, 1.5; VPNKit's Q04)."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any

import pytest

from dns.server import Server
from dns.zones import MAX_PATTERNS, MAX_RECORDS, MAX_ZONES, Zone, ZoneRecord, Zones
from netstack.errors import ConfigError

from .support import ask, ask_now, code_reply, parse, query, upstream

NOERROR, NXDOMAIN, REFUSED = 0, 3, 5


def record(name: str = "", ip: str = "192.168.127.254", regexp: str = "") -> dict[str, str]:
    return {"Name": name, "IP": ip, **({"Regexp": regexp} if regexp else {})}


def document(name: str, *records: dict[str, str], default: str = "") -> dict[str, Any]:
    return {"Name": name, "Records": list(records), "DefaultIP": default}


Look = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def zones() -> Zones:
    return Zones()


@pytest.fixture
def look(zones: Zones) -> Look:
    """`look(name, type)`: code and addresses answered at once; SERVFAIL (2) of a server without resolvers is "elsewhere"."""
    server = Server(zones=zones, hosts_path=None, resolv_conf=None, names={"gateway.internal": [b"\xc0\xa8\x41\x01"]})

    def run(name: str, qtype: str = "A") -> tuple[int, list[str]]:
        (message,) = ask_now(server, query(name, qtype))
        answer = parse(message)
        assert str(answer.q.qname) == (name if name.endswith(".") else name + ".")  # as asked, its case too
        return answer.header.rcode, [str(rr.rdata) for rr in answer.rr]

    return run


ELSEWHERE = (2, [])


def test_a_name_has_the_address_of_its_record(zones: Zones, look: Look) -> None:
    zones.add_document(document("crc.testing.", record("host"), record("a.b", "192.168.127.3")))
    assert look("host.crc.testing") == (NOERROR, ["192.168.127.254"])
    assert look("HOST.Crc.Testing") == (NOERROR, ["192.168.127.254"])
    assert look("a.b.crc.testing") == (NOERROR, ["192.168.127.3"])
    assert look("other.crc.testing") == (NXDOMAIN, [])


def test_the_name_of_a_zone_is_not_in_it(zones: Zones, look: Look) -> None:
    zones.add_document(document("crc.testing.", default="192.168.127.2"))
    assert look("crc.testing") == ELSEWHERE
    assert look("notcrc.testing") == ELSEWHERE
    assert look("x.crc.testing") == (NOERROR, ["192.168.127.2"])


def test_octets_of_a_label_are_not_taken_for_a_zone(zones: Zones, look: Look) -> None:
    """`\\x03crc` may stand inside a label."""
    zones.add_document(document("crc.", default="192.168.127.2"))
    server = Server(zones=zones, hosts_path=None, resolv_conf=None)
    inside = query("aaaaacrc.")  # a label of eight, made to hold the wire form of `crc.`
    forged = inside.replace(b"\x08aaaaacrc", b"\x08aaaa\x03crc")
    (answer,) = ask_now(server, forged)
    assert answer[3] & 15 == 2


def test_ttl_is_zero(zones: Zones) -> None:
    zones.add_document(document("crc.testing.", record("host")))
    (message,) = ask_now(Server(zones=zones, hosts_path=None, resolv_conf=None), query("host.crc.testing"))
    assert [rr.ttl for rr in parse(message).rr] == [0]


def test_the_first_zone_in_the_list_decides(zones: Zones, look: Look) -> None:
    zones.add_document(document("testing.", record("b.a", "10.0.0.1")))
    zones.add_document(document("a.testing.", record("b", "10.0.0.2"), record("c", "10.0.0.3")))
    assert look("b.a.testing") == (NOERROR, ["10.0.0.1"])
    assert look("c.a.testing") == (NXDOMAIN, [])


def test_the_default_is_for_names_that_nothing_fits(zones: Zones, look: Look) -> None:
    zones.add_document(document("crc.testing.", record("host", "10.0.0.1"), default="10.0.0.9"))
    assert look("host.crc.testing") == (NOERROR, ["10.0.0.1"])
    assert look("any.thing.crc.testing") == (NOERROR, ["10.0.0.9"])


def test_a_pattern_is_found_anywhere_in_what_stands_before_the_zone(zones: Zones, look: Look) -> None:
    zones.add_document(document("testing.", record(ip="10.0.0.1", regexp="^crc-(.*?)-master-0$"), record("x")))
    assert look("crc-abc-master-0.testing") == (NOERROR, ["10.0.0.1"])
    assert look("CRC-abc-master-0.testing") == (NOERROR, ["10.0.0.1"])
    assert look("crc-abc-master-0.sub.testing") == (NXDOMAIN, [])
    zones.add_document(document("apps.", record(ip="10.0.0.2", regexp="console")))
    assert look("my.console.here.apps") == (NOERROR, ["10.0.0.2"])


def test_the_first_record_that_fits_decides_be_it_a_name_or_a_pattern(zones: Zones, look: Look) -> None:
    zones.add_document(document("z.", record(ip="10.0.0.1", regexp="^h"), record("host", "10.0.0.2")))
    assert look("host.z") == (NOERROR, ["10.0.0.1"])
    zones.add_document(document("y.", record("host", "10.0.0.2"), record(ip="10.0.0.1", regexp="^h")))
    assert look("host.y") == (NOERROR, ["10.0.0.2"])


def test_adding_again_puts_new_records_first_and_keeps_the_place(zones: Zones, look: Look) -> None:
    """gvproxy's own assertions: a record is overridden, the zone keeps its position, the default is the new one's."""
    zones.add_document(document("one.", record("a", "10.0.0.1"), record("b", "10.0.0.2"), default="10.0.0.9"))
    zones.add_document(document("two.", record("a", "10.0.0.3")))
    zones.add_document(document("ONE", record("a", "10.0.0.4"), record("c", "10.0.0.5")))
    assert look("a.one") == (NOERROR, ["10.0.0.4"])
    assert look("b.one") == (NOERROR, ["10.0.0.2"])
    assert look("d.one") == (NXDOMAIN, [])  # no default any more
    assert zones.documents() == [
        document("one.", record("a", "10.0.0.4"), record("c", "10.0.0.5"), record("b", "10.0.0.2")),
        document("two.", record("a", "10.0.0.3")),
    ]


def test_repeating_a_zone_does_not_make_it_grow(zones: Zones) -> None:
    for number in range(1, 250):
        zones.add_document(document("z.", record("host", f"10.0.0.{number}"), record(ip="10.0.0.1", regexp="x")))
    assert len(zones.documents()[0]["Records"]) == 2


@pytest.mark.parametrize(("qtype", "expected"), [("AAAA", NOERROR), ("HTTPS", NOERROR), ("ANY", NOERROR), ("MX", 2)])
def test_other_types_of_a_name_with_an_address(zones: Zones, look: Look, qtype: str, expected: int) -> None:
    zones.add_document(document("crc.testing.", record("host"), default="10.0.0.9"))
    addresses = ["192.168.127.254"] if qtype == "ANY" else []
    assert look("host.crc.testing", qtype) == (expected, addresses)


def test_a_name_that_does_not_exist_does_not_for_ipv6_either(zones: Zones, look: Look) -> None:
    zones.add_document(document("crc.testing.", record("host")))
    assert look("other.crc.testing", "AAAA") == (NXDOMAIN, [])


def test_both_families_of_a_name(zones: Zones, look: Look) -> None:
    zones.add_document(
        document("z.", record("host", "10.0.0.1"), record("host", "fd00::1"), record("host", "10.0.0.2"))
    )
    assert look("host.z", "A") == (NOERROR, ["10.0.0.1"])
    assert look("host.z", "AAAA") == (NOERROR, ["fd00::1"])


def test_built_in_names_come_first(zones: Zones, look: Look) -> None:
    zones.add_document(document("internal.", default="10.0.0.9"))
    assert look("gateway.internal") == (NOERROR, ["192.168.65.1"])
    assert look("other.internal") == (NOERROR, ["10.0.0.9"])


def test_the_root_as_a_zone(zones: Zones, look: Look) -> None:
    zones.add_document(document(".", record("host"), record("a.b", "10.0.0.1")))
    assert look("host") == (NOERROR, ["192.168.127.254"])
    assert look("a.b") == (NOERROR, ["10.0.0.1"])
    assert look(".") == ELSEWHERE


async def test_names_not_listed_in_a_zone_of_the_settings_are_asked_for_elsewhere() -> None:
    async with upstream(lambda message: [code_reply(message, REFUSED)]) as resolver:
        static = Zone(name="corp.example", records=(ZoneRecord(name="wiki", address=socket.inet_aton("10.0.0.1")),))
        zones = Zones([static])
        server = Server(zones=zones, hosts_path=None, resolv_conf=None, upstreams=[resolver.spec])
        try:
            assert parse(await ask(server, query("wiki.corp.example"))).header.rcode == NOERROR
            assert parse(await ask(server, query("mail.corp.example"))).header.rcode == REFUSED
            # What the API adds to it does not close it.
            zones.add_document(document("corp.example.", record("git", "10.0.0.2")))
            assert [str(rr.rdata) for rr in parse(await ask(server, query("git.corp.example"))).rr] == ["10.0.0.2"]
            assert parse(await ask(server, query("mail.corp.example"))).header.rcode == REFUSED
            assert len(resolver.asked) == 2
        finally:
            server.close()


def test_new_settings_leave_what_was_added(zones: Zones, look: Look) -> None:
    one = Zone(name="one", records=(ZoneRecord(name="a", address=socket.inet_aton("10.0.0.1")),), closed=True)
    zones.set_static([one])
    zones.add_document(document("one.", record("b", "10.0.0.2")))
    zones.add_document(document("two.", record("a", "10.0.0.3")))
    zones.set_static([])
    assert look("a.one") == (NXDOMAIN, [])
    assert look("b.one") == (NOERROR, ["10.0.0.2"])
    assert look("a.two") == (NOERROR, ["10.0.0.3"])


def test_parse_and_document_are_inverses() -> None:
    written = document("crc.testing.", record("host"), record(ip="fd00::1", regexp="x+"), default="10.0.0.9")
    assert Zone.parse(json.loads(json.dumps(written))).document() == written
    assert Zone.parse({"name": "z.", "RECORDS": None}).document() == {"Name": "z.", "Records": None, "DefaultIP": ""}


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        "zone",
        {"Name": 7},
        {"Name": "a..b"},
        {"Name": "x" * 64 + "."},
        {"Name": "z.", "Records": {}},
        {"Name": "z.", "Records": ["x"]},
        document("z.", {"Name": "host"}),
        document("z.", record("host", "10.0.0.256")),
        document("z.", record(regexp="(")),
        document("z.", default="x"),
        document("z.", *[record(str(number)) for number in range(MAX_RECORDS + 1)]),
        document("z.", *[record(regexp=str(number)) for number in range(MAX_PATTERNS + 1)]),
    ],
)
def test_what_cannot_be_a_zone_is_refused_and_changes_nothing(zones: Zones, wrong: Any) -> None:
    zones.add_document(document("kept.", record("host")))
    before = zones.documents()
    with pytest.raises(ConfigError):
        zones.add_document(wrong)
    assert zones.documents() == before


def test_the_number_of_zones_and_records_is_bounded(zones: Zones) -> None:
    for number in range(MAX_ZONES):
        zones.add_document(document(f"z{number}."))
    with pytest.raises(ConfigError, match=str(MAX_ZONES)):
        zones.add_document(document("one-more."))
    half = [record(str(number)) for number in range(MAX_RECORDS // 2 + 1)]
    zones.add_document(document("z1.", *half))
    with pytest.raises(ConfigError, match=str(MAX_RECORDS)):
        zones.add_document(document("z2.", *half))
    assert len(zones) == MAX_ZONES
