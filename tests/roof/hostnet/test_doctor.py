"""`pyvpnkit doctor` on hosts that are well and on hosts that are not: namespaces with networks of their own."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import json
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dns.servers import Upstream
from netstack.errors import ConfigError
from netstack.settings import Limits, Network
from portfwd.spec import PublishSpec
from pyvpnkit.commands import doctor
from pyvpnkit.hostnet import checks
from pyvpnkit.hostnet.routes import Egress, Route, Snapshot
from tests.roof.commands.conftest import control, pyvpnkit
from tests.roof.hostnet.conftest import interface
from tests.support.netns import ROOT, Namespace

__all__ = ["control"]

linux = pytest.mark.skipif(sys.platform != "linux", reason="expected: namespaces are Linux's")


@dataclass(frozen=True)
class Said:
    """What the command said with --json."""

    status: int
    checks: list[dict[str, str]]

    def of(self, name: str) -> list[dict[str, str]]:
        return [one for one in self.checks if one["name"] == name]

    def one(self, name: str) -> dict[str, str]:
        (found,) = self.of(name)
        return found


class Patient:
    """A host to examine."""

    def __init__(self, host: Namespace, directory: Path) -> None:
        self.host = host
        self.resolv_conf = directory / "resolv.conf"
        self.config = directory / "vm.yaml"
        self.state = directory / "state"
        self.state.mkdir(mode=0o700)
        self.write_config()

    def write_config(self, more: str = "") -> None:
        self.config.write_text(f"dns: {{resolv_conf: {self.resolv_conf}}}\nstate_dir: {self.state}\n{more}")

    def command(self, *words: str, wrap: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
        control = str(self.state / "control.sock")
        argv = [sys.executable, "-m", "pyvpnkit", "doctor", "--config", str(self.config), *words]
        done = subprocess.run(
            ["nsenter", f"--net={self.host.path}", *wrap, *argv],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=ROOT,
            env={**os.environ, "PYVPNKIT_CONTROL": control, "PYTHONPATH": str(ROOT)},
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def said(self, *words: str, wrap: tuple[str, ...] = ()) -> Said:
        done = self.command("--json", *words, wrap=wrap)
        found = json.loads(done.stdout)
        assert found["ok"] is (done.returncode == 0)
        return Said(done.returncode, found["checks"])


@pytest.fixture
def patient(host: Namespace, tmp_path: Path) -> Patient:
    """With a LAN, a way out, and one resolver that is there."""
    interface(host, "eth0")
    host.ip("addr", "add", "192.0.2.7/24", "dev", "eth0")
    host.ip("route", "add", "default", "via", "192.0.2.1")
    host.sysctl("net.ipv4.ping_group_range", "0 2147483647")
    made = Patient(host, tmp_path)
    made.resolv_conf.write_text("nameserver 127.0.0.1\n")
    return made


@contextlib.contextmanager
def resolver(host: Namespace, answer: Callable[[bytes], bytes], address: str = "127.0.0.1") -> Iterator[None]:
    """Answers each question at port 53 of the host, until it is asked nothing."""
    sock = host.datagrams(address, 53)
    sock.settimeout(None)

    def serve() -> None:
        while True:
            question, sender = sock.recvfrom(4096)
            if not question:
                return
            sock.sendto(answer(question), sender)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        with host.socket(socket.SOCK_DGRAM) as last:
            last.sendto(b"", (address, 53))
        thread.join(10)
        sock.close()


def empty(question: bytes, rcode: int = 0) -> bytes:
    return question[:2] + struct.pack("!H", 0x8180 | rcode) + question[4:]


@linux
def test_a_host_that_is_well(patient: Patient) -> None:
    with resolver(patient.host, empty):
        said = patient.said()
        text = patient.command().stdout
    assert said.status == 0
    assert {one["state"] for one in said.checks if one["name"] not in ("clock", "shell", "tun")} == {"ok"}
    names = [one["name"] for one in said.checks]
    wanted = [
        "resolvers",
        "subnet",
        "egress",
        "ping",
        "descriptors",
        "ports",
        "clock",
        "state",
        "tun",
        "shell",
        "daemon",
    ]
    assert names == wanted
    assert said.one("resolvers")["text"].startswith("127.0.0.1:53 answers in ")
    assert said.one("egress")["text"] == "out by eth0, MTU 1500, without IPv6"
    assert said.one("daemon")["text"].startswith("no daemon is running behind ")
    assert not any(one["advice"] for one in said.checks if one["state"] == "ok")
    lines = text.splitlines()
    assert len([line for line in lines if line.startswith("ok    ")]) >= 8
    assert "ok    subnet       no route of this host leads into 192.168.65.0/24" in lines


@linux
def test_a_vpn_that_has_the_guests_subnet(patient: Patient) -> None:
    interface(patient.host, "tun0", 1380)
    patient.host.ip("addr", "add", "192.168.65.6/24", "dev", "tun0")
    with resolver(patient.host, empty):
        said = patient.said()
        free = patient.said("--subnet", "192.168.66.0/24")
    assert said.status == 1
    clash = said.one("subnet")
    assert clash["state"] == "fail" and "192.168.65.0/24 on tun0" in clash["text"]
    assert "--subnet 192.168.66.0/24" in clash["advice"]
    assert free.status == 0 and free.one("subnet")["state"] == "ok"


@linux
def test_a_vpn_that_takes_everything_is_no_failure(patient: Patient) -> None:
    for network in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16"):
        patient.host.ip("route", "add", network, "via", "192.0.2.1")
    with resolver(patient.host, empty):
        said = patient.said()
    assert said.status == 0
    assert said.one("subnet")["state"] == "warn" and "192.168.0.0/16 on eth0" in said.one("subnet")["text"]


@linux
def test_a_host_whose_resolvers_do_not_answer(patient: Patient) -> None:
    assert "Connection refused" in patient.said().one("resolvers")["text"]
    patient.resolv_conf.write_text("nameserver 127.0.0.1\nnameserver 192.0.2.53\nnameserver ::1\n")
    with resolver(patient.host, empty):
        said = patient.said()
    first, second, third = said.of("resolvers")
    assert said.status == 0, "one that answers is enough"
    assert (first["state"], second["state"], third["state"]) == ("ok", "warn", "warn")
    assert str(patient.resolv_conf) in second["advice"]
    patient.resolv_conf.write_text("nameserver 192.0.2.53\n")
    assert patient.said().status == 1


@linux
def test_a_host_without_resolvers(patient: Patient) -> None:
    patient.resolv_conf.write_text("# none\n")
    said = patient.said()
    assert said.status == 1 and "names none" in said.one("resolvers")["text"]
    patient.resolv_conf.unlink()
    assert "names none" in patient.said().one("resolvers")["text"]
    patient.config.write_text(f"dns: {{servers: [127.0.0.1]}}\nstate_dir: {patient.state}\n")
    with resolver(patient.host, lambda question: empty(question, 5)):
        assert "(REFUSED)" in patient.said().one("resolvers")["text"], "what is configured is asked instead"


@linux
def test_resolvers_are_looked_for_where_the_settings_say(patient: Patient, tmp_path: Path) -> None:
    path = tmp_path / "vpn.conf"
    path.write_text("nameserver 127.0.0.2#53\nzone corp.example\nnameserver 127.0.0.1#53\n")
    patient.config.write_text(f"dns: {{file: {path}}}\nstate_dir: {patient.state}\n")
    with resolver(patient.host, empty):
        first, second = patient.said().of("resolvers")
    assert (first["state"], second["state"]) == ("warn", "ok") and str(path) in first["advice"]
    patient.config.write_text(f"dns: {{resolvers: getaddrinfo}}\nstate_dir: {patient.state}\n")
    assert "getaddrinfo" in patient.said().one("resolvers")["text"]


@linux
def test_an_answer_to_another_question_is_none(patient: Patient) -> None:
    with resolver(patient.host, lambda question: bytes((question[0] ^ 1,)) + empty(question)[1:]):
        assert "no answer within 2 s" in patient.said().one("resolvers")["text"]


@linux
def test_who_may_not_ping(patient: Patient) -> None:
    patient.host.sysctl("net.ipv4.ping_group_range", "1 0")
    with resolver(patient.host, empty):
        said = patient.said()
    assert said.status == 0
    ping = said.one("ping")
    assert ping["state"] == "warn" and "ping_group_range is 1 0" in ping["text"]
    command = ping["advice"].partition('ping_group_range="')[2].partition('"')[0]
    patient.host.sysctl("net.ipv4.ping_group_range", command)
    with resolver(patient.host, empty):
        assert patient.said().one("ping")["state"] == "ok", "the advice helps"


@linux
def test_a_host_without_a_way_out_or_with_a_narrow_one(patient: Patient) -> None:
    with resolver(patient.host, empty):
        patient.host.ip("link", "set", "eth0", "mtu", "1200")
        narrow = patient.said().one("egress")
        patient.host.ip("route", "del", "default")
        none = patient.said().one("egress")
    assert narrow["state"] == "warn" and "MTU 1200" in narrow["text"]
    assert none["state"] == "warn" and "no IPv4 default route" in none["text"]


@linux
def test_few_descriptors_and_few_ports(patient: Patient) -> None:
    patient.host.sysctl("net.ipv4.ip_local_port_range", "40000 40999")
    with resolver(patient.host, empty):
        said = patient.said(wrap=("prlimit", "--nofile=256:256"))
    assert said.one("descriptors")["state"] == "warn" and "256 open files" in said.one("descriptors")["text"]
    assert said.one("ports")["state"] == "warn" and "1000 source ports (40000-40999)" in said.one("ports")["text"]


@linux
def test_a_user_without_namespaces_and_tun(patient: Patient) -> None:
    """As in a container: root without capabilities, and no user namespaces to be had."""
    words = ("unshare", "--user", "--map-root-user", "--net", "--mount", "sh", "-c")
    script = 'echo 0 >/proc/sys/user/max_user_namespaces; exec setpriv --bounding-set -all --inh-caps -all "$@"'
    said = patient.said(wrap=(*words, script, "sh"))
    shell = said.one("shell")
    assert shell["state"] == "warn" and "user.max_user_namespaces=15000" in shell["advice"]


async def test_a_daemon_is_shown(control: Any) -> None:
    done = await pyvpnkit(control, "doctor", "--json")
    (daemon,) = (one for one in json.loads(done.out)["checks"] if one["name"] == "daemon")
    assert daemon["state"] == "ok" and f"process {os.getpid()} behind {control.path}: 0 guests" in daemon["text"]
    control.service.stack.counters.contained += 1
    done = await pyvpnkit(control, "doctor", "--json")
    (daemon,) = (one for one in json.loads(done.out)["checks"] if one["name"] == "daemon")
    assert daemon["state"] == "warn" and "report" in daemon["advice"]


def test_what_answers_and_is_no_daemon(tmp_path: Path) -> None:
    path = str(tmp_path / "control.sock")
    assert doctor.daemon(path).state == "warn", "a socket that was named must be there"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        thread = threading.Thread(target=answer)
        thread.start()
        found = doctor.daemon(path)
        thread.join(10)
    assert (found.state, found.text) == ("warn", "what answers at the control socket is another version's")


# Checks by themselves.


def test_settings_that_are_wrong_are_said_first(tmp_path: Path) -> None:
    parsed = argparse.Namespace(config=None, subnet="nonsense", control=None, json=False)
    with pytest.raises(ConfigError, match="--subnet"):
        doctor.doctor(parsed)


@pytest.mark.parametrize("mode", [0o500, 0o777])
def test_a_state_directory_that_cannot_be_used(tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.state_directory(tmp_path / "a" / "b").text.endswith("(to be made)")
    tmp_path.chmod(mode)
    monkeypatch.setattr(os, "access", lambda path, _mode: bool(Path(path).stat().st_mode & 0o200))
    found = checks.state_directory(tmp_path)
    assert found.state == "fail" and "--state-dir" in found.advice
    tmp_path.chmod(0o700)
    assert checks.state_directory(tmp_path).state == "ok"
    (tmp_path / "file").touch()
    assert checks.state_directory(tmp_path / "file").state == "fail"


def test_ports_that_only_root_may_publish(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("expected: others let anybody have low ports")
    specs = [PublishSpec.parse(text) for text in ("80:80", "8080:80", "0:81", "unix:/tmp/a.sock:82")]
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(checks, "_sysctl_numbers", lambda name: [1024] if "unprivileged" in name else [])
    (found,) = checks.ports(specs)
    assert found.state == "warn" and "127.0.0.1:80:80" in found.text and "8080" not in found.text
    assert "ip_unprivileged_port_start=80" in found.advice
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert not list(checks.ports(specs))


def test_descriptors_without_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _which: unlimited)
    assert checks.descriptors(Network()).state == "ok"
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (1024, 5000))
    assert "about 4900 flows" in checks.descriptors(Network(limits=Limits(descriptor_reserve=100))).text


def test_a_smaller_mtu_than_the_guests_is_told() -> None:
    now = Snapshot(egress=Egress(interface="tun0", mtu=1380), ipv6_route=True)
    found = checks.egress(Network(), now)
    assert found.state == "ok" and "with IPv6; guests have 1500" in found.text
    assert "guests have" not in checks.egress(Network(mtu=1380), now).text


def test_all_private_networks_taken_by_narrow_routes() -> None:
    def halves(network: str) -> Iterator[Route]:
        for one in ipaddress.ip_network(network).subnets(new_prefix=17):
            yield Route(destination=one, interface="tun0")

    taken = [route for text in ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16") for route in halves(text)]
    found = checks.subnet(Network(), Snapshot(routes=frozenset(taken)))
    assert found.state == "warn" and "name one" in found.advice


def test_a_tun_device_that_is_missing(tmp_path: Path) -> None:
    if sys.platform != "linux":
        pytest.skip("expected: TAP devices are Linux's")
    found = checks.tun(str(tmp_path / "tun"))
    assert found.state == "warn" and "No such file" in found.text
    (tmp_path / "tun").touch()
    assert checks.tun(str(tmp_path / "tun")).state == "ok"


def test_a_resolver_of_a_family_the_host_has_not() -> None:
    found = checks.ask([Upstream("2001:db8::1"), Upstream("127.0.0.1", 9)], 0.2)
    assert all(isinstance(one, str) for one in found)
