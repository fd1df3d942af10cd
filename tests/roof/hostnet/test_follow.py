"""What the stack does when the host's network changes, in virtual time with a host that is played."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from netstack.flow.records import local_address
from netstack.observe.events import FlowClosed, HostNetworkChanged, as_dict
from netstack.observe.wake import Kind, Missed
from pyvpnkit.hostnet.changes import Change
from pyvpnkit.hostnet.follow import ROUTES_TOLD, Follow, words
from pyvpnkit.hostnet.routes import Egress, Route, Snapshot
from tests.support.drill import Drill, Flow

LOOPBACK, LAN, VPN = bytes((127, 0, 0, 1)), bytes((192, 0, 2, 7)), bytes((10, 8, 0, 2))
REMOTE = ("198.51.100.7", 80)


def flow_over(d: Drill, address: str, remote: tuple[str, int] = REMOTE) -> Flow:
    """An established flow whose host socket has this address."""
    flow = d.open(remote)
    assert flow.sock is not None
    flow.sock.local = (address, 50000)
    return flow


class TestFlows:
    """Stack.host_changed."""

    def test_only_those_over_an_address_that_is_gone_are_reset(self, d: Drill) -> None:
        vpn, lan, alias = (flow_over(d, one) for one in ("10.8.0.2", "192.0.2.7", "127.0.0.1"))
        assert d.stack.host_changed(frozenset((LOOPBACK, LAN, VPN))) == 0
        assert d.stack.host_changed(frozenset((LOOPBACK, LAN))) == 1
        d.settle()
        d.expect(vpn, "R.")
        assert d.host(vpn).aborted
        for flow in (lan, alias):
            d.host(flow).send(b"still here")
            d.expect(flow, ".", data=b"still here", within=0.1)
        closed = [event for event in d.events if isinstance(event, FlowClosed)]
        assert [event.reason for event in closed] == ["host address is gone"]
        assert d.stack.host_changed(frozenset((LOOPBACK, LAN))) == 0

    def test_loopback_stays_whatever_the_list_says(self, d: Drill) -> None:
        flow_over(d, "127.0.0.1")
        assert d.stack.host_changed(frozenset((LAN,))) == 0

    def test_a_flow_that_still_dials_over_it_is_refused(self, d: Drill) -> None:
        from tests.support.fake_host import Never

        d.io.on_connect(REMOTE, Never())
        flow = d.flow(REMOTE)
        d.syn(flow)
        d.settle()
        (sock,) = d.io.connects
        sock.local = ("10.8.0.2", 50000)
        assert d.stack.host_changed(frozenset((LAN,))) == 1
        d.settle()
        d.expect(flow, "R.")

    def test_a_published_ports_client_under_an_address_that_was_never_the_hosts_stays(self, d: Drill) -> None:
        """TPROXY and AnyIP give sockets addresses that no interface has."""
        d.stack.host_changed(frozenset((LAN, VPN)))
        flows = [d.forward(sport) for sport in (8081, 8082)]
        for flow, address in zip(flows, ("203.0.113.1", "10.8.0.2"), strict=True):
            assert flow.sock is not None
            flow.sock.local = (address, 8080)
        assert d.stack.host_changed(frozenset((LAN,))) == 1
        d.settle()
        d.expect(flows[1], "R.")


@pytest.mark.parametrize(
    ("name", "address"),
    [
        pytest.param(("192.0.2.7", 1), LAN, id="IPv4"),
        pytest.param(("::ffff:192.0.2.7", 1, 0, 0), LAN, id="IPv4 in IPv6"),
        pytest.param(("2001:db8::7", 1, 0, 0), ipaddress.ip_address("2001:db8::7").packed, id="IPv6"),
        pytest.param(("fe80::7%eth0", 1, 0, 2), ipaddress.ip_address("fe80::7").packed, id="link-local"),
        pytest.param(("127.3.2.1", 1), None, id="loopback"),
        pytest.param(("::ffff:127.0.0.1", 1, 0, 0), None, id="loopback in IPv6"),
        pytest.param(("::1", 1, 0, 0), None, id="loopback, IPv6"),
        pytest.param(("0.0.0.0", 0), None, id="not connected"),
        pytest.param(("::", 0, 0, 0), None, id="not connected, IPv6"),
        pytest.param("/run/tunnel.sock", None, id="unix"),
        pytest.param(b"\0abstract", None, id="abstract unix"),
        pytest.param((3, 1024), None, id="vsock"),
    ],
)
def test_the_address_of_a_socket_that_could_go_away(name: Any, address: bytes | None) -> None:
    class Named:
        def getsockname(self) -> Any:
            return name

    assert local_address(Named()) == address
    closed = socket.socket()
    closed.close()
    assert local_address(closed) is None


class TestMtu:
    """Stack.egress_mtu."""

    def too_long(self, d: Drill, octets: int, sport: int) -> int:
        """The MTU that a guest is told when the host says EMSGSIZE and nothing more, as macOS does."""
        d.io.fail("sendto", 1, errno.EMSGSIZE)
        d.udp(REMOTE, bytes(octets), sport=sport, df=True)
        return int.from_bytes(d.take_icmp(3, 4, within=0.1).payload[6:8], "big")

    def test_what_does_not_fit_is_told_the_way_outs_mtu_where_the_host_names_none(self, d: Drill) -> None:
        guessed = self.too_long(d, 1400, 5000)
        assert guessed == 1006, "RFC 1191's next plateau"
        d.stack.egress_mtu(1300)
        assert self.too_long(d, 1400, 5001) == 1300
        assert self.too_long(d, 1000, 5002) == 1006, "it would have fit there: something further on is smaller"
        d.stack.egress_mtu(300)
        assert self.too_long(d, 1400, 5003) == 576
        d.stack.egress_mtu(None)
        assert self.too_long(d, 1400, 5004) == guessed

    def test_the_dhcp_servers_limit_follows(self, d: Drill) -> None:
        assert d.stack.dhcp.highest_mtu is None
        for told, highest in ((1300, 1300), (100, 576), (None, None)):
            d.stack.egress_mtu(told)
            assert d.stack.dhcp.highest_mtu == highest


class TestFollow:
    """All of it together."""

    @pytest.fixture
    def follow(self, d: Drill) -> Iterator[tuple[Follow, list[str]]]:
        done: list[str] = []
        yield Follow(d.stack, lambda: done.append("forgotten"), mtu=True), done

    def test_an_event_says_what_changed(self, d: Drill, follow: tuple[Follow, list[str]]) -> None:
        made, done = follow
        vpn = flow_over(d, "10.8.0.2")
        many = frozenset(Route(destination=ipaddress.ip_network(f"10.{n}.0.0/16"), interface="tun0") for n in range(99))
        before = Snapshot(addresses=frozenset((LAN, VPN)), routes=many, egress=Egress(interface="tun0", mtu=1380))
        now = Snapshot(addresses=frozenset((LAN,)), egress=Egress(interface="eth0", mtu=1400))
        made.watch.snapshot = now
        made.changed(Change(before=before, now=now, missed=Missed(Kind.SLEPT, 3600.04)))
        d.settle()
        d.expect(vpn, "R.")
        assert done == ["forgotten"]
        assert d.stack.dhcp.highest_mtu == 1400
        (event,) = (event for event in d.events if isinstance(event, HostNetworkChanged))
        assert event.reasons == ("addresses", "routes", "egress", "slept")
        assert event.vanished == ("10.8.0.2",) and not event.appeared
        assert len(event.lost_routes) == ROUTES_TOLD
        assert (event.interface, event.mtu, event.missed_s, event.flows_reset) == ("eth0", 1400, 3600.0, 1)
        assert as_dict(event)["event"] == "HostNetworkChanged"
        line = words(event)
        assert line.startswith(
            "the host's network has changed (addresses, routes, egress, slept); 3600 s missed; gone:"
        )
        assert line.endswith("out by eth0 (MTU 1400); 1 TCP flows reset") and ", ...;" in line

    def test_a_host_that_cannot_be_read_has_lost_nothing(self, d: Drill, follow: tuple[Follow, list[str]]) -> None:
        made, done = follow
        flow_over(d, "10.8.0.2")
        made.changed(Change(before=Snapshot(), now=Snapshot(), resolvers=True))
        assert done == ["forgotten"] and d.stack.dhcp.highest_mtu == 1500
        (event,) = (event for event in d.events if isinstance(event, HostNetworkChanged))
        assert (event.reasons, event.flows_reset, event.interface) == (("resolvers",), 0, "")
        assert words(event).endswith("no way out")

    async def test_it_starts_with_how_this_host_is(self, follow: tuple[Follow, list[str]], d: Drill) -> None:
        made, done = follow
        made.start(asyncio.get_running_loop())
        try:
            assert LOOPBACK in made.watch.snapshot.addresses and not done
            assert made.ipv6_route() is made.watch.snapshot.ipv6_route
            egress = made.watch.snapshot.egress
            assert d.stack.dhcp.highest_mtu == (1500 if egress is None else min(1500, max(576, egress.mtu)))
        finally:
            made.close()
