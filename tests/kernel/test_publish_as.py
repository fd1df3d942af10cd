"""Published ports with options: the client's own address, PROXY protocol, Unix sockets, privileged ports that were inherited."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World
from tests.support.webhost import MB, content, digest, exactly, read_all, serve, web

pytestmark = pytest.mark.netns

ELSEWHERE = "203.0.113.9"
"""An address of the host that is not its loopback."""


@dataclass(frozen=True)
class Published:
    guest: Namespace
    host: Namespace
    daemon: Daemon
    sock: str


@pytest.fixture(scope="module")
def published(shared: World) -> Iterator[Published]:
    guest = shared.namespace()
    shared.host.ip("addr", "add", f"{ELSEWHERE}/32", "dev", "lo")
    shared.host.ip("addr", "add", "192.168.65.77/32", "dev", "lo")
    sock = shared.socket_path("made/guest.sock")
    specs = [
        "0.0.0.0:8080:80,source=client",
        "0.0.0.0:8081:80,proxy=v1,0.0.0.0:8082:80,proxy=v2",
        "udp:0.0.0.0:5300:53,source=client",
        f"unix:{sock}:80",
    ]
    options = [word for spec in specs for word in ("-p", spec)]
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", *options)
    guest.udhcpc()
    yield Published(guest, shared.host, daemon, sock)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()
    assert not Path(sock).exists()


def connect_from(host: Namespace, source: str, port: int) -> socket.socket:
    made = host.socket()
    made.bind((source, 0))
    made.connect((source, port))
    return made


@pytest.mark.parametrize(
    ("client", "seen"),
    [
        pytest.param(ELSEWHERE, ELSEWHERE, id="a client elsewhere is shown"),
        pytest.param("127.0.0.1", GATEWAY, id="the host's loopback is not (N7)"),
        pytest.param("192.168.65.77", GATEWAY, id="an address of the virtual network is not"),
    ],
)
def test_whom_a_tcp_server_in_the_guest_sees(published: Published, client: str, seen: str) -> None:
    found = []

    def handle(connection: socket.socket) -> None:
        found.append(connection.getpeername())
        connection.sendall(read_all(connection))

    with (
        serve(published.guest.listen("0.0.0.0", 80), handle),
        connect_from(published.host, client, 8080) as sock,
    ):
        mine = sock.getsockname()[1]
        sock.sendall(content(2 * MB))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == content(2 * MB)
    assert found[0][0] == seen
    assert seen == GATEWAY or found[0][1] == mine


def test_whom_a_udp_server_in_the_guest_sees(published: Published) -> None:
    with (
        published.guest.datagrams("0.0.0.0", 53) as server,
        published.host.datagrams(ELSEWHERE) as far,
        published.host.datagrams("127.0.0.1") as near,
    ):
        for client in (far, near):
            client.sendto(b"hello", (client.getsockname()[0], 5300))
            payload, sender = server.recvfrom(100)
            assert sender[0] == (ELSEWHERE if client is far else GATEWAY)
            assert client is near or sender == far.getsockname()
            server.sendto(payload + b" to you", sender)
            assert client.recvfrom(100)[0] == b"hello to you"


@pytest.mark.parametrize("port", [8081, 8082])
def test_a_server_that_expects_proxy_headers_reads_them_first(published: Published, port: int) -> None:
    heads = []

    def handle(connection: socket.socket) -> None:
        if port == 8081:
            head = b""
            while not head.endswith(b"\r\n"):
                head += exactly(connection, 1)
        else:
            head = exactly(connection, 28)
        heads.append(head)
        connection.sendall(read_all(connection))

    with serve(published.guest.listen("0.0.0.0", 80), handle), connect_from(published.host, ELSEWHERE, port) as sock:
        mine = sock.getsockname()[1]
        sock.sendall(content(MB))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == content(MB)
    if port == 8081:
        assert heads == [f"PROXY TCP4 {ELSEWHERE} {ELSEWHERE} {mine} 8081\r\n".encode()]
    else:
        ends = socket.inet_aton(ELSEWHERE) * 2 + mine.to_bytes(2, "big") + (8082).to_bytes(2, "big")
        assert heads == [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + ends]


def test_the_header_comes_though_the_client_waits_for_the_server_to_speak(published: Published) -> None:
    """As SSH and SMTP do: the server greets first."""

    def handle(connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n"):
            head += exactly(connection, 1)
        connection.sendall(b"220 " + head)

    with serve(published.guest.listen("0.0.0.0", 80), handle), connect_from(published.host, ELSEWHERE, 8081) as sock:
        assert read_all(sock).startswith(b"220 PROXY TCP4 ")


def test_curl_through_a_unix_socket(published: Published) -> None:
    with web(published.guest, "0.0.0.0", 80):
        words = f"curl -sS --unix-socket {published.sock} http://guest/{10 * MB} | sha256sum"
        assert subprocess.run(["sh", "-c", words], capture_output=True, text=True, check=True).stdout.split()[
            0
        ] == digest(10 * MB)


def test_half_close_through_a_unix_socket(published: Published) -> None:
    with (
        serve(published.guest.listen("0.0.0.0", 80), lambda sock: sock.sendall(read_all(sock))),
        socket.socket(socket.AF_UNIX) as client,
    ):
        client.settimeout(20)
        client.connect(published.sock)
        client.sendall(content(MB))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == content(MB)


def test_a_low_port_that_systemd_bound_is_published_without_privilege(fresh: World) -> None:
    guest = fresh.namespace()
    with fresh.host.listen("127.0.0.1", 80) as left:
        left.set_inheritable(True)
        # As systemd starts a service: the sockets from descriptor 3 on, and the number of the very process that runs.
        script = f'exec 3<&{left.fileno()}; export LISTEN_FDS=1 LISTEN_PID=$$; exec "$@"'
        daemon = fresh.daemon(
            "--link",
            f"tap:netns={guest.name}",
            "-p",
            "80:8000",
            pass_fds=(left.fileno(),),
            wrap=("setpriv", "--bounding-set=-net_bind_service", "bash", "-c", script, "bash"),
        )
    assert guest.udhcpc() == "192.168.65.3"
    with web(guest, "0.0.0.0", 8000):
        done = fresh.host.run("sh", "-c", f"curl -sS http://127.0.0.1/{MB} | sha256sum")
        assert done.stdout.split()[0] == digest(MB)
    assert daemon.stop() == 0


def test_a_low_port_that_nobody_bound_is_refused_with_what_to_do(fresh: World) -> None:
    wrap = ("setpriv", "--bounding-set=-net_bind_service")
    with pytest.raises(AssertionError, match="ports below 1024 are kept for root"):
        fresh.daemon("--link", f"qemu:{fresh.socket_path()}", "-p", "80:8000", wrap=wrap)
