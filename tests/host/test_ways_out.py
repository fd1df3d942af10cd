"""Outgoing TCP through SOCKS5 and HTTP CONNECT proxies, as the guest and the proxy see it, in virtual time."""

from __future__ import annotations

import base64
import errno
from collections.abc import Callable

import pytest

from netstack.api import Endpoint, GatewayForward
from netstack.host.http_connect import MAX_HEAD
from netstack.host.socks5 import Socks5
from netstack.host.ways_out import ATTEMPT_S, SILENT_S, Upstream
from netstack.observe.events import FlowRefused
from netstack.policy.names import Names
from netstack.policy.ways_out import parse
from tests.support import packets
from tests.support.drill import SERVER, Drill, Flow, pattern
from tests.support.fake_host import Accept, Address, Never, Refuse
from tests.support.packets import ip

PROXY: Address = ("198.51.100.7", 1080)
SOCKS = "socks5://198.51.100.7:1080"
LOGIN = "socks5://me:secret%20word@198.51.100.7:1080"
HTTP = "http://198.51.100.7:1080"
HTTP_LOGIN = "http://me:secret%20word@198.51.100.7:1080"
METHOD, METHOD_LOGIN, LOGGED_IN = b"\5\0", b"\5\2", b"\1\0"
OK = b"\5\0\0\1" + bytes(6)
OK_BY_NAME = b"\5\0\0\3\4here\0\0"
OK_IPV6 = b"\5\0\0\4" + bytes(18)
CONNECTED = b"HTTP/1.1 200 Connection established\r\nVia: 1.1 proxy\r\n\r\n"
ADDRESS = b"\1" + ip(SERVER[0]) + SERVER[1].to_bytes(2, "big")
ASKED = b"\5\1\0" + ADDRESS


def go_out(d: Drill, *rules: str, **options: bool) -> None:
    d.stack.go_out([parse(rule) for rule in rules], **options)


def knock(d: Drill, dst: Address = SERVER) -> Flow:
    flow = d.flow(dst)
    d.syn(flow)
    return flow


def answer(d: Drill, flow: Flow, octets: bytes) -> None:
    d.host(flow).send(octets)
    d.settle()


def said(d: Drill, flow: Flow) -> bytes:
    """What the proxy has heard since the last time."""
    octets = bytes(d.host(flow).received)
    d.host(flow).received.clear()
    return octets


def reasons(d: Drill) -> list[str]:
    return [event.reason for event in d.events if isinstance(event, FlowRefused)]


Script = tuple[str, list[tuple[bytes | None, bytes]]]

SCRIPTS: dict[str, Script] = {
    "socks": (SOCKS, [(b"\5\1\0", METHOD), (ASKED, OK)]),
    "socks, bound to a name": (SOCKS, [(b"\5\1\0", METHOD), (ASKED, OK_BY_NAME)]),
    "socks, bound to IPv6": (SOCKS, [(b"\5\1\0", METHOD), (ASKED, OK_IPV6)]),
    "socks with login": (
        LOGIN,
        [(b"\5\2\0\2", METHOD_LOGIN), (b"\1\2me\x0bsecret word", LOGGED_IN), (ASKED, OK)],
    ),
    "socks, login not wanted": (LOGIN, [(b"\5\2\0\2", METHOD), (ASKED, OK)]),
    "http": (
        HTTP,
        [(b"CONNECT 93.184.216.34:80 HTTP/1.1\r\nHost: 93.184.216.34:80\r\n\r\n", CONNECTED)],
    ),
    "http with login": (
        HTTP_LOGIN,
        [
            (
                b"CONNECT 93.184.216.34:80 HTTP/1.1\r\nHost: 93.184.216.34:80\r\nProxy-Authorization: Basic "
                + base64.b64encode(b"me:secret word")
                + b"\r\n\r\n",
                CONNECTED,
            )
        ],
    ),
    "http/1.0, lone line feeds": (HTTP, [(None, b"HTTP/1.0 200\nX: y\n\n")]),
    "http, an interim answer first": (HTTP, [(None, b"HTTP/1.1 100 Continue\r\n\r\n" + CONNECTED)]),
    "http, a length that does not count": (HTTP, [(None, b"HTTP/1.1 201 OK\r\nContent-Length: 9\r\n\r\n")]),
}


@pytest.fixture(params=list(SCRIPTS.values()), ids=list(SCRIPTS))
def script(request: pytest.FixtureRequest) -> Script:
    found: Script = request.param
    return found


def play(d: Drill, script: Script, behind: bytes = b"", pieces: int = 0) -> Flow:
    """The whole handshake; the proxy says `behind` right behind its last answer, `pieces` octets at a time."""
    way, steps = script
    go_out(d, f"* -> {way}")
    flow = knock(d)
    assert flow.sock is not None and flow.sock.remote == PROXY
    for number, (heard, octets) in enumerate(steps):
        found = said(d, flow)
        assert heard is None or found == heard
        last = number == len(steps) - 1
        octets += behind if last else b""
        d.expect_none()
        step = pieces or len(octets)
        for at in range(0, len(octets), step):
            answer(d, flow, octets[at : at + step])
    d.establish(flow)
    assert said(d, flow) == b""
    return flow


def test_the_proxy_is_asked_and_then_the_octets_are_the_connections(d: Drill, script: Script) -> None:
    flow = play(d, script)
    d.guest(flow, ".", data=b"question")
    assert said(d, flow) == b"question"
    d.host(flow).send(b"answer")
    d.expect(flow, ".", data=b"answer", within=0.1)
    (upstream,) = d.stack.tcp.upstreams.all()
    assert (upstream.carried, upstream.refused, upstream.failed) == (1, 0, 0)


@pytest.mark.parametrize("peek_off", [True, False])
def test_what_comes_right_behind_the_answer_reaches_the_guest(
    drill: Callable[..., Drill], script: Script, peek_off: bool
) -> None:
    d = drill(peek_off=peek_off)
    octets = pattern(100_000)
    flow = play(d, script, behind=octets)
    assert d.transfer(flow, len(octets)) == octets


def test_answers_in_single_octets_are_answers(d: Drill, script: Script) -> None:
    play(d, script, pieces=1)


def test_answers_that_run_ahead_wait_for_their_turn(d: Drill) -> None:
    """A server that says all it has to say before it is asked: what we say is said all the same."""
    go_out(d, f"* -> {LOGIN}")
    flow = knock(d)
    answer(d, flow, METHOD_LOGIN + LOGGED_IN + OK + b"hello")
    assert said(d, flow) == b"\5\2\0\2" + b"\1\2me\x0bsecret word" + ASKED
    d.establish(flow)
    assert d.transfer(flow, 5) == b"hello"


def test_requests_that_leave_in_pieces_are_requests(d: Drill, script: Script) -> None:
    d.io.send_at_most = 3
    d.io.fail("send", 2, errno.EAGAIN)
    play(d, script)


def test_what_was_asked_leaves_whole_even_if_it_was_answered_before(d: Drill) -> None:
    d.io.sent_buffer = 5
    go_out(d, f"* -> {SOCKS}")
    flow = knock(d)
    d.host(flow).stop_reading()
    answer(d, flow, METHOD + OK)
    d.expect_none(1.0)
    d.host(flow).resume()
    d.establish(flow)
    assert said(d, flow) == b"\5\1\0" + ASKED


@pytest.mark.parametrize("how", ["close", "reset", "vanish", "silence", "guest"])
def test_a_handshake_cut_anywhere_ends_in_a_reset(drill: Callable[..., Drill], script: Script, how: str) -> None:
    way, steps = script
    whole = b"".join(octets for _, octets in steps)
    for at in range(len(whole)):
        d = drill()
        go_out(d, f"* -> {way}")
        flow = knock(d)
        sent = 0
        for _, octets in steps:
            answer(d, flow, octets[: max(at - sent, 0)])
            sent += len(octets)
        d.expect_none()
        far = d.host(flow)
        if how == "guest":
            d.reset(flow)
            assert flow.sock is not None and flow.sock.closed
            d.expect_none(1.0)
        elif how == "silence":
            limit = d.network.timeouts.tcp_connect_s
            assert d.take_icmp(3, 1, within=limit + 1).time >= limit - 0.01, "as a direct connect that times out"
            d.expect(flow, "R.", ack=flow.snd)
        else:
            {"close": far.close, "reset": far.reset, "vanish": far.vanish}[how]()
            d.expect(flow, "R.", ack=flow.snd)
        d.assert_clean()
        assert d.stack.deadline() is None, "something is still awaited"
        if how == "silence" and at:
            break  # the first two say it


REFUSALS = [
    pytest.param(SOCKS, b"\5\xff", "it asks for credentials", None, id="socks wants a login"),
    pytest.param(LOGIN, b"\5\xff", "none of our ways", None, id="socks takes no login"),
    pytest.param(SOCKS, b"\5\2", "method 2, which was not offered", None, id="socks chooses what was not offered"),
    pytest.param(LOGIN, b"\5\2\1\1", "does not accept the user", None, id="socks, a wrong password"),
    pytest.param(SOCKS, b"\4\0", "answers with version 4", None, id="socks 4"),
    pytest.param(SOCKS, b"HTTP/1.1 400 Bad Request\r\n\r\n", "answers with version 72", None, id="socks is HTTP"),
    pytest.param(SOCKS, METHOD + b"\5\1\0\1" + bytes(6), "general failure", None, id="socks 1"),
    pytest.param(SOCKS, METHOD + b"\5\2", "not allowed", 13, id="socks 2"),
    pytest.param(SOCKS, METHOD + b"\5\3\0\1" + bytes(6), "network unreachable", 0, id="socks 3"),
    pytest.param(SOCKS, METHOD + b"\5\4\0\1" + bytes(6), "host unreachable", 1, id="socks 4 unreachable"),
    pytest.param(SOCKS, METHOD + b"\5\5\0\1" + bytes(6), "connection refused", None, id="socks 5"),
    pytest.param(SOCKS, METHOD + b"\5\6\0\1" + bytes(6), "TTL expired", 1, id="socks 6"),
    pytest.param(SOCKS, METHOD + b"\5\7\0\1" + bytes(6), "cannot connect", None, id="socks 7"),
    pytest.param(SOCKS, METHOD + b"\5\x99", "reply 153", None, id="socks, a reply of its own"),
    pytest.param(SOCKS, METHOD + b"\1\0", "replies with version 1", None, id="socks, another version later"),
    pytest.param(SOCKS, METHOD + b"\5\0\0\2", "address of type 2", None, id="socks, an address of no type"),
    pytest.param(HTTP, b"HTTP/1.1 407 Who are you\r\n\r\n", "407, it asks for credentials", None, id="407"),
    pytest.param(HTTP_LOGIN, b"HTTP/1.1 407 No\r\n\r\n", "407, it asks for other", None, id="407 with a login"),
    pytest.param(HTTP, b"HTTP/1.1 403 Forbidden\r\n\r\nno", "403, it forbids", None, id="403"),
    pytest.param(HTTP, b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "502, bad gateway", None, id="502"),
    pytest.param(HTTP, b"HTTP/1.1 302 Found\r\nLocation: /\r\n\r\n", "status 302", None, id="302"),
    pytest.param(HTTP, b"HTTP/1.1 101 Switching\r\n\r\n", "status 101", None, id="101"),
    pytest.param(HTTP, b"HTTP/1.1 2000 OK\r\n\r\n", "no status", None, id="a status of four digits"),
    pytest.param(HTTP, b"HTTP/1.1 OK\r\n\r\n", "no status", None, id="no status"),
    pytest.param(HTTP, b"HTTP/2 200 OK\r\n\r\n", "no HTTP/1", None, id="another version"),
    pytest.param(HTTP, b"SSH-2.0-x\r\n", "no HTTP/1", None, id="ssh"),
    pytest.param(HTTP, b"\0", "no HTTP/1", None, id="binary"),
    pytest.param(HTTP, b"HTTP/1.1 200 OK\r\n" + b"x" * MAX_HEAD, "more than 16384 octets", None, id="an endless head"),
    pytest.param(HTTP, b"HTTP/1.1 100 Go\r\n\r\n" * 900, "more than 16384 octets", None, id="endless interim answers"),
]


@pytest.mark.parametrize(("way", "octets", "words", "code"), REFUSALS)
def test_what_the_proxy_refuses_is_told_as_a_direct_connect_would(
    d: Drill, way: str, octets: bytes, words: str, code: int | None
) -> None:
    go_out(d, f"* -> {way}")
    flow = knock(d)
    answer(d, flow, octets)
    if code is None:
        d.expect(flow, "R.", ack=flow.snd)
    else:
        d.take_icmp(3, code)
    d.expect_none()
    (reason,) = reasons(d)
    assert reason.startswith(f"way out {way.replace('me:secret%20word', '***')}: ") and words in reason
    assert "secret" not in repr(d.events) + repr(d.stack.tcp.upstreams.all()) + repr(d.stack.egress.ways_out.all)
    d.assert_clean()


@pytest.mark.parametrize(
    "outcome",
    [Refuse(), Refuse(after=1.0), Refuse(code=errno.ENETUNREACH, at_once=True), Refuse(2.0, errno.EHOSTUNREACH)],
)
def test_a_proxy_that_is_down_is_a_refusal_and_nothing_goes_directly(d: Drill, outcome: Refuse) -> None:
    go_out(d, f"* -> {SOCKS}")
    told: list[Upstream] = []
    d.stack.tcp.upstreams.on_unreachable = told.append
    d.io.on_connect(PROXY, outcome)
    flow = knock(d)
    d.expect(flow, "R.", ack=flow.snd, within=outcome.after + 0.1)
    assert {sock.remote for sock in d.io.connects} == {PROXY}
    assert told == d.stack.tcp.upstreams.all()
    d.assert_clean()


def test_a_proxy_that_does_not_answer_is_a_refusal_after_the_limit_of_connects(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}")
    told: list[Upstream] = []
    d.stack.tcp.upstreams.on_unreachable = told.append
    d.io.on_connect(PROXY, Never())
    flow = knock(d)
    d.syn(flow)
    d.expect_none(ATTEMPT_S + 0.1)
    assert told, "its name may have moved"
    limit = d.network.timeouts.tcp_connect_s - ATTEMPT_S
    d.take_icmp(3, 1, within=limit)
    d.expect(flow, "R.", ack=flow.snd)
    assert {sock.remote for sock in d.io.connects} == {PROXY}
    d.assert_clean()


def test_a_guest_that_gives_up_while_the_proxy_is_dialled_frees_the_socket(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}")
    d.io.on_connect(PROXY, Never())
    flow = knock(d)
    d.advance(1.0)
    d.reset(flow)
    d.expect_none(ATTEMPT_S + 1)
    d.assert_clean()
    assert d.stack.deadline() is None


# Names of proxies


def named(d: Drill, *hosts: str, **options: bool) -> Flow:
    """A proxy with a name, with these addresses once it is resolved."""
    go_out(d, "* -> socks5://proxy.example:1080", **options)
    (upstream,) = d.stack.tcp.upstreams.all()
    upstream.resolving = not hosts
    upstream.use(hosts)
    return knock(d)


def test_nothing_goes_directly_before_the_proxy_is_resolved(d: Drill) -> None:
    go_out(d, "* -> socks5://proxy.example:1080")
    d.expect(knock(d), "R.")
    assert not d.io.connects
    d.assert_clean()


def test_guests_wait_for_a_name_that_is_being_resolved(d: Drill) -> None:
    flow = named(d)
    d.expect_none(1.0)
    (upstream,) = d.stack.tcp.upstreams.all()
    upstream.use([PROXY[0]])
    upstream.resolving = False
    d.advance(0.2)
    (sock,) = d.io.connects
    flow.sock, flow.far = sock, sock.peer
    answer(d, flow, METHOD)
    answer(d, flow, OK)
    d.establish(flow)


def test_a_name_that_is_not_resolved_in_the_limit_is_a_refusal(d: Drill) -> None:
    flow = named(d)
    d.take_icmp(3, 1, within=d.network.timeouts.tcp_connect_s + 1)
    d.expect(flow, "R.")
    assert not d.io.connects
    d.assert_clean()


@pytest.mark.parametrize("first", [Refuse(), Refuse(1.0), Never(), Refuse(code=errno.ENETUNREACH, at_once=True)])
def test_the_next_address_is_tried_where_one_fails(d: Drill, first: Refuse | Never) -> None:
    d.io.on_connect(("2001:db8::7", 1080), first)
    flow = named(d, "2001:db8::7", "198.51.100.7")
    d.advance(ATTEMPT_S + 0.1)
    flow.sock = d.io.connects[-1]
    flow.far = flow.sock.peer
    assert [sock.remote for sock in d.io.connects] == [("2001:db8::7", 1080), PROXY]
    assert len(d.io.sockets) == 1
    answer(d, flow, METHOD)
    answer(d, flow, OK)
    d.establish(flow)
    d.host(flow).send(b"answer")
    d.expect(flow, ".", data=b"answer", within=0.1)


def test_a_proxy_of_ipv6_is_a_proxy(d: Drill) -> None:
    go_out(d, "* -> http://[2001:db8::7]:3128")
    flow = knock(d)
    assert flow.sock is not None and flow.sock.remote == ("2001:db8::7", 3128)
    answer(d, flow, CONNECTED)
    d.establish(flow)


# Fail open


@pytest.mark.parametrize("outcome", [Refuse(), Refuse(1.0), Never()])
def test_with_fail_open_a_proxy_that_cannot_be_reached_is_gone_around(d: Drill, outcome: Refuse | Never) -> None:
    go_out(d, f"* -> {SOCKS}", fail_open=True)
    d.io.on_connect(PROXY, outcome)
    flow = knock(d)
    d.advance(ATTEMPT_S + 0.1)
    flow.sock = d.io.connects[-1]
    flow.far = flow.sock.peer
    assert flow.sock.remote == SERVER and len(d.io.sockets) == 1
    d.establish(flow)
    d.guest(flow, ".", data=b"question")
    assert said(d, flow) == b"question"
    d.reset(flow)
    d.assert_clean()


def test_a_silent_proxy_is_not_waited_for_each_time(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}", fail_open=True)
    d.io.on_connect(PROXY, Never())
    knock(d)
    d.advance(ATTEMPT_S + 0.1)
    tried = len(d.io.connects)
    d.establish(knock(d))
    assert [sock.remote for sock in d.io.connects[tried:]] == [SERVER]
    d.advance(SILENT_S)
    d.io.on_connect(PROXY, Accept())
    flow = knock(d)
    assert flow.sock is not None and flow.sock.remote == PROXY


def test_a_proxy_with_one_address_that_works_is_not_silent(d: Drill) -> None:
    d.io.on_connect(("2001:db8::7", 1080), Never())
    named(d, "2001:db8::7", "198.51.100.7", fail_open=True)
    d.advance(ATTEMPT_S + 0.1)
    knock(d)
    assert [sock.remote[0] for sock in d.io.connects if sock.remote] == ["2001:db8::7", "198.51.100.7", "2001:db8::7"]


def test_a_proxy_that_refuses_is_not_gone_around(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}", fail_open=True)
    flow = knock(d)
    answer(d, flow, METHOD + b"\5\1")
    d.expect(flow, "R.")
    assert {sock.remote for sock in d.io.connects} == {PROXY}


def test_the_direct_way_tells_its_own_failures(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}", fail_open=True)
    d.io.on_connect(PROXY, Refuse())
    d.io.on_connect(SERVER, Refuse(code=errno.ENETUNREACH, at_once=True))
    knock(d)
    d.take_icmp(3, 0)
    d.assert_clean()


# Rules


def way_of(d: Drill, dst: Address) -> Address | None:
    flow = knock(d, dst)
    return flow.sock.remote if flow.sock is not None else None


def test_the_first_rule_that_matches_wins_and_the_rest_goes_directly(d: Drill) -> None:
    go_out(
        d,
        "10.1.0.0/16 -> direct",
        "10.0.0.0/8:443 -> http://192.0.2.1:3128",
        "10.0.0.0/8 -> refuse",
        f"*:80 -> {SOCKS}",
    )
    assert way_of(d, ("10.1.2.3", 80)) == ("10.1.2.3", 80)
    assert way_of(d, ("10.2.2.3", 443)) == ("192.0.2.1", 3128)
    assert way_of(d, ("10.2.2.3", 80)) is None
    assert way_of(d, ("11.0.0.1", 80)) == PROXY
    assert way_of(d, ("11.0.0.1", 81)) == ("11.0.0.1", 81)


def test_a_rule_by_domain_holds_for_addresses_that_our_dns_gave_out(d: Drill) -> None:
    names = d.stack.egress.ways_out.names = Names(d.clock)
    go_out(d, f"corp.example -> {SOCKS.replace('socks5', 'socks5h')}", "* -> direct")
    assert way_of(d, SERVER) == SERVER
    names.learn("xcorp.example", ip(SERVER[0]), 60)
    assert way_of(d, SERVER) == SERVER
    names.learn("Www.Corp.Example.", ip(SERVER[0]), 60)
    names.learn("other.example", ip(SERVER[0]), 60)
    flow = knock(d)
    answer(d, flow, METHOD)
    assert said(d, flow) == b"\5\1\0" + b"\5\1\0\3\x10www.corp.example\0\x50"
    d.advance(601)
    assert way_of(d, SERVER) == SERVER, "names are forgotten in time"


def test_socks5_is_told_the_address_and_http_the_name(d: Drill) -> None:
    names = d.stack.egress.ways_out.names = Names(d.clock)
    names.learn("www.example", ip(SERVER[0]), 60)
    go_out(d, f"*:80 -> {SOCKS}", f"* -> {HTTP}")
    flow = knock(d)
    answer(d, flow, METHOD)
    assert said(d, flow).endswith(ADDRESS)
    assert said(d, knock(d, (SERVER[0], 443))).startswith(
        b"CONNECT www.example:443 HTTP/1.1\r\nHost: www.example:443\r\n"
    )


def test_the_host_itself_is_on_this_side_of_every_proxy(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}")
    d.stack.forward_gateway([GatewayForward("tcp", 8888, Endpoint.of("10.0.0.7", 80))])
    assert way_of(d, ("192.168.65.2", 8080)) == ("127.0.0.1", 8080)
    assert way_of(d, ("192.168.65.1", 8888)) == PROXY, "a gateway forward that leads away"


@pytest.mark.parametrize("address", ["169.254.169.254", "192.168.65.9", "192.168.65.1"])
def test_rules_are_no_way_around_the_policy(d: Drill, address: str) -> None:
    go_out(d, f"{address}/32 -> {SOCKS}", f"* -> {SOCKS}")
    d.expect(knock(d, (address, 81)), "R.")
    assert not d.io.connects


def test_new_rules_hold_for_new_connections(d: Drill) -> None:
    flow = play(d, SCRIPTS["socks"])
    waiting = knock(d)
    go_out(d, "10.0.0.0/8 -> refuse")
    assert way_of(d, SERVER) == SERVER
    answer(d, waiting, METHOD)
    answer(d, waiting, OK)
    d.establish(waiting)
    d.host(flow).send(b"still here")
    d.expect(flow, ".", data=b"still here", within=0.1)


def ping(d: Drill, dst: str) -> None:
    d.ip(packets.ICMP, packets.echo(7, 1, b"x" * 8), dst=ip(dst))


@pytest.mark.parametrize(
    ("rules", "options", "udp", "pings"),
    [
        (["* -> " + SOCKS], {}, False, False),
        (["* -> " + SOCKS], {"datagrams": True}, True, True),
        (["* -> refuse"], {"datagrams": True}, False, False),
        (["*:443 -> " + SOCKS], {}, False, True),
        (["*:80 -> " + SOCKS], {}, True, True),
        (["93.184.216.34 -> direct", "* -> " + SOCKS], {}, True, True),
    ],
)
def test_datagrams_and_pings_do_not_go_around_a_proxy_unless_told_so(
    d: Drill, rules: list[str], options: dict[str, bool], udp: bool, pings: bool
) -> None:
    go_out(d, *rules, **options)
    d.udp((SERVER[0], 443), b"question")
    assert bool(d.io.datagrams) is udp
    if not udp:
        d.take_icmp(3, 13)
    d.io.datagrams.clear()
    ping(d, SERVER[0])
    assert bool(d.io.datagrams) is pings
    if not pings:
        d.take_icmp(3, 13)
    d.udp(("192.168.65.2", 443), b"question")
    assert d.io.datagrams[-1].address == ("127.0.0.1", 443), "the host itself is not behind the proxy"


def test_whatever_call_fails_the_guest_hears_and_nothing_is_left(drill: Callable[..., Drill], script: Script) -> None:
    """F19: every call on the way fails once, and nothing goes directly."""
    way, steps = script
    for index in range(1, 100):
        d = drill()
        go_out(d, f"* -> {way}")
        before = d.io.total_calls
        d.io.fail_at(before + index, errno.EIO)
        flow = knock(d)
        for _, octets in steps:
            if flow.sock is not None and not flow.sock.closed:
                answer(d, flow, octets)
        assert {sock.remote for sock in d.io.connects} <= {PROXY, None}
        if flow.inbox[0].flags & 4:
            d.assert_clean()
        else:
            d.establish(flow)
            d.reset(flow)
            d.assert_clean()
        if d.io.total_calls < before + index:
            break
    assert 5 < index < 99


def test_a_bug_of_ours_resets_one_guest(d: Drill, monkeypatch: pytest.MonkeyPatch) -> None:
    go_out(d, f"* -> {SOCKS}")
    flow = knock(d)
    monkeypatch.setattr(Socks5, "hear", lambda exchange, octets: 1 // 0)
    answer(d, flow, METHOD)
    d.expect(flow, "R.", ack=flow.snd)
    assert flow.sock is not None and flow.sock.closed
    assert d.stack.counters.contained == 1
    d.stack.counters.contained = 0
    d.events.clear()
    d.assert_clean()


def test_the_end_of_the_network_ends_what_waits(d: Drill) -> None:
    go_out(d, f"* -> {SOCKS}")
    flow = knock(d)
    d.stack.close()
    assert flow.sock is not None and flow.sock.closed
