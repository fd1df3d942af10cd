"""dnsmasq as the resolvers of a home and of a VPN, dig as the guest's (Q03, F11, F12)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from dns.codec import wire_name
from dns.rules import Rules
from dns.server import Server
from dns.servers import Resolvers, Upstream
from dns.servers import Server as Known
from tests.dns.support import ask, dig, dnsmasq, needs_dig, needs_dnsmasq, parse, query, shell

pytestmark = [needs_dig, needs_dnsmasq]

HOME = ("--local=/example/", "--host-record=www.example,192.0.2.80", "--address=/many.example/192.0.2.1")
VPN = ("--local=/corp.example/", "--host-record=wiki.corp.example,10.8.0.80", "--txt-record=example,from the VPN")


def at(port: int, *zones: str, order: int = 0) -> Known:
    return Known(Upstream("127.0.0.1", port), tuple(map(wire_name, zones)), order)


@dataclass
class World:
    """Our server on `port`, and the resolvers it is told of."""

    resolvers: Resolvers
    server: Server
    port: int
    home: int
    vpn: int
    log: Path

    def asked_of_the_vpn(self) -> str:
        return self.log.read_text()

    async def status(self, *words: str) -> str:
        return (await dig(self.port, *words)).partition("status: ")[2].partition(",")[0]


@contextlib.asynccontextmanager
async def world(directory: Path, rules: Rules | None = None) -> AsyncIterator[World]:
    log = directory / "vpn.log"
    (directory / "vpn").mkdir()
    logged = ("--log-queries", f"--log-facility={log}")
    async with dnsmasq(directory, *HOME) as home, dnsmasq(directory / "vpn", *VPN, *logged) as vpn:
        made: World
        server = Server(hosts_path=None, source=lambda: made.resolvers, rules=rules or Rules())
        made = World(Resolvers(servers=(at(home),)), server, 0, home, vpn, log)
        async with shell(server) as made.port:
            yield made


async def test_names_of_a_vpn_are_known_while_it_is_up_and_all_others_all_the_time(tmp_path: Path) -> None:  # F11
    async with world(tmp_path) as seen:
        assert await seen.status("wiki.corp.example") == "NXDOMAIN"
        seen.resolvers = Resolvers(servers=(at(seen.home), at(seen.vpn, "corp.example")))
        for over in ("+notcp", "+tcp"):
            assert await dig(seen.port, "+short", over, "wiki.corp.example") == "10.8.0.80\n"
            assert await dig(seen.port, "+short", over, "www.example") == "192.0.2.80\n"
            assert await seen.status(over, "other.corp.example") == "NXDOMAIN"
        assert "from the VPN" not in await dig(seen.port, "example", "TXT")
        assert "wiki.corp.example" in seen.asked_of_the_vpn()
        assert "www.example" not in seen.asked_of_the_vpn() and "TXT" not in seen.asked_of_the_vpn()
        seen.resolvers = Resolvers(servers=(at(seen.home),))
        assert await seen.status("wiki.corp.example") == "NXDOMAIN", "and not what is remembered"
        assert await dig(seen.port, "+short", "www.example") == "192.0.2.80\n"


async def test_a_rule_sends_a_domain_to_its_server(tmp_path: Path) -> None:
    async with world(tmp_path) as seen:
        rules = Rules.parse({"corp.example": [f"127.0.0.1#{seen.vpn}"], "bad.example": "refuse"})
        server = Server(hosts_path=None, source=lambda: seen.resolvers, rules=rules)
        async with shell(server) as port:
            assert await dig(port, "+short", "wiki.corp.example") == "10.8.0.80\n"
            assert await dig(port, "+short", "www.example") == "192.0.2.80\n"
            for over in ("+notcp", "+tcp"):
                assert "status: REFUSED" in await dig(port, over, "x.bad.example")


async def test_128_lookups_beside_a_stopped_server_take_less_than_two_seconds(tmp_path: Path) -> None:  # F12
    async with world(tmp_path) as seen:
        stopped = _pid(seen.vpn)
        os.kill(stopped, signal.SIGSTOP)
        try:
            for order in (0, 1):
                seen.resolvers = Resolvers(servers=(at(seen.vpn), at(seen.home, order=order)))
                seen.server.network_changed()
                began = time.monotonic()
                names = [f"n{n}.order{order}.many.example" for n in range(128)]
                answers = await asyncio.gather(*(ask(seen.server, query(name)) for name in names))
                assert time.monotonic() - began < 2.0
                assert {str(parse(answer).rr[0].rdata) for answer in answers} == {"192.0.2.1"}
        finally:
            os.kill(stopped, signal.SIGCONT)


def _pid(port: int) -> int:
    """Of the dnsmasq on `port`; it is a child of ours."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes().split(b"\0")
            if words[0].endswith(b"dnsmasq") and b"--port=%d" % port in words:
                return int(entry.name)
    raise AssertionError(f"no dnsmasq has port {port}")


async def test_a_second_question_costs_the_resolver_nothing(tmp_path: Path) -> None:  # Q06
    async with world(tmp_path) as seen:
        seen.resolvers = Resolvers(servers=(at(seen.vpn),))
        record = ("wiki.corp.example",)
        first = await dig(seen.port, "+nocookie", *record)
        before = seen.asked_of_the_vpn().count("query[A]")
        again = await dig(seen.port, "+nocookie", *record)
        # dnsmasq's own records live 0 seconds, so nothing may be remembered of them.
        assert "10.8.0.80" in first and "10.8.0.80" in again
        assert seen.asked_of_the_vpn().count("query[A]") == before + 1


async def test_a_time_to_live_of_dnsmasq_goes_down_with_us(tmp_path: Path) -> None:  # Q06
    log = tmp_path / "log"
    options = ("--host-record=a.example,192.0.2.1,100", "--log-queries", f"--log-facility={log}")
    async with dnsmasq(tmp_path, *options) as port:
        now = [1000.0]
        resolvers = Resolvers(servers=(at(port),))
        server = Server(hosts_path=None, source=lambda: resolvers, clock=lambda: now[0])
        async with shell(server) as ours:
            assert "100\tIN" in await dig(ours, "+nocookie", "a.example")
            now[0] += 40
            assert "60\tIN" in await dig(ours, "+nocookie", "a.example")
            assert log.read_text().count("query[A] a.example") == 1
            now[0] += 60
            assert "100\tIN" in await dig(ours, "+nocookie", "a.example")
            assert log.read_text().count("query[A] a.example") == 2
