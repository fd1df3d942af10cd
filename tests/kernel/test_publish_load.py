"""One published port under load: many clients at once, many after one another, and more than there are descriptors for."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.build import build
from benchmarks.processes import cpu_seconds
from tests.support.netns import Daemon, Namespace, World, wait_until
from tests.support.webhost import content, exactly

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev"),
]

LIMIT = 1024
"""Descriptors of the daemon."""
RESERVE = 64
"""Of these not for guests (`--descriptor-reserve`)."""
PORT, CLOSED = 8080, 8081


@dataclass(frozen=True)
class Place:
    """A guest with an echo server on port 80, published at `PORT`; nobody listens behind `CLOSED`."""

    guest: Namespace
    host: Namespace
    daemon: Daemon
    before: int
    """Descriptors of the daemon that has served a client and is idle."""

    def works(self) -> bool:
        """A client is served."""
        with self.host.connect("127.0.0.1", PORT) as sock:
            sock.sendall(b"r")
            return exactly(sock, 1) == b"r"


def echo_server(guest: Namespace) -> subprocess.Popen[str]:
    """On port 80; what begins with `c` is echoed and the connection closed."""
    server = guest.start(str(build("netload")), "serve", "0.0.0.0", "80")
    assert server.stdout is not None and server.stdout.readline().startswith("{")
    return server


@pytest.fixture(scope="module")
def place(shared: World) -> Iterator[Place]:
    guest = shared.namespace()
    options = ["--link", f"tap:netns={guest.name}", "--descriptor-reserve", str(RESERVE)]
    options += ["-p", f"{PORT}:80", "-p", f"{CLOSED}:81"]
    daemon = shared.daemon(*options, wrap=["prlimit", f"--nofile={LIMIT}:{LIMIT}"])
    guest.udhcpc()
    echo_server(guest)
    idle = daemon.descriptors()
    made = Place(guest, shared.host, daemon, idle)
    assert made.works()
    daemon.wait_descriptors(idle)
    yield made
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


@pytest.fixture(autouse=True)
def clients_have_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 4096:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def short_connections(place: Place, port: int, *, at_once: int, count: int) -> dict[str, float]:
    """How so many connections of one octet each way ended (`netload.c`)."""
    done = place.host.run(str(build("netload")), "short", "127.0.0.1", str(port), str(at_once), str(count), limit_s=120)
    told: dict[str, float] = json.loads(done.stdout)
    assert sum(told[name] for name in ("served", "refused", "empty", "cut", "hung")) == count
    return told


def cpu_share(daemon: Daemon, span_s: float) -> float:
    """Of one processor, over so many seconds."""
    before = cpu_seconds(daemon.process.pid)
    begun = time.monotonic()
    time.sleep(span_s)
    return cpu_seconds(daemon.process.pid).since(before).total / (time.monotonic() - begun)


def test_a_thousand_clients_at_once(shared: World) -> None:
    """X01: all are open, in the guest too, before the first one speaks; each gets its own octets back."""
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", "-p", "8090:80")
    guest.udhcpc()
    server = echo_server(guest)
    idle = daemon.descriptors()
    with contextlib.ExitStack() as stack:
        begun = time.monotonic()
        clients = [stack.enter_context(shared.host.connect("127.0.0.1", 8090)) for _ in range(1000)]
        folder = f"/proc/{server.pid}/fd"
        wait_until(lambda: len(os.listdir(folder)) >= 1000, 60, lambda: f"{len(os.listdir(folder))} in the guest")
        for number, client in enumerate(clients):
            client.sendall(b"r%08d" % number + content(1000))
        for number, client in enumerate(clients):
            assert exactly(client, 1009) == b"r%08d" % number + content(1000)
        assert time.monotonic() - begun < 60
    daemon.wait_descriptors(idle)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_twenty_thousand_short_connections_lose_no_listener_and_leave_no_descriptor(place: Place) -> None:
    """More than the ports that the guest sees as sources, so these are used again while the guest is in TIME-WAIT."""
    told = short_connections(place, PORT, at_once=48, count=20_000)
    assert told["served"] == 20_000, told
    place.daemon.wait_descriptors(place.before)
    assert place.works()
    assert cpu_share(place.daemon, 0.5) < 0.2


def test_short_connections_to_a_closed_port_are_refused_one_by_one(place: Place) -> None:
    told = short_connections(place, CLOSED, at_once=48, count=2000)
    assert told["refused"] == 2000, told
    place.daemon.wait_descriptors(place.before)
    assert place.works()


def test_more_clients_than_descriptors_are_served_or_reset_and_the_listener_lives(place: Place) -> None:
    """Who is too many sees RST, not an end that looks like an empty answer; once the others left, there is room again."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(1300):
            with contextlib.suppress(ConnectionResetError):  # the RST may be as quick as connect
                clients.append(stack.enter_context(place.host.connect("127.0.0.1", PORT)))
        served = [client for client in clients if _served(client)]
        assert LIMIT - RESERVE - place.before - 8 <= len(served) < LIMIT
        assert place.daemon.descriptors() <= LIMIT - RESERVE + 8
        assert cpu_share(place.daemon, 0.5) < 0.2  # it waits for nobody
        assert all(_served(client) for client in served)
    place.daemon.wait_descriptors(place.before)
    told = short_connections(place, PORT, at_once=48, count=500)
    assert told["served"] == 500, told


def test_short_connections_far_beyond_the_limit_end_all_of_them(place: Place) -> None:
    """Waves of more clients than descriptors."""
    told = short_connections(place, PORT, at_once=1500, count=6000)
    assert told["served"] + told["refused"] == 6000 and told["served"] >= 1000, told
    place.daemon.wait_descriptors(place.before)
    assert place.works()


def _served(client: socket.socket) -> bool:
    """Whether the echo came; False for RST, and nothing else."""
    try:
        client.sendall(b"r")
        octet = client.recv(1)
    except (ConnectionResetError, BrokenPipeError):
        return False
    assert octet == b"r", "an end without an answer"
    return True
