"""rtnetlink: what the kernel says is read right, what nobody would say harms nothing, what was lost is noticed."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import select
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netstack.errors import HostError, Malformed
from pyvpnkit.hostnet import netlink
from pyvpnkit.hostnet.netlink import Asker, Listener
from tests.roof.hostnet.conftest import interface
from tests.support.netns import Namespace, inside, wait_until

linux = pytest.mark.skipif(sys.platform != "linux", reason="expected: rtnetlink is Linux's")

PARSERS: tuple[Callable[[memoryview], Any], ...] = (
    netlink.parse_address,
    netlink.parse_route,
    netlink.parse_link,
    netlink.attributes,
    lambda data: list(netlink.messages(data)),
)


def attribute(kind: int, value: bytes) -> bytes:
    octets = struct.pack("=HH", 4 + len(value), kind) + value
    return octets + bytes(-len(octets) % 4)


def route(family: int = socket.AF_INET, prefix: int = 16, *attributes: bytes, table: int = 254, kind: int = 1) -> bytes:
    return struct.pack("=BBBBBBBBI", family, prefix, 0, 0, table, 3, 0, kind, 0) + b"".join(attributes)


ROUTE = route(
    socket.AF_INET,
    16,
    attribute(15, struct.pack("=I", 51820)),
    attribute(1, bytes((10, 50, 0, 0))),
    attribute(4, struct.pack("=I", 7)),
    attribute(5, bytes((10, 99, 0, 1))),
    attribute(6, struct.pack("=I", 50)),
    attribute(7, bytes((10, 99, 0, 2))),
    attribute(8, attribute(2, struct.pack("=I", 1300))),
)


def test_a_route_with_everything() -> None:
    found = netlink.parse_route(memoryview(ROUTE))
    assert (found.destination, found.prefix, found.interface) == (bytes((10, 50, 0, 0)), 16, 7)
    assert (found.gateway, found.source) == (bytes((10, 99, 0, 1)), bytes((10, 99, 0, 2)))
    assert (found.metric, found.mtu, found.table, found.kind) == (50, 1300, 51820, netlink.UNICAST)


def test_of_several_ways_the_first_stands_for_all() -> None:
    hops = b"".join(struct.pack("=HBBi", 8, 0, 0, number) for number in (5, 6))
    found = netlink.parse_route(memoryview(route(socket.AF_INET, 0, attribute(9, hops))))
    assert (found.interface, found.destination) == (5, bytes(4))


def test_on_a_point_to_point_link_the_address_is_ours_and_not_the_peers() -> None:
    peer, own = bytes((10, 8, 0, 1)), bytes((10, 8, 0, 2))
    body = struct.pack("=BBBBI", socket.AF_INET, 32, 0, 0, 3) + attribute(1, peer) + attribute(2, own)
    assert netlink.parse_address(memoryview(body)) == netlink.Address(octets=own, prefix=32, interface=3)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(route(17), id="another family"),
        pytest.param(route(socket.AF_INET, 33), id="prefix longer than an address"),
        pytest.param(route(socket.AF_INET, 8, attribute(1, bytes(16))), id="an IPv6 address in an IPv4 route"),
        pytest.param(route(socket.AF_INET, 8, attribute(4, b"\1")), id="a number of one octet"),
        pytest.param(route(socket.AF_INET, 8, struct.pack("=HH", 3, 1)), id="an attribute shorter than its header"),
        pytest.param(route(socket.AF_INET, 8, struct.pack("=HH", 5, 1)), id="an attribute longer than the message"),
        pytest.param(route(socket.AF_INET, 8, attribute(9, struct.pack("=HBBi", 8, 0, 0, -1))), id="interface -1"),
        pytest.param(ROUTE[:11], id="half a header"),
    ],
)
def test_a_route_that_cannot_be(body: bytes) -> None:
    with pytest.raises(Malformed):
        netlink.parse_route(memoryview(body))


@given(st.binary(max_size=300), st.integers(0, len(PARSERS) - 1))
def test_any_octets_are_values_or_malformed(data: bytes, which: int) -> None:
    with contextlib.suppress(Malformed):
        PARSERS[which](memoryview(data))


@given(st.integers(0, len(ROUTE)), st.integers(0, len(ROUTE) - 1), st.integers(0, 255))
def test_a_route_cut_anywhere_or_with_one_octet_changed(cut: int, at: int, octet: int) -> None:
    changed = bytearray(ROUTE)
    changed[at] = octet
    for data in (ROUTE[:cut], bytes(changed)):
        try:
            found = netlink.parse_route(memoryview(data))
        except Malformed:
            continue
        assert len(found.destination) in (4, 16) and found.prefix <= len(found.destination) * 8


@given(st.lists(st.binary(max_size=40), max_size=5), st.integers(0, 40))
def test_messages_of_a_datagram(bodies: list[bytes], cut: int) -> None:
    data = b"".join(
        struct.pack("=IHHII", 16 + len(body), 24, 2, number, 0) + body + bytes(-len(body) % 4)
        for number, body in enumerate(bodies)
    )
    found = [(number, bytes(body)) for _kind, _flags, number, body in netlink.messages(memoryview(data))]
    assert found == list(enumerate(bodies))
    with contextlib.suppress(Malformed):
        list(netlink.messages(memoryview(data[: max(0, len(data) - cut)])))


@linux
def test_addresses_and_routes_are_those_that_ip_shows(host: Namespace) -> None:
    interface(host, "a0", 1300)
    host.ip("addr", "add", "10.8.0.2", "peer", "10.8.0.1", "dev", "a0")
    host.ip("addr", "add", "2001:db8::2/64", "dev", "a0", "nodad")
    host.ip("route", "add", "10.50.0.0/16", "via", "10.8.0.1", "metric", "50")
    host.ip("route", "add", "default", "dev", "a0", "table", "51820")
    host.ip("route", "add", "unreachable", "172.16.0.0/12")
    with inside(host.path), Asker() as asker:
        addresses, routes, links = asker.addresses(), asker.routes(), asker.links()
        way, six = asker.way_to(bytes((10, 50, 1, 1))), asker.way_to(ipaddress.ip_address("2001:db8::7").packed)
        nowhere = [asker.way_to(bytes(one)) for one in ((203, 0, 113, 9), (172, 16, 0, 1))]
    wanted = {one["local"] for link in json.loads(host.ip("-j", "addr")) for one in link["addr_info"] if "local" in one}
    assert {str(ipaddress.ip_address(one.octets)) for one in addresses} == wanted >= {"10.8.0.2", "2001:db8::2"}
    link = next(link for link in links if link.name == "a0")
    assert link.mtu == 1300 and link.up
    shown = {f"{ipaddress.ip_address(one.destination)}/{one.prefix}": one for one in routes}
    assert shown["10.50.0.0/16"].metric == 50 and shown["10.50.0.0/16"].interface == link.number
    assert shown["0.0.0.0/0"].table == 51820
    assert shown["172.16.0.0/12"].kind == netlink.UNREACHABLE
    assert way is not None and (way.source, way.gateway) == (bytes((10, 8, 0, 2)), bytes((10, 8, 0, 1)))
    assert six is not None and six.interface == link.number
    assert nowhere == [None, None]


@linux
def test_a_long_list_comes_whole(host: Namespace) -> None:
    interface(host, "a0")
    count = 3000
    batch = "".join(f"route add 10.{number >> 8}.{number & 255}.0/24 dev a0\n" for number in range(count))
    subprocess.run(["ip", "-n", host.name, "-batch", "-"], input=batch, text=True, check=True)
    with inside(host.path), Asker() as asker:
        found = {one.destination for one in asker.routes() if one.prefix == 24 and one.table == 254}
    assert len(found) == count


@linux
def test_changes_are_heard_and_so_is_that_some_were_lost(host: Namespace) -> None:
    with inside(host.path):
        listener = Listener()
    try:
        assert not listener.heard()
        interface(host, "a0")
        wait_until(lambda: bool(select.select([listener], [], [], 1)[0]))
        assert listener.heard() and not listener.lost
        listener._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        for _ in range(20):
            host.ip("addr", "add", "10.1.0.1/24", "dev", "a0")
            host.ip("addr", "del", "10.1.0.1/24", "dev", "a0")
        assert listener.heard() and listener.lost
        while listener.heard():
            pass
        host.ip("addr", "add", "10.1.0.1/24", "dev", "a0")
        wait_until(lambda: bool(select.select([listener], [], [], 1)[0]))
        assert listener.heard(), "it hears on"
    finally:
        listener.close()


@linux
def test_what_another_process_says_is_no_news(host: Namespace) -> None:
    with inside(host.path):
        listener = Listener()
        other = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
    try:
        other.bind((0, 0))
        header = struct.pack("=IHHII", 16, 24, 0, 0, 0)
        other.sendto(header, (listener._sock.getsockname()[0], 0))
        wait_until(lambda: bool(select.select([listener], [], [], 1)[0]))
        assert not listener.heard()
    finally:
        other.close()
        listener.close()


def test_where_there_is_no_netlink_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> socket.socket:
        raise OSError(97, "Address family not supported by protocol")

    monkeypatch.setattr(netlink, "_socket", none)
    with pytest.raises(HostError, match="routes cannot be read"):
        Asker()
