"""`expose-port` as dockerd and people run it: what the parent hears, what the host is asked, and that it is given back."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from portfwd.invm.settings import PLACES, control_setting
from tests.portfwd.invm.played import PlayedHost, Tool, until

Start = Callable[..., Tool]

DOCKER = "-proto tcp -host-ip 127.0.0.1 -host-port 8080 -container-ip 172.17.0.2 -container-port 80".split()
PORT = {"proto": "tcp", "out_ip": "127.0.0.1", "out_port": 8080, "in_ip": "172.17.0.2", "in_port": 80}


def test_dockerd_hears_success_and_a_signal_gives_the_port_back(start: Start, host: PlayedHost) -> None:
    tool = start("expose_port", *DOCKER, "-control", host.path, "-local-bind", "never", parent=True)
    assert tool.heard() == b"0\n"
    assert host.requests == [("PUT", "/forwards/expose/port", PORT)]
    assert host.headers[0]["content-type"] == "application/json" and host.headers[0]["host"] == "unix"
    assert tool.end() == (0, "", "")
    assert host.requests[1:] == [("DELETE", "/forwards/unexpose/port", PORT)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_other_signals_give_the_port_back_too(start: Start, host: PlayedHost, number: int) -> None:
    tool = start("expose_port", *DOCKER, "-control", host.path, "-no-local-ip", parent=True)
    assert tool.heard() == b"0\n"
    assert tool.end(number)[0] == 0
    assert host.ports == [] and len(host.requests) == 2


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((400, json.dumps({"message": "listen tcp 127.0.0.1:8080: bind: address already in use"}).encode()), None),
        ((400, json.dumps("exposed ports can only be TCP or UDP").encode()), "exposed ports can only be TCP or UDP"),
        ((500, b"plain words"), "plain words"),
        ((503, b""), "answered 503 to PUT /forwards/expose/port"),
    ],
)
def test_dockerd_hears_the_hosts_own_words(start: Start, host: PlayedHost, answer: Any, words: str | None) -> None:
    host.answers["PUT", "/forwards/expose/port"] = answer
    tool = start("expose_port", *DOCKER, "-control", host.path, "-local-bind=never", parent=True)
    head, _, text = tool.heard().decode().partition("\n")
    assert head == "1"
    assert (words or "listen tcp 127.0.0.1:8080: bind: address already in use") in text
    assert tool.result()[0] == 1
    assert len(host.requests) == 1, "what the host refused is not given back"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-proto", "sctp"], "flag -proto: 'sctp' is none of tcp, udp, unix"),
        ([*DOCKER, "-host-ip", "localhost"], "flag -host-ip: 'localhost' is no IP address"),
        ([*DOCKER, "-host-port", "70000"], "flag -host-port: '70000' is no number from 0 to 65535"),
        ([*DOCKER, "-host-port", "-1"], "flag -host-port is missing"),
        (["-proto", "unix", "-host-path", "/a"], "flag -container-path is missing"),
        ([*DOCKER, "-local-bind", "maybe", "-control", "x"], "flag -local-bind: 'maybe' is none of"),
        (DOCKER, "give -control WHERE"),
        (
            [*DOCKER, "-control", "nowhere.sock", "-local-bind=never"],
            "cannot reach the control server at unix:nowhere.sock",
        ),
        ([*DOCKER, "-control"], "flag -control needs a value"),
        (
            [*DOCKER, "-control", "9p:nowhere.sock", "-local-bind=never"],
            "cannot reach the 9P server at unix:nowhere.sock",
        ),
    ],
)
def test_dockerd_hears_what_is_wrong_with_the_command_line(start: Start, arguments: list[str], says: str) -> None:
    tool = start("expose_port", *arguments, parent=True)
    head, _, text = tool.heard().decode().partition("\n")
    assert head == "1" and says in text
    assert tool.result()[0] == 1


def test_flags_of_a_newer_dockerd_do_no_harm(start: Start, host: PlayedHost) -> None:
    tool = start("expose_port", "-future", *DOCKER, "-later", "x", "-control", host.path, "-no-local-ip", parent=True)
    assert tool.heard() == b"0\n"
    assert "unknown flags are ignored: -future -later" in tool.end()[2]


def test_a_person_is_told_in_words(start: Start, host: PlayedHost) -> None:
    tool = start("expose_port", *DOCKER, "-control", host.path, "-i", "-no-local-ip", parent=True)
    assert tool.process.stdout is not None
    assert tool.process.stdout.readline() == b"tcp forward from 127.0.0.1:8080 to 172.17.0.2:80\n"
    assert tool.end()[0] == 0
    assert tool.heard() == b"", "with -i the parent is not spoken to"
    host.answers["PUT", "/forwards/expose/port"] = 400, b'{"message": "no"}'
    status, _, said = start("expose_port", *DOCKER, "-control", host.path, "-i", "-no-local-ip").result()
    assert (status, said) == (1, "pyvpnkit expose-port: no\n")


def test_without_a_parent_a_failure_is_said_on_standard_error(start: Start, host: PlayedHost) -> None:
    host.answers["PUT", "/forwards/expose/port"] = 400, b'{"message": "no"}'
    assert start("expose_port", *DOCKER, "-control", host.path, "-no-local-ip").result()[2].endswith(": no\n")


def test_a_unix_socket_is_a_pipe_to_the_host(start: Start, host: PlayedHost) -> None:
    tool = start(
        "expose_port", "-proto=unix", "-host-path=/h", "-container-path=/c", "-control", host.path, parent=True
    )
    assert tool.heard() == b"0\n"
    tool.end()
    port = {"proto": "unix", "out_path": "/h", "in_path": "/c"}
    assert host.requests == [("PUT", "/forwards/expose/pipe", port), ("DELETE", "/forwards/unexpose/pipe", port)]


def test_port_0_is_given_back_by_the_number_that_was_listed(start: Start, host: PlayedHost) -> None:
    host.ports.append({**PORT, "out_port": 33333})  # somebody else's, to the same container
    tool = start("expose_port", *DOCKER, "-host-port", "0", "-control", host.path, "-i")
    assert tool.process.stdout is not None
    assert tool.process.stdout.readline() == b"tcp forward from 127.0.0.1:40404 to 172.17.0.2:80\n"
    tool.end()
    assert host.requests[-1] == ("DELETE", "/forwards/unexpose/port", {**PORT, "out_port": 40404})
    assert [port["out_port"] for port in host.ports] == [33333]


def test_a_signal_before_the_host_has_answered_gives_the_port_back(start: Start, host: PlayedHost) -> None:
    host.hold.clear()
    tool = start("expose_port", *DOCKER, "-control", host.path, "-no-local-ip", parent=True)
    host.asked(1)
    tool.process.send_signal(signal.SIGTERM)
    host.asked(2)
    host.hold.set()
    assert tool.heard() == b""
    assert tool.result()[0] == 0
    assert host.requests[1][:2] == ("DELETE", "/forwards/unexpose/port")


def test_a_host_that_is_gone_by_then_does_not_keep_it(start: Start, host: PlayedHost) -> None:
    tool = start("expose_port", *DOCKER, "-control", host.path, "-no-local-ip", parent=True)
    assert tool.heard() == b"0\n"
    host.path.unlink()
    status, _, said = tool.end()
    assert status == 0 and "cannot be given back" in said


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vpnkit-expose-port.yaml", "control: {}\n"),
        ("vpnkit-expose-port.yml", 'control: "{}"\n'),
        ("vpnkit-expose-port.json", '{{"control": "{}", "other": 1}}'),
        ("vpnkit-expose-port.toml", 'control = "{}"\n'),
    ],
)
def test_the_host_is_found_by_the_configuration_file(
    start: Start, host: PlayedHost, tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text.format(host.path))
    tool = start("expose_port", *DOCKER, "-no-local-ip", parent=True)
    assert tool.heard() == b"0\n"
    assert tool.end()[0] == 0


def test_the_first_place_and_the_first_ending_count(tmp_path: Path) -> None:
    for place in ("etc", "here"):
        (tmp_path / place).mkdir()
        for ending in ("yaml", "json"):
            (tmp_path / place / f"vpnkit-expose-port.{ending}").write_text(f'{{"control": "{place}.{ending}"}}')
    places = [str(tmp_path / "missing"), str(tmp_path / "etc"), str(tmp_path / "here")]
    assert control_setting(places) == "etc.json"
    (tmp_path / "etc/vpnkit-expose-port.json").write_text('{"control": 4098}')
    assert control_setting(places) == "4098", "a number can only be a vsock's"
    assert control_setting([str(tmp_path / "missing")]) == ""
    assert PLACES == ("/etc", ".")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("vpnkit-expose-port.yaml", "control: [1]", "control: [1] is no address"),
        ("vpnkit-expose-port.yaml", "control: {", "vpnkit-expose-port.yaml: while parsing"),
        ("vpnkit-expose-port.json", "{", "vpnkit-expose-port.json: Expecting"),
        ("vpnkit-expose-port.yaml", "other: x", "give -control WHERE"),
    ],
)
def test_what_is_wrong_with_the_configuration_file_is_said(
    start: Start, tmp_path: Path, name: str, text: str, says: str
) -> None:
    (tmp_path / name).write_text(text)
    tool = start("expose_port", *DOCKER, parent=True)
    assert says in tool.heard().decode()
    tool.result()


def test_an_inherited_control_connection_is_used_for_everything(start: Start, host: PlayedHost) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(host.path))
        tool = start("expose_port", *DOCKER, "-no-local-ip", "-control", "fd:4", parent=True, listening=client)
    assert tool.heard() == b"0\n"
    assert tool.end()[0] == 0
    assert [method for method, _, _ in host.requests] == ["PUT", "DELETE"]


def test_list_ports_prints_vpnkits_lines(start: Start, host: PlayedHost) -> None:
    host.ports += [PORT, {"proto": "unix", "out_path": "/h", "in_path": "/c", "annotation": "mine"}]
    host.answers["GET", "/forwards/dump"] = 200, b"send 1 Open\n"
    status, out, err = start("list_ports", "-control", host.path, "-debug").result()
    assert out == "tcp forward from 127.0.0.1:8080 to 172.17.0.2:80\nmine unix forward from /h to /c\n"
    assert (status, err) == (0, "send 1 Open\n")


def test_list_ports_of_nothing_is_nothing_and_mistakes_are_said(start: Start, host: PlayedHost) -> None:
    assert start("list_ports", "-control", host.path).result() == (0, "", "")
    assert host.requests == [("GET", "/forwards/list", None)]
    assert start("list_ports").result()[::2] == (
        2,
        "pyvpnkit list-ports: give -control ADDRESS (PORT or CID/PORT (vsock), unix:PATH or a path, tcp:IP:PORT, fd:N): "
        "where the HTTP control API is\n",
    )
    host.answers["GET", "/forwards/list"] = 200, b"[3]"
    status, _, said = start("list_ports", "-control", host.path).result()
    assert status == 1 and "no list of ports" in said


@pytest.mark.parametrize("module", ["forwarder", "expose_port", "list_ports"])
def test_help_names_each_flag_and_little_is_imported(start: Start, module: str, tmp_path: Path) -> None:
    status, out, _ = start(module, "--help").result()
    assert status == 0 and "-control" in out
    code = f"import sys, portfwd.invm.{module}; print(*sys.modules)"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & {"numpy", "scapy", "aiohttp", "yaml", "uvloop", "rich", "argparse", "portfwd.registry", "dpkt"}


def test_a_host_that_answers_in_chunks_or_until_it_closes_is_understood(start: Start, tmp_path: Path) -> None:
    answers = [
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\n[]\r\n0\r\nT: x\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\nnull",
    ]
    for answer in answers:
        with socket.socket(socket.AF_UNIX) as listener:
            path = tmp_path / "s"
            path.unlink(missing_ok=True)
            listener.bind(str(path))
            listener.listen()
            tool = start("list_ports", "-control", path)
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)
        assert tool.result() == (0, "", "")


@pytest.mark.parametrize("answer", [b"", b"9P2000\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n"])
def test_what_is_no_http_is_said_to_be_none(start: Start, tmp_path: Path, answer: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        tool = start("list_ports", "-control", "s")
        client, _ = listener.accept()
        with client:
            client.recv(4096)
            client.sendall(answer)
    status, _, said = tool.result()
    assert status == 1 and "no HTTP that could be understood" in said
    until(lambda: tool.process.returncode is not None)
