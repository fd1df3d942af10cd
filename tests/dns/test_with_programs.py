"""dnsmasq as the host's resolver and dig as the guest's (Q01-Q04, F11, F12)."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dns.server import Server
from tests.dns.support import dig, dnsmasq, free_port, needs_dig, needs_dnsmasq, shell

pytestmark = [needs_dig, needs_dnsmasq]

ZONE = (
    "--local=/test/",
    "--host-record=www.test,10.1.1.1,fd00::1",
    "--host-record=v4.test,10.1.1.4",
    "--cname=alias.test,www.test",
    "--mx-host=test,mail.test,10",
    "--txt-record=text.test,hello world,second",
    "--srv-host=_sip._udp.test,sip.test,5060,1,2",
    "--ptr-record=9.9.1.10.in-addr.arpa,nine.test",
    "--dns-rr=odd.test,65280,c0ffee00",
    "--dns-rr=svc.test,65,000100000100030268320004000401020304",
    *(f"--host-record=big.test,10.2.0.{n}" for n in range(64)),
)


@contextlib.asynccontextmanager
async def served(directory: Path) -> AsyncIterator[tuple[int, int, Server]]:
    """Ports of our server and of the dnsmasq behind it."""
    async with dnsmasq(directory, *ZONE) as upstream:
        server = Server(
            names={"host.internal": [bytes([192, 168, 65, 2])]},
            hosts_path=None,
            resolv_conf=None,
            upstreams=[f"127.0.0.1#{upstream}"],
        )
        async with shell(server) as port:
            yield port, upstream, server


def told(output: str) -> list[str]:
    """What dig prints of the message, without times, sizes, ids and its own remarks; records in any order."""
    lines = [
        line
        for line in output.splitlines()
        if line and not line.startswith((";; Q", ";; SERVER", ";; WHEN", ";; MSG", "; <<"))
    ]
    return sorted(re.sub(r"id: \d+|COOKIE: \w+( \(\w+\))?", "", line) for line in lines)


QUESTIONS = [
    ("www.test", "A"),
    ("www.test", "AAAA"),
    ("wWw.TeSt", "A"),
    ("alias.test", "A"),
    ("test", "MX"),
    ("text.test", "TXT"),
    ("_sip._udp.test", "SRV"),
    ("9.9.1.10.in-addr.arpa", "PTR"),
    ("odd.test", "TYPE65280"),
    ("svc.test", "HTTPS"),
    ("v4.test", "AAAA"),  # no data
    ("nosuch.test", "A"),  # NXDOMAIN
    ("elsewhere.example", "A"),  # REFUSED: it has nobody to ask
]


@pytest.mark.parametrize(
    "options", [("+noedns",), ("+edns=0", "+bufsize=1232"), ("+dnssec", "+cdflag"), ("+tcp",)], ids=" ".join
)
async def test_dig_sees_what_it_sees_without_us_in_between(
    tmp_path: Path, options: tuple[str, ...]
) -> None:  # Q01, Q03
    async with served(tmp_path) as (port, upstream, _):
        for name, qtype in QUESTIONS:
            ours, theirs = await asyncio.gather(
                dig(port, *options, "+nocookie", name, qtype), dig(upstream, *options, "+nocookie", name, qtype)
            )
            assert "status:" in theirs
            assert told(ours) == told(theirs)


async def test_a_truncated_answer_makes_dig_come_back_over_tcp(tmp_path: Path) -> None:  # Q02
    async with served(tmp_path) as (port, _, server):
        assert "flags: qr aa tc" in (cut := await dig(port, "+noedns", "+ignore", "big.test"))
        assert "ANSWER: 64" not in cut
        whole = await dig(port, "+noedns", "big.test")
        assert "ANSWER: 64" in whole and "Truncated, retrying in TCP mode" in whole
        assert server.counters["queries_tcp"] == 1
        assert "ANSWER: 64" in await dig(port, "+bufsize=4096", "+notcp", "+ignore", "big.test")


async def test_dig_keeps_one_connection_for_many_names(tmp_path: Path) -> None:  # Q02
    async with served(tmp_path) as (port, _, server):
        output = await dig(port, "+tcp", "+keepopen", "+short", "www.test", "v4.test", "host.internal")
        assert output.split() == ["10.1.1.1", "10.1.1.4", "192.168.65.2"]
        assert server.counters["streams"] == 1


@pytest.mark.parametrize("options", [(), ("+tcp",), ("+noedns",)], ids=" ".join)
async def test_dig_finds_nothing_wrong_with_our_own_answers(tmp_path: Path, options: tuple[str, ...]) -> None:  # Q04
    async with served(tmp_path) as (port, _, _server):
        output = await dig(port, *options, "HOST.internal")
        assert re.search(r"^HOST\.internal\.\s+0\s+IN\s+A\s+192\.168\.65\.2$", output, re.MULTILINE)
        assert "WARNING" not in output and "Got bad" not in output
        assert ("EDNS: version: 0" in output) == ("+noedns" not in options)
        assert (
            "status: NOERROR" in (empty := await dig(port, *options, "host.internal", "AAAA")) and "ANSWER: 0" in empty
        )
        assert "host.internal." in await dig(port, *options, "-x", "192.168.65.2")


async def test_no_resolver_is_servfail_at_once_for_dig() -> None:
    async with shell(Server(hosts_path=None, resolv_conf="/nonexistent/resolv.conf")) as port:
        for options in ((), ("+tcp",)):
            output = await dig(port, *options, "www.test")
            assert "status: SERVFAIL" in output
            assert int(re.findall(r"Query time: (\d+) msec", output)[0]) < 1000


async def test_the_resolver_is_killed_and_another_takes_over(tmp_path: Path) -> None:  # F11, F12
    path = tmp_path / "resolv.conf"
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    async with dnsmasq(tmp_path / "b", "--host-record=www.test,10.0.0.2") as second:
        async with dnsmasq(tmp_path / "a", "--host-record=www.test,10.0.0.1") as first:
            path.write_text(f"nameserver 127.0.0.1#{first}\nnameserver 127.0.0.1#{second}\n")
            server = Server(hosts_path=None, resolv_conf=str(path))
            async with shell(server) as port:
                assert await dig(port, "+short", "www.test") == "10.0.0.1\n"
        server = Server(hosts_path=None, resolv_conf=str(path))
        async with shell(server) as port:
            assert await dig(port, "+short", "www.test") == "10.0.0.2\n"
            assert await dig(port, "+tcp", "+short", "www.test") == "10.0.0.2\n"
            path.write_text(f"nameserver 127.0.0.1#{free_port()}\n")
            server.network_changed()
            assert "SERVFAIL" in await dig(port, "www.test")
