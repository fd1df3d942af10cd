"""The harness with kernel guests: frames through the bridge, and a whole short run that leaves nothing behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import namespaces
from benchmarks.build import build
from benchmarks.namespaces import Namespace
from benchmarks.processes import end

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.netns,
    pytest.mark.skipif(
        os.geteuid() != 0 or not os.path.exists("/dev/net/tun") or shutil.which("ip") is None,
        reason="needs root, iproute2 and /dev/net/tun: kernel guests live in network namespaces with TAP devices",
    ),
    pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev"),
]


def left_behind() -> list[str]:
    return [path.name for place in ("/run/netns", "/etc/netns") for path in Path(place).glob("pvkbench*")]


@pytest.fixture
def guest() -> Iterator[Namespace]:
    namespace = Namespace(f"test{os.urandom(2).hex()}")
    try:
        yield namespace
    finally:
        namespace.delete()


def frames(peer: socket.socket) -> Iterator[bytes]:
    with peer.makefile("rb") as stream:
        while head := stream.read(4):
            yield stream.read(struct.unpack("!I", head)[0])


@pytest.mark.parametrize(("mtu", "octets"), [(1500, 1400), (65520, 60000)])
def test_the_bridge_carries_frames_both_ways_behind_their_length(
    guest: Namespace, tmp_path: Path, mtu: int, octets: int
) -> None:
    """A UDP datagram of the guest is answered by swapping its addresses; the guest's socket gets it back."""
    path = tmp_path / "net.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        server.settimeout(10)
        bridge = subprocess.Popen(guest.inside(str(build("framebridge")), "eth0", str(mtu), str(path)), text=True)
        try:
            peer, _ = server.accept()
            peer.settimeout(10)
            while not guest.has("eth0"):
                assert bridge.poll() is None
            guest.configure("eth0", "192.0.2.3/24", "192.0.2.1")
            guest.ip("neighbour", "add", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "eth0")
            script = (
                "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(10);"
                f"s.sendto(b'x' * {octets}, ('192.0.2.1', 7)); print(len(s.recv(65536)))"
            )
            asking = subprocess.Popen(guest.inside(sys.executable, "-c", script), stdout=subprocess.PIPE, text=True)
            with peer:
                for frame in frames(peer):
                    if frame[12:14] == b"\x08\x00" and frame[23] == 17 and frame[36:38] == b"\0\7":
                        assert len(frame) == 14 + 28 + octets
                        swapped = frame[6:12] + frame[:6] + frame[12:26] + frame[30:34] + frame[26:30]
                        ports = frame[36:38] + frame[34:36]  # swapping addresses and ports leaves every checksum right
                        answer = swapped + ports + frame[38:]
                        peer.sendall(struct.pack("!I", len(answer)) + answer)
                        break
                out, _ = asking.communicate(timeout=10)
            assert out.strip() == str(octets)
            assert bridge.wait(10) == 0  # the stream ended
        finally:
            end(bridge)


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is missing: apt-get install iperf3")
def test_a_short_run_prints_its_table_and_leaves_no_namespace(tmp_path: Path) -> None:
    before = set(left_behind())
    stored = tmp_path / "run.json"
    options = ["--peers", "loopback,veth", "--cases", "rr_1,dns", "--rounds", "1", "--seconds", "0.3"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *options, "--json", str(stored)],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rr_1  1/s" in done.stdout and f"Python {sys.version.split()[0]}" in done.stdout
    document = json.loads(stored.read_text())
    assert {(one["name"], one["guest"]) for one in document["cases"] if one["name"].endswith("per_s")} == {
        (f"{case}.per_s", guest) for case in ("rr_1", "dns") for guest in ("loopback", "veth")
    }
    assert document["complaints"] == {}
    assert set(left_behind()) <= before


@pytest.mark.skipif(shutil.which("iperf3") is None, reason="iperf3 is missing: apt-get install iperf3")
def test_an_interrupted_run_reports_what_it_has_and_cleans_up() -> None:
    options = ["--peers", "veth", "--cases", "rr_1", "--rounds", "1000", "--seconds", "0.2"]
    running = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert running.stderr is not None
    try:
        for line in running.stderr:
            if line.startswith("rr_1 2/"):
                break
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=30)
    finally:
        end(running)
    assert running.returncode == 2
    assert "rr_1  1/s" in out
    assert not [name for name in left_behind() if name.startswith(f"pvkbench{running.pid}-")]


def test_namespaces_of_a_killed_run_are_removed_by_the_next() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    name = f"pvkbench{ended.pid}-veth"
    namespaces.run("ip", "netns", "add", name)
    mine = Namespace("kept")
    try:
        namespaces.remove_stale()
        assert name not in left_behind()
        assert mine.name in left_behind()
    finally:
        mine.delete()
