"""Capture filters mean what tcpdump means by them: random expressions over random frames, and what is said about mistakes."""

from __future__ import annotations

import functools
import random
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from netstack.errors import ConfigError
from netstack.observe.filter import MAX_DEPTH, MAX_TEXT, compile_filter
from tests.support import packets
from tests.support.packets import ether, ip

MACS = [bytes.fromhex(mac) for mac in ("020000000001", "020000000002", "ffffffffffff", "f61636bcf9c6")]
FOUR = ["192.168.65.1", "192.168.65.3", "192.168.65.40", "10.1.2.3", "8.8.8.8"]
SIX = ["2001:db8::1", "2001:db8::2", "fe80::1"]
PORTS = [53, 67, 68, 80, 443, 8000, 65535]
NETS = [
    "192.168.65.0/24",
    "192.168.65.32/27",
    "10.0.0.0/8",
    "0.0.0.0/0",
    "8.8.8.8/32",
    "2001:db8::/32",
    "::/0",
    "10",
    "192.168",
]


def four(rng: random.Random, payload: bytes, protocol: int, *, fragment: int = 0, options: bytes = b"") -> bytes:
    header = bytearray(
        struct.pack(
            "!BBHHHBBH", 0x45 + len(options) // 4, 0, 20 + len(options) + len(payload), 1, fragment, 64, protocol, 0
        )
    )
    header += ip(rng.choice(FOUR)) + ip(rng.choice(FOUR)) + options
    return bytes(header) + payload


def six(rng: random.Random, payload: bytes, header: int) -> bytes:
    ends = b"".join(socket.inet_pton(socket.AF_INET6, rng.choice(SIX)) for _ in "ab")
    return struct.pack("!IHBB", 6 << 28, len(payload), header, 64) + ends + payload


def frame(rng: random.Random) -> bytes:
    """Any frame without VLAN tags, with all headers that it announces."""
    ports = struct.pack("!HH", rng.choice(PORTS), rng.choice(PORTS))
    protocol = rng.choice((1, 6, 17, 132, 47))
    body = (ports if protocol != 1 else b"\x08\0\0\0") + bytes(rng.randrange(16, 40))
    kind, payload = packets.IPV4, b""
    match rng.randrange(9):
        case 0 | 1 | 2:
            payload = four(rng, body, protocol)
        case 3:
            payload = four(rng, body, protocol, options=bytes(4 * rng.randrange(1, 11)))
        case 4:
            payload = four(rng, body, protocol, fragment=rng.choice((0x2000, 0x2001, 0x00B9, 0x4000)))
        case 5:
            kind, payload = 0x86DD, six(rng, body, rng.choice((6, 17, 132, 58, 0)))
        case 6:
            offset = rng.choice((1, 0xB8))
            kind, payload = 0x86DD, six(rng, struct.pack("!BBHI", rng.choice((6, 17, 58)), 0, offset, 7) + body, 44)
        case 7:
            kind = rng.choice((packets.ARP, 0x8035))
            ends = rng.choice(MACS) + ip(rng.choice(FOUR)) + rng.choice(MACS) + ip(rng.choice(FOUR))
            payload = struct.pack("!HHBBH", 1, packets.IPV4, 6, 4, 1) + ends
        case _:
            kind, payload = rng.choice((0x88CC, 0x0100, 0x0600)), bytes(50)
    return ether(rng.choice(MACS), rng.choice(MACS), kind, payload)


CORPUS = [frame(random.Random(seed)) for seed in range(600)]


def tcpdump(directory: Path, expression: str) -> list[bytes] | None:
    """The frames of the corpus that tcpdump lets through; `None` when it does not accept the expression."""
    source = directory / "corpus.pcap"
    if not source.exists():
        records = b"".join(struct.pack("<IIII", n, 0, len(one), len(one)) + one for n, one in enumerate(CORPUS))
        source.write_bytes(struct.pack("<IHHiIII", 0xA1B2C3D4, 2, 4, 0, 0, 262144, 1) + records)
    done = subprocess.run(
        ["tcpdump", "-nn", "-r", str(source), "-w", "-", expression], capture_output=True, check=False, timeout=60
    )
    if done.returncode != 0:
        return [] if b"expression rejects all packets" in done.stderr else None
    found, at = [], 24
    while at < len(done.stdout):
        (length,) = struct.unpack_from("<I", done.stdout, at + 8)
        found.append(done.stdout[at + 16 : at + 16 + length])
        at += 16 + length
    return found


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[bytes] | None]:
    if shutil.which("tcpdump") is None:
        pytest.skip("tcpdump is not installed")
    return functools.cache(functools.partial(tcpdump, tmp_path_factory.mktemp("corpus")))


def passing(expression: str) -> list[bytes]:
    test = compile_filter(expression)
    found = [one for one in CORPUS if test(one)]
    assert found == [one for one in CORPUS if test(memoryview(one))]
    return found


def theirs(expression: str) -> str:
    """The same for tcpdump, which has no words for services."""
    words = {"dns": "(tcp port 53 or udp port 53)", "dhcp": "(udp port 67 or udp port 68)"}
    return " ".join(words.get(word, word) for word in expression.replace("(", " ( ").replace(")", " ) ").split())


def shown(mac: bytes) -> str:
    return mac.hex(":")


roles = st.sampled_from(("", "src ", "dst ", "src or dst ", "src and dst ", "dst or src "))
ports = st.sampled_from((*map(str, PORTS), "0", "9"))
ranges = st.sampled_from(("53-68", "80-80", "443-80", "0-65535", "60000-65535"))
values = {
    "host": st.sampled_from((*FOUR, *SIX, "1.1.1.1")),
    "net": st.sampled_from(NETS),
    "port": ports,
    "portrange": ranges,
}


@st.composite
def terms(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from((*values, "word", "ether", "family", "transport", "bare role")))
    match kind:
        case "word":
            return draw(st.sampled_from("arp rarp ip ip6 tcp udp sctp icmp icmp6 dns dhcp".split()))
        case "ether":
            role = draw(st.sampled_from(("ether host", "ether src", "ether dst")))
            return f"{role} {shown(draw(st.sampled_from(MACS)))}"
        case "family":
            what = draw(st.sampled_from(("host", "net")))
            value = draw(values[what])
            family = "ip6" if ":" in value else draw(st.sampled_from(("ip", "arp", "rarp")))
            return f"{family} {draw(roles)}{what} {value}"
        case "transport":
            what = draw(st.sampled_from(("port", "portrange")))
            return f"{draw(st.sampled_from(('tcp', 'udp', 'sctp')))} {draw(roles)}{what} {draw(values[what])}"
        case "bare role":
            return f"{draw(st.sampled_from(('src', 'dst')))} {draw(values['host'])}"
        case _:
            some = draw(st.lists(values[kind], min_size=1, max_size=3))
            joined = draw(st.sampled_from((" or ", " and "))).join(some)
            if draw(st.booleans()):
                joined = f"({joined})"
            return f"{draw(roles)}{kind} {joined}"


def combined(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    chain = st.tuples(
        st.lists(inner, min_size=2, max_size=4),
        st.lists(st.sampled_from(("and", "or", "&&", "||")), min_size=4, max_size=4),
    )
    return st.one_of(
        st.tuples(st.sampled_from(("not ", "! ")), inner).map("".join),
        inner.map(lambda text: f"({text})"),
        chain.map(
            lambda both: " ".join(f"{word} {text}" for word, text in zip(both[1], both[0], strict=False)).split(" ", 1)[
                1
            ]
        ),
    )


expressions = st.recursive(terms(), combined, max_leaves=6)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expression=expressions)
def test_filters_let_through_what_tcpdump_lets_through(
    peer: Callable[[str], list[bytes] | None], expression: str
) -> None:
    expected = peer(theirs(expression))
    assert expected is not None, f"tcpdump does not accept {theirs(expression)!r}"
    assert passing(expression) == expected


WORDS = "( ) not and or src dst host net port portrange tcp udp ip ip6 arp ether icmp".split()
VALUES = "80 443 8.8.8.8 10 1-99 ::1 ff:ff:ff:ff:ff:ff".split()
soup = st.lists(
    st.sampled_from((*WORDS, *VALUES)),
    min_size=1,
    max_size=8,
).map(" ".join)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(expression=soup)
def test_what_both_accept_means_the_same(peer: Callable[[str], list[bytes] | None], expression: str) -> None:
    try:
        found = passing(expression)
    except ConfigError as error:
        assert "expected" in str(error)
        return
    expected = peer(expression)
    assert expected is None or found == expected


def tagged(one: bytes, *tags: int) -> bytes:
    """With VLAN tags of these types between the addresses and the rest."""
    return one[:12] + b"".join(struct.pack("!HH", tag, 5) for tag in tags) + one[12:]


@pytest.mark.parametrize("tags", [(0x8100,), (0x88A8,), (0x88A8, 0x8100)], ids=["802.1Q", "802.1ad", "both"])
@given(expression=expressions)
@settings(max_examples=40, deadline=None)
def test_vlan_tags_are_looked_behind(tags: tuple[int, ...], expression: str) -> None:
    test = compile_filter(expression)
    assert [test(tagged(one, *tags)) for one in CORPUS[:150]] == [test(one) for one in CORPUS[:150]]


def test_without_a_filter_everything_passes() -> None:
    assert passing("") == passing("  ") == CORPUS


@given(octets=st.binary(max_size=120), expression=expressions)
@settings(max_examples=200, deadline=None)
def test_any_octets_pass_or_do_not(octets: bytes, expression: str) -> None:
    assert compile_filter(expression)(octets) in (True, False)


@given(number=st.integers(0, len(CORPUS) - 1), data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_cut_off_matches_nothing(number: int, data: st.DataObject) -> None:
    one = CORPUS[number]
    cut = one[: data.draw(st.integers(0, len(one)))]
    for expression in ("port 443", "host 192.168.65.3", "tcp", "icmp6", "arp", "ether host 02:00:00:00:00:01"):
        test = compile_filter(expression)
        assert test(one) or not test(cut)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("prot 80", "'prot 80', character 1: 'prot'; expected host", id="an unknown word"),
        pytest.param("tcp udp", "character 5: 'udp'; expected 'and', 'or' or the end", id="two terms side by side"),
        pytest.param("tcp and", "character 8: the end; expected host", id="nothing after and"),
        pytest.param("(tcp or udp", "character 12: the end; expected 'and', 'or' or ')'", id="an open parenthesis"),
        pytest.param("tcp)", "character 4: ')'; expected", id="a closed one"),
        pytest.param("port 65536", "character 6: '65536'; expected a port, 0 to 65535", id="a large port"),
        pytest.param("port http", "'http'; expected a port", id="the name of a port"),
        pytest.param("port 1-5", "'1-5'; expected a port", id="a range for a port"),
        pytest.param("portrange 5-", "expected ports such as 8000-8010", id="half a range"),
        pytest.param("host example.org", "'example.org'; expected an address such as", id="the name of a host"),
        pytest.param("host 10.0.0.0/8", "for a network write 'net'", id="a network for a host"),
        pytest.param("net 10.0.0.1/8", "expected 10.0.0.0/8", id="bits behind the mask"),
        pytest.param("net 10.0.0.0/33", "expected a network such as", id="a mask that is none"),
        pytest.param("ether host 10.0.0.1", "expected a MAC address such as", id="an address for a MAC"),
        pytest.param("ether port 1", "character 7: 'port'; expected 'host', 'src' or 'dst'", id="a port of Ethernet"),
        pytest.param("ether", "the end; expected 'host', 'src' or 'dst'", id="Ethernet of nobody"),
        pytest.param("tcp host 10.0.0.1", "expected 'port' or 'portrange', which is what tcp has", id="a host of TCP"),
        pytest.param("ip port 80", "expected 'host' or 'net', which is what ip has", id="a port of IP"),
        pytest.param("ip host ::1", "'::1'; expected an address of ip", id="an address of the other family"),
        pytest.param("ip6 net 10.0.0.0/8", "expected an address of ip6", id="a network of the other family"),
        pytest.param("8.8.8.8", "'8.8.8.8'; expected host", id="a value of nothing"),
        pytest.param("tcp and 443", "'443'; expected host", id="a value after a word"),
        pytest.param("src and host 1.1.1.1", "'and'; expected an address", id="half of src and dst"),
        pytest.param("tcp & udp", "'&'; expected 'and', 'or' or the end", id="one ampersand"),
        pytest.param("tcp\x00", "expected host", id="a NUL"),
        pytest.param("port \N{ARABIC-INDIC DIGIT FIVE}", "expected a port", id="odd digits"),
        pytest.param("port 8_0", "expected a port", id="digits as Python has them"),
        pytest.param("port -5", "expected a port", id="a negative port"),
        pytest.param("(" * 100_000, f"{MAX_TEXT} are accepted", id="long"),
        pytest.param("(" * 500 + "tcp" + ")" * 500, f"at most {MAX_DEPTH} parentheses", id="deep"),
        pytest.param("not " * 500 + "tcp", f"at most {MAX_DEPTH} parentheses", id="many negations"),
        pytest.param("port (" + "(" * 500, f"at most {MAX_DEPTH} parentheses", id="deep values"),
        pytest.param("port 5 or " + "not " * 500 + "6", f"at most {MAX_DEPTH} parentheses", id="values negated often"),
    ],
)
def test_mistakes_are_pointed_at(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compile_filter(text)
    assert words in str(caught.value)


@given(
    text=st.text(max_size=200)
    | st.lists(st.sampled_from((*WORDS, *VALUES, "dns", "&&", "!", "\0", "é")), max_size=60).map(" ".join)
)
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_filter_or_a_mistake(text: str) -> None:
    try:
        assert compile_filter(text)(CORPUS[0]) in (True, False)
    except ConfigError:
        pass


def test_a_chain_may_be_longer_than_calls_may_nest() -> None:
    text = "port 443" + "||9" * 1360
    assert sys.getrecursionlimit() < 1360 and len(text) <= MAX_TEXT
    assert passing(text) == passing("port 443 or 9")


def test_a_filter_says_what_it_was_made_of() -> None:
    assert str(compile_filter("tcp port 80")) == "tcp port 80"
