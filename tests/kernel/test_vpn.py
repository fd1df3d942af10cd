"""A VPN comes up and goes while a guest works: its own route, its own name server for a zone, and an HTTP proxy.

guest -- daemon in the host's namespace --+-- home (dnsmasq: home.example; a web server)
                                          +-- vpn0 == office (dnsmasq: corp.example; intranet; tinyproxy), when it is up
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World, require, wait_until
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


def test_names_of_the_settings_and_search_domains_reach_guests(fresh: World, tmp_path: Path) -> None:
    require("dig")
    guest = fresh.namespace()
    dns_file, settings = tmp_path / "dns", tmp_path / "settings.yaml"
    dns_file.write_text("search corp.example\n")
    settings.write_text('dns:\n  records: {www.corp.example: 10.0.0.5, "*.apps.example": 10.0.0.6}\n')
    daemon = fresh.daemon("--link", f"tap:netns={guest.name}", "--config", str(settings), "--dns", str(dns_file))
    guest.udhcpc()
    told = tmp_path / "told.sh"
    told.write_text('#!/bin/sh\necho "search=$search"\n')
    told.chmod(0o755)
    words = ("busybox", "udhcpc", "-i", "eth0", "-n", "-q", "-f", "-O", "search", "-s", str(told))
    assert "search=corp.example" in guest.run(*words).stdout

    def asked(name: str) -> list[str]:
        return sorted(guest.run("dig", "+short", f"@{GATEWAY}", name).stdout.split())

    assert asked("www.corp.example") == ["10.0.0.5"]
    assert asked("any.apps.example") == ["10.0.0.6"]
    settings.write_text("dns:\n  records: {www.corp.example: 10.0.0.8}\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: asked("www.corp.example") == ["10.0.0.8"])
    assert asked("any.apps.example") == []
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_what_guests_ask_leaves_by_the_proxy_too(fresh: World, tmp_path: Path) -> None:
    """The proxy is down: no name, and no question goes around it."""
    require("dnsmasq", "dig", "microsocks")
    guest, office = fresh.namespace(), fresh.namespace("office")
    fresh.host.ip("link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", office.name)
    for place, address in ((fresh.host, HERE), (office, OFFICE)):
        place.ip("addr", "add", f"{address}/30", "dev", "up0")
        place.ip("link", "set", "up0", "up")
    resolver(office, tmp_path, f"{OFFICE}#53", f"www.corp.example/{INTRANET}")
    options = ["--dns-server", OFFICE, "--way-out", "* -> socks5://127.0.0.1:1080"]
    daemon = fresh.daemon("--link", f"tap:netns={guest.name}", *options)
    guest.udhcpc()

    def asked() -> str:
        words = ("dig", "+short", "+tries=1", "+time=6", f"@{GATEWAY}", "www.corp.example")
        return guest.run(*words, check=False).stdout.strip()

    assert asked() == ""
    assert udp_in(office) == 0, "a question went around the proxy"
    fresh.host.start("microsocks", "-i", "127.0.0.1", "-p", "1080")
    wait_until(lambda: asked() == INTRANET)
    assert udp_in(office) == 0
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def udp_in(place: Namespace) -> int:
    """Datagrams that came to a namespace, whether anybody took them or not."""
    names, numbers = (line.split()[1:] for line in place.read("/proc/net/snmp").splitlines() if line.startswith("Udp:"))
    counts = dict(zip(names, map(int, numbers), strict=True))
    return counts["InDatagrams"] + counts["NoPorts"]


def test_a_rule_by_domain_holds_for_the_addresses_that_a_guest_was_told(fresh: World, tmp_path: Path) -> None:
    require("dig", "curl")
    guest = fresh.namespace()
    for address in (HOME, "203.0.113.6"):
        fresh.host.ip("addr", "add", f"{address}/32", "dev", "lo")
    options = ["--dns-record", f"www.corp.example={HOME}", "--dns-record", "www.home.example=203.0.113.6"]
    daemon = fresh.daemon("--link", f"tap:netns={guest.name}", *options, "--way-out", "corp.example -> refuse")
    guest.udhcpc()

    def curl(host: str) -> int:
        """Its exit status: 0 is an answer, 7 a refusal."""
        return guest.run("curl", "-sS", "-o", "/dev/null", f"http://{host}:{port}/10", check=False).returncode

    with web(fresh.host, "0.0.0.0") as port:
        assert curl(HOME) == 0, "nobody has asked for a name yet"
        assert guest.run("dig", "+short", f"@{GATEWAY}", "www.home.example").stdout.strip() == "203.0.113.6"
        assert guest.run("dig", "+short", f"@{GATEWAY}", "www.corp.example").stdout.strip() == HOME
        assert curl(HOME) == 7
        assert curl("203.0.113.6") == 0
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()
