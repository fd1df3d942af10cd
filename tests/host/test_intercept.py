"""Guests' connections that are served in place of their destination, in virtual time with a played host."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import pytest

from netstack.api import Endpoint, GatewayForward, TunnelRule
from tests.support.drill import Drill

WEB = "93.184.216.34"


class Interceptor:
    """Serves port 80 of every address, and remembers what it was asked about and given."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.served: list[tuple[str, socket.socket, Endpoint]] = []
        self.broken = False

    def ask(self, destination: Endpoint) -> object:
        self.asked.append(str(destination))
        if destination.port != 80:
            return None

        def handler(sock: socket.socket, source: Endpoint) -> None:
            if self.broken:
                raise KeyError("broken")
            self.served.append((str(destination), sock, source))

        return handler


@pytest.fixture
def interceptor(d: Drill) -> Iterator[Interceptor]:
    made = Interceptor()
    d.stack.intercept(made.ask)  # type: ignore[arg-type]
    yield made
    for _, sock, _ in made.served:
        sock.close()


def test_the_guest_is_answered_at_once_and_its_octets_are_the_handlers(d: Drill, interceptor: Interceptor) -> None:
    flow = d.flow((WEB, 80))
    d.syn(flow)
    ((destination, sock, source),) = interceptor.served
    assert destination == f"{WEB}:80" and source.text == "192.168.65.3"
    assert not sock.getblocking()
    assert all(one.remote != (WEB, 80) for one in d.io.sockets), "nobody was connected to"


def test_what_is_not_wanted_goes_its_own_way(d: Drill, interceptor: Interceptor) -> None:
    flow = d.open((WEB, 81))
    assert flow.sock is not None and flow.sock.remote == (WEB, 81)
    assert interceptor.asked == [f"{WEB}:81"]
    d.stack.intercept(None)
    flow = d.open((WEB, 80))
    assert flow.sock is not None and flow.sock.remote == (WEB, 80)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "192.168.65.77", "192.168.65.1", "168.63.129.16", "100.100.100.200"]
)
def test_what_is_refused_stays_refused(d: Drill, interceptor: Interceptor, address: str) -> None:
    flow = d.flow((address, 80))
    d.syn(flow)
    d.expect(flow, "R.")
    assert interceptor.asked == []


def test_the_host_alias_services_and_gateway_forwards_are_not_asked_about(d: Drill, interceptor: Interceptor) -> None:
    d.stack.forward_gateway([GatewayForward("tcp", 80, Endpoint.of("10.0.0.7", 8080))])
    for address, remote in (("192.168.65.2", ("127.0.0.1", 80)), ("192.168.65.1", ("10.0.0.7", 8080))):
        flow = d.open((address, 80))
        assert flow.sock is not None and flow.sock.remote == remote
    assert interceptor.asked == []


def test_interception_goes_before_tunnels(d: Drill, interceptor: Interceptor) -> None:
    d.stack.tunnel([TunnelRule(ipaddress.ip_network("10.0.0.0/8"), 0, "/run/t.sock")])
    d.syn(d.flow(("10.1.2.3", 80)))
    assert [destination for destination, _, _ in interceptor.served] == ["10.1.2.3:80"]


def test_a_handler_that_fails_ends_its_connection_alone(d: Drill, interceptor: Interceptor) -> None:
    interceptor.broken = True
    d.syn(d.flow((WEB, 80)))
    assert d.stack.counters.contained == 1
    d.stack.counters.contained = 0
    d.events[:] = [event for event in d.events if event.name != "Contained"]
    interceptor.broken = False
    d.syn(d.flow((WEB, 80)))
    assert len(interceptor.served) == 1


def test_a_port_that_is_no_longer_served_is_refused(d: Drill) -> None:
    served: list[socket.socket] = []
    gateway = Endpoint.of("192.168.65.1", 3128).address
    d.stack.serve_sockets(gateway, 3128, lambda sock, source: served.append(sock))
    d.syn(d.flow(("192.168.65.1", 3128)))
    d.stack.stop_serving(gateway, 3128)
    d.stack.stop_serving(gateway, 3128)
    flow = d.flow(("192.168.65.1", 3128))
    d.syn(flow)
    d.expect(flow, "R.")
    assert len(served) == 1
    served[0].close()
