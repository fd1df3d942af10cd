"""`-control-listen`: a port in the VM that leads to the host, by channels that the VM opens (spec vpnkit 7.9)."""

from __future__ import annotations

import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.portfwd.invm.played import LIMIT_S, Tool
from tests.portfwd.invm.played_data import Mux, connected, destination, record

Start = Callable[..., Tool]


def exposed(start: Start, control: Path, proto: str) -> tuple[Tool, int]:
    """A port of 127.0.0.1 that leads to 192.0.2.9:99 as the host sees it."""
    tool = start(
        *("expose_port", "-control", control, "-i", "-proto", proto, "-host-ip", "127.0.0.1", "-host-port", "0"),
        *("-container-ip", "192.0.2.9", "-container-port", "99"),
    )
    assert tool.process.stdout is not None
    line = tool.process.stdout.readline().decode()
    return tool, int(line.split()[3].rpartition(":")[2])


@pytest.fixture
def control(tmp_path: Path) -> Path:
    return tmp_path / "control.sock"


@pytest.mark.parametrize("generation", [2, 3])
def test_a_connection_in_the_vm_is_opened_towards_the_host(
    start: Start, tmp_path: Path, control: Path, generation: int
) -> None:
    forwarder = start("forwarder", "-data-listen", "data.sock", "-control-listen", control)
    sock = connected(tmp_path / "data.sock")
    mux = Mux(sock, generation)
    if generation == 2:  # it is known by the first frame only
        flow = mux.open(destination("udp", "127.0.0.1", 9))
        mux.pump(lambda: flow.allowed)
    assert stat.S_IMODE(control.stat().st_mode) == 0o600
    tool, port = exposed(start, control, "tcp")
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
        mux.pump(lambda: mux.opened)
        target, flow = mux.opened.pop()
        assert target == destination("tcp", "192.0.2.9", 99)
        assert flow.id == 0, "Go's side that listens counts from 0 upwards"
        client.sendall(b"to the host")
        assert flow.read(11) == b"to the host"
        flow.send(b"back")
        assert client.recv(10) == b"back"
        client.shutdown(socket.SHUT_WR)
        assert flow.read_all() == b""
        flow.send(b"after your end")
        assert client.recv(20) == b"after your end"
        flow.close()
        assert client.recv(1) == b""
    assert tool.end()[0] == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), LIMIT_S)
    assert forwarder.end()[0] == 0
    assert not control.exists()
    sock.close()


def test_datagrams_too(start: Start, tmp_path: Path, control: Path) -> None:
    start("forwarder", "-data-listen", "data.sock", "-control-listen", control)
    mux = Mux(connected(tmp_path / "data.sock"), 3)
    _tool, port = exposed(start, control, "udp")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(LIMIT_S)
        client.connect(("127.0.0.1", port))
        client.send(b"question")
        mux.pump(lambda: mux.opened)
        target, flow = mux.opened.pop()
        assert target == destination("udp", "192.0.2.9", 99)
        assert flow.read(len(record(b"question"))) == record(b"question")
        flow.send(record(b"answer"))
        assert client.recv(100) == b"answer"
    mux.sock.close()


def test_who_comes_before_the_host_is_served_when_it_came(start: Start, tmp_path: Path, control: Path) -> None:
    with socket.socket(socket.AF_UNIX) as host:
        host.settimeout(LIMIT_S)
        host.bind(str(tmp_path / "host.sock"))  # not listening: the forwarder is refused
        tool = start("forwarder", "-data-connect", "host.sock", "-control-listen", control)
        tool.stderr_until("trying every 1 s")
        _tool, port = exposed(start, control, "tcp")
        with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
            host.listen()
            sock, _ = host.accept()
            sock.settimeout(LIMIT_S)
            mux = Mux(sock, 3)
            mux.pump(lambda: mux.opened)
            _, flow = mux.opened.pop()
            assert flow.id == 0xFFFFFFFF, "Go's side that connects counts from the top downwards"
            client.sendall(b"x")
            assert flow.read(1) == b"x"
            sock.close()
            with pytest.raises(ConnectionResetError):  # lost, not ended
                client.recv(1)


def test_a_host_that_refuses_resets_that_client(start: Start, tmp_path: Path, control: Path) -> None:
    start("forwarder", "-data-listen", "data.sock", "-control-listen", control)
    mux = Mux(connected(tmp_path / "data.sock"), 3)
    _tool, port = exposed(start, control, "tcp")
    with socket.create_connection(("127.0.0.1", port), LIMIT_S) as client:
        mux.pump(lambda: mux.opened)
        _, flow = mux.opened.pop()
        flow.close()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    mux.sock.close()


def test_the_list_and_the_dump_are_those_of_the_vm(start: Start, tmp_path: Path, control: Path) -> None:
    start("forwarder", "-data-listen", "data.sock", "-control-listen", control)
    mux = Mux(connected(tmp_path / "data.sock"), 3)
    _tool, port = exposed(start, control, "tcp")
    flow = mux.open(destination("tcp", "127.0.0.1", 1))
    assert flow.refused()
    status, out, err = start("list_ports", "-control", control, "-debug").result()
    assert (status, out) == (0, f"tcp forward from 127.0.0.1:{port} to 192.0.2.9:99\n")
    assert "Open" in err
    mux.sock.close()
