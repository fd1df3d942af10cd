"""Ports of the gateway that lead elsewhere (spec vpnkit 7.6): TCP in virtual time, UDP over real loopback sockets."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from netstack.api import Endpoint, GatewayForward, Reply
from netstack.settings import Network
from tests.support.drill import Drill
from tests.support.fake_host import Accept, Refuse
from tests.udp.support import ALIAS, GATEWAY, GUEST, World, raw_packet

GATEWAY_TEXT = "192.168.65.1"


def tcp(port: int, to: str, to_port: int) -> GatewayForward:
    return GatewayForward("tcp", port, Endpoint.of(to, to_port))


def udp(port: int, to: str, to_port: int) -> GatewayForward:
    return GatewayForward("udp", port, Endpoint.of(to, to_port))


# TCP


def test_a_port_of_the_gateway_leads_to_the_hosts_loopback(d: Drill) -> None:
    d.stack.forward_gateway([tcp(8888, "127.0.0.1", 80)])
    flow = d.open((GATEWAY_TEXT, 8888))
    assert flow.sock is not None and flow.sock.remote == ("127.0.0.1", 80)
    d.guest(flow, ".", data=b"question")
    assert bytes(d.host(flow).received) == b"question"
    d.host(flow).send(b"answer")
    d.expect(flow, ".", data=b"answer", within=0.1)


def test_the_guest_is_answered_only_when_the_host_has_connected(d: Drill) -> None:
    d.stack.forward_gateway([tcp(8888, "10.0.0.7", 80), tcp(8889, "10.0.0.8", 80)])
    d.io.on_connect(("10.0.0.7", 80), Accept(after=1.0))
    flow = d.flow((GATEWAY_TEXT, 8888))
    d.syn(flow)
    d.expect_none(0.9)
    d.expect(flow, "S.", within=0.2)
    d.io.on_connect(("10.0.0.8", 80), Refuse(after=1.0))
    flow = d.flow((GATEWAY_TEXT, 8889))
    d.syn(flow)
    d.expect(flow, "R.", within=1.1, not_before=1.0)


@pytest.mark.parametrize(("code", "icmp_code"), [(errno.EHOSTUNREACH, 1), (errno.ENETUNREACH, 0)])
def test_an_unreachable_endpoint_is_unreachable_for_the_guest(d: Drill, code: int, icmp_code: int) -> None:
    d.stack.forward_gateway([tcp(8888, "10.0.0.7", 80)])
    d.io.on_connect(("10.0.0.7", 80), Refuse(code=code, at_once=True))
    d.syn(d.flow((GATEWAY_TEXT, 8888)))
    d.take_icmp(3, icmp_code)


def test_the_first_that_matches_wins_for_each_protocol(d: Drill) -> None:
    d.stack.forward_gateway([udp(80, "10.0.0.1", 1), tcp(80, "10.0.0.2", 2), tcp(80, "10.0.0.3", 3)])
    flow = d.open((GATEWAY_TEXT, 80))
    assert flow.sock is not None and flow.sock.remote == ("10.0.0.2", 2)


def test_ports_that_are_not_forwarded_are_refused_and_other_addresses_go_where_they_went(d: Drill) -> None:
    d.stack.forward_gateway([tcp(8888, "10.0.0.7", 80)])
    flow = d.flow((GATEWAY_TEXT, 8889))
    d.syn(flow)
    d.expect(flow, "R.")
    for address, remote in (("192.168.65.2", "127.0.0.1"), ("93.184.216.34", "93.184.216.34")):
        flow = d.open((address, 8888))
        assert flow.sock is not None and flow.sock.remote == (remote, 8888)


def test_a_forward_goes_before_the_gateways_own_service_and_gives_it_back(d: Drill) -> None:
    served = []
    d.stack.tcp.services[GATEWAY, 53] = lambda sock, source: served.append(sock)
    d.stack.forward_gateway([tcp(53, "10.0.0.7", 5353)])
    flow = d.open((GATEWAY_TEXT, 53))
    assert flow.sock is not None and flow.sock.remote == ("10.0.0.7", 5353) and not served
    d.stack.forward_gateway([udp(53, "10.0.0.7", 5353)])
    d.syn(d.flow((GATEWAY_TEXT, 53)))
    assert len(served) == 1
    served[0].close()


def test_the_hosts_own_addresses_may_be_named_by_a_forward(d: Drill) -> None:
    """The operator said so; what a guest may address itself is another matter."""
    d.stack.egress.refuse([bytes((10, 0, 0, 7))])
    d.stack.forward_gateway([tcp(8888, "10.0.0.7", 80), tcp(8889, "169.254.169.254", 80)])
    for port, remote in ((8888, "10.0.0.7"), (8889, "169.254.169.254")):
        flow = d.open((GATEWAY_TEXT, port))
        assert flow.sock is not None and flow.sock.remote == (remote, 80)


def test_connections_go_on_when_their_forward_is_taken_away(d: Drill) -> None:
    d.stack.forward_gateway([tcp(8888, "10.0.0.7", 80)])
    flow = d.open((GATEWAY_TEXT, 8888))
    d.stack.forward_gateway([])
    d.host(flow).send(b"still here")
    d.expect(flow, ".", data=b"still here", within=0.1)
    refused = d.flow((GATEWAY_TEXT, 8888))
    d.syn(refused)
    d.expect(refused, "R.")


# UDP


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


def port_of(sock: object) -> int:
    return int(sock.getsockname()[1])  # type: ignore[attr-defined]


def test_datagrams_are_led_on_and_answers_come_from_the_port_that_was_addressed(world: World) -> None:
    server = world.host_socket()
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port_of(server))])
    for octets in (b"general way", b"fast way"):
        world.send(4000, GATEWAY, 8125, octets)
        payload, peer = server.recvfrom(100)
        assert payload == octets
        server.sendto(payload.upper(), peer)
        world.turn()
        (answer,) = world.received()
        assert (answer.source, answer.source_port, answer.destination_port) == (GATEWAY, 8125, 4000)
        assert answer.payload == octets.upper()
    assert len(world.proxy.flows()) == 1


def test_one_guest_socket_hears_each_name_of_a_server_under_that_name(world: World) -> None:
    """Two ports of the gateway and the host alias all mean one server: each answer comes from whom the guest asked."""
    server = world.host_socket()
    port = port_of(server)
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port), udp(8126, "127.0.0.1", port)])
    names = [(GATEWAY, 8125), (ALIAS, port), (GATEWAY, 8126)]
    peers = []
    for number, name in enumerate(names):
        world.send(4000, *name, bytes((number,)))
        peers.append(server.recvfrom(10)[1])
    for number in (2, 0, 1, 1, 2, 0):
        server.sendto(bytes((number,)), peers[number])
        world.turn()
        (answer,) = world.received()
        assert ((answer.source, answer.source_port), answer.payload) == (names[number], bytes((number,)))


def test_without_a_host_alias_answers_still_come() -> None:
    world = World(Network(host_alias=None))
    server = world.host_socket()
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port_of(server))])
    world.send(4000, GATEWAY, 8125, b"question")
    server.sendto(b"answer", server.recvfrom(100)[1])
    world.turn()
    assert [(answer.source, answer.payload) for answer in world.received()] == [(GATEWAY, b"answer")]
    world.close()


def test_a_udp_forward_goes_before_the_gateways_own_service(world: World) -> None:
    asked = []

    def serve(payload: bytes, source: Endpoint, reply: Reply) -> None:
        asked.append(payload)

    server = world.host_socket()
    world.proxy.services[GATEWAY, 53] = serve
    world.egress.gateway_forwards.replace([udp(53, "127.0.0.1", port_of(server))])
    world.send(4000, GATEWAY, 53, b"question")
    assert server.recvfrom(100)[0] == b"question" and not asked
    world.egress.gateway_forwards.replace([GatewayForward("tcp", 53, Endpoint.of("127.0.0.1", 1))])
    world.send(4001, GATEWAY, 53, b"again")
    assert asked == [b"again"]


def test_nobody_at_the_endpoint_is_port_unreachable_from_the_gateway(world: World) -> None:
    closed = world.host_socket()
    port = port_of(closed)
    closed.close()
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port)])
    world.send(4000, GATEWAY, 8125, b"question")
    world.turn()
    (error,) = world.output.errors
    assert (error.type, error.code, error.source, error.destination) == (3, 3, GATEWAY, GUEST)
    assert error.quoted[16:20] == GATEWAY and int.from_bytes(error.quoted[22:24], "big") == 8125


def test_a_guest_that_listens_no_more_ends_that_mapping_alone(world: World) -> None:
    server = world.host_socket()
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port_of(server))])
    world.send(4000, GATEWAY, 8125, b"question")
    world.send(4000, ALIAS, port_of(server), b"question")
    assert len(world.proxy.flows()) == 2
    datagram = (8125).to_bytes(2, "big") + (4000).to_bytes(2, "big") + bytes(4)
    quoted = raw_packet(world.port, GATEWAY, GUEST, 17, datagram)
    error = raw_packet(world.port, GUEST, GATEWAY, 1, b"\3\3" + bytes(6) + bytes(quoted.data))
    world.proxy.guest_error(error, 3, 3, 0, quoted.data, world.now)  # type: ignore[arg-type]
    (left,) = world.proxy.flows()
    assert [remote.address for remote in left.remotes] == [ALIAS]


def test_what_flows_goes_on_when_its_forward_is_taken_away(world: World) -> None:
    server = world.host_socket()
    world.egress.gateway_forwards.replace([udp(8125, "127.0.0.1", port_of(server))])
    world.send(4000, GATEWAY, 8125, b"one")
    world.egress.gateway_forwards.replace([])
    world.send(4000, GATEWAY, 8125, b"two")
    assert [server.recvfrom(100)[0] for _ in range(2)] == [b"one", b"two"]
    world.send(4001, GATEWAY, 8125, b"three")
    (error,) = world.output.errors
    assert (error.type, error.code) == (3, 3)


def test_a_guest_cannot_open_more_sockets_through_forwards_than_it_may_have() -> None:
    from netstack.settings import Limits

    world = World(Network(limits=Limits(max_udp_flows=64)))
    server = world.host_socket()
    world.egress.gateway_forwards.replace([udp(port, "127.0.0.1", port_of(server)) for port in range(1, 201)])
    for port in range(1, 201):
        world.send(4000, GATEWAY, port, b"")
        assert len(world.io.open) <= 64
    assert world.counters.udp_evicted >= 136
    world.close()
