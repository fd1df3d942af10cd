"""The host is followed: one `Change` for all that happens together, none for what is no change, and nothing that fails ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from netstack.errors import HostError
from netstack.observe import wake
from netstack.observe.wake import Kind, Missed
from pyvpnkit.hostnet import changes
from pyvpnkit.hostnet.changes import Change, HostWatch
from pyvpnkit.hostnet.netlink import Listener
from pyvpnkit.hostnet.routes import Egress, Route, Snapshot
from tests.roof.api.conftest import until
from tests.roof.hostnet.conftest import interface
from tests.support.netns import Namespace, inside

LIMIT_S = 10.0
LAN, VPN, LINK_LOCAL = bytes((192, 0, 2, 7)), bytes((10, 8, 0, 2)), ipaddress.ip_address("fe80::7").packed
DEFAULT = Route(destination=ipaddress.ip_network("0.0.0.0/0"), interface="eth0")
CORPORATE = Route(destination=ipaddress.ip_network("10.0.0.0/8"), interface="tun0")
BEFORE = Snapshot(
    addresses=frozenset((LAN,)),
    routes=frozenset((DEFAULT,)),
    egress=Egress(interface="eth0", mtu=1500),
    ipv6_route=True,
)
WITH_VPN = Snapshot(
    addresses=frozenset((LAN, VPN)),
    routes=frozenset((DEFAULT, CORPORATE)),
    egress=Egress(interface="tun0", mtu=1380),
)


class Played:
    """A host whose state the test sets, and a listener that hears when the test says so."""

    def __init__(self) -> None:
        self.state: Snapshot | HostError = BEFORE
        self.reading, self.writing = os.pipe()
        os.set_blocking(self.reading, False)
        self.broken = False
        self.closed = 0

    def read(self) -> Snapshot:
        if isinstance(self.state, HostError):
            raise self.state
        return self.state

    def tell(self) -> None:
        os.write(self.writing, b"x")

    # as a Listener

    def fileno(self) -> int:
        return self.reading

    def heard(self) -> bool:
        if self.broken:
            raise OSError(5, "Input/output error")
        return bool(os.read(self.reading, 4096))

    def close(self) -> None:
        self.closed += 1


class Follower:
    """A watch and what it told."""

    def __init__(self, **options: Any) -> None:
        self.told: list[Change] = []
        self._news = asyncio.Event()
        self.watch = HostWatch(self._changed, **{"debounce_s": 0.02, "every_s": 60.0, "files": ()} | options)

    def _changed(self, change: Change) -> None:
        self.told.append(change)
        self._news.set()

    async def next(self) -> Change:
        async with asyncio.timeout(LIMIT_S):
            while not self.told:
                self._news.clear()
                await self._news.wait()
        return self.told.pop(0)


@pytest.fixture
def played() -> Any:
    made = Played()
    yield made
    os.close(made.reading)
    os.close(made.writing)


@pytest.fixture
async def make(played: Played) -> Any:
    made: list[Follower] = []

    def start(**options: Any) -> Follower:
        given: dict[str, Any] = {"read": played.read, "listen": lambda: played}
        follower = Follower(**given | options)
        follower.watch.start(asyncio.get_running_loop())
        made.append(follower)
        return follower

    yield start
    for follower in made:
        follower.watch.close()


async def looked(follower: Follower, times: int) -> None:
    """Until everything was read so often."""
    await until(lambda: follower.watch.looks >= times)
    await asyncio.sleep(0)


async def test_a_vpn_comes_and_goes(played: Played, make: Callable[..., Follower]) -> None:
    follower = make()
    assert follower.watch.snapshot == BEFORE and follower.watch.ipv6_route() and not follower.told
    played.state = WITH_VPN
    for _ in range(30):
        played.tell()
    change = await follower.next()
    assert change.appeared == {VPN} and not change.vanished
    assert change.new_routes == {CORPORATE} and not change.lost_routes
    assert change.reasons == ("addresses", "routes", "egress", "ipv6")
    assert not follower.watch.ipv6_route()
    assert follower.watch.looks == 2, "dozens of messages are one look"
    played.state = BEFORE
    played.tell()
    change = await follower.next()
    assert change.vanished == {VPN} and change.lost_routes == {CORPORATE} and change.now == BEFORE


async def test_what_comes_and_goes_at_once_is_no_change(played: Played, make: Callable[..., Follower]) -> None:
    follower = make()
    played.state = WITH_VPN
    played.tell()
    played.state = BEFORE
    played.tell()
    await looked(follower, 2)
    assert not follower.told


async def test_a_containers_link_local_address_is_taken_over_and_not_told(
    played: Played, make: Callable[..., Follower]
) -> None:
    follower = make()
    played.state = Snapshot(
        addresses=BEFORE.addresses | {LINK_LOCAL}, routes=BEFORE.routes, egress=BEFORE.egress, ipv6_route=True
    )
    played.tell()
    await looked(follower, 2)
    assert not follower.told
    assert LINK_LOCAL in follower.watch.snapshot.addresses


async def test_a_host_that_cannot_be_read_is_as_it_was_and_asked_again(
    played: Played, make: Callable[..., Follower], caplog: pytest.LogCaptureFixture
) -> None:
    follower = make()
    played.state = HostError("netlink: no buffer space")
    for looks in (2, 3):
        played.tell()
        await looked(follower, looks)
    assert follower.watch.snapshot == BEFORE and not follower.told
    assert caplog.text.count("what was known of it stays") == 1
    follower.watch.resolvers_changed()
    assert (await follower.next()).reasons == ("resolvers",), "what is known otherwise is told all the same"
    played.state = WITH_VPN
    played.tell()
    assert (await follower.next()).now == WITH_VPN


async def test_a_host_that_tells_no_more_is_looked_at_now_and_then(
    played: Played, make: Callable[..., Follower], caplog: pytest.LogCaptureFixture
) -> None:
    follower = make(every_s=0.05)
    played.broken = True
    played.tell()
    await until(lambda: bool(played.closed))
    assert "no longer heard of" in caplog.text
    played.state = WITH_VPN
    assert (await follower.next()).now == WITH_VPN


async def test_where_nobody_tells_it_is_looked_at_now_and_then(
    played: Played, make: Callable[..., Follower], caplog: pytest.LogCaptureFixture
) -> None:
    def none() -> Listener:
        raise OSError(1, "Operation not permitted")

    follower = make(listen=none, every_s=0.05)
    assert "not heard of (Operation not permitted)" in caplog.text
    played.state = WITH_VPN
    assert (await follower.next()).now == WITH_VPN


async def test_a_system_that_is_polled(played: Played, make: Callable[..., Follower]) -> None:
    """macOS: in a thread, and again after each."""
    follower = make(listen=None, poll_s=0.02)
    played.state = HostError("ifconfig: broken")
    await looked(follower, 3)
    played.state = WITH_VPN
    assert (await follower.next()).now == WITH_VPN
    played.state = BEFORE
    assert (await follower.next()).now == BEFORE


async def test_a_file_of_resolvers_that_is_replaced(
    played: Played, make: Callable[..., Follower], tmp_path: Path
) -> None:
    path, new = tmp_path / "resolv.conf", tmp_path / "new"
    follower = make(every_s=0.05, files=(str(path),))
    path.write_text("nameserver 192.0.2.1\n")
    assert (await follower.next()).reasons == ("resolvers",), "made"
    new.write_text("nameserver 192.0.2.2\n")
    new.replace(path)
    assert (await follower.next()).reasons == ("resolvers",), "replaced"
    path.unlink()
    assert (await follower.next()).reasons == ("resolvers",), "removed"


async def test_sleep_is_a_change_though_nothing_else_is(
    played: Played, make: Callable[..., Follower], monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = Missed(Kind.SLEPT, 3600.0)
    first = iter((slept,))
    monkeypatch.setattr(wake, "missed", lambda *_: next(first, None))
    follower = make(every_s=0.03)
    change = await follower.next()
    assert change.reasons == ("slept",) and change.missed == slept
    played.state = WITH_VPN
    played.tell()
    assert (await follower.next()).missed is None, "it is told once"


async def test_a_slow_host_is_looked_at_less_often(played: Played, make: Callable[..., Follower]) -> None:
    """A read of 50 ms: the next one comes a second later, however often there is news."""
    spins: list[None] = []

    def slow() -> Snapshot:
        spins.append(None)
        time.sleep(0.05)
        return played.read()

    follower = make(read=slow)
    loop = asyncio.get_running_loop()
    began = loop.time()
    while loop.time() - began < 0.9:
        played.tell()
        await asyncio.sleep(0.01)
    assert len(spins) == 1
    await looked(follower, 2)


async def test_what_was_before_the_start_is_no_change(played: Played, tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    follower = Follower(read=played.read, listen=lambda: played, every_s=0.02, files=(str(path),))
    follower.watch.resolvers_changed()
    path.write_text("nameserver 192.0.2.1\n")
    follower.watch.start(asyncio.get_running_loop())
    try:
        played.tell()
        await looked(follower, 2)
        assert not follower.told
    finally:
        follower.watch.close()


async def test_nothing_happens_after_the_end(played: Played, make: Callable[..., Follower]) -> None:
    follower = make(every_s=0.02)
    played.state = WITH_VPN
    played.tell()
    await asyncio.sleep(0)
    follower.watch.close()
    follower.watch.close()
    assert played.closed == 1
    follower.watch.resolvers_changed()
    await asyncio.sleep(0.1)
    assert not follower.told


async def test_an_idle_host_is_not_read_again(played: Played, make: Callable[..., Follower]) -> None:
    follower = make(every_s=0.01)
    await asyncio.sleep(0.2)
    assert follower.watch.looks == 1


@pytest.mark.skipif(sys.platform != "linux", reason="expected: namespaces are Linux's")
async def test_a_kernels_changes_are_told(host: Namespace) -> None:
    def read() -> Snapshot:
        with inside(host.path):
            return changes.routes.snapshot()

    def listen() -> Listener:
        with inside(host.path):
            return Listener()

    follower = Follower(read=read, listen=listen)
    follower.watch.start(asyncio.get_running_loop())
    try:
        await asyncio.to_thread(interface, host, "tun0")
        await asyncio.to_thread(host.ip, "addr", "add", "10.8.0.2/24", "dev", "tun0")
        seen: set[bytes] = set()
        while VPN not in seen:
            seen |= (await follower.next()).appeared
        await asyncio.to_thread(host.ip, "link", "del", "tun0")
        gone: set[bytes] = set()
        while VPN not in gone:
            gone |= (await follower.next()).vanished
    finally:
        follower.watch.close()


def test_addresses_are_shown_sorted() -> None:
    assert changes.shown(frozenset((LINK_LOCAL, LAN, VPN))) == ("10.8.0.2", "192.0.2.7", "fe80::7")
