"""Rules about ways out: their texts, and the names of addresses."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint, OutwardProxy, Way, WayOutRule
from netstack.errors import ConfigError
from netstack.policy.names import LEAST_S, MAX_NAMES, MOST_S, Names
from netstack.policy.ways_out import Outward, Ways, parse, spelled
from tests.support.clock import VirtualClock

SOCKS = OutwardProxy("socks5", "127.0.0.1", 1080)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("* -> direct", WayOutRule(None, "", 0, Way.DIRECT)),
        ("*:80->refuse", WayOutRule(None, "", 80, Way.REFUSE)),
        ("10.0.0.0/8 -> socks5://127.0.0.1:1080", WayOutRule(ipaddress.ip_network("10.0.0.0/8"), "", 0, SOCKS)),
        ("10.0.0.1:443 -> direct", WayOutRule(ipaddress.ip_network("10.0.0.1/32"), "", 443, Way.DIRECT)),
        ("2001:db8::/32 -> direct", WayOutRule(ipaddress.ip_network("2001:db8::/32"), "", 0, Way.DIRECT)),
        ("[2001:db8::/32]:443 -> direct", WayOutRule(ipaddress.ip_network("2001:db8::/32"), "", 443, Way.DIRECT)),
        ("Corp.Example -> direct", WayOutRule(None, "corp.example", 0, Way.DIRECT)),
        ("*.corp.example:22 -> direct", WayOutRule(None, "corp.example", 22, Way.DIRECT)),
        (".corp.example. -> direct", WayOutRule(None, "corp.example", 0, Way.DIRECT)),
        ("localhost -> direct", WayOutRule(None, "localhost", 0, Way.DIRECT)),
        ("* -> http://[::1]:3128/", WayOutRule(None, "", 0, OutwardProxy("http", "::1", 3128))),
        (
            "* -> socks5h://a%40b:c%3Ad%25@proxy.example:1080",
            WayOutRule(None, "", 0, OutwardProxy("socks5h", "proxy.example", 1080, "a@b", "c:d%")),
        ),
        ("* -> http://me@proxy:80", WayOutRule(None, "", 0, OutwardProxy("http", "proxy", 80, "me", ""))),
    ],
)
def test_texts_are_rules(text: str, rule: WayOutRule) -> None:
    assert parse(text) == rule
    assert parse(spelled(rule)) == rule


ports = st.integers(0, 65535)
prefixes = st.builds(
    lambda address, bits: ipaddress.ip_network((address, bits), strict=False), st.ip_addresses(v=4), st.integers(0, 32)
) | st.builds(
    lambda address, bits: ipaddress.ip_network((address, bits), strict=False), st.ip_addresses(v=6), st.integers(0, 128)
)
labels = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
domains = st.lists(labels, min_size=1, max_size=3).map(".".join)
words = st.text(
    st.characters(min_codepoint=32, max_codepoint=1000, exclude_characters="\x7f:"), min_size=1, max_size=40
)
hosts = domains | st.ip_addresses().map(str)
proxies = st.builds(OutwardProxy, st.sampled_from(["socks5", "socks5h", "http"]), hosts, st.integers(1, 65535))
proxies |= st.builds(
    OutwardProxy, st.sampled_from(["socks5", "socks5h", "http"]), hosts, st.integers(1, 65535), words, words
)
rules = st.builds(WayOutRule, prefixes, st.just(""), ports, proxies) | st.builds(
    WayOutRule, st.none(), domains | st.just(""), ports, proxies | st.sampled_from(Way)
)


@given(rules)
def test_what_is_spelled_is_parsed_and_what_is_shown_has_no_secrets(rule: WayOutRule) -> None:
    assert parse(spelled(rule)) == rule
    way = rule.way
    if isinstance(way, OutwardProxy) and way.user:
        hidden = parse(f"* -> {way.scheme}://USER:PASSWORD@proxy:1").way
        assert "USER" not in f"{hidden} {hidden!r}" and "PASSWORD" not in f"{hidden} {hidden!r}"
        assert "***@" in str(rule)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("10.0.0.0/8 direct", "has no ->"),
        ("10.0.0.1/8 -> direct", "host bits set"),
        ("10.0.0 -> direct", "no prefix and no domain"),
        ("a b -> direct", "no prefix and no domain"),
        ("-> direct", "no prefix and no domain"),
        ("*:0 -> direct", "number from 1 to 65535"),
        ("*:http -> direct", "number from 1 to 65535"),
        ("*:99999 -> direct", "number from 1 to 65535"),
        ("[2001:db8::/32 -> direct", "for IPv6"),
        ("* -> nowhere", "no such way out"),
        ("* -> https://proxy:443", "no such way out"),
        ("* -> socks5://proxy", "socks5://HOST:PORT"),
        ("* -> socks5://proxy:x", "number from 1 to 65535"),
        ("* -> socks5://[::x]:1", "IPv6 address"),
        ("* -> socks5://a/b:1", "socks5://HOST:PORT"),
        ("* -> socks5://:x@proxy:1", "USER:PASSWORD"),
        ("* -> socks5://me@proxy:1", "of 1 to 255 octets"),
        (f"* -> socks5://me:{'x' * 256}@proxy:1", "of 1 to 255 octets"),
        ("* -> http://me:a%0D%0Ab@proxy:1", "no control"),
    ],
)
def test_a_rule_that_cannot_be_used_says_what_to_write(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "* socks5://me:SECRET@proxy:1080",
        "* -> socks5//me:SECRET@proxy:1080",
        "* -> socks4://me:SECRET@proxy:1080",
        "* -> socks5://me:SECRET@proxy",
        "* -> socks5://me:SECRET@proxy:SECRET",
        "* -> socks5://me:SECRET@a@b/c:1",
        "* -> socks5://me:SECRET",
        "* -> http://me:SECRET%00@proxy:80",
        "socks5://me:SECRET@proxy:1080 -> *",
        "socks5://me:SECRET@proxy:1080",
        "me:SECRET@proxy",
    ],
)
def test_no_complaint_shows_a_password(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "SECRET" not in str(caught.value)


@given(st.text())
def test_any_text_is_a_rule_or_a_complaint(text: str) -> None:
    for each in (text, f"* -> {text}", f"{text} -> direct", f"* -> socks5://{text}"):
        try:
            rule = parse(each)
        except ConfigError:
            continue
        assert parse(spelled(rule)) == rule


def test_domains_match_at_dots_and_the_first_rule_that_matches_wins() -> None:
    clock = VirtualClock()
    ways = Ways()
    names = ways.names = Names(clock)
    ways.replace([parse("corp.example:80 -> refuse"), parse("corp.example -> socks5h://127.0.0.1:1080")])
    at = Endpoint.of("192.0.2.1", 443)
    assert ways.find(at) is Way.DIRECT
    assert ways.find(at, "Corp.Example.") == Outward(OutwardProxy("socks5h", "127.0.0.1", 1080), at, "corp.example")
    assert ways.find(at, "notcorp.example") is Way.DIRECT
    names.learn("a.corp.example", at.address, 60)
    found = ways.find(at)
    assert isinstance(found, Outward) and found.name == "a.corp.example"
    assert ways.find(Endpoint(at.address, 80)) is Way.REFUSE


@pytest.mark.parametrize("address", ["127.0.0.1", "127.9.9.9", "::1"])
def test_loopback_is_never_behind_a_proxy(address: str) -> None:
    ways = Ways()
    ways.replace([parse("* -> refuse")])
    assert ways.find(Endpoint.of(address, 53)) is Way.DIRECT


def test_names_live_as_long_as_records_within_bounds() -> None:
    clock = VirtualClock()
    names = Names(clock)
    at = bytes(4)
    names.learn("short.example", at, 0)
    names.learn("long.example", at, 10 * MOST_S)
    assert names.names_of(at) == ["long.example", "short.example"]
    clock.now += LEAST_S + 1
    assert names.names_of(at) == ["long.example"]
    clock.now += MOST_S
    assert not names.names_of(at) and names.name_of(at) is None and not len(names)


def test_names_have_bounds_and_the_oldest_go_first() -> None:
    names = Names(VirtualClock(), most=3)
    for number in range(5):
        names.learn(f"n{number}.example", bytes((number,)), 60)
        names.learn("again.example", bytes(1), 60)
    assert len(names) == 3 and names.evicted == 2
    assert names.name_of(bytes(1)) == "again.example", "what is asked for again stays"
    for number in range(2 * MAX_NAMES):
        names.learn(f"many{number}.example", bytes(1), 60)
    assert len(names.names_of(bytes(1))) == MAX_NAMES


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "a..example",
        "x" * 300,
        ".".join(["x" * 60] * 5),
        "a b.example",
        "a\r\nX-Admin: yes.example",
        "a:80.example",
        "a@example",
        "ä.example",
        "127.0.0.1",
        "127.1",
        "2130706433",
        "0x7f000001",
        "a.example.0x7f",
        "a.example..",
    ],
)
def test_what_is_no_name_of_a_host_is_never_told_to_a_proxy(name: str) -> None:
    """Guests choose what they ask for, and whoever owns a domain answers with any labels."""
    ways = Ways()
    names = ways.names = Names(VirtualClock())
    ways.replace([parse("* -> http://192.0.2.1:80")])
    at = Endpoint.of("203.0.113.9", 443)
    names.learn(name, at.address, 60)
    for found in (ways.find(at), ways.find(at, name)):
        assert isinstance(found, Outward) and found.name == ""
