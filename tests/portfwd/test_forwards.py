"""Forwards of every kind and owner, as the operating system, the guest and the front doors see them."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import json
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from netstack.api import Datagrams, Endpoint
from netstack.errors import ConfigError
from portfwd import proxy_protocol
from portfwd.carriers import Carriers, Destination
from portfwd.errors import AlreadyPublished, BindFailed, NotAllowed, TooMany
from portfwd.inherited import Inherited
from portfwd.owners import GVPROXY, HAND, SETTINGS, VPNKIT, Owner
from portfwd.registry import Registry
from portfwd.spec import PublishSpec
from portfwd.store import ForwardStore

GUEST = socket.inet_aton("192.168.65.3")


class Guests:
    """Stands where the stack will: keeps what it is handed."""

    def __init__(self) -> None:
        self.dialled: list[tuple[Endpoint, socket.socket, Endpoint | None, bytes]] = []
        self.shown: list[bool] = []
        self._lent: list[socket.socket] = []

    def dial(
        self, guest: Endpoint, sock: socket.socket, *, source: Any = None, on_close: Any = None, preface: bytes = b""
    ) -> None:
        self.dialled.append((guest, sock, source, preface))

    def datagrams(self, guest: Endpoint, sock: socket.socket, *, show_client: bool = False) -> Datagrams:
        self.shown.append(show_client)
        self._lent.append(sock)
        return sock

    def close(self) -> None:
        for _, sock, _, _ in self.dialled:
            sock.close()
        for sock in self._lent:
            sock.close()


class Plane:
    """Stands where the multiplexer will."""

    def __init__(self) -> None:
        self.streams: list[tuple[Destination, bytes]] = []
        self.ports: list[Destination] = []
        self._held: list[socket.socket] = []

    def stream(self, target: Destination, sock: socket.socket, *, preface: bytes = b"") -> None:
        self.streams.append((target, preface))
        self._held.append(sock)

    def datagrams(self, target: Destination, sock: socket.socket) -> Datagrams:
        self.ports.append(target)
        self._held.append(sock)
        return sock

    def dump(self) -> str:
        return ""

    def status(self) -> Mapping[str, Any]:
        return {}

    async def close(self) -> None:
        for sock in self._held:
            sock.close()


@pytest.fixture
def guests() -> Iterator[Guests]:
    made = Guests()
    yield made
    made.close()


@pytest.fixture
async def plane() -> Any:
    made = Plane()
    yield made
    await made.close()


@pytest.fixture
def registry(plane: Plane) -> Iterator[Registry]:
    made = Registry(carriers=Carriers(lambda: GUEST, plane=plane))
    yield made
    made.close()


def spec(text: str) -> PublishSpec:
    return PublishSpec.parse(text)


async def until(true: Any, limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not true():  # noqa: ASYNC110  # what is waited for is in the kernel
            await asyncio.sleep(0.002)


# Unix sockets of the host.


async def test_a_unix_socket_of_the_host_leads_to_a_port_of_the_guest(
    registry: Registry, guests: Guests, tmp_path: Path
) -> None:
    registry.start(guests, asyncio.get_running_loop())
    path = tmp_path / "made" / "on the way" / "docker.sock"
    forward = registry.add(PublishSpec(protocol="unix", path=str(path), guest_port=2375))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        await until(lambda: guests.dialled)
    assert str(guests.dialled[0][0]) == "192.168.65.3:2375"
    assert forward.accepted == 1
    registry.remove(forward)
    assert not path.exists()


async def test_a_stale_socket_is_replaced_and_a_file_never(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    registry.add(PublishSpec(protocol="unix", path=str(path), guest_port=1))
    file = tmp_path / "precious"
    file.write_text("kept")
    with pytest.raises(BindFailed, match="not a socket") as failed:
        registry.add(PublishSpec(protocol="unix", path=str(file), guest_port=1))
    assert failed.value.number == errno.EADDRINUSE
    assert file.read_text() == "kept"


async def test_a_living_socket_of_somebody_else_is_left_alone(registry: Registry, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(path))
        living.listen()
        with pytest.raises(BindFailed, match="another program"):
            registry.add(PublishSpec(protocol="unix", path=str(path), guest_port=1))
    with pytest.raises(AlreadyPublished):
        registry.add(PublishSpec(protocol="unix", path=str(tmp_path / "t"), guest_port=1))
        registry.add(PublishSpec(protocol="unix", path=str(tmp_path / "t"), guest_port=2))


# Ways into the guest.


async def test_what_only_the_vm_reaches_goes_by_the_forwarder(
    registry: Registry, guests: Guests, plane: Plane, tmp_path: Path
) -> None:
    registry.start(guests, asyncio.get_running_loop())
    tcp = registry.add(spec("0:172.17.0.2:80,via=forwarder"))
    to_path = registry.add(spec("0:/run/docker.sock,proxy=v1"))
    registry.add(PublishSpec(protocol="unix", path=str(tmp_path / "s"), guest_path="/run/x", via="forwarder"))
    registry.add(spec("udp:0:[fd00::2]:53,via=forwarder"))
    for target in (("127.0.0.1", tcp.spec.port), ("127.0.0.1", to_path.spec.port)):
        socket.create_connection(target, timeout=5).close()
        await until(lambda: plane.streams)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        await until(lambda: len(plane.streams) == 3)
    found = {str(target): preface for target, preface in plane.streams}
    assert set(found) == {"tcp:172.17.0.2:80", "unix:/run/docker.sock", "unix:/run/x"}
    assert found["unix:/run/docker.sock"].startswith(b"PROXY TCP4 127.0.0.1 127.0.0.1 ")
    assert [str(one) for one in plane.ports] == ["udp:[fd00::2]:53"]
    assert not guests.dialled


async def test_without_a_forwarder_the_complaint_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match="--forwarder"):
        Registry(lambda: GUEST).add(spec("0:172.17.0.2:80,via=forwarder"))


async def test_the_guest_sees_a_client_that_can_be_answered(guests: Guests) -> None:
    """N7: neither the host's loopback nor an address of the virtual network."""
    subnet = ipaddress.ip_network("192.168.65.0/24")
    carriers = Carriers(lambda: GUEST, may_show=lambda address: ipaddress.ip_address(address) not in subnet)
    carriers.dialer = guests
    wanted = spec("8080:80,source=client")
    clients = [
        ("203.0.113.9", 4000),
        ("127.0.0.1", 1),
        ("192.168.65.7", 2),
        ("::1", 3, 0, 0),
        ("::ffff:203.0.113.8", 5, 0, 0),
    ]
    for client in clients:
        mine, _theirs = socket.socketpair()
        _theirs.close()
        carriers.stream(wanted, mine, client)
    shown = [None if source is None else str(source) for _, _, source, _ in guests.dialled]
    assert shown == ["203.0.113.9:4000", None, None, None, "203.0.113.8:5"]
    mine, _theirs = socket.socketpair()
    _theirs.close()
    carriers.stream(spec("8080:80"), mine, clients[0])
    assert guests.dialled[-1][2] is None, "only where it was asked for"


async def test_a_udp_port_may_show_its_clients(registry: Registry, guests: Guests) -> None:
    registry.start(guests, asyncio.get_running_loop())
    registry.add(spec("udp:0:53"))
    registry.add(spec("udp:0:54,source=client"))
    assert guests.shown == [False, True]


@pytest.mark.parametrize(
    ("version", "client", "listener", "expected"),
    [
        (1, ("203.0.113.9", 4000), ("10.0.0.1", 80), b"PROXY TCP4 203.0.113.9 10.0.0.1 4000 80\r\n"),
        (1, ("2001:db8::1", 4000, 0, 0), ("2001:db8::2", 80, 0, 0), b"PROXY TCP6 2001:db8::1 2001:db8::2 4000 80\r\n"),
        (1, ("::ffff:1.2.3.4", 1, 0, 0), ("::ffff:5.6.7.8", 2, 0, 0), b"PROXY TCP4 1.2.3.4 5.6.7.8 1 2\r\n"),
        (1, ("fe80::1%eth0", 1, 0, 2), ("fe80::2", 2, 0, 2), b"PROXY TCP6 fe80::1 fe80::2 1 2\r\n"),
        (1, "", "/run/x", b"PROXY UNKNOWN\r\n"),
        (
            2,
            ("203.0.113.9", 4000),
            ("10.0.0.1", 80),
            bytes.fromhex("0d0a0d0a000d0a515549540a 21 11 000c cb007109 0a000001 0fa0 0050"),
        ),
        (2, "", "/run/x", bytes.fromhex("0d0a0d0a000d0a515549540a 20 00 0000")),
    ],
)
def test_proxy_headers_are_those_of_the_specification(
    version: int, client: Any, listener: Any, expected: bytes
) -> None:
    assert proxy_protocol.header(version, client, listener) == expected


def test_a_v2_header_of_ipv6_has_36_octets_of_addresses() -> None:
    made = proxy_protocol.header(2, ("2001:db8::1", 4000, 0, 0), ("2001:db8::2", 80, 0, 0))
    assert made[:12] == proxy_protocol.SIGNATURE
    assert struct.unpack_from("!BBH", made, 12) == (0x21, 0x21, 36) and len(made) == 16 + 36


# Owners and bounds.


async def test_each_owner_has_its_own_and_sees_the_others(registry: Registry) -> None:
    guest = Owner("guest", "192.168.65.3")
    made = {owner: registry.add(spec("0:80"), owner) for owner in (SETTINGS, HAND, VPNKIT, GVPROXY, guest)}
    assert len(list(registry)) == 5
    with pytest.raises(AlreadyPublished) as taken:
        registry.add(made[HAND].spec, guest)
    assert taken.value.forward is made[HAND] and "by hand" in str(taken.value)
    registry.release(guest)
    assert registry.of(guest) == [] and len(list(registry)) == 4
    assert registry.by_id(made[guest].id) is None and registry.by_id(made[HAND].id) is made[HAND]
    assert registry.sync([], SETTINGS) == []
    assert [forward.owner for forward in registry] == [HAND, VPNKIT, GVPROXY]
    assert registry.add(spec("0:80")).id > max(forward.id for forward in made.values()), "ids do not come again"


async def test_addresses_that_are_not_allowed_are_refused_to_all_but_the_settings() -> None:
    registry = Registry(lambda: GUEST, allowed=["127.0.0.1", "::"])
    try:
        with pytest.raises(NotAllowed, match=r"allowed_bind_addresses \(127\.0\.0\.1, ::\)"):
            registry.add(spec("0.0.0.0:0:80"), HAND)
        registry.add(spec("0:80"), HAND)
        registry.add(spec("[::1]:0:80"), HAND)
        registry.add(spec("0.0.0.0:0:80"), SETTINGS)
    finally:
        registry.close()
    everywhere = Registry(lambda: GUEST, allowed=["0.0.0.0"])
    try:
        everywhere.add(spec("127.0.0.1:0:80"), HAND)
        with pytest.raises(NotAllowed):
            everywhere.add(spec("[::1]:0:80"), HAND)
    finally:
        everywhere.close()


async def test_programs_in_the_vm_may_have_sockets_made_only_where_that_is_allowed(
    registry: Registry, tmp_path: Path
) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (inside / "link").symlink_to(outside)
    registry.socket_directories = frozenset([str(inside)])

    def unix(path: Path) -> PublishSpec:
        return PublishSpec(protocol="unix", path=str(path), guest_port=1)

    for owner in (Owner("9p", "port0#1"), Owner("vpnkit", "/run/port.sock"), Owner("guest", "192.168.65.3")):
        for path in (outside / "s", inside / ".." / "out" / "s", inside / "link" / "s", tmp_path / "inner" / "s"):
            with pytest.raises(NotAllowed, match="allowed_socket_directories"):
                registry.add(unix(path), owner)
        registry.remove(registry.add(unix(inside / "s"), owner))
        registry.remove(registry.add(unix(inside / "below" / "s"), owner))
    for number, owner in enumerate((SETTINGS, HAND, VPNKIT, GVPROXY)):
        registry.add(unix(outside / str(number)), owner)
    assert not (tmp_path / "inner").exists(), "what is refused leaves nothing behind"


async def test_one_port_too_many_is_refused_and_nothing_is_bound_by_halves() -> None:
    registry = Registry(lambda: GUEST, max_forwards=3)
    try:
        registry.add(spec("0:80"))
        with pytest.raises(TooMany):
            registry.add(spec("40000-40002:80-82"))
        assert len(registry) == 1
    finally:
        registry.close()


async def test_whoever_waits_for_changes_is_told_of_each(registry: Registry) -> None:
    told: list[int] = []
    registry.changed = lambda: told.append(len(registry))
    registry.remove(registry.add(spec("0:80")))
    assert told == [1, 0]


async def test_what_the_operating_system_said_is_there_for_other_protocols_to_repeat(registry: Registry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(BindFailed) as failed:
            registry.add(spec(f"{other.getsockname()[1]}:80"))
    assert (failed.value.number, failed.value.strerror) == (errno.EADDRINUSE, "address already in use")
    with pytest.raises(BindFailed) as failed:
        registry.add(spec("203.0.113.77:0:80"))
    assert failed.value.strerror == "cannot assign requested address"


# Sockets that were bound by somebody else.

ACTIVATE = """
import os, socket, sys
from portfwd.inherited import Inherited
from portfwd.spec import PublishSpec
os.environ["LISTEN_PID"] = str(os.getpid())
found = Inherited.from_environment()
spec = PublishSpec.parse(sys.argv[1])
sock = found(spec)
assert sock is not None and not sock.get_inheritable() and not sock.getblocking()
assert found(PublishSpec.parse("udp:" + sys.argv[1])) is None
assert not [name for name in os.environ if name.startswith("LISTEN_")]
print(len(found), sock.getsockname()[1])
"""


def test_a_port_that_systemd_bound_is_used(tmp_path: Path) -> None:
    """As sd_listen_fds(3) has it: descriptors from 3 on; one that is no listener is named and left alone."""
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        port = first.getsockname()[1]
        script = tmp_path / "activated.py"
        script.write_text(ACTIVATE)
        done = subprocess.run(
            [
                "bash",
                "-c",
                f"exec 3<&{first.fileno()} 4<&{second.fileno()} 5</dev/null; exec {sys.executable} {script} {port}:80",
            ],
            cwd=Path(__file__).parents[2],
            pass_fds=(first.fileno(), second.fileno()),
            env={**os.environ, "LISTEN_FDS": "3", "LISTEN_FDNAMES": "a:b:c", "PYTHONPATH": "."},
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2", str(port)]
    assert "descriptor 5" in done.stderr


def test_what_was_announced_to_another_process_is_not_ours() -> None:
    environ = {"LISTEN_FDS": "2", "LISTEN_PID": str(os.getpid() + 1)}
    assert len(Inherited.from_environment(environ)) == 0
    assert environ == {}, "no child believes it either"


async def test_a_forward_uses_the_socket_it_was_left_and_may_come_back_to_it(guests: Guests) -> None:
    bound = socket.create_server(("127.0.0.1", 0))
    bound.setblocking(False)
    port = bound.getsockname()[1]
    inherited = Inherited({("tcp", "127.0.0.1", port): bound})
    registry = Registry(lambda: GUEST, inherit=inherited)
    registry.start(guests, asyncio.get_running_loop())
    try:
        for count in (1, 2):
            forward = registry.add(spec(f"{port}:80"))
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            await until(lambda count=count: len(guests.dialled) == count)  # type: ignore[misc]
            registry.remove(forward)
    finally:
        registry.close()
        inherited.close()


# What was made by hand is there again.


async def test_forwards_by_hand_survive_and_keep_their_ports(tmp_path: Path, registry: Registry) -> None:
    store = ForwardStore(tmp_path / "forwards.json")
    free = registry.add(spec("0:80,annotation=web"), HAND)
    registry.add(spec("0:81"), SETTINGS)
    assert store.write(store.snapshot(registry))
    registry.close()
    again = Registry(lambda: GUEST)
    try:
        store = ForwardStore(tmp_path / "forwards.json")
        store.restore(again)
        (forward,) = again
        assert (forward.spec, forward.owner) == (free.spec, HAND)
        assert store.failed == {}
    finally:
        again.close()


async def test_a_port_that_is_taken_in_the_meantime_is_not_forgotten(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "forwards.json"
    registry = Registry(lambda: GUEST)
    try:
        with socket.create_server(("127.0.0.1", 0)) as other:
            wanted = spec(f"{other.getsockname()[1]}:80")
            path.write_text(json.dumps({"format": "pyvpnkit forwards 1", "forwards": [str(wanted)]}))
            store = ForwardStore(path)
            store.restore(registry)
            store.retry(registry)
            assert "is in use by" in store.failed[wanted]
            assert len(caplog.records) == 1, "the same trouble is told once"
            assert store.snapshot(registry)["forwards"] == [str(wanted)]
        store.retry(registry)
        assert [forward.spec for forward in registry] == [wanted] and not store.failed
    finally:
        registry.close()


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "pyvpnkit forwards 1", "forwards": ["80"]}', "{"])
async def test_a_file_that_is_none_of_ours_is_kept_aside(tmp_path: Path, text: str) -> None:
    path = tmp_path / "forwards.json"
    path.write_text(text)
    registry = Registry(lambda: GUEST)
    ForwardStore(path).restore(registry)
    assert not list(registry)
    assert (tmp_path / "forwards.json.bad").read_text() == text
