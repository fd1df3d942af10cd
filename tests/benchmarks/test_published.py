"""Published ports in the harness: what is counted went through the guest's card, and each guest has ports of its own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import cases, runner
from benchmarks.build import SetupError
from benchmarks.cases import CASES, CaseFailed
from benchmarks.guests import GUESTS
from benchmarks.load import Servers
from benchmarks.published import expose_with_slirp4netns

ROOT = Path(__file__).resolve().parents[2]
OCTETS = 1000


def a_guest(crossing: int) -> Any:
    """Its bulk client reports `OCTETS`, of which so many come over the guest's interface."""
    report = json.dumps({"end": {"sum_received": {"bits_per_second": 8e9, "bytes": OCTETS}}})
    counts = iter((50, 50 + crossing))
    way = SimpleNamespace(
        probe=lambda limit_s: ["echo", "{}"],
        bulk=lambda **_options: ["echo", report],
        crossed=lambda **_options: next(counts),
    )
    return SimpleNamespace(way_in=lambda: way, measured=False)


def test_octets_that_did_not_cross_the_guests_interface_are_no_figure() -> None:
    at = cast(Any, SimpleNamespace(seconds=1.0))
    assert cases.published_tcp(1, up=False)(a_guest(OCTETS), at) == {"gbit_s": 8.0}
    with pytest.raises(CaseFailed, match="only 999 of 1000 octets crossed"):
        cases.published_tcp(1, up=False)(a_guest(OCTETS - 1), at)


def test_who_publishes_takes_part_and_has_ports_of_its_own(tmp_path: Path) -> None:
    taking_part = [name for name, kind in GUESTS.items() if runner.takes_part(kind, CASES["pub_1"])]
    assert taking_part == ["veth", "pasta", "slirp4netns", "slirp4netns-65520", "pyvpnkit-tap", "pyvpnkit-packet"]
    ports = [GUESTS[name](cast(Any, None), tmp_path, name).published for name in taking_part]
    assert len({port for one in ports for port in (one.netload, one.iperf3)}) == 2 * len(taking_part)


@pytest.mark.parametrize(
    ("answer", "refused"), [(b'{"return":{"id":1}}', False), (b'{"error":{"desc":"no"}}', True), (b"", True)]
)
def test_a_port_that_slirp4netns_does_not_publish_is_told(tmp_path: Path, answer: bytes, refused: bool) -> None:
    asked = []
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "api"))
        server.listen()
        server.settimeout(10)

        def serve() -> None:
            for _ in range(1 if refused else 2):
                peer, _ = server.accept()
                with peer, peer.makefile("rb") as stream:
                    asked.append(json.loads(stream.read()))
                    peer.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            if refused:
                with pytest.raises(SetupError, match="did not publish port 7000"):
                    expose_with_slirp4netns(tmp_path / "api", Servers(netload=7000, iperf3=7001))
            else:
                expose_with_slirp4netns(tmp_path / "api", Servers(netload=7000, iperf3=7001))
        finally:
            thread.join()
    assert [one["arguments"]["host_port"] for one in asked] == [7000, 7001][: len(asked)]
    assert {one["execute"] for one in asked} == {"add_hostfwd"}


@pytest.mark.netns
@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
    reason="needs root, iproute2 and /dev/net/tun: kernel guests live in network namespaces with TAP devices",
)
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev")
@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is missing: apt-get install iperf3")
def test_a_short_run_through_published_ports(tmp_path: Path) -> None:
    stored = tmp_path / "run.json"
    options = ["--peers", "veth,pyvpnkit-tap", "--cases", "pub_1,pub_up_4,pub_crr", "--rounds", "1", "--seconds", "0.3"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, "--json", str(stored)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (
        done.stderr
    )  # no requirement can be judged: the peers they are held against are not here
    document = json.loads(stored.read_text())
    assert document["complaints"] == {} and document["left_out"] == {}
    measured = {(one["name"], one["guest"]) for one in document["cases"]}
    for case in ("pub_1.gbit_s", "pub_up_4.gbit_s", "pub_crr.per_s"):
        assert {(case, "veth"), (case, "pyvpnkit-tap")} <= measured
    assert ("pub_1.cpu_s_per_gib", "pyvpnkit-tap") in measured
