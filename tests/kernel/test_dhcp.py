"""DHCP clients as distributions ship them, with their scripts, on a kernel's interface (D01, D02, F6)."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import pytest

from tests.support.netns import Daemon, Namespace, World, require, udhcpc_script, wait_until

pytestmark = pytest.mark.netns


def _dhclient(guest: Namespace, directory: Path, *options: str) -> str:
    """dhclient as ifupdown runs it, and its script; the address."""
    files = ("-lf", str(directory / "leases"), "-pf", str(directory / "dhclient.pid"))
    guest.run("dhclient", "-v", "-1", *files, *options, "eth0")
    return guest.address()


def _end_dhclient(guest: Namespace, directory: Path) -> None:
    guest.run("dhclient", "-x", "-lf", str(directory / "leases"), "-pf", str(directory / "dhclient.pid"), "eth0")


def _configured(guest: Namespace, mtu: int) -> None:
    assert "default via 192.168.65.1 dev eth0" in guest.ip("route")
    assert f"mtu {mtu}" in guest.ip("link", "show", "dev", "eth0")
    resolv_conf = guest.read("/etc/resolv.conf")
    assert re.search(r"^nameserver 192\.168\.65\.1$", resolv_conf, re.M), resolv_conf
    assert re.search(r"^(domain|search) (corp\.example )?internal", resolv_conf, re.M), resolv_conf


def test_udhcpc_configures_the_interface(fresh: World) -> None:
    """D01 with the script of the distribution; the MTU is the link's, not the interface's default."""
    guest = fresh.namespace()
    fresh.daemon("--link", f"tap:netns={guest.name}", "--mtu", "1400")
    guest.ip("link", "set", "eth0", "mtu", "1500")
    assert guest.udhcpc("-O", "mtu") == "192.168.65.3"
    assert "192.168.65.3/24 brd 192.168.65.255" in guest.ip("-4", "addr", "show", "dev", "eth0")
    _configured(guest, 1400)


def test_udhcpc_is_told_every_option_it_asks_for(fresh: World, tmp_path: Path) -> None:
    guest = fresh.namespace()
    fresh.daemon("--link", f"tap:netns={guest.name}", "--search", "corp.example", "--lease", "3600")
    script = tmp_path / "print"
    script.write_text('#!/bin/sh\n[ "$1" = bound ] && env\nexit 0\n')
    script.chmod(0o755)
    asked = [word for name in ("search", "ntpsrv", "mtu", "domain", "broadcast", "lease") for word in ("-O", name)]
    said = guest.run("busybox", "udhcpc", "-i", "eth0", "-s", str(script), "-n", "-q", "-f", "-T", "1", *asked).stdout
    for line in (
        "ip=192.168.65.3",
        "subnet=255.255.255.0",
        "broadcast=192.168.65.255",
        "router=192.168.65.1",
        "dns=192.168.65.1",
        "ntpsrv=192.168.65.1",
        "mtu=1500",
        "domain=internal",
        "lease=3600",
        "serverid=192.168.65.1",
    ):
        assert line in said.splitlines(), said
    assert re.search(r"^search=.*corp\.example", said, re.M), said


def test_dhclient_configures_the_interface_and_renews(fresh: World, tmp_path: Path) -> None:
    """D01, D02: INIT, then INIT-REBOOT with the stored lease, then a release."""
    require("dhclient")
    guest = fresh.namespace()
    daemon = fresh.daemon("--link", f"tap:netns={guest.name}", "--mtu", "1400", "--search", "corp.example")
    assert _dhclient(guest, tmp_path) == "192.168.65.3"
    _configured(guest, 1400)
    _end_dhclient(guest, tmp_path)
    guest.ip("addr", "flush", "dev", "eth0")
    assert _dhclient(guest, tmp_path) == "192.168.65.3"
    leases = (tmp_path / "leases").read_text()
    assert leases.count("fixed-address 192.168.65.3") == 2, leases
    assert "option ntp-servers 192.168.65.1" in leases
    # It sends its release and ends, and its script takes the address away: what still waits for ARP by then is never sent.
    guest.run("ping", "-c", "1", "192.168.65.1")
    guest.run("dhclient", "-r", "-lf", str(tmp_path / "leases"), "-pf", str(tmp_path / "dhclient.pid"), "eth0")
    daemon.wait_said("INFO lease 192.168.65.3 for ")
    daemon.wait_said("has ended")


def test_a_lease_is_renewed_by_unicast_before_it_ends(fresh: World) -> None:
    """D02: udhcpc asks again when told to (SIGUSR1), directly and with its address as source."""
    guest = fresh.namespace()
    capture = fresh.directory / "renew.pcapng"
    fresh.daemon("--link", f"tap:netns={guest.name}", "--capture", str(capture))
    guest.ip("link", "set", "eth0", "up")
    client = guest.start("busybox", "udhcpc", "-i", "eth0", "-s", str(udhcpc_script()), "-n", "-f", "-T", "1")
    wait_until(lambda: guest.address() == "192.168.65.3")
    client.send_signal(signal.SIGUSR1)
    client.send_signal(signal.SIGUSR1)
    wait_until(lambda: len(_acknowledgements(guest, capture)) >= 2)
    assert _acknowledgements(guest, capture)[-1].split() == ["192.168.65.1", "192.168.65.3", "192.168.65.3"]
    assert guest.address() == "192.168.65.3"


def _acknowledgements(guest: Namespace, capture: Path) -> list[str]:
    """Source, destination and leased address of each DHCPACK so far."""
    fields = [word for name in ("ip.src", "ip.dst", "dhcp.ip.your") for word in ("-e", name)]
    done = guest.run("tshark", "-r", str(capture), "-Y", "dhcp.option.dhcp == 5", "-T", "fields", *fields, check=False)
    return done.stdout.splitlines()


def test_a_lease_outlives_the_daemon(fresh: World) -> None:
    """Another guest asks first after the restart, and is not given what the first one has."""
    first, second = fresh.namespace("a"), fresh.namespace("b")
    options = ("--state-dir", str(fresh.directory / "state"))

    links = [f"tap:netns={guest.name},mac=02:00:00:00:00:0{n}" for n, guest in enumerate((first, second))]

    def start() -> Daemon:
        return fresh.daemon("--link", links[0], "--link", links[1], *options)

    daemon = start()
    assert second.udhcpc() == "192.168.65.3"
    assert daemon.stop() == 0
    daemon = start()
    assert first.udhcpc() == "192.168.65.4"
    assert second.udhcpc() == "192.168.65.3"
    daemon.process.kill()  # not even a clean end is needed, once the file is written
    daemon.process.wait()
    start()
    assert second.udhcpc() == "192.168.65.3"
    assert first.udhcpc() == "192.168.65.4"


@pytest.mark.parametrize("scheme", ["qemu", "unixgram"])
def test_a_guest_that_comes_back_gets_its_address(fresh: World, scheme: str) -> None:
    """F6: the link of a guest ends without a word and is made anew, with another guest there first."""
    link = f"{scheme}:{fresh.socket_path()}"
    fresh.daemon("--link", link)
    first, other = fresh.namespace("a"), fresh.namespace("b")
    relay = fresh.relay(first, link, "--mac", "02:00:00:00:00:01")
    assert first.udhcpc() == "192.168.65.3"
    if scheme == "qemu":
        fresh.relay(other, link, "--mac", "02:00:00:00:00:02")
        assert other.udhcpc() == "192.168.65.4"
    relay.process.kill()
    relay.process.wait()
    fresh.relay(first, link, "--mac", "02:00:00:00:00:01")
    assert first.udhcpc() == "192.168.65.3"
    first.run("ping", "-c", "1", "-W", "5", "192.168.65.1")
    if scheme == "qemu":
        first.run("ping", "-c", "1", "-W", "5", "192.168.65.4")
