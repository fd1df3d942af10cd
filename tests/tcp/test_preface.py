"""What a guest reads in front of a client's own octets (PROXY protocol), and whom it sees as the client."""

from __future__ import annotations

import itertools

import pytest

from netstack.api import Endpoint
from netstack.host import octets
from netstack.tcp.seq import MASK
from tests.support import packets
from tests.support.drill import Drill, Flow

PREFACE = b"PROXY TCP4 203.0.113.9 127.0.0.1 40000 8080\r\n"


@pytest.fixture(params=["peeked", "kept"])
def d(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Drill:
    """With the octets in the host socket until they are acknowledged, and kept by us where a kernel cannot."""
    made = Drill()
    if request.param == "kept":
        made.stack.tcp.octets_of = lambda sock: octets.KeptOctets(sock, 1 << 20, made.stack.tcp.budget)  # type: ignore[assignment]
    return made


def accept(d: Drill, f: Flow) -> None:
    """The guest's half of the handshake."""
    d.guest(f, "S.", seq=f.isn, ack=f.rcv, options=packets.mss_option(1460), scaled=False)
    f.snd = (f.isn + 1) & MASK
    f.scale = 0


def octets_of(d: Drill, f: Flow) -> bytes:
    return b"".join(segment.payload for segment in d.collect(f))


def test_the_preface_comes_first_though_the_client_says_nothing(d: Drill) -> None:
    f = d.dial(preface=PREFACE)
    accept(d, f)
    assert octets_of(d, f) == PREFACE
    d.guest(f, ".")
    d.host(f).send(b"GET /")
    d.settle()
    assert octets_of(d, f) == b"GET /"
    d.guest(f, ".", data=b"answer")
    d.settle()
    assert d.host(f).received == b"answer"
    d.host(f).shutdown()
    d.expect(f, "F.")


def test_the_clients_octets_follow_the_preface_however_early_they_came(d: Drill) -> None:
    f = d.dial(preface=PREFACE)
    d.host(f).send(bytes(range(256)) * 40)
    accept(d, f)
    found = b""
    for _ in range(20):
        found += octets_of(d, f)
        d.guest(f, ".")
        d.settle()
    assert found == PREFACE + bytes(range(256)) * 40


def test_a_lost_preface_is_sent_again(d: Drill) -> None:
    f = d.dial(preface=PREFACE)
    accept(d, f)
    begin = d.collect(f)[0].seq
    d.host(f).send(b"and more")
    d.settle()
    d.collect(f)
    again = d.expect(f, within=3.0)
    assert again.seq == begin and again.payload == PREFACE + b"and more"
    d.guest(f, ".")
    d.settle()
    d.expect_none(5.0, f)


def test_a_client_that_closes_at_once_still_announces_itself(d: Drill) -> None:
    f = d.dial(preface=PREFACE)
    d.host(f).shutdown()
    accept(d, f)
    d.settle()
    found = d.collect(f)
    assert b"".join(segment.payload for segment in found) == PREFACE
    assert found[-1].flags & 1 or d.expect(f, "F.", within=1.0)


def test_a_guest_sees_the_client_and_when_that_name_is_taken_the_gateway(d: Drill) -> None:
    client = Endpoint.of("203.0.113.9", 40000)
    first = d.forward(source=client)
    assert (first.remote, first.dport) == (client.address, client.port)
    second = d.forward(source=client)
    assert second.remote == d.stack.network.gateway_bytes


def test_the_same_client_port_may_come_again_after_the_first_has_closed(d: Drill) -> None:
    client = Endpoint.of("203.0.113.9", 40000)
    for number, isn in zip(range(3), itertools.count(1000, 100_000)):
        f = d.forward(source=client, isn=isn)
        assert f.remote == client.address, f"round {number}"
        d.host(f).shutdown()
        d.expect(f, "F.")
        d.guest(f, "F.")
        d.settle()
        d.collect(f)
        del d.flows[f.key]
