"""Tier 3: another kernel, another driver, and QEMU's end of the socket. The machine is slow, as one without KVM is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.qemu.site import ADDRESS, TRANSFER_S, Site, download, held, ping_and_names, sum_of, upload
from tests.support.machine import Machine
from tests.support.netns import GATEWAY, HOST
from tests.support.webhost import MB, content, digest

pytestmark = [pytest.mark.qemu, pytest.mark.netns]


@pytest.fixture
def guest(any_site: Site) -> Machine:
    return any_site.machine()


def test_its_lease_at_boot(guest: Machine) -> None:
    assert guest.address == ADDRESS
    assert guest.run("cat /sys/class/net/eth0/mtu") == "1500"
    assert f"default via {GATEWAY} dev eth0" in guest.run("ip route")
    assert f"nameserver {GATEWAY}" in guest.run("cat /etc/resolv.conf").splitlines()


def test_ping_and_names(guest: Machine) -> None:
    ping_and_names(guest)


def test_a_file_from_the_host(guest: Machine, any_site: Site) -> None:
    download(guest, any_site.port, 32 * MB)


def test_a_file_to_the_host(guest: Machine, any_site: Site) -> None:
    upload(guest, any_site.port, 16 * MB)


def test_a_closed_port_of_the_host_is_refused(guest: Machine, any_site: Site) -> None:
    with any_site.host.listen() as listener:
        port = listener.getsockname()[1]
    said = guest.run(f"wget -q -O - http://{HOST}:{port}/", check=False)
    assert "Connection refused" in said


def test_its_web_server_through_a_published_port(guest: Machine, any_site: Site, tmp_path: Path) -> None:
    """A file from it, and one to it, each way by sha256."""
    guest.run("mkdir -p /www/cgi-bin && head -c 16m /dev/urandom >/www/file", limit_s=TRANSFER_S)
    script = r"#!/bin/sh\nprintf \"Content-Type: text/plain\\r\\n\\r\\n\"\nsha256sum\n"
    guest.run(f'printf "{script}" >/www/cgi-bin/sum && chmod +x /www/cgi-bin/sum')
    guest.run("httpd -h /www -p 80")
    url = "http://127.0.0.1:8080"
    run = any_site.host.run
    loaded = run("sh", "-c", f"curl -sSf {url}/file | sha256sum", limit_s=TRANSFER_S).stdout
    assert loaded.split()[0] == sum_of(guest, "/www/file")
    guest.run("rm /www/file")
    posted = tmp_path / "posted"
    posted.write_bytes(content(16 * MB))
    words = ["curl", "-sSf", "-H", "Expect:", "--data-binary", f"@{posted}", f"{url}/cgi-bin/sum"]
    assert run(*words, limit_s=TRANSFER_S).stdout.split()[0] == digest(16 * MB)
    guest.run("killall httpd")


def _reset_by_itself(site: Site) -> None:
    """It goes through its firmware and boots; to the link this is a silence of seconds."""
    site.machine().send("reboot -f")
    site.machine().wait_up()


def _killed_and_started(site: Site) -> None:
    """The link is closed without a word, and another connection is accepted."""
    site.power_cut()
    # The link, and of the two connections what the daemon keeps for a guest that may come back.
    site.daemon.wait_descriptors(site.idle + 2)
    site.machine()


@pytest.mark.parametrize("restart", [_reset_by_itself, _killed_and_started])
def test_a_reboot(guest: Machine, any_site: Site, restart: Callable[[Site], None]) -> None:
    """The address stays; what was open before is unknown to the new kernel, which both ends on the host are told."""
    site = any_site
    with held(guest, site) as before:
        restart(site)
        again = site.machine()
        assert again.address == ADDRESS
        ping_and_names(again)
        for sock in before:
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
    site.daemon.wait_descriptors(site.attached)
    download(again, site.port, 4 * MB)


def test_a_machine_that_sends_datagrams(datagram_site: Site) -> None:
    """QEMU's `-netdev dgram` at the link for vfkit: all that the stream link carries, and again after a power cut."""
    for _ in range(2):
        guest = datagram_site.machine()
        assert guest.address == ADDRESS
        ping_and_names(guest)
        download(guest, datagram_site.port, 8 * MB)
        upload(guest, datagram_site.port, 4 * MB)
        datagram_site.daemon.wait_descriptors(datagram_site.attached)
        datagram_site.power_cut()
