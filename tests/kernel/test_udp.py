"""UDP between a kernel guest and the host's programs: sizes, senders, refusals."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.kernel.conftest import Site
from tests.support.netns import HOST
from tests.support.webhost import content

pytestmark = pytest.mark.netns

IP_RECVERR = 11
SIZES = (0, 1, 2, 511, 512, 1471, 1472, 1473, 2952, 2953, 8192, 32768, 65506, 65507)


@contextlib.contextmanager
def _echo(server: socket.socket) -> Iterator[int]:
    """Sends back what comes; the port."""
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            if select.select([server], [], [], 0.05)[0]:
                payload, sender = server.recvfrom(65536)
                server.sendto(payload, sender)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield server.getsockname()[1]
    finally:
        stop.set()
        thread.join()
        server.close()


def test_datagrams_of_any_size_come_back_unchanged(site: Site) -> None:
    """U01: boundaries kept, none and 65,507 octets too, in fragments both ways."""
    with _echo(site.host.datagrams()) as port, site.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, port))
        for octets in SIZES:
            sock.send(content(65507)[:octets])
            assert sock.recv(65536) == content(65507)[:octets]
        with pytest.raises(OSError):
            sock.send(bytes(65508))


def test_bursts_of_datagrams_keep_their_boundaries(site: Site) -> None:
    """Many sizes at once; each comes back once, none joined or cut."""
    with _echo(site.host.datagrams()) as port, site.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, port))
        sent = [content(65507)[n : n + 37 * n % 1473] for n in range(100)]
        for payload in sent:
            sock.send(payload)
        received = [sock.recv(65536) for _ in sent]
        assert sorted(received) == sorted(sent)


def test_one_source_port_speaks_with_many(site: Site) -> None:
    """U04: replies come from whom they were asked of, to the port that asked."""
    with contextlib.ExitStack() as stack:
        ports = [stack.enter_context(_echo(site.host.datagrams())) for _ in range(5)]
        sock = stack.enter_context(site.guest.socket(socket.SOCK_DGRAM))
        for port in ports:
            sock.sendto(str(port).encode(), (HOST, port))
        received = [sock.recvfrom(100) for _ in ports]
        assert sorted(int(payload) for payload, _ in received) == sorted(ports)
        assert all(sender == (HOST, int(payload)) for payload, sender in received)


def test_a_mapping_may_be_used_by_anybody_on_the_host(site: Site) -> None:
    """U04: endpoint-independent: who learns the mapped port can answer from another socket."""
    with site.host.datagrams() as first, site.host.datagrams() as second, site.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.sendto(b"hello", (HOST, first.getsockname()[1]))
        _, mapped = first.recvfrom(100)
        second.sendto(b"from another", mapped)
        payload, sender = sock.recvfrom(100)
        assert payload == b"from another"
        assert sender == (HOST, second.getsockname()[1])


def test_a_port_nobody_has_is_refused(site: Site) -> None:
    """U07: as on the host itself, the next call tells."""
    with site.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, 9))
        sock.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)


@pytest.mark.parametrize(
    ("address", "code"),
    [
        ("203.0.113.1", errno.ENETUNREACH),
        ("192.168.65.1", errno.ECONNREFUSED),
        ("169.254.169.254", errno.EHOSTUNREACH),
    ],
)
def test_what_cannot_be_reached_says_why(site: Site, address: str, code: int) -> None:
    """U07, G26."""
    with site.guest.socket(socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)  # else Linux keeps "network unreachable" to itself
        sock.connect((address, 99))
        sock.send(b"anybody there?")
        with pytest.raises(OSError) as caught:
            sock.recv(100)
        assert caught.value.errno == code, caught.value


def test_a_thousand_mappings_and_then_some(site: Site) -> None:
    """U05, G21: the last ones work although the table is full; descriptors stay within it."""
    before = site.daemon.descriptors()
    with _echo(site.host.datagrams()) as port, contextlib.ExitStack() as stack:
        for n in range(1100):
            sock = stack.enter_context(site.guest.socket(socket.SOCK_DGRAM))
            sock.sendto(str(n).encode(), (HOST, port))
            assert sock.recv(100) == str(n).encode()
        assert site.daemon.descriptors() - before <= 1024
