"""A machine of QEMU, whose network card is a link of the daemon."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvpnkit import machine as qemu
from pyvpnkit.boot import Parts
from pyvpnkit.machine import Card
from tests.support import machine
from tests.support.machine import Machine
from tests.support.netns import Daemon, World, require, world
from tests.support.webhost import web

PUBLISHED = ("8080:80", "8081:81")


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    require("ip", "nsenter", "unshare", "setpriv", "curl", "qemu-system-x86_64")
    return machine.parts(tmp_path_factory.mktemp("machine"))


class Site:
    """A daemon, a web server on the host's loopback, and one machine at a time, started when it is first wanted."""

    def __init__(self, place: World, made_of: Parts, link: str, card: Card, port: int) -> None:
        self.host = place.host
        self.port = port
        """Of the web server."""
        self.daemon: Daemon = place.daemon("--link", link, *(word for spec in PUBLISHED for word in ("-p", spec)))
        self.idle = self.daemon.descriptors()
        """Descriptors of the daemon while there is no machine."""
        self.attached = 0
        """And with one that has a lease and no connections."""
        self._nowhere = place.namespace("qemu")
        self._parts = made_of
        self._card = card
        self._machine: Machine | None = None
        place.defer(self.power_cut)

    def machine(self) -> Machine:
        if self._machine is None:
            self._machine = Machine(self._nowhere, self._parts, self._card)
            self.attached = self.attached or self.daemon.descriptors()
        return self._machine

    def power_cut(self) -> None:
        """QEMU is killed; the next machine is a new one with the same network card."""
        if self._machine is not None:
            self._machine.kill()
            self._machine = None

    def finish(self) -> None:
        """Nothing is left at the daemon, neither of connections nor of the machine, and it ends as it should."""
        self.daemon.wait_descriptors(self.attached)
        self.power_cut()
        self.daemon.wait_descriptors(self.idle)
        assert self.daemon.stop() == 0, self.daemon.said()
        assert "Traceback" not in self.daemon.said(), self.daemon.said()


@contextlib.contextmanager
def _site(kind: str, made_of: Parts, directory: Path) -> Iterator[Site]:
    with world(directory) as place, web(place.host) as port:
        path = place.socket_path()
        card = qemu.stream(path) if kind == "qemu" else qemu.datagrams(path, place.socket_path("own.sock"))
        made = Site(place, made_of, f"{kind}:{path}", card, port)
        yield made
        made.finish()


@pytest.fixture(scope="module")
def stream_site(parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """For all tests of a module."""
    with _site("qemu", parts, tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture
def datagram_site(parts: Parts, tmp_path: Path) -> Iterator[Site]:
    with _site("unixgram", parts, tmp_path) as made:
        yield made
