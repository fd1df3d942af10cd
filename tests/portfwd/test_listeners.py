"""Published ports as clients on the host and the person who publishes them see it (X01, X02, L4, L8, N5, R1)."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

import portfwd.acceptor
import portfwd.listeners
from netstack.api import Endpoint
from netstack.errors import ConfigError, HostError
from netstack.observe.events import Event, EventBus
from portfwd.holders import first_unprivileged_port
from portfwd.registry import Registry
from portfwd.spec import PublishSpec

GUEST = socket.inet_aton("192.168.65.3")


@dataclass
class Lent:
    """A UDP port as the stack holds it."""

    guest: Endpoint
    sock: socket.socket
    closed: bool = False

    def close(self) -> None:
        self.closed = True
        self.sock.close()


@dataclass
class Guests:
    """Stands where the stack will: keeps what it is handed."""

    dialled: list[tuple[Endpoint, socket.socket]] = field(default_factory=list)
    lent: list[Lent] = field(default_factory=list)
    sources: list[Endpoint | None] = field(default_factory=list)
    prefaces: list[bytes] = field(default_factory=list)

    def dial(
        self, guest: Endpoint, sock: socket.socket, *, source: Any = None, on_close: Any = None, preface: bytes = b""
    ) -> None:
        self.dialled.append((guest, sock))
        self.sources.append(source)
        self.prefaces.append(preface)

    def datagrams(self, guest: Endpoint, sock: socket.socket, *, show_client: bool = False) -> Lent:
        self.lent.append(Lent(guest, sock))
        return self.lent[-1]

    def hang_up(self) -> None:
        for _, sock in self.dialled:
            sock.close()
        self.dialled.clear()


@pytest.fixture
def guests() -> Iterator[Guests]:
    made = Guests()
    yield made
    made.hang_up()
    for one in made.lent:
        one.close()


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry(lambda: GUEST)
    yield made
    made.close()


async def until(true: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.002)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


async def test_a_client_is_handed_to_the_guest_meant(registry: Registry, guests: Guests) -> None:
    registry.start(guests, asyncio.get_running_loop())
    default = registry.add(PublishSpec.parse("0:80"))
    named = registry.add(PublishSpec.parse("0:192.168.65.9:81"))
    with connect(default.spec.port), connect(named.spec.port):
        await until(lambda: len(guests.dialled) == 2)
        assert {str(guest) for guest, _ in guests.dialled} == {"192.168.65.3:80", "192.168.65.9:81"}
        assert not any(sock.getblocking() for _, sock in guests.dialled)


async def test_a_thousand_clients_at_once(registry: Registry, guests: Guests) -> None:
    forward = registry.add(PublishSpec.parse("0:80"))
    registry.start(guests, asyncio.get_running_loop())
    clients = []
    for _ in range(1000):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", forward.spec.port))
        clients.append(client)
    await until(lambda: len(guests.dialled) == 1000)
    for client in clients:
        client.close()


async def test_after_removal_new_clients_are_refused_and_old_ones_live(registry: Registry, guests: Guests) -> None:
    registry.start(guests, asyncio.get_running_loop())
    forward = registry.add(PublishSpec.parse("0:80"))
    with connect(forward.spec.port) as client:
        await until(lambda: bool(guests.dialled))
        registry.remove(forward)
        with pytest.raises(ConnectionRefusedError):
            connect(forward.spec.port)
        guests.dialled[0][1].sendall(b"still here")
        assert client.recv(100) == b"still here"


def test_the_process_that_holds_a_port_is_named(registry: Registry) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import socket; s=socket.create_server(('127.0.0.1',0)); print(s.getsockname()[1], flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        port = int(holder.stdout.readline())
        with pytest.raises(HostError) as caught:
            registry.add(PublishSpec.parse(f"{port}:80"))
        holder.communicate("\n")
    assert f"tcp 127.0.0.1:{port} is in use" in str(caught.value)
    if sys.platform == "linux":
        assert f"(pid {holder.pid})" in str(caught.value)


@pytest.mark.parametrize("bind", ["0.0.0.0", "127.0.0.1"])
def test_a_udp_port_of_this_very_process_is_recognised(registry: Registry, bind: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as mine:
        mine.bind((bind, 0))
        with pytest.raises(HostError, match="in use"):
            registry.add(PublishSpec.parse(f"udp:{mine.getsockname()[1]}:80"))


def test_an_address_of_another_host_is_named(registry: Registry) -> None:
    with pytest.raises(HostError, match=r"203\.0\.113\.1 is not an address of this host"):
        registry.add(PublishSpec.parse("203.0.113.1:0:80"))


@pytest.mark.skipif(
    sys.platform != "linux", reason="expected: other systems let everybody bind low ports, or say it differently"
)
def test_a_privileged_port_says_what_privilege_and_how() -> None:
    # In a process of its own, because this one may be root.
    script = (
        "import os\nif os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from portfwd.holders import explain, first_unprivileged_port\nimport socket\n"
        "first = first_unprivileged_port()\n"
        "s = socket.socket()\n"
        "try: s.bind(('127.0.0.1', first - 1)); print('bound')\n"
        "except OSError as error: print(explain(error, 'tcp', '127.0.0.1', first - 1))\n"
    )
    first = first_unprivileged_port()
    if first == 0:
        pytest.skip("expected: this host keeps no ports for root")
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert f"ports below {first} are kept for root" in run.stdout, run.stderr


async def test_a_range_is_bound_as_a_whole_or_not_at_all(registry: Registry) -> None:
    # On an address that nobody else uses: on 127.0.0.1 the port before a free one may be any program's.
    with socket.create_server(("127.77.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError):
            registry.add(PublishSpec.parse(f"127.77.0.1:{port - 1}-{port}:80-81"))
        assert len(registry) == 0
        with socket.create_server(("127.77.0.1", port - 1)):
            pass  # the first of the two was given back


def test_publishing_twice_and_too_much_is_refused(guests: Guests) -> None:
    registry = Registry(lambda: GUEST, max_forwards=3)
    forward = registry.add(PublishSpec.parse("0:80"))
    with pytest.raises(ConfigError, match="published already"):
        registry.add(forward.spec)
    with pytest.raises(ConfigError, match="exceed 3"):
        registry.add(PublishSpec.parse("udp:40000-40002:1-3"))
    registry.close()


def test_events_name_the_port_that_was_bound() -> None:
    seen: list[Event] = []
    bus = EventBus()
    bus.subscribe(seen.append)
    registry = Registry(lambda: GUEST, events=bus, clock=lambda: 7.0)
    forward = registry.add(PublishSpec.parse("udp:0:53"))
    port = forward.spec.port
    assert port > 0
    registry.remove(registry.find(PublishSpec.parse("udp:0:53")))
    registry.remove(forward)
    assert [str(event) for event in seen] == [
        f"ForwardAdded forward=udp:127.0.0.1:{port}:53 owner=settings",
        f"ForwardRemoved forward=udp:127.0.0.1:{port}:53 owner=settings",
    ]


async def test_a_reload_keeps_the_socket_of_what_did_not_change(registry: Registry, guests: Guests) -> None:
    registry.start(guests, asyncio.get_running_loop())
    kept, gone = PublishSpec.parse("0:80"), PublishSpec.parse("0:81")
    port = registry.add(kept).spec.port
    old = registry.add(gone).spec.port
    with socket.create_server(("127.0.0.1", 0)) as taken:
        blocked = PublishSpec.parse(f"{taken.getsockname()[1]}:83")
        failures = registry.sync([kept, PublishSpec.parse("0:82"), blocked])
    assert [str(forward.asked) for forward in registry] == ["tcp:127.0.0.1:0:80", "tcp:127.0.0.1:0:82"]
    assert registry.find(kept).spec.port == port
    assert len(failures) == 1 and "in use" in str(failures[0])
    with pytest.raises(ConnectionRefusedError):
        connect(old)


async def test_out_of_descriptors_the_listener_rests_and_serves_those_who_waited(
    registry: Registry, guests: Guests, monkeypatch: pytest.MonkeyPatch
) -> None:
    """N5, R1: no spinning while descriptors are short, recovery within a second after they are free."""
    monkeypatch.setattr(portfwd.acceptor, "PAUSE_S", 0.02)
    registry.start(guests, asyncio.get_running_loop())
    forward = registry.add(PublishSpec.parse("0:80"))
    (listener,) = forward.listeners
    assert isinstance(listener, portfwd.listeners.StreamListener)
    clients = []
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for _ in range(10):
        client = socket.socket()
        client.setblocking(False)
        client.connect_ex(("127.0.0.1", forward.spec.port))
        clients.append(client)
    lowest = os.dup(0)
    os.close(lowest)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        await asyncio.sleep(0.2)
        assert not guests.dialled
        assert 1 <= listener.pauses <= 12, "one try per rest, not one per turn of the loop"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    await until(lambda: len(guests.dialled) == 10, 1.0)
    for client in clients:
        client.close()


async def test_closing_a_resting_listener_leaves_nothing_in_the_loop(registry: Registry, guests: Guests) -> None:
    loop = asyncio.get_running_loop()
    registry.start(guests, loop)
    forward = registry.add(PublishSpec.parse("0:80"))
    (listener,) = forward.listeners
    assert isinstance(listener, portfwd.listeners.StreamListener)
    fd = listener._sock.fileno()
    listener._rest(OSError(24, "Too many open files"))
    registry.remove(forward)
    assert not loop.remove_reader(fd)
    await asyncio.sleep(portfwd.acceptor.PAUSE_S + 0.05)
    assert not loop.remove_reader(fd)


async def test_a_udp_port_follows_the_default_guest_and_stays_bound(guests: Guests) -> None:
    current = [GUEST]
    registry = Registry(lambda: current[0])
    registry.start(guests, asyncio.get_running_loop())
    forward = registry.add(PublishSpec.parse("udp:0:53"))
    registry.retarget()
    assert [str(one.guest) for one in guests.lent] == ["192.168.65.3:53"], "the same guest: nothing changes"
    current[0] = socket.inet_aton("192.168.65.4")
    registry.retarget()
    first, second = guests.lent
    assert first.closed and not second.closed and str(second.guest) == "192.168.65.4:53"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", ("127.0.0.1", forward.spec.port))
        second.sock.settimeout(5)
        assert second.sock.recv(100) == b"hello"
    registry.close()
    assert second.closed
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
        again.bind(("127.0.0.1", forward.spec.port))
