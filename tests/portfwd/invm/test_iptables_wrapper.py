"""Swarm's ports: what is inserted into DOCKER-INGRESS is exposed, what is deleted is not, and iptables has its way."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from portfwd.invm.iptables_wrapper import Places, Rule, main
from tests.portfwd.invm.played import LIMIT_S, PlayedHost, until

RULE = "--wait -t nat -I DOCKER-INGRESS -p tcp --dport 8080 -j DNAT --to-destination 172.18.0.2:80".split()
DELETE = [word.replace("-I", "-D") if word == "-I" else word for word in RULE]
PORT = {"proto": "tcp", "out_ip": "0.0.0.0", "out_port": 8080, "in_ip": "172.18.0.2", "in_port": 80}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: PlayedHost) -> Callable[[list[str]], int]:
    monkeypatch.chdir(tmp_path)  # where expose-port finds its configuration file
    (tmp_path / "vpnkit-expose-port.yaml").write_text(f"control: {host.path}\n")
    iptables = tmp_path / "iptables"
    iptables.write_text('#!/bin/sh\necho "$@" >>iptables.log\nexit 7\n')
    iptables.chmod(0o755)
    places = Places(iptables=str(iptables), native=tmp_path / "native", pids=tmp_path / "pids")
    return lambda argv: main(argv, places=places)


def logged(tmp_path: Path) -> list[str]:
    return (tmp_path / "iptables.log").read_text().splitlines()


def reap(pid: int) -> None:
    """The port's process is a child of this one, where it is init's in a VM."""
    until(lambda: os.waitpid(pid, os.WNOHANG)[0] == pid)


def test_a_swarm_port_is_exposed_until_its_rule_goes(
    run: Callable[[list[str]], int], host: PlayedHost, tmp_path: Path
) -> None:
    assert run(RULE) == 7, "the status of iptables"
    assert host.asked(1) == [("PUT", "/forwards/expose/port", PORT)]
    pid = int((tmp_path / "pids/tcp.8080.172.18.0.2.80.pid").read_text())
    until(lambda: host.ports)
    assert run(DELETE) == 7
    assert host.asked(2)[1] == ("DELETE", "/forwards/unexpose/port", PORT)
    assert list((tmp_path / "pids").iterdir()) == []
    assert logged(tmp_path) == [" ".join(RULE), " ".join(DELETE)]
    reap(pid)


def test_who_reads_what_iptables_says_does_not_wait_for_the_port(
    run: Callable[[list[str]], int], host: PlayedHost, tmp_path: Path
) -> None:
    code = (
        "import sys; from pathlib import Path; from portfwd.invm.iptables_wrapper import Places, main; "
        "main(sys.argv[1:], places=Places(iptables='/bin/echo', native=Path('native'), pids=Path('pids')))"
    )
    with open(tmp_path / "inherited", "w") as more:
        done = subprocess.run(
            [sys.executable, "-c", code, *RULE],
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
            pass_fds=[more.fileno()],
        )
    assert done.stdout == " ".join(RULE) + "\n"
    pid = int((tmp_path / "pids/tcp.8080.172.18.0.2.80.pid").read_text())
    host.asked(1)
    held = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert str(tmp_path / "inherited") not in held
    run(DELETE)
    host.asked(2)


@pytest.mark.parametrize("line", ["1\n", "TRUE", "true\nx"])
def test_native_port_forwarding_leaves_ports_alone(run: Callable[[list[str]], int], tmp_path: Path, line: str) -> None:
    (tmp_path / "native").write_text(line)
    assert run(RULE) == 7
    assert not (tmp_path / "pids").exists()


@pytest.mark.parametrize(
    "argv",
    [
        ["-L"],
        [],
        RULE[:-1],
        [*RULE[:-1], "172.18.0.2"],
        [*RULE[:-1], "../../x:80"],
        [*RULE[:6], "sctp", *RULE[7:]],
        [*RULE[:8], "0", *RULE[9:]],
        [*RULE[:4], "DOCKER", *RULE[5:]],
        [*RULE[:3], "-A", *RULE[4:]],
    ],
)
def test_other_rules_are_iptables_own_affair(run: Callable[[list[str]], int], tmp_path: Path, argv: list[str]) -> None:
    assert Rule.of(argv) is None
    assert run(argv) == 7
    assert logged(tmp_path) == [" ".join(argv)]


def test_a_process_that_is_somebody_elses_by_now_is_not_ended(run: Callable[[list[str]], int], tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "pids").mkdir()
        (tmp_path / "pids/tcp.8080.172.18.0.2.80.pid").write_text(str(other.pid))
        run(DELETE)
        assert other.poll() is None
        other.kill()


def test_a_missing_iptables_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-L"], places=Places(iptables=str(tmp_path / "none"))) == 1
    assert "No such file or directory" in capsys.readouterr().err
