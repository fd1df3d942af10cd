"""Several resolvers behind the daemon, one of them dead, as a guest sees them (F12, Q06)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.netns import GATEWAY, Daemon, Namespace, World, require, wait_until

pytestmark = pytest.mark.netns

LOOKUPS = """
import json, os, socket, struct, sys, time
names = json.loads(sys.argv[1])
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.connect((sys.argv[2], 53))
sock.settimeout(10)
began = time.monotonic()
for number, name in enumerate(names):
    wire = b"".join(bytes([len(label)]) + label.encode() for label in name.split(".")) + b"\\0"
    sock.send(struct.pack("!6H", number, 0x100, 1, 0, 0, 0) + wire + b"\\0\\1\\0\\1")
found = {}
while len(found) < len(names):
    message = sock.recv(4096)
    found[message[0] << 8 | message[1]] = [message[3] & 15, socket.inet_ntoa(message[-4:])]
print(json.dumps({"took_s": time.monotonic() - began, "found": list(found.values())}))
"""


@dataclass(frozen=True)
class Site:
    """A guest whose host has a dead resolver and a live one, and a third for `corp.example`."""

    guest: Namespace
    daemon: Daemon

    def look_up(self, *names: str) -> dict[str, object]:
        said = self.guest.run(sys.executable, "-c", LOOKUPS, json.dumps(names), GATEWAY)
        made: dict[str, object] = json.loads(said.stdout)
        return made


@pytest.fixture(scope="module", params=["together", "in turn"])
def site(request: pytest.FixtureRequest, shared: World) -> Iterator[Site]:
    require("dnsmasq", "dig")
    host = shared.host
    for address, record in (
        ("127.0.0.21", "--address=/example/203.0.113.5"),
        ("127.0.0.22", "--address=/corp.example/10.8.0.5"),
    ):
        words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root"]
        words += ["--pid-file", f"--listen-address={address}", "--bind-interfaces", "--local-ttl=60", record]
        host.start(*words)
    dead = host.datagrams("127.0.0.20", 53)
    order = 0 if request.param == "together" else 1
    path = shared.directory / f"dns-{order}"
    path.write_text(
        f"nameserver 127.0.0.20\nnameserver 127.0.0.21\norder {order}\nnameserver 127.0.0.22\nzone corp.example\n"
    )
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", "--dns-resolvers", "file", "--dns-file", str(path))
    guest.udhcpc()
    wait_until(lambda: "10.8.0.5" in guest.run("dig", "+short", "wiki.corp.example", check=False).stdout)
    yield Site(guest, daemon)
    dead.close()
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def test_128_lookups_at_once_beside_a_dead_resolver_take_less_than_two_seconds(site: Site) -> None:  # F12
    said = site.look_up(*(f"n{n}.example" for n in range(128)))
    assert said["found"] == [[0, "203.0.113.5"]] * 128
    assert isinstance(said["took_s"], float) and said["took_s"] < 2.0


def test_a_zone_has_its_own_resolver_over_udp_and_tcp(site: Site) -> None:  # Q03
    for over in ("+notcp", "+tcp"):
        assert site.guest.run("dig", "+short", over, "a.corp.example").stdout == "10.8.0.5\n"
        assert site.guest.run("dig", "+short", over, "b.example").stdout == "203.0.113.5\n"
