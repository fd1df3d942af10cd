"""What is said to proxies and programs before a connection begins, octet by octet: cut anywhere, and any octets at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint
from netstack.errors import HostError
from netstack.host.handshake import LOOK, Exchange
from netstack.host.http_connect import MAX_HEAD, HttpConnect
from netstack.host.socks5 import Socks5
from netstack.host.tunnels import MAX_ANSWER, Question
from netstack.policy.egress import Tunnel

FAR = Endpoint.of("203.0.113.9", 443)
FAR6 = Endpoint.of("2001:db8::9", 443)
KINDS: dict[str, Callable[[], Exchange]] = {
    "socks": lambda: Socks5(FAR),
    "socks with a login": lambda: Socks5(FAR, "name.example", b"me", b"secret"),
    "http": lambda: HttpConnect(FAR, "name.example", b"me", b"secret"),
    "tunnel": lambda: Question(Tunnel("/run/t", FAR)),
}
LONGEST = MAX_HEAD + LOOK + MAX_ANSWER
SOCKS = [b"\5\0", b"\5\2", b"\1\0", b"\5\0\0\1", b"\5\0\0\3\4name", bytes(6)]
HTTP = [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 ", b"200", b"100 ", b"407", b"\r\n", b"\r\n\r\n", b"\n\n"]
TUNNEL = [b'\x11\0{"accepted":true}', b'{"accepted":true}', b"\x11\0"]
pieces = st.sampled_from([*SOCKS, *HTTP, *TUNNEL])
octets = st.lists(pieces | st.binary(max_size=8), max_size=12).map(b"".join)


def run(exchange: Exchange, whole: bytes, cuts: list[int]) -> tuple[str, int, bytes]:
    """How it ends, how many octets of `whole` belonged to it, and what was said; `cuts` are the lengths that come together."""
    said, at, step = exchange.say(), 0, 0
    there = 0
    while not exchange.done:
        if at == there:
            if there == len(whole):
                return "waits", at, said
            there = min(there + (cuts[step % len(cuts)] if cuts else len(whole)), len(whole))
            step += 1
        try:
            taken = exchange.hear(whole[at:there][:LOOK])
        except HostError as error:
            return str(error), -1, said
        assert 1 <= taken <= there - at
        at += taken
        assert at <= LONGEST, "it has no bound"
        said += exchange.say()
    return "done", at, said


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
@given(octets, st.lists(st.integers(1, 9), max_size=5))
def test_cuts_make_no_difference(kind: Callable[[], Exchange], whole: bytes, cuts: list[int]) -> None:
    together, apart = run(kind(), whole, []), run(kind(), whole, cuts)
    if together[0] == apart[0]:
        assert together == apart
    else:  # a complaint may come sooner; an agreement may not
        assert "done" not in (together[0], apart[0])


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
@given(st.binary(min_size=1, max_size=40), st.binary(max_size=3))
def test_nothing_goes_on_for_ever(kind: Callable[[], Exchange], repeated: bytes, first: bytes) -> None:
    run(kind(), first + repeated * (2 * LONGEST // len(repeated)), [1000])


def test_addresses_of_both_families_and_names_are_asked_for() -> None:
    assert run(Socks5(FAR6), b"\5\0", [])[2] == b"\5\1\0" + b"\5\1\0\4" + FAR6.address + b"\1\xbb"
    assert run(Socks5(FAR, "name.example"), b"\5\0", [])[2].endswith(b"\3\x0cname.example\1\xbb")
    assert b"CONNECT [2001:db8::9]:443 HTTP/1.1\r\nHost: [2001:db8::9]:443\r\n\r\n" == HttpConnect(FAR6).say()
