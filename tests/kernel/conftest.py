"""A guest that is a Linux kernel: namespaces, a daemon in a process of its own, and programs as people have them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import HOST, Daemon, Namespace, World, require, world
from tests.support.webhost import MB, content, digest, web


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A world for the whole module."""
    require("ip", "nsenter", "unshare", "busybox")
    with world(tmp_path_factory.mktemp("world")) as made:
        yield made


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[World]:
    """A world for one test."""
    require("ip", "nsenter", "unshare", "busybox")
    with world(tmp_path) as made:
        yield made


@dataclass(frozen=True)
class Site:
    """One guest with a lease on a TAP with offloads, and its daemon."""

    world: World
    guest: Namespace
    daemon: Daemon
    port: int
    """Of the web server on the host's loopback."""

    @property
    def host(self) -> Namespace:
        return self.world.host


@pytest.fixture(scope="module")
def site(shared: World) -> Iterator[Site]:
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}")
    assert guest.udhcpc() == "192.168.65.3"
    with web(shared.host) as port:
        yield Site(shared, guest, daemon, port)
    assert daemon.stop() == 0, daemon.said()
    assert "Traceback" not in daemon.said(), daemon.said()


@pytest.fixture(scope="session")
def upload(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A file of so many octets of `content`."""
    directory = tmp_path_factory.mktemp("upload")

    def make(octets: int) -> Path:
        path = directory / str(octets)
        if not path.exists():
            path.write_bytes(content(octets))
        return path

    return make


@pytest.fixture
def fetch(upload: Callable[[int], Path], tmp_path: Path) -> Callable[..., None]:
    """`fetch(guest, port)`: curl loads a file from the host and another to it; both arrive whole."""

    def run(guest: Namespace, port: int, octets: int = 10 * MB, address: str = HOST) -> None:
        into = tmp_path / "down"
        url = f"http://{address}:{port}"
        curl = ["curl", "-sS", "--max-time", "60"]
        guest.run(*curl, "-o", str(into), f"{url}/{octets}", limit_s=70)
        with into.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == digest(octets), "down"
        into.unlink()
        done = guest.run(*curl, "-X", "POST", "-T", str(upload(octets)), f"{url}/", limit_s=70)
        assert done.stdout == digest(octets), "up"

    return run


@pytest.fixture
def smoke(fetch: Callable[..., None]) -> Callable[..., None]:
    """What any link must carry: a lease, ping, names, and files both ways."""

    def run(place: World, guest: Namespace, port: int, octets: int = 10 * MB) -> None:
        address = guest.udhcpc()
        assert address.startswith("192.168.65."), address
        guest.run("ping", "-c", "2", "-i", "0.2", "-W", "5", "192.168.65.1")
        guest.run("ping", "-c", "1", "-s", "4000", "-W", "5", HOST)
        answer = guest.run("dig", "+short", "+tries=2", "host.internal").stdout.split()
        assert answer == [HOST]
        fetch(guest, port, octets)

    return run
