"""What the gateway does for a guest itself: ping, names, time; with the programs people use."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.netns import GATEWAY, HOST, Daemon, Namespace, World, require, wait_until

pytestmark = pytest.mark.netns


@dataclass(frozen=True)
class Resolver:
    """A host whose only resolver is a dnsmasq on its loopback."""

    guest: Namespace
    daemon: Daemon
    hosts: Path
    resolv_conf: Path


@pytest.fixture(scope="module")
def resolver(shared: World) -> Iterator[Resolver]:
    require("dnsmasq", "dig", "ping", "chronyd")
    directory = shared.directory
    hosts, resolv_conf = directory / "hosts", directory / "resolv.conf"
    hosts.write_text("127.0.0.1 localhost\n10.9.8.7 printer.corp.example printer\n")
    resolv_conf.write_text("nameserver 127.0.0.1\n")
    words = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null", "--user=root"]
    words += ["--pid-file", "--listen-address=127.0.0.1", "--bind-interfaces", "--log-facility=-"]
    words += ["--address=/web.example/203.0.113.5", "--address=/web.example/2001:db8::5", "--local=/example/"]
    words += ["--txt-record=long.example," + ",".join(f"{n:03d}{'x' * 200}" for n in range(20))]
    words += ["--mx-host=example,mail.example,10", "--ptr-record=5.113.0.203.in-addr.arpa,web.example"]
    words += ["--srv-host=_sip._tcp.example,sip.example,5060,1,2", "--cname=alias.example,web.example"]
    shared.host.start(*words)
    guest = shared.namespace()
    daemon = shared.daemon("--link", f"tap:netns={guest.name}", "--dns-aaaa", "on")
    guest.udhcpc()
    wait_until(lambda: "203.0.113.5" in _dig(guest, "+tries=1", "+time=1", "web.example"))
    yield Resolver(guest, daemon, hosts, resolv_conf)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.said(), daemon.said()


def _dig(guest: Namespace, *words: str) -> str:
    return guest.run("dig", *words, check=False).stdout


@pytest.mark.parametrize("over", ["+notcp", "+tcp"])
@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (("web.example", "A"), "203.0.113.5"),
        (("web.example", "AAAA"), "2001:db8::5"),
        (("example", "MX"), "10 mail.example."),
        (("_sip._tcp.example", "SRV"), "1 2 5060 sip.example."),
        (("-x", "203.0.113.5"), "web.example."),
        (("host.internal",), HOST),
        (("gateway.internal",), GATEWAY),
        (("printer.corp.example",), "10.9.8.7"),
        (("PRINTER.corp.EXAMPLE",), "10.9.8.7"),
        (("printer",), "10.9.8.7"),
        (("-x", "10.9.8.7"), "printer.corp.example."),
    ],
)
def test_names_by_dig(resolver: Resolver, over: str, asked: tuple[str, ...], answer: str) -> None:
    """Q01, Q04: what dnsmasq knows, what the network knows, and the host's /etc/hosts; over UDP and TCP."""
    assert answer in _dig(resolver.guest, "+short", over, *asked).splitlines()


def test_no_data_and_no_name_are_told_apart(resolver: Resolver) -> None:
    """Q03, Q04: AAAA of a name that has only an IPv4 address is not NXDOMAIN."""
    assert "status: NXDOMAIN" in _dig(resolver.guest, "missing.example")
    for name in ("host.internal", "printer.corp.example"):
        said = _dig(resolver.guest, name, "AAAA")
        assert "status: NOERROR" in said and "ANSWER: 0" in said, said


def test_a_long_answer_comes_by_tcp_after_truncation(resolver: Resolver) -> None:
    """Q02: 4 kB do not go into a datagram of 512 octets; dig follows the TC bit by itself, or is told not to."""
    said = _dig(resolver.guest, "+noedns", "+ignore", "long.example", "TXT")
    assert re.search(r"flags:[a-z ]* tc", said), said
    said = _dig(resolver.guest, "+noedns", "+short", "long.example", "TXT")
    assert "019" + "x" * 200 in said
    said = _dig(resolver.guest, "+bufsize=4096", "long.example", "TXT")
    assert "019" + "x" * 200 in said


def test_hosts_and_resolvers_are_read_again(resolver: Resolver) -> None:
    """F11, Q04: a name added to /etc/hosts is known soon; without a resolver the answer is SERVFAIL, at once."""
    before = resolver.hosts.read_text()
    resolver.hosts.write_text(before + "10.9.8.8 scanner.corp.example\n")
    wait_until(lambda: "10.9.8.8" in _dig(resolver.guest, "+short", "scanner.corp.example"))
    resolver.resolv_conf.write_text("# nobody\n")
    wait_until(lambda: "status: SERVFAIL" in _dig(resolver.guest, "+tries=1", "web.example"))
    assert "10.9.8.7" in _dig(resolver.guest, "+short", "printer.corp.example")
    assert HOST in _dig(resolver.guest, "+short", "host.internal")
    assert "status: SERVFAIL" in _dig(resolver.guest, "+tries=1", "+tcp", "web.example")
    resolver.resolv_conf.write_text("nameserver 127.0.0.1\n")
    wait_until(lambda: "203.0.113.5" in _dig(resolver.guest, "+short", "web.example"))


def test_a_resolver_that_is_gone_is_servfail_within_seconds(resolver: Resolver) -> None:
    """F12: nobody listens at the host's resolver; the guest is told."""
    resolver.resolv_conf.write_text("nameserver 127.0.0.77\n")
    wait_until(lambda: "status: SERVFAIL" in _dig(resolver.guest, "+tries=1", "+time=5", "web.example"))
    resolver.resolv_conf.write_text("nameserver 127.0.0.1\n")
    wait_until(lambda: "203.0.113.5" in _dig(resolver.guest, "+short", "web.example"))


def test_names_by_the_c_library(resolver: Resolver) -> None:
    """glibc in the guest, with what DHCP put into its resolv.conf: A and AAAA at once, and the search domain."""
    assert HOST in resolver.guest.run("getent", "ahosts", "host.internal").stdout
    assert HOST in resolver.guest.run("getent", "ahosts", "host").stdout
    assert "2001:db8::5" in resolver.guest.run("getent", "ahosts", "web.example").stdout


@pytest.mark.parametrize("octets", [0, 1, 56, 1472, 1473, 9000, 60000, 65507])
@pytest.mark.parametrize("who", [GATEWAY, HOST])
def test_ping_of_any_size(resolver: Resolver, who: str, octets: int) -> None:
    """The gateway, and the host through its ping socket; above the MTU in fragments both ways."""
    words = ["ping", "-c", "3", "-i", "0.05", "-W", "5", "-s", str(octets), who]
    said = resolver.guest.run(*words).stdout
    assert " 0% packet loss" in said, said
    assert "DUP" not in said and "wrong data" not in said, said


def test_the_alias_is_on_the_guests_own_network(resolver: Resolver) -> None:
    """traceroute finds it on the first hop whatever it probes with; no gateway is between, as the netmask says."""
    require("traceroute")
    for probe in ((), ("-I",), ("-T", "-p", "9")):
        said = resolver.guest.run("traceroute", "-n", "-q", "2", "-w", "3", *probe, HOST).stdout.splitlines()
        assert [line.split()[1] for line in said[1:]] == [HOST], said


def test_chronyd_takes_its_time_from_the_gateway(resolver: Resolver) -> None:
    """P01: one measurement; both clocks are the same one."""
    words = ["chronyd", "-Q", "-t", "10", "-f", "/dev/null", f"server {GATEWAY} iburst maxsamples 1"]
    done = resolver.guest.run(*words, limit_s=30)
    offset = re.search(r"System clock wrong by (-?[0-9.]+) seconds", done.stdout + done.stderr)
    assert offset is not None, done
    assert abs(float(offset[1])) < 0.1, done


def test_many_names_at_once(resolver: Resolver, tmp_path: Path) -> None:
    """2,000 questions by one dig, each answered."""
    batch = tmp_path / "names"
    batch.write_text("".join(f"n{n}.web.example A +short\n" for n in range(2000)))
    said = resolver.guest.run("dig", "-f", str(batch), limit_s=60).stdout
    assert said.split().count("203.0.113.5") == 2000
