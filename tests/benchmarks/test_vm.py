"""The cases in machines: who takes part in them, and what the harness tells a machine and the daemon. Nothing is booted."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks import cases, guests, report, runner
from benchmarks.build import SetupError, build
from benchmarks.cases import CASES, CaseFailed, Conditions, wait_reachable
from benchmarks.guest import Guest
from benchmarks.guests import BY_DEFAULT, GUESTS, PyvpnkitVm, PyvpnkitVmStream, link_counters
from benchmarks.load import Servers
from benchmarks.processes import end
from pyvpnkit.boot import NotHere
from pyvpnkit.machine import MachineError

MACHINES = [PyvpnkitVm, PyvpnkitVmStream]
URL = "http://192.168.65.2:5000"
SUMMARY = """\
pyvpnkit 7, up 1 s
links: 1
  vhost-user:/run/net.sock frames_in=9 frames_out=9 queue_pairs=1 frames_outbound=800 kicks=50 calls=7
guests: -
"""


@pytest.fixture
def at(tmp_path: Path) -> Conditions:
    host = cast(Any, SimpleNamespace(inside=lambda *command: list(command)))
    return Conditions(host=host, directory=tmp_path, seconds=1, servers=Servers(netload=5000, iperf3=5201))


class Console:
    """A machine that answers lines of shell by their first word that is known, and notes them."""

    address = "192.168.65.3"

    def __init__(self, answers: Mapping[str, str | MachineError]) -> None:
        self.answers = answers
        self.lines: list[str] = []
        self.killed = False

    def run(self, line: str, *, limit_s: float) -> str:
        self.lines.append(line)
        answer = next((said for word, said in self.answers.items() if word in line), "")
        if isinstance(answer, MachineError):
            raise answer
        return answer

    def said(self) -> str:
        return "what it said"

    def kill(self) -> None:
        self.killed = True


def booted(at: Conditions, kind: type[PyvpnkitVm] = PyvpnkitVm, **answers: str | MachineError) -> tuple[Any, Console]:
    """A guest whose machine is a `Console`, without a back-end."""
    guest: Any = kind(at.host, at.directory, kind.name)
    guest.machine = console = Console({word.replace("_", "-"): said for word, said in answers.items()})
    guest.counters = dict
    return guest, console


# ---- who takes part


def test_machines_take_part_in_their_own_cases_and_nothing_else_does() -> None:
    for kind in GUESTS.values():
        found = {name for name, case in CASES.items() if runner.takes_part(kind, case)}
        assert found and (found == {"vm_up", "vm_down"} if kind in MACHINES else not found & {"vm_up", "vm_down"})


def test_machines_are_run_unless_others_are_asked_for_and_come_last() -> None:
    assert {kind.name for kind in MACHINES} <= set(BY_DEFAULT)
    assert list(CASES)[-2:] == ["vm_up", "vm_down"]  # so that none runs beside the other cases


def test_a_guest_is_started_with_its_first_case(at: Conditions, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def made(name: str, machine: bool) -> Any:
        return type(
            name, (guests.Loopback,), {"name": name, "is_machine": machine, "start": lambda _: order.append(name)}
        )

    def case(name: str, machine: bool) -> cases.Case:
        def run(_guest: Guest, _at: Conditions) -> cases.Metrics:
            order.append(name)
            return {"gbit_s": 1.0}

        return cases.Case(name=name, run=run, machine=machine, help="")

    monkeypatch.setattr("benchmarks.runner.wait_reachable", lambda *_: None)
    outcome = runner.Outcome()
    run = [case("one", False), case("two", False), case("vm", True)]
    runner.measure(outcome, run, [made("kernel", False), made("machine", True)], 1, at, lambda _: None)
    assert order == ["kernel", "one", "two", "machine", "vm"]
    assert {name: set(found) for name, found in outcome.runs.items()} == {
        "one": {"kernel"},
        "two": {"kernel"},
        "vm": {"machine"},
    }


def test_peers_without_a_case_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.__main__ import main

    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--peers", "pyvpnkit-vm", "--cases", "rr_1"]) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
    assert "none of these peers takes part" in capsys.readouterr().err


@pytest.mark.parametrize(("stream", "status"), [(1.0, report.Status.PASS), (1.01, report.Status.FAIL)])
def test_the_rings_have_to_be_no_slower_than_the_stream(stream: float, status: report.Status) -> None:
    measured = {"vm_down": {"pyvpnkit-vm": [{"gbit_s": 1.0}], "pyvpnkit-vm-stream": [{"gbit_s": stream}]}}
    assert [one.status for one in report.judge(measured)] == [status]


# ---- what is missing


def test_without_qemu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None if "qemu" in name else f"/usr/bin/{name}")
    assert [kind.missing() for kind in MACHINES] == ["qemu-system-x86_64 is not on PATH"] * 2


@pytest.mark.parametrize(("error", "missing"), [(None, None), (NotHere("no kernel"), "no kernel")])
def test_without_a_kernel_it_says_why(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None, missing: str | None
) -> None:
    def parts(directory: Path, cache: Path) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("pyvpnkit.boot.parts", parts)
    assert PyvpnkitVm.missing() == missing


# ---- what the machine is told


def test_the_links_are_the_ring_and_the_stream() -> None:
    ring, stream = (kind.card("/run/net.sock").netdev for kind in MACHINES)
    assert ring.startswith("vhost-user,") and stream.startswith("stream,") and "/run/net.sock" in stream
    assert [kind.scheme for kind in MACHINES] == ["vhost-user", "qemu"]


def test_down_is_one_file_to_nowhere(at: Conditions) -> None:
    guest, console = booted(at)
    metrics = CASES["vm_down"].run(guest, at)
    assert console.lines == [f"wget -q -O /dev/null {URL}/{256 << 20}"]
    assert set(metrics) == {"gbit_s"} and metrics["gbit_s"] > 0  # no back-end, no CPU; no kicks on this link


def test_up_is_a_file_that_was_fetched_once(at: Conditions) -> None:
    guest, console = booted(at, post_file=str(64 << 20), echo="none")
    assert CASES["vm_up"].run(guest, at)["gbit_s"] > 0
    there, fetch, post = console.lines
    assert there.startswith("[ -e /tmp/up ]")
    assert fetch == f"wget -q -O /tmp/up {URL}/{64 << 20}"
    assert post == f"wget -q -O - --post-file /tmp/up {URL}/"
    console.answers = {"post-file": str(64 << 20)}
    CASES["vm_up"].run(guest, at)
    assert console.lines[3:] == [there, post]


@pytest.mark.parametrize(
    ("case", "answers", "complaint"),
    [
        ("vm_up", {"post_file": "10"}, f"10 of {64 << 20} octets arrived"),
        ("vm_up", {"post_file": MachineError("wget: server returned error")}, "returned error"),
        ("vm_down", {"wget": MachineError("closed prematurely")}, "closed prematurely"),
    ],
)
def test_a_transfer_that_did_not_come_to_its_end_gives_no_figure(
    at: Conditions, case: str, answers: dict[str, Any], complaint: str
) -> None:
    guest, _ = booted(at, **answers)
    with pytest.raises(CaseFailed, match=complaint):
        CASES[case].run(guest, at)


def test_a_machine_is_reachable_when_it_has_an_octet_of_the_host(at: Conditions) -> None:
    guest, console = booted(at)
    wait_reachable(guest, at)
    assert console.lines == [f"wget -q -O /dev/null {URL}/1"]
    guest, _ = booted(at, wget=MachineError("refused"))
    with pytest.raises(SetupError, match="pyvpnkit-vm: refused"):
        wait_reachable(guest, at)


@pytest.mark.parametrize("address", ["", "192.168.65.3"])
def test_the_machine_ends_with_its_guest_even_when_it_has_no_lease(
    at: Conditions, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    made: list[Any] = []

    class Booting(Console):
        def __init__(self, words: list[str]) -> None:
            super().__init__({})
            self.words, self.address = words, address
            made.append(self)

        def wait_up(self) -> None: ...

    monkeypatch.setattr("pyvpnkit.machine.Machine", Booting)
    monkeypatch.setattr("pyvpnkit.boot.parts", lambda *_: SimpleNamespace(kernel="vmlinuz", initrd="initrd"))
    guest = PyvpnkitVm(at.host, at.directory, "vm")
    guest.log.touch()
    guest.socket.touch()
    monkeypatch.setattr(guest, "inside", lambda *words: ["inside", *words])
    if address:
        guest.attach()
    else:
        with pytest.raises(SetupError, match="has no lease"):
            guest.attach()
    guest.stop()
    assert made[0].killed and made[0].words[:2] == ["inside", "qemu-system-x86_64"]


# ---- frames and kicks


@pytest.mark.parametrize(
    ("summary", "counted"),
    [
        (SUMMARY, {"frames_out": 800, "kicks_out": 50}),
        (SUMMARY.replace("frames_outbound=800 kicks=50 ", ""), {}),
        (SUMMARY.replace("frames_outbound=800 kicks=50 calls=7\nguests: -\n", "frames_out"), None),
        (SUMMARY.replace("guests: -\n", ""), None),
        ("pyvpnkit 7, up 1 s\nlinks: -\n", None),
        ("pyvpnkit 7, up 1 s\nlinks: -\nguests: -\n", {}),
        ("", None),
    ],
)
def test_frames_and_kicks_are_taken_from_a_whole_summary(summary: str, counted: dict[str, int] | None) -> None:
    assert link_counters(summary) == counted


@pytest.fixture
def daemon() -> Iterator[Callable[[PyvpnkitVm], None]]:
    """Gives a guest a back-end that prints a summary when it is asked, of one frame more each time."""
    script = (
        "import signal\n"
        "count = 0\n"
        "def tell(*_):\n"
        "    global count; count += 1\n"
        "    print(f'links: 1\\n  ring frames_outbound={count} kicks=1 calls=0\\nguests: -', flush=True)\n"
        "signal.signal(signal.SIGUSR1, tell)\n"
        "print('ready', flush=True)\n"
        "while True: signal.pause()\n"
    )
    started: list[subprocess.Popen[str]] = []

    def give(guest: PyvpnkitVm) -> None:
        with guest.log.open("w") as log:
            guest.backend = subprocess.Popen([sys.executable, "-c", script], stdout=log, text=True)
        started.append(guest.backend)
        guest.wait_for("the script", guest.log.read_text)

    yield give
    for one in started:
        end(one)


def test_the_summary_is_that_which_was_asked_for(at: Conditions, daemon: Callable[[PyvpnkitVm], None]) -> None:
    guest = PyvpnkitVm(at.host, at.directory, "vm")
    daemon(guest)
    assert [guest.counters()["frames_out"] for _ in range(3)] == [1, 2, 3]


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler: apt-get install gcc libc6-dev")
def test_our_daemon_tells_of_frames_and_kicks_on_a_ring(at: Conditions) -> None:
    guest = PyvpnkitVm(at.host, at.directory, "vm")
    load: list[subprocess.Popen[str]] = []
    try:
        guest.launch()
        guest.wait_for("the socket", guest.socket.exists)
        assert guest.counters() == {}
        server = subprocess.Popen([str(build("netload")), "serve", "127.0.0.1", "0"], stdout=subprocess.PIPE, text=True)
        load.append(server)
        assert server.stdout is not None
        port = json.loads(server.stdout.readline())["port"]
        words = [str(build("ringload")), str(guest.socket), "up", guest.server, str(port), "1", "20"]
        load.append(subprocess.Popen(words, text=True))
        guest.wait_for("frames", lambda: guest.counters().get("frames_out", 0) > 100)
        counted = guest.counters()
        assert counted["frames_out"] > counted["kicks_out"] > 0
    finally:
        for one in reversed(load):
            end(one)
        guest.stop()
