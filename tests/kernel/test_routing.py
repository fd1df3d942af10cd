"""A host with a router before it and a network behind that: hops, errors of routers, path MTU (F13, F14).

    guest -- pyvpnkit in host 10.91.1.2 -- 10.91.1.1 router 10.91.2.1 -- mtu 1280 -- 10.91.2.2 far

The router prohibits 10.91.3.0/24, has no way to 10.91.4.0/24 and silently drops 10.91.5.0/24.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World, require, wait_until
from tests.support.webhost import MB, content, web

pytestmark = pytest.mark.netns

ROUTER, FAR = "10.91.1.1", "10.91.2.2"
IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_RECVERR, IP_MTU = 10, 2, 11, 14


@dataclass(frozen=True)
class Road:
    guest: Namespace
    host: Namespace
    router: Namespace
    far: Namespace
    daemon: Daemon


@pytest.fixture(scope="module")
def road(shared: World) -> Iterator[Road]:
    require("ping", "traceroute", "curl")
    host, router, far = shared.host, shared.namespace("router"), shared.namespace("far")
    host.ip("link", "add", "up0", "type", "veth", "peer", "name", "host0", "netns", router.name)
    far.ip("link", "add", "up0", "type", "veth", "peer", "name", "far0", "netns", router.name)
    for place, device, address in (
        (host, "up0", "10.91.1.2/24"),
        (router, "host0", f"{ROUTER}/24"),
        (router, "far0", "10.91.2.1/24"),
        (far, "up0", f"{FAR}/24"),
    ):
        place.ip("addr", "add", address, "dev", device)
        place.ip("link", "set", device, "mtu", "1280" if "2." in address[6:] else "1500", "up")
    host.ip("route", "add", "10.91.0.0/16", "via", ROUTER)
    far.ip("route", "add", "default", "via", "10.91.2.1")
    router.ip("route", "add", "prohibit", "10.91.3.0/24")
    router.ip("route", "add", "blackhole", "10.91.5.0/24")
    router.sysctl("net.ipv4.ip_forward", "1")
    for place in (router, far):
        place.sysctl("net.ipv4.icmp_ratelimit", "0")
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", "--tcp-connect", "3")
    guest.udhcpc()
    yield Road(guest, host, router, far, daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def _hops(road: Road, *probe: str) -> list[str]:
    said = road.guest.run("traceroute", "-n", "-q", "1", "-w", "3", "-m", "6", *probe, FAR).stdout.splitlines()
    return [line.split()[1] for line in said[1:]]


@pytest.mark.parametrize("probe", [(), ("-I",)], ids=["udp", "icmp"])
def test_traceroute_shows_gateway_router_and_end(road: Road, probe: tuple[str, ...]) -> None:
    """TTL is carried: time exceeded of the gateway, then of the host's routers with the guest's own packet quoted."""
    assert _hops(road, *probe) == [GATEWAY, ROUTER, FAR]


def test_traceroute_by_tcp_ends(road: Road) -> None:
    """The host's connect is not the guest's SYN, so routers between stay unseen; the end is seen."""
    with web(road.far, FAR, 80):
        assert _hops(road, "-T", "-p", "80") == [GATEWAY, FAR]


def test_ping_of_the_world(road: Road) -> None:
    for octets in ("56", "1400", "4000", "60000"):
        said = road.guest.run("ping", "-M", "dont", "-c", "2", "-i", "0.1", "-W", "5", "-s", octets, FAR).stdout
        assert " 0% packet loss" in said, said


@pytest.mark.parametrize(
    ("address", "words"), [("10.91.3.1", "Packet filtered"), ("10.91.4.1", "Destination Net Unreachable")]
)
def test_ping_is_told_what_routers_say(road: Road, address: str, words: str) -> None:
    """Linux sends each host few such errors a second, so it may take several pings."""
    said = []

    def told() -> bool:
        said.append(road.guest.run("ping", "-c", "1", "-W", "1", address, check=False).stdout)
        return f"From {ROUTER} icmp_seq=1 {words}" in said[-1]

    wait_until(told, why=lambda: "".join(said))


def test_ping_is_told_the_path_mtu(road: Road) -> None:
    road.guest.ip("route", "flush", "cache")
    done = road.guest.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "-M", "do", "-s", "1400", FAR, check=False)
    assert f"From {ROUTER} icmp_seq=1 Frag needed and DF set (mtu = 1280)" in done.stdout, done.stdout
    assert "mtu=1280" in done.stdout + done.stderr, "the second one is refused by the guest's own kernel"
    road.guest.run("ping", "-c", "1", "-W", "5", "-M", "do", "-s", "1252", FAR)


@pytest.mark.parametrize(
    ("address", "code"),
    [("10.91.2.2", errno.ECONNREFUSED), ("10.91.3.1", errno.EHOSTUNREACH), ("10.91.4.1", errno.ENETUNREACH)],
)
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM], ids=["tcp", "udp"])
def test_errors_of_the_road_reach_the_socket(road: Road, kind: int, address: str, code: int) -> None:
    """F14, T04, U07: the same errno in the guest as a program on the host would see; the router tells few a second."""
    seen: list[int | None] = []

    def told() -> bool:
        with road.guest.socket(kind, limit_s=0.7) as sock:
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            try:
                sock.connect((address, 99))
                sock.send(b"anybody there?")
                sock.recv(100)
            except OSError as error:
                seen.append(error.errno)
            return seen[-1] is not None  # a TimeoutError has no errno

    wait_until(told)
    assert seen[-1] == code, seen


def test_a_datagram_over_the_path_mtu_is_refused_with_the_mtu(road: Road) -> None:
    """DF: the first one is lost, then the guest's kernel knows; and without DF it goes in fragments."""
    with road.far.datagrams(FAR, 7) as server, road.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        sock.connect((FAR, 7))

        def refused() -> bool:
            try:
                sock.send(bytes(1400))
            except OSError as error:
                return error.errno == errno.EMSGSIZE
            return False

        wait_until(refused)
        assert sock.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1280
        sock.send(content(1252))
        assert server.recv(65536) == content(1252)
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, 0)
        sock.send(content(9000))
        assert server.recv(65536) == content(9000)


def test_files_over_a_narrow_road(road: Road, fetch: Callable[..., None]) -> None:
    with web(road.far, FAR) as port:
        fetch(road.guest, port, 5 * MB, FAR)


def test_a_black_hole_is_given_up_not_answered(road: Road) -> None:
    """F13, T01, T02, T05: nothing is answered early; the guest's repeated SYNs are one connect of the host."""
    before = road.daemon.descriptors()
    with road.guest.socket() as sock:
        sock.setblocking(False)
        began = time.monotonic()
        assert sock.connect_ex(("10.91.5.1", 80)) == errno.EINPROGRESS
        wait_until(lambda: road.daemon.descriptors() == before + 1)
        most = 0
        while not select.select([], [sock], [], 0.05)[1]:
            most = max(most, road.daemon.descriptors())
            assert time.monotonic() - began < 10
        assert most == before + 1
        assert time.monotonic() - began > 2.5
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EHOSTUNREACH
    road.daemon.wait_descriptors(before)


def test_a_guest_that_gives_up_ends_the_hosts_connect(road: Road) -> None:
    """T05 would be RST or FIN; Linux sends neither for SYN-SENT, so the limit ends it."""
    before = road.daemon.descriptors()
    with road.guest.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex(("10.91.5.2", 80))
        wait_until(lambda: road.daemon.descriptors() == before + 1)
    road.daemon.wait_descriptors(before)


def test_many_black_holes_do_not_hold_up_others(road: Road) -> None:
    """No silent cap on pending connects (VPNKit's was 1,024 flows in all): 1,500 hang, one goes through at once."""
    socks = [road.guest.socket() for _ in range(1500)]
    try:
        for n, sock in enumerate(socks):
            sock.setblocking(False)
            sock.connect_ex((f"10.91.5.{n % 250 + 1}", 1000 + n))
        with web(road.far, FAR) as port:
            began = time.monotonic()
            done = road.guest.run("curl", "-sS", "--max-time", "10", "-o", "/dev/null", f"http://{FAR}:{port}/1000")
            assert time.monotonic() - began < 2, done
    finally:
        for sock in socks:
            sock.close()
