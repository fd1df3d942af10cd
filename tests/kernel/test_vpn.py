"""A VPN comes up and goes while a guest works: its own route, its own name server for a zone, and an HTTP proxy.

guest -- daemon in the host's namespace --+-- home (dnsmasq: home.example; a web server)
                                          +-- vpn0 == office (dnsmasq: corp.example; intranet; tinyproxy), when it is up
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World, require
from tests.support.webhost import MB, digest, exactly, serve, web

pytestmark = pytest.mark.netns

HERE, OFFICE = "10.99.0.2", "10.99.0.1"
INTRANET = "10.99.0.80"
HOME = "203.0.113.5"
SOON_S = 2.0
"""How long a VPN may be up, or gone, before guests feel it."""


@dataclass
class Site:
    world: World
    guest: Namespace
    office: Namespace
    daemon: Daemon
    dns_file: Path
    proxy_file: Path

    @property
    def host(self) -> Namespace:
        return self.world.host

    def vpn_up(self) -> None:
        """What a VPN client does: an interface, a route, resolvers for a zone, a proxy."""
        self.host.ip("link", "add", "vpn0", "type", "veth", "peer", "name", "vpn0", "netns", self.office.name)
        self.host.ip("addr", "add", f"{HERE}/30", "dev", "vpn0")
        self.host.ip("link", "set", "vpn0", "up")
        self.office.ip("addr", "add", f"{OFFICE}/30", "dev", "vpn0")
        self.office.ip("link", "set", "vpn0", "up")
        self.host.ip("route", "add", "10.99.0.0/16", "via", OFFICE)
        replace(self.dns_file, home_servers() + f"nameserver {OFFICE}#53\nzone corp.example\n")
        replace(self.proxy_file, json.dumps({"http": f"http://{OFFICE}:8888", "exclude": "home.example,10.0.0.0/8"}))

    def vpn_down(self) -> None:
        self.host.ip("link", "del", "vpn0")
        replace(self.dns_file, home_servers())
        self.proxy_file.unlink()

    def asked(self, name: str) -> str:
        """What the guest's own resolver says."""
        done = self.guest.run("dig", "+short", "+tries=1", "+time=2", f"@{GATEWAY}", name, check=False)
        return done.stdout.strip()

    def fetched(self, url: str) -> str:
        """The digest of a page."""
        return self.guest.run("sh", "-c", f"curl -sS --max-time 5 {url} | sha256sum").stdout.split()[0]


def home_servers() -> str:
    return "nameserver 127.0.0.1#5353\n"


def replace(path: Path, text: str) -> None:
    """As programs write such files: a new one, renamed over the old."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def within(seconds: float, true: Callable[[], bool]) -> float:
    """Until it is so; how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, f"not within {seconds} s"
    return time.monotonic() - began


def resolver(place: Namespace, directory: Path, listen: str, *names: str) -> None:
    """dnsmasq that knows these names (NAME/ADDRESS) and no others."""
    words = [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--bind-dynamic",
        "--user=root",
        "--no-daemon",
    ]
    address, _, port = listen.partition("#")
    words += [f"--listen-address={address}", f"--port={port}", f"--pid-file={directory / listen}.pid"]
    words += [f"--address=/{name}" for name in names]
    # Whatever else is asked does not exist, and is not asked elsewhere.
    words += ["--local=//"]
    place.start(*words)


@pytest.fixture
def site(fresh: World, tmp_path: Path) -> Iterator[Site]:
    require("dnsmasq", "dig", "curl", "tinyproxy")
    guest, office = fresh.namespace(), fresh.namespace("office")
    fresh.host.ip("addr", "add", f"{HOME}/32", "dev", "lo")
    resolver(fresh.host, tmp_path, "127.0.0.1#5353", f"www.home.example/{HOME}")
    office.ip("addr", "add", f"{INTRANET}/32", "dev", "lo")
    office.ip("addr", "add", "198.51.100.80/32", "dev", "lo")
    resolver(office, tmp_path, f"{OFFICE}#53", f"intranet.corp.example/{INTRANET}", f"www.home.example/{INTRANET}")
    conf = tmp_path / "tinyproxy.conf"
    conf.write_text('Port 8888\nTimeout 30\nMaxClients 20\nViaProxyName "office"\n')
    office.start("tinyproxy", "-d", "-c", str(conf))
    dns_file, proxy_file = tmp_path / "dns", tmp_path / "http_proxy.json"
    dns_file.write_text(home_servers())
    daemon = fresh.daemon(
        "--link", f"tap:netns={guest.name}", "--dns", str(dns_file), "--http", str(proxy_file), "--log-level", "debug"
    )
    guest.udhcpc()
    yield Site(fresh, guest, office, daemon, dns_file, proxy_file)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_a_guest_works_through_a_vpn_that_comes_and_goes(site: Site) -> None:
    with contextlib.ExitStack() as stack:
        stack.enter_context(web(site.office, INTRANET, 80))
        stack.enter_context(web(site.office, "198.51.100.80", 80))
        home_port = stack.enter_context(web(site.host, HOME))

        # Something long that has nothing to do with the VPN, from before until after.
        go_on = stack.enter_context(
            serve(site.host.listen(HOME, 7000), lambda sock: sock.sendall(exactly(sock, 3 * MB)))
        )
        assert go_on
        long_one = stack.enter_context(site.guest.connect(HOME, 7000))
        long_one.sendall(bytes(MB))

        assert site.asked("www.home.example") == HOME
        assert site.asked("intranet.corp.example") == "", "nobody knows it yet"

        site.vpn_up()
        took = within(SOON_S, lambda: site.asked("intranet.corp.example") == INTRANET)
        assert site.fetched(f"http://intranet.corp.example/{MB}") == digest(MB)
        assert site.asked("www.home.example") == HOME, "its server is asked for its zone alone"
        # What only the office's proxy reaches: the host has no route to it.
        within(SOON_S, lambda: "Via" in site.guest.run("curl", "-sSI", "http://198.51.100.80/10", check=False).stdout)
        long_one.sendall(bytes(MB))
        office_one = stack.enter_context(site.guest.connect(INTRANET, 80))

        site.vpn_down()
        within(SOON_S, lambda: site.asked("intranet.corp.example") == "")
        began = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert office_one.recv(10) == b"", "a connection of the VPN ends with it"
        assert time.monotonic() - began < SOON_S
        assert site.fetched(f"http://www.home.example:{home_port}/{MB}") == digest(MB)
        long_one.sendall(bytes(MB))
        assert exactly(long_one, 3 * MB) == bytes(3 * MB), "what has nothing to do with it goes on"

        site.vpn_up()
        again = within(SOON_S, lambda: site.asked("intranet.corp.example") == INTRANET)
        print(f"names of the VPN after {took:.2f} s, and again after {again:.2f} s")
    assert os.path.exists(site.dns_file)
