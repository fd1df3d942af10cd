"""Outgoing TCP through a program on the host, as the guest and that program see it (spec vpnkit 7.7), in virtual time."""

from __future__ import annotations

import errno
import ipaddress
import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.api import Endpoint, GatewayForward, TunnelRule
from netstack.errors import HostError
from netstack.host.tunnels import MAX_ANSWER, check_answer
from netstack.observe.events import FlowOpened, FlowRefused
from tests.support.drill import GUEST, SERVER, Drill, Flow, pattern
from tests.support.fake_host import Accept, Address, Never, Refuse

PATH = "/run/tunnel.sock"
ANYWHERE = "0.0.0.0/0"
YES = {"accepted": True}


def rule(prefix: str = ANYWHERE, port: int = 0, path: str = PATH) -> TunnelRule:
    return TunnelRule(ipaddress.ip_network(prefix), port, path)


def document(value: object) -> bytes:
    """A document with its length before it."""
    octets = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(octets).to_bytes(2, "little") + octets


def asked(d: Drill, flow: Flow) -> dict[str, object]:
    """What the program was asked, and that nothing else was said."""
    said = bytes(d.host(flow).received)
    assert int.from_bytes(said[:2], "little") == len(said) - 2
    found = json.loads(said[2:])
    assert isinstance(found, dict)
    return found


def knock(d: Drill, dst: Address = SERVER) -> Flow:
    """The guest's SYN; its flow's far end is the program of the tunnel, if there is a host socket."""
    flow = d.flow(dst)
    d.syn(flow)
    return flow


def accept(d: Drill, dst: Address = SERVER, behind: bytes = b"") -> Flow:
    """A connection through the tunnel; the program says `behind` right behind its answer."""
    flow = knock(d, dst)
    d.host(flow).send(document(YES) + behind)
    d.establish(flow)
    d.host(flow).received.clear()
    return flow


def test_the_program_is_asked_about_the_destination_and_the_guest_waits_for_its_answer(d: Drill) -> None:
    d.stack.tunnel([rule()])
    flow = knock(d)
    assert flow.sock is not None and flow.sock.remote == (PATH, 1)
    assert asked(d, flow) == {
        "protocol": "tcp",
        "src_ip": "0.0.0.0",
        "src_port": 0,
        "dst_ip": SERVER[0],
        "dst_port": SERVER[1],
    }
    d.syn(flow)  # the guest sends its SYN again
    d.expect_none(3.0)
    assert d.stack.flows()[0].state == "CONNECTING"
    d.host(flow).send(document(YES))
    d.establish(flow)
    d.guest(flow, ".", data=b"question")
    assert bytes(d.host(flow).received).endswith(b"question")
    d.host(flow).send(b"answer")
    d.expect(flow, ".", data=b"answer", within=0.1)
    assert [event.remote for event in d.events if isinstance(event, FlowOpened)] == ["93.184.216.34:80"]


def _say(octets: bytes) -> Callable[[Drill, Flow], None]:
    return lambda d, flow: d.host(flow).send(octets)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        pytest.param(_say(document({"accepted": False})), "not accepted", id="it says no"),
        pytest.param(_say(document({"accepted": 1})), 'no "accepted"', id="a number is no yes"),
        pytest.param(_say(document({"accepted": "true"})), 'no "accepted"', id="a text is no yes"),
        pytest.param(_say(document({})), 'no "accepted"', id="it does not say"),
        pytest.param(_say(document([True])), 'no "accepted"', id="a list"),
        pytest.param(_say(document(b"{accepted:true}")), "no JSON", id="no JSON"),
        pytest.param(_say(document(b"\xff\xfe{}")), "no JSON", id="no text"),
        pytest.param(_say(document(b"[" * MAX_ANSWER)), "no JSON", id="deeply nested"),
        pytest.param(_say(document(b"")), "no JSON", id="an empty answer"),
        pytest.param(_say(b"HTTP/1.1 400 Bad Request\r\n\r\n"), "claims 21576 octets", id="HTTP"),
        pytest.param(lambda d, flow: d.host(flow).close(), "without an answer", id="it closes"),
        pytest.param(
            lambda d, flow: (d.host(flow).send(document(YES)[:-1]), d.host(flow).close()),
            "without an answer",
            id="it closes in the middle",
        ),
        pytest.param(lambda d, flow: d.host(flow).reset(), "reset", id="it resets"),
    ],
)
def test_any_other_answer_resets_the_guest(d: Drill, act: Callable[[Drill, Flow], None], words: str) -> None:
    d.stack.tunnel([rule()])
    flow = knock(d)
    act(d, flow)
    d.expect(flow, "R.", ack=flow.snd)
    (event,) = [event for event in d.events if isinstance(event, FlowRefused)]
    assert event.reason.startswith(f"tunnel {PATH}: ") and words in event.reason
    d.assert_clean()


@given(
    st.binary() | st.recursive(st.booleans() | st.none() | st.text(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_any_octets_accept_or_refuse(octets: bytes) -> None:
    with pytest.raises(HostError):
        check_answer(octets)
    check_answer(b'{"x":' + json.dumps(octets.hex()).encode() + b',"accepted":true}')


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ECONNREFUSED, errno.EACCES, errno.ENOTSOCK])
def test_a_socket_that_cannot_be_connected_resets_the_guest(d: Drill, code: int) -> None:
    d.stack.tunnel([rule()])
    d.io.on_connect((PATH, 1), Refuse(code=code))
    d.expect(knock(d), "R.")
    d.assert_clean()


def test_silence_resets_the_guest_after_the_limit_of_connects(d: Drill) -> None:
    d.stack.tunnel([rule()])
    flow = knock(d)
    limit = d.network.timeouts.tcp_connect_s
    d.expect(flow, "R.", ack=flow.snd, within=limit + 1, not_before=limit)
    d.assert_clean()


def test_a_guest_that_gives_up_meanwhile_frees_the_socket(d: Drill) -> None:
    d.stack.tunnel([rule()])
    for outcome in (Accept(), Never()):
        d.io.on_connect((PATH, 1), outcome)
        flow = knock(d)
        d.advance(0.2)
        d.reset(flow)
        d.expect_none(1.0)
        d.assert_clean()


def test_a_full_queue_is_tried_again_until_there_is_room(d: Drill) -> None:
    d.stack.tunnel([rule()])
    d.io.on_connect((PATH, 1), Never())
    flows = [knock(d) for _ in range(3)]
    d.expect_none(2.0)
    assert len(d.io.connects) < 3 * 30, "it is asked too often"
    d.io.on_connect((PATH, 1), Accept())
    d.advance(0.2)
    for flow in flows:
        d.host(flow).send(document(YES))
        d.establish(flow)


def test_a_queue_that_stays_full_resets_the_guest(d: Drill) -> None:
    d.stack.tunnel([rule()])
    d.io.on_connect((PATH, 1), Never())
    flow = knock(d)
    d.expect(flow, "R.", within=d.network.timeouts.tcp_connect_s + 1)
    d.advance(1.0)
    d.assert_clean()
    assert d.stack.deadline() is None, "it is still tried"


@pytest.mark.parametrize("peek_off", [True, False])
def test_what_comes_right_behind_the_answer_reaches_the_guest(drill: Callable[..., Drill], peek_off: bool) -> None:
    d = drill(peek_off=peek_off)
    d.stack.tunnel([rule()])
    octets = pattern(100_000)
    flow = accept(d, behind=octets)
    assert d.transfer(flow, len(octets)) == octets
    d.host(flow).send(b"more")
    assert d.transfer(flow, 4) == b"more"


def test_an_answer_in_single_octets_is_an_answer(d: Drill) -> None:
    d.stack.tunnel([rule()])
    flow = knock(d)
    for octet in document(b' {"more": [1], "accepted": true}\n'):
        d.expect_none()
        d.host(flow).send(bytes((octet,)))
        d.settle()
    d.establish(flow)


def test_a_request_that_leaves_in_pieces_is_a_request(d: Drill) -> None:
    d.stack.tunnel([rule()])
    d.io.send_at_most = 7
    d.io.fail("send", 2, errno.EAGAIN)
    flow = knock(d)
    assert asked(d, flow)["dst_port"] == 80
    d.host(flow).send(document(YES))
    d.establish(flow)


@pytest.mark.parametrize("first", ["guest", "program"])
def test_half_close_crosses_both_ways(d: Drill, first: str) -> None:
    d.stack.tunnel([rule()])
    flow = accept(d)
    if first == "guest":
        d.guest(flow, "F.", data=b"all")
        d.collect(flow)
        assert d.host(flow).eof and bytes(d.host(flow).received) == b"all"
        d.host(flow).send(b"late")
        d.host(flow).shutdown()
        assert b"".join(segment.payload for segment in d.collect(flow, within=0.1)) == b"late"
        d.guest(flow, ".")
    else:
        d.host(flow).send(b"all")
        d.host(flow).shutdown()
        assert b"".join(segment.payload for segment in d.collect(flow, within=0.1)) == b"all"
        d.guest(flow, ".", data=b"late")
        d.guest(flow, "F.")
        d.collect(flow)
        assert d.host(flow).eof and bytes(d.host(flow).received) == b"late"
    d.advance(120)
    d.assert_clean()


def test_the_first_rule_that_matches_wins_and_the_rest_goes_directly(d: Drill) -> None:
    d.stack.tunnel([rule("10.0.0.0/8", 443, "/a"), rule("10.1.0.0/16", 0, "/b"), rule("10.0.0.0/8", 0, "/c")])
    ways = {
        ("10.1.2.3", 443): ("/a", 1),
        ("10.1.2.3", 80): ("/b", 1),
        ("10.2.2.3", 80): ("/c", 1),
        ("11.2.2.3", 443): ("11.2.2.3", 443),
    }
    for destination, way in ways.items():
        flow = knock(d, destination)
        assert flow.sock is not None and flow.sock.remote == way


def test_rules_of_ipv6_match_nothing_of_ipv4(d: Drill) -> None:
    d.stack.tunnel([rule("::/0")])
    flow = knock(d)
    assert flow.sock is not None and flow.sock.remote == SERVER


def test_the_host_alias_is_asked_for_as_the_hosts_loopback(d: Drill) -> None:
    d.stack.tunnel([rule("127.0.0.1/32", 8080)])
    assert asked(d, knock(d, ("192.168.65.2", 8080)))["dst_ip"] == "127.0.0.1"
    flow = knock(d, ("192.168.65.2", 8081))
    assert flow.sock is not None and flow.sock.remote == ("127.0.0.1", 8081)


def test_a_gateway_forward_may_lead_through_a_tunnel(d: Drill) -> None:
    d.stack.tunnel([rule("10.0.0.0/8")])
    d.stack.forward_gateway([GatewayForward("tcp", 8888, Endpoint.of("10.0.0.7", 80))])
    said = asked(d, knock(d, ("192.168.65.1", 8888)))
    assert (said["dst_ip"], said["dst_port"]) == ("10.0.0.7", 80)


METADATA, ALIBABA, LOOPBACK, SUBNET, GATEWAY = (
    "169.254.169.254",
    "100.100.100.200",
    "127.0.0.1",
    "192.168.65.9",
    "192.168.65.1",
)


@pytest.mark.parametrize("address", [METADATA, ALIBABA, SUBNET, GATEWAY])
def test_a_wide_rule_is_no_way_around_the_policy(d: Drill, address: str) -> None:
    d.stack.tunnel([rule(ANYWHERE), rule("169.254.0.0/16")])
    d.expect(knock(d, (address, 80)), "R.")
    assert not d.io.connects


@pytest.mark.parametrize("address", [METADATA, ALIBABA])
def test_a_rule_for_one_address_is_the_operators_word(d: Drill, address: str) -> None:
    d.stack.tunnel([rule(f"{address}/32")])
    assert asked(d, knock(d, (address, 80)))["dst_ip"] == address


@pytest.mark.parametrize("address", [LOOPBACK, SUBNET, GATEWAY])
def test_no_rule_opens_loopback_by_its_own_name_or_the_virtual_network(d: Drill, address: str) -> None:
    d.stack.tunnel([rule(f"{address}/32")])
    knock(d, (address, 80))
    assert not d.io.connects
    assert not d.stack.flows()


def test_the_policy_may_be_widened_for_a_wide_rule(drill: Callable[..., Drill]) -> None:
    d = drill(allow=("100.100.100.0/24",))
    d.stack.tunnel([rule(ANYWHERE)])
    assert asked(d, knock(d, (ALIBABA, 80)))["dst_ip"] == ALIBABA


def test_new_rules_hold_for_new_connections(d: Drill) -> None:
    d.stack.tunnel([rule()])
    flow, waiting = accept(d), knock(d)
    d.stack.tunnel([])
    direct = knock(d)
    assert direct.sock is not None and direct.sock.remote == SERVER
    d.host(waiting).send(document(YES))
    d.establish(waiting)
    d.host(flow).send(b"still here")
    d.expect(flow, ".", data=b"still here", within=0.1)


def test_connections_that_wait_count_among_the_flows(drill: Callable[..., Drill]) -> None:
    from netstack.settings import Limits

    d = drill(limits=Limits(max_flows=2))
    d.stack.tunnel([rule()])
    knock(d), knock(d)
    d.expect(knock(d), "R.")
    assert len(d.io.sockets) == 2


def test_descriptors_that_run_out_reset_the_guest(d: Drill) -> None:
    d.stack.tunnel([rule()])
    d.io.fail("socket", 1, errno.EMFILE)
    d.expect(knock(d), "R.")
    d.assert_clean()


def test_whatever_call_fails_the_guest_hears_and_nothing_is_left(drill: Callable[..., Drill]) -> None:
    """F19: every call on the way fails once."""
    for index in range(1, 100):
        d = drill()
        d.stack.tunnel([rule()])
        before = d.io.total_calls
        d.io.fail_at(before + index, errno.EIO)
        flow = knock(d)
        if flow.far is not None and not flow.inbox:
            flow.far.send(document(YES))
            d.settle()
        if flow.inbox[0].flags & 4:
            d.assert_clean()
        else:
            d.establish(flow)
            d.reset(flow)
            d.assert_clean()
        if d.io.total_calls < before + index:
            break
    assert 5 < index < 99


def test_the_end_of_the_network_ends_what_waits(d: Drill) -> None:
    d.stack.tunnel([rule()])
    flow = knock(d)
    d.stack.close()
    assert flow.sock is not None and flow.sock.closed
    assert flow.guest == GUEST
