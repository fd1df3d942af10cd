"""A machine of QEMU, whose network card is a link of the daemon."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvpnkit import boot
from pyvpnkit import machine as qemu
from pyvpnkit.boot import Parts
from tests.qemu.site import Site, site
from tests.support import machine
from tests.support.netns import require


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    require("ip", "nsenter", "unshare", "setpriv", "curl", "qemu-system-x86_64")
    return machine.parts(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module", params=["qemu", "vhost-user"])
def any_site(request: pytest.FixtureRequest, parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With each of the links that keep a connection to QEMU; for all tests of a module."""
    directory = tmp_path_factory.mktemp("site")
    path = str(directory / "net.sock")
    card = {"qemu": qemu.stream, "vhost-user": qemu.shared_ring}[request.param](path)
    with site(f"{request.param}:{path}", card, parts, directory) as made:
        yield made


@pytest.fixture
def datagram_site(parts: Parts, tmp_path: Path) -> Iterator[Site]:
    path = str(tmp_path / "net.sock")
    with site(f"unixgram:{path}", qemu.datagrams(path, f"{path}.own"), parts, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def ring_site(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With the shared ring; for all tests of a module."""
    directory = tmp_path_factory.mktemp("site")
    path = str(directory / "net.sock")
    with site(f"vhost-user:{path}", qemu.shared_ring(path), parts, directory) as made:
        yield made


@pytest.fixture(scope="session")
def ninep_parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """Debian's ordinary kernel, for the cloud kernel has no 9P."""
    require("ip", "nsenter", "unshare", "setpriv", "qemu-system-x86_64")
    return machine.parts(tmp_path_factory.mktemp("machine"), boot.NINEP)


@pytest.fixture(scope="module")
def place(ninep_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """With 9P, on a stream; for all tests of a module."""
    directory = tmp_path_factory.mktemp("site")
    path = str(directory / "net.sock")
    with site(f"qemu:{path}", qemu.stream(path), ninep_parts, directory) as made:
        yield made
