"""Every kind of link carries the same guest: lease, ping, names, files both ways by sha256; and guests see each other."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.netns import Daemon, Namespace, World, wait_until
from tests.support.webhost import MB, content, digest, read_all, serve, web

pytestmark = pytest.mark.netns

Attach = Callable[[World, Namespace], None]


def _device(scheme: str, options: str = "") -> Attach:
    def attach(place: World, guest: Namespace) -> None:
        place.daemon("--link", f"{scheme}:netns={guest.name}{options}")

    return attach


def _socket(scheme: str, *relay: str) -> Attach:
    def attach(place: World, guest: Namespace) -> None:
        link = f"{scheme}:{place.socket_path()}"
        place.daemon("--link", link)
        place.relay(guest, link, *relay)

    return attach


def _inherited(place: World, guest: Namespace) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        place.daemon("--link", f"fd:{theirs.fileno()}", pass_fds=[theirs.fileno()])
        place.relay(guest, f"fd:{ours.fileno()}", pass_fds=[ours.fileno()])


LINKS: dict[str, Attach] = {
    "tap": _device("tap"),
    "tap-offload-off": _device("tap", ",offload=off"),
    "tap-jumbo": _device("tap", ",mtu=65520"),
    "packet": _device("packet"),
    "packet-offload-off": _device("packet", ",offload=off"),
    "qemu": _socket("qemu"),
    "vmnet": _socket("vmnet"),
    "unixgram": _socket("unixgram"),
    "fd": _inherited,
}


@pytest.mark.parametrize("kind", LINKS)
def test_a_guest_has_its_network(fresh: World, smoke: Callable[..., None], kind: str) -> None:
    guest = fresh.namespace()
    LINKS[kind](fresh, guest)
    with web(fresh.host) as port:
        smoke(fresh, guest, port)


def test_a_vmnet_client_has_one_mac_and_address_per_uuid(fresh: World) -> None:
    """VMN3T: the server gives the MAC; who comes back with a UUID is who was there before."""
    link = f"vmnet:{fresh.socket_path()}"
    fresh.daemon("--link", link)
    uuids = ("d1d9cd61-d0dc-4715-9bc3-4c11dad7ada5", "d1d9cd61-d0dc-4715-9bc3-4c11dad7ada6")
    seen = []
    for uuid in (uuids[0], uuids[1], uuids[0]):
        guest = fresh.namespace()
        relay = fresh.relay(guest, link, "--uuid", uuid)
        seen.append((relay.mac, guest.udhcpc()))
        relay.stop()
    assert seen[0] == ("02:50:00:00:00:01", "192.168.65.3")
    assert seen[1] == ("02:50:00:00:00:02", "192.168.65.4")
    assert seen[2] == seen[0]


@pytest.mark.parametrize("qemu_mtu", [1500, 9000])
def test_guests_on_an_offload_link_and_a_stream_link_reach_each_other(fresh: World, qemu_mtu: int) -> None:
    """Super-frames of one guest's TAP are cut to what the other's link carries; sums are filled in on the way."""
    offload, plain = fresh.namespace("tap"), fresh.namespace("qemu")
    qemu = f"qemu:{fresh.socket_path()}"
    fresh.daemon("--link", f"tap:netns={offload.name}", "--link", f"{qemu},mtu={qemu_mtu}")
    fresh.relay(plain, qemu, "--mtu", str(qemu_mtu))
    offload.udhcpc()
    plain.udhcpc()
    octets = 20 * MB
    for server, client in ((offload, plain), (plain, offload)):
        client.run("ping", "-c", "1", "-W", "5", server.address())
        received: list[str] = []

        def handle(connection: socket.socket, received: list[str] = received) -> None:
            received.append(hashlib.sha256(read_all(connection)).hexdigest())
            connection.sendall(content(octets))

        with serve(server.listen("0.0.0.0"), handle) as (_, port), client.connect(server.address(), port) as sock:
            sock.sendall(content(octets))
            sock.shutdown(socket.SHUT_WR)
            assert hashlib.sha256(read_all(sock)).hexdigest() == digest(octets)
        assert received == [digest(octets)]


def test_udp_between_guests_of_any_size(fresh: World) -> None:
    first, second = fresh.namespace("a"), fresh.namespace("b")
    qemu = f"qemu:{fresh.socket_path()}"
    fresh.daemon("--link", f"tap:netns={first.name}", "--link", qemu)
    fresh.relay(second, qemu)
    first.udhcpc()
    second.udhcpc()
    with first.datagrams("0.0.0.0", 7) as server, second.datagrams("0.0.0.0") as client:
        thread = threading.Thread(target=_echo_datagrams, args=(server,), daemon=True)
        thread.start()
        for octets in (0, 1, 1472, 1473, 9000, 65507):
            client.sendto(content(65507)[:octets], (first.address(), 7))
            assert client.recv(65536) == content(65507)[:octets]
        client.sendto(b"stop", (first.address(), 7))
        thread.join(5)


def _echo_datagrams(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            payload, sender = server.recvfrom(65536)
            if payload == b"stop":
                return
            server.sendto(payload, sender)


def _ticks(daemon: Daemon) -> int:
    fields = Path(f"/proc/{daemon.process.pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _ping(guest: Namespace) -> None:
    guest.run("ping", "-c", "1", "-W", "5", "192.168.65.1")


@pytest.mark.parametrize("scheme", ["tap", "packet"])
def test_f20_an_interface_that_goes_down_comes_up_again(fresh: World, scheme: str) -> None:
    guest = fresh.namespace()
    daemon = fresh.daemon("--link", f"{scheme}:netns={guest.name}")
    address = guest.udhcpc()
    _ping(guest)
    guest.ip("link", "set", "eth0", "down")
    before = _ticks(daemon)
    time.sleep(1.0)
    assert _ticks(daemon) - before <= 5, "clock ticks of CPU in a second without the interface"
    guest.ip("link", "set", "eth0", "up")
    assert guest.udhcpc() == address
    _ping(guest)
    assert daemon.stop() == 0, daemon.said()


@pytest.mark.parametrize("scheme", ["tap", "packet"])
def test_f20_an_interface_that_is_deleted_is_made_again(fresh: World, scheme: str) -> None:
    guest = fresh.namespace()
    daemon = fresh.daemon("--link", f"{scheme}:netns={guest.name}")
    address = guest.udhcpc()
    for times in (2, 3):
        guest.ip("link", "del", "eth0")
        wait_until(lambda times=times: daemon.said().count(": connected") == times, why=daemon.said)
        before = _ticks(daemon)
        assert guest.udhcpc() == address
        _ping(guest)
        assert _ticks(daemon) - before <= 50, "no spinning on what was lost"
    assert daemon.stop() == 0, daemon.said()


def _inhabitant(guest: Namespace) -> subprocess.Popen[str]:
    """A process that is in there by now."""
    process = guest.start("sleep", "1000")
    wait_until(lambda: os.stat(f"/proc/{process.pid}/ns/net").st_ino == os.stat(guest.path).st_ino)
    return process


@pytest.mark.parametrize("scheme", ["tap", "packet"])
def test_a_link_that_was_named_by_a_process_ends_with_it(fresh: World, scheme: str) -> None:
    """Our descriptor keeps the namespace alive, so nothing else would tell that the guest is gone."""
    guest, other = fresh.namespace(), fresh.namespace()
    process = _inhabitant(guest)
    daemon = fresh.daemon("--link", f"{scheme}:pid={process.pid}", "--link", f"tap:netns={other.name}")
    guest.udhcpc()
    _ping(guest)
    other.udhcpc()
    process.kill()
    wait_until(lambda: f"{scheme}:pid={process.pid}: process {process.pid} has ended" in daemon.said(), why=daemon.said)
    _ping(other)
    assert daemon.said().count("has ended") == 1
    if scheme == "tap":
        assert "eth0" not in guest.ip("link"), "the device went with its descriptor"
    assert daemon.stop() == 0, daemon.said()


def test_the_daemon_ends_with_the_process_of_its_only_link(fresh: World) -> None:
    guest = fresh.namespace()
    process = _inhabitant(guest)
    daemon = fresh.daemon("--link", f"tap:pid={process.pid}")
    process.kill()
    assert daemon.process.wait(10) == 0, daemon.said()
