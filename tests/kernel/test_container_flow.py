"""A container's port, end to end, with the programs that run in a VM: expose-port, the forwarder, and the host's multiplexer.

client on the host -> port of the daemon -> multiplexer -> unix socket -> forwarder in the guest -> 172.17.0.2, which only
                                                                                                     the guest reaches
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest

from tests.support.netns import ROOT, Daemon, Namespace, World, wait_until
from tests.support.webhost import MB, content, digest, exactly, read_all, serve, web

pytestmark = pytest.mark.netns

CONTAINER = "172.17.0.2"
PYTHON = [sys.executable, "-m", "pyvpnkit"]


@dataclass
class Machine:
    """A guest with a container in it."""

    world: World
    guest: Namespace
    daemon: Daemon
    generation: int

    @property
    def host(self) -> Namespace:
        return self.world.host

    def start(self, *words: str, pass_fds: Sequence[int] = ()) -> subprocess.Popen[str]:
        """A program of ours in the guest."""
        return self.guest.start(*PYTHON, *words, cwd=ROOT, pass_fds=pass_fds)

    def control(self, how: str) -> str:
        port = self.world.socket_path("port.sock")
        return f"9p:{port}" if how == "9p" else port

    def expose(self, how: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
        """`expose-port` as dockerd starts it, and what it told its parent."""
        ours, theirs = os.pipe()
        # dockerd's contract: the pipe is descriptor 3.
        words = [*PYTHON, "expose-port", "-control", self.control(how), *flags]
        script = f'exec 3>&{theirs} {theirs}>&-; exec "$@"'
        child = self.guest.start("bash", "-c", script, "bash", *words, cwd=ROOT, pass_fds=(theirs,))
        os.close(theirs)
        said = b""
        with os.fdopen(ours, "rb", buffering=0) as reader:
            while select.select([reader], [], [], 30)[0] and (octets := reader.read(4096)):
                said += octets
        return child, said.decode()

    def published(self, port: int) -> bool:
        try:
            self.host.connect("127.0.0.1", port).close()
        except ConnectionRefusedError:
            return False
        except ConnectionResetError:
            pass  # accepted, and reset by whoever is behind it
        return True


@pytest.fixture(scope="module", params=[1, 2, 3], ids=["generation 1", "generation 2", "generation 3"])
def machine(request: pytest.FixtureRequest, shared: World) -> Iterator[Machine]:
    number = request.param
    guest = shared.namespace()
    data = shared.socket_path(f"data{number}.sock")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(shared.socket_path("port.sock"))
    daemon = shared.daemon(
        "--link",
        f"tap:netns={guest.name}",
        "--port",
        shared.socket_path("port.sock"),
        "--forwarder",
        f"unix:{data},generation={number}",
    )
    guest.udhcpc()
    guest.ip("addr", "add", f"{CONTAINER}/32", "dev", "lo")
    made = Machine(shared, guest, daemon, number)
    forwarder = made.start("forwarder", "-data-listen", data)
    wait_until(lambda: os.path.exists(data), why=lambda: "the forwarder does not listen")
    yield made
    forwarder.send_signal(signal.SIGTERM)
    assert forwarder.wait(20) == 0, forwarder.communicate()[0]
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


TCP = ("-proto", "tcp", "-host-ip", "127.0.0.1", "-container-ip", CONTAINER)


# Over HTTP nobody tells of a process that was killed (spec vpnkit 7.2).
@pytest.mark.parametrize(("how", "ending"), [("9p", signal.SIGTERM), ("9p", signal.SIGKILL), ("http", signal.SIGTERM)])
def test_a_port_lives_as_long_as_the_process_that_asked_for_it(machine: Machine, how: str, ending: int) -> None:
    child, said = machine.expose(how, *TCP, "-host-port", "8080", "-container-port", "80")
    assert said == "0\n"
    with web(machine.guest, CONTAINER, 80):
        done = machine.host.run("sh", "-c", f"curl -sS http://127.0.0.1:8080/{10 * MB} | sha256sum")
        assert done.stdout.split()[0] == digest(10 * MB)
    child.send_signal(ending)
    child.wait(20)
    wait_until(lambda: not machine.published(8080), why=machine.daemon.said)


def test_half_close_both_ways(machine: Machine) -> None:
    child, said = machine.expose("9p", *TCP, "-host-port", "8081", "-container-port", "81")
    assert said == "0\n"

    def handle(connection: socket.socket) -> None:
        octets = read_all(connection)
        connection.sendall(octets[::-1])

    with (
        serve(machine.guest.listen(CONTAINER, 81), handle),
        machine.host.connect("127.0.0.1", 8081) as sock,
    ):
        sock.sendall(content(2 * MB))
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == content(2 * MB)[::-1]
    child.terminate()
    child.wait(20)


def test_a_container_that_refuses_resets_the_client(machine: Machine) -> None:
    child, said = machine.expose("9p", *TCP, "-host-port", "8082", "-container-port", "9")
    assert said == "0\n"
    for _ in range(3):
        with contextlib.suppress(ConnectionResetError), machine.host.connect("127.0.0.1", 8082) as sock:
            assert sock.recv(100) == b""
    assert machine.published(8082), "the port is not harmed"
    child.terminate()
    child.wait(20)


def test_datagrams_of_any_size(machine: Machine) -> None:
    """The sizes of VPNKit's own test, and the largest there is."""
    port = 5300 + machine.generation
    flags = ["-proto", "udp", "-host-ip", "127.0.0.1", "-host-port", str(port)]
    child, said = machine.expose("9p", *flags, "-container-ip", CONTAINER, "-container-port", "53")
    assert said == "0\n"
    with machine.guest.datagrams(CONTAINER, 53) as server, machine.host.socket(socket.SOCK_DGRAM) as client:
        for octets in (1, 4, 511, 1023, 2034, 2035, 4095, 8191, 9215, 9216, 65507):
            client.sendto(content(octets), ("127.0.0.1", port))
            payload, sender = server.recvfrom(65536)
            server.sendto(payload, sender)
            assert client.recvfrom(65536) == (content(octets), ("127.0.0.1", port))
    child.terminate()
    child.wait(20)


def test_a_taken_port_is_told_in_dockerds_words(machine: Machine) -> None:
    with machine.host.listen("127.0.0.1", 8083):
        for how in ("9p", "http"):
            child, said = machine.expose(how, *TCP, "-host-port", "8083", "-container-port", "80")
            assert child.wait(20) == 1
            assert said.startswith("1\n"), said
            assert "already" in said, said


def test_many_clients_at_once_and_none_is_left(machine: Machine) -> None:
    child, said = machine.expose("9p", *TCP, "-host-port", "8084", "-container-port", "84")
    assert said == "0\n"
    before = machine.daemon.descriptors()
    with serve(machine.guest.listen(CONTAINER, 84, backlog=1024), lambda sock: sock.sendall(exactly(sock, 1000))):
        socks = [machine.host.connect("127.0.0.1", 8084) for _ in range(200)]
        for sock in socks:
            sock.sendall(content(1000))
        for sock in socks:
            assert exactly(sock, 1000) == content(1000)
            sock.close()
        machine.daemon.wait_descriptors(before + 1)
    child.terminate()
    child.wait(20)


def test_a_unix_socket_in_the_guest(machine: Machine) -> None:
    """Paths at both ends, as for docker.sock."""
    host_path = machine.world.socket_path(f"docker{machine.generation}.sock")
    guest_path = machine.world.socket_path(f"inner{machine.generation}.sock")
    inner = socket.socket(socket.AF_UNIX)
    inner.bind(guest_path)
    inner.listen()
    flags = ["-proto", "unix", "-host-path", host_path, "-container-path", guest_path]
    child, said = machine.expose("9p", *flags)
    assert said == "0\n"
    with serve(inner, lambda sock: sock.sendall(read_all(sock))), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(host_path)
        client.sendall(content(MB))
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == content(MB)
    child.send_signal(signal.SIGKILL)
    child.wait(20)
    wait_until(lambda: not os.path.exists(host_path))
