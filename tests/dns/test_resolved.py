"""systemd-resolved's links: recorded outputs of `resolvectl`, one that we play, and the real one where it is installed."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dns import codec, resolved
from dns.resolved import Link
from dns.servers import Resolvers, Server, Upstream
from netstack.errors import HostError, Malformed

# systemd 252 (Debian 12): a LAN, and a VPN with split DNS set by `resolvectl dns` and `domain`.
DNS_252 = """\
Global: 10.255.255.53
Link 2 (eth0p):
Link 3 (eth0): 192.168.1.1 2001:db8::1 fe80::1
Link 4 (tun0p):
Link 5 (tun0): 10.8.0.1 10.8.0.2:5353 10.8.0.3#vpn-dns.corp.example
"""
DOMAIN_252 = """\
Global:
Link 2 (eth0p):
Link 3 (eth0): lan
Link 4 (tun0p):
Link 5 (tun0): ~corp.example eng.corp.example ~8.10.in-addr.arpa
"""
DEFAULT_ROUTE_252 = """\
Global
         Protocols: +LLMNR +mDNS -DNSOverTLS DNSSEC=no/unsupported
  resolv.conf mode: foreign
Current DNS Server: 10.255.255.53
        DNS Servers 10.255.255.53
Link 2 (eth0p): no
Link 3 (eth0): yes
Link 4 (tun0p): no
Link 5 (tun0): no
"""
TLS_252 = """\
Global: no
Link 2 (eth0p): no
Link 3 (eth0): no
Link 4 (tun0p): no
Link 5 (tun0): opportunistic
"""
# Debian 12 with COLUMNS=60: long lists go on in the next line.
DOMAIN_WRAPPED = """\
Global:
Link 3 (eth0): lan
Link 5 (tun0): ~corp.example eng.corp.example
        ~8.10.in-addr.arpa ~9.10.in-addr.arpa
"""
# systemd 259, as its varlink interface describes it.
STATUS_259 = [
    {
        "servers": [],
        "fallbackServers": [{"addressString": "1.1.1.1", "family": 2, "port": 53, "accessible": True}],
        "dnsOverTLS": "no",
        "resolvConfMode": "stub",
    },
    {"ifname": "lo", "ifindex": 1, "defaultRoute": False},
    {
        "ifname": "eth0",
        "ifindex": 3,
        "defaultRoute": True,
        "currentServer": {"addressString": "192.168.1.1", "family": 2, "port": 53, "ifindex": 3, "accessible": True},
        "servers": [
            {"addressString": "192.168.1.1", "family": 2, "port": 53, "ifindex": 3, "accessible": True},
            {"addressString": "fe80::1", "family": 10, "port": 53, "ifindex": 3, "accessible": True},
        ],
        "searchDomains": [{"name": "lan", "routeOnly": False, "ifindex": 3}],
        "dnsOverTLS": "no",
    },
    {
        "ifname": "tun0",
        "ifindex": 5,
        "defaultRoute": False,
        "servers": [
            {"addressString": "10.8.0.2", "family": 2, "port": 5353, "ifindex": 5, "accessible": True},
            {"addressString": "10.8.0.3", "family": 2, "port": 53, "name": "vpn-dns.corp.example", "ifindex": 5},
        ],
        "searchDomains": [{"name": "corp.example", "routeOnly": True, "ifindex": 5}],
        "dnsOverTLS": "yes",
    },
    {"delegate": "of a delegate", "servers": [{"addressString": "192.0.2.1", "port": 53}], "defaultRoute": True},
]


def server(address: str, *zones: str, order: int = 0, tls: str | None = None) -> Server:
    return Server(Upstream.parse(address), tuple(map(codec.wire_name, zones)), order, tls=tls)


VPN = ("corp.example", "eng.corp.example", "8.10.in-addr.arpa")


def test_names_of_the_vpns_domains_go_to_its_servers_and_all_others_to_default_routes() -> None:
    found = resolved.resolvers(resolved.of_text(DNS_252, DOMAIN_252, DEFAULT_ROUTE_252, TLS_252))
    assert found == Resolvers(
        servers=(
            server("192.168.1.1", "lan"),
            server("2001:db8::1", "lan", order=1),
            server("fe80::1%3", "lan", order=2),
            server("10.8.0.1", *VPN),
            server("10.8.0.2:5353", *VPN, order=1),
            server("10.8.0.3", *VPN, order=2),  # opportunistic TLS is asked in clear
            server("10.255.255.53"),
            server("192.168.1.1"),
            server("2001:db8::1", order=1),
            server("fe80::1%3", order=2),
        ),
        search=("lan", "eng.corp.example"),
    )


def test_the_output_of_a_newer_version_is_read_from_its_json() -> None:
    found = resolved.resolvers(resolved.of_json(json.dumps(STATUS_259)))
    assert found == Resolvers(
        servers=(
            server("192.168.1.1", "lan"),
            server("fe80::1%3", "lan", order=1),
            server("10.8.0.2:5353", "corp.example", tls="10.8.0.2"),
            server("10.8.0.3:853", "corp.example", order=1, tls="vpn-dns.corp.example"),
            server("192.168.1.1"),
            server("fe80::1%3", order=1),
        ),
        search=("lan",),
    )


def test_lists_that_go_on_in_the_next_line_are_read_whole() -> None:
    vpn = resolved.of_text(DNS_252, DOMAIN_WRAPPED)[-1]
    assert vpn.domains == ("~corp.example", "eng.corp.example", "~8.10.in-addr.arpa", "~9.10.in-addr.arpa")


def test_before_version_240_a_link_with_routing_domains_is_no_default_route() -> None:
    dns = "Link 3 (eth0): 192.168.1.1\nLink 5 (tun0): 10.8.0.1\nLink 6 (tun1): 10.9.0.1\nLink 7 (tun2): 10.7.0.1\n"
    domain = "Link 3 (eth0): lan home\nLink 5 (tun0): ~corp.example eng.example\nLink 7 (tun2): ~. ~corp.example\n"
    assert [link.default_route for link in resolved.of_text(dns, domain)] == [True, False, True, True]


def test_a_vpn_for_everything_takes_all_names_that_no_link_has() -> None:
    links = [
        Link(index=3, servers=("192.168.1.1",), domains=("lan",)),
        Link(index=5, servers=("10.8.0.1",), domains=("~.", "corp.example"), default_route=False),
        Link(servers=("9.9.9.9",)),
    ]
    assert resolved.resolvers(links).servers == (
        server("192.168.1.1", "lan"),
        server("10.8.0.1", "corp.example"),
        server("10.8.0.1"),
    )


def test_what_cannot_be_a_server_or_a_domain_is_left_out_alone(caplog: pytest.LogCaptureFixture) -> None:
    links = [Link(index=3, servers=("somewhere", "127.0.0.53", "10.0.0.1"), domains=("a..b", "good.example"))]
    assert resolved.resolvers(links).servers == (
        server("10.0.0.1", "good.example"),
        server("10.0.0.1"),
    )
    assert "'a..b'" in caplog.text and "'somewhere'" in caplog.text


def played(directory: Path, script: str) -> None:
    """A `resolvectl` in `directory` that runs the shell script with the arguments after `--no-pager`."""
    tool = directory / "resolvectl"
    tool.write_text(f"#!/bin/sh\nshift\n{script}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)


OLD = 'case "$*" in *status) echo Global;; {cases} *) echo "Unknown verb $*" >&2; exit 1;; esac'


def shell(cases: dict[str, str]) -> str:
    return OLD.format(cases=" ".join(f"{verb}) printf %s '{text}';;" for verb, text in cases.items()))


def test_a_version_without_json_is_asked_for_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(tmp_path, shell({"dns": DNS_252, "domain": DOMAIN_252}))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    by_index = {link.index: link for link in resolved.ask()}
    assert by_index[5].servers == ("10.8.0.1", "10.8.0.2:5353", "10.8.0.3#vpn-dns.corp.example")
    assert by_index[5].domains == ("~corp.example", "eng.corp.example", "~8.10.in-addr.arpa")


def test_a_version_with_json_is_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(tmp_path, f"""echo "$*" >>{tmp_path}/ran; printf %s '{json.dumps(STATUS_259)}'""")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert [link.index for link in resolved.ask()] == [0, 1, 3, 5]
    assert (tmp_path / "ran").read_text() == "--json=short status\n"


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (None, "resolvectl dns: .*No such file"),
        ("echo 'Failed to get global data: not provided' >&2; exit 1", "resolvectl dns: Failed to get global data"),
        ("echo '[nonsense'", "."),
    ],
)
def test_a_resolved_that_cannot_be_asked_is_told_in_its_own_words(
    script: str | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script is not None:
        played(tmp_path, script)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin" if script else str(tmp_path))
    if complaint == ".":
        assert resolved.ask() == []
    else:
        with pytest.raises(HostError, match=complaint):
            resolved.ask()


def test_one_that_hangs_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    played(tmp_path, "exec sleep 60")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(resolved, "WITHIN_S", 0.2)
    with pytest.raises(HostError, match="timed out"):
        resolved.ask()


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(["servers", "searchDomains", "ifindex", "addressString", "name", "port"]), inner
        )
    ),
    max_leaves=12,
)


@given(json_like)
def test_any_json_is_a_status_or_malformed(document: object) -> None:
    try:
        links = resolved.of_json(json.dumps(document))
    except Malformed:
        return
    resolved.resolvers(links)


@given(st.text(), st.lists(st.sampled_from([*DNS_252.splitlines(True), " ", "Link 9 (x):", "::1%"])).map("".join))
def test_any_text_is_an_output_of_resolvectl(domain: str, dns: str) -> None:
    resolved.resolvers(resolved.of_text(dns, domain, dns, domain))
