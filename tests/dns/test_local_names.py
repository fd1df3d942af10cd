"""Names answered without anybody's help: built-in, leased, and the host's hosts file (Q04, G23)."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from dnslib import DNSRecord
from hypothesis import given
from hypothesis import strategies as st

from dns import codec, hosts
from dns.server import Server
from netstack.errors import ConfigError
from tests.dns.support import a_reply, ask_now, parse, query

GATEWAY = bytes([192, 168, 65, 1])
ALIAS = bytes([192, 168, 65, 2])
GUEST_ADDRESS = bytes([192, 168, 65, 3])
NAMES = {"gateway.internal": [GATEWAY], "host.internal": [ALIAS], "Host.Docker.Internal": [ALIAS]}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(hosts_path: Path | None = None, clock: Clock | None = None) -> Server:
    leased = {"laptop": GUEST_ADDRESS}
    return Server(
        names=NAMES,
        domain="internal",
        lease_address=leased.get,
        lease_name=lambda address: next((name for name, held in leased.items() if held == address), None),
        hosts_path=None if hosts_path is None else str(hosts_path),
        resolv_conf=None,
        clock=clock or Clock(),
    )


def look_up(server: Server, name: str, qtype: str = "A") -> DNSRecord:
    (answer,) = ask_now(server, query(name, qtype))
    return parse(answer)


def found(server: Server, name: str, qtype: str = "A") -> list[str]:
    return [str(rr.rdata) for rr in look_up(server, name, qtype).rr]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("gateway.internal", "192.168.65.1"),
        ("host.internal", "192.168.65.2"),
        ("HOST.Internal", "192.168.65.2"),
        ("host.docker.internal", "192.168.65.2"),
        ("laptop.internal", "192.168.65.3"),
        ("LAPTOP.internal", "192.168.65.3"),
    ],
)
def test_known_names_have_their_address_in_any_case(name: str, address: str) -> None:  # Q04
    answer = look_up(make(), name)
    assert [str(rr.rdata) for rr in answer.rr] == [address]
    assert str(answer.q.qname) == f"{name}.", "the question comes back in the case it was asked"
    assert (answer.header.rcode, answer.header.aa, answer.header.ra, answer.rr[0].ttl) == (0, 1, 1, 0)


@pytest.mark.parametrize("name", ["host.internal", "laptop.internal"])
@pytest.mark.parametrize("qtype", ["AAAA", "MX", "TXT", "HTTPS", "SOA"])
def test_a_known_name_without_such_a_record_is_no_data_and_not_nxdomain(name: str, qtype: str) -> None:  # Q04
    answer = look_up(make(), name, qtype)
    assert (answer.header.rcode, answer.rr) == (codec.NOERROR, [])


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("1.65.168.192.in-addr.arpa", "gateway.internal."),
        ("2.65.168.192.in-addr.arpa", "host.internal."),
        ("3.65.168.192.IN-ADDR.ARPA", "laptop.internal."),
    ],
)
def test_addresses_of_the_network_have_names(address: str, name: str) -> None:
    assert found(make(), address, "PTR") == [name]


@pytest.mark.parametrize(
    "name",
    ["nosuch.internal", "internal", "a.host.internal", "host.internal.example", ".", "4.65.168.192.in-addr.arpa"],
)
def test_a_name_of_nobody_goes_to_the_resolvers(name: str) -> None:
    server = make()
    assert look_up(server, name).header.rcode == codec.SERVFAIL  # there is none
    assert server.counters["no_resolver"] == 1


def test_another_class_is_not_ours() -> None:
    message = query("host.internal")
    (answer,) = ask_now(make(), message[:-1] + b"\x03")
    assert parse(answer).header.rcode == codec.SERVFAIL


@pytest.mark.parametrize("name", ["a..internal", "x" * 64])
def test_a_built_in_name_that_cannot_be_is_refused_in_words(name: str) -> None:
    with pytest.raises(ConfigError, match=r"host\.internal"):
        Server(names={name: [ALIAS]})
    with pytest.raises(ConfigError, match=r"host\.internal"):
        Server(domain=name)


# The hosts file

MAC_STYLE = (
    "##\n127.0.0.1\tlocalhost\n255.255.255.255\tbroadcasthost\n::1             localhost\n10.1.2.3 one two # three\n"
)


def test_a_mac_hosts_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(MAC_STYLE)
    server = make(path)
    assert found(server, "localhost") == ["127.0.0.1"]
    assert found(server, "localhost", "AAAA") == ["::1"]
    assert found(server, "broadcasthost") == ["255.255.255.255"]
    assert found(server, "Two") == ["10.1.2.3"]
    assert found(server, "two", "AAAA") == []
    assert look_up(server, "two", "HTTPS").header.rcode == codec.NOERROR
    assert look_up(server, "three").header.rcode == codec.SERVFAIL
    assert look_up(server, "two", "MX").header.rcode == codec.SERVFAIL, "another type is for the resolvers"
    assert found(server, "3.2.1.10.in-addr.arpa", "PTR") == ["one."]
    assert found(server, "1." + "0." * 31 + "ip6.arpa", "PTR") == ["localhost."]


def test_windows_lines_bad_addresses_and_nonsense_are_survived(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(
        b"# hosts\r\n102.54.94.97 rhino.acme.com   # source\r\n999.1.1.1 bad\r\nlonely\r\n10.0.0.1 a..b good\r\n\xff\xfe\r\n"
    )
    server = make(path)
    assert found(server, "rhino.acme.com") == ["102.54.94.97"]
    assert found(server, "good") == ["10.0.0.1"]
    assert look_up(server, "bad").header.rcode == codec.SERVFAIL


def test_built_in_names_beat_the_hosts_file(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("10.9.9.9 host.internal laptop.internal\n")
    assert found(make(path), "host.internal") == ["192.168.65.2"]
    assert found(make(path), "laptop.internal") == ["192.168.65.3"]


def test_a_name_added_to_the_hosts_file_is_answered_within_a_second(tmp_path: Path) -> None:  # Q04
    path, clock = tmp_path / "hosts", Clock()
    path.write_text("10.0.0.1 old\n")
    server = make(path, clock)
    assert found(server, "old") == ["10.0.0.1"]
    fresh = tmp_path / "hosts.new"
    fresh.write_text("10.0.0.2 new\n")
    fresh.replace(path)
    assert found(server, "old") == ["10.0.0.1"], "looked at only once a second"
    clock.now += 1.0
    assert found(server, "new") == ["10.0.0.2"]
    assert look_up(server, "old").header.rcode == codec.SERVFAIL
    with path.open("a") as file:
        file.write("10.0.0.3 newer\n")
    os.utime(path, ns=(1, 1))
    clock.now += 1.0
    assert found(server, "newer") == ["10.0.0.3"]
    path.unlink()
    clock.now += 1.0
    assert look_up(server, "newer").header.rcode == codec.SERVFAIL
    path.write_text("10.0.0.4 back\n")
    server.network_changed()
    assert found(server, "back") == ["10.0.0.4"]


@given(st.text())
def test_any_text_is_a_hosts_file(text: str) -> None:
    table = hosts.parse(text)
    assert all(len(address) in (4, 16) for addresses in table.addresses.values() for address in addresses)


@given(st.ip_addresses())
def test_reverse_names_are_read_back(address: object) -> None:
    packed = address.packed  # type: ignore[attr-defined]
    assert hosts.address_of_reverse(hosts.reverse_name(packed)) == packed


@pytest.mark.parametrize(
    "name",
    [
        "in-addr.arpa",
        "1.2.3.in-addr.arpa",
        "1.2.3.4.5.in-addr.arpa",
        "1.2.3.256.in-addr.arpa",
        "x.ip6.arpa",
        "z." * 32 + "ip6.arpa",
        "1.2.3.4xin-addr.arpa",
    ],
)
def test_what_is_no_reverse_name_is_none(name: str) -> None:
    assert hosts.address_of_reverse(codec.wire_name(name)) is None


# What is no query, and queries that are broken


@pytest.mark.parametrize(
    ("message", "rcode"),
    [
        pytest.param(
            b"\x12\x34\x01\x00\x00\x02" + bytes(6) + b"\x01a\0\0\1\0\1" * 2, codec.FORMERR, id="two questions"
        ),
        pytest.param(b"\x12\x34\x01\x00\x00\x00" + bytes(6), codec.FORMERR, id="no question"),
        pytest.param(
            b"\x12\x34\x01\x00\x00\x01" + bytes(6) + b"\xc0\x0c\0\1\0\1", codec.FORMERR, id="pointer to itself"
        ),
        pytest.param(b"\x12\x34\x11\x00\x00\x01" + bytes(6) + b"\x01a\0\0\1\0\1", codec.NOTIMP, id="opcode STATUS"),
        pytest.param(b"\x12\x34\x28\x00\x00\x01" + bytes(6) + b"\x01a\0\0\6\0\1", codec.NOTIMP, id="opcode UPDATE"),
        pytest.param(query("a.example", "AXFR"), codec.REFUSED, id="AXFR"),
        pytest.param(query("a.example", "IXFR"), codec.REFUSED, id="IXFR"),
    ],
)
def test_a_query_that_cannot_be_served_is_told_so(message: bytes, rcode: int) -> None:  # Q05, G23
    (answer,) = ask_now(make(), message)
    assert answer[:2] == message[:2]
    assert codec.opcode(answer) == codec.opcode(message)
    assert parse(answer).header.rcode == rcode


@pytest.mark.parametrize("message", [b"", b"\x12", bytes(11), a_reply(query("host.internal"), "1.2.3.4")])
def test_what_is_no_query_gets_no_answer(message: bytes) -> None:  # G23
    server = make()
    assert ask_now(server, message) == []
    assert server.counters["ignored"] == 1


@given(st.binary(max_size=100) | st.binary(max_size=80).map(lambda tail: b"\x12\x34\x01\x00\x00\x01" + bytes(6) + tail))
def test_any_octets_get_one_answer_or_none_and_never_an_exception(message: bytes) -> None:  # Q05, G23
    answers = ask_now(make(), message)
    assert len(answers) <= 1
    for answer in answers:
        assert codec.is_response(answer)
        assert answer[:2] == message[:2]
        assert codec.rcode(answer) in (codec.NOERROR, codec.FORMERR, codec.SERVFAIL, codec.NOTIMP, codec.REFUSED)
        parse(answer)
