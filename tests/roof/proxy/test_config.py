"""`http_proxy.json`, its patterns and the environment, as the person who writes them sees them (spec vpnkit 6.1)."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError
from pyvpnkit.proxy.config import Config, NotJson, Upstream
from pyvpnkit.proxy.patterns import MAX_PATTERNS, Patterns, literal

# Patterns


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("mit.edu", ["mit.edu", "www.mit.edu", "a.b.mit.edu"], ["xmit.edu", "edu", "mit.edu.x", "18.0.0.1"]),
        (".mit.edu", ["www.mit.edu", "a.b.mit.edu"], ["mit.edu", "xmit.edu"]),
        ("*.mit.edu", ["www.mit.edu", "a.b.mit.edu"], ["mit.edu", "xmit.edu"]),
        ("MIT.edu.", ["mit.EDU", "Www.Mit.Edu."], ["mit"]),
        ("mirror.*.edu", ["mirror.mit.edu", "x.mirror.y.edu"], ["mirror.edu", "mirror.a.b.edu"]),
        ("10.1.2.3", ["10.1.2.3", "0x0a.1.2.3", "167838211"], ["10.1.2.4", "10.1.2.3.nip.test"]),
        ("10.0.0.0/8", ["10.255.0.1"], ["11.0.0.1", "ten.test"]),
        ("10.1.2.3/8", ["10.9.9.9"], ["11.0.0.1"]),
        ("2001:db8::/32", ["2001:db8::1", "[2001:db8:1::]"], ["2001:db9::1", "10.0.0.1"]),
        ("*", ["a", "a.b", "1.2.3.4", "::1"], []),
        ("localhost", ["localhost", "a.localhost"], ["127.0.0.1"]),
        ("a.test:8080", [], ["a.test"]),
        ("a.test:80", ["a.test", "b.a.test"], ["b.test"]),
        ("[2001:db8::1]:80", ["2001:db8::1"], ["2001:db8::2"]),
    ],
)
def test_what_a_pattern_matches(pattern: str, matching: list[str], others: list[str]) -> None:
    patterns = Patterns.parse([pattern])
    assert [host for host in matching if not patterns.matches(host, 80)] == []
    assert [host for host in others if patterns.matches(host, 80)] == []


def test_patterns_stand_between_commas_and_white_space_and_empty_ones_do_not_count() -> None:
    patterns = Patterns.parse([" , a.b,, c.d\t.e\n10.0.0.0/8,", "", "f"])
    assert patterns.texts == ["a.b", "c.d", ".e", "10.0.0.0/8", "f"]
    assert not Patterns.parse(["", " ,"]) and not Patterns.parse([""]).matches("a", 80)


@pytest.mark.parametrize(
    "text", ["10.0.0.0/33", "a..b", "http://a.b", "a/b", "*a.b", "a.b:0", "a.b:70000", "é", "..", "."]
)
def test_a_pattern_that_is_none_is_named(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Patterns.parse(["good.test", text])
    assert repr(text) in str(caught.value)


def test_too_many_patterns() -> None:
    with pytest.raises(ConfigError, match="at most"):
        Patterns.parse(["a "] * (MAX_PATTERNS + 1))


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_is_a_list_of_patterns_or_is_refused(text: str, host: str) -> None:
    try:
        patterns = Patterns.parse([text])
    except ConfigError:
        return
    patterns.matches(host, 80)
    assert Patterns.parse(patterns.texts) == patterns


@pytest.mark.parametrize(
    ("text", "address"),
    [("127.1", "127.0.0.1"), ("0x7f000001", "127.0.0.1"), ("2130706433", "127.0.0.1"), ("0177.0.0.1", "127.0.0.1"),
     ("0", "0.0.0.0"), ("[::1]", "::1"), ("::ffff:7f00:1", "::ffff:127.0.0.1")],
)  # fmt: skip
def test_addresses_in_other_spellings(text: str, address: str) -> None:
    assert literal(text) == literal(address)


@pytest.mark.parametrize(
    "text", ["", "a.b", "1.2.3.4.5", "256.1.1.1.1", "fe", "dead.beef", "1.2.3.4 x", "127.0.0.1\n", "٣"]
)
def test_what_is_no_address(text: str) -> None:
    assert literal(text) is None


# Documents


def test_defaults() -> None:
    config = Config.of({})
    assert (config.http, config.https, config.http_ports, config.https_ports) == (None, None, (80,), (443,))
    assert not config.exclude and not config.allow_enabled and config.allows("anything", 80)
    assert config.refusal("a.b") == (
        "Connections to a.b are forbidden by policy. Please contact your IT administrator."
    )


GO_ZERO = {"transparent_http_ports": None, "transparent_https_ports": None, "allow_enabled": False, "allow": None}


def test_what_go_writes_for_a_zero_value_is_the_default() -> None:
    assert Config.of(GO_ZERO | {"allow_error_msg": "", "unknown": [1]}) == Config.of({})


def test_an_empty_list_of_ports_is_no_port_and_an_empty_list_of_hosts_nobody() -> None:
    config = Config.of({"transparent_http_ports": [], "allow_enabled": True, "allow": []})
    assert config.http_ports == () and config.https_ports == (443,)
    assert not config.allows("a", 80)


def test_a_message_of_ones_own() -> None:
    assert Config.of({"allow_error_msg": "%s? No %s."}).refusal("a.b") == "a.b? No a.b."


@pytest.mark.parametrize(
    ("text", "host", "port", "credentials"),
    [
        ("http://user:pass@proxy.test:3128/", "proxy.test", 3128, b"user:pass"),
        ("proxy.test:3128", "proxy.test", 3128, None),
        ("HTTP://proxy.test:3128", "proxy.test", 3128, None),
        ("http://proxy.test", "proxy.test", 80, None),
        ("http://us%40er:p%3A%25@h:1", "h", 1, b"us@er:p:%"),
        ("http://user@h:1", "h", 1, b"user:"),
        ("http://u:p@ss@h:1", "h", 1, b"u:p@ss"),
        ("u:p@h:1", "h", 1, b"u:p"),
        ("http://[2001:db8::1]:3128", "2001:db8::1", 3128, None),
        ("http://[::1]", "::1", 80, None),
        (" 127.0.0.1:1 ", "127.0.0.1", 1, None),
    ],
)
def test_a_proxy(text: str, host: str, port: int, credentials: bytes | None) -> None:
    upstream = Upstream.parse(text)
    assert (upstream.host, upstream.port, upstream.credentials) == (host, port, credentials)


@pytest.mark.parametrize(
    "text",
    ["socks5://secret@h:1", "https://u:secret@h:1", "secret@h", "http://u:secret@:1", "http://u:secret@h:0",
     "http://u:secret@h:65536", "http://u:secret@h:x", "http://u:secret@h h:1", "://", "http://", "http://u:secret@h:²"],
)  # fmt: skip
def test_a_proxy_that_is_none_is_told_without_its_credentials(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.of({"http": text})
    assert str(caught.value).startswith("http: ") and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "an object is expected, not a list"),
        ("x", "an object is expected, not a string"),
        ({"http": 1}, "http: a string is expected, not a number"),
        ({"exclude": ["a"]}, "exclude: a string is expected, not a list"),
        ({"exclude": "a..b"}, "exclude: 'a..b'"),
        ({"transparent_http_ports": 80}, "transparent_http_ports: a list of ports"),
        ({"transparent_http_ports": ["80"]}, "transparent_http_ports: a port is a number"),
        ({"transparent_https_ports": [True]}, "transparent_https_ports: a port is a number"),
        ({"transparent_https_ports": [0]}, "from 1 to 65535"),
        ({"allow_enabled": 1}, "allow_enabled: true or false"),
        ({"allow": "a"}, "allow: a list of strings"),
        ({"allow": [1]}, "allow: a string"),
        ({"allow_error_msg": {}}, "allow_error_msg: a string is expected, not an object"),
    ],
)
def test_what_is_wrong_is_named(document: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.decode(json.dumps(document).encode())
    assert words in str(caught.value) and not isinstance(caught.value, NotJson)


def test_all_complaints_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Config.of({"http": 1, "https": "x", "allow": ["a", "b..c", "d..e"]})
    assert len(str(caught.value).splitlines()) == 4


@pytest.mark.parametrize(
    "octets", [b"", b"{", b"\xff", b"[" * 100_000, b" " * (1 << 21), b'{"a":1' + b"0" * 9999 + b"}"]
)
def test_what_is_no_json(octets: bytes) -> None:
    with pytest.raises(NotJson):
        Config.decode(octets)


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"http": "http://u:p@h:1/", "https": "h:2", "exclude": "a.b .c,10.0.0.0/8", "allow": ["x", "*.y"]},
        {
            "transparent_http_ports": [],
            "transparent_https_ports": [1, 2],
            "allow_enabled": True,
            "allow_error_msg": "%s",
        },
    ],
)
def test_what_is_read_can_be_written_again(document: dict[str, Any]) -> None:
    config = Config.of(document)
    assert Config.decode(json.dumps(config.document(), indent=1).encode() + b"\n") == config


def test_credentials_are_in_no_text_for_people() -> None:
    config = Config.of({"http": "http://user:secret@h:1"})
    for text in (str(config), repr(config), str(config.http), repr(config.http)):
        assert "secret" not in text


# The environment


def test_the_environment() -> None:
    config = Config.from_environment({"http_proxy": "http://p.test:1", "HTTPS_PROXY": "q.test:2", "no_proxy": "a,.b"})
    assert config is not None
    assert (str(config.http), str(config.https), config.exclude.texts) == ("p.test:1", "q.test:2", ["a", ".b"])


def test_lower_case_goes_before_upper_case_and_all_proxy_fills_in() -> None:
    config = Config.from_environment({"http_proxy": "a:1", "HTTP_PROXY": "b:1", "ALL_PROXY": "c:1"})
    assert config is not None and (str(config.http), str(config.https)) == ("a:1", "c:1")


@pytest.mark.parametrize("environment", [{}, {"http_proxy": ""}, {"no_proxy": "a"}])
def test_without_a_proxy_the_environment_says_nothing(environment: dict[str, str]) -> None:
    assert Config.from_environment(environment) is None
