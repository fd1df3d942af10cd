"""Which subnet is free, what clashes, which MTU guests are told; and a real host's state read as a whole."""

from __future__ import annotations

import ipaddress
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import ConfigError, HostError
from pyvpnkit.hostnet import routes
from pyvpnkit.hostnet.routes import Egress, Route, clashes, free_subnet, guest_mtu
from tests.roof.hostnet.conftest import interface
from tests.support.netns import Namespace, inside

CORPORATE = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16")


def made(*networks: str) -> list[Route]:
    return [Route(destination=ipaddress.ip_network(text), interface="tun0") for text in networks]


@pytest.mark.parametrize(
    ("taken", "free"),
    [
        pytest.param((), "192.168.65.0/24", id="nothing is taken"),
        pytest.param(("0.0.0.0/0", "::/0", "fd00::/8"), "192.168.65.0/24", id="the way to everywhere"),
        pytest.param(("0.0.0.0/1", "128.0.0.0/1", "192.0.0.0/4"), "192.168.65.0/24", id="the same in pieces"),
        pytest.param(("192.168.1.0/24", "172.17.0.0/16"), "192.168.65.0/24", id="a home network, and docker"),
        pytest.param(("192.168.65.0/24",), "192.168.66.0/24", id="the very one"),
        pytest.param(("192.168.65.9/32",), "192.168.66.0/24", id="one host in it"),
        pytest.param(("192.168.64.0/18",), "192.168.128.0/24", id="a wider one"),
        pytest.param(("192.168.0.0/16",), "172.31.65.0/24", id="all of 192.168"),
        pytest.param(("192.168.0.0/16", "172.16.0.0/12"), "10.255.65.0/24", id="172.16 too"),
        pytest.param(CORPORATE, "192.168.65.0/24", id="a VPN that takes everything: as good as any"),
        pytest.param((*CORPORATE, "192.168.65.0/24"), "192.168.66.0/24", id="and one that is really there"),
    ],
)
def test_a_free_subnet(taken: tuple[str, ...], free: str) -> None:
    assert free_subnet(made(*taken)) == free


def test_when_nothing_is_free_it_is_said() -> None:
    everything = (
        [f"192.168.{n}.0/24" for n in range(256)]
        + [f"172.{m}.{h}.0/17" for m in range(16, 32) for h in (0, 128)]
        + [f"10.{m}.{h}.0/17" for m in range(256) for h in (0, 128)]
    )
    with pytest.raises(ConfigError, match="name one"):
        free_subnet(made(*everything))


def test_a_host_that_cannot_be_read_has_no_automatic_subnet(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable() -> routes.Snapshot:
        raise HostError("netlink: Operation not permitted; the host's routes cannot be read")

    monkeypatch.setattr(routes, "snapshot", unreadable)
    with pytest.raises(ConfigError, match=r"not permitted.*name a network"):
        routes.auto_subnet()
    assert not routes.ipv6_route()


networks = st.builds(
    lambda address, prefix: ipaddress.IPv4Network((address, prefix), strict=False),
    st.one_of(st.integers(0, 2**32 - 1), st.integers(0xC0A80000, 0xC0A8FFFF)),
    st.integers(17, 32),
)


@given(st.lists(networks, max_size=60))
def test_a_free_subnet_is_private_and_free(taken: list[ipaddress.IPv4Network]) -> None:
    found = free_subnet([Route(destination=one, interface="a") for one in taken])
    network = ipaddress.IPv4Network(found)
    assert network.is_private and network.prefixlen == 24
    assert not any(network.overlaps(one) for one in taken)
    assert not clashes(found, [Route(destination=one, interface="a") for one in taken])


def test_clashes_come_narrowest_first_and_default_routes_are_none() -> None:
    found = clashes(
        "192.168.65.0/24", made("0.0.0.0/0", "128.0.0.0/1", "192.168.0.0/16", "192.168.65.128/25", "10.0.0.0/8")
    )
    assert list(map(str, found)) == ["192.168.65.128/25 on tun0", "192.168.0.0/16 on tun0"]


@pytest.mark.parametrize(
    ("way", "mtu"),
    [(None, 1500), (1400, 1400), (9000, 1500), (1500, 1500), (500, 576), (65536, 1500)],
)
def test_what_guests_are_told(way: int | None, mtu: int) -> None:
    assert guest_mtu(None if way is None else Egress(interface="a", mtu=way), 1500) == mtu


@pytest.mark.skipif(sys.platform != "linux", reason="expected: namespaces are Linux's")
def test_a_host_as_a_vpn_changes_it(host: Namespace) -> None:
    def now() -> routes.Snapshot:
        with inside(host.path):
            return routes.snapshot()

    found = now()
    assert found.egress is None and not found.ipv6_route and bytes((127, 0, 0, 1)) in found.addresses
    assert not found.routes
    interface(host, "eth0")
    host.ip("addr", "add", "192.168.65.7/24", "dev", "eth0")
    host.ip("addr", "add", "2001:db8::7/64", "dev", "eth0", "nodad")
    host.ip("route", "add", "default", "via", "192.168.65.1")
    host.ip("-6", "route", "add", "default", "via", "2001:db8::1")
    found = now()
    assert found.egress == Egress(interface="eth0", mtu=1500) and found.ipv6_route
    assert free_subnet(found.routes) == "192.168.66.0/24"
    assert {str(one) for one in found.routes} == {
        "0.0.0.0/0 on eth0", "192.168.65.0/24 on eth0", "::/0 on eth0", "2001:db8::/64 on eth0",
    }  # fmt: skip
    interface(host, "tun0", 1380)
    host.ip("addr", "add", "10.8.0.2/24", "dev", "tun0")
    for half in ("0.0.0.0/1", "128.0.0.0/1"):
        host.ip("route", "add", half, "via", "10.8.0.1")
    host.ip("-6", "route", "del", "default")
    host.ip("-6", "route", "add", "unreachable", "default")
    found = now()
    assert found.egress == Egress(interface="tun0", mtu=1380) and not found.ipv6_route
    with inside(host.path):
        assert not routes.ipv6_route()
        assert routes.auto_subnet() == "192.168.66.0/24"
    host.ip("route", "change", "0.0.0.0/1", "via", "10.8.0.1", "mtu", "1200")
    assert now().egress == Egress(interface="tun0", mtu=1200)
