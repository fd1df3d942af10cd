"""Published ports: the host's clients and a kernel guest's servers (X01, X02, X03)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.netns import Daemon, Namespace, World, wait_until
from tests.support.webhost import MB, content, digest, echo, exactly, read_all, serve, web

pytestmark = pytest.mark.netns


@dataclass(frozen=True)
class Published:
    guest: Namespace
    host: Namespace
    daemon: Daemon


@pytest.fixture(scope="module")
def published(shared: World) -> Iterator[Published]:
    guest = shared.namespace()
    specs = ["8080:80", "8081:81", "0.0.0.0:8082:80", "udp:5300:53", "udp:5301:54", "9000-9002:7000-7002"]
    options = [word for spec in specs for word in ("-p", spec)]
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", *options)
    guest.udhcpc()
    yield Published(guest, shared.host, daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_curl_of_a_web_server_in_the_guest(published: Published) -> None:
    with web(published.guest, "0.0.0.0", 80):
        for _ in range(3):
            done = published.host.run("sh", "-c", f"curl -sS http://127.0.0.1:8080/{10 * MB} | sha256sum")
            assert done.stdout.split()[0] == digest(10 * MB)


def test_who_connects_is_not_called_localhost(published: Published) -> None:
    """N7: a server in the guest that trusts its own loopback must not see it."""
    seen = []
    with (
        serve(published.guest.listen("0.0.0.0", 80), lambda sock: seen.append(sock.getpeername()[0])),
        published.host.connect("127.0.0.1", 8080) as sock,
    ):
        assert read_all(sock) == b""
    assert seen in (["192.168.65.1"], ["192.168.65.2"])


def test_half_close_both_ways(published: Published) -> None:
    octets = 10 * MB
    sums = []

    def handle(connection: socket.socket) -> None:
        sums.append(hashlib.sha256(read_all(connection)).hexdigest())
        connection.sendall(content(octets))

    with serve(published.guest.listen("0.0.0.0", 80), handle), published.host.connect("127.0.0.1", 8080) as sock:
        sock.sendall(content(octets))
        sock.shutdown(socket.SHUT_WR)
        assert hashlib.sha256(read_all(sock)).hexdigest() == digest(octets)
    assert sums == [digest(octets)]


def test_a_closed_guest_port_resets_the_client(published: Published) -> None:
    """X03: no hang, and no empty answer that looks like one."""
    for _ in range(10):
        with pytest.raises(ConnectionResetError), published.host.connect("127.0.0.1", 8081) as sock:
            sock.recv(100)


def test_a_range_leads_to_a_range(published: Published) -> None:
    for n in range(3):
        with (
            serve(published.guest.listen("0.0.0.0", 7000 + n), lambda sock, n=n: sock.sendall(b"%d" % n)),
            published.host.connect("127.0.0.1", 9000 + n) as sock,
        ):
            assert read_all(sock) == b"%d" % n


def test_five_hundred_clients_at_once(published: Published) -> None:
    """X01, from 20 threads: all are open before the first one speaks."""

    def one(sock: socket.socket) -> bool:
        sock.sendall(content(1000))
        return exactly(sock, 1000) == content(1000)

    with serve(published.guest.listen("0.0.0.0", 80, backlog=1024), echo):
        socks = [published.host.connect("127.0.0.1", 8080) for _ in range(500)]
        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            assert all(pool.map(one, socks))
        for sock in socks:
            sock.close()


def test_udp_clients_are_told_apart(published: Published) -> None:
    """X02: each client gets the answer to its own datagram, of any size."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(published.guest.datagrams("0.0.0.0", 53))
        clients = [stack.enter_context(published.host.socket(socket.SOCK_DGRAM)) for _ in range(20)]
        sizes = [*(n * 400 for n in range(19)), 65507]  # together what the server's buffer holds
        for client, octets in zip(clients, sizes, strict=True):
            client.sendto(content(65507)[:octets], ("127.0.0.1", 5300))
        for _ in clients:
            payload, sender = server.recvfrom(65536)
            server.sendto(payload, sender)
        for client, octets in zip(clients, sizes, strict=True):
            assert client.recvfrom(65536) == (content(65507)[:octets], ("127.0.0.1", 5300))


def test_a_closed_udp_port_does_not_end_the_publication(published: Published) -> None:
    """The guest says port unreachable; once a server is there, it is reached by the same client."""
    with published.host.socket(socket.SOCK_DGRAM) as client:
        client.connect(("127.0.0.1", 5301))
        before = published.guest.read("/proc/net/snmp")
        client.send(b"early")
        wait_until(lambda: _out_unreachable(published.guest.read("/proc/net/snmp")) > _out_unreachable(before))
        with published.guest.datagrams("0.0.0.0", 54) as server:
            client.send(b"again")
            assert server.recvfrom(100)[0] == b"again"


def _out_unreachable(snmp: str) -> int:
    """ICMP unreachables that this kernel has sent (RFC 4293 counts)."""
    names, values = (line.split()[1:] for line in snmp.splitlines() if line.startswith("Icmp:"))
    return int(dict(zip(names, values, strict=True))["OutDestUnreachs"])


def test_a_port_in_use_is_reported_with_its_holder(published: Published, shared: World) -> None:
    """X01: what could not be bound, and who has it."""
    guest = shared.namespace()
    with pytest.raises(AssertionError) as caught:
        shared.daemon("--link", f"tap:netns={guest.name}", "-p", "8080:80")
    said = str(caught.value)
    assert "8080" in said and str(published.daemon.process.pid) in said, said
