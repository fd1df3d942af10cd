"""Guests' flows that are led elsewhere, with a kernel guest, curl, and a daemon that is told by options and files."""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.netns import GATEWAY, HOST, Daemon, Namespace, World, wait_until
from tests.support.webhost import MB, content, digest, exactly, read_all, serve, web

pytestmark = pytest.mark.netns

ELSEWHERE = "203.0.113.9"
"""Nobody has it (RFC 5737): who is reached there is reached through a tunnel."""
CLOSED = 19
OCTETS = 5 * MB
YES = {"accepted": True}


@dataclass(frozen=True)
class Led:
    """A guest, and a daemon that leads its flows elsewhere."""

    guest: Namespace
    host: Namespace
    daemon: Daemon
    directory: Path
    port: int
    """Of the web server on the host's loopback; the gateway has it at 8888."""

    def write(self, name: str, document: object) -> None:
        """As a VPN client does: a new file, renamed over the old."""
        new = self.directory / f"{name}.new"
        new.write_text(document if isinstance(document, str) else json.dumps(document))
        os.replace(new, self.directory / name)

    def forward(self, *entries: tuple[str, int, str, int]) -> None:
        """The whole of the gateway forwards' file."""
        names = ("protocol", "external_port", "internal_ip", "internal_port")
        self.write("gateway.json", [dict(zip(names, entry, strict=True)) for entry in entries])

    def curl(self, url: str) -> int:
        """Its exit status: 0 is an answer, 7 a refusal."""
        return self.guest.run("curl", "-sS", "-o", "/dev/null", "--max-time", "15", url, check=False).returncode


@pytest.fixture(scope="module")
def led(shared: World) -> Iterator[Led]:
    guest = shared.namespace()
    directory = shared.directory / "led"
    directory.mkdir()
    with web(shared.host) as port, shared.host.datagrams() as echo:
        threading.Thread(target=_echo_datagrams, args=(echo,), daemon=True).start()
        daemon = shared.daemon(
            "--link",
            f"tap:netns={guest.name}",
            *("--tcpv4-forwards", f"8888:127.0.0.1:{port},8889:127.0.0.1:{CLOSED},8888:127.0.0.1:{CLOSED}"),
            *("--udpv4-forwards", f"8125:127.0.0.1:{echo.getsockname()[1]}"),
            *("--gateway-forwards", str(directory / "gateway.json")),
            *("--forwards", str(directory / "tunnels.json")),
        )
        guest.udhcpc()
        yield Led(guest, shared.host, daemon, directory, port)
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.said(), daemon.said()
        with shared.host.socket(socket.SOCK_DGRAM) as last:
            last.sendto(b"", echo.getsockname())


def _echo_datagrams(sock: socket.socket) -> None:
    """Until an empty one."""
    sock.settimeout(None)
    while True:
        payload, sender = sock.recvfrom(65536)
        if not payload:
            return
        sock.sendto(payload, sender)


# Gateway forwards


def test_curl_reaches_a_server_on_the_hosts_loopback_through_the_gateway(led: Led, fetch: Callable[..., None]) -> None:
    """VPNKit's own test of --tcpv4-forwards."""
    fetch(led.guest, 8888, OCTETS, GATEWAY)


def test_a_server_that_is_not_there_is_a_refusal(led: Led) -> None:
    assert led.curl(f"http://{GATEWAY}:8889/1") == 7
    assert led.curl(f"http://{GATEWAY}:8890/1") == 7


def test_datagrams_of_any_size_are_echoed_from_the_port_that_was_addressed(led: Led) -> None:
    with led.guest.socket(socket.SOCK_DGRAM) as client:
        client.connect((GATEWAY, 8125))  # so that the kernel takes answers from there only
        for octets in (1, 511, 1472, 1473, 9216, 65507):
            client.send(content(65507)[:octets])
            assert client.recv(65536) == content(65507)[:octets]


def test_a_file_that_comes_later_changes_and_goes_is_followed(led: Led) -> None:
    url = f"http://{GATEWAY}:9000/100"
    path = led.directory / "gateway.json"
    assert not path.exists() and led.curl(url) == 7
    led.forward(("tcp", 9000, "127.0.0.1", led.port))
    wait_until(lambda: led.curl(url) == 0)
    led.write("gateway.json", '[{"protocol": "tcp", "external_port": 70000}]')
    led.daemon.wait_said("external_port 70000: a number from 1 to 65535")
    assert led.curl(url) == 0, "what held before holds on"
    led.forward(("tcp", 9001, "127.0.0.1", led.port))
    wait_until(lambda: led.curl(url) == 7)
    assert led.curl(f"http://{GATEWAY}:9001/100") == 0
    path.unlink()
    wait_until(lambda: led.curl(f"http://{GATEWAY}:9001/100") == 7)
    assert led.curl(f"http://{GATEWAY}:8888/100") == 0, "options do not go with the file"


def test_connections_live_on_when_their_forward_goes(led: Led) -> None:
    def echo(connection: socket.socket) -> None:
        while octets := connection.recv(MB):
            connection.sendall(octets)

    with serve(led.host.listen(), echo) as (_address, port):
        led.forward(("tcp", 9002, "127.0.0.1", port))
        wait_until(lambda: _connects(led.guest, GATEWAY, 9002))
        with led.guest.connect(GATEWAY, 9002) as sock:
            led.forward()
            wait_until(lambda: not _connects(led.guest, GATEWAY, 9002))
            sock.sendall(content(100_000))
            assert exactly(sock, 100_000) == content(100_000)


def _connects(guest: Namespace, address: str, port: int) -> bool:
    try:
        guest.connect(address, port).close()
    except ConnectionRefusedError:
        return False
    return True


def test_the_gateways_own_port_53_can_be_taken_over_and_comes_back(led: Led) -> None:
    def asks() -> bytes:
        """A question that our DNS answers with FORMERR or not at all, and the server of the test with its own words."""
        with led.guest.socket(socket.SOCK_DGRAM) as client:
            client.settimeout(1)
            client.sendto(b"question", (GATEWAY, 53))
            with contextlib.suppress(TimeoutError):
                return client.recv(100)
        return b""

    def answer(sock: socket.socket) -> None:
        while True:
            payload, sender = sock.recvfrom(100)
            if not payload:
                return
            sock.sendto(b"led elsewhere", sender)

    dig = ("dig", "+short", "+tries=1", "+time=5", f"@{GATEWAY}", "host.internal")
    assert led.guest.run(*dig).stdout.split() == [HOST]
    with led.host.datagrams() as server, serve(led.host.listen(), lambda sock: sock.sendall(b"by tcp")) as (_, port):
        server.settimeout(None)
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        led.forward(("udp", 53, "127.0.0.1", server.getsockname()[1]), ("tcp", 53, "127.0.0.1", port))
        wait_until(lambda: asks() == b"led elsewhere")
        with led.guest.connect(GATEWAY, 53) as sock:
            assert read_all(sock) == b"by tcp"
        led.forward()
        wait_until(lambda: led.guest.run(*dig, check=False).stdout.split() == [HOST])
        assert led.guest.run(*dig, "+tcp").stdout.split() == [HOST]
        with led.host.socket(socket.SOCK_DGRAM) as last:
            last.sendto(b"", server.getsockname())
        thread.join(10)


# Tunnels


def question(connection: socket.socket) -> dict[str, Any]:
    found = json.loads(exactly(connection, int.from_bytes(exactly(connection, 2), "little")))
    assert isinstance(found, dict)
    return found


def document(value: object) -> bytes:
    octets = value if isinstance(value, bytes) else json.dumps(value).encode()
    return len(octets).to_bytes(2, "little") + octets


def listener(path: Path, backlog: int = 128) -> socket.socket:
    path.unlink(missing_ok=True)
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(backlog)
    return made


@pytest.fixture
def tunnel(led: Led) -> Iterator[Callable[..., Any]]:
    """`tunnel(port, handle)()`: connections of the guest to `ELSEWHERE` there are accepted, and handled by a thread each."""
    with contextlib.ExitStack() as stack:
        rules: list[dict[str, object]] = []

        def make(port: int, handle: Callable[[socket.socket], None], backlog: int = 128) -> Callable[[], object]:
            path = led.directory / f"t{port}"
            made = listener(path, backlog)
            stack.callback(made.close)
            rules.append({"protocol": "tcp", "dst_prefix": f"{ELSEWHERE}/24", "dst_port": port, "path": str(path)})
            led.write("tunnels.json", rules)
            wait_until(lambda: f"tunnels: {len(rules)} in" in led.daemon.said()[before:])
            return lambda: stack.enter_context(serve(made, handle))

        before = len(led.daemon.said())
        yield make
        led.write("tunnels.json", [])
        wait_until(lambda: "tunnels: 0 in" in led.daemon.said()[before:])


def test_curl_through_a_tunnel(led: Led, tunnel: Callable[..., Any], fetch: Callable[..., None]) -> None:
    """VPNKit's own test of --forwards: the program of the tunnel connects where it was asked to, or here, elsewhere."""
    asked = []

    def handle(connection: socket.socket) -> None:
        asked.append(question(connection))
        with led.host.connect("127.0.0.1", led.port) as server:
            connection.sendall(document(YES))
            _join(connection, server)

    tunnel(80, handle)()
    before = led.daemon.descriptors()
    fetch(led.guest, 80, OCTETS, ELSEWHERE)
    assert len(asked) == 2
    assert asked[0] == {"protocol": "tcp", "src_ip": "0.0.0.0", "src_port": 0, "dst_ip": ELSEWHERE, "dst_port": 80}
    led.daemon.wait_descriptors(before)


def _join(a: socket.socket, b: socket.socket) -> None:
    def copy(source: socket.socket, into: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while octets := source.recv(MB):
                into.sendall(octets)
            into.shutdown(socket.SHUT_WR)

    other = threading.Thread(target=copy, args=(b, a), daemon=True)
    other.start()
    copy(a, b)
    other.join(60)


@pytest.mark.parametrize("first", ["guest", "program"])
def test_octets_and_half_close_both_ways(led: Led, tunnel: Callable[..., Any], first: str) -> None:
    sums = []

    def handle(connection: socket.socket) -> None:
        question(connection)
        if first == "program":
            connection.sendall(document(YES) + content(OCTETS))  # with the answer in one piece
            connection.shutdown(socket.SHUT_WR)
        else:
            connection.sendall(document(YES))
        sums.append(hashlib.sha256(read_all(connection)).hexdigest())
        if first == "guest":
            connection.sendall(content(OCTETS))

    tunnel(7000, handle)()
    with led.guest.connect(ELSEWHERE, 7000, limit_s=60) as sock:
        if first == "program":
            assert hashlib.sha256(read_all(sock)).hexdigest() == digest(OCTETS)
        sock.sendall(content(OCTETS))
        sock.shutdown(socket.SHUT_WR)
        if first == "guest":
            assert hashlib.sha256(read_all(sock)).hexdigest() == digest(OCTETS)
        wait_until(lambda: bool(sums))
    assert sums == [digest(OCTETS)]


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(document({"accepted": False}), id="no"),
        pytest.param(b"", id="the end"),
        pytest.param(document(YES)[:-1], id="half an answer"),
        pytest.param(document(b"\0garbage"), id="garbage"),
        pytest.param(b"HTTP/1.1 400 Bad Request\r\n\r\n", id="another protocol"),
    ],
)
def test_a_program_that_does_not_accept_is_a_refusal(led: Led, tunnel: Callable[..., Any], answer: bytes) -> None:
    def handle(connection: socket.socket) -> None:
        question(connection)
        connection.sendall(answer)

    tunnel(7001, handle)()
    before = led.daemon.descriptors()
    for _ in range(3):
        assert led.curl(f"http://{ELSEWHERE}:7001/") == 7
    led.daemon.wait_descriptors(before)


def test_a_program_that_is_not_there_is_a_refusal(led: Led, tunnel: Callable[..., Any]) -> None:
    tunnel(7002, lambda connection: None)
    (led.directory / "t7002").unlink()
    assert led.curl(f"http://{ELSEWHERE}:7002/") == 7


def test_guests_wait_for_a_slow_program_and_for_its_full_queue(led: Led, tunnel: Callable[..., Any]) -> None:
    """None is accepted before all have knocked, far more than the program's queue holds."""
    count = 200

    def handle(connection: socket.socket) -> None:
        question(connection)
        connection.sendall(document(YES) + b"welcome")
        connection.sendall(read_all(connection))

    accept = tunnel(7003, handle, backlog=1)
    before = led.daemon.descriptors()

    def one(number: int) -> bytes:
        with led.guest.connect(ELSEWHERE, 7003, limit_s=60) as sock:
            sock.sendall(b"%d" % number)
            sock.shutdown(socket.SHUT_WR)
            return read_all(sock)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        answers = [pool.submit(one, number) for number in range(count)]
        wait_until(lambda: led.daemon.descriptors() >= before + count)
        accept()
        assert [answer.result(60) for answer in answers] == [b"welcome%d" % number for number in range(count)]
    led.daemon.wait_descriptors(before)
