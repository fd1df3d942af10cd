"""The benchmarks' own arithmetic, and a short turn of its native programs over loopback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import machine, micro, report, runner
from benchmarks.build import SetupError, build
from benchmarks.processes import cpu_seconds, end, tree, tree_cpu_seconds, tree_rss_mib
from benchmarks.report import Requirement, Status

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev")


def runs(**guests: float) -> report.Runs:
    return {"tcp_up_1": {name.replace("_", "-"): [{"gbit_s": value}] for name, value in guests.items()}}


# ---- arithmetic


def test_the_median_is_taken_over_the_rounds_that_gave_the_metric() -> None:
    measured = {"rr_16": {"pasta": [{"per_s": 30.0}, {"per_s": 10.0}, {}, {"per_s": 20.0}]}}
    assert report.median_of(measured, "rr_16", "pasta", "per_s") == 20.0
    assert report.median_of(measured, "rr_16", "veth", "per_s") is None


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [(9.0, 10.0, Status.PASS), (8.99, 10.0, Status.FAIL), (9.0, None, Status.NOT_MEASURED)],
)
def test_a_requirement_is_a_ratio_of_medians_of_the_same_run(ours: float, theirs: float | None, status: Status) -> None:
    required = Requirement(guest="ours", case="tcp_up_1", metric="gbit_s", at_least=0.9, reference="peer")
    measured = runs(ours=ours) if theirs is None else runs(ours=ours, peer=theirs)
    [verdict] = report.judge(measured, [required])
    assert verdict.status is status
    assert verdict.bound == (None if theirs is None else pytest.approx(9.0))


def test_a_guest_of_ours_that_gave_no_figure_fails_its_requirement() -> None:
    required = Requirement(guest="ours", case="tcp_up_1", metric="gbit_s", at_least=1.0)
    [verdict] = report.judge({"tcp_up_1": {"ours": []}}, [required])
    assert verdict.status is Status.FAIL


def test_a_requirement_of_a_case_that_was_not_run_is_not_judged() -> None:
    assert report.judge(runs(veth=20.0)) == []


@pytest.mark.parametrize(("veth", "status"), [(19.9, Status.NOT_APPLICABLE), (20.0, Status.FAIL)])
def test_absolute_figures_are_required_only_where_veth_is_fast(veth: float, status: Status) -> None:
    required = Requirement(guest="ours", case="tcp_up_1", metric="gbit_s", at_least=6.0, where_veth_is_fast=True)
    [verdict] = report.judge(runs(ours=5.0, veth=veth), [required])
    assert verdict.status is status


def test_an_upper_bound_is_met_at_the_bound() -> None:
    measured = {"idle": {"pyvpnkit-tap": [{"rss_mib": 60.0, "cpu_pct": 0.0}]}}
    assert {one.status for one in report.judge(measured)} == {Status.PASS}


def test_every_required_metric_has_a_unit_and_a_case() -> None:
    from benchmarks.cases import CASES
    from benchmarks.guests import GUESTS

    for one in report.REQUIREMENTS:
        assert one.metric in report.UNITS
        assert one.case in CASES
        assert one.guest in GUESTS and (one.reference is None or one.reference in GUESTS)


def test_records_carry_unit_runs_and_ratios_to_the_references() -> None:
    measured = {"tcp_up_1": {"veth": [{"gbit_s": 20.0}], "pyvpnkit-tap": [{"gbit_s": 12.0}, {"gbit_s": 8.0}]}}
    veth, ours = report.records(measured)
    assert veth["ratios"] == {}
    assert ours == {
        "name": "tcp_up_1.gbit_s",
        "guest": "pyvpnkit-tap",
        "unit": "Gbit/s",
        "median": 10.0,
        "runs": [12.0, 8.0],
        "ratios": {"veth": 0.5},
    }


def test_the_tables_show_medians_ratios_and_verdicts() -> None:
    measured = runs(veth=20.0, pyvpnkit_tap=5.0)
    guests = ["veth", "pyvpnkit-tap"]
    table = report.main_table(measured, guests).splitlines()
    assert table[0].split() == ["pyvpnkit"] and table[1].split() == ["median", "veth", "tap"]  # heads break at a dash
    assert table[-1].split() == ["tcp_up_1", "Gbit/s", "20.00", "5.00"]
    assert "0.25" in report.ratio_table(measured, guests)
    assert report.main_table(measured, ["pyvpnkit-vm"]) == ""
    verdicts = report.verdict_table(report.judge(measured))
    assert ">= 0.4 x veth" in verdicts and "8.00" in verdicts and "FAIL" in verdicts
    assert report.verdict_table([]) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (123456.7, "123,457"), (9.876, "9.88"), (0.0421, "0.042")]
)
def test_figures_have_about_three_digits(value: float | None, text: str) -> None:
    assert report.figure(value) == text


def test_a_baseline_gives_ratios_for_the_names_it_has() -> None:
    now = [{"name": "a", "median": 20.0, "unit": "ns"}, {"name": "b", "median": 1.0, "unit": "ns"}]
    compared = report.against_baseline(now, [{"name": "a", "median": 10.0}])
    assert [line.get("ratio_to_baseline") for line in compared] == [2.0, None]
    assert "2.00" in report.baseline_table(compared)
    assert report.baseline_table(now) == ""


def test_the_machine_is_described_with_the_interpreters_build() -> None:
    about = machine.describe()
    assert about["interpreter"]["pgo"] in (True, False, None)
    assert about["interpreter"]["version"].split()[0] in machine.text(about)
    assert about["kernel"] in machine.text(about)


# ---- micro


def test_micro_stores_lines_and_compares_with_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = tmp_path / "base.jsonl"
    assert micro.main(["--cases", "ethernet.parse", "--runs", "1", "--store", str(stored)]) == 0
    [line] = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert line["name"] == "ethernet.parse" and line["unit"] == "ns" and line["median"] > 0
    assert runner.load(stored) == [line]
    assert micro.main(["--cases", "ethernet.parse", "--runs", "1", "--baseline", str(stored)]) == 0
    assert json.loads(capsys.readouterr().out)["ratio_to_baseline"] > 0


def test_micro_refuses_a_baseline_of_another_machine(tmp_path: Path) -> None:
    stored = tmp_path / "base.jsonl"
    stored.write_text(json.dumps({"name": "ethernet.parse", "median": 1.0, "machine": "another"}) + "\n")
    assert micro.main(["--baseline", str(stored), "--cases", "none"]) == 2


def test_every_micro_case_runs() -> None:
    for operation, counts in micro.cases().values():
        operation()
        assert counts >= 1


# ---- processes


def test_cpu_and_memory_are_those_of_the_whole_tree() -> None:
    script = "while :; do :; done & sleep 30"  # the load is a child's
    parent = subprocess.Popen(["sh", "-c", script], text=True, start_new_session=True)
    try:
        for _ in range(1000):
            if len(tree(parent.pid)) == 3 and tree_cpu_seconds(parent.pid).total >= 0.02:
                break
            os.sched_yield()
            threading.Event().wait(0.01)
        else:
            pytest.fail(f"the tree is {tree(parent.pid)}")
        assert cpu_seconds(parent.pid).total < tree_cpu_seconds(parent.pid).total
        assert tree_rss_mib(parent.pid) > 0
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()
    with pytest.raises(ProcessLookupError):
        cpu_seconds(parent.pid)


# ---- native programs


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.build.NATIVE", tmp_path)
    (tmp_path / "netload.c").write_text("int main(void) { return 0; }\n")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(SetupError, match="apt-get install gcc"):
        build("netload")


@pytest.fixture
def port() -> Iterator[int]:
    """A load server on loopback."""
    server = subprocess.Popen([str(build("netload")), "serve", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        yield int(json.loads(server.stdout.readline())["port"])
    finally:
        end(server)


def netload(verb: str, port: int, *arguments: object) -> dict[str, float]:
    command = [str(build("netload")), verb, "127.0.0.1", str(port), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL, check=True)
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return report


@needs_compiler
@pytest.mark.parametrize(("verb", "connections"), [("rr", 1), ("rr", 16), ("crr", 4)])
def test_request_response_over_loopback(port: int, verb: str, connections: int) -> None:
    result = netload(verb, port, connections, 0.3)
    assert result["operations"] > 100 and result["errors"] == 0
    assert 0 < result["p50_us"] <= result["p99_us"]


@needs_compiler
@pytest.mark.parametrize("verb", ["udp-up", "udp-down"])
def test_a_paced_datagram_stream_arrives_whole_at_its_rate(port: int, verb: str) -> None:
    result = netload(verb, port, 64, 5000, 0.2)
    assert result["received"] == result["sent"] > 0
    assert result["loss"] == 0
    assert result["sent"] <= 1001  # pacing never runs ahead of the clock


@needs_compiler
def test_idle_connections_answer_when_asked_again(port: int) -> None:
    assert netload("idle", port, 50, 10)["alive"] == 50


def asked(port: int, request: bytes, *, rest: bytes = b"") -> bytes:
    """What the load server answers to a request over HTTP, whose `rest` comes later; it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), 10) as peer:
        peer.sendall(request)
        if rest:
            threading.Event().wait(0.1)  # so that it is read by itself
            peer.sendall(rest)
        with peer.makefile("rb") as stream:
            return stream.read()


@needs_compiler
@pytest.mark.parametrize("octets", [0, 1, 300_000])
def test_the_load_server_sends_text_to_a_client_that_speaks_http(port: int, octets: int) -> None:
    head, _, body = asked(port, b"GET /%d HTTP/1.1\r\nHost: here\r\n\r\n" % octets).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and b"Content-Length: %d\r\n" % octets in head
    assert body == b"x" * octets


@needs_compiler
@pytest.mark.parametrize("octets", [0, 10, 300_000])
@pytest.mark.parametrize("first", ["POST", "the head but its end", "the head", "all"])
def test_the_load_server_counts_what_is_posted(port: int, octets: int, first: str) -> None:
    head, body = b"POST / HTTP/1.1\r\ncontent-length: %d\r\n\r\n" % octets, b"x" * octets
    cut = {"POST": 4, "the head but its end": len(head) - 2, "the head": len(head), "all": len(head + body)}[first]
    answer = asked(port, (head + body)[:cut], rest=(head + body)[cut:])
    assert answer.endswith(b"\r\nConnection: close\r\n\r\n%d" % octets)


@needs_compiler
def test_dns_answers_are_matched_by_id() -> None:
    server = subprocess.Popen([str(build("netload")), "dns-serve", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    try:
        result = netload("dns", json.loads(server.stdout.readline())["port"], "bench.example", 8, 0.2, 65536)
    finally:
        end(server)
    assert result["operations"] > 100 and result["wrong"] == result["lost"] == 0


@needs_compiler
def test_wrong_dns_answers_are_not_counted_as_answers() -> None:
    """A server that answers every question with another question's name."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(5)

        def answer() -> None:
            while True:
                try:
                    query, peer = server.recvfrom(512)
                except OSError:
                    return
                if query == b"end":
                    return
                server.sendto(query[:2] + b"\x81\x80\0\1\0\1" + bytes(4) + b"\x06qwrong" + query[18:], peer)

        thread = threading.Thread(target=answer)
        thread.start()
        result = netload("dns", server.getsockname()[1], "bench.example", 4, 0.2, 65536)
        server.sendto(b"end", server.getsockname())
        thread.join()
    assert result["operations"] == 0 and result["wrong"] > 0


@needs_compiler
def test_the_dhcp_probe_over_a_stream_takes_only_an_offer(tmp_path: Path) -> None:
    path = tmp_path / "net.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()
        probe = subprocess.Popen(
            [str(build("netload")), "dhcp-qemu", str(path), "10"], stdout=subprocess.PIPE, text=True
        )
        try:
            peer, _ = server.accept()
            with peer, peer.makefile("rb") as stream:
                [length] = struct.unpack("!I", stream.read(4))
                discover = bytearray(stream.read(length))
                assert (
                    discover[12:14] == b"\x08\x00" and discover[42 + 236 : 42 + 243] == b"\x63\x82\x53\x63\x35\x01\x01"
                )
                assert sum(struct.unpack("!10H", discover[14:34])) % 0xFFFF == 0
                discover[34:38], discover[42] = b"\0\x43\0\x44", 2
                for kind in (5, 2):  # an ACK first: not what was asked
                    discover[42 + 242] = kind
                    peer.sendall(struct.pack("!I", length) + discover)
                out, _ = probe.communicate(timeout=10)
        finally:
            end(probe)
    assert probe.returncode == 0 and json.loads(out)["monotonic"] > 0
