"""gvproxy's API with a kernel and the programs of people on both sides (spec gvproxy 10): podman's way out of a machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World
from tests.support.webhost import MB, digest, web

pytestmark = pytest.mark.netns

URL = f"http://{GATEWAY}/services/forwarder"


@dataclass(frozen=True)
class Net:
    """A guest on a TAP, and the host, where the API is at a path."""

    host: Namespace
    guest: Namespace
    api: Path
    daemon: Daemon

    def ask(self, path: str, body: Any = None, *, guest: bool = False) -> tuple[int, str]:
        """Status and text of an answer to curl: on the host by the socket, in the guest by the gateway."""
        words = ["curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}"]
        if body is not None:
            words += ["-d", json.dumps(body)]
        where = [f"http://{GATEWAY}{path}"] if guest else ["--unix-socket", str(self.api), f"http://gvproxy{path}"]
        said = (self.guest if guest else self.host).run(*words, *where).stdout
        text, _, status = said.rpartition("\n")
        return int(status), text


@pytest.fixture(scope="module")
def net(shared: World) -> Iterator[Net]:
    guest = shared.namespace()
    api = shared.directory / "api.sock"
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", "--control-listen", f"unix:{api}", "--guest-api", "on")
    assert guest.udhcpc() == "192.168.65.3"
    yield Net(shared.host, guest, api, daemon)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_a_program_in_the_guest_publishes_a_port_of_the_guest(net: Net) -> None:
    """As podman in a machine does: `:PORT` is the guest itself; the host loads through it until it is unexposed."""
    wanted = {"local": "127.0.0.1:8080", "remote": ":80", "protocol": "tcp"}
    assert net.ask("/services/forwarder/expose", wanted, guest=True) == (200, "")
    with web(net.guest, "0.0.0.0", 80):
        done = net.host.run(
            "sh", "-c", f"curl -sS --max-time 60 http://127.0.0.1:8080/{10 * MB} | sha256sum", limit_s=70
        )
        assert done.stdout.split()[0] == digest(10 * MB)
    again = net.ask("/services/forwarder/expose", wanted, guest=True)
    assert again == (500, "proxy already running for tcp on 127.0.0.1:8080\n")
    listed = '[{"local":"127.0.0.1:8080","remote":"192.168.65.3:80","protocol":"tcp"}]\n'
    assert net.ask("/services/forwarder/all", guest=True) == (200, listed)
    assert net.ask("/services/forwarder/all") == (200, listed)
    assert net.ask("/services/forwarder/unexpose", {"local": "127.0.0.1:8080"}, guest=True) == (200, "")
    refused = net.host.run("curl", "-sS", "--max-time", "10", "http://127.0.0.1:8080/", check=False)
    assert refused.returncode == 7, refused.stderr  # CURLE_COULDNT_CONNECT


def test_a_guest_does_not_see_what_the_host_made(net: Net) -> None:
    wanted = {"local": "127.0.0.1:8081", "remote": "192.168.65.3:80"}
    assert net.ask("/services/forwarder/expose", wanted) == (200, "")
    assert net.ask("/services/forwarder/all", guest=True) == (200, "[]\n")
    assert net.ask("/services/forwarder/unexpose", {"local": "127.0.0.1:8081"}, guest=True) == (
        500,
        "proxy not found\n",
    )
    assert net.ask("/services/dns/all", guest=True) == (404, "404 page not found\n")
    assert net.ask("/services/forwarder/unexpose", {"local": "127.0.0.1:8081"}) == (200, "")


def test_names_of_a_zone_that_was_added_resolve_in_the_guest(net: Net) -> None:
    """gvproxy's assertions: a zone added, a record overridden, a default address."""

    def short(name: str, *more: str) -> list[str]:
        return net.guest.run("dig", "+short", "+tries=2", *more, name).stdout.split()

    def add(name: str, ip: str, default: str = "") -> None:
        zone = {"Name": "dynamic.testing.", "Records": [{"Name": name, "IP": ip}], "DefaultIP": default}
        assert net.ask("/services/dns/add", zone) == (200, "")

    add("host", "192.168.127.254")
    assert short("host.dynamic.testing") == ["192.168.127.254"]
    add("host", "192.168.127.253")
    assert short("host.dynamic.testing") == ["192.168.127.253"]
    assert "status: NXDOMAIN" in net.guest.run("dig", "+tries=2", "other.dynamic.testing").stdout
    add("x", "192.168.127.1", default="192.168.127.252")
    assert short("other.dynamic.testing") == ["192.168.127.252"]
    assert "status: NOERROR" in net.guest.run("dig", "+tries=2", "host.dynamic.testing", "AAAA").stdout


def test_leases_and_the_switch_know_the_guest(net: Net) -> None:
    words = net.guest.ip("-o", "link", "show", "dev", "eth0").split()
    mac = words[words.index("link/ether") + 1]
    status, leases = net.ask("/services/dhcp/leases")
    assert status == 200 and json.loads(leases)["192.168.65.3"] == mac
    assert mac in json.loads(net.ask("/cam")[1])
    stats = json.loads(net.ask("/stats")[1])
    assert stats["BytesSent"] > 0 and stats["BytesReceived"] > 0


def test_lima_waits_for_a_port(net: Net) -> None:
    status, said = net.ask("/extension/wait_port?ip=192.168.65.3&port=2222&timeout=1")
    assert (status, said) == (408, "192.168.65.3:2222 did not accept a connection within 1 s\n")
    with web(net.guest, "0.0.0.0", 2222):
        assert net.ask("/extension/wait_port?ip=192.168.65.3&port=2222&timeout=15") == (200, "")
