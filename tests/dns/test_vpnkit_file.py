"""The file of VPNKit's `--dns`: its grammar, and what is wrong with it (spec vpnkit 4.2; upstream's "config" tests)."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns import codec, vpnkit_file
from dns.servers import Resolvers, Server, Upstream
from netstack.errors import ConfigError

CORP, ENG = codec.wire_name("corp.example"), codec.wire_name("eng.example")


def test_a_port_follows_the_address_behind_a_hash() -> None:  # upstream: `#port`
    read = vpnkit_file.parse("nameserver 10.0.0.2#5353\nnameserver 10.0.0.3\nnameserver fd00::1\n")
    assert [one.upstream for one in read.servers] == [
        Upstream("10.0.0.2", 5353),
        Upstream("10.0.0.3", 53),
        Upstream("fd00::1", 53),
    ]


def test_search_domains_are_those_of_the_first_line_that_has_any() -> None:  # upstream: search list
    read = vpnkit_file.parse("search corp.example lab.example.\nsearch other.example\nnameserver 10.0.0.2\n")
    assert read.search == ("corp.example", "lab.example")


def test_zone_order_and_timeout_belong_to_the_nameserver_before_them() -> None:  # upstream: attachment
    read = vpnkit_file.parse(
        "# written by a VPN client\n"
        "nameserver 10.0.0.2\nzone corp.example ENG.example.\norder 1\ntimeout 2000\n"
        "nameserver 8.8.8.8 # the world\n"
        "nameserver 10.0.0.9\nzone eng.example\nzone corp.example\ntimeout 0\ntimeout 100\n"
        "assume-offline-after 2\n"
    )
    assert read == Resolvers(
        servers=(
            Server(Upstream("10.0.0.2"), (CORP, ENG), 1, 2.0),
            Server(Upstream("8.8.8.8"), (), 0, 5.0),
            Server(Upstream("10.0.0.9"), (ENG, CORP), 0, 0.1),
        ),
        offline_after=2,
    )


def test_unknown_words_say_nothing() -> None:
    assert (
        vpnkit_file.parse("options ndots:1\n\n#nameserver 10.0.0.1\nNameserver 10.0.0.1\nlookup file\n") == Resolvers()
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nameserver dns.example", r"line 1: DNS server 'dns\.example'"),
        ("search a\nnameserver 10.0.0.1#x", "line 2: DNS server"),
        ("nameserver", "line 1: write one value"),
        ("nameserver 10.0.0.1 10.0.0.2", "line 1: write one value"),
        ("zone corp.example\nnameserver 10.0.0.1", "line 1: zone before the first nameserver"),
        ("nameserver 10.0.0.1\nzone a..b", "line 2: zone"),
        ("nameserver 10.0.0.1\ntimeout soon", "line 2: 'soon' is no number of 0 to"),
        ("nameserver 10.0.0.1\ntimeout -1", "line 2: '-1' is no number of 0 to"),
        ("nameserver 10.0.0.1\norder", "line 2: write one value"),
        ("assume-offline-after 99999999999999", "line 1"),
        ("nameserver 10.0.0.1\n" * 65, "line 65: more than 64"),
        ("nameserver 10.0.0.1\n" + "zone a.example b.example\n" * 513, "line 514: more than 1024 zones"),
    ],
)
def test_a_file_with_an_error_has_no_servers_and_the_line_is_named(
    text: str, complaint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        vpnkit_file.parse(text)
    with caplog.at_level(logging.WARNING, "pyvpnkit.dns"):
        assert vpnkit_file.parse_or_none(text + "\nnameserver 10.0.0.1") == Resolvers()
    assert caplog.text.count("DNS file: line") == 1


WORDS = [
    "nameserver",
    "zone",
    "order",
    "timeout",
    "search",
    "assume-offline-after",
    " ",
    "\n",
    "#",
    "1",
    "::",
    ".",
    "-",
]


@given(st.text() | st.lists(st.sampled_from(WORDS)).map("".join))
def test_any_text_is_read_or_has_no_servers(text: str) -> None:
    assert len(vpnkit_file.parse_or_none(text).servers) <= 64
