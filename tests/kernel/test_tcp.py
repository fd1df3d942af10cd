"""TCP between a kernel guest and the host's own servers and clients: data, ends and refusals as they are."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.kernel.conftest import Site
from tests.support.netns import HOST, wait_until
from tests.support.webhost import MB, content, digest, echo, exactly, read_all, serve

pytestmark = pytest.mark.netns

ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER that makes close send RST."""


def test_a_hundred_megabytes_each_way_by_curl(site: Site, fetch: Callable[..., None]) -> None:
    fetch(site.guest, site.port, 100 * MB)


def test_32_downloads_at_once(site: Site, fetch: Callable[..., None], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each whole; none waits for another."""
    directory = tmp_path_factory.mktemp("many")
    words = ["curl", "-sS", "--max-time", "60", "--parallel", "--parallel-immediate", "--parallel-max", "32"]
    for n in range(32):
        words += ["-o", str(directory / str(n)), f"http://{HOST}:{site.port}/{2 * MB}"]
    site.guest.run(*words, limit_s=70)
    sums = {hashlib.sha256((directory / str(n)).read_bytes()).hexdigest() for n in range(32)}
    assert sums == {digest(2 * MB)}


def test_iperf3_both_ways_and_udp(site: Site) -> None:
    """A program that uses one control and several data connections, and checks its datagrams itself."""
    server = site.host.start("iperf3", "-s", "-B", "127.0.0.1", "-p", "5201", "--forceflush")

    def measured(*options: str) -> dict[str, Any]:
        assert server.stdout is not None
        while (
            "listening" not in server.stdout.readline()
        ):  # it serves one at a time, and says when it is done with the last
            assert server.poll() is None
        done: dict[str, Any] = json.loads(site.guest.run("iperf3", "-c", HOST, "-p", "5201", "-J", *options).stdout)
        assert "error" not in done
        return done

    for options in (("-t", "1"), ("-t", "1", "-R"), ("-t", "1", "-P", "4"), ("-t", "1", "--bidir")):
        done = measured(*options)
        assert done["end"]["sum_received"]["bytes"] > 10 * MB, options
    for options in (("-b", "10M"), ("-b", "10M", "-R"), ("-b", "5M", "-l", "64", "-R")):
        done = measured("-u", "-t", "1", *options)
        assert done["end"]["sum"]["packets"] > 500
        assert done["end"]["sum"]["lost_percent"] <= 1, options


def test_a_refusal_comes_at_once(site: Site) -> None:
    """T03, F14: ECONNREFUSED, as from the host itself."""
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(ConnectionRefusedError):
            site.guest.connect(HOST, 9)
    assert time.monotonic() - began < 1.0


def test_a_closed_port_never_connects_to_itself(site: Site) -> None:
    """A host socket whose own port happens to be the one it connects to on loopback would meet itself (RFC 9293 3.5, both
    sides open): a scanner in the guest would find a port open that nobody serves.
    """
    site.host.sysctl("net.ipv4.ip_local_port_range", "20000 20001")
    try:
        for port in (20000, 20001) * 5:
            with pytest.raises(ConnectionRefusedError), site.guest.connect(HOST, port):
                pass
    finally:
        site.host.sysctl("net.ipv4.ip_local_port_range", "10000 60000")


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("192.168.65.77", errno.EHOSTUNREACH),  # nobody on the guest's own network
        ("203.0.113.1", errno.ENETUNREACH),  # the host has no way there
        ("169.254.169.254", errno.ECONNREFUSED),
    ],
)
def test_what_cannot_be_reached_says_why(site: Site, address: str, code: int) -> None:
    """T04, F14, G26; the connect of the guest fails long before it would time out."""
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        site.guest.connect(address, 80)
    assert caught.value.errno == code, caught.value
    assert time.monotonic() - began < 5


def test_the_gateway_refuses_ports_without_service(site: Site) -> None:
    with pytest.raises(ConnectionRefusedError):
        site.guest.connect("192.168.65.1", 81)


def test_host_loopback_is_reached_by_the_alias_only(site: Site) -> None:
    """G25: a guest that routes 127/8 to us is refused, and datagrams likewise; the alias serves the same port."""
    accepted: list[socket.socket] = []
    site.guest.sysctl("net.ipv4.conf.eth0.route_localnet", "1")
    site.guest.sysctl("net.ipv4.conf.all.route_localnet", "1")
    site.guest.ip("addr", "del", "127.0.0.1/8", "dev", "lo")
    try:
        with serve(site.host.listen("0.0.0.0"), accepted.append) as (_, port):
            for address in ("127.0.0.1", "127.0.0.53", "127.1.2.3"):
                site.guest.ip("route", "add", address, "via", "192.168.65.1", "dev", "eth0", "src", "192.168.65.3")
                with pytest.raises(OSError) as caught:
                    site.guest.connect(address, port)
                assert caught.value.errno == errno.EHOSTUNREACH
                with site.guest.socket(socket.SOCK_DGRAM) as sock:
                    sock.connect((address, port))
                    sock.send(b"anybody there?")
                    with pytest.raises(OSError) as caught:
                        sock.recv(100)
                assert caught.value.errno == errno.EHOSTUNREACH
                site.guest.ip("route", "del", address)
            assert not accepted
            site.guest.connect(HOST, port).close()
            wait_until(lambda: len(accepted) == 1)
    finally:
        site.guest.ip("addr", "add", "127.0.0.1/8", "dev", "lo")


@pytest.mark.parametrize("who_first", ["guest", "host"])
def test_half_close_leaves_the_other_direction_open(site: Site, who_first: str) -> None:
    """F16, T60, T61: end of stream one way, then 100 MB the other way, then its end."""
    octets = 100 * MB
    at_host: list[str] = []

    def handle(connection: socket.socket) -> None:
        if who_first == "guest":
            assert read_all(connection) == b"all I have to say"
            connection.sendall(content(octets))
        else:
            connection.sendall(b"all I have to say")
            connection.shutdown(socket.SHUT_WR)
            at_host.append(_sum(connection))

    with serve(site.host.listen(), handle) as (_, port), site.guest.connect(HOST, port, limit_s=60) as sock:
        if who_first == "guest":
            sock.sendall(b"all I have to say")
            sock.shutdown(socket.SHUT_WR)
            assert _sum(sock) == digest(octets)
        else:
            assert read_all(sock) == b"all I have to say"
            sock.sendall(content(octets))
            sock.shutdown(socket.SHUT_WR)
            wait_until(lambda: bool(at_host))
            assert at_host == [digest(octets)]


def _sum(sock: socket.socket) -> str:
    total = hashlib.sha256()
    while octets := sock.recv(MB):
        total.update(octets)
    return total.hexdigest()


def test_both_directions_at_once(site: Site) -> None:
    """20 MB of each, sent while the other arrives."""
    octets = 20 * MB
    with serve(site.host.listen(), echo) as (_, port), site.guest.connect(HOST, port, limit_s=60) as sock:
        sender = threading.Thread(target=lambda: (sock.sendall(content(octets)), sock.shutdown(socket.SHUT_WR)))
        sender.start()
        assert _sum(sock) == digest(octets)
        sender.join()


def test_a_reset_of_the_guest_is_a_reset_at_the_host(site: Site) -> None:
    """T65: not an end of stream, which a server would take for all there is."""
    seen: list[int | str] = []

    def handle(connection: socket.socket) -> None:
        connection.sendall(b"hello")
        try:
            while connection.recv(MB):
                pass
            seen.append("end of stream")
        except OSError as error:
            seen.append(error.errno or 0)

    with serve(site.host.listen(), handle) as (_, port):
        sock = site.guest.connect(HOST, port)
        assert exactly(sock, 5) == b"hello"
        sock.sendall(b"half of what I wan")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        sock.close()
        wait_until(lambda: bool(seen))
    assert seen == [errno.ECONNRESET]


@pytest.mark.parametrize("after_data", [False, True])
def test_a_reset_of_the_host_is_a_reset_at_the_guest(site: Site, after_data: bool) -> None:
    """T64, F15: also with much on the way; what had arrived is right."""

    def handle(connection: socket.socket) -> None:
        exactly(connection, 2)
        if after_data:
            with contextlib.suppress(TimeoutError):
                connection.settimeout(0.3)
                connection.sendall(content(20 * MB))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)

    with serve(site.host.listen(), handle) as (_, port), site.guest.connect(HOST, port) as sock:
        sock.sendall(b"go")
        received = b""
        if after_data:
            received = exactly(sock, 1 * MB)
            time.sleep(0.5)  # the host gives up on us meanwhile
        with pytest.raises(ConnectionResetError):
            while octets := sock.recv(MB):
                received += octets
        assert content(20 * MB).startswith(received)


def test_a_server_that_is_killed_resets_its_guests(site: Site) -> None:
    """The kernel of the host resets what a dead process had open and not read: so does ours."""
    server = site.host.start("socat", "-u", "OPEN:/dev/zero", "TCP-LISTEN:7070,bind=127.0.0.1,reuseaddr")
    wait_until(lambda: "7070" in site.host.run("ss", "-ltn").stdout)
    with site.guest.connect(HOST, 7070) as sock:
        sock.sendall(bytes(100))
        exactly(sock, 10 * MB)
        server.kill()
        server.wait()
        with pytest.raises(ConnectionResetError):
            while sock.recv(MB):
                pass


async def test_two_thousand_flows_at_once(site: Site) -> None:
    """Each echoes its own octets while all others are open; and the daemon has closed them all afterwards."""
    count, octets = 2000, 4096
    before = site.daemon.descriptors()
    listener = site.host.listen(backlog=4096)
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    gate = asyncio.Event()
    opened = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(handle, sock=listener)
    port = listener.getsockname()[1]
    turns = asyncio.Semaphore(
        200
    )  # connects on their way; the guest's own limit is its backlog of neighbours and timers

    async def one(number: int) -> bool:
        nonlocal opened
        sock = site.guest.socket()
        sock.setblocking(False)
        async with turns:
            await loop.sock_connect(sock, (HOST, port))
        reader, writer = await asyncio.open_connection(sock=sock)
        opened += 1
        if opened == count:
            gate.set()
        await gate.wait()
        mine = content(octets + count)[number : number + octets]
        writer.write(mine)
        back = await reader.readexactly(octets)
        writer.close()
        await writer.wait_closed()
        return back == mine

    async with asyncio.timeout(60):
        assert all(await asyncio.gather(*(one(number) for number in range(count))))
    server.close()
    await asyncio.to_thread(site.daemon.wait_descriptors, before)


def test_a_guest_that_does_not_read_stops_its_own_flow_only(site: Site) -> None:
    """G19, N4: the host's sender is held back; another flow goes on; then everything arrives."""
    octets = 40 * MB
    sent = threading.Event()

    def handle(connection: socket.socket) -> None:
        connection.sendall(content(octets))
        sent.set()

    with serve(site.host.listen(), handle) as (_, port), site.guest.connect(HOST, port, limit_s=60) as sock:
        before = site.daemon.rss_mib()
        assert not sent.wait(1.0), "40 MB went into buffers"
        with serve(site.host.listen(), echo) as (_, other), site.guest.connect(HOST, other) as lively:
            lively.sendall(content(100))
            assert exactly(lively, 100) == content(100)
        assert site.daemon.rss_mib() - before < 20
        assert _sum(sock) == digest(octets)


def test_a_host_that_does_not_read_stops_its_own_flow_only(site: Site) -> None:
    octets = 40 * MB
    read = threading.Event()
    sums: list[str] = []

    def handle(connection: socket.socket) -> None:
        read.wait(30)
        sums.append(_sum(connection))

    with serve(site.host.listen(), handle) as (_, port), site.guest.connect(HOST, port, limit_s=60) as sock:
        sock.settimeout(1.0)
        view = memoryview(content(octets))
        with contextlib.suppress(TimeoutError):
            while view:
                view = view[sock.send(view) :]
        assert view, "40 MB went into buffers"
        site.guest.run("ping", "-c", "1", "-W", "2", HOST)
        read.set()
        sock.settimeout(60)
        sock.sendall(view)
        sock.shutdown(socket.SHUT_WR)
        wait_until(lambda: bool(sums))
    assert sums == [digest(octets)]
