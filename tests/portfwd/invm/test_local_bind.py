"""What `expose-port` binds in the VM itself, as programs in the VM see it; the ports are loopback's."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from portfwd.invm.limits import Budget
from portfwd.invm.local_bind import LocalBind, bind
from portfwd.invm.ports import Port
from tests.portfwd.invm.played import LIMIT_S, PlayedHost, Tool

Start = Callable[..., Tool]


def flags(proto: str, host_port: int, container_port: int, host_ip: str = "127.0.0.1") -> list[str]:
    return [
        *("-proto", proto, "-host-ip", host_ip, "-host-port", str(host_port)),
        *("-container-ip", "127.0.0.1", "-container-port", str(container_port)),
    ]


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def container() -> Iterator[int]:
    """A server that answers what it was sent, whole, once the client has ended its half."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                octets = b""
                while more := client.recv(65536):
                    octets += more
                client.sendall(b"got " + octets)

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def ask(port: int, octets: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
        client.sendall(octets)
        client.shutdown(socket.SHUT_WR)
        answer = b""
        while more := client.recv(65536):
            answer += more
    return answer


@pytest.mark.parametrize("mode", [["-local-bind", "always"], ["-local-bind", "best-effort"], []])
def test_programs_in_the_vm_find_the_port_where_the_host_has_it(
    start: Start, host: PlayedHost, mode: list[str]
) -> None:
    port = free_port()
    with container() as inner:
        tool = start("expose_port", *flags("tcp", port, inner), "-control", host.path, *mode, parent=True)
        assert tool.heard() == b"0\n"
        big = bytes(range(256)) * 4096
        assert ask(port, big) == b"got " + big
        assert ask(port, b"") == b"got "
        assert tool.end()[0] == 0
    with pytest.raises(ConnectionRefusedError):
        ask(port, b"")


def test_a_container_that_refuses_ends_that_connection_alone(start: Start, host: PlayedHost) -> None:
    port = free_port()
    tool = start("expose_port", *flags("tcp", port, free_port()), "-control", host.path, parent=True)
    assert tool.heard() == b"0\n"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
            try:
                assert client.recv(10) == b""
            except ConnectionResetError:
                pass
    assert tool.end()[0] == 0


def test_udp_is_bound_as_udp(start: Start, host: PlayedHost) -> None:
    port = free_port(socket.SOCK_DGRAM)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(LIMIT_S)
        inner = server.getsockname()[1]
        arguments = [*flags("udp", port, inner), "-control", host.path, "-local-bind", "always"]
        tool = start("expose_port", *arguments, parent=True)
        assert tool.heard() == b"0\n"
        with pytest.raises(ConnectionRefusedError):  # nothing listens at TCP's port of the same number
            socket.create_connection(("127.0.0.1", port), timeout=LIMIT_S).close()
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        for number, client in enumerate(clients):
            client.settimeout(LIMIT_S)
            client.connect(("127.0.0.1", port))
            client.send(b"from %d" % number)
        for _ in clients:
            octets, peer = server.recvfrom(100)
            server.sendto(b"to " + octets, peer)
        for number, client in enumerate(clients):
            assert client.recv(100) == b"to from %d" % number
            client.close()
        assert tool.end()[0] == 0


def test_always_fails_where_best_effort_does_not(start: Start, host: PlayedHost) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        tool = start("expose_port", *flags("tcp", port, 1), "-control", host.path, "-local-bind=always", parent=True)
        assert tool.heard().decode() == f"1\nlisten tcp 127.0.0.1:{port}: bind: address already in use"
        assert tool.result()[0] == 1
        assert host.requests == []
        tool = start("expose_port", *flags("tcp", port, 1), "-control", host.path, parent=True)
        assert tool.heard() == b"0\n"
        assert tool.end()[0] == 0


def test_an_address_that_only_the_host_has_is_no_failure(start: Start, host: PlayedHost) -> None:
    elsewhere = flags("tcp", 8080, 1, host_ip="192.0.2.1")
    tool = start("expose_port", *elsewhere, "-control", host.path, "-local-bind=always", parent=True)
    assert tool.heard() == b"0\n"
    assert tool.end()[0] == 0


def test_never_binds_nothing(start: Start, host: PlayedHost) -> None:
    port = free_port()
    tool = start("expose_port", *flags("tcp", port, 1), "-control", host.path, "-local-bind=never", parent=True)
    assert tool.heard() == b"0\n"
    with pytest.raises(ConnectionRefusedError):
        ask(port, b"")
    assert tool.end()[0] == 0


def test_a_newer_dockerds_own_socket_is_served(start: Start, host: PlayedHost, tmp_path: Path) -> None:
    with socket.socket() as lent, container() as inner:
        lent.bind(("127.0.0.1", 0))  # bound, not listening
        port = lent.getsockname()[1]
        arguments = [*flags("tcp", port, inner), "-control", host.path, "-use-listen-fd"]
        tool = start("expose_port", *arguments, parent=True, listening=lent)
        assert tool.heard() == b"0\n"
        assert ask(port, b"x") == b"got x"
        assert tool.end()[0] == 0
        tool = start("expose_port", *arguments, parent=True)
        assert b"-use-listen-fd: descriptor 4 is no" in tool.heard()
        tool.result()


@pytest.mark.parametrize("out_ip", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_would_lead_to_itself_is_not_bound(out_ip: str) -> None:
    port = free_port()
    assert bind(Port(proto="tcp", out_ip=out_ip, out_port=port, in_ip="127.0.0.1", in_port=port), "always") is None


async def test_connections_beyond_the_bound_wait_and_are_served(host: PlayedHost) -> None:
    port = free_port()
    with container() as inner:
        wanted = Port(proto="tcp", out_ip="127.0.0.1", out_port=port, in_ip="127.0.0.1", in_port=inner)
        sock = bind(wanted, "always")
        assert sock is not None
        budget = Budget(2)
        serving = LocalBind(sock, wanted, budget=budget)
        answers = await asyncio.wait_for(
            asyncio.gather(*(asyncio.to_thread(ask, port, b"%d" % number) for number in range(8))), LIMIT_S
        )
        assert answers == [b"got %d" % number for number in range(8)]
        await serving.close()
        assert budget.held == 0
