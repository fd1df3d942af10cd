"""The real systemd-resolved on a bus of its own in a namespace: a VPN client tells it of a link's servers and domains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESOLVECTL = shutil.which("resolvectl")
DAEMONS = [
    Path("/lib/systemd/systemd-resolved"),
    Path("/usr/lib/systemd/systemd-resolved"),
    *([Path(RESOLVECTL).parents[2] / "lib/systemd/systemd-resolved"] if RESOLVECTL else []),
]
DAEMON = next((path for path in DAEMONS if path.exists()), None)

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts a /run of its own"),
    pytest.mark.skipif(
        not (RESOLVECTL and DAEMON and shutil.which("dbus-daemon") and shutil.which("dnsmasq")),
        reason="expected: systemd-resolved, dbus-daemon or dnsmasq is not installed (the package would replace resolv.conf)",
    ),
]

BUS = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*"/>
<allow receive_sender="*"/><allow own="*"/><allow user="*"/></policy></busconfig>
"""

WORLD = """
mount -t tmpfs none /run
mkdir -p /run/dbus /run/systemd/netif
for file in passwd group; do
    cp /etc/$file {here}/$file
    grep -q ^systemd-resolve: {here}/$file || cat {here}/$file.more >>{here}/$file
    mount --bind {here}/$file /etc/$file
done
mount --bind {here}/resolv.conf "$(realpath /etc/resolv.conf)"
ip link set lo up
ip address add 192.168.1.1/32 dev lo
ip address add 10.8.0.1/32 dev lo
for link in eth0 tun0; do ip link add $link type veth peer name p$link; ip link set p$link up; ip link set $link up; done
ip address add 192.168.1.5/24 dev eth0
ip address add 10.8.0.5/24 dev tun0
trap 'kill $(jobs -p)' EXIT
dbus-daemon --config-file={here}/bus.conf --nofork 2>/dev/null &
until timeout 5 busctl list >/dev/null 2>&1; do sleep 0.05; done
{daemon} 2>{here}/resolved.log &
for server in 192.168.1.1 10.8.0.1; do
    dnsmasq --keep-in-foreground --conf-file=/dev/null --no-hosts --no-resolv --user=root --pid-file= --bind-interfaces \\
        --listen-address=$server --log-queries --log-facility={here}/$server.log --local=/example/ \\
        --address=/www.example/192.0.2.80 $(test $server = 192.168.1.1 || echo --address=/app.corp.example/10.8.0.80) &
done
until timeout 5 resolvectl dns; do sleep 0.1; done >/dev/null 2>&1
resolvectl dns eth0 192.168.1.1
resolvectl domain eth0 lan
{python} {here}/script.py
"""

SCRIPT = """
import asyncio, json, subprocess, time
import netstack
from dns import codec
from dns.follow import HostResolvers
from dns.server import Server
from netstack.api import Endpoint

GUEST = Endpoint.of("192.168.65.3", 40000)

async def main():
    source = HostResolvers()
    source.start(asyncio.get_running_loop())
    server = Server(hosts_path=None, source=source)

    async def rcode(name):
        query = bytes([1, 2, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]) + codec.wire_name(name) + bytes([0, 1, 0, 1])
        answer = asyncio.get_running_loop().create_future()
        server.datagram(query, GUEST, answer.set_result)
        return codec.rcode(await answer)

    async def becomes(condition):
        begin = time.monotonic()
        async with asyncio.timeout(20):
            while not await condition():
                await asyncio.sleep(0.02)
        return time.monotonic() - begin

    async def by_resolved():
        return source.origin == "resolved"

    async def knows():
        return await rcode("app.corp.example") == codec.NOERROR

    async def knows_not():
        return await rcode("app.corp.example") == codec.NXDOMAIN

    found = {"first": await becomes(by_resolved), "before": await becomes(knows_not)}
    for command in ("dns tun0 10.8.0.1", "domain tun0 ~corp.example sub.example"):
        subprocess.run(["resolvectl", *command.split()], check=True, capture_output=True)
    found["up"] = await becomes(knows)
    found["www"] = await rcode("www.example")
    found["search"] = source.search
    found["servers"] = [str(one) + " " + ",".join(map(repr, one.zones)) for one in source().servers]
    subprocess.run(["resolvectl", "revert", "tun0"], check=True)
    found["down"] = await becomes(knows_not)
    found["www after"] = await rcode("www.example")
    found["counters"] = server.counters
    source.close()
    server.close()
    print(json.dumps(found))

asyncio.run(main())
"""


def test_names_of_a_vpn_follow_what_a_vpn_client_tells_resolved(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    (tmp_path / "bus.conf").write_text(BUS)
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "resolv.conf").write_text("nameserver 127.0.0.53\nsearch lan\n")
    (tmp_path / "passwd.more").write_text("systemd-resolve:x:64991:64991::/:/usr/sbin/nologin\n")
    (tmp_path / "group.more").write_text("systemd-resolve:x:64991:\n")
    world = WORLD.format(here=tmp_path, daemon=DAEMON, python=sys.executable)
    done = subprocess.run(
        ("unshare", "--mount", "--net", "--pid", "--fork", "--kill-child", "bash", "-ec", world),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["up"] < 4 and found["down"] < 4  # 2 s, and a loaded machine
    assert found["search"] == ["lan", "sub.example"]
    assert (found["www"], found["www after"]) == (0, 0)
    asked_of_vpn = (tmp_path / "10.8.0.1.log").read_text()
    assert "app.corp.example" in asked_of_vpn and "www.example" not in asked_of_vpn
