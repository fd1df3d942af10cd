"""Tier 3: another kernel, another driver, and QEMU's end of the socket. The machine is slow, as one without KVM is."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import Site
from tests.support.machine import Machine
from tests.support.netns import GATEWAY, HOST
from tests.support.webhost import MB, content, digest, exactly

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

ADDRESS = "192.168.65.3"
TRANSFER_S = 60.0


@pytest.fixture
def guest(stream_site: Site) -> Machine:
    return stream_site.machine()


def _sum(guest: Machine, path: str) -> str:
    return guest.run(f"sha256sum {path}", limit_s=TRANSFER_S).split()[0]


def _download(guest: Machine, port: int, octets: int) -> None:
    """busybox wget, from the host's loopback."""
    guest.run(f"wget -q -O /tmp/down http://{HOST}:{port}/{octets}", limit_s=TRANSFER_S)
    assert _sum(guest, "/tmp/down") == digest(octets)
    guest.run("rm /tmp/down")


def _upload(guest: Machine, port: int, octets: int) -> None:
    """busybox wget again; it takes what it posts for a text, which ends at a NUL: hence base64, of 3 octets for 4."""
    guest.run(f"head -c {octets * 3 // 4} /dev/urandom | base64 >/tmp/up", limit_s=TRANSFER_S)
    posted = guest.run(f"wget -q -O - --post-file /tmp/up http://{HOST}:{port}/", limit_s=TRANSFER_S)
    assert posted == _sum(guest, "/tmp/up")
    guest.run("rm /tmp/up")


def _ping_and_names(guest: Machine) -> None:
    guest.run(f"ping -c 2 -i 0.2 -W 5 {GATEWAY}")
    guest.run(f"ping -c 1 -s 4000 -W 5 {HOST}")
    answer = guest.run("nslookup host.internal").split("Name:")[1].split()
    assert answer == ["host.internal", "Address:", HOST]


def test_its_lease_at_boot(guest: Machine) -> None:
    assert guest.address == ADDRESS
    assert guest.run("cat /sys/class/net/eth0/mtu") == "1500"
    assert f"default via {GATEWAY} dev eth0" in guest.run("ip route")
    assert f"nameserver {GATEWAY}" in guest.run("cat /etc/resolv.conf").splitlines()


def test_ping_and_names(guest: Machine) -> None:
    _ping_and_names(guest)


def test_a_file_from_the_host(guest: Machine, stream_site: Site) -> None:
    _download(guest, stream_site.port, 32 * MB)


def test_a_file_to_the_host(guest: Machine, stream_site: Site) -> None:
    _upload(guest, stream_site.port, 16 * MB)


def test_a_closed_port_of_the_host_is_refused(guest: Machine, stream_site: Site) -> None:
    with stream_site.host.listen() as listener:
        port = listener.getsockname()[1]
    said = guest.run(f"wget -q -O - http://{HOST}:{port}/", check=False)
    assert "Connection refused" in said


def test_its_web_server_through_a_published_port(guest: Machine, stream_site: Site, tmp_path: Path) -> None:
    """A file from it, and one to it, each way by sha256."""
    guest.run("mkdir -p /www/cgi-bin && head -c 16m /dev/urandom >/www/file", limit_s=TRANSFER_S)
    script = r"#!/bin/sh\nprintf \"Content-Type: text/plain\\r\\n\\r\\n\"\nsha256sum\n"
    guest.run(f'printf "{script}" >/www/cgi-bin/sum && chmod +x /www/cgi-bin/sum')
    guest.run("httpd -h /www -p 80")
    url = "http://127.0.0.1:8080"
    run = stream_site.host.run
    loaded = run("sh", "-c", f"curl -sSf {url}/file | sha256sum", limit_s=TRANSFER_S).stdout
    assert loaded.split()[0] == _sum(guest, "/www/file")
    guest.run("rm /www/file")
    posted = tmp_path / "posted"
    posted.write_bytes(content(16 * MB))
    words = ["curl", "-sSf", "-H", "Expect:", "--data-binary", f"@{posted}", f"{url}/cgi-bin/sum"]
    assert run(*words, limit_s=TRANSFER_S).stdout.split()[0] == digest(16 * MB)
    guest.run("killall httpd")


@contextlib.contextmanager
def _held(guest: Machine, site: Site) -> Iterator[tuple[socket.socket, socket.socket]]:
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
def test_a_reboot(guest: Machine, stream_site: Site, restart: Callable[[Site], None]) -> None:
    """The address stays; what was open before is unknown to the new kernel, which both ends on the host are told."""
    site = stream_site
    with _held(guest, site) as before:
        restart(site)
        again = site.machine()
        assert again.address == ADDRESS
        _ping_and_names(again)
        for sock in before:
            with pytest.raises(ConnectionResetError):
                sock.recv(100)
    site.daemon.wait_descriptors(site.attached)
    _download(again, site.port, 4 * MB)


def test_a_machine_that_sends_datagrams(datagram_site: Site) -> None:
    """QEMU's `-netdev dgram` at the link for vfkit: all that the stream link carries, and again after a power cut."""
    for _ in range(2):
        guest = datagram_site.machine()
        assert guest.address == ADDRESS
        _ping_and_names(guest)
        _download(guest, datagram_site.port, 8 * MB)
        _upload(guest, datagram_site.port, 4 * MB)
        datagram_site.daemon.wait_descriptors(datagram_site.attached)
        datagram_site.power_cut()
