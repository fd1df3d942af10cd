"""A machine of QEMU behind `gvproxy`, started as podman machine starts it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from pyvpnkit import machine as qemu
from pyvpnkit.boot import Parts
from tests.qemu.site import TRANSFER_S, sum_of
from tests.support.machine import Machine
from tests.support.netns import LIMIT_S, wait_until, world
from tests.support.vpnkit_program import program
from tests.support.webhost import MB, digest, web

pytestmark = [pytest.mark.qemu, pytest.mark.netns]

EXPOSE = "http://gateway.containers.internal/services/forwarder/expose"
MAC = "5a:94:ef:e4:0c:ee"


def test_its_address_its_names_its_own_port_and_the_end_with_it(parts: Parts, tmp_path: Path) -> None:
    sock, log, pid = tmp_path / "q", tmp_path / "log", tmp_path / "pid"
    with world(tmp_path) as place, web(place.host) as port, contextlib.ExitStack() as ends:
        words = ("-mtu", "1500", "-ssh-port", "20022", "-listen-qemu", f"unix://{sock}", "-pid-file", str(pid))
        gvproxy = place.host.start(program(tmp_path, "gvproxy"), *words, "-log-file", str(log))
        ends.callback(gvproxy.wait)
        ends.callback(gvproxy.kill)
        wait_until(lambda: log.exists() and " ready" in log.read_text(), why=lambda: str(gvproxy.poll()))
        guest = Machine(place.namespace("qemu"), parts, qemu.stream(str(sock)), mac=MAC)
        ends.callback(guest.kill)
        assert guest.address == "192.168.127.2"
        guest.run(f"wget -q -O /tmp/down http://host.containers.internal:{port}/{16 * MB}", limit_s=TRANSFER_S)
        assert sum_of(guest, "/tmp/down") == digest(16 * MB)
        guest.run("mkdir -p /www && echo from the guest >/www/index.html && httpd -h /www -p 80")
        asked = '{"local": "0.0.0.0:8080", "remote": ":80", "protocol": "tcp"}'
        guest.run(f"wget -q -O - --post-data '{asked}' {EXPOSE}")
        assert place.host.run("curl", "-sSf", "http://127.0.0.1:8080/").stdout == "from the guest\n"
        guest.kill()
        assert gvproxy.wait(LIMIT_S) == 0, log.read_text()
        assert not pid.exists()
        assert "Traceback" not in log.read_text()
