"""A daemon, a web server on the host's loopback, and machines whose network card is a link of the daemon."""

from __future__ import annotations

import contextlib
import hashlib
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

from pyvpnkit.boot import Parts
from pyvpnkit.machine import MAC, Card
from tests.support.machine import Machine
from tests.support.netns import GATEWAY, HOST, Daemon, World, world
from tests.support.webhost import digest, exactly, text, web

ADDRESS = "192.168.65.3"
TRANSFER_S = 60.0
PUBLISHED = ("8080:80", "8081:81")


class Site:
    """Machines are started when they are first wanted; what they are called by is their MAC address."""

    def __init__(
        self,
        place: World,
        made_of: Parts,
        link: str,
        card: Card,
        port: int,
        *,
        options: Sequence[str] = (),
        processors: int = 1,
    ) -> None:
        self.host = place.host
        self.port = port
        """Of the web server."""
        self.card = card
        """Of the machines that are started from now on."""
        self.attached = 0
        """Descriptors of the daemon with one machine that has a lease and no connections."""
        self._place = place
        self._options = ["--link", link, "--state-dir", place.socket_path("state"), *options]
        self._options += [word for spec in PUBLISHED for word in ("-p", spec)]
        self._nowhere = place.namespace("qemu")
        self._parts = made_of
        self._processors = processors
        self._machines: dict[str, Machine] = {}
        self.daemon: Daemon
        self.start_daemon()
        self.idle = self.daemon.descriptors()
        """Descriptors of the daemon while there is no machine."""
        place.defer(self.power_cut)

    def start_daemon(self) -> None:
        self.daemon = self._place.daemon(*self._options)

    def kill_daemon(self) -> None:
        """As nothing can be done about: SIGKILL."""
        self.daemon.close()

    def machine(self, mac: str = MAC) -> Machine:
        if mac not in self._machines:
            alone = not self._machines
            self._machines[mac] = Machine(self._nowhere, self._parts, self.card, mac=mac, processors=self._processors)
            if alone:
                self.attached = self.attached or self.daemon.descriptors()
        return self._machines[mac]

    def power_cut(self) -> None:
        """QEMU is killed, each of them; the next machine is a new one."""
        while self._machines:
            self._machines.popitem()[1].kill()

    def finish(self) -> None:
        """Nothing is left at the daemon, neither of connections nor of the machines, and it ends as it should."""
        self.daemon.wait_descriptors(self.idle + (self.attached - self.idle) * len(self._machines))
        self.power_cut()
        self.daemon.wait_descriptors(self.idle)
        assert self.daemon.stop() == 0, self.daemon.said()
        assert "Traceback" not in self.daemon.said(), self.daemon.said()


@contextlib.contextmanager
def site(
    link: str, card: Card, made_of: Parts, directory: Path, *, options: Sequence[str] = (), processors: int = 1
) -> Iterator[Site]:
    """With the link and card that are meant for the socket `directory/net.sock`."""
    with world(directory) as place, web(place.host) as port:
        made = Site(place, made_of, link, card, port, options=options, processors=processors)
        yield made
        made.finish()


# What a guest does.


def sum_of(guest: Machine, path: str) -> str:
    return guest.run(f"sha256sum {path}", limit_s=TRANSFER_S).split()[0]


def download(guest: Machine, port: int, octets: int) -> None:
    """busybox wget, from the host's loopback."""
    guest.run(f"wget -q -O /tmp/down http://{HOST}:{port}/{octets}", limit_s=TRANSFER_S)
    assert sum_of(guest, "/tmp/down") == digest(octets)
    guest.run("rm /tmp/down")


def upload(guest: Machine, port: int, octets: int) -> None:
    """busybox wget again. What it posts it takes for a text, which ends at a NUL: so it sends back a text that it fetched."""
    url = f"http://{HOST}:{port}"
    guest.run(f"wget -q -O /tmp/up {url}/text/{octets}", limit_s=TRANSFER_S)
    posted = guest.run(f"wget -q -O - --post-file /tmp/up {url}/", limit_s=TRANSFER_S)
    assert posted == hashlib.sha256(text(octets)).hexdigest()
    guest.run("rm /tmp/up")


def ping_and_names(guest: Machine) -> None:
    guest.run(f"ping -c 2 -i 0.2 -W 5 {GATEWAY}")
    guest.run(f"ping -c 1 -s 4000 -W 5 {HOST}")
    answer = guest.run("nslookup host.internal").split("Name:")[1].split()
    assert answer == ["host.internal", "Address:", HOST]


@contextlib.contextmanager
def held(guest: Machine, site: Site) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection to the machine and one from it, both in use and open."""
    guest.run("nc -l -p 81 -e cat & until netstat -ltn | grep -q :81; do usleep 20000; done")
    with site.host.listen() as listener, site.host.connect("127.0.0.1", 8081) as to_it:
        guest.run(f"(sleep 1000 | nc {HOST} {listener.getsockname()[1]} >/tmp/came) &")
        from_it, _ = listener.accept()
        with from_it:
            to_it.sendall(b"before")
            assert exactly(to_it, 6) == b"before"
            from_it.sendall(b"before")
            guest.run("until [ -s /tmp/came ]; do usleep 20000; done")
            yield to_it, from_it
