"""The ring's guest without a kernel against the real daemon, and the bulk server it talks to."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import runner
from benchmarks.build import build
from benchmarks.cases import CASES, Case, Conditions, Metrics, frames_per_kick
from benchmarks.guest import Guest
from benchmarks.guests import GUESTS
from benchmarks.load import Servers
from benchmarks.processes import end

ROOT = Path(__file__).resolve().parents[2]
HOST = "192.168.65.2"

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev")


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A load server on loopback."""
    server = subprocess.Popen([str(build("netload")), "serve", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield int(json.loads(server.stdout.readline())["port"])
    finally:
        end(server)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a daemon."""
    path = tmp_path_factory.mktemp("ring") / "vm.sock"
    command = [sys.executable, "-m", "pyvpnkit", "run", "--link", f"vhost-user:{path}", "--state-dir", "off"]
    daemon = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            if path.exists():
                break
            assert daemon.poll() is None
            time.sleep(0.01)
        yield path
    finally:
        end(daemon)


def ringload(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [str(build("ringload")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30)


def told(*arguments: object) -> dict[str, float]:
    done = ringload(*arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, float] = json.loads(done.stdout)
    return report


# ---- the guest


@needs_compiler
@pytest.mark.parametrize("streams", [1, 4])
@pytest.mark.parametrize("direction", ["up", "down"])
def test_octets_counted_by_the_server_are_those_that_moved(ring: Path, port: int, direction: str, streams: int) -> None:
    report = told(ring, direction, HOST, port, streams, 0.2)
    assert report["counted"] == report["total"] >= report["octets"] > 10_000_000
    assert report["retransmissions"] == report["out_of_order"] == 0
    assert report["bits_per_second"] == pytest.approx(report["octets"] * 8 / report["seconds"], rel=1e-3)
    assert 0.2 <= report["seconds"] < 5.0
    assert report["frames_out" if direction == "up" else "frames_in"] < report["total"] / 10_000  # many segments each


@needs_compiler
@pytest.mark.parametrize(
    ("direction", "options"),
    [
        pytest.param("up", "--no-event-idx", id="a back-end that is only switched on and off, up"),
        pytest.param("down", "--no-event-idx", id="the same, down"),
        pytest.param("up", "--ring 32 --publish 8", id="a ring that is full at times"),
        pytest.param("up", "--ring 32 --no-tx-calls", id="a full ring asks for its call all the same"),
        pytest.param("down", "--ring 64 --rx-size 2048", id="frames of more buffers"),
        pytest.param("down", "--ring 16 --rx-size 65552", id="frames of one buffer"),
        pytest.param("down", "--window 65536", id="a small window"),
        pytest.param("up", "--copy", id="payload copied, up"),
        pytest.param("down", "--copy", id="payload copied, down"),
    ],
)
def test_a_transfer_is_whole_with_every_kind_of_driver(ring: Path, port: int, direction: str, options: str) -> None:
    report = told(*options.split(), ring, direction, HOST, port, 2, 0.1)
    assert report["counted"] == report["total"] > 1_000_000
    assert report["retransmissions"] == report["out_of_order"] == report["missed_calls"] == 0


@needs_compiler
@pytest.mark.parametrize(("direction", "counter"), [("up", "retransmissions"), ("down", "out_of_order")])
def test_what_is_lost_is_sent_again_and_counted(ring: Path, port: int, direction: str, counter: str) -> None:
    report = told("--lose", 100, ring, direction, HOST, port, 1, 0.5)
    assert report[counter] > 0
    assert report["counted"] == report["total"] > 0


@needs_compiler
@pytest.mark.parametrize("options", [[], ["--ring", "32"], ["--lose", "50"]], ids=["", "full ring", "losses"])
def test_what_arrives_is_what_lies_in_the_guests_memory(ring: Path, options: list[str]) -> None:
    got = bytearray()

    def take() -> None:
        peer, _ = listener.accept()
        with peer:
            while octets := peer.recv(1 << 20):
                got.extend(octets)
            peer.sendall((len(got) - 1).to_bytes(8, "big"))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=take)
        thread.start()
        report = told(*options, ring, "up", HOST, listener.getsockname()[1], 1, 0.1)
        thread.join()
    area = array("I", range(1 << 20)).tobytes()  # 4 MiB, repeated
    assert got[:1] == b"u" and len(got) - 1 == report["total"] > 0
    for at in range(1, len(got), len(area)):
        piece = got[at : at + len(area)]
        assert piece == area[: len(piece)]


@needs_compiler
def test_a_guest_that_was_killed_leaves_nothing_that_stops_the_next(ring: Path, port: int) -> None:
    running = subprocess.Popen([str(build("ringload")), str(ring), "down", HOST, str(port), "2", "60"], text=True)
    time.sleep(0.2)
    running.kill()
    running.wait()
    assert told(ring, "down", HOST, port, 1, 0.1)["total"] > 0


@needs_compiler
@pytest.mark.parametrize("direction", ["up", "down"])
def test_it_sleeps_when_nothing_is_there_and_is_called_for_all_that_comes(
    ring: Path, port: int, direction: str
) -> None:
    report = told(ring, direction, HOST, port, 1, 0.3)
    assert report["sleeps"] > 10 and report["calls_in"] > 10
    assert report["missed_calls"] == 0
    assert report["frames_out"] > report["kicks_out"] > 0


@needs_compiler
@pytest.mark.parametrize(
    "options", ["", "--no-event-idx", "--ring 16"], ids=["", "switched notifications", "small ring"]
)
@pytest.mark.parametrize("connections", [1, 16])
def test_one_octet_after_the_other_and_each_answered(ring: Path, port: int, connections: int, options: str) -> None:
    report = told(*options.split(), "--rx-size", 65552, ring, "rr", HOST, port, connections, 0.3)
    assert report["operations"] > 10 * connections and report["errors"] == 0
    assert report["rate"] == pytest.approx(report["operations"] / report["seconds"], rel=1e-3)
    assert 0.3 <= report["seconds"] < 5.0 and 0 < report["p50_us"] <= report["p99_us"]
    assert report["retransmissions"] == report["out_of_order"] == report["missed_calls"] == 0
    assert report["sleeps"] > 0 and report["frames_out"] >= report["kicks_out"] > 0
    overhead = 10 * (connections + 1)  # ARP, SYN, the ACK of the first answer, FIN
    assert report["operations"] <= report["frames_out"] <= report["operations"] + overhead  # no ACK by itself


@needs_compiler
def test_a_connection_that_the_server_ends_is_an_error(ring: Path) -> None:
    def echo() -> None:
        for _ in range(2):
            peer, _ = listener.accept()
            peers.append(peer)
        for _ in range(5):
            for peer in peers:
                peer.sendall(peer.recv(1))
        peers[0].close()
        while octet := peers[1].recv(1):
            peers[1].sendall(octet)
        peers[1].close()

    peers: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        thread = threading.Thread(target=echo)
        thread.start()
        report = told(ring, "rr", HOST, listener.getsockname()[1], 2, 0.2)
        thread.join()
    assert report["errors"] == 1 and report["operations"] >= 8


@needs_compiler
def test_it_says_that_nobody_listens(ring: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        done = ringload(ring, "up", HOST, unused.getsockname()[1], 1, 0.1)
    assert done.returncode == 1 and done.stderr == "ringload: the connection was refused\n"


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        pytest.param("SOCKET up 192.0.2.1 5000 1", "usage: ringload", id="an argument is missing"),
        pytest.param("SOCKET across 192.0.2.1 5000 1 1", "up, down or rr, not across", id="direction"),
        pytest.param("SOCKET up example.com 5000 1 1", "must be IPv4, not example.com", id="address"),
        pytest.param("SOCKET up 192.0.2.1 0 1 1", "PORT must be a number from 1 to 65535", id="port"),
        pytest.param("SOCKET up 192.0.2.1 5000 65 1", "STREAMS must be a number from 1 to 64", id="streams"),
        pytest.param("SOCKET up 192.0.2.1 5000 1 1s", "SECONDS must be a number", id="seconds"),
        pytest.param("SOCKET up 192.0.2.1 5000 1 nan", "SECONDS must be a number", id="seconds that are none"),
        pytest.param("--ring 48 SOCKET up 192.0.2.1 5000 1 1", "power of two, not 48", id="ring"),
        pytest.param("--rx-size 2049 SOCKET up 192.0.2.1 5000 1 1", "even, not 2049", id="buffers"),
        pytest.param("--speed 1 SOCKET up 192.0.2.1 5000 1 1", "unrecognized option", id="unknown option"),
    ],
)
def test_wrong_arguments_are_named(arguments: str, complaint: str) -> None:
    done = ringload(*arguments.split())
    assert done.returncode == 2 and complaint in done.stderr


# ---- the server


@needs_compiler
def test_the_sink_counts_what_it_got(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as peer:
        peer.sendall(b"u" + bytes(300_000))
        peer.shutdown(socket.SHUT_WR)
        assert int.from_bytes(everything(peer), "big") == 300_000


@needs_compiler
def test_the_source_goes_on_until_the_client_has_no_more_to_say(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as peer:
        peer.sendall(b"d")
        begun = len(peer.recv(100_000))
        peer.shutdown(socket.SHUT_WR)
        rest = everything(peer)
    assert int.from_bytes(rest[-8:], "big") == begun + len(rest) - 8 > 0


def everything(peer: socket.socket) -> bytes:
    with peer.makefile("rb") as stream:
        return stream.read()


# ---- the harness


class Unreal(Guest):
    """A guest that runs nothing but TCP over connections that stay."""

    name = "unreal"
    server = resolver = ""
    only_lasting = True

    def make_namespace(self) -> None: ...

    def launch(self, *, bare: bool = False) -> None: ...

    def attach(self) -> None: ...

    def probe(self, servers: Servers, limit_s: float) -> list[str]:
        return ["echo", "{}"]


def test_a_guest_of_lasting_connections_is_left_out_of_all_else(tmp_path: Path) -> None:
    def run(guest: Guest, at: Conditions) -> Metrics:
        return {"gbit_s": 1.0}

    cases = [
        Case(name="bulk", run=run, lasting=True, help=""),
        Case(name="other", run=run, help=""),
        Case(name="begun anew", run=run, fresh=True, needs_backend=True, help=""),
    ]
    at = Conditions(
        host=cast(Any, SimpleNamespace()), directory=tmp_path, seconds=1, servers=Servers(netload=1, iperf3=2)
    )
    outcome = runner.Outcome()
    runner.measure(outcome, cases, [Unreal], 1, at, lambda _: None)
    assert outcome.runs == {"bulk": {"unreal": [{"gbit_s": 1.0}]}}
    assert not outcome.unavailable and not outcome.complaints


@needs_compiler
def test_the_same_case_is_iperf3_in_a_kernel_guest_and_ringload_behind_the_ring(tmp_path: Path) -> None:
    servers = Servers(netload=5000, iperf3=5201)
    host = cast(Any, SimpleNamespace(path="/run/netns/host"))
    kernel, ring = (GUESTS[name](host, tmp_path, name) for name in ("loopback", "pyvpnkit-ring-tcp"))
    told = kernel.bulk(servers, streams=4, down=True, seconds=2.0)
    assert told[3:8] == ["iperf3", "-c", "127.0.0.1", "-p", "5201"] and told[-1] == "-R"
    command = ring.bulk(servers, streams=4, down=True, seconds=2.0)
    assert command[1:] == [str(tmp_path / "pyvpnkit-ring-tcp.sock"), "down", HOST, "5000", "4", "2.0"]
    report = {"bits_per_second": 8e9, "octets": 10, "total": 12, "frames_out": 64, "kicks_out": 4}
    moved = ring.moved(report)
    assert moved.bits_per_second == 8e9 and moved.octets == 12
    assert frames_per_kick(ring.counted(report)) == {"frames_per_kick": 16}
    assert frames_per_kick(kernel.counted(report)) == {}


@needs_compiler
def test_round_trips_are_netloads_in_a_kernel_guest_and_ringloads_behind_the_ring(tmp_path: Path) -> None:
    servers = Servers(netload=5000, iperf3=5201)
    host = cast(Any, SimpleNamespace(path="/run/netns/host"))
    kernel, ring = (GUESTS[name](host, tmp_path, name) for name in ("loopback", "pyvpnkit-ring-tcp"))
    told = kernel.operations("rr", servers, connections=16, seconds=2.0)
    assert told[-5:] == ["rr", "127.0.0.1", "5000", "16", "2.0"]
    command = ring.operations("rr", servers, connections=16, seconds=2.0)
    assert command[1:] == [str(tmp_path / "pyvpnkit-ring-tcp.sock"), "rr", HOST, "5000", "16", "2.0"]
    assert [name for name, case in CASES.items() if runner.takes_part(type(ring), case)] == [
        *(f"tcp_{direction}_{streams}" for direction in ("up", "down") for streams in (1, 4)),
        "rr_1",
        "rr_16",
    ]
